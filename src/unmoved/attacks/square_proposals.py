"""Propose changes of square windows for the Square attack: flips in linf, mass moved between windows in l2 and l1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmoved.core import noise
from unmoved.core.batch import Batch, Image
from unmoved.core.threat import ThreatModel


@dataclass(frozen=True)
class Draws:
    """Draw the random numbers of a block of iterations, for each sample its own.

    Attributes:
        side: of the windows.
        length: number of iterations.
        seed, stream: of `unmoved.noise`; the stream names the first iteration.
    """

    side: int
    length: int
    seed: int
    stream: int

    def uniform(self, batch: Batch, count: int) -> Tensor:
        """Draw (length, B, count) float64 in [0, 1); the first iterations' numbers do not depend on the length."""
        shape = (self.length, count)
        draw = noise.uniform(batch.index, shape, seed=self.seed, step=batch.step, stream=self.stream)
        # float64: in float32 the product with a count of places may round up to the count itself.
        return draw.double().transpose(0, 1).contiguous()


class Flips:
    """Propose in linf: each pixel is at an edge of ball or box, and a window goes to one edge, by channel."""

    def __init__(self, threat: ThreatModel, batch: Batch, draws: Draws) -> None:
        draw = draws.uniform(batch, 2 + batch.x.shape[1])
        # Pixels are numbered along the flattened image; the upper edges follow the lower ones.
        self.corner, self.inside = _window(draw[..., 0], draw[..., 1], batch.x, draws.side)
        self.top, self.left = self.corner[..., 0] // batch.x.shape[3], self.corner[..., 0] % batch.x.shape[3]
        self.edges = torch.cat([edge.flatten(1) for edge in _edges(threat, batch.x)], dim=1)
        self.shift = (draw[..., 2:] < 0.5).long().repeat_interleave(draws.side**2, dim=2) * batch.x[0].numel()

    def __call__(self, x_best: Image, rows: Tensor, turns: Tensor) -> tuple[Tensor, Image]:
        """Make the proposals of these iterations (m,) for these samples (m,).

        Returns:
            (n,) int64, which of them change their sample's ``x_best``; their images (n, C, H, W).
        """
        pixels = self.corner[turns, rows] + self.inside
        edge = self.edges[rows[:, None], pixels + self.shift[turns, rows]]
        differs = (edge != x_best.flatten(1)[rows[:, None], pixels]).view(torch.uint8).amax(1).bool()
        which = torch.nonzero(differs).flatten()
        x_new = x_best.index_select(0, rows.index_select(0, which))
        x_new.flatten(1).scatter_(1, pixels.index_select(0, which), edge.index_select(0, which))
        return which, x_new

    def place(self, rows: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first row and column of the windows of these proposals, two (m,) int64."""
        return self.top[turns, rows], self.left[turns, rows]


def stripes(threat: ThreatModel, batch: Batch, seed: int, stream: int) -> Image:
    """Draw the start in linf: a sign for each column and channel, (B, C, H, W)."""
    _, channels, _, width = batch.x.shape
    draw = noise.uniform(batch.index, (channels, 1, width), seed=seed, step=batch.step, stream=stream)
    low, high = _edges(threat, batch.x)
    return torch.where(draw < 0.5, high, low)


class Tiles:
    """Propose in l2 and l1: put the mass of two windows into the first, on a new tile, and scale back to the ball."""

    def __init__(self, threat: ThreatModel, batch: Batch, draws: Draws) -> None:
        self.threat, self.x, self.order = threat, batch.x, _order(threat)
        draw = draws.uniform(batch, 5 + batch.x.shape[1])
        self.corner, self.inside = _window(draw[..., 0], draw[..., 1], batch.x, draws.side)
        self.other, _ = _window(draw[..., 2], draw[..., 3], batch.x, draws.side)
        tile = _both_ways(draws.side, self.order).to(batch.x).flatten(1)[(draw[..., 4] < 0.5).long()]
        self.tile = tile[:, :, None] * ((draw[..., 5:] < 0.5).to(batch.x.dtype) * 2 - 1)[..., None]

    def __call__(self, x_best: Image, rows: Tensor, turns: Tensor) -> tuple[Tensor, Image]:
        """Make the proposals of these iterations (m,) for these samples (m,): all positions (m,), and the images."""
        eps, (count, channels), x = self.threat.radius, (len(rows), x_best.shape[1]), self.x.index_select(0, rows)
        delta = (x_best.index_select(0, rows) - x).flatten(1)
        whole = self._length(delta)
        pixels, others = self.corner[turns, rows] + self.inside, self.other[turns, rows] + self.inside
        first = delta.gather(1, pixels)
        delta.scatter_(1, pixels, 0)
        second = delta.gather(1, others)  # without what both windows share
        delta.scatter_(1, others, 0)
        first, second = (window.reshape(count, channels, -1) for window in (first, second))
        held = self._length(first)
        new = self.tile[turns, rows] + first / (held + 1e-12)
        if self.order == 2:
            spare = (eps**2 - whole**2).clamp_min(0)[..., None] / channels
            mass = (spare + held**2 + self._length(second) ** 2).sqrt()
        else:
            mass = (eps - whole).clamp_min(0)[..., None] + (held + self._length(second)) * channels
        delta.scatter_(1, pixels, (new * (mass / (self._length(new) + 1e-12))).flatten(1))
        return torch.arange(count, device=x.device), _fill(self.threat, x, delta.reshape(x.shape))

    def place(self, rows: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the whole image begins, which is what changes: two (m,) int64."""
        return torch.zeros_like(rows), torch.zeros_like(rows)

    def _length(self, v: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(v, ord=self.order, dim=-1, keepdim=True)
        return norms


def mosaic(threat: ThreatModel, batch: Batch, seed: int, stream: int) -> Image:
    """Draw the start in l2 and l1: five or more tiles a side, each with its direction and sign, (B, C, H, W).

    In l1, where it is projected, each tile's norm is the width of the bounds.
    """
    count, channels, height, width = batch.x.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    shape = (down, across, 1 + channels)
    draw = noise.uniform(batch.index, shape, seed=seed, step=batch.step, stream=stream)
    tile = _both_ways(side, _order(threat)).to(batch.x)[(draw[..., 0] < 0.5).long()]
    sign = (draw[..., 1:] < 0.5).to(batch.x.dtype) * 2 - 1
    tiles = torch.einsum("byxij,byxc->bcyixj", tile, sign).reshape(count, channels, down * side, across * side)
    delta = torch.zeros_like(batch.x)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta[:, :, top : top + down * side, left : left + across * side] = tiles
    low, high = threat.bounds
    return _fill(threat, batch.x, (high - low) * delta)


def _fill(threat: ThreatModel, x: Image, delta: Tensor) -> Image:
    """Scale to length eps and clip (l2), or return the nearest point of the ball (l1)."""
    if threat.norm == "l1":
        return threat.project(x + delta, x)
    length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(x, delta, threat.radius / length.clamp_min(1e-12)).clamp_(*threat.bounds)


def _both_ways(side: int, order: float) -> Tensor:
    """Make a tile of norm 1, a hump over one of the other sign, and the same on its side, (2, side, side) float64."""
    half = side // 2
    tile = torch.cat([_hump(half, side, order), -_hump(side - half, side, order)])
    tile = tile / torch.linalg.vector_norm(tile, ord=order)
    return torch.stack([tile, tile.T])


def _hump(height: int, width: int, order: float) -> Tensor:
    """Make ``sum_{k >= r} (k + 1)^-q``, r the Chebyshev distance from the middle, q = 2 (l2) or 4 (l1), of norm 1."""
    if height == 0:
        return torch.zeros(0, width, dtype=torch.float64)
    steps = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-2.0 if order == 2 else -4.0)
    tail = steps.flip(0).cumsum(0).flip(0)
    down, across = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    hump = tail[torch.maximum(down.abs()[:, None], across.abs())]
    norm: Tensor = torch.linalg.vector_norm(hump, ord=order)
    return hump / norm


def _order(threat: ThreatModel) -> float:
    return 2.0 if threat.norm == "l2" else 1.0


def _edges(threat: ThreatModel, x: Image) -> tuple[Image, Image]:
    return (x - threat.radius).clamp(*threat.bounds), (x + threat.radius).clamp(*threat.bounds)


def _window(down: Tensor, across: Tensor, x: Image, side: int) -> tuple[Tensor, Tensor]:
    """Place windows, as pixels of the flattened image: corner (length, B, 1) + inside (C side side)."""
    channels, height, width = x.shape[1:]
    corner = (down * (height - side + 1)).long() * width + (across * (width - side + 1)).long()
    along = torch.arange(side, device=x.device)
    inside = (torch.arange(channels, device=x.device)[:, None, None] * height + along[:, None]) * width + along
    return corner[..., None], inside.flatten()
