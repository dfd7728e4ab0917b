"""Train image classifiers that small worst-case perturbations do not move, and measure how far that is true."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from unmoved import analyses, attacks, averaging, data, defenses, models, optim, outcomes, terms, testing, weights
    from unmoved.errors import UnmovedError
    from unmoved.judge import evaluate
    from unmoved.loop import train
    from unmoved.protocols import Batch, Method
    from unmoved.run import Run
    from unmoved.schedule import Phases, Ramp
    from unmoved.step import train_step
    from unmoved.threat import ThreatModel
    from unmoved.views import Views

__all__ = [
    "Batch",
    "Method",
    "Phases",
    "Ramp",
    "Run",
    "ThreatModel",
    "UnmovedError",
    "Views",
    "analyses",
    "attacks",
    "averaging",
    "data",
    "defenses",
    "evaluate",
    "models",
    "optim",
    "outcomes",
    "terms",
    "testing",
    "train",
    "train_step",
    "weights",
]

_HOMES = {
    "Batch": "protocols",
    "Method": "protocols",
    "Phases": "schedule",
    "Ramp": "schedule",
    "Run": "run",
    "ThreatModel": "threat",
    "UnmovedError": "errors",
    "Views": "views",
    "evaluate": "judge",
    "train": "loop",
    "train_step": "step",
}


def __getattr__(name: str) -> _Any:
    """Loaded when first asked for: ``unmoved --help`` must not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("unmoved")
    if name not in __all__:
        raise AttributeError(f"module 'unmoved' has no attribute {name!r}")
    home = _import_module(f"unmoved.{_HOMES.get(name, name)}")
    return getattr(home, name) if name in _HOMES else home


def __dir__() -> list[str]:
    return __all__
