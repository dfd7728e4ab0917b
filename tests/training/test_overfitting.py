"""Catastrophic overfitting: seen in a published log and in no other fall, and what each rule makes of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import RECIPE, recipe
from torch import nn

from unmoved import Method, ThreatModel, UnmovedError, train
from unmoved.attacks import FGSM
from unmoved.data import digits
from unmoved.runs.folder import Run
from unmoved.runs.recipe import read
from unmoved.runs.train import train_recipe
from unmoved.terms import CE
from unmoved.training import overfitting
from unmoved.training.log import EpochRecord
from unmoved.training.validation import Validation

# Epochs of ELLE on CIFAR-10, seed 0, in the logs of the FastAT benchmark (Pan and Yao 2026, arXiv 2604.22853) with its
# 1,000 validation images: number -> accuracy in training, under PGD-10, and that of the average of the weights.
TRANSIENT = {48: (0.468, 0.501), 49: (0.476, 0.464), 50: (0.474, 0.494), 51: (0.476, 0.456), 52: (0.478, 0.476)}
TRANSIENT |= {53: (0.512, 0.273), 54: (0.467, 0.446)}
FINAL = {72: (0.529, 0.493, 0.549), 73: (0.533, 0.497, 0.554), 74: (0.537, 0.487, 0.547), 75: (0.542, 0.499, 0.547)}
FINAL |= {76: (0.562, 0.452, 0.547), 77: (0.876, 0.051, 0.535), 78: (0.864, 0.037, 0.506), 79: (0.912, 0.137, 0.451)}
FINAL |= {80: (0.925, 0.167, 0.414), 81: (0.939, 0.200, 0.386)}


def record(epoch: int, trained: float, robust: float, n: int = 1000) -> EpochRecord:
    return {
        "epoch": epoch,
        "step": epoch,
        "lr": 0.1,
        "eps": 0.03,
        "loss": 1.0,
        "train_accuracy": trained,
        "parts": {},
        "validation_clean": 0.8,
        "validation_robust": robust,
        "validation_n": n,
    }


def falls(records: list[EpochRecord]) -> dict[int, int]:
    """Epochs that fall -> the good epoch that each is compared with."""
    log, found = list[EpochRecord](), dict[int, int]()
    for line in records:
        fallen = overfitting.fall(log, line)
        log.append(line if fallen is None else {**line, "overfitting": fallen.words("go_on", None)})
        if fallen is not None:
            found[line["epoch"]] = fallen.before["epoch"]
    return found


def test_a_published_collapse_is_seen_once_when_it_happens() -> None:
    assert falls([record(epoch, *line) for epoch, line in TRANSIENT.items()]) == {53: 48}
    assert falls([record(epoch, trained, raw) for epoch, (trained, raw, _) in FINAL.items()]) == {77: 75}
    assert falls([record(epoch, trained, average) for epoch, (trained, _, average) in FINAL.items()]) == {80: 76}


def test_the_epoch_to_go_back_to_is_the_last_that_was_hardly_worse() -> None:
    records = [record(epoch, trained, average) for epoch, (trained, _, average) in FINAL.items()]
    good = [line["epoch"] for k, line in enumerate(records) if overfitting.is_good(records[:k], line)]
    assert good == [72, 73, 74, 75, 76, 77]


def test_other_falls_are_none() -> None:
    slow = [record(k, 0.5 + 0.01 * k, 0.52 - 0.015 * k) for k in range(30)]  # ordinary robust overfitting
    assert falls(slow) == {}
    few = [record(0, 0.5, 0.5, n=40), record(1, 0.6, 0.3, n=40)]  # within the noise of 40 images
    assert falls(few) == {}
    diverging = [record(0, 0.5, 0.5), record(1, 0.3, 0.1)]  # training is worse, too
    assert falls(diverging) == {}
    small = [record(0, 0.2, 0.09), record(1, 0.3, 0.03)]  # by more than half
    assert falls(small) == {1: 0}
    chance: list[EpochRecord] = [{**line, "validation_chance": 0.08} for line in small]
    assert falls(chance) == {}  # what a network that has not learned anything gets


def test_after_going_back_an_epoch_is_compared_with_what_was_gone_back_to() -> None:
    log = [record(1, 0.4, 0.3), record(2, 0.5, 0.4)]
    log.append({**record(3, 0.9, 0.0), "overfitting": "it was", "back_to": 2})
    again = overfitting.fall(log, record(4, 0.9, 0.05))
    assert again is not None
    assert again.before["epoch"] == 2
    log.append({**record(4, 0.9, 0.05), "overfitting": "it was"})
    assert overfitting.fall(log, record(5, 0.95, 0.0)) is None


# --- what a training makes of it

SEQUENCE = [0.30, 0.50, 0.49, 0.02, 0.51, 0.52]  # robust accuracy, as told to the training, epoch by epoch
SETTINGS = ["training.epochs=6", "training.validation=0.2", "training.checkpoint_share=1", 'average={use="ema"}']


class Stop(Exception):
    pass


class Told:
    """A training whose validation says `SEQUENCE`, whatever the weights are, and that may be killed after an epoch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epoch, self.last = 0, 99
        monkeypatch.setattr(Validation, "accuracy", self.accuracy)

    def accuracy(self, *arguments: Any) -> dict[str, float]:
        return {"validation_clean": 0.9, "validation_robust": SEQUENCE[self.epoch], "validation_n": 1000}

    def progress(self, line: Any) -> None:
        if "share" in line:
            self.epoch = line["epoch"]
        elif line["epoch"] == self.last:
            raise Stop

    def run(self, folder: Path, rule: str, kill: tuple[int, ...] = ()) -> Run:
        asked = read(recipe(folder.parent, RECIPE, "told"), [*SETTINGS, f"training.on_overfitting={rule}"])
        for self.last in kill:
            with pytest.raises(Stop):
                train_recipe(asked, folder, resume=True, progress=self.progress)
        self.last = 99
        return train_recipe(asked, folder, resume=True, progress=self.progress)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def alike(one: Any, two: Any) -> bool:
    pairs = list(zip(tensors(one), tensors(two), strict=True))
    return len(pairs) > 0 and all(torch.equal(a, b) for a, b in pairs)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_each_rule_and_that_kills_change_nothing(told: Told, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states: dict[int, Any] = {}
    keep = told.progress

    def keeping(line: Any) -> None:
        keep(line)
        if "share" not in line:
            states[line["epoch"]] = Run(tmp_path / "go_back").load_state()

    with caplog.at_level(logging.WARNING, "unmoved"):
        plain = told.run(tmp_path / "go_on", "go_on")
        told.progress = keeping  # type: ignore[method-assign]
        back = told.run(tmp_path / "go_back", "go_back")
        told.progress = keep  # type: ignore[method-assign]
        stopped = told.run(tmp_path / "stop", "stop")
    said = [text for text in caplog.messages if "overfitting" in text]
    sentence = "accuracy fell from 50.0% (epoch 2) to 2.0%, while in training it rose from"
    assert [sentence in text for text in said] == [True] * 3
    assert [line.get("overfitting") for line in lines(plain)] == [None] * 3 + [said[0]] + [None] * 2
    assert "the weights of epoch 3 are taken up again, training goes on" in said[1]
    assert "the weights of epoch 3 are taken up again, training stops" in said[2]
    # Up to the fall all are the same; then the good weights are there again, also in the average and the optimizer.
    assert [line["loss"] for line in lines(back)][:4] == [line["loss"] for line in lines(plain)][:4]
    assert lines(back)[4]["loss"] != lines(plain)[4]["loss"]
    assert [line.get("back_to") for line in lines(back)] == [None] * 3 + [3] + [None] * 2
    for part in ("model", "average", "optimizer"):
        assert alike(states[4][part], states[3][part])
        assert not alike(states[5][part], states[4][part])
    # The epoch after it is not epoch 4 once more: its noise and its order are those of steps that were not taken yet.
    assert lines(back)[4]["loss"] != lines(back)[3]["loss"]
    assert [line["epoch"] for line in lines(stopped)] == [1, 2, 3, 4]
    assert lines(stopped)[-1]["stopped"] is True
    final = stopped.load_state()
    assert final is not None
    assert alike(final["model"], states[3]["model"])
    before = (stopped.path / "trainer.pt").read_bytes()
    told.run(tmp_path / "stop", "stop")  # there is nothing left to do
    assert (stopped.path / "trainer.pt").read_bytes() == before
    for rule, whole in (("go_back", back), ("stop", stopped)):
        killed = told.run(tmp_path / f"killed-{rule}", rule, kill=(1, 3, 4) if rule == "go_back" else (2, 3))
        for which in ("last", "best"):
            assert (killed.path / f"{which}.safetensors").read_bytes() == (
                whole.path / f"{which}.safetensors"
            ).read_bytes()
        assert [{**line, "seconds": 0} for line in lines(killed)] == [{**line, "seconds": 0} for line in lines(whole)]


def test_what_cannot_be_noticed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnmovedError, match="on_overfitting: expected validation data to notice it by"):
        read(recipe(tmp_path, RECIPE, "blind"), ["training.validation=0", "training.on_overfitting=stop"])
    threat, split = ThreatModel("linf", 0.1), digits(test=0.9).train.take(20)
    model, method = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Method(FGSM(threat), CE())
    with pytest.raises(UnmovedError, match="on_overfitting: expected validation data"):
        train(model, method, split, epochs=1, on_overfitting="go_back")
    with pytest.raises(UnmovedError, match="on_overfitting: unknown value 'goback'"):
        train(model, method, split, epochs=1, on_overfitting="goback")


def test_chance_is_the_share_of_the_most_frequent_class() -> None:
    threat, data = ThreatModel("linf", 0.1), digits(test=0.9)
    held_out = data.test.take(30)
    model, method = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Method(FGSM(threat), CE())
    (line,) = train(model, method, data.train.take(20), epochs=1, validation=held_out, threat=threat)
    labels = torch.cat([batch.y for batch in held_out.batches(30)])
    assert line["validation_chance"] == pytest.approx(int(labels.bincount().max()) / 30)
