"""Averages of the weights: their closed forms, what is kept and judged, and that resuming keeps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import RECIPE, recipe
from torch import nn

from unmoved import Method, ThreatModel, UnmovedError, train
from unmoved.data import ArraySplit, digits
from unmoved.models import load_weights
from unmoved.runs.assembly import Assembly
from unmoved.runs.recipe import read
from unmoved.runs.train import train_recipe
from unmoved.terms import CE
from unmoved.training.averaging import EMA, SWA, Average
from unmoved.training.optim import SGD


def path_of(values: list[float], averaging: Any) -> list[float]:
    """Where the average of one weight goes while the weight goes along ``values``, the first before any step."""
    model = nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, values[0])
    average = Average(model, averaging)
    found = []
    for step, value in enumerate(values[1:]):
        torch.nn.init.constant_(model.weight, value)
        average.follow(model, step, len(values) - 1)
        found.append(average.model.weight.item())  # type: ignore[union-attr]
    return found


def test_ema_is_the_weighted_sum_of_the_past() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double().tolist()
    found = path_of(values, EMA(0.8))
    decays = [min(0.8, (1 + t) / (10 + t)) for t in range(29)]
    for end in (0, 3, 28):
        later = [torch.tensor(decays[k + 1 : end + 1]).prod().item() for k in range(end + 1)]
        expected = sum((1 - decays[k]) * values[k + 1] * later[k] for k in range(end + 1))
        expected += values[0] * torch.tensor(decays[: end + 1]).prod().item()
        assert found[end] == pytest.approx(expected, abs=1e-5)


def test_ema_forgets_its_start_by_a_binomial_and_keeps_a_constant() -> None:
    """The start's share after step t is ``prod_k (1 + k) / (10 + k) = 1 / C(t + 10, 9)``; all shares sum to one."""
    found = path_of([1.0, *[0.0] * 20], EMA(1.0))
    assert found == pytest.approx([1 / math.comb(t + 10, 9) for t in range(20)], rel=1e-5)
    assert path_of([0.3] * 20, EMA(0.6)) == [torch.tensor(0.3).item()] * 19


def test_swa_is_the_plain_mean_of_the_last_part() -> None:
    values = [float(v) for v in range(21)]
    found = path_of(values, SWA(0.75))
    assert found[:15] == values[1:16], "before its start it is the weight itself"
    assert found[-1] == pytest.approx(sum(values[16:]) / 5)


def test_a_training_averages_what_each_of_its_steps_ends_in() -> None:
    """With a share of 1 / (k + 1) in step k of all, not of the epoch, that is their plain mean."""
    model, asked, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [], []  # type: ignore[var-annotated]

    def mean(step: int, total: int) -> float:
        asked.append((step, total))
        return 1 / (step + 1)

    def note(record: Any) -> None:
        if "share" in record:
            seen.append(model[1].weight.detach().clone())

    part, method = digits(test=1600).train, Method(None, CE("clean"))
    train(model, method, part, epochs=2, batch_size=64, average=mean, progress=note, precision="float32", device="cpu")
    assert asked[-8:] == [(step, 8) for step in range(8)]
    assert torch.allclose(model[1].weight, torch.stack(seen).mean(0), atol=1e-6)
    assert not torch.allclose(model[1].weight, seen[-1], atol=1e-3)


def test_what_is_validated_and_left_is_the_average() -> None:
    """It stays at the first weights here, which say class 0, while the trained ones learn that all is of class 1."""
    split = ArraySplit.of(torch.rand(32, 1, 4, 4), torch.ones(32).long(), layout="NCHW")
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    for p in model.parameters():
        nn.init.zeros_(p)
    held_out = {"validation": split, "check": lambda model, batch: batch.x, "threat": ThreatModel("linf", 0.1)}
    log = train(
        model, Method(None, CE("clean")), split, epochs=2, batch_size=16, optimizer=SGD(lr=1.0), precision="float32",
        average=lambda step, total: 0.0, device="cpu", **held_out,  # type: ignore[arg-type]
    )  # fmt: skip
    assert log[1]["train_accuracy"] == 1.0
    assert [record["validation_clean"] for record in log] == [0.0, 0.0]
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("averaging", [EMA(0.0), SWA(1.0)])
def test_an_average_over_nothing_but_the_last_is_the_last(averaging: Any) -> None:
    assert path_of([0.0, 1.0, 2.0, 3.0], averaging) == [1.0, 2.0, 3.0]


def test_running_statistics_are_averaged_and_counts_are_copied() -> None:
    model = nn.BatchNorm1d(1)
    average = Average(model, SWA(0.0))
    for step in range(4):
        model(torch.full((2, 1), 10.0))
        average.follow(model, step, 4)
    assert average.model.num_batches_tracked == 4
    assert 0 < average.model.running_mean.item() < model.running_mean.item()  # type: ignore[union-attr]
    assert not average.model.weight.requires_grad


# --- each tensor once, whatever holds it


class Shared(nn.Module):
    """Its one number stands in a matrix under several names, and in buffers of every kind; `set` sets all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.parts = nn.Linear(2, 2), nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])
        self.other.weight = self.one.weight  # a tensor under two names
        self.parts.append(self.parts[0])  # a module under two names
        torch.nn.utils.parametrizations.orthogonal(self.parts[0], use_trivialization=False)
        self.wide = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.register_buffer("alias", self.one.weight.detach())  # the memory of a parameter
        memory = torch.zeros(6)
        self.register_buffer("front", memory[:4])  # and of each other, in part
        self.register_buffer("back", memory[2:])
        self.register_buffer("twin", self.front)
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.plain = torch.zeros(2)

    @torch.no_grad()
    def set(self, value: float) -> None:
        for tensor in (*self.parameters(), *self.buffers(), self.plain):
            tensor.fill_(value)
        self.replaced = torch.full((2,), value)


HELD = ("alias", "front", "back", "twin", "unsaved", "replaced", "plain", "wide")


@pytest.mark.parametrize(("averaging", "share"), [(EMA(0.5), 0.5), (SWA(0.0), 1 / 101)])
def test_each_tensor_is_averaged_once_whatever_holds_it(averaging: Any, share: float) -> None:
    """From 0 to 100 by the share of the step, exactly: under a second name it would move a second time."""
    model = Shared()
    model.set(0.0)
    average = Average(model, averaging)
    model.set(100.0)
    average.follow(model, 100, 1000)
    tensors = {name: getattr(average.model, name) for name in HELD} | dict(average.model.named_parameters())
    for name, value in tensors.items():
        assert torch.allclose(value, torch.full_like(value, 100 * share)), name
    assert average.model.count == 100  # no number of which there is a mean
    average.give(model)
    for name, value in ({name: getattr(model, name) for name in HELD} | dict(model.named_parameters())).items():
        assert torch.allclose(value, torch.full_like(value, 100 * share)), name
    assert model.alias.data_ptr() == model.one.weight.data_ptr()  # and what shared memory shares it still
    assert model.other.weight is model.one.weight
    assert model.back.data_ptr() == model.front[2:].data_ptr()


class Odd(nn.Module):
    """Buffers of which there is no mean: a mask, a smallest value of nothing yet, one that comes later, one of many."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
        self.register_buffer("smallest", torch.tensor(torch.inf))
        self.register_buffer("late", None)
        self.register_buffer("grows", torch.zeros(1))
        self.register_buffer("spread", torch.zeros(1).expand(3))


def test_what_has_no_mean_is_copied() -> None:
    model = Odd()
    average = Average(model, EMA(0.5))
    model.smallest.fill_(3.0)
    model.late, model.grows = torch.tensor([4.0]), torch.ones(2)
    model.register_buffer("later", torch.tensor(5.0), persistent=False)
    average.follow(model, 100, 1000)
    for now in (average.model, model):
        assert now.mask.tolist() == [0.0, -torch.inf]
        assert [now.smallest, now.late, now.later] == [3.0, 4.0, 5.0]
        assert now.grows.tolist() == [1.0, 1.0]
        assert now.spread.tolist() == [0.0, 0.0, 0.0]
        assert "later" not in now.state_dict()
        average.give(model)
    model.late.fill_(6.0)
    assert average.model.late == 4.0, "a copy"


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = Assembly(read(path.parent / "recipe.toml")).model()
    load_weights(model, path)
    return model.state_dict()


@pytest.mark.parametrize("table", ['[average]\nuse = "ema"\ndecay = 0.9\n', '[average]\nuse = "swa"\nstart = 0.5\n'])
def test_a_recipe_keeps_averaged_weights_also_when_it_is_resumed(table: str, tmp_path: Path) -> None:
    plain = train_recipe(read(recipe(tmp_path, RECIPE, "plain")), tmp_path / "plain")
    file = recipe(tmp_path, RECIPE + table, "averaged")
    straight = train_recipe(read(file), tmp_path / "straight")
    state, raw = straight.load_state(), plain.load_state()
    assert state is not None
    assert raw is not None
    for name, value in weights(straight.path / "last.safetensors").items():
        assert torch.equal(value, state["average"][name])
        assert torch.equal(state["model"][name], raw["model"][name]), "the trained weights go their way"
        assert not torch.equal(value, raw["model"][name])

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record.get("epoch") == 1 and "share" not in record:
            raise Stop

    with pytest.raises(Stop):
        train_recipe(read(file), tmp_path / "resumed", progress=stop)
    resumed = train_recipe(read(file), tmp_path / "resumed", resume=True)
    for which in ("best", "last"):
        found, expected = (weights(run.path / f"{which}.safetensors") for run in (resumed, straight))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        (resumed.path / f"{which}.safetensors").unlink()
    train_recipe(read(file), tmp_path / "resumed", resume=True)  # which mends what is missing
    assert torch.equal(weights(resumed.path / "last.safetensors")[name], state["average"][name])


@pytest.mark.parametrize(
    ("table", "words"), [("decay = 2.0", "average.decay"), ('use = "mean"', "unknown name 'mean'")]
)
def test_what_is_no_average_is_refused(table: str, words: str, tmp_path: Path) -> None:
    lines = table if "use" in table else f'use = "ema"\n{table}'
    with pytest.raises(UnmovedError, match=words):
        Assembly(read(recipe(tmp_path, f"{RECIPE}[average]\n{lines}\n")))
