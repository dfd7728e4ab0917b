"""The figures of the corruption analysis show their tables, the same bytes each time, and without colour too."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from unmoved.analyses.studies import corruption_figures as figures
from unmoved.core.errors import UnmovedError
from unmoved.reports import drawing

GRID = (0.001, 0.01, 0.1)


def sweep_table(runs: tuple[str, ...] = ("digits/plain", "digits/at")) -> pd.DataFrame:
    rows = []
    for k, run in enumerate(runs):
        for step, eps in enumerate(GRID):
            for kind, size in (("random", 1e-3), ("adversarial", 0.5)):
                for measure, sign in (("loss", 1.0), ("accuracy", -0.1)):
                    mean = sign * size * 10**step / (k + 1)
                    half = abs(mean) / 2 if kind == "random" else np.nan
                    known = {"run": run, "measure": measure, "kind": kind, "eps_relative": eps, "mean": mean}
                    count = 20 if kind == "random" else 1
                    rows.append(known | {"low": mean - half, "high": mean + half, "draws": count, "images": 500})
    return pd.DataFrame(rows)


def layer_table(runs: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    rows = []
    for k, run in enumerate(runs):
        for layer in range(3):
            for kind, mean in (("random", 0.01 * (layer + 1)), ("adversarial", 1.0 * (layer + 1 + k))):
                ends = {"low": mean - 0.1, "high": mean + 0.2} if kind == "random" else {"low": np.nan, "high": np.nan}
                rows.append({"run": run, "scope": f"conv{layer}.weight", "kind": kind, "mean": mean} | ends)
    return pd.DataFrame(rows).assign(measure="loss", eps_relative=0.05, draws=20, images=500)


def line_table() -> pd.DataFrame:
    a = np.linspace(-1, 1, 5)
    both = [pd.DataFrame({"direction": d, "a": a, "loss": 1 + c * a**2}) for d, c in (("worst", 3.0), ("random", 0.1))]
    return pd.concat(both, ignore_index=True).assign(eps=0.7, images=500)


def plane_table(steepness: float = 1.0) -> pd.DataFrame:
    a, b = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 9)))
    return pd.DataFrame({"a": a, "b": b, "loss": 0.1 + steepness * (a**2 + 0.3 * b**2), "eps": 0.7, "images": 500})


def runs_table(count: int = 6) -> pd.DataFrame:
    k = np.arange(count)
    accuracy = 0.6 - 0.05 * k
    table = pd.DataFrame({"name": [f"digits/run-{j}" for j in k], "i_max": 0.5 * 2.0**k, "robust_accuracy": accuracy})
    return table.assign(low=accuracy - 0.04, high=accuracy + 0.03, images=500)


DRAW: dict[str, Callable[[], Figure]] = {
    "corruption_curves": lambda: figures.corruption_curves(sweep_table()),
    "corruption_layers": lambda: figures.corruption_layers(layer_table()),
    "loss_lines": lambda: figures.loss_lines(line_table()),
    "loss_surface": lambda: figures.loss_surface(plane_table()),
    "flatness": lambda: figures.flatness(runs_table(), "Undecided."),
}


@functools.cache
def drawn(name: str) -> Any:
    return DRAW[name]()


def words(figure: Figure) -> list[str]:
    root = ElementTree.fromstring(drawing.to_svg(figure))
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", DRAW)
def test_the_same_table_gives_the_same_bytes_whatever_the_users_style(name: str) -> None:
    svg = drawing.to_svg(drawn(name))
    with matplotlib.rc_context({"font.size": 31, "xtick.direction": "in", "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        assert svg == drawing.to_svg(DRAW[name]())
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", DRAW)
def test_captions_state_n_axes_are_named_and_no_formula_is_left_raw(name: str) -> None:
    figure = drawn(name)
    assert "n = 500" in str(figure.get_label())
    texts = words(figure)
    assert any("n = 500" in text for text in texts)
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel()
    assert not [text for text in texts if "$" in text or "\\" in text]


@pytest.mark.parametrize("name", DRAW)
def test_words_stay_in_the_figure_and_ticks_apart(name: str) -> None:
    figure = drawn(name)
    with drawing.style():
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        assert figure.bbox.padded(1).x0 <= figure.get_tightbbox(renderer).x0 * figure.dpi
        assert figure.get_tightbbox(renderer).x1 * figure.dpi <= figure.bbox.padded(1).x1
        for axes in figure.axes:
            for axis in (axes.yaxis, axes.xaxis)[: 1 + (axes is figure.axes[-1])]:
                labels = [label for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
                boxes = [label.get_window_extent(renderer) for label in labels]
                inside = [box for box in boxes if figure.bbox.contains(*box.p0) and figure.bbox.contains(*box.p1)]
                assert len(inside) >= 2
                assert all(box.count_overlaps(inside) == 1 for box in inside)


def test_pictures_need_neither_torch_nor_pyplot_nor_the_analyses() -> None:
    tree = ast.parse(Path(figures.__file__).read_text(encoding="utf-8"))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if "torch" in name or "pyplot" in name or "analyses" in name]


@pytest.mark.parametrize("name", DRAW)
def test_a_table_without_its_columns_or_rows_is_refused(name: str) -> None:
    draw = getattr(figures, name)
    with pytest.raises(UnmovedError, match=rf"{name}: expected a table with .* came none of"):
        draw(pd.DataFrame({"epoch": [1]}))
    whole = pd.concat([sweep_table(), layer_table(), line_table(), plane_table(), runs_table()])
    with pytest.raises(UnmovedError, match="came no row"):
        draw(whole.iloc[:0])


# --- curves


def test_the_curves_show_worst_and_random_changes_with_their_bands() -> None:
    table = sweep_table().sample(frac=1, random_state=0)  # order of rows must not matter but for the runs
    table = table.sort_values("run", ascending=False, kind="stable")
    figure = figures.corruption_curves(table)
    for axes, measure, scale in zip(figure.axes, ("loss", "accuracy"), (1, 100), strict=True):
        lines = {str(line.get_label()): line for line in axes.lines}
        for run in ("digits/plain", "digits/at"):
            for kind in ("random", "adversarial"):
                chosen = (table["run"] == run) & (table["kind"] == kind) & (table["measure"] == measure)
                rows = table[chosen].sort_values("eps_relative")
                expected = np.column_stack([rows["eps_relative"], scale * rows["mean"]])
                np.testing.assert_allclose(lines[f"{run} ({kind})"].get_xydata(), expected)
        bands = [path.get_extents() for band in axes.collections for path in band.get_paths()]
        rows = table.query("run == 'digits/at' and kind == 'random'").query(f"measure == '{measure}'")
        assert bands[1].y1 == pytest.approx(scale * rows["high"].max())
        assert bands[1].y0 == pytest.approx(scale * rows["low"].min())
    assert figure.axes[0].get_xscale() == "log"
    assert "mean of 20" in str(figure.get_label())


def test_curves_are_told_apart_without_colour() -> None:
    axes = drawn("corruption_curves").axes[0]
    looks = [
        (line.get_marker(), str(line._unscaled_dash_pattern), line.get_markerfacecolor() == drawing.PAPER)
        for line in axes.lines
        if " (" in str(line.get_label())
    ]
    assert len(looks) == len(set(looks)) == 4


def test_negative_and_huge_changes_have_room_and_few_ticks() -> None:
    table = sweep_table(("a",))
    table.loc[table["kind"] == "adversarial", "mean"] *= 1e5
    table.loc[table["kind"] == "random", "low"] -= 30
    (axes, _) = figures.corruption_curves(table).axes
    low, high = axes.get_ylim()
    assert low < -30
    assert high > 5e6
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 0 in ticks
    assert len(ticks) <= 15
    assert figures.corruption_curves(table[table["kind"] == "random"]).get_label()


def test_one_line_has_one_value_at_each_eps() -> None:
    with pytest.raises(UnmovedError, match=r"came .*'run': 'digits/plain'.* twice; choose one scope"):
        figures.corruption_curves(pd.concat([sweep_table(), sweep_table()]))


# --- layers


def test_bars_are_the_worst_changes_and_markers_the_random_means() -> None:
    table = layer_table()
    (axes,) = drawn("corruption_layers").axes
    bars = {c.get_label(): c for c in axes.containers if hasattr(c, "patches")}
    points = {c.get_label(): c for c in axes.containers if not hasattr(c, "patches")}
    for run in "ab":
        worst, random = (table[(table["run"] == run) & (table["kind"] == kind)] for kind in ("adversarial", "random"))
        assert [bar.get_width() for bar in bars[f"{run} (adversarial)"]] == pytest.approx(worst["mean"].tolist())
        marks = points[f"{run} (random mean)"]
        assert marks.lines[0].get_xdata().tolist() == pytest.approx(random["mean"].tolist())
        ends = np.array([segment[:, 0] for segment in marks.lines[2][0].get_segments()])
        np.testing.assert_allclose(ends, random[["low", "high"]])
    assert len({bar[0].get_hatch() for bar in bars.values()}) == 2
    assert [label.get_text() for label in axes.get_yticklabels()] == list(dict.fromkeys(table["scope"]))


def test_layers_need_one_eps_and_one_row_each() -> None:
    with pytest.raises(UnmovedError, match=r"expected one eps_relative, came \[0.05, 0.1\]"):
        figures.corruption_layers(pd.concat([layer_table(), layer_table().assign(eps_relative=0.1)]))
    with pytest.raises(UnmovedError, match="twice"):
        figures.corruption_layers(pd.concat([layer_table(), layer_table()]))
    both = pd.concat([layer_table(), layer_table().assign(measure="accuracy")])
    assert drawing.to_svg(figures.corruption_layers(both)) == drawing.to_svg(drawn("corruption_layers"))


# --- the surface


def test_lines_show_both_directions() -> None:
    lines = {str(line.get_label()): line for line in drawn("loss_lines").axes[0].lines}
    for name in ("worst", "random"):
        rows = line_table().query(f"direction == '{name}'")
        np.testing.assert_allclose(lines[f"{name} direction"].get_xydata(), rows[["a", "loss"]])
    assert "eps = 0.7" in str(drawn("loss_lines").get_label())


@pytest.mark.parametrize(("steepness", "said"), [(1.0, "closer at low loss"), (1e4, "evenly spaced in log(loss)")])
def test_the_surface_is_grey_darker_where_higher_and_its_lines_carry_their_values(steepness: float, said: str) -> None:
    table = plane_table(steepness).sample(frac=1, random_state=0)
    figure = figures.loss_surface(table)
    filled, lines = figure.axes[0].collections
    greys = [to_rgb(color) for color in filled.get_facecolors()]
    assert all(max(grey) - min(grey) < 1e-6 for grey in greys)
    assert [grey[0] for grey in greys] == sorted((grey[0] for grey in greys), reverse=True)
    assert min(grey[0] for grey in greys) > 0.4  # black words stay legible
    assert filled.levels[0] == table["loss"].min()
    assert filled.levels[-1] == table["loss"].max()
    np.testing.assert_allclose(lines.levels, filled.levels[1:-1])
    values = {float(text) for text in words(figure) if text.replace(".", "").replace("e+0", "").isdigit()}
    assert len(values & {float(f"{level:.3g}") for level in lines.levels}) >= 3
    assert said in str(figure.get_label())
    on_page = drawing.to_html(drawing.to_svg(figure), "s", "s")
    assert "#000000" in on_page or "stroke: #000" in on_page  # black on grey stays black on a dark page


def test_a_level_plain_is_drawn_and_a_grid_with_gaps_refused() -> None:
    assert len(figures.loss_surface(plane_table(0.0)).axes[0].collections) == 0
    with pytest.raises(UnmovedError, match="full grid"):
        figures.loss_surface(plane_table().iloc[1:])
    with pytest.raises(UnmovedError, match="full grid"):
        figures.loss_surface(plane_table().query("a == 0"))


# --- flatness and robustness


def test_the_scatter_shows_names_bars_and_what_the_correlation_says() -> None:
    figure, table = drawn("flatness"), runs_table()
    (axes,) = figure.axes
    marks = [container.lines[0].get_xydata()[0] for container in axes.containers]
    np.testing.assert_allclose(marks, np.column_stack([table["i_max"], 100 * table["robust_accuracy"]]))
    ends = [container.lines[2][0].get_segments()[0][:, 1] for container in axes.containers]
    np.testing.assert_allclose(ends, 100 * table[["low", "high"]])
    assert set(table["name"]) <= set(words(figure))
    assert axes.get_xscale() == "log"
    assert str(figure.get_label()).endswith("Undecided.")
    with drawing.style():
        boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
        places = axes.transData.transform(marks)
    assert all(box.count_overlaps(boxes[:k]) == 0 for k, box in enumerate(boxes))
    assert not [place for place in places for box in boxes if box.contains(*place)]


def test_long_names_go_to_a_legend_and_bars_are_optional() -> None:
    table = runs_table().drop(columns=["low", "high"])
    table.loc[0, "name"] = "x" * 40
    figure: Any = figures.flatness(table)
    assert not figure.axes[0].texts
    assert len(figure.legends[0].get_texts()) == 6
    assert "bars" not in " ".join(words(figure))
    with pytest.raises(UnmovedError, match="i_max above 0"):
        figures.flatness(runs_table().assign(i_max=0.0))


@pytest.mark.parametrize("factor", [1.001, 1.05, 1.6, 2.0, 3.0, 40.0])
def test_a_log_axis_has_plain_numbers_on_every_range(factor: float) -> None:
    figure = figures.flatness(runs_table(2).assign(i_max=[0.7, 0.7 * factor]))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2
    assert not [text for text in words(figure) if "$" in text]


def test_of_many_runs_the_flattest_or_most_robust_are_shown_and_the_others_counted() -> None:
    runs = tuple(f"m{k}" for k in range(40))  # the later, the flatter
    curves = figures.corruption_curves(sweep_table(runs))
    said = [text.get_text() for text in curves.legends[0].get_texts()]
    named = {f"m{k} ({kind})" for k in range(28, 40) for kind in ("adversarial", "random")}
    assert set(said) == named | {"28 other runs"}
    assert "28 other runs" in str(curves.get_label())
    layers = figures.corruption_layers(layer_table(runs))  # the earlier, the flatter
    said = [text.get_text() for text in layers.legends[0].get_texts()]
    assert set(said) == {f"m{k} ({kind})" for k in range(12) for kind in ("adversarial", "random mean")}
    assert "28 runs" in str(layers.get_label())
    scatter = figures.flatness(runs_table(40).assign(i_max=0.5 + np.arange(40)), "Undecided.")
    said = [text.get_text() for text in scatter.legends[0].get_texts()]
    assert set(said) == {f"digits/run-{k}" for k in range(12)} | {"28 other runs"}
    assert "28 other runs" in str(scatter.get_label())
    (grey,) = [line for line in scatter.axes[0].lines if line.get_label() == "28 other runs"]
    assert np.isfinite(grey.get_xdata()).sum() == 28
