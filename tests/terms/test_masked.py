"""Classes that a model rules out with minus infinity: every term is what it is without them, gradients included."""

from __future__ import annotations

import inspect

import pytest
import torch

from unmoved import Views, terms
from unmoved.core.protocols import Term

KEPT = [0, 2, 3, 4, 6, 7]  # of eight classes, the model has these
CLASSES = 8


def made(name: str, classes: int) -> Term:
    term = getattr(terms, name)
    if name == "Sum":
        return terms.Sum((1.0, terms.CE("clean")), (6.0, terms.KL()))
    return term(classes) if "num_classes" in inspect.signature(term).parameters else term()


SMOOTHED = terms.CE("adv", label_smoothing=0.2)
MADE = {name: (made(name, CLASSES), made(name, len(KEPT))) for name in terms.__all__}
MADE |= {"CE smoothed": (SMOOTHED, SMOOTHED), "DRSL by K": (terms.DRSL(mean_divisor="K"),) * 2}


@pytest.mark.parametrize("name", MADE)
def test_a_class_that_is_ruled_out_counts_as_one_that_is_not_there(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([2, 5, 0, 1, 3])  # positions among those that are kept
    few = [torch.randn(5, len(KEPT), generator=g, dtype=torch.float64).mul(3).requires_grad_() for _ in range(2)]
    many = []
    for logits in few:
        wide = torch.full((5, CLASSES), -torch.inf, dtype=torch.float64)
        wide[:, KEPT] = logits.detach()
        many.append(wide.requires_grad_())
    masked, bare = MADE[name]
    value = masked(Views.of(y=torch.tensor(KEPT)[y], clean=many[0], adv=many[1]))
    expected = bare(Views.of(y=y, clean=few[0], adv=few[1]))
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    for wide, logits in zip(many, few, strict=True):
        if logits.grad is None:
            assert wide.grad is None
            continue
        assert wide.grad is not None
        torch.testing.assert_close(wide.grad[:, KEPT], logits.grad)
        assert (wide.grad[:, [1, 5]] == 0).all()


def test_what_the_adversarial_image_alone_rules_out_is_infinitely_far() -> None:
    clean = torch.zeros(1, 3)
    adv = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert terms.KL()(Views.of(y=torch.tensor([0]), clean=clean, adv=adv)).item() == torch.inf


def test_each_sample_may_rule_out_other_classes() -> None:
    z = torch.tensor([[1.0, 2.0, -torch.inf, 0.0], [0.5, -torch.inf, 1.0, 3.0]])
    w = torch.tensor([[0.0, 1.0, -torch.inf, 2.0], [0.5, -torch.inf, 0.0, 1.0]])
    y = torch.tensor([0, 3])
    together = terms.TRADES()(Views.of(y=y, clean=z, adv=w))
    for row, kept, label in ((0, [0, 1, 3], 0), (1, [0, 2, 3], 2)):
        alone = Views.of(y=torch.tensor([label]), clean=z[row : row + 1, kept], adv=w[row : row + 1, kept])
        torch.testing.assert_close(together[row : row + 1], terms.TRADES()(alone))
