"""Import the libraries of others when they are first used, and find their attacks by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from unmoved.core.errors import UnmovedError, did_you_mean
from unmoved.core.protocols import FIXED_STEP, GRADIENTS, QUERIES


@dataclass(frozen=True)
class Library:
    """What is known of a library before it is imported.

    Attributes:
        module: the name that Python imports.
        attacks: the module in which its attacks are found by name.
        package: the name that pip installs.
        base: the class of its attacks, ``module:Name``; empty where they are functions.
        queries: the attacks that use outputs alone.
        fixed_step: words in the names of classes (or of their bases) and functions whose steps follow no progress.
    """

    module: str
    attacks: str
    package: str
    base: str
    queries: frozenset[str]
    fixed_step: tuple[str, ...]


TORCHATTACKS = Library(
    module="torchattacks",
    attacks="torchattacks",
    package="torchattacks",
    base="torchattacks.attack:Attack",
    queries=frozenset(("Square", "SPSA", "OnePixel", "Pixle", "GN", "VANILA")),
    fixed_step=("FGSM", "BIM", "PGD", "Jitter"),
)
FOOLBOX = Library(
    module="foolbox",
    attacks="foolbox.attacks",
    package="foolbox",
    base="foolbox.attacks.base:Attack",
    queries=frozenset(
        [
            "BaseAdditiveNoiseAttack",
            "BaseRepeatedAdditiveNoiseAttack",
            "BinarizationRefinementAttack",
            "BinarySearchContrastReductionAttack",
            "BoundaryAttack",
            "DatasetAttack",
            "GaussianBlurAttack",
            "GenAttack",
            "HopSkipJumpAttack",
            "InversionAttack",
            "L2ContrastReductionAttack",
            "LinearSearchBlendedUniformNoiseAttack",
            "LinearSearchContrastReductionAttack",
            "PointwiseAttack",
            "SaltAndPepperNoiseAttack",
            "SpatialAttack",
        ]
    ),
    fixed_step=("BaseGradientDescent",),
)
ART = Library(
    module="art",
    attacks="art.attacks.evasion",
    package="adversarial-robustness-toolbox",
    base="art.attacks.attack:EvasionAttack",
    queries=frozenset(
        [
            "BoundaryAttack",
            "GeoDA",
            "GRAPHITEBlackbox",
            "HopSkipJump",
            "PixelAttack",
            "SignOPTAttack",
            "SimBA",
            "SpatialTransformation",
            "SquareAttack",
            "ThresholdAttack",
            "ZooAttack",
        ]
    ),
    fixed_step=("FastGradientMethod", "ProjectedGradientDescent"),
)
ADV_LIB = Library(
    module="adv_lib",
    attacks="adv_lib.attacks",
    package="adv-lib",
    base="",
    queries=frozenset(),
    fixed_step=("pgd_linf",),
)
LIBRARIES = {library.module: library for library in (TORCHATTACKS, FOOLBOX, ART, ADV_LIB)}


def load(module: str, package: str) -> ModuleType:
    """Import a module of a library.

    Raises:
        UnmovedError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnmovedError(f"interop: expected {error.name} to be installed; pip install {package}") from error
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError here
        raise UnmovedError(
            f"interop: {module} does not import ({error}); if it is torchvision that fails, install the one that "
            f"belongs to torch {torch.__version__}"
        ) from error


def found(library: Library, name: str) -> Callable[..., Any]:
    """Return a library's attack by its name there.

    Raises:
        UnmovedError: the library is missing, or has no attack of this name.
    """
    namespace = load(library.attacks, library.package)
    known = {key: value for key, value in vars(namespace).items() if _is_attack(library, value)}
    if name not in known:
        raise UnmovedError(f"interop: {library.attacks} has no attack {name!r}" + did_you_mean(name, known))
    attack: Callable[..., Any] = known[name]
    return attack


def _is_attack(library: Library, value: object) -> bool:
    """Return whether something in the library's namespace is an attack, and not merely imported there."""
    if not library.base:
        return inspect.isfunction(value) and value.__module__.startswith(f"{library.module}.")
    module, _, name = library.base.partition(":")
    return isinstance(value, type) and issubclass(value, getattr(load(module, library.package), name))


def kind_in(library: Library, attack: object) -> str:
    """Return the kind that an attack of a library is of: one of `protocols.ATTACK_KINDS`.

    It is told by the names of its class and of the bases of that; what is not known uses gradients.
    """
    kind = attack if isinstance(attack, type) or inspect.isroutine(attack) else type(attack)
    names = [base.__name__ for base in inspect.getmro(kind)] if isinstance(kind, type) else [kind.__name__]
    if library.queries & set(names):
        return QUERIES
    if names[0].startswith(("Auto", "APGD")):  # AutoProjectedGradientDescent, AutoAttack, APGDT
        return GRADIENTS
    return FIXED_STEP if any(word in name for name in names for word in library.fixed_step) else GRADIENTS
