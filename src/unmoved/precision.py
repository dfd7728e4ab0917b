"""Which number format the passes run in. Parameters, losses and verdicts are float32 always."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

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
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
