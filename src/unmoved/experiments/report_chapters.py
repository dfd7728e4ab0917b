"""Make the analysis chapters of a report, and find the analyses that a comparison of the same runs has made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from unmoved.analyses import studies
from unmoved.core import untrusted
from unmoved.reports.pages import Section
from unmoved.runs.folder import Run

FOLDER = "analysis"  # in the folder of the comparison


def chapters(
    runs: Sequence[Run],
    names: Sequence[str],
    n: int,
    *,
    allow: Collection[str] = (),
    out: Path | None = None,
    progress: Callable[[float, str], None] = studies.no_progress,
) -> list[Section]:
    """Analyse the runs on ``n`` test images; what was computed before is read from the runs' folders.

    Args:
        names: of the analyses.
        out: where the tables and pages of the analyses are saved; nowhere by default.

    Raises:
        UnmovedError: as `studies.subjects` and the analyses.
    """
    sections: list[Section] = []
    subjects = studies.subjects(runs, n, allow=allow)
    for name in names:
        study = studies.STUDIES[name].for_report()(subjects, progress)
        if out is not None:
            study.write(out)
        sections += study.sections
    return sections


def analysed(runs: Sequence[Run]) -> dict[str, int]:
    """Return the analyses that a comparison made of these runs and no others, each with its number of images.

    Raises:
        UnmovedError: a damaged ``verdict.json`` of an analysis.
    """
    folders = [run.path.resolve() for run in runs]
    homes = {folder.parent.parent for folder in folders}
    found: dict[str, int] = {}
    for name in studies.STUDIES if len(homes) == 1 else ():
        try:
            facts = untrusted.json_file(next(iter(homes)) / FOLDER / name / "verdict.json")
        except FileNotFoundError:
            continue
        settings = facts.get("settings")
        n, theirs = (settings.get("n"), settings.get("runs")) if isinstance(settings, dict) else (None, None)
        # By the ends of their paths: the comparison may have been moved since.
        if isinstance(n, int) and isinstance(theirs, list) and _ends(theirs) == _ends(folders):
            found[name] = n
    return found


def _ends(folders: Sequence[object]) -> set[tuple[str, ...]]:
    """Return the last two parts of each path, which tell the runs of a comparison apart."""
    return {Path(str(folder)).parts[-2:] for folder in folders}
