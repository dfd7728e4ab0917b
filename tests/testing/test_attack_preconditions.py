"""Every exported attack says in a sentence what it was handed that cannot be, before it computes anything with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved import attacks, terms
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.terms.sum import Sum

# Settings that keep an attack short; a new one of the same names is short too.
SHORT = {"steps": 3, "queries": 60, "samples": 8, "search_steps": 2}
NAMES = [name for name in attacks.__all__ if name not in ("StoppingRule", "Sensible", "Friendly")]


class Net(nn.Module):
    """Smooth, three classes, with a margin at every image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * 3


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2).add_(1).div_(2)  # where it began, up to rounding
        return super().forward(x)


class Binary(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x > 0.5).float())


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0


class NoBackward(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_NoBackward.apply(x))


def made(name: str, threat: Any = None, **settings: Any) -> Any:
    """The attack of this name in a ball that it knows, short."""
    maker = getattr(attacks, name)
    known = inspect.signature(maker).parameters
    given = {key: value for key, value in SHORT.items() if key in known} | settings
    if "source" in known:
        given["source"] = network(Net)
    if threat is None:
        threat = ThreatModel("l2", 0.5) if name == "CW" else ThreatModel("linf", 0.1)
    return maker(threat, **given)


def network(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture
def batch() -> Batch:
    x = 0.1 + 0.8 * torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return Batch(x, network(Net)(x).argmax(dim=1).detach())


def a_pixel(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[3, 0, 2, 2] = value
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: (x - 0.5) / 0.25, r"images: expected pixels in \[0, 1\].*put the normalisation inside the model"),
        (lambda x: x * 255, "divide by 255"),
        (lambda x: a_pixel(x, float("nan")), "NaN or infinite"),
        (lambda x: a_pixel(x, 1.001), "clamp"),
    ],
)
def test_images_out_of_bounds(name: str, change: Callable[[Tensor], Tensor], words: str, batch: Batch) -> None:
    for attack in (made(name), made(name, ThreatModel("l2", 0.0))):  # a ball of radius zero excuses nobody
        with pytest.raises(UnmovedError, match=words):
            attack(network(Net), replace(batch, x=change(batch.x)))


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_those_of_the_threat_model(name: str, batch: Batch) -> None:
    wide = ThreatModel("l2", 600.0, (0, 255))
    made(name, wide)(network(Net), replace(batch, x=batch.x * 255))
    with pytest.raises(UnmovedError, match=r"expected pixels in \[0, 255\]"):
        made(name, wide)(network(Net), replace(batch, x=batch.x * 300))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("label", "words"), [(3, "expected 0..2 for 3 logits, came 3"), (-1, "came -1")])
def test_labels_without_a_logit(name: str, label: int, words: str, batch: Batch) -> None:
    y = batch.y.clone()
    y[2] = label
    with pytest.raises(UnmovedError, match=words):
        made(name)(network(Net), replace(batch, y=y))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_that_writes_into_its_input_changes_nothing(name: str, batch: Batch) -> None:
    before, ball = batch.x.clone(), ThreatModel("l2", 3.0)  # large, so that ensembles end soon
    x_adv = made(name, ball)(network(InPlace), batch)
    assert torch.equal(batch.x, before)
    # The linear model of the same function is attacked alike, up to what rounding of the input does.
    same = made(name, ball)(network(Net), batch)
    assert (x_adv - same).abs().median() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Binary, Detached, NoBackward])
def test_a_model_without_a_gradient(name: str, kind: type[Net], batch: Batch) -> None:
    model = network(kind)
    known_right = replace(batch, y=model(batch.x).argmax(dim=1))
    attack = made(name)
    if name in ("Transfer",):
        attack = replace(attack, source=model)
    if name in ("Square", "SPSA", "HopSkipJump"):
        attack(model, known_right)
        return
    with pytest.raises(UnmovedError, match=r"gradient.* does not exist"):
        attack(model, known_right)


WITH_LOSS = [name for name in NAMES if "loss" in inspect.signature(getattr(attacks, name)).parameters]


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda views: F.cross_entropy(views.adv, views.y), r"expected a loss of each sample.*\(6,\).*mean over the"),
        (lambda views: terms.CE()(views)[:, None], "squeeze"),
        (lambda views: -views.adv, r"values.sum\(dim=1\)"),
        (lambda views: views.adv.argmax(dim=1), "int64"),
        (nn.CrossEntropyLoss(), r"called with \(views\), came CrossEntropyLoss.*returns \(B,\)"),
        (F.cross_entropy, r"called with \(views\), came cross_entropy"),
        (Sum((1.0, terms.CE()), (2.0, lambda views: views.adv.mean())), "mean over the batch"),
    ],
)
def test_losses_that_are_none(name: str, loss: Any, words: str, batch: Batch) -> None:
    with pytest.raises(UnmovedError, match=words):
        made(name, loss=loss)(network(Net), batch)


@pytest.mark.parametrize("name", WITH_LOSS)
@pytest.mark.parametrize(
    "loss",
    [terms.CE, terms.TRADES, None, "ce", ThreatModel("linf", 0.1)],
    ids=["class", "function", "none", "name", "threat"],
)
def test_losses_that_cannot_be_called(name: str, loss: Any) -> None:
    with pytest.raises(UnmovedError, match=rf"{'PGD' if name == 'FGSM' else name}.loss: expected something that"):
        made(name, loss=loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threat", ["linf", 0.1, ("linf", 0.1), {"norm": "linf"}, ThreatModel, 8 / 255], ids=str)
def test_what_is_no_threat_model_is_refused_when_the_attack_is_made(name: str, threat: Any) -> None:
    with pytest.raises(UnmovedError, match=r"threat: expected a ThreatModel, such as ThreatModel\(\"linf\", 8 / 255\)"):
        made(name, threat)
    takes_more = len(inspect.signature(getattr(attacks, name)).parameters) > 1
    if takes_more and name != "Transfer":
        with pytest.raises(UnmovedError, match="threat: expected a ThreatModel"):
            getattr(attacks, name)("linf", 0.1) if name != "CW" else attacks.CW("l2", 3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_model_and_no_batch(name: str, batch: Batch) -> None:
    for model, what in ((lambda x: x, batch), (network(Net), (batch.x, batch.y)), (network(Net), batch.x)):
        with pytest.raises(UnmovedError, match=r"expected a model, an nn.Module, and a Batch\(images, labels\), came"):
            made(name)(model, what)


@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_leaves_the_model_as_it_was(name: str, batch: Batch) -> None:
    model = network(Net).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnmovedError):
        made(name)(model, replace(batch, x=batch.x * 255))
    assert model.training
    assert model.linear.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- methods and threat models


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Method(attacks.PGD, terms.CE()), r"Method.attack: .*the class PGD; use PGD\(\.\.\.\)"),
        (lambda: Method(attacks.FGSM, terms.CE()), r"Method.attack: .*the function FGSM; use FGSM\(\.\.\.\)"),
        (lambda: Method(made("PGD"), terms.CE), "Method.objective: .*the class CE"),
        (lambda: Method(made("PGD"), terms.TRADES), "Method.objective: .*the function TRADES"),
        (lambda: Method(terms.CE(), made("PGD")), r"Method.attack: expected .*\(model, batch\), came CE, which takes"),
        (lambda: Method(None, made("PGD")), r"Method.objective: expected .*\(views\), came PGD, which takes"),
        (lambda: Method(None, nn.CrossEntropyLoss()), "came CrossEntropyLoss, which takes"),
        (lambda: Method(None, None), "Method.objective: .*came None"),
        (lambda: Method("pgd", terms.CE()), "Method.attack: .*came str"),
        (lambda: Method(ThreatModel("linf", 0.1), terms.CE()), "Method.attack: .*came ThreatModel"),
        (lambda: Method(None, terms.CE(), terms.CE()), "Method.defense: .*came CE"),
        (lambda: Method(None, terms.CE(), made("PGD")), "Method.defense: .*came PGD"),
        (lambda: Sum((1.0, terms.CE)), "Sum: .*the class CE"),
        (lambda: Sum((1.0, made("PGD"))), "Sum: .*came PGD"),
        (lambda: attacks.PGD(ThreatModel("linf", 0.1), stop=attacks.Sensible), "PGD.stop: .*the class Sensible"),
        (lambda: attacks.Transfer(ThreatModel("linf", 0.1), Net(), attacks.PGD), "Transfer.attack: .*the class PGD"),
    ],
)
def test_one_kind_of_component_in_place_of_another(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        make()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ThreatModel("linf", 0.1), 0.1), "threat.norm: unknown value"),
        (("linf", ThreatModel("linf", 0.1)), "threat.eps: expected a finite number"),
        (("linf", "8/255"), "threat.eps: .*leave out the quotes"),
        ((0.1, "linf"), "threat.norm"),
        ((float("inf"), 0.1), "did you mean 'linf'"),
        (("linf", 0.1, (0, 1, 2)), "threat.bounds"),
        (("linf", 0.1, 1.0), "threat.bounds"),
        (("linf", 0.1, "01"), "threat.bounds"),
        (("linf", 0.1, (1, 0)), "threat.bounds"),
        (("linf", 0.1, (0, float("inf"))), "threat.bounds: expected a finite number"),
        (("linf", 0.1, (None, None)), "threat.bounds: expected a finite number"),
    ],
)
def test_what_makes_no_threat_model(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        ThreatModel(*arguments)


def test_bounds_of_any_kind_are_kept_as_plain_numbers() -> None:
    for bounds in ([0, 1], (0, 1), torch.tensor([0, 1])):
        assert repr(ThreatModel("linf", 0.1, bounds)) == "ThreatModel(norm='linf', eps=0.1, bounds=(0, 1))"
        assert hash(ThreatModel("linf", 0.1, bounds)) == hash(ThreatModel("linf", 0.1))
