"""Figures of the softmax analysis: they show their tables, with the n, in black and white too."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from unmoved.analyses.studies import softmax_figures
from unmoved.core.errors import UnmovedError
from unmoved.reports import drawing

STATISTICS = ("variance", "std", "entropy", "gap", "p_true", "margin")


def within_table(runs: tuple[str, ...] = ("digits/plain", "digits/drsl", "digits/at")) -> pd.DataFrame:
    rows = []
    for k, run in enumerate(runs):
        for view in ("clean", "adversarial"):
            for measure in ("AUC", "Spearman"):
                for j, statistic in enumerate(STATISTICS):
                    value = 0.3 + 0.1 * j + 0.02 * k - 0.5 * (view == "adversarial") * (measure == "Spearman")
                    row = {"run": run, "view": view, "measure": measure, "statistic": statistic, "value": value}
                    rows.append(row | {"low": value - 0.03, "high": value + 0.05, "n": 200 + k})
    return pd.DataFrame(rows)


def landing_table(runs: tuple[str, ...] = ("a", "b"), ranks: int = 9) -> pd.DataFrame:
    rows = [
        {"run": run, "rank": r, "share": s, "low": 0.8 * s, "high": min(1, 1.2 * s + 0.02), "n": 80 + k}
        for k, run in enumerate(runs)
        for r, s in enumerate(np.full(ranks, 0.4 - 0.05 * k) ** np.arange(1, ranks + 1), start=1)
    ]
    return pd.DataFrame(rows).assign(uniform=1 / ranks)


def summary_table(names: tuple[str, ...] = ("plain", "drsl", "at", "trades")) -> pd.DataFrame:
    n = len(names)
    table = pd.DataFrame({"run": names, "n": 500, "clean_accuracy": 0.9 - 0.01 * np.arange(n)})
    table["robust_accuracy"] = 0.2 + 0.1 * np.arange(n)
    return table.assign(**{name: 5.0 - np.arange(n) + k for k, name in enumerate(STATISTICS)})


def correlation_table(low: float = -1.0) -> pd.DataFrame:
    rows = [
        {"statistic": s, "against": a, "measure": m, "value": -0.75, "low": low, "high": low + 0.5, "n": 4}
        for s in STATISTICS
        for a in ("robust accuracy", "clean accuracy")
        for m in ("Pearson", "Spearman")
    ]
    return pd.DataFrame(rows)


DRAW: dict[str, Callable[[], Figure]] = {
    "within": lambda: softmax_figures.within(within_table()),
    "within, Spearman": lambda: softmax_figures.within(within_table(), view="adversarial", measure="Spearman"),
    "landings": lambda: softmax_figures.landings(landing_table(("a", "b", "c", "d"))),
    "landings, one": lambda: softmax_figures.landings(landing_table(("a run with quite a long name of its own",), 99)),
    "across": lambda: softmax_figures.across(summary_table(), correlation_table()),
    "across, clean": lambda: softmax_figures.across(summary_table(), statistic="entropy", against="clean_accuracy"),
}


@functools.cache
def drawn(name: str) -> Figure:
    return DRAW[name]()


def words(figure: Figure) -> str:
    root = ElementTree.fromstring(drawing.to_svg(figure))
    return "\n".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))


@pytest.mark.parametrize("name", DRAW)
def test_the_same_table_gives_the_same_bytes_whatever_the_users_style(name: str) -> None:
    svg = drawing.to_svg(drawn(name))
    with matplotlib.rc_context({"font.size": 31, "svg.hashsalt": "other"}):
        assert svg == drawing.to_svg(DRAW[name]())


@pytest.mark.parametrize("name", DRAW)
def test_n_stands_in_the_caption_and_in_the_picture(name: str) -> None:
    figure = drawn(name)
    assert "n = " in str(figure.get_label())
    assert "n = " in words(figure)


@pytest.mark.parametrize("name", DRAW)
def test_nothing_written_leaves_the_page(name: str) -> None:
    figure = drawn(name)
    page, renderer = figure.bbox, figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts)]
    texts += [text for text in (figure._supxlabel, figure._supylabel) if text is not None]  # type: ignore[attr-defined]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for text in texts:
        box = Text.get_window_extent(text, renderer)  # of an annotation without its arrow
        if text.get_text():
            assert box.x0 >= page.x0 - 1, text.get_text()
            assert box.x1 <= page.x1 + 1, text.get_text()
            assert box.y0 >= page.y0 - 1, text.get_text()
            assert box.y1 <= page.y1 + 1, text.get_text()


def test_figures_need_neither_torch_nor_pyplot_nor_the_analyses() -> None:
    tree = ast.parse(Path(softmax_figures.__file__).read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [n for n in names if n.split(".")[0] == "torch" or "pyplot" in n or "analyses" in n]


def test_the_forest_shows_its_view_and_measure() -> None:
    table = within_table()
    for view, measure, chance in (("clean", "AUC", 0.5), ("adversarial", "Spearman", 0.0)):
        figure = softmax_figures.within(table, view=view, measure=measure)
        (axes,) = figure.axes
        rows = table[(table["view"] == view) & (table["measure"] == measure)]
        heights = []
        for container, (_, some) in zip(axes.containers, rows.groupby("run", sort=False), strict=True):
            marker, _, (bars,) = container.lines
            np.testing.assert_allclose(marker.get_xdata(), some["value"])
            ends = np.array([segment[:, 0] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, some[["low", "high"]])
            heights += list(marker.get_ydata())
        assert len({round(h, 6) for h in heights}) == len(heights)  # no two intervals in one lane
        assert chance in [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert {"digits/plain", "digits/drsl", "digits/at", "margin"} <= set(words(figure).split("\n"))
        markers = {container.lines[0].get_marker() for container in axes.containers}
        assert len(markers) == 3
        assert view in axes.get_ylabel()


def test_the_forest_leaves_a_gap_where_nothing_is_known() -> None:
    table = within_table(("a", "b"))
    unknown = (table["statistic"] == "gap") & (table["run"] == "a")
    table.loc[unknown, ["value", "low", "high"]] = np.nan
    table.loc[(table["statistic"] == "std") & (table["run"] == "a"), ["low", "high"]] = np.nan
    (axes,) = softmax_figures.within(table).axes
    values = axes.containers[0].lines[0].get_xdata()
    assert np.isnan(values).tolist() == [False, False, False, True, False, False]
    segments = [s[:, 0] for s in axes.containers[0].lines[2][0].get_segments() if len(s)]
    assert any(s[0] == s[1] == values[1] for s in segments)


def test_of_many_runs_the_forest_tells_the_foremost_apart_and_counts_the_others() -> None:
    names = tuple(f"m{k}" for k in range(40))
    table = within_table(names)
    figure = softmax_figures.within(table, foremost_runs=names[-12:])
    (axes,) = figure.axes
    looked = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
    assert [c.get_label() for c in axes.containers] == list(names[-12:])
    assert len(looked) == 12
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(said) == {*names[-12:], "28 other runs"}
    assert "28 other runs" in str(figure.get_label())
    (grey,) = (line for line in axes.lines if line.get_label() == "28 other runs")
    rows = table[(table["view"] == "clean") & (table["measure"] == "AUC") & table["run"].isin(names[:-12])]
    assert sorted(grey.get_xdata()[np.isfinite(grey.get_xdata())]) == pytest.approx(sorted(rows["value"]))
    taken = np.concatenate([c.lines[0].get_ydata() for c in axes.containers])
    assert not np.isclose(np.asarray(grey.get_ydata())[:, None], taken).any(), "in a lane of their own"
    first = softmax_figures.within(table)
    assert [c.get_label() for c in first.axes[0].containers] == list(names[:12])


def test_landings_show_shares_intervals_and_uniform() -> None:
    table = landing_table(("a", "b"))
    figure = softmax_figures.landings(table)
    for axes, (run, rows) in zip(figure.axes, table.groupby("run"), strict=True):
        assert axes.get_title().split("\n") == [run, f"n = {rows['n'].iloc[0]}"]
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], 100 * rows["share"])
        errors = axes.containers[1].lines[2][0].get_segments()
        np.testing.assert_allclose([s[:, 1] for s in errors], 100 * rows[["low", "high"]])
        assert any(np.allclose(line.get_ydata(), 100 / 9) for line in axes.lines)


def test_landings_of_many_classes_say_how_many_are_drawn() -> None:
    figure = softmax_figures.landings(landing_table(("a",), 99))
    assert len(figure.axes[0].patches) == 20
    assert "the first 20 of 99 ranks" in str(figure.get_label())
    assert "the first 20 of 99 ranks" in words(figure)


def test_a_run_where_nothing_fell_is_named_and_not_drawn() -> None:
    table = landing_table(("a", "b"))
    table.loc[table["run"] == "b", ["share", "low", "high"]] = np.nan
    figure = softmax_figures.landings(table)
    assert len(figure.axes) == 1
    assert "No image fell in: b." in str(figure.get_label())
    with pytest.raises(UnmovedError, match="an attack succeeded"):
        softmax_figures.landings(table[table["run"] == "b"])


def test_across_names_each_run_and_says_the_correlations() -> None:
    table = summary_table()
    figure = softmax_figures.across(table, correlation_table(), statistic="gap")
    (axes,) = figure.axes
    points = np.array([line.get_xydata()[0] for line in axes.lines])
    np.testing.assert_allclose(points, np.column_stack([table["gap"], 100 * table["robust_accuracy"]]))
    assert set(table["run"]) <= set(words(figure).split("\n"))
    assert "Pearson -0.75 [-1.00, -0.50]" in words(figure)
    assert "Spearman -0.75" in str(figure.get_label())
    assert axes.get_ylabel() == "robust accuracy (%)"
    assert "nats" in axes.get_xlabel()
    without = softmax_figures.across(table, correlation_table(np.nan))
    assert "Pearson -0.75" in words(without)
    assert "[" not in words(without)
    long = softmax_figures.across(summary_table(("a" * 30, "b" * 30)))
    assert "a" * 30 in words(long)


@pytest.mark.parametrize("draw", [softmax_figures.within, softmax_figures.landings, softmax_figures.across])
def test_a_table_without_its_columns_or_rows_is_refused(draw: Callable[[pd.DataFrame], Figure]) -> None:
    with pytest.raises(UnmovedError, match=f"{draw.__name__}: expected a table with .* came none of"):
        draw(pd.DataFrame({"epoch": [1]}))
    full = pd.concat([within_table(), landing_table(), summary_table()])
    with pytest.raises(UnmovedError, match="came no row"):
        draw(full.iloc[:0])


def test_a_view_or_a_correlation_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnmovedError, match=r"view 'dark', measure 'AUC'.* no row"):
        softmax_figures.within(within_table(), view="dark")
    with pytest.raises(UnmovedError, match="none of variance"):
        softmax_figures.across(summary_table().drop(columns="variance"))
    with pytest.raises(UnmovedError, match=r"correlations: .* none of low"):
        softmax_figures.across(summary_table(), correlation_table().drop(columns="low"))


def test_of_many_runs_the_most_accurate_are_named_and_the_others_counted() -> None:
    table = summary_table(tuple(f"m{k}" for k in range(40))).assign(robust_accuracy=0.2 + 0.01 * np.arange(40))
    figure = softmax_figures.across(table)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(said) == {f"m{k}" for k in range(28, 40)} | {"28 other runs"}
    assert "28 other runs" in str(figure.get_label())
    assert "28 other runs" in words(figure)
    assert not figure.axes[0].texts
