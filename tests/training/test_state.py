"""What a training remembers, and how often it is saved: by a share of the time, and always at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved
from torch import nn

from unmoved.core.errors import UnmovedError
from unmoved.runs.folder import Run
from unmoved.training import checkpoint, loop, trainer
from unmoved.training.trainer import TrainerState


@pytest.fixture(autouse=True)
def a_disk_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- how often


class Clock:
    """A clock that goes on by the seconds of a save whenever it is looked at the second time."""

    def __init__(self, costs: list[float]) -> None:
        self.now, self.costs, self.looks = 0.0, costs, 0

    def __call__(self) -> float:
        self.looks += 1
        if self.looks % 2 == 0:
            self.now += self.costs.pop(0) if len(self.costs) > 1 else self.costs[0]
        return self.now


@pytest.mark.parametrize("share", [0.03, 0.2])
@pytest.mark.parametrize("epoch", [0.05, 50.0])
@pytest.mark.parametrize("costs", [[0.004], [0.2], [0.2, 9.0, 0.2]], ids=["quick", "slow", "once slower"])
def test_saving_takes_its_share_and_what_a_kill_loses_is_bounded(
    monkeypatch: pytest.MonkeyPatch, share: float, epoch: float, costs: list[float]
) -> None:
    """At every moment; and no longer than needed: the longest time unsaved is that in which a save is earned."""
    monkeypatch.setattr(checkpoint, "monotonic", Clock([*costs]))
    budget = checkpoint.Budget(share, costs[0])
    trained = unsaved = longest = saves = 0.0
    for _ in range(5_000):
        trained, unsaved = trained + epoch, unsaved + epoch
        if budget.allows(epoch):
            with budget.spending():
                pass
            longest, unsaved, saves = max(longest, unsaved), 0.0, saves + 1
            if len(costs) == 1:
                assert budget.spent <= share * (trained + budget.spent) * (1 + 1e-9)
    assert saves
    assert longest <= (sum(costs) + max(costs)) / share + epoch
    if len(costs) == 1 and epoch < costs[0] / share:
        assert budget.spent > 0.9 * share * (trained + budget.spent) - costs[0]


def test_a_share_of_one_saves_always_and_of_nothing_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "monotonic", Clock([1e6]))
    always, never = checkpoint.Budget(1.0, 1e9), checkpoint.Budget(0.0, 1e-9)
    for _ in range(100):
        assert always.allows(1e-9)
        with always.spending():
            pass
        assert not never.allows(1e9)


def test_a_first_save_is_allowed_and_those_after_make_up_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "monotonic", Clock([5.0]))
    budget = checkpoint.Budget(0.1, 1e9, is_first=True)
    assert budget.allows(1e-9)
    with budget.spending():
        pass
    epochs = next(n for n in range(1, 1000) if budget.allows(1.0))
    assert epochs == 90  # two saves of 5 s, at a tenth of 100 s
    assert not checkpoint.Budget(0.0, 1.0, is_first=True).allows(1.0)


def test_the_first_save_is_thought_to_take_as_long_as_its_bytes(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.zeros(1000, 1000)}, "list": [torch.zeros(250_000, dtype=torch.float64)], "n": 3}
    assert checkpoint.guessed(tensors) == pytest.approx(6e6 / 200e6)


# --- what a run ends in


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(50_000))


def committed(run: Run, scores: list[float | None], due: set[int], last: bool = True) -> TrainerState:
    """An epoch for each robust score, the weights being the epoch's number, saved in the epochs ``due``."""
    model = One()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    made = TrainerState(model, optimizer, schedule, nn.ModuleList(), [object()], run)
    made.restore(made.saved())

    class Due(checkpoint.Budget):
        def allows(self, seconds: float) -> bool:
            return made.epochs in due

    made._budget = Due(1.0, 0.0)
    for number in range(made.epochs + 1, len(scores) + 1):
        model.value.data.fill_(number)
        score = scores[number - 1]
        told = {} if score is None else {"validation_clean": 0.9, "validation_robust": score}
        made.commit({"epoch": number, **told}, 1.0, last=last and number == len(scores))
    return made


def epochs_of(run: Run) -> tuple[int, int]:
    found = []
    for which in ("best", "last"):
        model = One()
        run.load_weights(model, which)
        found.append(int(model.value[0]))
    return found[0], found[1]


SCORES = [0.1, 0.3, 0.2, 0.3, 0.5, 0.4, 0.4]


@pytest.mark.parametrize("scores", [SCORES, [None] * 7, sorted(SCORES)], ids=str)
@pytest.mark.parametrize("due", [set(), {3}, {2, 5}], ids=str)
def test_whatever_epochs_are_saved_the_best_and_the_last_are_the_same(
    tmp_path: Path, scores: list[Any], due: set[int]
) -> None:
    """And so they are after a kill in any epoch, when the log goes back to the last saved one."""
    best = 7 if scores[0] is None else scores.index(max(scores)) + 1
    run = Run.create(tmp_path / "run", {})
    made = committed(run, scores, due)
    assert epochs_of(run) == (best, 7)
    for cut in (1, 3, 4, 6):
        killed = Run.create(tmp_path / f"cut{cut}", {})
        committed(killed, scores[:cut], due, last=False)
        assert killed.metrics["epoch"].tolist() == list(range(1, cut + 1)), "logged whether saved or not"
        saved = max((epoch for epoch in due if epoch <= cut), default=0)
        again = Run.open(killed.path)
        assert (again.load_state() or {"epochs": 0})["epochs"] == saved
        resumed = committed(again, scores, due)
        assert resumed.log == made.log
        assert again.metrics.equals(run.metrics)
        assert epochs_of(again) == (best, 7)
        assert repr(again.load_state()) == repr(run.load_state())


def test_weights_that_are_model_and_best_are_written_once_and_none_is_copied_needlessly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Any] = []
    monkeypatch.setattr(trainer, "_copy", lambda value: (copies.append(value), value.clone())[1])
    size = 4 * 50_000
    for name, scores, sets, copied in (
        ("without validation", [None] * 3, 1, 0),
        ("the last is best", [0.1, 0.2, 0.3], 1, 2),
        ("another is best", [0.1, 0.3, 0.2], 2, 2),
    ):
        copies.clear()
        run = Run.create(tmp_path / name, {})
        committed(run, scores, {1, 2, 3})
        assert sets * size < (run.path / "trainer.pt").stat().st_size < sets * size + 10_000, name
        assert len(copies) == copied, name
        assert epochs_of(run) == (scores.index(max(scores, key=lambda s: s or 0)) + 1 if scores[0] else 3, 3)


def test_a_training_logs_each_epoch_and_saves_those_that_its_share_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the first epoch, the last, and few between them; a share of 1 saves all, of 0 the last alone."""
    text = RECIPE.replace("epochs = 2", "epochs = 6").replace("checkpoint_share = 1.0\n", "")
    real, saved = Run.save_state, list[int]()

    def save_state(run: Run, state: dict[str, Any]) -> None:
        saved.append(state["epochs"])
        real(run, state)

    monkeypatch.setattr(Run, "save_state", save_state)
    ends = []
    for share in ("0", "1", None):
        saved.clear()
        more = () if share is None else ("--set", f"training.checkpoint_share={share}")
        run = tmp_path / f"run{share}"
        unmoved("train", recipe(tmp_path, text), "--out", run, *more).fine()
        assert saved[-1] == 6
        assert {"0": len(saved) == 1, "1": saved == list(range(1, 7))}.get(str(share), saved[0] == 1)
        ends.append([(run / f"{which}.safetensors").read_bytes() for which in ("best", "last")])
        assert Run.open(run).metrics["epoch"].tolist() == list(range(1, 7))
    assert all(end == ends[0] for end in ends)


def test_what_stopped_a_training_names_the_epoch_that_is_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    made = committed(run, [0.1, 0.2, 0.3], {2}, last=False)
    assert "keeps the state after epoch 2" in str(loop._stopped(UnmovedError("x"), 3, made))
    nothing = committed(Run.create(tmp_path / "none", {}), [0.1], set(), last=False)
    assert "keeps" not in str(loop._stopped(UnmovedError("x"), 1, nothing))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "x"])
def test_a_share_out_of_bounds_is_refused(tmp_path: Path, share: Any) -> None:
    message = unmoved(
        "train", recipe(tmp_path), "--out", tmp_path / "run", "--set", f"training.checkpoint_share={share}"
    )
    assert "checkpoint_share" in message.mistake()
