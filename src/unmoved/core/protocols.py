"""The whole language of the package: what flows (Batch, Split) and what acts (Attack, Term, ParameterDefense).

An attack maximises a term over the input. Training minimises a sum of terms over the weights.
A defense decides at which weights the gradient is taken. Everything else is files.

Shapes: ``Image`` (B, C, H, W) float in [0, 1]; ``Label`` and ``Index`` (B,) int64; ``Logits`` (B, K);
``PerSample`` (B,). A model is any ``nn.Module`` that maps Image to Logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core.errors import UnmovedError
from unmoved.core.preconditions import require_attack, require_callable, require_term

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MatplotlibFigure

    from unmoved.core.views import Views
    from unmoved.runs.folder import Run

Image: TypeAlias = Tensor
Label: TypeAlias = Tensor
Index: TypeAlias = Tensor
Logits: TypeAlias = Tensor
PerSample: TypeAlias = Tensor
Table: TypeAlias = "pd.DataFrame"
Figure: TypeAlias = "MatplotlibFigure"


@dataclass(frozen=True, eq=False)
class Batch:
    """Images with labels and identities.

    Attributes:
        x: (B, C, H, W) float, images in [0, 1].
        y: (B,) int64, labels.
        index: (B,) int64, a sample's identity for ever; 0..B-1 unless given. Keys all noise and per-sample memory.
        step: the optimizer step, set by the training loop; with ``index`` it keys the noise.
        target: (B,) int64, the class that a targeted attack aims at; None where nobody aims.
        known: gives an attack the clean logits (B, K) of these very images, or None; see `sharing.Clean`.

    Raises:
        UnmovedError: images or labels of the wrong shape or type.
    """

    x: Image
    y: Label
    index: Index = field(default=None)  # type: ignore[assignment]
    step: int = 0
    target: Label | None = None
    known: Callable[[Image], Logits | None] | None = None

    def __post_init__(self) -> None:
        for name, value in (("x", self.x), ("y", self.y), ("index", self.index)):
            if not isinstance(value, Tensor) and not (name == "index" and value is None):
                raise UnmovedError(f"Batch.{name}: expected a tensor, came {type(value).__name__}; use torch.as_tensor")
        if self.index is None and self.y.ndim:
            object.__setattr__(self, "index", torch.arange(len(self.y), device=self.y.device))
        if not self.x.is_floating_point() or self.x.ndim < 2:
            raise UnmovedError(
                f"Batch.x: expected float images (B, C, H, W) in [0, 1], came {self.x.dtype} {tuple(self.x.shape)}; "
                "convert with images.float() / 255"
            )
        if self.y.dtype != torch.int64 or self.y.ndim != 1 or len(self.y) != len(self.x):
            raise UnmovedError(
                f"Batch.y: expected int64 labels of shape ({len(self.x)},), "
                f"came {self.y.dtype} {tuple(self.y.shape)}; convert with labels.long()"
            )
        if self.index.dtype != torch.int64 or self.index.shape != self.y.shape:
            raise UnmovedError(
                f"Batch.index: expected int64 of shape {tuple(self.y.shape)}, "
                f"came {self.index.dtype} {tuple(self.index.shape)}"
            )
        if self.target is not None and (self.target.dtype != torch.int64 or self.target.shape != self.y.shape):
            raise UnmovedError(
                f"Batch.target: expected int64 classes of shape {tuple(self.y.shape)}, "
                f"came {self.target.dtype} {tuple(self.target.shape)}"
            )

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Batch:
        """The same samples on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def take(self, which: Tensor) -> Batch:
        """The samples chosen by a mask or by positions; identities and step stay."""
        return self._map(lambda tensor: tensor[which])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        target = None if self.target is None else change(self.target)
        return replace(self, x=change(self.x), y=change(self.y), index=change(self.index), target=target)


@runtime_checkable
class Attack(Protocol):
    """Proposes a perturbed image for each sample. Pure: nothing of the caller changes, not even its random state."""

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...


@runtime_checkable
class MinimumNormAttack(Protocol):
    """An attack that seeks the nearest misclassified image and may leave the ball, which is then no success."""

    minimum_norm: bool

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...


@runtime_checkable
class Ensemble(Protocol):
    """Attacks that run in turn, each from the clean image, on the samples that those before it left robust."""

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...

    def parts(self, num_classes: int) -> Mapping[str, Attack]:
        """The attacks by name, in their order."""
        ...

    def notes(self, num_classes: int) -> list[str]:
        """What was adapted to this many classes, in sentences; empty where nothing was."""
        ...


@runtime_checkable
class StatefulAttack(Protocol):
    """An attack with per-sample memory: calling reads it, ``update`` writes it, once per optimizer step."""

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...

    def update(self, model: nn.Module, batch: Batch, x_adv: Image) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@runtime_checkable
class Term(Protocol):
    """One number per sample; larger is worse for the defender. Pure."""

    def __call__(self, views: Views) -> PerSample: ...


class StatefulTerm(nn.Module):
    """A term that learns (its parameters join the optimizer) or remembers (its buffers join the checkpoint).

    ``forward`` reads; ``update`` writes, once per optimizer step, with the views of the uncorrupted pass.
    """

    def forward(self, views: Views) -> PerSample:
        raise NotImplementedError

    def update(self, views: Views) -> None:
        """Learn from one batch without a gradient; nothing by default."""

    def report(self) -> dict[str, Any]:
        """What the log of an epoch should say of it (numbers and lists), asked for once after each epoch."""
        return {}


@runtime_checkable
class ParameterDefense(Protocol):
    """Decides at which weights the gradient is taken; owns ``zero_grad``, every backward and the step.

    ``backward()`` computes the mean loss at the current weights, adds its gradient to ``.grad`` and returns it.
    The defense returns the loss of the uncorrupted pass.
    """

    def __call__(self, model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """What a training step does: the attack makes x_adv, the objective is minimised, the defense takes the step.

    ``attack=None`` trains on clean images (the adversarial view is then the clean one); ``defense=None`` is `Plain`.

    Raises:
        UnmovedError: a class in place of what it makes, or one kind of component in the place of another.
    """

    attack: Attack | None
    objective: Term
    defense: ParameterDefense | None = None

    def __post_init__(self) -> None:
        if self.attack is not None:
            require_attack("Method.attack", self.attack)
        require_term("Method.objective", self.objective)
        if self.defense is not None:
            order = "a defense is one of unmoved.defenses, such as AWP()"
            require_callable("Method.defense", self.defense, "model, optimizer, backward", order)


class Split(Protocol):
    """A part of a data set: yields `Batch`."""

    @property
    def num_classes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        ...

    def __len__(self) -> int: ...

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        """Batches of at most ``size``; shuffled by the seed ``shuffle`` when it is given."""
        ...


class Analysis(Protocol):
    """Runs (and the data they are judged on) -> one tidy table."""

    def __call__(self, runs: Sequence[Run], split: Split) -> Table: ...
