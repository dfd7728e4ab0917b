"""Assign image files to parts and classes by their names alone, the same for folders and archives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unmoved.core.errors import UnmovedError

PARTS = ("train", "test")
LITTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})

Parts = tuple[str, ...]


def is_litter(name: str) -> bool:
    """Return whether a file or folder is hidden or left by an operating system."""
    return name.startswith(".") or name in LITTER


@dataclass(frozen=True)
class Layout:
    """List the images of a tree, training part first, then by class and by name.

    Attributes:
        files: N names below the root, with slashes.
        labels: N positions in ``classes``.
        train: the first ``train`` files are the training part; N where the tree has no parts.
        classes: names of the class folders, sorted.
    """

    files: list[str]
    labels: list[int]
    train: int
    classes: tuple[str, ...]

    @staticmethod
    def of(files: Iterable[str], folders: Iterable[str], where: str, *, packed: bool = False) -> Layout:
        """Find the layout of a tree with these files and folders.

        Args:
            where: the name of the root in messages.
            packed: an archive, whose single top folder counts as the root.

        Raises:
            UnmovedError: no class, one class, an empty one, a folder inside one, or other classes in test than train.
        """
        named = {parts: name for name in files if (parts := _parts(name)) and not any(map(is_litter, parts))}
        shelves = {parts for name in folders if (parts := _parts(name)) and not any(map(is_litter, parts))}
        root = _top(named, shelves) if packed else ()
        tops = _below(root, named, shelves)
        split = all(part in tops for part in PARTS)
        roots = [(*root, part) for part in PARTS] if split else [root]
        found = [_part(prefix, named, shelves, where) for prefix in roots]
        classes = sorted(found[0])
        if split and classes != sorted(found[1]):
            odd = sorted(set(found[0]) ^ set(found[1]))
            raise UnmovedError(
                f"{where}: expected the same class folders in train and test, came {odd[0]!r} in one only"
            )
        if len(classes) < 2:
            raise UnmovedError(
                f"{where}: expected at least two class folders ({'/'.join((*roots[0], '<class>', '<image>'))}), "
                f"came {classes[0] if classes else 'none'}"
            )
        ordered = [(k, file) for part in found for k, name in enumerate(classes) for file in sorted(part[name])]
        train = sum(map(len, found[0].values()))
        return Layout([named[file] for _, file in ordered], [k for k, _ in ordered], train, tuple(classes))


def _parts(name: str) -> Parts:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _below(root: Parts, files: Iterable[Parts], folders: Iterable[Parts]) -> set[str]:
    """Return the names of the folders directly below ``root``."""
    depth = len(root)
    tops = {parts[depth] for parts in folders if len(parts) > depth and parts[:depth] == root}
    return tops | {parts[depth] for parts in files if len(parts) > depth + 1 and parts[:depth] == root}


def _top(files: Iterable[Parts], folders: Iterable[Parts]) -> Parts:
    """Return the chain of single folders that an archive puts around its tree: ``pets-1.0/train/cat/1.jpg``."""
    everything = [*files, *folders]
    deepest = max(map(len, files), default=0)
    root: Parts = ()
    while (
        deepest > len(root) + 2 and len(tops := {parts[: len(root) + 1] for parts in everything if parts != root}) == 1
    ):
        (candidate,) = tops
        if candidate[-1] in PARTS:
            break
        root = candidate
    return root


def _part(prefix: Parts, files: Iterable[Parts], folders: Iterable[Parts], where: str) -> dict[str, list[Parts]]:
    """Return the files of each class folder below ``prefix``."""
    depth, place = len(prefix), "/".join((where, *prefix))
    members: dict[str, list[Parts]] = {name: [] for name in _below(prefix, files, folders)}
    for parts in files:
        if parts[:depth] != prefix or len(parts) < depth + 2:
            continue
        if len(parts) > depth + 2:
            raise UnmovedError(
                f"{place}: expected images directly in their class folder (<class>/<image>), came "
                f"{'/'.join(parts[depth:])}; give the folder that holds the class folders, or name its two parts "
                "train and test"
            )
        members[parts[depth]].append(parts)
    empty = sorted(name for name, inside in members.items() if not inside)
    if empty:
        raise UnmovedError(f"{place}: expected images in every class folder, came the empty {empty[0]!r}; remove it")
    return members
