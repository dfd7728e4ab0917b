"""A risk that is a function of some tensors, such as a quadratic, whose corruptions are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from unmoved.analyses.risks import GLOBAL, Point


class FunctionRisk:
    """A function without arguments that reads the tensors in ``parameters``."""

    def __init__(self, function: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self.parameters, self.scope, self.images = list(parameters), GLOBAL, 0
        self._function = function

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def at(self, gradient: bool = False) -> Point:
        with torch.set_grad_enabled(gradient):
            value = self._function()
        slope = list(torch.autograd.grad(value, self.parameters)) if gradient else []
        return Point(float(value.detach()), math.nan, slope)
