"""Runs -> one HTML page that opens offline, and each of its figures as an SVG file beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from unmoved import drawing, figures
from unmoved.beside import beside
from unmoved.errors import UnmovedError
from unmoved.figures import breakdown
from unmoved.opinion import DO_NOT_BELIEVE, LOOK_CLOSER
from unmoved.outcomes import CLEAN, WORST
from unmoved.verdicts import Verdict, verdicts

if TYPE_CHECKING:
    from unmoved.run import Run

TITLES = {
    "summary": "Summary",
    "results": "Results",
    "doctor": "Doctor",
    "broken": "What broke it",
    "tradeoff": "Trade-off",
    "curve": "Accuracy against eps",
    "training": "Training",
    "gallery": "Gallery",
    "classes": "Classes",
    "reading": "How to read this",
    "provenance": "Provenance",
}
WORDS = {"CLEAN": CLEAN, "WORST": WORST, "DO_NOT_BELIEVE": DO_NOT_BELIEVE, "LOOK_CLOSER": LOOK_CLOSER}


@dataclass(frozen=True, eq=False)
class Section:
    """A further section of the page, from another room.

    Attributes:
        id: its anchor: small letters, digits and hyphens.
        title: its heading.
        text: paragraphs; escaped, unless they are `markupsafe.Markup`.
        table: shown as it is, floats with four digits.
        figures: each captioned by its label: ``figure.set_label("what it shows, with the n")``.
    """

    id: str
    title: str
    text: Sequence[str] = ()
    table: pd.DataFrame | None = None
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Picture:
    """A figure as the page needs it: its words and its drawing."""

    title: str
    caption: str
    file: str
    svg: Markup


def write(runs: Sequence[Run], path: Path, title: str, extra: Sequence[Section] = ()) -> Path:
    """Write the page to ``path`` and its figures to ``<stem>-figures/`` beside it; return ``path``.

    Raises:
        UnmovedError: see `unmoved.verdicts.verdicts`; an extra section whose id is taken or is no anchor; a folder that
            cannot be written.
    """
    judged, titles = verdicts(runs), dict(TITLES)
    extra = (*_beside(judged), *extra)
    for section in extra:
        if section.id in titles or not re.fullmatch(r"[a-z][a-z0-9-]*", section.id):
            taken = ", ".join(titles)
            raise UnmovedError(f"section id {section.id!r}: expected a-z, 0-9 and hyphens, and none of {taken}")
        titles[section.id] = section.title
    titles |= {name: titles.pop(name) for name in ("reading", "provenance")}  # these stay last
    drawn = _figures(judged) | {section.id: [("", figure) for figure in section.figures] for section in extra}
    folder = path.with_name(f"{path.stem}-figures")
    files: dict[str, str] = {}
    pictures: dict[str, list[Picture]] = {}
    for section_id, titled in drawn.items():
        pictures[section_id] = []
        for name, figure in titled:
            stem = _new_stem(f"{section_id} {name}", files)
            files[stem] = svg = drawing.to_svg(figure)
            caption = str(figure.get_label()) or section_id
            html = Markup(drawing.to_html(svg, stem, f"{name}: {caption}" if name else caption))
            pictures[section_id].append(Picture(name, caption, f"{folder.name}/{stem}.svg", html))
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(title=title, titles=titles, extra=extra, pictures=pictures, **WORDS, **_facts(judged))
    )
    _save(path, page, {folder / f"{stem}.svg": svg for stem, svg in files.items()})
    return path


def _beside(judged: Sequence[Verdict]) -> list[Section]:
    """The recipes that name their base, beside it; no section where there is none."""
    table = beside(judged)
    text = (
        "In brackets the difference to the base method on the same images and seeds, in points, with a 95 % interval "
        "over images; helps and hurts are said only where every seed agrees. Robust is the worst case over the attacks "
        "of the evaluation, an upper bound; a method that gains under weak attacks alone has not gained.",
    )
    return [Section("beside", "Beside the base method", text, table)] if len(table) else []


def _save(path: Path, page: str, files: Mapping[Path, str]) -> None:
    """The figures, then the page, which appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, svg in files.items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(svg, encoding="utf-8")
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UnmovedError(f"report: could not write {path}: {error.strerror}; choose another --out") from error


def _figures(judged: Sequence[Verdict]) -> dict[str, list[tuple[str, Figure]]]:
    """By section: the figures, each with the recipe it belongs to ("" where it belongs to all)."""
    how, evaluation = judged[0].runs[0].protocol, judged[0].runs[0].evaluation
    names = [str(name) for name in evaluation.get("classes") or ()]
    curves = [verdict.curve for verdict in judged if verdict.curve is not None]
    return {
        "broken": [("", breakdown(pd.concat([verdict.broken for verdict in judged])))],
        "tradeoff": [("", figures.tradeoff(pd.concat([verdict.by_seed for verdict in judged])))],
        "curve": [("", figures.robustness_curve(pd.concat(curves), norm=how.norm, eps=how.eps))] if curves else [],
        "training": [(v.name, figures.training_curves(v.metrics)) for v in judged if v.metrics is not None],
        "gallery": [(v.name, figures.gallery(v.gallery, names, rows=4)) for v in judged if v.gallery is not None],
        "classes": [(v.name, figures.per_class(v.classes, names)) for v in judged],
    }


def _facts(judged: Sequence[Verdict]) -> dict[str, Any]:
    """What the words and tables of the page are made from."""
    first = judged[0].runs[0]
    settled = [verdict for verdict in judged if verdict.autoattack is not None]
    pool = sorted(settled or judged, key=lambda verdict: -verdict.robust["accuracy"])
    top = pool[0].robust
    lower = [verdict for verdict in pool if verdict.robust["accuracy"] < top["accuracy"]]
    bounded = [verdict for verdict in judged if verdict not in pool]
    return {
        "verdicts": judged,
        "protocol": first.protocol,
        "attacks": [] if first.evaluation is first.verdict else list(first.protocol.attacks),
        "settled": settled,
        "best": pool[: len(pool) - len(lower)],
        "second": lower[0] if lower else None,
        "rivals": [verdict for verdict in lower if verdict.robust["high"] >= top["low"]],
        "bounded": bounded,  # by other attacks alone, while AutoAttack has judged some recipe
        "open": [verdict for verdict in bounded if verdict.measures[WORST]["accuracy"] >= top["accuracy"]],
        "cleanest": max(judged, key=lambda verdict: verdict.measures[CLEAN]["accuracy"]),
        "several_seeds": any(len(verdict.runs) > 1 for verdict in judged),
        "stale": [line for verdict in judged for run in verdict.runs for line in run.stale],
        "notes": _notes(judged),
    }


def _notes(judged: Sequence[Verdict]) -> list[str]:
    """What an attack had to do otherwise than usual, and for which recipes, where not for all."""
    told: dict[str, list[str]] = {}
    for verdict in judged:
        for run in verdict.runs:
            both = [("", run.evaluation), ("AutoAttack: ", run.verdict or {})]
            for who, facts in both[run.evaluation is run.verdict :]:
                for note in facts.get("notes") or ():
                    names = told.setdefault(f"{who}{note}", [])
                    names += [] if verdict.name in names else [verdict.name]
    return [note if len(names) == len(judged) else f"{', '.join(names)}: {note}" for note, names in told.items()]


def _new_stem(words: str, taken: Mapping[str, str]) -> str:
    """A file name's stem of letters, digits and hyphens that is not taken."""
    stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return next(name for k in range(len(taken) + 1) if (name := f"{stem}-{k + 1}" if k else stem) not in taken)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """("a.b", text) for every leaf of a nested dict."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unmoved"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "eps": _eps, "duration": _duration, "cell": _cell, "flat": _flat}
    return environment


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _eps(eps: float) -> str:
    """``8/255`` where eps is no short decimal but a whole number of 255ths, otherwise four digits."""
    whole = round(eps * 255)
    is_short = float(f"{eps:.4g}") == eps
    return f"{whole}/255" if not is_short and abs(eps * 255 - whole) < 1e-6 else f"{eps:.4g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
