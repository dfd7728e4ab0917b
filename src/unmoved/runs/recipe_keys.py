"""Suggest the full name of a recipe key that stands in the wrong place: ``threat.eps`` for ``eps``."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping

from unmoved.core.untrusted import Json, JsonValue
from unmoved.runs.components import SETTINGS, Settings, UnknownKey

KINDS = {
    "attack": "attacks",
    "validation": "attacks",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "average": "average",
    "defense": "defenses",
    "model": "models",
    "data": "data",
}
NAMED = {"objective": "terms", "evaluation.attacks": "attacks"}  # tables by names of the recipe's own
HIDDEN = ("use", "swept")  # a command sets the latter


def meant(mistake: UnknownKey, recipe: type[Settings], tables: Json) -> str:
    """Return the end of a message about an unknown key: the near key of the same table, or full names of such keys.

    Args:
        recipe: the settings that a recipe's tables are.
        tables: the recipe at hand, which says which components there are.
    """
    elsewhere: dict[str, list[str]] = {}
    for full in _keys(recipe, tables):
        elsewhere.setdefault(full.rpartition(".")[2].lower(), []).append(full)
    here = {name.lower(): [name] for name in mistake.known if name not in HIDDEN}
    key = mistake.key.lower().replace("-", "_")
    exactly = elsewhere.get(key, [])
    near = exactly or _near(key, here, 0.6) or _near(key, elsewhere, 0.75)
    if not near:
        return f"; known: {', '.join(sorted(name for (name,) in here.values())) or 'none'}"
    return f"; did you mean {' or '.join(map(repr, near[:3]))}?"


def _near(key: str, names: Mapping[str, list[str]], cutoff: float) -> list[str]:
    return [name for near in difflib.get_close_matches(key, names, n=1, cutoff=cutoff) for name in names[near]]


def _keys(recipe: type[Settings], tables: Json) -> Iterator[str]:
    """List the full names of all keys, the recipe's own settings first."""
    for name, field in recipe.model_fields.items():
        if name not in HIDDEN:
            yield name
            yield from _nested(name, field.annotation)
    for name, kind in KINDS.items():
        default = recipe.model_fields[name].default
        yield from _components(name, kind, tables.get(name, default))
    for place, kind in NAMED.items():
        named: JsonValue = tables
        for part in place.split("."):
            named = named.get(part) if isinstance(named, dict) else None
        for name, table in named.items() if isinstance(named, dict) else ():
            yield f"{place}.{name}"
            # A term's table may leave its use to its name.
            yield from _components(
                f"{place}.{name}", kind, {"use": name, **table} if isinstance(table, dict) else table
            )


def _nested(place: str, annotation: object) -> Iterator[str]:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Settings) and typing.get_origin(annotation) is not list:
            for name, field in part.model_fields.items():
                yield f"{place}.{name}"
                yield from _nested(f"{place}.{name}", field.annotation)


def _components(place: str, kind: str, table: object) -> Iterator[str]:
    use = table.get("use") if isinstance(table, dict) else table
    if isinstance(use, str) and use in SETTINGS[kind]:
        yield from (f"{place}.{name}" for name in SETTINGS[kind][use].model_fields if name not in HIDDEN)
