"""Call an attack of torchattacks, foolbox, ART or adv-lib as one of ours is called."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unmoved.attacks.gradients import require_attackable
from unmoved.core.batch import Batch, Image, Label
from unmoved.core.errors import UnmovedError, did_you_mean, keep_field, require_choice, require_flag, require_seed
from unmoved.core.protocols import ATTACK_KINDS, GRADIENTS
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import eval_logits
from unmoved.interop.isolation import FloatLogits, isolated, key_of, usable
from unmoved.interop.libraries import FOOLBOX, LIBRARIES, found, kind_in, load
from unmoved.interop.to_libraries import art_classifier, foolbox_model

_ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}
_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_BALL = ("eps", "max_epsilon", "\u03b5")  # what libraries call the radius


@dataclass(frozen=True)
class LibraryAttack:
    """An attack of another library, which takes (model, batch) as ours do.

    It is called with logits in float32, the model in evaluation mode and random generators seeded by (seed, step,
    identities of the batch), so that a call on the same batch gives the same images. Modes, buffers, gradients and
    random states are restored. Its noise is drawn by the batch, not by the sample: another batch size draws anew. Calls
    from several threads wait for each other.

    Args:
        library: ``"torchattacks"``, ``"foolbox"``, ``"art"`` or ``"adv_lib"``.
        attack: its name in the library, or the class, function or object itself.
        threat: the ball; its radius and norm are handed to the attack where it takes them.
        settings: the attack's other arguments.
        seed: of the random generators.
        kind: one of `protocols.ATTACK_KINDS`.
        minimum_norm: whether it seeks the nearest misclassified image and may leave the ball.

    Raises:
        UnmovedError: a library that is missing, an attack or a setting that it does not have, an attack of another
            norm, images in other bounds than [0, 1].
    """

    library: str
    attack: str | Callable[..., Any]
    threat: ThreatModel
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    kind: str = GRADIENTS
    minimum_norm: bool = False

    def __post_init__(self) -> None:
        require_choice("LibraryAttack.library", self.library, LIBRARIES)
        require_threat("LibraryAttack.threat", self.threat)
        keep_field(self, "LibraryAttack.seed", require_seed)
        require_choice("LibraryAttack.kind", self.kind, ATTACK_KINDS)
        require_flag("LibraryAttack.minimum_norm", self.minimum_norm)
        if self.threat.bounds != (0.0, 1.0):
            raise UnmovedError(f"{self._label}: expected a threat model on images in [0, 1], came {self.threat.bounds}")
        _require_settings(self._label, _made(self.library, self.attack), self.settings)
        _require_norm(self._label, _made(self.library, self.attack), self.threat, self.minimum_norm)

    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        require_attackable(model, batch, self.threat)
        if len(batch) == 0 or (self.threat.radius == 0 and not self.minimum_norm):
            return usable(batch.x)
        key = key_of(self.seed, batch)
        with isolated(model, key):
            x, y = usable(batch.x).clamp(0, 1), usable(batch.y)
            floating = FloatLogits(model, x.dtype).eval()
            call = _Call(self, floating, x, y, key, eval_logits(model, x[:1]).shape[1])
            proposal = torch.as_tensor(_CALLS[self.library](call))
        return proposal.detach().to(x)

    @property
    def _label(self) -> str:
        name = self.attack if isinstance(self.attack, str) else getattr(self.attack, "__name__", type(self.attack))
        return f"{LIBRARIES[self.library].package} {name}"


def from_torchattacks(
    attack: str | Callable[..., Any],
    threat: ThreatModel,
    *,
    seed: int = 0,
    kind: str | None = None,
    minimum_norm: bool | None = None,
    **settings: Any,
) -> LibraryAttack:
    """Return an attack of torchattacks as one of ours: ``from_torchattacks("PGD", threat, alpha=0.01, steps=40)``.

    Args:
        attack: its name, its class, or a function of the model that makes it.
        threat: the ball; ``eps``, ``norm``, ``seed`` and ``n_classes`` are filled in where the attack takes them.
        seed: of the random generators.
        kind, minimum_norm: what the attack is; by default what is known of it.
        **settings: its other arguments.

    Raises:
        UnmovedError: as `LibraryAttack`.
    """
    return _as_ours("torchattacks", attack, threat, settings, seed, kind, minimum_norm)


def from_foolbox(
    attack: Any,
    threat: ThreatModel,
    *,
    seed: int = 0,
    kind: str | None = None,
    minimum_norm: bool | None = None,
    **settings: Any,
) -> LibraryAttack:
    """Return an attack of foolbox as one of ours: ``from_foolbox("LinfPGD", threat, steps=40)``.

    Args:
        attack: its name, its class, or an object of it.
        threat: the ball; its radius is the attack's ``epsilons``. A `MinimizationAttack` has none: it is asked for the
            nearest image.
        seed, kind, minimum_norm: as `from_torchattacks`.
        **settings: arguments of the class; none with an object.

    Raises:
        UnmovedError: as `LibraryAttack`.
    """
    return _as_ours("foolbox", attack, threat, settings, seed, kind, minimum_norm)


def from_art(
    attack: str | Callable[..., Any],
    threat: ThreatModel,
    *,
    seed: int = 0,
    kind: str | None = None,
    minimum_norm: bool | None = None,
    **settings: Any,
) -> LibraryAttack:
    """Return an evasion attack of ART as one of ours: ``from_art("ProjectedGradientDescent", threat, eps_step=0.01)``.

    Args:
        attack: its name in ``art.attacks.evasion``, its class, or a function of the classifier that makes it.
        threat: the ball; ``eps``, ``norm``, ``batch_size`` and ``verbose=False`` are filled in where it takes them.
        seed, kind, minimum_norm, **settings: as `from_torchattacks`.

    Raises:
        UnmovedError: as `LibraryAttack`.
    """
    return _as_ours("art", attack, threat, settings, seed, kind, minimum_norm)


def from_adv_lib(
    attack: str | Callable[..., Any],
    threat: ThreatModel,
    *,
    seed: int = 0,
    kind: str | None = None,
    minimum_norm: bool | None = None,
    **settings: Any,
) -> LibraryAttack:
    """Return an attack of adv-lib as one of ours: ``from_adv_lib("apgd", threat, loss_function="ce")``.

    Args:
        attack: its name in ``adv_lib.attacks``, or a function of (model, inputs, labels).
        threat: the ball; the radius (``eps`` or its Greek letter) and ``norm`` are filled in where it takes them.
        seed, kind, minimum_norm, **settings: as `from_torchattacks`.

    Raises:
        UnmovedError: as `LibraryAttack`.
    """
    return _as_ours("adv_lib", attack, threat, settings, seed, kind, minimum_norm)


def _as_ours(
    library: str,
    attack: Any,
    threat: ThreatModel,
    settings: Mapping[str, Any],
    seed: int,
    kind: str | None,
    minimum_norm: bool | None,
) -> LibraryAttack:
    made = _made(library, attack)
    kind = kind_in(LIBRARIES[library], made) if kind is None else kind
    minimum_norm = _is_minimum_norm(library, made) if minimum_norm is None else minimum_norm
    return LibraryAttack(library, attack, threat, dict(settings), seed, kind, minimum_norm)


def _made(library: str, attack: Any) -> Any:
    """Return the class, function or object that an attack's name stands for."""
    if isinstance(attack, str):
        return found(LIBRARIES[library], attack)
    if not callable(attack):
        raise UnmovedError(f"interop: expected the name, class or function of an attack, came {attack!r:.80}")
    return attack


def _is_of_library(made: Any) -> bool:
    """Return whether something is a library's own, and not a function that a user has written around it."""
    return isinstance(made, type) or str(getattr(made, "__module__", "")).partition(".")[0] in LIBRARIES


def _is_minimum_norm(library: str, made: Any) -> bool:
    """Return whether an attack has no radius to keep to; a user's own function is taken to keep to one."""
    if library == "foolbox":
        base = load("foolbox.attacks.base", FOOLBOX.package).MinimizationAttack
        return issubclass(made if isinstance(made, type) else type(made), base)
    return _is_of_library(made) and not _radius_names(library, made)


def _radius_names(library: str, made: Any) -> list[str]:
    """Return the attack's parameters that are the radius of its ball; in adv-lib, a radius with a default is not."""
    parameters = _parameters(made)
    names = [name for name in _BALL if name in parameters]
    return [n for n in names if library != "adv_lib" or parameters[n].default is inspect.Parameter.empty]


def _parameters(made: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(made).parameters
    except (TypeError, ValueError):
        return {}


def _require_settings(label: str, made: Any, settings: Mapping[str, Any]) -> None:
    """Raise `UnmovedError` for a setting that the attack does not take."""
    parameters = _parameters(made)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in settings:
        if name not in parameters:
            raise UnmovedError(f"{label}: it takes no {name!r}" + did_you_mean(name, parameters))


def _require_norm(label: str, made: Any, threat: ThreatModel, minimum_norm: bool) -> None:
    """Raise `UnmovedError` for an attack that is made for a ball of another norm."""
    distance = getattr(made, "distance", None)
    if minimum_norm or not _is_of_library(made) and distance is None:
        return
    if distance is not None:  # foolbox's
        own = next((norm for norm, order in _ORDERS.items() if order == getattr(distance, "p", None)), threat.norm)
    elif "norm" in _parameters(made):
        return
    else:
        own = "l2" if getattr(made, "__name__", "").endswith("L2") else "linf"
    if own != threat.norm:
        raise UnmovedError(f"{label}: it is an attack in {own}, and the threat model is in {threat.norm}")


@dataclass(frozen=True)
class _Call:
    """One call of a library's attack: the model, images, labels, and what may be filled in."""

    of: LibraryAttack
    model: nn.Module
    x: Image
    y: Label
    seed: int
    num_classes: int

    @property
    def made(self) -> Any:
        return _made(self.of.library, self.of.attack)

    def settings(self, **offered: Any) -> dict[str, Any]:
        """Return the attack's settings, and what it takes of the radius and of ``offered``."""
        radius = dict.fromkeys(_radius_names(self.of.library, self.made), self.of.threat.radius)
        wanted = _parameters(self.made)
        return {name: value for name, value in {**offered, **radius}.items() if name in wanted} | dict(self.of.settings)


def _call_torchattacks(call: _Call) -> Tensor:
    norm = _NAMES[call.of.threat.norm]
    attack = call.made(call.model, **call.settings(norm=norm, seed=call.seed, n_classes=call.num_classes))
    x_adv: Tensor = attack(call.x, call.y)
    return x_adv


def _call_foolbox(call: _Call) -> Tensor:
    attack = call.made(**call.of.settings) if isinstance(call.made, type) else call.made
    nearest = call.of.minimum_norm
    epsilons = None if nearest else call.of.threat.radius
    raw, clipped, _ = attack(foolbox_model(call.model), call.x, call.y, epsilons=epsilons)
    x_adv: Tensor = raw if nearest else clipped
    return x_adv


def _call_art(call: _Call) -> Any:
    classifier = art_classifier(call.model, tuple(call.x.shape[1:]), call.num_classes)
    norm = _ORDERS[call.of.threat.norm]
    attack = call.made(classifier, **call.settings(norm=norm, batch_size=len(call.x), verbose=False))
    return attack.generate(x=call.x.cpu().numpy(), y=call.y.cpu().numpy())


def _call_adv_lib(call: _Call) -> Tensor:
    settings = call.settings(norm=float(_ORDERS[call.of.threat.norm]))
    x_adv: Tensor = call.made(call.model, call.x, call.y, **settings)
    return x_adv


_CALLS: dict[str, Callable[[_Call], Any]] = {
    "torchattacks": _call_torchattacks,
    "foolbox": _call_foolbox,
    "art": _call_art,
    "adv_lib": _call_adv_lib,
}
