"""What would end a training later is refused before it, and the rehearsal leaves nothing behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmoved import (
    Batch,
    Method,
    Phases,
    Ramp,
    Run,
    ThreatModel,
    UnmovedError,
    attacks,
    data,
    models,
    terms,
    train,
    train_step,
)
from unmoved.core.protocols import StatefulTerm
from unmoved.defenses import APD, AWP, SAM
from unmoved.runs import recipe
from unmoved.runs import train as training
from unmoved.training import averaging, loop, rehearsal

THREAT = ThreatModel("linf", 0.1)
METHOD = Method(attacks.PGD(THREAT, steps=1), terms.CE())


def split(n: int) -> data.ArraySplit:
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(n))
    return data.ArraySplit.of(x, torch.arange(n) % 3, layout="NCHW")


class Net(nn.Module):
    """Remembers in every way there is: a buffer, a tensor, a number, a list, its last features; and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.calls, self.sizes, self.seen = 0, list[int](), torch.zeros(8)
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.started:  # an initialisation that depends on the data
            self.first.weight.data *= x.mean()
            self.started = True
        self.features = self.norm(self.first(x.flatten(1)))
        if self.training:
            self.calls += 1
            self.sizes.append(len(x))
            self.seen += self.features.detach().sum(dim=0)
        return self.last(self.drop(self.features.relu()))


def all_of(model: Net) -> list[Any]:
    numbers = [model.calls, list(model.sizes), model.started, hasattr(model, "features")]
    tensors = [*model.state_dict().values(), model.seen, *(p.grad for p in model.parameters())]
    return [*numbers, *(None if t is None else t.tolist() for t in tensors), [m.training for m in model.modules()]]


@pytest.mark.parametrize("defense", [None, SAM(), AWP(), APD(0.1)], ids=repr)
def test_a_rehearsal_leaves_nothing_behind(defense: Any) -> None:
    """Not in the model, nor in terms and attacks that remember, nor in the caller's randomness."""
    model, term, attack = Net(), terms.GlobalProbability(3), attacks.IAAT(THREAT, steps=1)
    attack.update(model.eval(), next(split(4).batches(4)), split(4).images)  # it remembers four samples already
    model.train()
    model.norm.eval()
    model.last.weight.grad = torch.ones_like(model.last.weight)
    method = Method(attack, terms.Sum((1, terms.CE()), (0.5, term)), defense)
    batch = next(split(8).batches(8))
    before, random = all_of(model), torch.get_rng_state()
    state = copy.deepcopy({**attack.state_dict(), **term.state_dict()})
    rehearsal.rehearse(model, Phases((0, Method(None, terms.CE())), (1, method)), batch)
    assert all_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in {**attack.state_dict(), **term.state_dict()}.items())


def test_a_training_is_the_same_with_and_without() -> None:
    ends = []
    for rehearsed in (True, False):
        torch.manual_seed(0)
        model = Net()
        log = train(model, METHOD, split(24), epochs=2, batch_size=8, rehearsal=rehearsed)
        ends.append((all_of(model), [record["loss"] for record in log]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("defense", [None, SAM(), AWP()], ids=repr)
@pytest.mark.parametrize("attack", [METHOD.attack, None, attacks.PGD(THREAT, steps=1, mode="train")], ids=repr)
def test_a_last_batch_of_one_is_refused_where_batchnorm_cannot_take_it(attack: Any, defense: Any) -> None:
    method, how = Method(attack, terms.CE(), defense), {"epochs": 1, "batch_size": 8}
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnmovedError, match=r"a batch of 1 leaves its BatchNorm one value a channel.*batch size"):
        train(model, method, split(9), **how)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    train(model, method, split(10), **how)  # what can be trained is
    model[1].eval()
    train(model, method, split(9), **how)
    train(nn.Sequential(nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 3)), method, split(9), **how)


def test_the_sizes_that_are_tried() -> None:
    sizes = {(9, 8): 1, (16, 8): 8, (5, 8): 5, (10, 8): 2, (2, 1): 1}
    assert {key: len(rehearsal.smallest_batch(split(key[0]), key[1])) for key in sizes} == sizes
    assert len(rehearsal.smallest_batch(split(15), 8, count=2)) == 3  # 7 samples: 4 and 3
    assert len(rehearsal.smallest_batch(split(9), 8, count=2)) == 1  # of one sample both processes take that


@pytest.mark.parametrize("start", [0, 1])
def test_each_phase_is_tried_with_its_ramp_begun(start: int) -> None:
    """An attack of eps 0 returns at once, and would refuse nothing."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.detach().flatten(1))

    ramped = replace(METHOD, attack=attacks.PGD(ThreatModel("linf", Ramp(0.0, 0.1)), steps=1))
    phases = [(0, ramped)] if start == 0 else [(0, Method(None, terms.CE())), (start, ramped)]
    model = Detached()
    before = model.last.weight.clone()
    with pytest.raises(UnmovedError, match="neither detaches"):
        train(model, phases, split(8), epochs=2, batch_size=8)
    assert torch.equal(model.last.weight, before)


def test_augmentation_and_the_validations_attack_are_tried_too() -> None:
    model = models.linear((1, 6, 6), 3)
    with pytest.raises(UnmovedError, match="leave it a little"):
        train(model, METHOD, split(8), epochs=1, augment=lambda batch, seed: replace(batch, x=batch.x * 1.2 + 0.1))

    def leaves(model: nn.Module, batch: Batch) -> Tensor:
        return batch.x + 0.5

    with pytest.raises(UnmovedError, match="attack 'validation' left the"):
        train(model, METHOD, split(8), epochs=1, validation=split(4), check=leaves, threat=THREAT)


def test_a_term_that_needs_more_samples_than_the_last_batch_has() -> None:
    def spread(views: Any) -> Tensor:
        return terms.CE()(views) + views.adv.std(dim=0).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            UnmovedError, match=r"loss became nan .* on 1 samples, as many as the last batch.*needs more"
        ):
            train(models.linear((1, 6, 6), 3), Method(None, spread), split(9), epochs=1, batch_size=8)
    train(models.linear((1, 6, 6), 3), Method(None, spread), split(10), epochs=1, batch_size=8)


def frozen() -> nn.Module:
    return models.linear((1, 6, 6), 3).requires_grad_(False)


def copies(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p.detach().clone().requires_grad_() for g in groups for p in g["params"]], lr=0.1)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (frozen, {}, "all are frozen; use requires_grad_"),
        (nn.Flatten, {}, "expected parameters to train, came none"),
        (lambda: models.linear((1, 6, 6), 3), {"optimizer": copies}, "holds none of them.*make it of the groups"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), {}, "'1.weight' is lazy .* call the model once"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3, device="meta")), {}, "on the meta device"),
        (lambda: nn.Linear, {}, r"came the class Linear; use Linear\(...\)"),
        (lambda: lambda x: x, {}, "in the forward of an nn.Module"),
        (lambda: split(4), {}, r"the order is train\(model, method, split\)"),
    ],
)
def test_nothing_to_train_is_said_at_once(model: Callable[[], Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        train(model(), METHOD, split(8), epochs=1, **settings)


def test_a_step_that_would_train_nothing_is_refused() -> None:
    batch, model = next(split(8).batches(8)), models.linear((1, 6, 6), 3)
    for other in (frozen(), copy.deepcopy(model)):
        optimizer = torch.optim.SGD(copy.deepcopy(other).requires_grad_().parameters(), lr=0.1)
        with pytest.raises(UnmovedError, match="frozen, or the optimizer holds copies"):
            train_step(other, METHOD, optimizer, batch)

    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    detached = Detached(model)
    with pytest.raises(UnmovedError, match=r"has no gradient; look for .detach\(\)"):
        train_step(detached, Method(None, terms.CE()), torch.optim.SGD(detached.parameters(), lr=0.1), batch)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.first(x.flatten(1))
        return self.last(self.features.relu())


def normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(36, 8)), nn.ReLU(), nn.Linear(8, 3))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.mark.parametrize("make", [Keeps, normed, scripted])
@pytest.mark.parametrize("defense", [None, AWP()], ids=repr)
def test_training_needs_no_copy_of_the_model(make: Callable[[], nn.Module], defense: Any) -> None:
    model = make()
    model(torch.rand(2, 1, 6, 6))
    with pytest.raises(RuntimeError):  # or the test would show nothing
        copy.deepcopy(model).requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"validation": split(6), "threat": THREAT}
    train(model, replace(METHOD, defense=defense), split(16), epochs=1, batch_size=8, **settings)
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_an_average_of_what_cannot_be_copied_is_refused() -> None:
    model = Keeps()
    model(torch.rand(2, 1, 6, 6))
    with pytest.raises(UnmovedError, match=r"average: .*copy"):
        train(model, METHOD, split(8), epochs=1, average=averaging.EMA(0.9))


def test_a_recipe_is_rehearsed_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for module in (training, loop):
        monkeypatch.setattr(module, "rehearse_training", lambda *a, **k: calls.append(1))
    table = recipe.parse(
        {
            "name": "x",
            "data": {"use": "digits", "test": 1500},
            "model": {"use": "linear"},
            "threat": {"norm": "linf", "eps": 0.1},
            "training": {"epochs": 1},
            "objective": {"ce": {}},
        }
    )
    training.train_recipe(table, tmp_path / "run")
    assert calls == [1]


class Extra(nn.Module):
    """What ``state_dict`` says of it is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))

    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Reports(StatefulTerm):
    def forward(self, views: Any) -> Tensor:
        return terms.CE()(views)

    def report(self) -> dict[str, Any]:
        return {"probability": torch.zeros(2)}


def late() -> data.ArraySplit:
    whole = split(300)
    labels = whole.labels.clone()
    labels[-1] = 3
    return data.ArraySplit(whole.images, labels, whole.index, ("a", "b", "c", "d"))


def linear() -> nn.Module:
    return models.linear((1, 6, 6), 3)


AFTER: dict[str, tuple[dict[str, Any], str]] = {
    "weights that cannot be saved": ({"model": Extra}, "weights '_extra_state': .* it cannot be saved"),
    "a report for no log": ({"method": replace(METHOD, objective=Reports())}, r"term Reports: .* report\(\) to be of"),
    "a late label": ({"split": late()}, r"labels: expected 0\.\.2 for 3 logits, came 3"),
    "a late label of the validation": (
        {"validation": late(), "threat": THREAT},
        r"labels of the validation: expected 0\.\.2 for 3 logits",
    ),
    "a schedule that ends": (
        {"schedule": lambda o, total, per_epoch: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=3)},
        "schedule: expected one of 4 steps, came 3",
    ),
    "a schedule that asks for a measure": (
        {"schedule": lambda o, total, per_epoch: torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
        "needs no measure, came ReduceLROnPlateau",
    ),
    "no schedule": ({"schedule": lambda o, total, per_epoch: None}, "schedule: .* came NoneType"),
    "no optimizer": ({"optimizer": lambda groups: None}, "optimizer: .* came NoneType"),
    "an optimizer that asks for a closure": (
        {"optimizer": lambda groups: torch.optim.LBFGS(groups[0]["params"])},
        "needs no closure, came LBFGS",
    ),
    "no share": ({"average": lambda step, total: None}, r"average\(step, total\): expected a finite number"),
    "a share above 1": ({"average": lambda step, total: 7.0}, "<= 1, came 7"),
    "no batch": ({"augment": lambda batch, seed: (batch.x, batch.y)}, "augment: expected it to return a Batch"),
    "no image": (
        {"method": replace(METHOD, attack=lambda m, b: None)},
        r"expected images \(8, 1, 6, 6\), came NoneType",
    ),
    "fewer images": (
        {"method": replace(METHOD, attack=lambda m, b: b.x[:1])},
        r"expected images \(8, 1, 6, 6\), came shape \(1, 1, 6, 6\)",
    ),
}


@pytest.mark.parametrize("case", AFTER)
def test_what_would_fail_after_steps_or_epochs_is_refused_before_them(case: str, tmp_path: Any) -> None:
    changes, words = AFTER[case]
    given: dict[str, Any] = {"model": linear, "method": METHOD, "split": split(16)} | changes
    model, seen = given.pop("model")(), []
    before = [p.detach().clone() for p in model.parameters()]
    run = Run.create(tmp_path / "run", {"name": "run"})
    with pytest.raises(UnmovedError, match=words):
        train(
            model,
            given.pop("method"),
            given.pop("split"),
            epochs=2,
            batch_size=8,
            run=run,
            progress=seen.append,
            **given,
        )
    assert seen == []
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_defense_that_never_asks_for_a_gradient_is_named() -> None:
    with pytest.raises(UnmovedError, match=r"expected it to call backward\(\) once at least"):
        train(linear(), replace(METHOD, defense=lambda model, optimizer, backward: None), split(8), epochs=1)
