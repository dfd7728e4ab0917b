"""Describe a part of the package for `unmoved show`: its words, its settings with their defaults, how it is named."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from pydantic_core import PydanticUndefined

from unmoved.analyses.studies.kind import StudyKind
from unmoved.runs.components import SETTINGS

# How a recipe names a part, by its kind.
TABLES = {
    "terms": "[objective.{0}]",
    "attacks": '[attack]\nuse = "{0}"\n\n[evaluation.attacks.{0}]',
    "stops": '[attack]\nuse = "pgd"\nstop = {{ use = "{0}" }}',
    "defenses": '[defense]\nuse = "{0}"',
    "models": '[model]\nuse = "{0}"',
}


# Keys that are no parameter of the constructor, and their types.
BESIDE = {
    "weight": "float | Ramp",
    "eps": "float | Ramp",
    "seed": "int",
    "weights": "str | table",
    "normalize": "table",
}
RAMP = "where Ramp is a table such as { from = 0.0, to = 0.2, over = 0.4 }"


def described(kind: str, name: str, part: object) -> str:
    """Return a page about a part: ``kind`` and ``name`` are those that `unmoved list` prints."""
    if isinstance(part, type) and issubclass(part, StudyKind):
        settings, named = _options(part), f"On the command line:\n\nunmoved analyze {name} RUN..."
    else:
        assert callable(part)
        table = TABLES.get(kind, f'[{kind}]\nuse = "{{0}}"').format(name)
        settings, named = _settings(kind, name, part), f"In a recipe:\n\n{table}"
    lines = [f"  {setting}" for setting in settings] or ["  none"]
    lines += [f"  {RAMP}"] if any(line.endswith("Ramp") for line in lines) else []
    pages = [f"{name} ({kind})", inspect.getdoc(part) or "", "\n".join(["Settings:", *lines]), named]
    return "\n\n".join(pages)


def _settings(kind: str, name: str, part: Callable[..., object]) -> Iterator[str]:
    """Yield a line of each key in the table of a part: ``name = default``, and its type as the constructor has it."""
    parameters = inspect.signature(part).parameters
    for key, field in SETTINGS[kind][name].model_fields.items():
        if key == "use":
            continue
        hint = parameters[key].annotation if key in parameters else BESIDE[key]
        needed = field.default is PydanticUndefined
        value = "(needed)" if needed else "(none)" if field.default is None else f"= {_toml(field.default)}"
        yield f"{key} {value}".ljust(34) + f" {hint}".rstrip().replace(" | None", "")


def _options(part: type[StudyKind]) -> Iterator[str]:
    for one in fields(part):
        default = ",".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
        yield f"--{one.name} ({default})".ljust(34) + f" {one.metadata['option'].help}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + " }"
    return json.dumps(value)
