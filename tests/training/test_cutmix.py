"""Training on images that are mixed of two: every loss is that of the mixed label, and what has none is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmoved import Batch, Method, ThreatModel, UnmovedError, Views, attacks, data, models, terms, train, train_step
from unmoved.attacks.gradients import attacking, gradient_at
from unmoved.core.preconditions import values_of
from unmoved.runs import recipe
from unmoved.runs.train import train_recipe

THREAT = ThreatModel("linf", 0.1)
SOFT = 0.1  # label smoothing


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def split(n: int = 12) -> data.ArraySplit:
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(n))
    return data.ArraySplit.of(x, torch.arange(n) % 5, layout="NCHW")


@pytest.fixture
def mixed() -> Batch:
    batch = next(split().batches(12))
    batch = data.CutMix().over(split())(replace(batch, x=batch.x.double(), step=3), 5)
    assert batch.share is not None
    assert ((batch.share > 0.05) & (batch.share < 0.95)).sum() > 6  # neither label counts for nothing
    return batch


def label_of(batch: Batch) -> Tensor:
    """The distribution over the classes, (B, 5): eq. (1) of the paper."""
    assert batch.other is not None
    assert batch.share is not None
    share = batch.share.double()[:, None]
    return share * F.one_hot(batch.y, 5) + (1 - share) * F.one_hot(batch.other, 5)


# --- the loss


def test_cross_entropy_is_that_of_the_mixed_label(mixed: Batch) -> None:
    model = network()
    log_p = F.log_softmax(model(mixed.x), dim=1)
    smooth = (1 - SOFT) * label_of(mixed) + SOFT / 5
    for term, label in ((terms.CE(), label_of(mixed)), (terms.CE("clean", SOFT), smooth)):
        for asked in (term, terms.Sum((1, term)), terms.Sum((0.25, term), (0.75, term))):
            value = values_of(asked, Views(model, mixed), "term")
            assert torch.allclose(value, -(label * log_p).sum(dim=1), rtol=1e-6)


TERMS = [
    terms.Margin(),
    terms.DLR(),
    terms.TargetedMargin(),
    terms.KL(),
    terms.MART(),
    terms.TRADES(),
    terms.DRSL(),
    terms.ComplementEntropy(),
    terms.GuidedComplementEntropy(),
    lambda views: views.adv.square().sum(dim=1) * views.y,
    lambda views: views.adv.sum(dim=1) * views.batch.y,
]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: "a function" if inspect.isfunction(term) else repr(term)[:40])
def test_every_term_is_the_mean_of_its_values_for_the_two_labels(term: Any, mixed: Batch) -> None:
    model, x_adv = network(), mixed.x + 0.1
    assert mixed.other is not None
    assert mixed.share is not None
    one, two = (term(Views(model, Batch(mixed.x, y, mixed.index, mixed.step), x_adv)) for y in (mixed.y, mixed.other))
    want = mixed.share * one + (1 - mixed.share) * two
    assert not torch.allclose(one, two) or isinstance(term, terms.KL)
    assert torch.allclose(values_of(term, Views(model, mixed, x_adv), "term"), want)
    assert torch.allclose(terms.Sum((1, term))(Views(model, mixed, x_adv)), want)
    few = Views(model, mixed, x_adv).take(torch.tensor([7, 2]))
    assert torch.allclose(values_of(term, few, "term"), want[[7, 2]])
    ready = Views.of(y=mixed.y, other=mixed.other, share=mixed.share, clean=model(mixed.x), adv=model(x_adv))
    if "batch" not in getattr(getattr(term, "__code__", None), "co_names", ()):
        assert torch.allclose(values_of(term, ready, "term"), want)


def test_two_labels_cost_no_pass_more(mixed: Batch) -> None:
    model, passes = network(), list[int]()
    model.register_forward_hook(lambda *_: passes.append(1))
    terms.MART()(Views(model, mixed, mixed.x + 0.1))
    assert len(passes) == 2


def test_a_term_alone_is_not_told_that_one_label_is_all(mixed: Batch) -> None:
    with pytest.raises(UnmovedError, match=r"one label a sample, but these images are mixed of two.*use|Sum"):
        terms.CE()(Views(network(), mixed))


def test_labels_that_have_no_logit_are_refused(mixed: Batch) -> None:
    wrong = replace(mixed, other=torch.full_like(mixed.y, 5))
    with pytest.raises(UnmovedError, match=r"Batch.other: expected 0..4 for 5 logits, came 5"):
        terms.TRADES()(Views(network(), wrong))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": None}, "expected both or neither"),
        ({"other": torch.zeros(12)}, r"Batch.other: expected int64 classes of shape \(12,\)"),
        ({"share": torch.zeros(3)}, r"Batch.share: expected floats of shape \(12,\), came torch.float32 \(3,\)"),
    ],
)
def test_half_a_second_label_is_none(change: dict[str, Any], words: str, mixed: Batch) -> None:
    with pytest.raises(UnmovedError, match=words):
        replace(mixed, **change)


# --- the attack


def test_an_attack_climbs_the_loss_of_the_mixed_label(mixed: Batch) -> None:
    model = network()
    x = mixed.x.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(F.cross_entropy(model(x), label_of(mixed), reduction="sum"), x)
    for guard in (torch.enable_grad, torch.inference_mode):
        with guard(), attacking(model, mixed.map(torch.clone), THREAT) as views:
            _, slope, _ = gradient_at(views, views.x, terms.CE())
        assert torch.allclose(slope, want, rtol=1e-5)
    x_adv = (mixed.x + 0.1 * want.sign()).clamp(0, 1)
    assert torch.allclose(attacks.FGSM(THREAT)(model, mixed), x_adv)


# --- the step


def test_a_step_is_that_of_plain_pytorch_on_the_mixed_label(mixed: Batch) -> None:
    model, hand = network(), network()
    step = train_step(model, Method(None, terms.CE()), torch.optim.SGD(model.parameters(), lr=0.5), mixed)
    z = hand(mixed.x)
    loss = F.cross_entropy(z, label_of(mixed))
    loss.backward()
    torch.optim.SGD(hand.parameters(), lr=0.5).step()
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(model.parameters(), hand.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


def test_the_accuracy_counts_the_label_of_the_larger_part(mixed: Batch) -> None:
    model = network()
    assert mixed.share is not None
    best = model(mixed.x).argmax(dim=1)
    larger = (mixed.share > 0.5).double().mean().item()
    for first, second, want in ((best, (best + 1) % 5, larger), ((best + 1) % 5, best, 1 - larger)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = train_step(model, Method(None, terms.CE()), optimizer, replace(mixed, y=first, other=second))
        assert step.accuracy.item() == pytest.approx(want)


# --- what is refused


REFUSED: dict[str, tuple[Callable[[], Method], str]] = {
    "terms that remember": (
        lambda: Method(None, terms.Sum((1, terms.CE()), (0.1, terms.GlobalProbability(5)))),
        "came GlobalProbability.* which remembers what it saw of each label",
    ),
    "terms that couple samples": (
        lambda: Method(None, terms.Sum((1, terms.CE()), (1, terms.PRSL()))),
        "came PRSL.* which couples the samples",
    ),
    "losses that couple samples": (
        lambda: Method(attacks.PGD(THREAT, loss=terms.PRSL("adv")), terms.CE()),
        "came PRSL.* which couples the samples",
    ),
    "stopping rules": (
        lambda: Method(attacks.PGD(THREAT, stop=attacks.Friendly(1)), terms.CE()),
        "came PGD.*one label",
    ),
    "the best of several points": (lambda: Method(attacks.PGD(THREAT, keep="best"), terms.CE()), "came PGD.*one label"),
    "restarts": (lambda: Method(attacks.PGD(THREAT, restarts=2), terms.CE()), "came PGD.*one label"),
    "radii of samples": (lambda: Method(attacks.IAAT(THREAT), terms.CE()), "came IAAT.*one label"),
    "ensembles": (lambda: Method(attacks.AutoAttack(THREAT), terms.CE()), "came AutoAttack.*one label"),
    "strangers who say nothing": (
        lambda: Method(lambda model, batch: batch.x, terms.CE()),
        "came <function.*one label",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_one_label_is_refused_before_anything_is_trained(case: str) -> None:
    make, words = REFUSED[case]
    model, method = models.linear((1, 6, 6), 5), make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnmovedError, match=words):
        train(model, [(0, Method(None, terms.CE())), (1, method)], split(), epochs=2, augment=data.CutMix())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    train(model, method, split(), epochs=1)  # which is what is refused


def test_an_attack_called_by_hand_refuses_too(mixed: Batch) -> None:
    with pytest.raises(UnmovedError, match=r"came APGD.*one label"):
        attacks.APGD(THREAT)(network(), mixed)


def test_data_without_positions_is_refused() -> None:
    whole = split()

    class Streamed:
        num_classes, shape = 5, (1, 6, 6)

        def __len__(self) -> int:
            return len(whole)

        def batches(self, size: int, *, shuffle: int | None = None) -> Any:
            return whole.batches(size, shuffle=shuffle)

    for augment in (data.CutMix(), data.augmentation("crop-cutmix"), data.Chain(data.CutMix(data.Flip()), data.Flip())):
        with pytest.raises(UnmovedError, match=r"cutmix: .*select\(positions\).*came Streamed"):
            train(network(), Method(None, terms.CE()), Streamed(), epochs=1, augment=augment)


# --- training


def test_a_training_sees_the_same_images_from_whichever_memory() -> None:
    """A selection that lends its images and a copy of it give the same weights."""
    whole, found = split(20), []
    for part in (whole.select(torch.arange(4, 16)), whole.lent(torch.arange(4, 16))):
        model = network()
        model.float()
        train(model, Method(attacks.PGD(THREAT, steps=2), terms.TRADES()), part, batch_size=4, augment=data.CutMix())
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_digits_are_learned_from_mixed_images(tmp_path: Any) -> None:
    eps = ["threat.eps=0.05", "attack.eps=0.05", "attack.steps=1", "validation.use=pgd", "validation.steps=1"]
    rest = ["training.augment=cutmix", "training.epochs=1", "training.batch_size=32", "optimizer.lr=0.005"]
    record = train_recipe(recipe.read("digits/at", [*eps, *rest]), tmp_path).metrics.iloc[-1]
    assert record["validation_clean"] > 0.3
    assert record["loss"] < 2.25  # chance: log 10 = 2.303
    assert record["train_accuracy"] < record["validation_clean"]  # mixed images are harder
