"""A training that is gone on with by another call: it does what the call says, or says what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unmoved import Method, Ramp, Run, ThreatModel, UnmovedError, attacks, data, models, terms, train
from unmoved.training import averaging, optim

X = torch.rand(32, 1, 6, 6, generator=torch.Generator().manual_seed(0))
METHOD = Method(None, terms.CE("clean"))
BEGUN: dict[str, Any] = {"epochs": 2, "batch_size": 8, "optimizer": optim.SGD(lr=0.1)}


def split(n: int = 32) -> data.ArraySplit:
    return data.ArraySplit.of(X[:n], torch.arange(n) % 3, layout="NCHW")


def linear() -> nn.Module:
    torch.manual_seed(0)
    return models.linear((1, 6, 6), 3)


def go(run: Run | None, n: int = 32, method: Any = METHOD, **settings: Any) -> tuple[list[dict[str, Any]], nn.Module]:
    model = linear()
    return train(model, method, split(n), run=run, **BEGUN | settings), model


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {"name": "run"})


def halving(optimizer: Any, total: int, per_epoch: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))


def theirs(groups: Any) -> Any:
    return torch.optim.SGD(groups, lr=0.01)


@pytest.mark.parametrize(
    ("begun", "asked", "words"),
    [
        ({}, {"batch_size": 16}, "trained with batch_size = 8, came 16; pass what it was begun with"),
        ({}, {"n": 24}, "number of samples = 32, came 24"),
        ({}, {"optimizer": optim.SGD(lr=0.01)}, "optimizer lr = 0.1, came 0.01"),
        ({}, {"optimizer": theirs}, "optimizer lr = 0.1, came 0.01; optimizer momentum = 0.9, came 0"),
        ({}, {"optimizer": optim.SGD(lr=0.1, weight_decay=0.0)}, "optimizer weight_decay = 0.0005, came 0.0"),
        ({}, {"optimizer": optim.Adam(lr=0.1)}, "optimizer = 'SGD', came 'Adam'"),
        ({}, {"epochs": 1}, "2 epochs are trained already, came epochs = 1"),
        ({"schedule": optim.Cosine()}, {"epochs": 4}, "after its 2 epochs lr is 0, where .* has 0.05"),
        ({"schedule": optim.OneCycle()}, {"epochs": 4}, "after its 2 epochs lr is"),
        ({"schedule": halving}, {"epochs": 4}, "after its 2 epochs lr is"),
        ({"schedule": optim.Cosine()}, {"schedule": optim.Constant()}, "lr is 0, where .* has 0.1"),
        ({"schedule": optim.MultiStep((1,))}, {"schedule": optim.MultiStep((3,)), "epochs": 4}, "lr is 0.01, where"),
        ({"average": averaging.SWA(start=0.5)}, {"epochs": 4, "average": averaging.SWA(start=0.5)}, "the average"),
    ],
)
def test_what_cannot_be_followed_is_refused(run: Run, begun: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    go(run, **begun)
    before = (run.path / "trainer.pt").read_bytes()
    with pytest.raises(UnmovedError, match=words):
        go(run, **begun | asked)
    assert (run.path / "trainer.pt").read_bytes() == before
    go(run, **begun)  # as it was begun it is still whole


def test_ramps_that_would_go_back_are_refused(run: Run) -> None:
    def method(over: float) -> Method:
        return Method(attacks.PGD(ThreatModel("linf", Ramp(0.0, 0.1, over)), steps=1), terms.CE())

    go(run, method=method(1.0))
    with pytest.raises(UnmovedError, match="the ramps of a training of 2 epochs stand elsewhere"):
        go(run, method=method(1.0), epochs=4)
    assert [record["eps"] for record in go(run, method=method(0.25), epochs=4)[0]][2:] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("begun", "asked"),
    [
        ({}, {}),
        ({"schedule": optim.MultiStep((1, 3))}, {}),
        ({"schedule": optim.MultiStep((1,))}, {"schedule": optim.MultiStep((1, 3))}),
        ({"optimizer": optim.Adam(lr=0.01), "average": averaging.EMA(0.9)}, {}),
        ({"optimizer": theirs}, {}),
    ],
)
def test_more_epochs_are_the_training_of_as_many(run: Run, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Where the past would have been the same, the end is the same bit for bit as without the break."""
    go(run, **begun)
    log, model = go(run, **begun | asked | {"epochs": 4})
    whole, other = go(None, **begun | asked | {"epochs": 4})
    assert [(r["lr"], r["loss"]) for r in log] == [(r["lr"], r["loss"]) for r in whole]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("settings", [None, 3, {}, {"epochs": 2}, {"optimizer": 1, "batch_size": 8, "samples": 32}])
def test_a_state_of_somebody_else(run: Run, settings: Any) -> None:
    go(run)
    state = run.load_state()
    assert state is not None
    run.save_state(state | {"settings": settings})
    if settings is None:
        go(run)  # as before settings were saved
        return
    with pytest.raises(UnmovedError, match="no settings of a training"):
        go(run)
