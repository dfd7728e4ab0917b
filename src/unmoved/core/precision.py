"""Choose the number format (float32 or bf16) and memory layout of forward and backward passes.

Parameters, losses and the predictions that decide an evaluation are always float32.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unmoved.core.errors import UnmovedError, require_choice
from unmoved.core.weights import evaluating, in_training

PRECISIONS = ("auto", "float32", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def require_device(device: str) -> None:
    """Raise `UnmovedError` unless ``device`` is one of `DEVICES` and this machine has it."""
    require_choice("device", device, DEVICES)
    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise UnmovedError(f"device: expected one that this machine has, came {device!r}; use cpu or auto")


def resolve(precision: str, device: torch.device | str) -> str:
    """Resolve ``"auto"`` to the format that is faster on this device: bf16 if the hardware multiplies it, else float32.

    Raises:
        UnmovedError: an unknown precision.
    """
    require_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if kind == "cpu":
        features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
        return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "float32"
    return "float32"


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[object]:
    """Run forward passes of the block in a resolved precision."""
    if resolve(precision, device) == "float32":
        return no_tf32(precision, device)
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def no_tf32(precision: str, device: torch.device | str) -> AbstractContextManager[object]:
    """Turn TF32 off for forward and backward if ``precision`` is resolved to float32."""
    is_float32 = torch.device(device).type == "cuda" and resolve(precision, device) == "float32"
    return _ieee() if is_float32 else nullcontext()


@contextmanager
def float32_only(device: torch.device | str) -> Iterator[None]:
    """Compute in float32 inside the block, without TF32, whatever autocast the caller is in."""
    with torch.autocast(torch.device(device).type, enabled=False), no_tf32("float32", device):
        yield


@contextmanager
def _ieee() -> Iterator[None]:
    """Keep cuDNN and cuBLAS from rounding the factors of float32 products to the 10 bits of TF32."""
    cudnn: Any = torch.backends.cudnn  # mypy sees the module that torch replaces
    matmul: Any = torch.backends.cuda.matmul
    switches = (cudnn.conv, cudnn.rnn, matmul)
    before = [switch.fp32_precision for switch in switches]

    def turn(states: list[str]) -> None:
        # Torch has an older and a newer switch for each, and reading the older one fails if they disagree.
        cudnn.allow_tf32, matmul.allow_tf32 = states[0] == "tf32", states[2] == "tf32"
        for switch, state in zip(switches, states, strict=True):
            switch.fp32_precision = state

    try:
        turn(["ieee"] * 3)
        yield
    finally:
        turn(before)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


# Channels that oneDNN's kernels take at a time: 8 with AVX2, 16 with AVX-512.
_BLOCK = 16


def memory_format_for(model: nn.Module, device: torch.device | str, x: Tensor | None = None) -> torch.memory_format:
    """Choose channels_last, in which convolutions are faster, if its gradients are known to be right.

    On a CPU the weights' gradient of a 1x1 convolution with a stride and few input channels is wrong in channels_last,
    or the process crashes or hangs (uxlfoundation/oneDNN, issue 6035; torch 2.13 has it). A model with such a
    convolution, for example a `preact_resnet18` narrower than 16, therefore stays contiguous. For classes outside torch
    and this package, a copy of the model is run on ``x`` (B, C, H, W) in both modes and its convolutions are recorded.
    If that is not possible, or a parameter could become such a kernel later, the model stays contiguous, too.
    """
    if any(tensor.ndim > 4 for tensor in (*model.parameters(), *model.buffers())):  # torch has no such format for them
        return torch.contiguous_format
    if torch.device(device).type == "cpu" and not _is_right_in_channels_last(model, x):
        return torch.contiguous_format
    return torch.channels_last


def _is_right_in_channels_last(model: nn.Module, x: Tensor | None) -> bool:
    modules = list(getattr(model, "_orig_mod", model).modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    if any(_is_miscomputed(m.weight.shape, m.stride, m.groups, m.transposed) for m in convolutions):
        return False
    if all(type(m).__module__.startswith(("torch.nn.", "unmoved.")) and "forward" not in m.__dict__ for m in modules):
        return True
    known = {id(m) for m in convolutions}
    loose = (p for m in modules if id(m) not in known for p in m.parameters(recurse=False))
    if any(p.ndim == 4 and _is_miscomputed(p.shape, (2, 2), 1, False) for p in loose):
        return False
    return x is not None and _is_right_where_seen(modules[0], x)


def _is_miscomputed(kernel: Sequence[int], stride: Sequence[int], groups: int, transposed: bool) -> bool:
    """Return whether a convolution is affected; ``kernel`` is its weight's shape (out, in / groups, height, width)."""
    channels = min(kernel[0] // groups, kernel[1]) if transposed else kernel[1]
    return max(kernel[2:]) == 1 and max(stride) > 1 and channels < _BLOCK


class _Convolutions(TorchDispatchMode):
    """Record every convolution of the passes inside, whatever calls it."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.are_right = True

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten.convolution.default and args[1].ndim == 4:
            _, weight, _, stride, _, _, transposed, _, groups = args
            self.are_right &= not _is_miscomputed(weight.shape, stride, groups, transposed)
        return func(*args, **(kwargs or {}))


def _is_right_where_seen(model: nn.Module, x: Tensor) -> bool:
    convolutions = _Convolutions()
    try:
        twin = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), convolutions:
            with in_training(twin) as (train, _):
                train()
                twin(x)
            with evaluating(twin):
                twin(x)
    except Exception:  # any error of the user's model is reported by the training itself
        return False
    return convolutions.are_right


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Let weights require no gradient inside the block, for an attack on what ``torch.compile`` returned.

    A compiled graph computes the gradients of all weights, while an attack needs only that of the image. Other models
    are left as they are: eager passes compute only what is needed, and autocast caches its copies only of weights that
    require a gradient.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    is_compiled = dynamo is not None and isinstance(model, dynamo.OptimizedModule)
    weights = [p for p in model.parameters() if p.requires_grad] if is_compiled else []
    try:
        for p in weights:
            p.requires_grad_(False)
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
