"""Counter-based noise: the right distribution, a function of its key alone, and nobody's random state but its own."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmoved.core import noise

# Every test of a distribution runs at fixed keys, so its p-value is a constant; 1e-4 leaves room for their number.
LEAST_P = 1e-4
INDEX = torch.arange(256)
KEYS: list[dict[str, int]] = [
    {"seed": 0},
    {"seed": 1},
    {"seed": -1},
    {"seed": 2**64 - 2, "step": 12_345},
    {"seed": 7, "step": 1, "stream": 3},
]
BOTH = pytest.mark.parametrize("draw", [noise.uniform, noise.normal])


def independent(a: Tensor, b: Tensor, cells: int = 16) -> float:
    """p-value of the chi-square test that two sets of uniforms are independent, on a cells x cells table."""
    table, _, _ = np.histogram2d(a.flatten().numpy(), b.flatten().numpy(), bins=cells, range=[[0, 1], [0, 1]])
    return float(stats.chisquare(table.flatten()).pvalue)


# --- the generator itself


def test_the_mixer_gives_the_published_sequence_of_splitmix64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = torch.arange(1, 6) * noise._GOLDEN + 1234567
    assert [value % 2**64 for value in noise._mix(state).tolist()] == published
    noise._mix_in_place(unsigned := state.numpy().view(np.uint64), np.empty(5, np.uint64))
    assert unsigned.tolist() == published


@settings(max_examples=30, deadline=None, derandomize=True)
@given(*[st.integers(-(2**63), 2**63 - 1) for _ in range(4)])
def test_the_bits_are_those_of_unbounded_integers(seed: int, step: int, stream: int, index: int) -> None:
    """The wrapping int64 arithmetic of tensors against Python's integers modulo 2^64."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden, key = 0x9E3779B97F4A7C15, 0
    for part in (seed, stream, step, index):
        key = mix((key * golden + part + 1) % 2**64)
    expected = [(mix((key + n * golden) % 2**64) >> 40) / 2**24 for n in (1, 2, 3)]
    assert noise.uniform(torch.tensor([index]), (3,), seed=seed, step=step, stream=stream)[0].tolist() == expected


@BOTH
@pytest.mark.parametrize("shape", [(3,), (2, 8), (3, 7, 5), (257,)])
def test_the_blocks_in_which_it_is_made_do_not_show(draw: Any, shape: tuple[int, ...], monkeypatch: Any) -> None:
    """Several samples to a block, a block to a sample, several blocks to one, and a rest."""
    index = torch.tensor([5, 0, 3, 10**12, -1])
    monkeypatch.setattr(noise, "_BLOCK", 2**20)
    whole = draw(index, shape, seed=9, step=4, stream=1)
    for block in (1, 7, 16, 64):
        monkeypatch.setattr(noise, "_BLOCK", block)
        assert torch.allclose(draw(index, shape, seed=9, step=4, stream=1), whole, rtol=1e-6, atol=0), (
            block
        )  # a logarithm's last bit


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor held that any operation made, views apart."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and not out._is_view():
            self.numbers = max(self.numbers, out.numel() if func.overloadpacket is not torch.ops.aten.empty else 0)
        return out


@BOTH
def test_nothing_beside_the_noise_is_as_large_as_the_noise(draw: Any) -> None:
    """What lies in between is made block by block: a batch of it does not fit into a processor's cache."""
    with Largest() as seen:
        assert draw(torch.arange(64), (3, 40, 40), seed=0).shape == (64, 3, 40, 40)
    assert seen.numbers <= noise._BLOCK


# --- distributions


@pytest.mark.parametrize("key", KEYS)
def test_uniform_is_uniform(key: dict[str, int]) -> None:
    value = noise.uniform(INDEX, (1, 20, 20), **key)
    assert value.dtype == torch.float32
    assert 0 <= value.min() <= value.max() < 1
    assert stats.kstest(value.flatten().double().numpy(), "uniform").pvalue > LEAST_P
    steps = (value.double() * 2**24).long()  # the value is a multiple of 2^-24: its last byte must be uniform too
    assert torch.equal(steps.double() / 2**24, value.double())
    for byte in (steps >> 16, (steps >> 8) & 255, steps & 255):
        assert stats.chisquare(byte.flatten().bincount(minlength=256).numpy()).pvalue > LEAST_P


@pytest.mark.parametrize("key", KEYS)
def test_normal_is_normal(key: dict[str, int]) -> None:
    value = noise.normal(INDEX, (1, 20, 20), **key).flatten().double()
    n = len(value)
    assert stats.kstest(value.numpy(), "norm").pvalue > LEAST_P
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):  # each within five standard errors
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)
        assert abs((value**power).mean().item() - moment) < 5 * spread / math.sqrt(n)
    assert value.abs().max() < math.sqrt(-2 * math.log(2**-32))
    assert value.abs().max() > 3.5


@pytest.mark.parametrize("key", KEYS)
def test_neighbours_in_every_part_of_the_key_are_independent(key: dict[str, int]) -> None:
    shape = (1, 20, 20)
    value = noise.uniform(INDEX, shape, **key)
    flat = value.flatten(1)
    assert independent(flat[:, :-1], flat[:, 1:]) > LEAST_P  # pixels
    assert independent(value[:-1], value[1:]) > LEAST_P  # samples
    for part in ("seed", "step", "stream"):
        other = noise.uniform(INDEX, shape, **{**key, part: key.get(part, 0) + 1})
        assert independent(value, other) > LEAST_P
        assert not (value == other).flatten(1).all(1).any()


@pytest.mark.parametrize("key", KEYS)
def test_neighbours_are_uncorrelated_under_the_normal(key: dict[str, int]) -> None:
    value = noise.normal(INDEX, (400,), **key).double()
    for a, b in ((value[:, :-1], value[:, 1:]), (value[:-1], value[1:])):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
        assert abs((a**2 * b**2).mean().item() - 1) < 5 * math.sqrt(8) / math.sqrt(a.numel())


# --- a function of the key


@BOTH
@settings(max_examples=25, deadline=None, derandomize=True)
@given(order=st.permutations(range(8)), kept=st.integers(0, 8))
def test_a_sample_does_not_know_its_batch(draw: Any, order: list[int], kept: int) -> None:
    index = torch.tensor([5, 0, 3, 10**12, 4, -1, 77, 2**62])
    whole = draw(index, (2, 3), seed=9, step=4, stream=1)
    chosen = torch.tensor(order, dtype=torch.int64)[:kept]
    assert torch.equal(draw(index[chosen], (2, 3), seed=9, step=4, stream=1), whole[chosen])


@BOTH
def test_the_same_sample_twice_has_the_same_noise(draw: Any) -> None:
    a, b, c = draw(torch.tensor([3, 3, 4]), (5,), seed=0)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@BOTH
def test_the_parts_of_the_key_are_not_exchangeable(draw: Any) -> None:
    keys = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    values = {tuple(draw(torch.tensor([d]), (2,), seed=a, step=b, stream=c)[0].tolist()) for a, b, c, d in keys}
    assert len(values) == len(keys)


def test_a_seed_counts_modulo_two_to_the_64() -> None:
    for seed in (5, 2**64 + 5, 5 - 2**64):
        assert torch.equal(noise.uniform(INDEX, (3,), seed=seed), noise.uniform(INDEX, (3,), seed=5))


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4, 5)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_shapes(draw: Any, shape: tuple[int, ...], n: int) -> None:
    value = draw(torch.arange(n), shape, seed=0)
    assert value.shape == (n, *shape)
    assert value.dtype == torch.float32


@BOTH
def test_nobody_elses_random_state_moves(draw: Any) -> None:  # T6
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    draw(INDEX, (8,), seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


@BOTH
def test_nobody_elses_random_state_matters(draw: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = draw(INDEX, (8,), seed=3)
        torch.manual_seed(2)
        assert torch.equal(draw(INDEX, (8,), seed=3), first)
