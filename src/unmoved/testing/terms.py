"""Check that a term keeps its contract."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from unmoved.core import protocols
from unmoved.core.protocols import StatefulTerm, Term
from unmoved.core.views import Views
from unmoved.testing.fixtures import require, same_random_state, untouched


def check_term(term: Term, *, num_classes: int = 5, couples_samples: bool | None = None) -> None:
    """Check that a term is pure and gives one finite, differentiable number per sample, whatever the logits.

    Args:
        term: the term; a `StatefulTerm` must not change in ``forward``.
        num_classes: classes of the logits that it is tried on.
        couples_samples: whether the value of one sample depends on the others, so that batch laws are skipped;
            ``None`` is what the term declares.

    Raises:
        ExamFailed: naming the property.
    """
    draw = torch.Generator().manual_seed(1)
    clean, adv = (3 * torch.randn(12, num_classes, generator=draw, dtype=torch.float64) for _ in range(2))
    y = torch.randint(num_classes, (12,), generator=draw)
    if isinstance(term, StatefulTerm):
        term = copy.deepcopy(term).double()

    def value(which: Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        return term(Views.of(y=y[which], clean=clean[which].to(dtype), adv=adv[which].to(dtype)))

    with untouched(term), same_random_state():
        values = value()
    require(values.shape == (12,), f"{term!r}: expected one value per sample (12,), came {tuple(values.shape)}")
    require(values.is_floating_point() and torch.isfinite(values).all(), f"{term!r}: values are not finite floats")
    require(torch.equal(values, value()), f"{term!r}: two calls on the same views differ")
    if not (protocols.couples_samples(term) if couples_samples is None else couples_samples):
        order = torch.randperm(12, generator=draw)
        require(torch.allclose(value(order), values[order]), f"{term!r}: permuting the batch changes the values")
        require(torch.allclose(value(slice(0, 1)), values[:1]), f"{term!r}: a batch of one sample gives another value")
    require(
        torch.allclose(value(dtype=torch.float32).double(), values, rtol=1e-3, atol=1e-3),
        f"{term!r}: float32 and float64 disagree",
    )
    for scale in (0.0, 1e4):
        _check_gradient_finite(term, clean * scale, adv * scale, y)
    clean_leaf, adv_leaf = clean.clone().requires_grad_(True), adv.clone().requires_grad_(True)

    def function(c: Tensor, a: Tensor) -> Tensor:
        # Adding zero times both keeps the graph connected for a term of one view alone.
        return term(Views.of(y=y, clean=c, adv=a)) + 0 * (c.sum() + a.sum())

    require(
        torch.autograd.gradcheck(function, (clean_leaf, adv_leaf), raise_exception=False),
        f"{term!r}: the gradient disagrees with finite differences",
    )


def _check_gradient_finite(term: Term, clean: Tensor, adv: Tensor, y: Tensor) -> None:
    leaves = [logits.float().clone().requires_grad_(True) for logits in (clean, adv)]
    single = copy.deepcopy(term).float() if isinstance(term, StatefulTerm) else term
    values = single(Views.of(y=y, clean=leaves[0], adv=leaves[1]))
    size = float(clean.abs().max())
    require(torch.isfinite(values).all(), f"{term!r}: not finite at logits of {size:.0f}")
    for gradient in torch.autograd.grad(values.sum(), leaves, allow_unused=True):
        require(gradient is None or torch.isfinite(gradient).all(), f"{term!r}: gradient not finite at {size:.0f}")
