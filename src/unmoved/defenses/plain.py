"""Take the ordinary optimizer step, at the weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Plain:
    """The ordinary optimizer step, ``w <- step(w, grad L(w))``: one forward-backward pass."""

    def __call__(self, model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = backward()
        optimizer.step()
        return loss
