"""Run folders: equal weights are equal files, nothing in them is ever executed, and "best" is what it says."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved
from torch import Tensor, nn

import unmoved as package
from unmoved.attacks import PGD
from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.data import digits
from unmoved.evaluation import judge, outcomes
from unmoved.models import load_weights
from unmoved.runs import load
from unmoved.runs.folder import Run
from unmoved.runs.provenance import _own_code, provenance
from unmoved.terms import CE
from unmoved.training.optim import SGD
from unmoved.training.trainer import TrainerState

THREAT = ThreatModel("linf", 0.1)


def new_run(folder: Path, **tables: Any) -> Run:
    return Run.create(folder, {"name": "test", **tables})


# --- what lies in a folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One recipe, trained twice."""
    folder = tmp_path_factory.mktemp("two")
    path = recipe(folder)
    for name in ("one", "two"):
        unmoved("train", path, "--out", folder / name).fine()
        torch.manual_seed(99)  # what the caller draws in between has no part in it
    return folder / "one", folder / "two"


def test_the_same_recipe_gives_the_same_files_byte_for_byte(two_runs: tuple[Path, Path]) -> None:
    one, two = two_runs
    names = {path.name for path in one.iterdir()}
    expected = {"recipe.toml", "provenance.json", "metrics.jsonl", "best.safetensors", "last.safetensors"}
    expected |= {"trainer.pt", "trainer.previous.pt"}
    assert names == expected == {path.name for path in two.iterdir()}
    for name in ("recipe.toml", "best.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    seconds = [Run(path).metrics.pop("seconds") for path in two_runs]
    assert all(column.is_monotonic_increasing for column in seconds)
    assert Run(one).metrics.drop(columns="seconds").equals(Run(two).metrics.drop(columns="seconds"))


def test_the_seed_is_in_the_weights(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = recipe(tmp_path)
    unmoved("train", path, "--out", tmp_path / "run", "--set", "training.seed=1").fine()
    assert (tmp_path / "run" / "best.safetensors").read_bytes() != (two_runs[0] / "best.safetensors").read_bytes()


def test_a_run_reads_back_what_it_wrote(two_runs: tuple[Path, Path]) -> None:
    run = Run.open(two_runs[0])
    assert run.recipe["training"]["epochs"] == 2
    assert (run.name, run.seed) == (f"{two_runs[0].parent.name}/tiny", 0)
    metrics = run.metrics
    assert metrics["epoch"].tolist() == [1, 2]
    assert metrics["step"].tolist() == [5, 10]
    assert {"lr", "eps", "loss", "parts.ce", "train_accuracy", "validation_clean", "validation_robust"} <= set(metrics)
    assert (metrics["validation_n"] == 30).all()
    assert run.evaluation is run.outcomes is run.curve is run.gallery is None


def test_provenance_says_what_where_and_when(two_runs: tuple[Path, Path]) -> None:
    facts = Run.open(two_runs[0]).provenance
    assert facts["format"] == 1
    assert facts["command"].startswith("unmoved train ")
    assert facts["seed"] == 0
    assert abs(datetime.fromisoformat(facts["started"]) - datetime.now(UTC)).total_seconds() < 3600
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["versions"]["unmoved"] == package.__version__
    assert {"python", "numpy", "lightning-fabric"} <= facts["versions"].keys()
    assert {"system", "processor", "cores", "threads"} <= facts["hardware"].keys()
    assert facts["hardware"]["cores"] >= 1


def test_the_code_of_every_package_counts_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("unmoved.runs.provenance._sha256", lambda path: hashed.append(path) or b"")
    _own_code.__wrapped__()
    assert set(hashed) == set(Path(package.__file__).parent.rglob("*.py"))


def test_provenance_names_the_commit_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance({})["git"] is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "--no-verify", "-m", "first"], check=True)
    git = provenance({})["git"]
    assert len(git["commit"]) == 40
    assert git["dirty"] is False
    (tmp_path / "new.py").write_text("")
    assert provenance({})["git"]["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance({})["git"] is None  # no git here


# --- nothing is executed


class Evil:
    """Its pickle makes a file when it is loaded by an ordinary unpickler."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_trainer_state_is_plain_and_loads_without_pickle(two_runs: tuple[Path, Path]) -> None:
    state = torch.load(two_runs[0] / "trainer.pt", weights_only=True)
    assert {"model", "optimizer", "schedule", "log", "best"} <= state.keys()

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str | int) and plain(part) for key, part in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, Tensor | int | float | str | bool)

    assert all(plain(part) for part in state.values())


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_an_evil_trainer_state_is_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "executed"
    path = recipe(tmp_path)
    unmoved("train", path, "--out", tmp_path / "run", "--set", "training.epochs=1").fine()
    buffer = io.BytesIO()
    if kind == "bare pickle":
        pickle.dump(Evil(target), buffer)
        load = pickle.loads
    else:
        torch.save({"log": Evil(target)}, buffer, _use_new_zipfile_serialization=kind == "zip")

        def load(data: bytes) -> Any:
            return torch.load(io.BytesIO(data), weights_only=False)

    (tmp_path / "run" / "trainer.pt").write_bytes(buffer.getvalue())
    (tmp_path / "run" / "metrics.jsonl").unlink()  # with a whole log nobody would look at the state
    command = ("train", path, "--out", tmp_path / "run", "--set", "training.epochs=1", "--resume")
    assert "not a trainer state that can be read safely" in unmoved(*command).mistake()
    assert not target.exists()
    load(buffer.getvalue())  # the trap does work
    assert target.exists()


def test_an_evil_gallery_is_refused_and_not_executed(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    (run.path / "evaluation").mkdir()
    np.savez(run.path / "evaluation" / "gallery.npz", x=np.array([Evil(tmp_path / "executed")], dtype=object))
    with pytest.raises(UnmovedError, match=r"gallery.npz: .*an array of objects, which is a pickle and never loaded"):
        _ = run.gallery
    assert not (tmp_path / "executed").exists()
    with zipfile.ZipFile(run.path / "evaluation" / "gallery.npz", "w"):
        pass
    assert run.gallery is None  # nothing in it: the model got nothing right


@pytest.mark.parametrize(
    "state", [{"a": 1}, {"log": [], "best": [0, 0]}, [1, 2], {"log": 3, "best": 1, "model": {}, "optimizer": {}}]
)
def test_a_trainer_state_of_something_else_is_named(tmp_path: Path, state: Any) -> None:
    run = new_run(tmp_path / "run")
    run.save_state(state)
    with pytest.raises(UnmovedError, match=r"trainer\.pt"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), run)


def test_a_trainer_state_of_another_model_is_named(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), run)
    with pytest.raises(UnmovedError, match=r"delete trainer\.pt and trainer\.previous\.pt to train this run"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 10)), run, epochs=3)


def train(model: nn.Module, run: Run | None = None, epochs: int = 2, **settings: Any) -> list[dict[str, Any]]:
    part = digits(test=1700).train
    return package.train(
        model, Method(None, CE("clean")), part, epochs=epochs, run=run, precision="float32", **settings
    )


# --- whole files or none


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old")

    def torn(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", torn)
    with pytest.raises(
        UnmovedError, match=r"could not write .*file: the disk is full; what was saved before is intact"
    ):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_create_and_open(tmp_path: Path) -> None:
    run = new_run(tmp_path / "a" / "b", training={"seed": 3})
    assert Run.open(run.path).seed == 3
    assert json.loads((run.path / "provenance.json").read_text())["seed"] == 3
    new_run(run.path, training={"seed": 4})  # nothing was saved of the one before
    assert Run.open(run.path).seed == 4
    assert run.load_state() is None
    assert len(run.metrics) == 0
    run.log.add({"epoch": 1})
    with pytest.raises(UnmovedError, match="already holds a run"):
        new_run(run.path)


def test_a_folder_killed_before_its_recipe_was_written_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("{}")
    assert new_run(tmp_path).provenance["format"] == 1


# --- best


class Constant(nn.Module):
    """Says its one weight."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))


def commit(run: Run, scores: list[tuple[float, float]], epoch: int = 0, attack: Any = PGD(THREAT)) -> None:  # noqa: B008
    """One epoch for each (clean, robust) score, the weight being the epoch's number."""
    model = Constant()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    attacks = [] if attack is None else [attack]
    state = TrainerState(model, optimizer, schedule, nn.ModuleList(), attacks, run)
    state.restore(state.saved())
    for number, (clean, robust) in enumerate(scores, start=epoch + 1):
        model.value.data.fill_(number)
        state.commit({"epoch": number, "validation_clean": clean, "validation_robust": robust}, 1.0)


def epoch_of(run: Run, which: str) -> int:
    model = Constant()
    load_weights(model, run.path / f"{which}.safetensors")
    return int(model.value)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.9, 0.3), (0.8, 0.5), (0.7, 0.4)], 2),  # by robust accuracy, not by clean
        ([(0.8, 0.5), (0.9, 0.5), (0.7, 0.5)], 2),  # ties by clean accuracy
        ([(0.8, 0.5), (0.8, 0.5)], 1),  # and then the first
        ([(0.0, 0.0), (0.0, 0.0)], 1),
        ([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], 3),
    ],
)
def test_best_is_by_validation_robust_accuracy(tmp_path: Path, scores: list[tuple[float, float]], best: int) -> None:
    run = new_run(tmp_path)
    commit(run, scores)
    assert (epoch_of(run, "best"), epoch_of(run, "last")) == (best, len(scores))
    for k in range(1, len(scores)):  # and an interruption after any epoch does not change it
        cut = new_run(tmp_path / f"cut{k}")
        commit(cut, scores[:k])
        commit(cut, scores[k:], epoch=k)
        assert (epoch_of(cut, "best"), epoch_of(cut, "last")) == (best, len(scores))
        assert cut.metrics["seconds"].tolist() == [float(n) for n in range(1, len(scores) + 1)]


def test_without_an_attack_best_is_by_validation_clean_accuracy(tmp_path: Path) -> None:
    """The robust accuracy of an undefended model is noise near zero."""
    run = new_run(tmp_path)
    commit(run, [(0.90, 0.01), (0.95, 0.00), (0.95, 0.02), (0.93, 0.03)], attack=None)
    assert epoch_of(run, "best") == 3
    assert run.metrics["kept"].tolist() == [True, True, True, False]


def test_without_validation_best_is_last(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), run, epochs=3)
    assert (tmp_path / "best.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()


def test_the_best_weights_score_what_the_log_says(tmp_path: Path) -> None:
    """Judged again, best.safetensors has the highest validation robust accuracy of the log."""
    part, held_out = digits(test=1300).train.hold_out(100, seed=0)
    check = PGD(THREAT, steps=3, keep="best")
    for name, attack, first in (("at", PGD(THREAT, steps=1), "robust"), ("standard", None, "clean")):
        run, model = new_run(tmp_path / name), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        package.train(
            model, Method(attack, CE("clean" if attack is None else "adv")), part, validation=held_out, check=check,
            threat=THREAT, epochs=6, optimizer=SGD(lr=0.5), run=run, precision="float32",
        )  # fmt: skip
        log = run.metrics
        run.load_weights(model, "best")
        judged = judge.evaluate(model, held_out, {"check": check}, THREAT)
        table = outcomes.summary(judged).set_index("measure")["accuracy"]
        assert log[f"validation_{first}"].nunique() > 2
        assert {"robust": table["check"], "clean": table["clean"]}[first] == log[f"validation_{first}"].max()
        kept = log[log["kept"]].iloc[-1]
        assert (table["clean"], table["check"]) == (kept["validation_clean"], kept["validation_robust"])


# --- evaluations


def test_a_model_that_gets_nothing_right_is_judged_and_reported(tmp_path: Path) -> None:
    """No sample to attack, no gallery: 0 % is an answer like another."""
    path = recipe(tmp_path, RECIPE.replace('use = "mlp"\nhidden = [16]', 'use = "linear"'))
    run = tmp_path / "run"
    unmoved("train", path, "--out", run, "--set", "training.epochs=1").fine()
    model = nn.Sequential()
    model.linear = nn.Linear(64, 10)
    label = int(digits(test=1500).test.take(1, seed=0).labels)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.zero_()
        model.linear.bias[(label + 1) % 10] = 1.0
    Run(run).save_weights(model, "best")
    unmoved("evaluate", run, "--n", "1").fine()
    judged = Run.open(run)
    assert judged.outcomes["success"].all()
    assert (judged.outcomes["distance"] == 0).all()
    assert judged.gallery is None
    unmoved("report", run, "--out", tmp_path / "r.html").fine()


def test_an_evaluation_says_which_weights_it_judged(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    unmoved("train", path, "--out", tmp_path / "run").fine()
    unmoved("evaluate", tmp_path / "run", "--n", "10").fine()
    run = Run.open(tmp_path / "run")
    facts = run.evaluation
    assert facts["weights_sha256"] == load.weights_digest(run, "best")
    assert (facts["n"], facts["weights"], facts["split"]) == (10, "best", "digits/test")
    assert facts["threat"] == {"norm": "linf", "eps": 0.1}
    assert facts["attacks"]["pgd"].startswith("PGD(threat=ThreatModel(norm='linf', eps=0.1")
    assert facts["classes"] == list("0123456789")
    assert run.curve["eps"].nunique() == 8
    assert {len(part) for part in run.gallery.values()} <= set(range(1, 9))
