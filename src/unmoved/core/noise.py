"""Draw random numbers that depend on (seed, stream, step, sample identity, pixel) and nothing else.

So the result of an evaluation does not depend on batch size, order or device; two processes with half the batch each
draw the same numbers as one process with the whole batch; and the caller's random state is never touched.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): on a CPU in numpy's uint64, block by block so that
intermediate values stay in the processor's cache; elsewhere in wrapping int64 tensor arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from unmoved.core.errors import require_whole


def _signed(value: int) -> int:
    """Return the int64 with the same bits as an unsigned 64-bit constant."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)
_BLOCK = 2**14  # numbers: 128 KiB each of bits and scratch


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift logically: int64 shifts in torch keep the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    return z ^ _shift_right(z, 31)


def _mix_in_place(z: np.ndarray, scratch: np.ndarray) -> None:
    """`_mix` of uint64, whose shifts are logical and whose products wrap."""
    for bits, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        np.right_shift(z, np.uint64(bits), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        if factor != 1:
            np.multiply(z, np.uint64(factor % 2**64), out=z)


def _drawn(
    index: Tensor, shape: tuple[int, ...], seed: int, step: int, stream: int, value: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return (B, *shape) float32: ``value`` of 64 random bits per entry, whose tensors it may overwrite."""
    seed = require_whole("seed", seed)
    key = torch.zeros_like(index)
    for part in (torch.full_like(index, _signed(seed)), torch.full_like(index, stream), torch.full_like(index, step)):
        key = _mix(key * _GOLDEN + part + 1)
    key = _mix(key * _GOLDEN + index + 1)
    samples, count = len(index), math.prod(shape)
    counter = torch.arange(1, count + 1, device=index.device) * _GOLDEN
    if index.device.type != "cpu":
        return value(_mix(key[:, None] + counter)).to(torch.float32).reshape(samples, *shape)
    out = torch.empty(samples, count)
    keys, counters = (t.numpy().view(np.uint64) for t in (key, counter))
    whole, scratch = np.empty(min(_BLOCK, out.numel()), np.uint64), np.empty(min(_BLOCK, out.numel()), np.uint64)
    down = max(_BLOCK // max(count, 1), 1)
    for top in range(0, samples, down):
        for left in range(0, count, _BLOCK):
            rows, columns = keys[top : top + down, None], counters[None, left : left + _BLOCK]
            form = len(rows), columns.shape[1]
            z, rest = (memory[: math.prod(form)].reshape(form) for memory in (whole, scratch))
            np.add(rows, columns, out=z)
            _mix_in_place(z, rest)
            out[top : top + down, left : left + _BLOCK] = value(torch.from_numpy(z.view(np.int64)))
    return out.reshape(samples, *shape)


def uniform(index: Tensor, shape: tuple[int, ...], *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Draw from the uniform distribution on [0, 1), float32.

    Args:
        index: (B,) int64, sample identities.
        shape: the shape of one sample.
        seed, step, stream: the rest of the key; streams separate uses, such as restarts.

    Returns:
        (B, *shape) float32 on the device of ``index``.
    """
    return _drawn(index, shape, seed, step, stream, _uniform)


def _uniform(bits: Tensor) -> Tensor:
    return bits.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)


def normal(index: Tensor, shape: tuple[int, ...], *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Draw from the standard normal, float32 (Box-Muller on one 64-bit draw per value); arguments as in `uniform`."""
    return _drawn(index, shape, seed, step, stream, _normal)


def _normal(bits: Tensor) -> Tensor:
    # 31 bits for the radius, never zero, and 24 for the angle: |value| <= sqrt(-2 log 2^-32) = 6.66.
    angle = (bits & ((1 << 24) - 1)).to(torch.float64).mul_(2.0 * math.pi * 2.0**-24)
    radius = bits.bitwise_right_shift_(33).bitwise_and_((1 << 31) - 1).to(torch.float64).add_(0.5).mul_(2.0**-31)
    return radius.log_().mul_(-2.0).sqrt_().mul_(angle.cos_())
