"""Which inputs an attacker may choose. The same verbs as `unmoved.weights` has for weights: steepest, project."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmoved import noise
from unmoved.errors import UnmovedError, require_choice
from unmoved.protocols import Batch, Image, PerSample
from unmoved.schedule import Ramp, number, require_ramp

NORMS = ("linf", "l2")


def _flat_norm(v: Tensor) -> Tensor:
    """The l2 norm of each sample, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1).reshape(-1, *[1] * (v.ndim - 1))


@dataclass(frozen=True)
class ThreatModel:
    """The ball ``{x' : ||x' - x||_norm <= eps}`` intersected with the box of valid images.

    Args:
        norm: ``"linf"`` or ``"l2"``, over all pixels and channels of one image.
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
        require_ramp("threat.eps", self.eps, at_least=0)
        if not self.bounds[0] < self.bounds[1]:
            raise UnmovedError(f"threat.bounds: expected (smallest, largest) pixel value, came {self.bounds}")
        largest = max(self.eps.start, self.eps.stop) if isinstance(self.eps, Ramp) else self.eps
        if self.norm == "linf" and largest > self.bounds[1] - self.bounds[0]:
            raise UnmovedError(
                f"threat.eps: expected at most {self.bounds[1] - self.bounds[0]:g} for linf on images in "
                f'{list(self.bounds)}, came {largest:g}; if it is in 0..255 units write "{largest:g}/255"'
            )

    @property
    def radius(self) -> float:
        """eps as a number.

        Raises:
            UnmovedError: eps is a `Ramp` that nobody resolved.
        """
        return number("threat.eps", self.eps)

    def start(self, batch: Batch, *, seed: int, stream: int = 0, radius: PerSample | None = None) -> Image:
        """A random point of the ball for each sample, keyed by (seed, stream, step, index): (B, C, H, W).

        linf: uniform in the box of side 2 eps. l2: uniform in the ball (radius ~ U^(1/d)). Then clipped to valid
        images. ``radius`` (B,) replaces eps sample by sample.
        """
        x, eps = batch.x, self._radii(radius, batch.x)
        shape = tuple(x.shape[1:])
        key = {"seed": seed, "step": batch.step}
        if self.norm == "linf":
            delta = noise.uniform(batch.index, shape, stream=2 * stream, **key) * 2 - 1
        else:
            direction = noise.normal(batch.index, shape, stream=2 * stream, **key)
            share = noise.uniform(batch.index, (1,) * len(shape), stream=2 * stream + 1, **key)
            delta = direction / _flat_norm(direction).clamp_min(1e-12) * share ** (1 / max(x[0].numel(), 1))
        return self.project(x + eps * delta.to(x.dtype), x, radius)

    def _radii(self, radius: PerSample | None, x: Image) -> float | Tensor:
        """eps, or a radius per sample shaped to broadcast over images."""
        return self.radius if radius is None else radius.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step that raises the loss most to first order: sign(g) for linf, g / ||g||_2 for l2.

        A zero gradient gives a zero step.
        """
        if self.norm == "linf":
            return gradient.sign()
        # Scaled first: the squares of a confident model's gradient (a margin of 60 makes 1e-26) vanish in float32.
        largest = gradient.flatten(1).abs().amax(1).reshape(-1, *[1] * (gradient.ndim - 1))
        scaled = gradient / torch.where(largest > 0, largest, 1.0)
        return scaled / torch.where(largest > 0, _flat_norm(scaled), 1.0)

    def project(self, x_adv: Image, x: Image, radius: PerSample | None = None) -> Image:
        """The nearest point of the ball around ``x``, then clipped to valid images; ``radius`` as in `start`."""
        eps, delta = self._radii(radius, x), x_adv - x
        if self.norm == "linf":
            delta = delta.clamp(-eps, eps)  # type: ignore[arg-type]  # both tensors or both numbers
        else:
            length = _flat_norm(delta)
            delta = torch.where(length > eps, delta * (eps / length.clamp_min(1e-30)), delta)
        return (x + delta).clamp(*self.bounds)

    def distance(self, x_adv: Image, x: Image) -> PerSample:
        """``||x_adv - x||`` in the norm, (B,), computed in float64."""
        delta = (x_adv.double() - x.double()).flatten(1)
        return torch.linalg.vector_norm(delta, ord=float("inf") if self.norm == "linf" else 2, dim=1)

    @property
    def tolerance(self) -> float:
        """How far float32 rounding may carry a projected point outside: 1e-6 + 1e-5 eps."""
        return 1e-6 + 1e-5 * self.radius

    def check(self, x_adv: Image, x: Image, name: str = "attack") -> None:
        """Raise unless every proposal is finite, in the ball and a valid image.

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
