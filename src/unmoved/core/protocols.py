"""Define the protocols of attacks, terms, defenses and data splits, and the training method made of them.

An attack maximises a term over the input. Training minimises a sum of terms over the weights.
A defense decides at which weights the gradient is taken. Everything else is files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core.batch import Batch, Image, PerSample
from unmoved.core.errors import UnmovedError, require_choice, require_flag, require_whole
from unmoved.core.preconditions import require_attack, require_callable, require_term

if TYPE_CHECKING:
    from unmoved.core.views import Views

GRADIENTS, FIXED_STEP, QUERIES, TRANSFER = "gradients", "fixed-step gradients", "queries", "transfer"
ATTACK_KINDS = (GRADIENTS, FIXED_STEP, QUERIES, TRANSFER)


@runtime_checkable
class Attack(Protocol):
    """Proposes a perturbed image for each sample. Pure: nothing of the caller changes, not even its random state."""

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...


@runtime_checkable
class MinimumNormAttack(Protocol):
    """An attack that seeks the nearest misclassified image; one outside the ball does not count as a success."""

    minimum_norm: bool

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...


@runtime_checkable
class Ensemble(Protocol):
    """Attacks that run in turn, each from the clean image, on the samples that those before it left robust."""

    def __call__(self, model: nn.Module, batch: Batch) -> Image: ...

    def parts(self, num_classes: int) -> Mapping[str, Attack]:
        """Return the attacks by name, in their order."""
        ...

    def notes(self, num_classes: int) -> list[str]:
        """Return sentences about what was adapted to this number of classes; empty if nothing was."""
        ...


class AttackDeclarations(Protocol):
    """Attributes by which an attack declares its properties; each is optional and has the default given here.

    Each is read by one function: `kind_of`, `draws_of`, `is_lockstep`, `is_minimum_norm`, `leaves_ball`,
    `takes_mixed`.

    Attributes:
        kind: what it uses of the model: ``"gradients"`` (default), ``"fixed-step gradients"`` (like PGD, whose steps do
            not adapt to progress, so that gradient masking fools it first), ``"queries"`` (outputs only) or
            ``"transfer"`` (nothing: the images are found on another model).
        draws: forward passes whose mean logits decide its success; 1 (default) unless it attacks a randomised model.
        lockstep: whether the number of passes of a call is the same for all samples, so that processes with shares of
            one batch meet in every pass; False (default) if samples that are done are left out.
        minimum_norm: whether it seeks the nearest misclassified image, of which one outside the ball does not count as
            a success; False (default) if every proposal lies in the ball.
        leaves_ball: whether it leaves the ball by design, so that it can be used in training but not in evaluation;
            False by default.
        takes_mixed: whether it also attacks images mixed from two (`data.CutMix`), since it uses labels in its loss
            only; False (default) if it compares predictions with one label or remembers each image.
    """

    kind: str
    draws: int
    lockstep: bool
    minimum_norm: bool
    leaves_ball: bool
    takes_mixed: bool


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


class TermDeclarations(Protocol):
    """Attributes by which a term declares its properties; read by `couples_samples`.

    Attributes:
        couples_samples: whether its value for one sample depends on the other samples of the batch; False by default.
    """

    couples_samples: bool


class StatefulTerm(nn.Module):
    """A term that learns (its parameters join the optimizer) or remembers (its buffers join the checkpoint).

    ``forward`` reads; ``update`` writes, once per optimizer step, with the views of the uncorrupted pass.
    """

    def forward(self, views: Views) -> PerSample:
        raise NotImplementedError

    def update(self, views: Views) -> None:
        """Learn from one batch without a gradient; nothing by default."""

    def report(self) -> Mapping[str, object]:
        """Return numbers and lists for the log; called once after each epoch."""
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
        UnmovedError: a class in place of an instance, or a component of the wrong kind.
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


def kind_of(attack: object) -> str:
    """Return the kind that an attack, or its class, declares: one of `ATTACK_KINDS`.

    Raises:
        UnmovedError: it declares another.
    """
    kind = getattr(attack, "kind", GRADIENTS)
    require_choice(f"{_name(attack)}.kind", kind, ATTACK_KINDS)
    return str(kind)


def draws_of(attack: Attack) -> int:
    """Return the number of forward passes whose mean logits decide an attack's success.

    Raises:
        UnmovedError: it declares something other than a whole number >= 1.
    """
    return require_whole(f"{_name(attack)}.draws", getattr(attack, "draws", 1), at_least=1)


def is_lockstep(attack: Attack) -> bool:
    """Return whether an attack declares that its number of passes is the same for all samples.

    Raises:
        UnmovedError: it declares neither True nor False.
    """
    return require_flag(f"{_name(attack)}.lockstep", getattr(attack, "lockstep", False))


def is_minimum_norm(attack: Attack) -> bool:
    """Return whether an attack declares that it may leave the ball.

    Raises:
        UnmovedError: it declares neither True nor False.
    """
    return require_flag(f"{_name(attack)}.minimum_norm", getattr(attack, "minimum_norm", False))


def leaves_ball(attack: Attack) -> bool:
    """Return whether an attack declares that it leaves the ball by design, so that it is for training alone.

    Raises:
        UnmovedError: it declares neither True nor False.
    """
    return require_flag(f"{_name(attack)}.leaves_ball", getattr(attack, "leaves_ball", False))


def takes_mixed(attack: object) -> bool:
    """Return whether an attack declares that it attacks images with two labels.

    Raises:
        UnmovedError: it declares neither True nor False.
    """
    return require_flag(f"{_name(attack)}.takes_mixed", getattr(attack, "takes_mixed", False))


def require_in_ball(name: str, attack: Attack) -> None:
    """Raise `UnmovedError` if an attack that is to judge a model leaves the ball by design."""
    if leaves_ball(attack):
        raise UnmovedError(
            f"{name}: expected an attack that stays in the ball, came {_name(attack)}, which leaves it by design: "
            "it is for training alone; judge by PGD, APGD or AutoAttack"
        )


def couples_samples(term: object) -> bool:
    """Return whether a term declares that its value for one sample depends on the others.

    Raises:
        UnmovedError: it declares neither True nor False.
    """
    return require_flag(f"{_name(term)}.couples_samples", getattr(term, "couples_samples", False))


def _name(part: object) -> str:
    return part.__name__ if isinstance(part, type) else type(part).__name__


def parts_of(name: str, attack: Attack, num_classes: int) -> dict[str, Attack]:
    """Return the parts of an ensemble by name, or the attack itself under its own name."""
    return dict(attack.parts(num_classes)) if isinstance(attack, Ensemble) else {name: attack}


def kinds_of(name: str, attack: Attack, num_classes: int) -> dict[str, str]:
    """Return the kind of each part of an attack, under the names of `parts_of`."""
    return {part: kind_of(own) for part, own in parts_of(name, attack, num_classes).items()}


def notes_of(attack: Attack, num_classes: int) -> list[str]:
    """Return sentences about what an ensemble adapted to this number of classes; empty for any other attack."""
    return attack.notes(num_classes) if isinstance(attack, Ensemble) else []


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
