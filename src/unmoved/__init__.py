"""Train image classifiers that small worst-case perturbations do not move, and measure how far that is true."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from unmoved import (
        analyses,
        attacks,
        averaging,
        data,
        defenses,
        interop,
        models,
        optim,
        outcomes,
        terms,
        testing,
        weights,
    )
    from unmoved.any_model import doctor, judge, report
    from unmoved.core.batch import Batch
    from unmoved.core.errors import UnmovedError
    from unmoved.core.phases import Phases, Ramp
    from unmoved.core.protocols import Attack, Method, ParameterDefense, StatefulTerm, Term
    from unmoved.core.threat import ThreatModel
    from unmoved.core.views import Views
    from unmoved.evaluation.judge import evaluate
    from unmoved.runs.folder import Run
    from unmoved.training.loop import train
    from unmoved.training.step import train_step

    __version__: str

__all__ = [
    "Attack",
    "Batch",
    "Method",
    "ParameterDefense",
    "Phases",
    "Ramp",
    "Run",
    "StatefulTerm",
    "Term",
    "ThreatModel",
    "UnmovedError",
    "Views",
    "analyses",
    "attacks",
    "averaging",
    "data",
    "defenses",
    "doctor",
    "evaluate",
    "interop",
    "judge",
    "models",
    "optim",
    "outcomes",
    "report",
    "terms",
    "testing",
    "train",
    "train_step",
    "weights",
]

_HOMES = {
    "Attack": "core.protocols",
    "Batch": "core.batch",
    "Method": "core.protocols",
    "ParameterDefense": "core.protocols",
    "Phases": "core.phases",
    "Ramp": "core.phases",
    "Run": "runs.folder",
    "StatefulTerm": "core.protocols",
    "Term": "core.protocols",
    "ThreatModel": "core.threat",
    "UnmovedError": "core.errors",
    "Views": "core.views",
    "doctor": "any_model",
    "evaluate": "evaluation.judge",
    "judge": "any_model",
    "report": "any_model",
    "train": "training.loop",
    "train_step": "training.step",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first asked for: ``unmoved --help`` must not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("unmoved")
    if name not in __all__:
        raise AttributeError(f"module 'unmoved' has no attribute {name!r}")
    home = _import_module(f"unmoved.{_HOMES.get(name, name)}")
    return getattr(home, name) if name in _HOMES else home


def __dir__() -> list[str]:
    return __all__
