"""Two processes with half of each batch each make the weights that one process makes with all of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ddp_cases
from helpers.cli import ROOT, recipe, unmoved
from helpers.ddp_cases import CASES, MINIATURE, MORTAL, RESUMED, alone, command, pgd, trained
from safetensors.torch import load_file
from torch import Tensor

from unmoved import Batch, Method, Phases, Run, UnmovedError, attacks, defenses, terms
from unmoved.core import collectives
from unmoved.core.collectives import Share
from unmoved.runs.recipe import read
from unmoved.runs.train import train_recipe
from unmoved.testing import without_case
from unmoved.training import distributed

EQUAL = 1e-9
ROUNDING = 1e-5  # what float32 may make of the order of a sum, after the 20 steps of the miniature
SAID = [*(f"epoch {epoch}/4" for epoch in range(1, 5)), "trained", "next"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crew")
    recipe(folder, MINIATURE)
    (folder / "mortal.py").write_text(MORTAL)
    rng = np.random.default_rng(0)  # and not digits, for which each process would import scikit-learn
    np.savez(folder / "random.npz", x=rng.integers(0, 256, (320, 8, 8), dtype=np.uint8), y=rng.integers(0, 4, 320))
    return folder


@pytest.fixture(scope="module")
def crews(folder: Path) -> list[Results]:
    """What each of two real processes under torchrun found."""
    for name in RESUMED:
        trained(CASES[name](), alone(), 1, Run(folder / "by-one" / name))
    ended = subprocess.run(
        [*TORCHRUN, "-m", "helpers.ddp_cases", folder],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@cache
def straight(name: str) -> dict[str, Tensor]:
    """What one process makes of a case, undisturbed."""
    return trained(CASES[name](), alone())


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The command's run by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        unmoved(*command("one")).fine()
    return folder / "one"


@pytest.fixture(scope="module")
def commands(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The command in two processes: to its end, and until the second one dies. At once, for both mostly import."""
    outside = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "unmoved", *command(name), "--devices", "2"],
            cwd=folder,
            env=outside | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, more in (("two", {}), ("killed", {"DEADLY": "killed"}))
    }
    try:
        said = {name: process.communicate(timeout=120) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    return {
        name: subprocess.CompletedProcess(process.args, process.returncode, *said[name])
        for name, process in started.items()
    }


def heads(said: str) -> list[str]:
    """How the lines of a command begin."""
    return re.findall(r"^(epoch \d/4|\w+):", said, re.MULTILINE)


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    """Weights and log, to rounding."""
    for name in ("last", "best"):
        found, expected = (load_file(path / f"{name}.safetensors") for path in (run, undisturbed))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= ROUNDING, (name, key)
    log, straight_log = (Run.open(path).metrics.drop(columns="seconds") for path in (run, undisturbed))
    pd.testing.assert_frame_equal(log, straight_log, atol=ROUNDING, rtol=0)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= EQUAL, name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, crews: list[Results]) -> None:
    expected = straight(name)
    fresh = {f"model.{key}": value for key, value in ddp_cases.network().state_dict().items()}
    assert any(not torch.equal(fresh[key], expected[key]) for key in fresh), "nothing was trained"
    for results in crews:
        assert_equal(results[name], expected)


def test_attacks_run_on_the_module_itself(crews: list[Results]) -> None:
    """Neither on DDP's wrapper nor on fabric's, in a call and in an update alike."""
    for results in (*crews, {"attack witness": straight("attack witness")}):
        given = results["attack witness"]["given"]
        assert given.tolist() == [1.0] * (2 * 2 * 4)  # both, in two epochs of four steps


def test_every_attack_objective_and_defense_is_among_the_cases() -> None:
    """What is not found by itself, since its constructor needs arguments, is written in helpers/ddp_cases.py."""
    methods = [case().method for case in CASES.values()]
    assert without_case(attacks, [method.attack for method in methods], threat=ddp_cases.THREAT) == {}
    assert without_case(terms, [method.objective for method in methods], num_classes=ddp_cases.CLASSES) == {}
    assert without_case(defenses, [method.defense for method in methods]) == {}


@pytest.mark.parametrize("name", RESUMED)
def test_a_training_begun_by_two_goes_on_with_one_and_the_other_way_round(
    name: str, folder: Path, crews: list[Results]
) -> None:
    for results in crews:
        assert len(results[f"by-two {name}"]["log"]) == 1
        assert_equal(results[f"by-one {name}"], straight(name))
    assert_equal(trained(CASES[name](), alone(), 2, Run(folder / "by-two" / name)), straight(name))


def test_running_statistics_are_the_same_on_all_processes(crews: list[Results]) -> None:
    """Each normalises its own samples, so the weights differ from one process's; between the two nothing differs."""
    assert_equal(crews[1]["norm"], crews[0]["norm"])
    before = ddp_cases.network(norm=True).state_dict()
    assert not torch.equal(crews[0]["norm"]["model.1.running_mean"], before["1.running_mean"])


def test_no_sample_is_lost_or_seen_twice() -> None:
    batch = next(ddp_cases.Doubles().batches(5))
    for total in (1, 2, 5):
        part = batch.take(torch.arange(total))
        for count in (1, 2, 3, 8):
            seen: list[int] = []
            for rank in range(count):
                mine, share = Share.of(part, rank, count)
                assert len(mine) > 0
                seen += mine.index[: total if share is None else share.own].tolist()
            assert sorted(seen) == part.index.tolist()


def test_alone_nothing_is_exchanged() -> None:
    values = torch.randn(4, dtype=torch.float64)
    assert collectives.mean(values) == values.mean()
    assert collectives.logsumexp(values) == torch.logsumexp(values, 0)
    assert torch.equal(collectives.gathered(values), values)
    assert torch.equal(collectives.summed(values), values)
    with collectives.sharing(None):
        assert collectives.own(values) is values


def test_attacks_that_would_wait_for_each_other_for_ever_are_refused() -> None:
    stop = attacks.Sensible(0.5)
    couples = Method(pgd(stop=stop, loss=terms.Sum((1, terms.CE()), (1, terms.PRSL("adv")))), terms.CE())
    normalises = Method(pgd(stop=stop, mode="train"), terms.CE())
    with pytest.raises(UnmovedError, match="train in one process"):
        distributed.require_lockstep(Phases.of(couples), sync_batchnorm=False)
    for broken_leave in (attacks.Square, attacks.SPSA, attacks.APGD):  # without any rule
        coupled = Method(broken_leave(ddp_cases.THREAT, loss=terms.PRSL("adv")), terms.CE())
        with pytest.raises(UnmovedError, match="train in one process"):
            distributed.require_lockstep(Phases.of(coupled), sync_batchnorm=False)
    distributed.require_lockstep(Phases.of(Method(pgd(loss=terms.PRSL("adv")), terms.CE())), sync_batchnorm=False)
    with pytest.raises(UnmovedError, match="train in one process"):
        distributed.require_lockstep(Phases.of(normalises), sync_batchnorm=True)
    distributed.require_lockstep(Phases.of(normalises), sync_batchnorm=False)
    nested = terms.Sum((1, terms.CE()), (2, terms.Sum((1, terms.PRSL("adv")), (1, terms.KL()))))
    with pytest.raises(UnmovedError, match="train in one process"):
        distributed.require_lockstep(Phases.of(Method(pgd(stop=stop, loss=nested), terms.CE())), sync_batchnorm=False)


@pytest.mark.parametrize(("couples", "lockstep"), [(True, False), (True, True), (False, False)])
def test_what_strangers_declare_decides_it_too(couples: bool, lockstep: bool) -> None:
    loss = type("Loss", (terms.CE,), {"couples_samples": couples})()
    attack = type("Attack", (attacks.APGD,), {"lockstep": lockstep})(ddp_cases.THREAT, loss)
    phases = Phases.of(Method(attack, terms.CE()))
    with pytest.raises(UnmovedError, match="train in one process") if couples and not lockstep else nullcontext():
        distributed.require_lockstep(phases, sync_batchnorm=False)


def test_attacks_that_never_wait_are_trained_with() -> None:
    stop = attacks.Sensible(0.5)
    distributed.require_lockstep(Phases.of(Method(pgd(stop=stop), terms.PRSL())), sync_batchnorm=True)


@pytest.mark.parametrize(
    ("variables", "settings", "words"),
    [
        ({}, {"devices": 0}, "devices: expected a whole number >= 1"),
        ({}, {"device": "tpu"}, "device: unknown value 'tpu'"),
        (
            {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"},
            {"devices": 3},
            "torchrun started 1 node.s. of 2",
        ),
    ],
)
def test_what_cannot_be_started_is_refused(
    variables: dict[str, str], settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnmovedError, match=words):
        distributed.prepare(**settings)


def test_a_batch_job_of_slurm_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.prepare("cpu").world_size == 1
    assert distributed.rank() == 0


def test_the_rank_is_known_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.rank(devices=4) == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "2")
    assert distributed.rank(devices=4, nodes=3) == 9
    assert distributed.rank() == 0, "one process is the first, whatever its surroundings say"


def test_a_batch_of_one_leaves_the_other_process_without_a_sample_of_its_own() -> None:
    batch = Batch(torch.rand(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
    mine, share = Share.of(batch, 1, 2)
    assert share == Share(rank=1, count=2, own=0, total=1)
    with collectives.sharing(share):
        values = torch.ones(len(mine), requires_grad=True)
        loss = collectives.mean(values)
        loss.backward()
        assert loss == 0
        assert values.grad is not None
        assert values.grad.eq(0).all()


def test_the_command_trains_in_two_processes_as_in_one(
    folder: Path, commands: dict[str, subprocess.CompletedProcess[str]], undisturbed: Path
) -> None:
    ended = commands["two"]
    assert ended.returncode == 0, ended.stderr
    assert heads(ended.stdout) == SAID, "the second process is silent"
    assert_as_undisturbed(folder / "two", undisturbed)


def test_the_command_trains_under_torchrun_as_alone(folder: Path, crews: list[Results], undisturbed: Path) -> None:
    said = [(folder / f"said{rank}").read_text() for rank in range(2)]
    assert heads(said[0]) == SAID
    assert said[1] == ""
    assert_as_undisturbed(folder / "torchrun", undisturbed)


def test_the_command_says_that_a_process_is_gone_and_one_alone_goes_on(
    folder: Path,
    commands: dict[str, subprocess.CompletedProcess[str]],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, run = commands["killed"], folder / "killed"
    assert ended.returncode == 1
    assert "another process of this training ended" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count("epoch 1/4") == 1, "the second process is silent"
    saved = Run.open(run).load_state()
    assert saved is not None
    assert saved["epochs"] == len(Run.open(run).metrics) == 2
    monkeypatch.chdir(folder)
    with pytest.raises(UnmovedError, match="differs in: training"):  # it is the same run, of another number of epochs
        train_recipe(read("tiny.toml", ["training.epochs=9"]), "killed", resume=True, allow=["mortal"])
    said = unmoved(*command("killed"), "--devices", "1", "--resume").fine().out
    assert heads(said) == SAID[2:]
    assert_as_undisturbed(run, undisturbed)
