"""Write text, tables and figures as one HTML page that opens offline, and each figure as an SVG file beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_set
from unmoved.core.messages import duration
from unmoved.core.threat import eps_text
from unmoved.reports import drawing

# Names of columns and values on a page; for others, underscores become spaces.
WORDS = {
    "rho": "Spearman's rho",
    "low": "95 % interval from",
    "high": "to",
    "i_max": "worst loss change (nats)",
    "i_ave": "random loss change (nats)",
    "train_eps": "eps in training",
    "eval_eps": "eps of the attack",
}
Drawn = Mapping[str, Iterable[tuple[str, Figure | Callable[[], Figure]]]]


@dataclass(frozen=True, eq=False)
class Section:
    """Hold a section of a page, such as one that an analysis makes.

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
    """Hold a figure as the page needs it: its caption and its drawing."""

    title: str
    caption: str
    file: str
    svg: Markup


def write(
    path: Path,
    template: str,
    facts: Mapping[str, object],
    drawn: Drawn,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Render a template to ``path`` and the figures to ``<stem>-figures/`` beside it; return ``path``.

    Args:
        facts: the template's variables; ``pictures`` is added.
        drawn: by section: the figures, each with its heading ("" for none). A function is called for its figure; the
            figure is rendered and cleared before the next, so that a page of many runs holds one figure at a time.
        beside: further files of the same folder, which are written together with these.

    Raises:
        UnmovedError: a folder that cannot be written.
    """
    folder = path.with_name(f"{path.stem}-figures")
    files: dict[str, bytes] = {}
    pictures: dict[str, list[Picture]] = {}
    for section_id, titled in drawn.items():
        pictures[section_id] = []
        for name, figure in titled:
            stem = _new_stem(f"{section_id} {name}", files)
            svg, caption = _text_of(figure)
            files[stem], caption = _encoded(svg), caption or section_id
            html = Markup(drawing.to_html(svg, stem, f"{name}: {caption}" if name else caption))
            pictures[section_id].append(Picture(name, caption, f"{folder.name}/{stem}.svg", html))
    page = _environment().get_template(template).render(pictures=pictures, **facts)
    written = {f"{folder.name}/{stem}.svg": svg for stem, svg in files.items()} | {path.name: _encoded(page)}
    try:
        write_set(path.parent, path.name, {**(beside or {}), **written})
    except UnmovedError as error:
        raise UnmovedError(f"{error}; or choose another --out") from error
    return path


def _text_of(figure: Figure | Callable[[], Figure]) -> tuple[str, str]:
    """Return the figure as SVG, and its caption; clear a figure made here, whose parts reference each other."""
    drawn = figure if isinstance(figure, Figure) else figure()
    svg, caption = drawing.to_svg(drawn), str(drawn.get_label())
    if drawn is not figure:
        drawn.clear()
    return svg, caption


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def write_sections(
    path: Path, title: str, sections: Sequence[Section], lead: str = "", beside: Mapping[str, bytes] | None = None
) -> Path:
    """Write a page of sections alone; see `write`."""
    drawn = {section.id: [("", figure) for figure in section.figures] for section in sections}
    titles = {section.id: section.title for section in sections}
    facts = {"title": title, "titles": titles, "sections": sections, "lead": lead}
    return write(path, "sections.html.jinja", facts, drawn, beside)


def _new_stem(words: str, taken: Collection[str]) -> str:
    """Return a stem for a file name, of letters, digits and hyphens, that is not taken."""
    stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return next(name for k in range(len(taken) + 1) if (name := f"{stem}-{k + 1}" if k else stem) not in taken)


def _flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """List ("a.b", text) for every leaf of a nested dict."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unmoved.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "eps": eps_text,
        "duration": duration,
        "cell": _cell,
        "flat": _flat,
        "words": _words,
    }
    return environment


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return WORDS.get(str(value), str(value))


def _words(column: object) -> str:
    """Return what a column of a table is called on a page."""
    return WORDS.get(str(column), str(column).replace("_", " "))
