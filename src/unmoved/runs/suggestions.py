"""Suggest the recipe or run that was meant by a path or name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

from unmoved.runs import packaged_recipes

MOST = 3  # paths in a message


def recipe_meant(path: Path, parts: Mapping[str, Iterable[str]]) -> str:
    """Return the end of a message about a recipe that does not exist.

    Args:
        parts: kind -> names of what recipes are made of.
    """
    known = [*map(Path, packaged_recipes.names()), *sorted(Path("recipes").glob("*/*.toml"))]
    short = Path(path.parent.name, path.stem)  # of a path that ends in a name
    if near := _of_this_name(path, known) or _of_this_name(short, known) or _near(path, known) or _near(short, known):
        return _meant(near)
    for kind, names in parts.items():
        if str(path) in names:
            return f"; {str(path)!r} is a name that recipes use, of the kind {kind!r}; expected a recipe: digits/at"
    every = [name for names in parts.values() for name in names]
    if close := difflib.get_close_matches(str(path).lower(), every, n=1, cutoff=0.6):
        return f"; the nearest name is {close[0]!r}: `unmoved show {close[0]}`"
    return "; correct the path, or take a recipe that `unmoved list` shows"


def run_meant(path: Path) -> str:
    """Return the end of a message about a run folder that does not exist, or is none."""
    if path.is_file():
        train = f"; train it first: unmoved train {path} --out RUN" if path.suffix == ".toml" else ""
        return f", found a file{train}"
    if path.is_dir():
        return f", found a folder of runs{_meant(inside)}" if (inside := _runs_below(path)) else ""
    if packaged_recipes.located(path) != path:
        return f", found a recipe; train it first: unmoved train {path} --out RUN"
    here = _runs_below(Path("runs"))
    near = _of_this_name(path, here) or _near(path, here)
    return ", found none" + (_meant(near) if near else "; correct the path, or train first")


def _runs_below(folder: Path) -> list[Path]:
    levels = ("*", "*/*", "*/*/*")
    return sorted(path.parent for level in levels for path in folder.glob(f"{level}/recipe.toml"))


def _of_this_name(path: Path, candidates: list[Path]) -> list[Path]:
    """Return the paths that end in this one, with or without its suffix, whatever the case."""
    end = [part.lower() for part in path.with_suffix("").parts]
    pairs = ((one, [part.lower() for part in one.with_suffix("").parts]) for one in candidates)
    return [one for one, parts in pairs if end and parts[-len(end) :] == end]


def _near(path: Path, candidates: list[Path]) -> list[Path]:
    ways = (
        lambda one: one,
        lambda one: one.with_suffix(""),
        lambda one: Path(one.parent.name, one.stem),
        lambda one: Path(one.stem),
    )
    names = {str(way(one)).lower(): one for way in ways for one in reversed(candidates)}
    asked = str(path).lower()
    return [names[name] for name in difflib.get_close_matches(asked, names, n=1, cutoff=0.7)]


def _meant(paths: list[Path]) -> str:
    more = f" (and {len(paths) - MOST} more)" if len(paths) > MOST else ""
    return f"; did you mean {' or '.join(repr(str(one)) for one in paths[:MOST])}{more}?"
