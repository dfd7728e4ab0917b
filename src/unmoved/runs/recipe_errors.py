"""Say in a line for each mistake in a recipe which key is wrong, what was expected there and what came."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from unmoved.core.untrusted import Json
from unmoved.runs import recipe_keys
from unmoved.runs.components import Settings, UnknownKey

# Types of pydantic's mistakes, by the first word -> what was expected.
_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "dict": "a table",
    "model": "a table",
    "is": "a list",  # is_instance_of: of a sequence
}
_TYPES = {"bool", "int", "float", "str"}  # as places in a union of types


def messages(error: ValidationError, recipe: type[Settings], tables: Json) -> list[str]:
    """Return a line for each mistake; where one of several types was expected, one line names them.

    Args:
        recipe: the settings that a recipe's tables are.
        tables: the recipe at hand.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for mistake in error.errors(include_url=False):
        key = ".".join(str(part) for part in mistake["loc"] if not _names_a_type(part))
        if isinstance(unknown := mistake.get("ctx", {}).get("error"), UnknownKey):
            advice = recipe_keys.meant(unknown, recipe, tables)
        else:
            advice = ""
        message, came = _expected(mistake)
        start = f"{key}: " if key and not message.startswith(f"{key}.") else ""
        found.setdefault((start, came), []).append(message + advice)
    lines = []
    for (start, came), several in found.items():
        alternatives = list(dict.fromkeys(several))
        if came:  # alternatives are of one value
            first, *others = alternatives
            alternatives = [" or ".join([first, *(other.removeprefix("expected ") for other in others)]) + came]
        lines += [start + message for message in alternatives]
    return list(dict.fromkeys(lines))


def _names_a_type(part: str | int) -> bool:
    """Tell whether a part of a mistake's place is no key but a member of a union: pydantic's name, or a tag of ours."""
    return isinstance(part, str) and (part.startswith("<") or "[" in part or part in _TYPES)


def _expected(mistake: ErrorDetails) -> tuple[str, str]:
    """Return (what was expected, what came instead if the message does not say that itself)."""
    message, kind = mistake["msg"].removeprefix("Value error, "), mistake["type"]
    if kind == "missing":
        return "expected a value, came none", ""
    came = f", came {mistake['input']!r:.200}"
    if kind == "value_error":
        return (message.removesuffix(came), came) if message.endswith(came) else (message, "")
    words = mistake["ctx"]["expected"] if kind == "literal_error" else _EXPECTED.get(kind.partition("_")[0])
    return f"expected {words}" if words else message, came
