"""Define which perturbed images an attacker may choose, and the steps and projections within that set.

`unmoved.weights` has the same verbs for corruptions of weights: steepest, project.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from unmoved.core import noise
from unmoved.core.batch import Batch, Image, PerSample, per_image
from unmoved.core.errors import UnmovedError, require_choice, require_number
from unmoved.core.phases import Ramp, number, ramp_field

Part = TypeVar("Part")
NORMS = ("linf", "l2", "l1")
_ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
NEWTON_STEPS = 8
# How far beyond the box, in its widths, an l2 step may push a pixel, so that its square stays small in float32.
BEYOND = 100.0


def _flat_norm(v: Tensor, order: float = 2.0) -> Tensor:
    """Compute the norm of each sample, (B, 1, 1, 1)."""
    return per_image(torch.linalg.vector_norm(v.flatten(1), ord=order, dim=1), v)


def _soft_threshold(size: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """``s_i = clamp(size_i - t, 0, room_i)`` with the smallest t >= 0 for which ``sum_i s_i <= eps``, (B, d).

    The sum falls piecewise linearly in t, so Newton's method is exact once it is on the root's piece. If it does not
    get there soon, every third iteration bisects the bracket instead.
    """
    goal = torch.as_tensor(eps, dtype=size.dtype, device=size.device).reshape(-1, 1)
    t = below = torch.zeros_like(size[:, :1])
    above = size.amax(1, keepdim=True)
    for turn in range(1, 200):
        left = size - t
        kept = torch.minimum(left.clamp_min(0), room)
        excess = kept.sum(1, keepdim=True) - goal
        slope = left.eq_(kept).sum(1, keepdim=True)  # in place: as floats they add up faster than as bools
        # Rounding of the sum and of t may leave it slightly above; the last line below corrects that.
        doubt = 4 * torch.finfo(size.dtype).eps * (goal + slope * t)
        done = torch.where(t == 0, excess <= doubt, excess.abs() <= doubt)
        if done.all():
            break
        below, above = torch.where(excess > 0, t, below), torch.where(excess > 0, above, t)
        newton = t + excess / slope.clamp_min(1)
        safe = (slope > 0) & (newton >= below) & (newton <= above) & (turn < 8 or turn % 3 > 0)
        t = torch.where(done, t, torch.where(safe, newton, (below + above) / 2))
    total = kept.sum(1, keepdim=True)
    return torch.where(total > goal, kept * (goal / total.clamp_min(1e-30)), kept)


def require_threat(name: str, value: object) -> None:
    """Raise `UnmovedError` unless ``value`` is a `ThreatModel`."""
    if not isinstance(value, ThreatModel):
        came = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.80}"
        raise UnmovedError(f'{name}: expected a ThreatModel, such as ThreatModel("linf", 8 / 255), came {came}')


def bounds_of(attack: object) -> tuple[float, float] | None:
    """Return the smallest and largest pixel value that an attack was made for; None if it does not say."""
    threat = getattr(attack, "threat", None)
    return threat.bounds if isinstance(threat, ThreatModel) else None


def with_threat(attack: Part, threat: ThreatModel) -> Part | None:
    """Return a dataclass attack with another threat model; None where it has no field ``threat``."""
    if not dataclasses.is_dataclass(attack) or isinstance(attack, type):
        return None
    has_field = any(field.name == "threat" for field in dataclasses.fields(attack))
    return dataclasses.replace(attack, threat=threat) if has_field else None


def _bounds(bounds: object) -> tuple[float, float]:
    """Convert bounds to plain numbers."""
    ends = list(bounds) if isinstance(bounds, Iterable) and not isinstance(bounds, str) else []
    if len(ends) != 2:
        raise UnmovedError(f"threat.bounds: expected (smallest, largest) pixel value, came {bounds!r:.80}")
    low, high = (require_number("threat.bounds", end) for end in ends)
    if not low < high:
        raise UnmovedError(f"threat.bounds: expected (smallest, largest) pixel value, came {(low, high)}")
    return low, high


def _stretch(size: Tensor, room: Tensor, goal: Tensor) -> Tensor:
    """Find the t >= 0 with ``|| min(t size_i, room_i) ||_2 = goal``, (B, 1), from below.

    The square of the norm is concave and piecewise linear in t^2, so that no step of Newton's method overshoots the
    root, and one step is exact if no room is short. The number of steps is fixed, so that a GPU need not be waited for.
    """
    square = size * size
    ends = (room / size.clamp_min(torch.finfo(size.dtype).tiny)).square_()
    t = torch.zeros_like(goal)
    for _ in range(NEWTON_STEPS):
        slope = (square * (ends > t)).sum(1, keepdim=True)
        missing = (goal * goal - (torch.minimum(ends, t) * square).sum(1, keepdim=True)).clamp_min(0)  # of rounding
        t = t + torch.where(slope > 0, missing / slope.clamp_min(1e-30), 0.0)
    return t.sqrt()


def _largest_first(size: Tensor, room: Tensor, budget: Tensor) -> Tensor:
    """Divide ``budget`` over entries by falling size (a fractional knapsack); ties in order, (B, d).

    Entries that are filled get the whole budget instead of their room; those after the last get nothing.
    """
    order = size.argsort(dim=1, descending=True, stable=True)
    room = room.gather(1, order)
    left = budget - (room.cumsum(1) - room)
    amount = torch.where(left > room, budget, left.clamp_min(0))
    return torch.empty_like(size).scatter_(1, order, amount)


@dataclass(frozen=True)
class ThreatModel:
    """The ball ``{x' : ||x' - x||_norm <= eps}`` intersected with the box of valid images.

    Args:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``, over all pixels and channels of one image.
        eps: the radius, on images in [0, 1].
        bounds: smallest and largest valid pixel value.

    Raises:
        UnmovedError: an unknown norm, a negative eps, or an eps that looks like 0..255 units.
    """

    norm: str
    eps: float | Ramp
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require_choice("threat.norm", self.norm, NORMS)
        ramp_field(self, "threat.eps", at_least=0)
        object.__setattr__(self, "bounds", _bounds(self.bounds))
        largest = max(self.eps.start, self.eps.stop) if isinstance(self.eps, Ramp) else self.eps
        if self.norm == "linf" and largest > self.bounds[1] - self.bounds[0]:
            raise UnmovedError(
                f"threat.eps: expected at most {self.bounds[1] - self.bounds[0]:g} for linf on images in "
                f'{list(self.bounds)}, came {largest:g}; if it is in 0..255 units write "{largest:g}/255"'
            )

    @property
    def radius(self) -> float:
        """Return eps as a number.

        Raises:
            UnmovedError: eps is a `Ramp` that was not resolved.
        """
        return number("threat.eps", self.eps)

    def start(self, batch: Batch, *, seed: int, stream: int = 0, radius: PerSample | None = None) -> Image:
        """Draw a random point of the ball for each sample, keyed by (seed, stream, step, index): (B, C, H, W).

        linf: uniform in the box of side 2 eps. l2 and l1: uniform in the ball (a normal or a Laplace direction, radius
        ~ U^(1/d)). Then clipped to valid images. ``radius`` (B,) replaces eps sample by sample.
        """
        x, eps = batch.x, self._radii(radius, batch.x)
        shape = tuple(x.shape[1:])
        key = {"seed": seed, "step": batch.step}
        if self.norm == "linf":
            delta = noise.uniform(batch.index, shape, stream=2 * stream, **key) * 2 - 1
        else:
            if self.norm == "l2":
                direction = noise.normal(batch.index, shape, stream=2 * stream, **key)
            else:
                # Laplace by its inverse distribution function, from the middles of the 2^24 cells of the draw.
                centred = noise.uniform(batch.index, shape, stream=2 * stream, **key).double() * 2 - (1 - 2.0**-24)
                direction = (-torch.log1p(-centred.abs()) * centred.sign()).float()
            share = noise.uniform(batch.index, (1,) * len(shape), stream=2 * stream + 1, **key)
            length = _flat_norm(direction, _ORDER[self.norm]).clamp_min(1e-12)
            delta = direction / length * share ** (1 / max(x[0].numel(), 1))
        return self.project(x + eps * delta.to(x.dtype), x, radius)

    def _radii(self, radius: PerSample | None, x: Image) -> float | Tensor:
        """Return eps, or a radius per sample, shaped to broadcast over images."""
        return self.radius if radius is None else per_image(radius.to(x.dtype), x)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the unit step that raises the loss most to first order.

        linf: sign(g). l2: g / ||g||_2. l1: the sign of the entry of largest size, the first of them in (C, H, W) order
        where several tie, zero elsewhere. A zero gradient gives a zero step.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l1":
            flat = gradient.flatten(1)
            top = flat.abs().argmax(1, keepdim=True)  # the first of equals, as torch documents
            return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).reshape(gradient.shape)
        # Scaled first: the squares of a confident model's gradient (a margin of 60 makes 1e-26) vanish in float32.
        largest = per_image(gradient.flatten(1).abs().amax(1), gradient)
        scaled = gradient / torch.where(largest > 0, largest, 1.0)
        return scaled / torch.where(largest > 0, _flat_norm(scaled), 1.0)

    def step(self, x_adv: Image, gradient: Tensor, length: float | Tensor) -> Tensor:
        """Return the step from ``x_adv`` that raises the loss most to first order, of this length after clipping.

        linf: ``length sign(g)``. l2: ``t g``, with ``t`` so large that the step has this length after clipping. l1: the
        pixels of largest size first, each as far as the box leaves room, until the length is used up. A pixel at the
        edge of the box is pushed further and uses up no length, so that `project`, which accounts for the box, does
        not pull it back.

        Args:
            length: one, or one per sample that broadcasts over images.
        """
        if self.norm == "linf":
            return length * gradient.sign()
        low, high = self.bounds
        room = torch.where(gradient > 0, high - x_adv, x_adv - low).clamp_min(0).flatten(1)
        # Scaled first: the squares of a confident model's gradient (a margin of 60 makes 1e-26) vanish in float32.
        size = gradient.flatten(1).abs()
        largest = size.amax(1, keepdim=True)
        size = size / torch.where(largest > 0, largest, 1.0)
        goal = torch.as_tensor(length, dtype=size.dtype, device=size.device).reshape(-1, 1).expand(len(size), 1)
        if self.norm == "l1":
            move = _largest_first(size, room, goal)
        else:
            move = (size * _stretch(size, room, goal)).clamp_max(BEYOND * (high - low))
        return gradient.sign() * move.reshape(gradient.shape)

    def ascend(
        self, x_adv: Image, gradient: Tensor, length: float | Tensor, x: Image, radius: PerSample | None = None
    ) -> Image:
        """Return ``project(x_adv + step)``, with the step cut to the length that can be useful.

        l1: at most the radius, since one such step fills the ball. l2: at most the radius and twice ``||x_adv - x||``:
        one step from ``x`` itself then ends where the linearised loss is highest in the ball cut by the box, which the
        projection of a longer step would miss. From other points Madry's and Auto-PGD's steps are shorter anyway.
        """
        if self.norm != "linf":
            most = self._radii(radius, x) + (0.0 if self.norm == "l1" else 2 * _flat_norm(x_adv - x))
            length = torch.minimum(*(torch.as_tensor(size).to(x) for size in (length, most)))
        return self.project(x_adv + self.step(x_adv, gradient, length), x, radius)

    def project(self, x_adv: Image, x: Image, radius: PerSample | None = None) -> Image:
        """Return the nearest point of the ball around ``x`` cut by the box of valid images; ``radius`` as in `start`.

        In l2 and l1 projecting onto the ball and then clipping gives another point (Croce and Hein 2021, "Mind the
        box", section 3): here the other pixels may use what a clipped pixel cannot.
        """
        eps, delta = self._radii(radius, x), x_adv - x
        if self.norm == "l1":
            return self._into_l1(x, delta, eps)
        if self.norm == "l2":
            return (x + delta * self._shrinkage(x, delta, eps)).clamp(*self.bounds)
        delta = delta.clamp(-eps, eps)  # type: ignore[arg-type]  # both tensors or both numbers
        return (x + delta).clamp(*self.bounds)

    def _shrinkage(self, x: Image, delta: Tensor, eps: float | Tensor) -> Tensor:
        """The t in [0, 1] with ``|| clip(x + t delta) - x ||_2 <= eps``, (B, 1, 1, 1)."""
        low, high = self.bounds
        room = torch.where(delta > 0, high - x, x - low).clamp_min(0).flatten(1)
        goal = torch.as_tensor(eps, dtype=x.dtype, device=x.device).reshape(-1, 1).expand(len(x), 1)
        t = _stretch(delta.flatten(1).abs(), room, goal).clamp_max(1.0)
        return per_image(t, x)

    def _into_l1(self, x: Image, delta: Tensor, eps: float | Tensor) -> Image:
        """``x + d``, d minimising ``||d - delta||_2`` over ``||d||_1 <= eps`` and valid images."""
        low, high = self.bounds
        room = torch.where(delta > 0, high - x, x - low).clamp_min(0)
        size = _soft_threshold(delta.abs().flatten(1), room.flatten(1), eps).reshape(x.shape)
        x_adv = (x + size * delta.sign()).clamp(low, high)
        # Rounding adds up over pixels in this norm: where it moved a pixel away from x, take the next number towards x.
        return torch.where((x_adv - x).abs() > size, torch.nextafter(x_adv, x), x_adv)

    def distance(self, x_adv: Image, x: Image) -> PerSample:
        """Compute ``||x_adv - x||`` in the norm, (B,), in float64."""
        return _flat_norm(x_adv.double() - x.double(), _ORDER[self.norm]).flatten()

    @property
    def tolerance(self) -> float:
        """Return how far float32 rounding may carry a projected point outside: 1e-6 + 1e-5 eps."""
        return 1e-6 + 1e-5 * self.radius

    def check(self, x_adv: Image, x: Image, name: str = "attack") -> None:
        """Raise `UnmovedError` unless every proposal is finite, in the ball and a valid image.

        Raises:
            UnmovedError: with the attack's name, the distance and the bound.
        """
        if x_adv.shape != x.shape:
            raise UnmovedError(f"attack {name!r} changed the shape: {tuple(x.shape)} became {tuple(x_adv.shape)}")
        low, high = self.bounds
        inside = (x_adv >= low - 1e-6) & (x_adv <= high + 1e-6)  # false for NaN
        if not inside.all():
            worst = x_adv[~inside].flatten()[0].item()
            raise UnmovedError(f"attack {name!r} left the valid images: pixel {worst:g} outside [{low:g}, {high:g}]")
        worst = self.distance(x_adv, x).max().item() if len(x) else 0.0
        if worst > self.radius + self.tolerance:
            raise UnmovedError(f"attack {name!r} left the threat model: distance {worst:.6g} > eps {self.radius:.6g}")


def eps_text(eps: float) -> str:
    """Return ``8/255`` if eps is no short decimal but a whole number of 255ths, otherwise four digits."""
    whole = round(eps * 255)
    is_short = float(f"{eps:.4g}") == eps
    return f"{whole}/255" if not is_short and abs(eps * 255 - whole) < 1e-6 else f"{eps:.4g}"
