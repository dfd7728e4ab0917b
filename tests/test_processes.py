"""Two processes with half of each batch each make the weights that one process makes with all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crew
import pytest
import torch
from crew import CASES, Case, alone, everything, pgd, trained
from road import recipe
from torch import Tensor

from unmoved import Batch, Method, Phases, Run, UnmovedError, attacks, engine, processes, terms
from unmoved.config import read
from unmoved.processes import Share
from unmoved.training import train_recipe

EQUAL = 1e-9
Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crew")


@pytest.fixture(scope="module")
def crews(folder: Path) -> list[Results]:
    """What each of two real processes under torchrun found."""
    for name in ("by-two", "by-one"):
        Run.create(folder / name, {"name": name})
    trained(Case(everything()), alone(), 1, Run.open(folder / "by-one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, crew.__file__, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def until(happens: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= EQUAL, name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, crews: list[Results]) -> None:
    expected = trained(CASES[name](), alone())
    fresh = {f"model.{key}": value for key, value in crew.network().state_dict().items()}
    assert any(not torch.equal(fresh[key], expected[key]) for key in fresh), "nothing was trained"
    for results in crews:
        assert_equal(results[name], expected)


def test_a_training_begun_by_two_goes_on_with_one_and_the_other_way_round(folder: Path, crews: list[Results]) -> None:
    straight = trained(Case(everything()), alone(), 2)
    assert_equal(crews[0]["by-one"], straight)
    assert_equal(trained(Case(everything()), alone(), 2, Run.open(folder / "by-two")), straight)


def test_running_statistics_are_the_same_on_all_processes(crews: list[Results]) -> None:
    """Each normalises its own samples, so the weights differ from one process's; between the two nothing differs."""
    assert_equal(crews[1]["norm"], crews[0]["norm"])
    before = crew.network(norm=True).state_dict()
    assert not torch.equal(crews[0]["norm"]["model.1.running_mean"], before["1.running_mean"])


def test_no_sample_is_lost_or_seen_twice() -> None:
    batch = next(crew.Doubles().batches(5))
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
    assert processes.mean(values) == values.mean()
    assert processes.logsumexp(values) == torch.logsumexp(values, 0)
    assert torch.equal(processes.gathered(values), values)
    assert torch.equal(processes.summed(values), values)
    with processes.sharing(None):
        assert processes.own(values) is values


def test_attacks_that_would_wait_for_each_other_for_ever_are_refused() -> None:
    stop = attacks.Sensible(0.5)
    couples = Method(pgd(stop=stop, loss=terms.Sum((1, terms.CE()), (1, terms.PRSL("adv")))), terms.CE())
    normalises = Method(pgd(stop=stop, mode="train"), terms.CE())
    with pytest.raises(UnmovedError, match="train in one process"):
        engine.require_lockstep(Phases.of(couples), sync_batchnorm=False)
    with pytest.raises(UnmovedError, match="train in one process"):
        engine.require_lockstep(Phases.of(normalises), sync_batchnorm=True)
    engine.require_lockstep(Phases.of(normalises), sync_batchnorm=False)
    engine.require_lockstep(Phases.of(Method(pgd(stop=stop), terms.PRSL())), sync_batchnorm=True)


@pytest.mark.parametrize(
    ("variables", "settings", "words"),
    [
        ({}, {"devices": 0}, "devices: expected a finite number >= 1"),
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
        engine.prepare(**settings)


def test_a_batch_job_of_slurm_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert engine.prepare("cpu").world_size == 1
    assert engine.rank() == 0


def test_the_rank_is_known_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.rank(devices=4) == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "2")
    assert engine.rank(devices=4, nodes=3) == 9
    assert engine.rank() == 0, "one process is the first, whatever its surroundings say"


def test_a_batch_of_one_leaves_the_other_process_without_a_sample_of_its_own() -> None:
    batch = Batch(torch.rand(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))
    mine, share = Share.of(batch, 1, 2)
    assert share == Share(rank=1, count=2, own=0, total=1)
    with processes.sharing(share):
        values = torch.ones(len(mine), requires_grad=True)
        loss = processes.mean(values)
        loss.backward()
        assert loss == 0
        assert values.grad is not None
        assert values.grad.eq(0).all()


def test_the_command_trains_in_two_processes_and_says_it_when_one_of_them_is_gone(tmp_path: Path) -> None:
    path, out = recipe(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "unmoved.cli", "train", str(path), "--out", str(out), "--device", "cpu"]
    settings = ["--set", "training.epochs=300", "--set", "training.validation=0"]
    process = subprocess.Popen(
        [*command, *settings, "--devices", "2"],
        env={name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: (out / "trainer.pt").exists() or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1, process.stderr and process.stderr.read()
    os.kill(int(children[0]), signal.SIGKILL)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "another process of this training ended" in complaint
    assert "Traceback" not in complaint
    assert said.count("epoch 1/300") == 1, "the second process is silent"
    done = len(Run.open(out).metrics)
    assert 0 < done < 300
    with pytest.raises(UnmovedError, match="differs in: training"):  # it is the same run, of another number of epochs
        train_recipe(read(path), out, resume=True)
    saved = Run.open(out).load_state()
    assert saved is not None
    assert len(saved["log"]) == done
