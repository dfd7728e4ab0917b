"""Read models, data and attacks as a command line says them: ``mnist:PATH``, ``timm:NAME``, ``pgd(steps=100)``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from unmoved.core.errors import UnmovedError, did_you_mean
from unmoved.core.untrusted import Json, JsonValue, toml
from unmoved.runs.components import INJECTED, KINDS, parse_number
from unmoved.runs.third_party import is_foreign

_CALL = re.compile(r"(?P<use>[^()]+?)\s*(?:\((?P<settings>.*)\))?", re.DOTALL)


def model_table(
    text: str,
    settings: Sequence[str] = (),
    *,
    weights: Json | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> Json:
    """Make the model's table of a recipe.

    Args:
        text: a name of this package, ``timm:NAME``, or third-party ``module:Name``.
        settings: ``key=value``, the arguments of what makes the model.
        weights: file, match, ignore and key, as of ``[model] weights``.
        mean, std: numbers with commas between: what images in [0, 1] are normalised by.

    Raises:
        UnmovedError: an unknown name, a setting that is none, or one of mean and std without the other.
    """
    own, _, rest = text.partition(":")
    if own.endswith(".py"):
        module = own.removesuffix(".py").strip("./").replace("/", ".")
        raise UnmovedError(f"model: expected module:Name, came {text!r}; did you mean '{module}:{rest or 'Name'}'?")
    table: Json = {"use": text}
    if own == "timm" and rest:
        table = {"use": "timm", "model": rest}
    elif ":" not in text and text not in KINDS["models"]:
        raise UnmovedError(
            f"model: expected module:Name, timm:NAME or one of {', '.join(KINDS['models'])}, came {text!r}"
            + (_as_third_party(text) or did_you_mean(text, KINDS["models"]))
        )
    table |= _settings("--model-set", settings)
    if (mean is None) != (std is None):
        given, absent = ("mean", "std") if std is None else ("std", "mean")
        raise UnmovedError(f"--{absent}: expected a value because --{given} is given; set both or neither")
    if mean is not None and std is not None:
        numbers: Json = {"mean": [*_numbers("--mean", mean)], "std": [*_numbers("--std", std)]}
        use = str(table["use"])
        takes = inspect.signature(KINDS["models"][use]).parameters if ":" not in use else ()
        table |= numbers if "mean" in takes else {"normalize": numbers}
    return table if weights is None else table | {"weights": dict(weights)}


def _as_third_party(dotted: str) -> str:
    """Say how ``module.Name`` is written."""
    module, _, name = dotted.rpartition(".")
    return f"; did you mean '{module}:{name}'?" if module else ""


def data_table(text: str, settings: Sequence[str] = ()) -> Json:
    """Make the data's table of a recipe.

    Args:
        text: ``NAME`` or ``NAME:PLACE``, the place being the first setting of the source (a path, a data set's name);
            or third-party ``module:Name``.
        settings: ``key=value``.

    Raises:
        UnmovedError: an unknown name, a place for a source that takes none, or none for one that needs it.
    """
    name, colon, place = text.partition(":")
    sources = KINDS["data"]
    if name not in sources:
        if is_foreign(text):
            return {"use": text, **_settings("--data-set", settings)}
        raise UnmovedError(
            f"--data: expected NAME:PATH with one of {', '.join(sources)}, or module:Name, came {text!r}"
            + did_you_mean(name, sources)
        )
    table: Json = {"use": name, **_settings("--data-set", settings)}
    parameters = [p for p in inspect.signature(sources[name]).parameters.values() if p.name not in INJECTED]
    if colon:
        if not parameters:
            raise UnmovedError(f"--data: expected {name}, which takes no path, came {text!r}")
        if parameters[0].name in table:
            raise UnmovedError(f"--data: expected {parameters[0].name} once, came it in {text!r} and by --data-set")
        table[parameters[0].name] = place
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in table]
    if needed:
        raise UnmovedError(f"--data: expected {name}:{needed[0].upper()}, came {text!r} without it")
    return table


def attack_tables(text: str) -> list[tuple[str, Json]]:
    """Read attacks with commas between: for each its text, and the table of a recipe that it stands for.

    ``pgd``, ``pgd(steps=100, loss=dlr)``, ``my_lab.attacks:Mine(steps=5)``; the table of what is no call with settings
    holds ``use`` alone. Names are not looked up here.

    Raises:
        UnmovedError: brackets that do not close, or a setting that is none.
    """
    found: list[tuple[str, Json]] = []
    for part in dict.fromkeys(_split(text)):
        if part.startswith("transfer:"):  # a path may hold anything
            found.append((part, {"use": part}))
            continue
        match = _CALL.fullmatch(part)
        if match is None:
            raise UnmovedError(f"--attacks: expected NAME or NAME(key=value, ...), came {part!r}")
        settings = _settings("--attacks", _split(match["settings"])) if match["settings"] else {}
        found.append((part, {"use": match["use"], **settings}))
    return found


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    if depth or quote:
        raise UnmovedError(f"--attacks: expected closed brackets and quotes, came {text!r}")
    return [part.strip() for part in parts if part.strip()]


def _settings(option: str, settings: Sequence[str]) -> Json:
    found: Json = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip().isidentifier() or key.strip() in ("use", "weights", "normalize"):
            raise UnmovedError(f"{option} {setting!r}: expected key=value, such as depth=18")
        if key.strip() in found:
            raise UnmovedError(f"{option} {setting!r}: expected each key once, came {key.strip()!r} twice")
        found[key.strip()] = value_of(text.strip(), f"{option} {setting!r:.200}")
    return found


def value_of(text: str, where: str) -> JsonValue:
    """Return a value as TOML reads it; what is no TOML is a string.

    Raises:
        UnmovedError: TOML beyond the bounds of `untrusted.toml`.
    """
    try:
        return toml(f"value = {text}", where)["value"]
    except UnmovedError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        return text


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(parse_number(part.strip())) for part in text.split(",")]
    except ValueError as error:
        raise UnmovedError(f"{option}: expected numbers such as 0.1307 or 0.49,0.48,0.45, came {text!r}") from error
