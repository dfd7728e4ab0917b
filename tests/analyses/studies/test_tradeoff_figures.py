"""The front's picture: the staircase, hollow points, names or a legend, and the same bytes each time."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D

from unmoved.analyses.studies import tradeoff_figures
from unmoved.analyses.studies.tradeoff_figures import pareto
from unmoved.core.errors import UnmovedError
from unmoved.reports import drawing


def points(count: int = 2) -> pd.DataFrame:
    """``count`` settings of each of two methods and one setting without a strength, below the front."""
    rows = [("trades", k, 0.88 - 0.02 * k, 0.40 + 0.02 * k, True) for k in range(count)]
    rows += [("mart", k, 0.80 - 0.02 * k, 0.46 + 0.005 * k, k > 0) for k in range(count)]
    rows += [("at", np.nan, 0.75, 0.38, False)]
    table = pd.DataFrame(rows, columns=["method", "strength", "clean", "robust", "on_front"])
    for name, half in (("clean", 0.02), ("robust", 0.015)):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - half, table[name] + 1.5 * half
    return table.assign(n=1000)


def marks(axes: Any) -> list[Line2D]:
    return [
        line for line in axes.lines if line.get_marker() != "None" and line.get_marker() != "" and len(line.get_xdata())
    ]


def test_the_staircase_is_the_front_and_only_points_on_it_are_filled() -> None:
    table = points().sample(frac=1, random_state=0)  # the order of rows chooses no more than the colours
    (axes,) = pareto(table).axes
    front = table[table["on_front"]].sort_values("clean")
    x, y = 100 * front["clean"].to_numpy(), 100 * front["robust"].to_numpy()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    steps = [line for line in axes.lines if line.get_color() in (drawing.INK, drawing.GRID)]
    corners = [(left, y[0]), (x[0], y[0]), (x[0], y[1]), (x[1], y[1]), (x[1], y[2]), (x[2], y[2]), (x[2], bottom)]
    assert len(steps) == 2  # a thin line on a band
    for line in steps:
        np.testing.assert_allclose(line.get_xydata(), corners)
    for line in marks(axes):
        hollow = to_rgba(line.get_markerfacecolor()) == to_rgba(drawing.PAPER)
        for place in line.get_xydata():
            row = table[np.isclose(100 * table["clean"], place[0]) & np.isclose(100 * table["robust"], place[1])]
            assert row["on_front"].tolist() == [not hollow]
    assert sum(len(line.get_xdata()) for line in marks(axes)) == len(table)
    assert left < 73 < 91 < right
    assert bottom < 36 < 49 < top


def test_each_method_has_a_line_in_the_order_of_its_strengths_and_its_own_marker() -> None:
    table = points(3).sample(frac=1, random_state=1)
    (axes,) = pareto(table).axes
    curves = [line for line in axes.lines[:-2] if line.get_marker() in ("", "None") and line.get_linestyle() != "None"]
    assert len(curves) == 3
    for line, (_, rows) in zip(curves, table.groupby("method", sort=False), strict=True):
        rows = rows.sort_values("strength")
        np.testing.assert_allclose(line.get_xydata(), 100 * rows[["clean", "robust"]].to_numpy())
    assert len({line.get_linestyle() for line in curves}) == len({str(line.get_marker()) for line in marks(axes)}) == 3


def test_bars_are_the_intervals_and_missing_ones_are_said() -> None:
    (axes,) = (figure := pareto(points())).axes
    bars = [segment for container in axes.containers for part in container.lines[2] for segment in part.get_segments()]
    ends = sorted((round(float(bar[0, 0]), 6), round(float(bar[1, 0]), 6)) for bar in bars if bar[0, 1] == bar[1, 1])
    expected = sorted((round(100 * row.clean_low, 6), round(100 * row.clean_high, 6)) for row in points().itertuples())
    assert ends == expected
    assert len(bars) == 10
    assert "bars: 95 % bootstrap intervals" in str(figure.get_label())
    bare = points().assign(**dict.fromkeys(["clean_low", "clean_high", "robust_low", "robust_high"], np.nan))
    figure = pareto(bare)
    assert "no intervals" in str(figure.get_label())
    assert not [s for c in figure.axes[0].containers for part in c.lines[2] for s in part.get_segments()]


def test_few_points_are_named_where_they_are_and_many_have_a_legend() -> None:
    figure: Any = pareto(points())
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"trades 0", "trades 1", "mart 0", "mart 1", "at"}
    assert not figure.legends
    with drawing.style():
        figure.draw_without_rendering()
        boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
    assert all(box.count_overlaps(boxes[:k]) == 0 for k, box in enumerate(boxes))
    for many in (points(4), points().replace({"method": {"at": "x" * 25}})):
        figure = pareto(many)
        assert not figure.axes[0].texts
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == list(many["method"].unique())
        keys = legend.legend_handles
        assert len({(key.get_marker(), key.get_linestyle()) for key in keys}) == 3


def test_the_same_table_gives_the_same_bytes_and_says_its_n() -> None:
    for table in (points(), points(5)):
        figure, svg = pareto(table), drawing.to_svg(pareto(table))
        assert svg == drawing.to_svg(figure) == drawing.to_svg(figure)
        assert "n = 1000 test images" in svg
        assert "n = 1000 test images" in str(figure.get_label())
        assert "clean accuracy (%)" in svg
        with drawing.style():
            width = figure.bbox.width
            assert all(text.get_window_extent().x1 <= width for text in (figure._supxlabel, *figure.legends))  # type: ignore[attr-defined]


def test_a_table_without_its_columns_or_rows_is_refused() -> None:
    with pytest.raises(UnmovedError, match="none of clean_low"):
        pareto(points().drop(columns="clean_low"))
    with pytest.raises(UnmovedError, match="no row"):
        pareto(points().iloc[:0])


@pytest.mark.parametrize("name", ["tradeoff", "bias_variance"])
def test_the_figure_needs_neither_torch_nor_an_analysis(name: str) -> None:
    source = (Path(tradeoff_figures.__file__).parent / f"{name}_figures.py").read_text(encoding="utf-8")
    names = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names += [
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    ]
    assert "pandas" in names
    rooms = ("torch", "matplotlib.pyplot", "unmoved.evaluation", "unmoved.attacks")
    assert not [name for name in names if name.startswith(rooms)]


def test_of_many_methods_those_on_the_front_and_the_most_robust_have_a_look_of_their_own() -> None:
    k = np.arange(40)
    table = pd.DataFrame({"method": [f"m{j}" for j in k], "strength": np.nan, "clean": 0.9 - 0.01 * k, "n": 100})
    table["robust"], table["on_front"] = np.where(k == 0, 0.2, 0.1 + 0.002 * k), k == 0
    for name in ("clean", "robust"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.02, table[name] + 0.02
    figure = pareto(table)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(said) == {"m0", *(f"m{j}" for j in range(29, 40)), "28 other methods"}
    assert "28 other methods" in str(figure.get_label())
    assert sum(len(line.get_xdata()) for line in marks(figure.axes[0])) >= 40
