"""Which number format and memory layout the passes run in. Parameters, losses and verdicts are float32 always."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from unmoved.errors import UnmovedError, require_choice

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
    """``"auto"`` as the format that is faster on this device: bf16 where the hardware multiplies it, else float32.

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
    """The context for a forward pass in a resolved precision."""
    if resolve(precision, device) == "float32":
        return products(precision, device)
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def products(precision: str, device: torch.device | str) -> AbstractContextManager[object]:
    """The context for passes both ways in which float32, where it is resolved to, is float32 on a GPU too."""
    is_float32 = torch.device(device).type == "cuda" and resolve(precision, device) == "float32"
    return _ieee() if is_float32 else nullcontext()


@contextmanager
def exact(device: torch.device | str) -> Iterator[None]:
    """Float32 for what a verdict rests on, whatever autocast a caller is in."""
    with torch.autocast(torch.device(device).type, enabled=False), products("float32", device):
        yield


@contextmanager
def _ieee() -> Iterator[None]:
    """Torch lets cuDNN round the factors of float32 products to the 10 bits of TF32 unless it is told not to."""
    cudnn: Any = torch.backends.cudnn  # mypy sees the module that torch replaces
    matmul: Any = torch.backends.cuda.matmul
    switches = (cudnn.conv, cudnn.rnn, matmul)
    before = [switch.fp32_precision for switch in switches]

    def turn(states: list[str]) -> None:
        # Torch has an older and a newer switch for each, and whoever reads the older one fails where they disagree.
        cudnn.allow_tf32, matmul.allow_tf32 = states[0] == "tf32", states[2] == "tf32"
        for switch, state in zip(switches, states, strict=True):
            switch.fp32_precision = state

    try:
        turn(["ieee"] * 3)
        yield
    finally:
        turn(before)


# Channels that oneDNN's kernels take at a time: 8 with AVX2, 16 with AVX-512.
_BLOCK = 16


def layout(model: nn.Module, device: torch.device | str) -> torch.memory_format:
    """channels_last, in which convolutions are faster, wherever its gradients are right.

    On a CPU the weights' gradient of a 1x1 convolution with a stride and few input channels is wrong in channels_last,
    or the process crashes or hangs (uxlfoundation/oneDNN, issue 6035; torch 2.13 has it). A model with one, such as
    a `preact_resnet18` narrower than 16, stays contiguous there, and is right.
    """
    if torch.device(device).type == "cpu" and any(_miscomputed(module) for module in model.modules()):
        return torch.contiguous_format
    return torch.channels_last


def _miscomputed(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    is_strided_point = max(module.kernel_size) == 1 and max(module.stride) > 1
    return is_strided_point and module.in_channels // module.groups < _BLOCK


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """For an attack on what ``torch.compile`` returned: the weights need no gradient inside, and do again after it.

    A compiled graph computes every gradient that could be asked for, and an attack asks for the image's alone. Other
    models are left as they are: eager passes compute what is asked for, and autocast keeps its copies of weights that
    need a gradient only.
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
