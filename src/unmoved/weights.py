"""Which weight corruptions are allowed, and the guards that restore what a corruption or an attack changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from unmoved.errors import UnmovedError, require_choice, require_number, require_whole

Tensors = TypeVar("Tensors", Tensor, list[Tensor])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a corruption may touch: those that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The l2 norm of several tensors taken together as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


def steepest(g: Tensors, eps: float, p: float = 2, n: int | None = None) -> Tensors:
    """The corruption of at most ``n`` weights in the lp ball of radius ``eps`` that raises a linear loss most.

    ``a = eps sign(h) |h|^(1/(p-1)) / || |h|^(1/(p-1)) ||_p`` with h the n entries of g of largest size; the gain is
    ``eps ||h||_q``, 1/p + 1/q = 1. Sun et al. 2021 (AAAI) and the notes in docs/methods/apd.md.

    Args:
        g: a gradient: one tensor, or several taken together as one vector.
        eps: radius.
        p: in (1, inf].
        n: at most this many entries differ from zero; None for all.

    Returns:
        The same form as ``g``; zeros where g is zero.

    Raises:
        UnmovedError: a negative eps, p outside (1, inf], or n outside 1..number of weights.
    """
    eps = require_number("steepest: eps", eps, at_least=0)
    if not p > 1:
        raise UnmovedError(f"steepest: expected p in (1, inf], came {p!r}")
    return _as_one_vector(g, lambda v: _steepest(_largest(v, n), eps, p))


def project(a: Tensors, eps: float, p: float = 2, n: int | None = None) -> Tensors:
    """The nearest corruption (in l2) with at most ``n`` entries and ``||a||_p <= eps``: keep the largest, then shrink.

    Exact for p = 2 and p = inf. Arguments and form as `steepest`.

    Raises:
        UnmovedError: as `steepest`, and p other than 2 or inf.
    """
    eps = require_number("project: eps", eps, at_least=0)
    if p not in (2, math.inf):
        raise UnmovedError(f"project: the nearest point is known for p = 2 and p = inf, came {p!r}")

    def nearest(v: Tensor) -> Tensor:
        v = _largest(v, n)
        if p == math.inf:
            return v.clamp(-eps, eps)
        length = torch.linalg.vector_norm(v)
        return torch.where(length > eps, v * (eps / length.clamp_min(1e-30)), v)

    return _as_one_vector(a, nearest)


def _steepest(h: Tensor, eps: float, p: float) -> Tensor:
    top = h.abs().amax() if h.numel() else h.sum()
    if p == math.inf:
        return eps * h.sign()
    # Scaled by the largest entry first, so that powers neither overflow nor vanish.
    power = (h / torch.where(top > 0, top, 1.0)).abs() ** (1 / (p - 1)) * h.sign()
    length = torch.linalg.vector_norm(power, ord=p)
    return torch.where(length > 0, eps * power / torch.where(length > 0, length, 1.0), 0.0)


def _largest(v: Tensor, n: int | None) -> Tensor:
    """The n entries of largest size, the rest zero."""
    if n is None:
        return v
    n = require_whole("n", n, at_least=1, at_most=v.numel(), advice="it counts corrupted weights")
    kept = v.abs().topk(int(n)).indices
    return torch.zeros_like(v).index_copy(0, kept, v[kept])


def _as_one_vector(tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    if isinstance(tensors, Tensor):
        return function(tensors.flatten()).reshape(tensors.shape)
    whole = function(torch.cat([t.flatten() for t in tensors]))
    parts = whole.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


@contextmanager
def perturbed(parameters: Sequence[Tensor], corruption: Sequence[Tensor]) -> Iterator[None]:
    """The parameters moved by ``corruption`` inside the block, restored bit for bit after it, on exceptions too."""
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, v in zip(parameters, corruption, strict=True):
                p.add_(v)
            torch.clear_autocast_cache()  # a caller's own autocast would go on with the weights it cast before
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)
            torch.clear_autocast_cache()


@contextmanager
def evaluating(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """The model in the mode an attack wants, every submodule's own mode restored after it.

    Args:
        mode: ``"eval"``; or ``"train"``: batch statistics and dropout in the submodules that are training already,
            with the running statistics frozen and the random state restored.
    """
    require_choice("mode", mode, ("eval", "train"))
    if mode == "train":
        with frozen_batchnorm(model), torch.random.fork_rng(_cuda_devices(model)):
            yield
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Normalisation by batch statistics without moving the running ones (nor ``num_batches_tracked``)."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    # BatchNorm without tracking uses the batch and moves nothing; InstanceNorm moves all the same, so it is put back.
    tracking = [m for m in norms if isinstance(m, _BatchNorm)]
    saved = [(b, b.clone()) for m in norms if not isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        for buffer, old in saved:
            buffer.copy_(old)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
