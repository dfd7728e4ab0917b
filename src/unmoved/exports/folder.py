"""Write an export of a run, and verify one: a folder whose files are as they were written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError, require_choice
from unmoved.core.files import is_temporary, latest, remove_leftovers, write_set
from unmoved.exports import evidence
from unmoved.exports.exported_run import ExportedRun
from unmoved.exports.model_card import model_card
from unmoved.exports.robustbench import robustbench
from unmoved.exports.sarif import sarif
from unmoved.runs.folder import Run

SET = "export"
UNFINISHED = f".{SET}.new"  # where `write_set` keeps all files until each is in its place
WEIGHTS, CARD, ENTRY, FINDINGS = "model.safetensors", "README.md", "robustbench.json", "doctor.sarif"
NAMES = (WEIGHTS, CARD, ENTRY, evidence.FILE, FINDINGS)
ABOUT = {"license": r"[a-z0-9][a-z0-9.+-]{0,99}", "link": r"https?://[!-;=?-~]{1,500}"}
ABOUT |= dict.fromkeys(("title", "authors", "venue"), r".{1,1000}")
# What version control and the hub's client put beside the files.
ELSEWHERE = (".git", ".gitattributes", ".cache", UNFINISHED)
MOST_NAMED = 20


def export_run(run: Run, out: Path | None = None, about: Mapping[str, str] | None = None) -> tuple[Path, ExportedRun]:
    """Write the export of an evaluated run: weights, model card, evidence, all files together or none.

    Args:
        out: the folder to write; ``export`` in the run folder by default. An export that is there is replaced.
        about: additions to the model card and the entry for RobustBench: license, title, authors, link, venue.

    Returns:
        The folder, and the run as it was read.

    Raises:
        UnmovedError: as `ExportedRun.of`; an unknown key of ``about``; a folder with files of these names that no
            export wrote, or that were changed since; a folder that cannot be written.
    """
    out = run.path / SET if out is None else out
    _require_about(about or {})
    exported = ExportedRun.of(run, about)
    _require_replaceable(out)
    files = {
        WEIGHTS: exported.data,
        CARD: model_card(exported, WEIGHTS).encode(),
        ENTRY: _json(robustbench(exported)),
        FINDINGS: _json(sarif(exported, WEIGHTS)),
    }
    files[evidence.FILE] = evidence.evidence(exported, WEIGHTS, files)
    remove_leftovers(out, older_than=3600.0)
    write_set(out, SET, files)
    return out, exported


def verify(folder: Path) -> evidence.Listing:
    """Return what ``evidence.json`` lists if every file is as it was exported.

    Raises:
        UnmovedError: no export, or one that was killed while its files were moved in place; changed, missing or added
            files, each by its name.
    """
    if (folder / UNFINISHED).is_dir():
        raise UnmovedError(
            f"{folder}: expected a whole export, came one that was killed while its files took their places; "
            "export the run again"
        )
    listing, changes = _compared(folder)
    if changes:
        named = ", ".join(changes[:MOST_NAMED])
        more = f" and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
        raise UnmovedError(
            f"{folder}: expected the files as they were exported, came {named}{more}; export the run again, or get the "
            "folder anew from whoever exported it"
        )
    return listing


def export_folder(path: Path) -> Path:
    """Return the folder of an export, given that or its run folder."""
    inside = path / SET
    is_run = not _has(path, evidence.FILE) and _has(inside, evidence.FILE)
    return inside if is_run else path


def _compared(folder: Path) -> tuple[evidence.Listing, list[str]]:
    """Return what is listed, and what differs: ``"NAME changed"``, ``"NAME missing"``, ``"NAME added"``."""
    try:
        data = untrusted.content(latest(folder, SET, evidence.FILE), untrusted.MOST_JSON)
    except FileNotFoundError:
        raise UnmovedError(
            f"{folder}: expected a folder that `unmoved export` wrote, came none: it has no {evidence.FILE}"
        ) from None
    listing = evidence.listing(data, str(folder / evidence.FILE))
    changes = [] if evidence.own_sha256(data, listing.sha256) == listing.sha256 else [f"{evidence.FILE} changed"]
    for name, told in listing.files.items():
        state = _state(latest(folder, SET, name), told) if _is_plain(name) else "listed, which is no name of a file"
        changes += [f"{name} {state}"] if state else []
    added = sorted(set(_there(folder)) - {evidence.FILE, *listing.files})
    return listing, changes + [f"{name} added" for name in added]


def _state(path: Path, told: evidence.FileRecord) -> str:
    """Return ``"missing"``, ``"changed"``, or "" for a file that is as it was."""
    try:
        with untrusted.regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        return "" if size == told.bytes and untrusted.digest(path) == told.sha256 else "changed"
    except FileNotFoundError:
        return "missing"
    except UnmovedError:  # a folder, a pipe or an unreadable file in its place
        return "changed"


def _there(folder: Path) -> Iterator[str]:
    """List the files below a folder, links too, but those of version control and of killed commands."""
    for above, folders, names in os.walk(folder):
        inside = Path(above).relative_to(folder)
        if above == str(folder):
            folders[:] = [name for name in folders if name not in ELSEWHERE and not is_temporary(name)]
            names = [name for name in names if name not in ELSEWHERE and not is_temporary(name)]
        links = [name for name in folders if (Path(above) / name).is_symlink()]
        yield from ((inside / name).as_posix() for name in [*names, *links])


def _require_replaceable(out: Path) -> None:
    """Raise `UnmovedError` if writing an export would destroy other files."""
    if _has(out, "recipe.toml"):
        raise UnmovedError(f"--out {out}: expected a folder for the export, came a run folder; choose another one")
    there = [name for name in NAMES if _has(out, name)]
    if not there:
        return
    if evidence.FILE not in there:
        raise UnmovedError(
            f"--out {out}: {', '.join(there)} there was not exported; choose another folder, or remove it"
        )
    changed = [change for change in _compared(out)[1] if change.endswith(" changed")]
    if changed:
        raise UnmovedError(
            f"--out {out}: {', '.join(changed)} since it was exported and would be lost; choose another folder, or "
            "remove it"
        )


def _has(folder: Path, name: str) -> bool:
    return os.path.lexists(latest(folder, SET, name))


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*", name) is not None


def _require_about(about: Mapping[str, str]) -> None:
    for key, value in about.items():
        require_choice("--about", key, ABOUT)
        if not value.isprintable() or not re.fullmatch(ABOUT[key], value):
            expected = {"license": "a license of the hub such as mit or apache-2.0", "link": "an address, https://..."}
            raise UnmovedError(
                f"--about {key}: expected {expected.get(key, 'at most 1000 printable characters')}, came {value!r:.80}"
            )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
