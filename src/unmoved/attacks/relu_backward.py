"""Replace ReLU's derivative by softplus' on the backward pass alone, so that dead units pass gradients on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unmoved.core.errors import require_number

_LINEAR = 40.0  # alpha z from which on the sigmoid is 1, in float64 too
_RELUS = frozenset({F.relu, torch.relu, Tensor.relu})


def smoothed(alpha: float) -> AbstractContextManager[object]:
    """Return a context in which each ReLU keeps its values and passes gradients on as a parametric softplus would.

    ``forward: max(z, 0)``; ``backward: g sigmoid(alpha z)``, the derivative of ``log(1 + exp(alpha z)) / alpha``
    (Xie et al. 2020, Smooth Adversarial Training, section 3, with alpha = 10; an instance of Athalye et al. 2018's
    backward pass by approximation). If the first ReLUs of a network stay dead within eps, it has next to no
    gradient there, and gradient ascent fails although adversarial images are near.

    Args:
        alpha: larger is closer to ReLU, in units of one over an activation; 0 keeps ReLU's own derivative.

    Raises:
        UnmovedError: a negative alpha.

    Deviations: calls that overwrite their argument (``relu_``) keep their own derivative; ``nn.ReLU(inplace=True)``
    does not, and needs memory for its result.
    """
    alpha = require_number("smooth", alpha, at_least=0)
    return _Softplus(alpha) if alpha else nullcontext()


class _Context(BackwardCFunction):
    alpha: float


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp_min(0)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return torch.ops.aten.softplus_backward(gradients[0], z, ctx.alpha, _LINEAR), None


class _Softplus(TorchFunctionMode):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _RELUS and torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Backward.apply  # torch gives it no types
            return apply(args[0] if args else kwargs["input"], self.alpha)
        return func(*args, **kwargs)
