"""Find the recipes that come with the package by their names, such as ``digits/at``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"


def names() -> list[str]:
    """Return the names of all recipes that come with the package."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.toml"))


def located(path: Path) -> Path:
    """Return the file of a recipe: the path itself, or if it is not a file, the package's recipe of this name."""
    return FOLDER / f"{path.as_posix()}.toml" if not path.is_file() and path.as_posix() in names() else path
