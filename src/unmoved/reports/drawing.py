"""Style and lay out figures: colours, fonts, labels that do not overlap, and SVG with the same bytes each time.

pyplot is not used, and matplotlib's settings are restored after each use. A recipe has one colour and one marker in all
pictures of a page. The first six colours are Okabe and Ito's; six more were chosen to be far from them and from each
other, also for colour-blind readers. Markers and line styles alone suffice in black and white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack
from xml.etree import ElementTree

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Bbox
from matplotlib.typing import LineStyleType

from unmoved.core.errors import UnmovedError

Key = TypeVar("Key")
Segment = Sequence[tuple[float, float]]  # both ends (x, y)
INK, GRID, PAPER = "#1b1b1a", "#dcdcd9", "#fefefd"  # no data has these colours, so a page may replace them (dark mode)
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#a860f0", "#6000d8", "#90a860", "#900078", "#604800", "#d80030"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p", "h")
LINES: tuple[LineStyleType, ...] = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
MOST = len(COLOURS)  # series that a reader can tell apart in one picture; further ones are grey
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a recipe's name may contain dollar signs
    "figure.constrained_layout.use": True,
    "figure.labelsize": 8.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "unmoved",
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK),
}


# Of small multiples: many panels side by side on a page, each a file.
SMALL = {"font.size": 7.5, "legend.fontsize": 7.0, "figure.labelsize": 6.5, "lines.linewidth": 1.2}


class Look(TypedDict, total=False):
    """Name looks of a line or of markers, by matplotlib's names."""

    color: str
    marker: str | None
    linestyle: LineStyleType
    linewidth: float
    markersize: float
    markeredgecolor: str
    markeredgewidth: float
    markerfacecolor: str
    alpha: float
    zorder: float


class Fill(TypedDict, total=False):
    """Name looks of a bar, by matplotlib's names."""

    facecolor: str
    edgecolor: str
    hatch: str
    linewidth: float


@contextmanager
def style(*, small: bool = False) -> Iterator[None]:
    """Use our settings of matplotlib inside the block, the caller's after it; ``@style()`` does so for a function."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change what a figure looks like
        matplotlib.rcParams.update(STYLE | SMALL if small else STYLE)
        yield


def look(k: int) -> Look:
    """Return colour, marker and line style of the k-th series; the first `MOST` share no colour and no marker."""
    return {
        "color": COLOURS[k % len(COLOURS)],
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": LINES[k % len(LINES)],
    }


def looks(names: Sequence[str], shown: Sequence[str] = ()) -> dict[str, Look]:
    """Return the look of each name by its recipe, in order; the seeds of a recipe (``"at seed 1"``) have one look.

    Args:
        names: of all recipes or runs, in the order of the page.
        shown: those that a picture tells apart, which have colours of their own where there are more than `MOST`
            recipes; without it colours repeat.
    """
    recipes = {name: re.sub(r" seed \d+$", "", name) for name in names}
    places = list(dict.fromkeys(recipes.values()))
    if len(places) > MOST and shown:
        recipes = {name: recipes[name] for name in shown}
        places = list(dict.fromkeys(recipes.values()))
    return {name: look(places.index(recipe)) for name, recipe in recipes.items()}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return each name without a folder that all share: ``digits/at`` and ``digits/mart`` become at and mart."""
    folders = {name.partition("/")[0] for name in names}
    shared = len(set(names)) > 1 and len(folders) == 1 and all("/" in name for name in names)
    return {name: name.partition("/")[2] if shared else name for name in names}


def key(looks: Look) -> str:
    """Draw the marker of a look as an element of a page, the size of a letter."""
    marker = MarkerStyle(looks.get("marker") or "o")
    path = marker.get_path().transformed(marker.get_transform())
    polygons = [points / np.abs(path.vertices).max() * (1, -1) for points in path.to_polygons()]
    outline = "".join("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z" for points in polygons)
    drawn = f'<path d="{outline}" fill="{paint(looks)}"/>'
    return f'<svg class="key" viewBox="-1.1 -1.1 2.2 2.2" aria-hidden="true">{drawn}</svg>'


def paint(looks: Look) -> str:
    """Return the colour of a look as a page's variable, which is another one in the dark."""
    color = looks.get("color", INK)
    return f"var(--c{COLOURS.index(color)})" if color in COLOURS else "var(--ink)"


def canvas(width: float, height: float) -> Figure:
    """Make an empty figure, its size in inches, whose texts can be measured."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def finished(figure: Figure, caption: str) -> Figure:
    """Set the caption as the figure's label and fix the layout, which each rendering would change a little."""
    figure.set_label(caption)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def count(n: pd.Series) -> str:
    """Return ``"n = 360"``, or from the smallest to the largest if they differ."""
    low, high = int(n.min()), int(n.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def bar(low: npt.ArrayLike, middle: npt.ArrayLike, high: npt.ArrayLike) -> np.ndarray:
    """Return the lengths (2, ...) of error bars below and above; never negative, in spite of rounding."""
    return np.diff([low, middle, high], axis=0).clip(min=0)


def foremost(keys: Sequence[Key], rank: Callable[[Key], float | tuple[bool, float]]) -> tuple[list[Key], list[Key]]:
    """Divide keys into the `MOST` of lowest rank and the others, each in the order in which they came."""
    best = set(sorted(keys, key=rank)[:MOST])
    return [key for key in keys if key in best], [key for key in keys if key not in best]


def front(x: pd.Series, y: pd.Series) -> list[Hashable]:
    """Return labels of the points that no other beats in both, at most `MOST` of them, evenly along the front."""
    undominated, best = list[Hashable](), -np.inf
    for label in pd.DataFrame({"x": x, "y": y}).sort_values(["x", "y"], ascending=False, kind="stable").index:
        if y[label] > best:
            undominated.append(label)
            best = y[label]
    places = np.linspace(0, len(undominated) - 1, min(MOST, len(undominated)))
    return [undominated[k] for k in places.round().astype(int)]


def leading(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of `MOST` points (x, y) at most: those on the front, then the highest."""
    places = pd.DataFrame(points.values(), index=list(points), columns=["x", "y"])
    top = front(places["x"], places["y"])
    return foremost(list(points), lambda name: (name not in top, -points[name][1]))[0]


def draw_others(
    axes: Axes, lines: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]], what: str, **looks: Unpack[Look]
) -> str:
    """Draw lines that have no style of their own as one grey artist, and return its label in the legend.

    Args:
        lines: x and y of each.
        what: what they are, in the plural.
    """
    if not lines:
        return ""
    gap = [np.nan]
    x, y = (np.concatenate([part for line in lines for part in (np.ravel(line[k]), gap)]) for k in (0, 1))
    label = f"{len(lines)} other {what}"
    grey: Look = {"color": INK, "alpha": 0.3, "linewidth": 0.7, "markersize": 4, "zorder": 0.8}
    axes.plot(x, y, label=label, **grey | looks)
    return label


def legend_above(figure: Figure, *, grow: bool = True) -> None:
    """Put the legend of the first axes above the picture, which grows by its height."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, names)) <= 24 else 1
    if grow:
        figure.set_figheight(figure.get_figheight() + 0.15 + 0.21 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside upper center", ncols=columns)


def percent_limits(low: float, high: float) -> tuple[float, float]:
    """Return limits of an axis in percent, at least ten points apart, so that small differences look small."""
    pad = max(10 - (high - low), 0) / 2
    return max(low - pad, -2), min(high + pad, 102)


def name_points(
    figure: Figure, points: Sequence[tuple[float, float, str]], bars: Sequence[Segment], others: Sized
) -> None:
    """Name each point (x, y, name) beside it; in a legend if a name is long, or if there are others without a name."""
    if len(others) or max(len(name) for *_, name in points) > 24:
        legend_above(figure)
    else:
        place_names(figure, points, bars)


def place_names(figure: Figure, points: Sequence[tuple[float, float, str]], bars: Sequence[Segment]) -> None:
    """Write the name beside each point (x, y, name) where it hides least: no marker or name, few of the bars.

    One text is measured for each name, and one annotation made.
    """
    (axes,) = figure.axes
    figure.draw_without_rendering()
    frame = np.array([axes.get_window_extent().extents])
    places = axes.transData.transform([p[:2] for p in points])
    taken = [Bbox([place, place]).padded(9).extents for place in places]
    taken += [Bbox(axes.transData.transform(ends)).padded(3).extents for ends in bars]
    boxes, weights = np.array(taken), np.repeat([5.0, 1.0], [len(points), len(bars)])
    # A bar's ends come in any order.
    boxes = np.hstack([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])])
    offsets = [(right, up) for reach in (5, 12, 20) for up in (reach, -reach) for right in (reach, -reach)]
    sides = np.array(offsets)
    near, corners = sides[0, 1], sides * figure.dpi / 72
    for (x, y, name), place in zip(points, places, strict=True):
        text = axes.text(x, y, name, fontweight="bold")
        size = np.array(text.get_window_extent().size)
        text.remove()
        low = place + corners - np.where(sides < 0, size, 0)
        tried = np.hstack([low, low + size])
        outside = size.prod() - _overlaps(tried, frame)[:, 0]
        costs = 10 * outside + _overlaps(tried, boxes) @ weights + 2 * np.abs(sides[:, 1])
        right, up = offsets[best := int(np.argmin(costs.round(3)))]
        corner = {"relpos": (float(right < 0), float(up < 0)), "shrinkA": 0, "shrinkB": 4}
        leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, **corner} if abs(up) > near else None
        text = axes.annotate(name, (x, y), xytext=(right, up), textcoords="offset points", arrowprops=leader)
        text.set(ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top", fontweight="bold")
        text.set_bbox({"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.6})
        text.set_in_layout(False)
        boxes, weights = np.vstack([boxes, tried[best]]), np.append(weights, 5.0)


def _overlaps(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Return the area (A, B) that each of these boxes (A, 4) has in common with each of those (B, 4)."""
    low = np.maximum(these[:, None, :2], those[None, :, :2])
    high = np.minimum(these[:, None, 2:], those[None, :, 2:])
    area: np.ndarray = np.clip(high - low, 0, None).prod(axis=2)
    return area


def to_svg(figure: Figure) -> str:
    """Convert the figure to the text of an SVG file: no date, no random ids, text as text."""
    text, canvas = io.StringIO(), figure.canvas
    with style():
        try:  # not savefig, which draws everything once more before
            writer: Any = FigureCanvasSVG(figure)  # untyped
            writer.print_svg(text, metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
        finally:
            figure.set_canvas(canvas)
    return text.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as an SVG file.

    Raises:
        UnmovedError: the path does not end in .svg.
    """
    if path.suffix != ".svg":
        raise UnmovedError(f"figure: expected a path ending in .svg, came {path}; for others use figure.savefig")
    path.write_text(to_svg(figure), encoding="utf-8", errors="backslashreplace")


def to_html(svg: str, name: str, label: str) -> str:
    """Convert an SVG file to an element of a page: ids made unique by ``name``, our colours as the page's variables.

    INK, GRID, PAPER and the data's COLOURS become ``var(--ink)``, ``var(--grid)``, ``var(--paper)``, ``var(--c0)``...
    so that a page may choose others in the dark; ``label`` is what a screen reader says.
    """
    variables = {INK: "var(--ink)", GRID: "var(--grid)", PAPER: "var(--paper)"}
    variables |= {color: f"var(--c{k})" for k, color in enumerate(COLOURS)}
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith("}style")]:
            parent.remove(child)  # it would apply to the whole page, which has the same rule
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                if value in used:  # the others name nothing, and matplotlib gives some of them twice
                    element.set("id", f"{name}-{value}")
            elif key == "href":
                element.set("href", re.sub("^#", f"#{name}-", value))
            else:
                value = value.replace("url(#", f"url(#{name}-")
                element.set(key, re.sub("#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label, "class": "figure"})
    return ElementTree.tostring(root, encoding="unicode")
