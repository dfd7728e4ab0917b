"""List the files of an image folder or a tar archive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unmoved.core.errors import UnmovedError
from unmoved.data import tar_archive
from unmoved.data.decode_all import Item
from unmoved.data.folder_layout import Layout, is_litter

MOST_FOLDERS = 100_000  # links may form cycles
DEPTH = 4  # folder levels that are searched: one more than any layout has, to report a deeper one


def tree(root: Path) -> Folder | Tar:
    """Open the tree of named images at a path; its ``stamps`` show cheaply whether they may have changed.

    Raises:
        UnmovedError: neither a folder nor a tar archive.
    """
    if root.is_dir():
        return Folder(root, *_walk(root))
    if tar_archive.is_archive(root):
        return Tar(root)
    raise UnmovedError(f"folder.path: expected a folder or one of {', '.join(tar_archive.SUFFIXES)}, came {root}")


@dataclass(frozen=True)
class Folder:
    """Read images from a folder, in any order."""

    root: Path
    files: dict[str, str]
    folders: set[str]

    def stamps(self) -> list[str]:
        return [*(f"{name} {stamp}" for name, stamp in sorted(self.files.items())), *sorted(self.folders)]

    @contextmanager
    def listed(self) -> Iterator[tuple[Layout, Iterator[Item]]]:
        layout = Layout.of(self.files, self.folders, str(self.root))
        yield layout, ((place, str(self.root / name), self.root / name) for place, name in enumerate(layout.files))


@dataclass(frozen=True)
class Tar:
    """Read images from a tar archive; listing decompresses it once, reading once more."""

    root: Path

    def stamps(self) -> list[str]:
        return [_stamp(self.root.stat())]

    @contextmanager
    def listed(self) -> Iterator[tuple[Layout, Iterator[Item]]]:
        with tar_archive.opened(self.root) as tar:
            layout = Layout.of(tar.files, tar.folders, str(self.root), packed=True)
            places = {name: place for place, name in enumerate(layout.files)}
            # In the archive's order, since compressed data cannot be read backwards.
            yield layout, ((places[n], f"{self.root}: {n}", tar.read(n)) for n in tar.files if n in places)


def _walk(root: Path) -> tuple[dict[str, str], set[str]]:
    """Return every regular file (with its size and time) and folder below the root; links are followed."""
    files: dict[str, str] = {}
    folders: set[str] = set()
    waiting = [("", 0)]
    while waiting:
        prefix, depth = waiting.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    name = f"{prefix}{entry.name}"
                    if is_litter(entry.name):
                        continue
                    if entry.is_dir():
                        folders.add(name)
                        if len(folders) > MOST_FOLDERS:
                            raise UnmovedError(
                                f"{root}: expected at most {MOST_FOLDERS} folders, came more; does a link in "
                                f"{str(root / prefix)!r} lead back?"
                            )
                        if depth < DEPTH:
                            waiting.append((f"{name}/", depth + 1))
                    elif entry.is_file() or entry.is_symlink():  # a broken link is an error, not an absent file
                        files[name] = _stamp(entry.stat())
        except OSError as error:
            raise UnmovedError(f"{root / prefix}: expected a readable folder, came {error}") from error
    return files, folders


def _stamp(status: os.stat_result) -> str:
    # The modification time can be set, and copying tools do so; the change time cannot.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
