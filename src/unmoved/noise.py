"""Counter-based random numbers: noise is a function of (seed, stream, step, sample identity, pixel) and nothing else.

So a verdict does not depend on batch size, order or device, two processes with half the batch each draw what one
process with the whole batch draws, and the caller's random state is never touched.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in wrapping int64 tensor arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmoved.errors import require_whole


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit constant."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts in torch keep the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def _bits(index: Tensor, shape: tuple[int, ...], seed: int, step: int, stream: int) -> Tensor:
    """(B, prod(shape)) int64 of 64 random bits each."""
    seed = require_whole("seed", seed)
    key = torch.zeros_like(index)
    for part in (torch.full_like(index, _signed(seed)), torch.full_like(index, stream), torch.full_like(index, step)):
        key = _mix(key * _GOLDEN + part + 1)
    key = _mix(key * _GOLDEN + index + 1)
    counter = torch.arange(1, math.prod(shape) + 1, device=index.device)
    return _mix(key[:, None] + counter[None, :] * _GOLDEN)


def uniform(index: Tensor, shape: tuple[int, ...], *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Uniform in [0, 1), float32.

    Args:
        index: (B,) int64, sample identities.
        shape: the shape of one sample.
        seed, step, stream: the rest of the key; streams separate uses, such as restarts.

    Returns:
        (B, *shape) float32 on the device of ``index``.
    """
    bits = _shift_right(_bits(index, shape, seed, step, stream), 40)
    return (bits.to(torch.float32) * 2.0**-24).reshape(len(index), *shape)


def normal(index: Tensor, shape: tuple[int, ...], *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Standard normal, float32 (Box-Muller on one 64-bit draw per value); arguments as in `uniform`."""
    bits = _bits(index, shape, seed, step, stream)
    # 31 bits for the radius, never zero, and 24 for the angle: |value| <= sqrt(-2 log 2^-32) = 6.66.
    radius = (_shift_right(bits, 33).to(torch.float64) + 0.5) * 2.0**-31
    angle = (bits & ((1 << 24) - 1)).to(torch.float64) * (2.0 * math.pi * 2.0**-24)
    value = torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(angle)
    return value.to(torch.float32).reshape(len(index), *shape)
