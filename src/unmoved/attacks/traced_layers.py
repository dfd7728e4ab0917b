"""Trace a forward pass of a network, and describe its first layers by their receptive fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from unmoved.attacks.receptive_fields import Layer, Pair
from unmoved.core.batch import Image

# Pointwise functions: each output is computed from the input at the same position and parameters of its channel.
_POINTWISE: set[object] = {
    *(Tensor.relu, Tensor.relu_, Tensor.clamp, Tensor.sub, Tensor.add, Tensor.mul, Tensor.div),
    *(torch.relu, torch.relu_, torch.clamp, torch.sub, torch.add, torch.mul, torch.div, torch.tanh, torch.sigmoid),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.softplus, F.hardtanh, F.batch_norm, F.dropout),
}
# Functions that read no value of a tensor.
_LOOKS: set[object] = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
}
# The names of the arguments after the image.
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_ARGUMENTS: dict[object, tuple[str, ...]] = {
    torch.conv2d: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    F.max_pool2d: _MAX_POOL,
    torch.max_pool2d: _MAX_POOL,
    F.avg_pool2d: ("kernel_size", "stride", "padding", "ceil_mode"),
}


@contextmanager
def first_layers(model: nn.Module, x: Image, wanted: bool = True) -> Iterator[list[Layer]]:
    """Trace the pass of the model over ``x`` inside the block, and fill the list with its first layers.

    These are the operations from the image on that each work on windows of the result before, up to the first result
    that something else reads too: the last layer's output then determines everything that follows. The model may be
    written in any way. The list stays empty for a model with hooks inside, a scripted or compiled one, and on a GPU.
    """
    if not wanted or not _can_be_traced(model) or x.device.type != "cpu" or x.ndim != 4:
        yield []
        return
    with _Tracer(x) as tracer:
        yield tracer.layers


def _can_be_traced(model: nn.Module) -> bool:
    parts = list(model.modules())
    if hasattr(model, "_orig_mod") or any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        return False
    # Hooks of the model as a whole see only its images and logits, which are computed as always.
    inside = any(part._forward_hooks or part._forward_pre_hooks for part in parts[1:])
    return not (inside or hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


class _Tracer(TorchFunctionMode):
    """Record the function calls of a pass, in this thread only."""

    def __init__(self, x: Image) -> None:
        TorchFunctionMode.__init__(self)
        self.layers: list[Layer] = []
        self._x: Tensor | None = x
        self._results: list[Tensor] = [x]
        self._is_open = True

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        last = len(self._results) - 1
        used = [] if func in _LOOKS else [self._number(tensor) for tensor in _tensors((args, kwargs))]
        earliest = min((number for number in used if number is not None), default=None)
        if earliest is None:
            return out
        if func is Tensor.clone and args[0] is self._x:  # the copy that the model is given
            self._x, self._results = None, [out]
            return out
        is_next = self._is_open and earliest == last and used.count(last) == 1 and self._number(args[0]) == last
        layer = _layer(func, args, kwargs, out) if is_next else None
        if layer is None:
            self._is_open = False
            del self.layers[earliest:], self._results[earliest + 1 :]
        else:
            self.layers.append(layer)
            self._results.append(out)
        return out

    def _number(self, tensor: object) -> int | None:
        # Search from the last: an operation in place returns the tensor that it was given.
        numbers = reversed(range(len(self._results)))
        return next((number for number in numbers if self._results[number] is tensor), None)


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | tuple | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _layer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> Layer | None:
    """Describe a call whose first argument is the image, or return None if the call is no known layer."""
    x = args[0]
    if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != len(x):
        return None
    make = partial(Layer, func, args[1:], kwargs, shape=(out.shape[1], out.shape[2], out.shape[3]))
    if func in _POINTWISE:
        # The vectors of batch norm hold one entry per channel.
        others = [] if func is F.batch_norm else _tensors((args[1:], kwargs))
        by_channel = all(t.numel() == 1 or (t.ndim >= 3 and t.shape[-2:] == (1, 1)) for t in others)
        return make() if by_channel and out.shape == x.shape and not kwargs.get("training") else None
    names = _ARGUMENTS.get(func)
    if names is None:
        return None
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    if func is torch.conv2d:
        return None if isinstance(given.get("padding"), str) else make(**_of_convolution(given))
    is_padded = max(_pair(given.get("padding", 0))) > 0 or max(_pair(given.get("dilation", 1))) > 1
    if is_padded or given.get("ceil_mode") or given.get("return_indices"):
        return None
    kernel = _pair(given["kernel_size"])
    return make(kernel=kernel, stride=_pair(given.get("stride") or kernel), work=out.shape[1] * kernel[0] * kernel[1])


def _of_convolution(given: dict[str, Any]) -> dict[str, Any]:
    height, width = given["weight"].shape[2:]
    down, across = _pair(given.get("dilation", 1))
    return {
        "local": partial(_without_padding, given | {"padding": 0}),
        "kernel": (down * (height - 1) + 1, across * (width - 1) + 1),
        "stride": _pair(given.get("stride", 1)),
        "padding": _pair(given.get("padding", 0)),
        "work": given["weight"].numel(),
    }


def _without_padding(given: dict[str, Any], x: Tensor) -> Tensor:
    return torch.conv2d(x, **given)


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
