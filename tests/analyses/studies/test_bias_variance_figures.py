"""Pictures of decompositions: every number of the table is where it should be, and nothing is drawn twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from unmoved.analyses.studies.bias_variance_figures import MEASURES, bias_variance, bias_variance_by_class
from unmoved.core.errors import UnmovedError
from unmoved.reports import drawing

CONDITIONS = (0.0, 0.1, 0.2, 0.3)


def table(conditions: tuple[float, ...] = CONDITIONS[:2], classes: int = 0, permutations: int = 1) -> pd.DataFrame:
    rows = []
    for where in conditions:
        for eps in (0.2, 0.0, 0.1):
            for label in range(-1, classes):
                bias, variance = 0.5 + eps + where + 0.01 * label, 0.2 - (eps - 0.1) ** 2
                row: dict[str, Any] = {"train_eps": eps, "eval_eps": where, "loss": "KL", "correction": "k/(k-1)"}
                row |= {"class": label, "k": 3, "n": 900 if label < 0 else 90 + label}
                for name, value in (("risk", bias + variance), ("bias", bias), ("variance", variance)):
                    row |= {name: value, f"{name}_low": value - 0.02, f"{name}_high": value + 0.03}
                    if permutations > 1:
                        row |= {f"{name}_std": 0.05, "permutations": permutations}
                rows.append(row)
    return pd.DataFrame(rows)


def text(figure: Any) -> str:
    return " ".join(str(figure._supxlabel.get_text()).split())


def test_each_panel_shows_its_lines_and_bands() -> None:
    rows = table()
    figure = bias_variance(pd.concat([rows, rows.assign(correction="plug-in", bias=9.0)]))
    assert [axes.get_title() for axes in figure.axes] == ["attacked with eps = 0", "attacked with eps = 0.1"]
    for axes, (_, some) in zip(figure.axes, rows.groupby("eval_eps"), strict=True):
        some = some.sort_values("train_eps")
        lines = {container.get_label(): container.lines[0] for container in axes.containers}
        assert list(lines) == ["risk", "bias", "variance"]
        for name, line in lines.items():
            np.testing.assert_allclose(line.get_xydata(), some[["train_eps", name]])
        bands = [c for c in axes.collections if type(c).__name__ == "FillBetweenPolyCollection"]
        for name, band in zip(lines, bands, strict=True):
            heights = band.get_paths()[0].vertices[:, 1]
            assert (heights.min(), heights.max()) == pytest.approx(
                (some[f"{name}_low"].min(), some[f"{name}_high"].max())
            )
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 3
    assert figure.axes[0].get_ylabel() == "mean over the images\ncross-entropy (nats)"
    assert [name.get_text() for name in figure.legends[0].get_texts()] == list(MEASURES)


def test_five_panels_take_two_rows_and_the_empty_place_stays_empty() -> None:
    figure = bias_variance(table((*CONDITIONS, 0.4)))
    seen = [axes for axes in figure.axes if axes.get_visible()]
    assert (len(figure.axes), len(seen)) == (6, 5)
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", *["eps in training"] * 3, ""]
    assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in seen[2:])


def test_another_column_or_none_may_make_the_panels() -> None:
    modes = pd.concat([table((0.1,)).assign(mode=mode) for mode in ("each", "shared", "joint")])
    figure = bias_variance(modes, panel="mode")
    assert [axes.get_title() for axes in figure.axes] == ["attack: each", "attack: shared", "attack: joint"]
    (axes,) = bias_variance(table((0.1,)).drop(columns="eval_eps")).axes
    assert axes.get_title() == ""


def test_the_spread_over_permutations_is_drawn_and_said() -> None:
    figure = bias_variance(table(permutations=4))
    container = next(c for c in figure.axes[0].containers if c.get_label() == "bias")
    for bar, (_, row) in zip(
        container.lines[2][0].get_segments(), table((0.0,)).sort_values("train_eps").iterrows(), strict=True
    ):
        np.testing.assert_allclose(bar[:, 1], [row["bias"] - 0.05, row["bias"] + 0.05])
    assert "3 models from each of 4 splits" in text(figure)
    assert "bars: spread" in text(figure)
    assert "bars" not in text(bias_variance(table()))
    one = table().assign(permutations=1, **{f"{name}_std": np.nan for name in MEASURES})
    assert "bars" not in text(bias_variance(one))


def test_classes_have_two_bars_each_with_intervals() -> None:
    rows = table((0.1,), classes=4)
    rows = rows[rows["train_eps"] == 0.1]
    figure = bias_variance_by_class(rows.sample(frac=1, random_state=0), ["cat", "dog"])
    (axes,) = figure.axes
    own = rows[rows["class"] >= 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "2", "3"]
    drawn = {c.get_label(): c for c in axes.containers if c.get_label() in MEASURES}
    for name, bars in drawn.items():
        np.testing.assert_allclose([bar.get_width() for bar in bars], own[name])
    assert len({bars[0].get_hatch() for bars in drawn.values()}) == 2
    intervals = [c.lines[2][0].get_segments() for c in axes.containers if c.get_label() not in MEASURES]
    for name, segments in zip(drawn, intervals, strict=True):
        np.testing.assert_allclose([s[:, 0] for s in segments], own[[f"{name}_low", f"{name}_high"]])
    assert "n = 90 to 93 test images per class" in text(figure)
    few = bias_variance_by_class(rows, most=2)
    assert [label.get_text() for label in few.axes[0].get_yticklabels()] == ["2", "3"]  # of highest risk
    assert "the 2 of highest risk of 4" in text(few)
    bare = rows.assign(bias_low=np.nan, bias_high=np.nan)
    assert len(bias_variance_by_class(bare).axes[0].containers) == 3
    for name in MEASURES:
        bare[[f"{name}_low", f"{name}_high"]] = np.nan
    for figure in (bias_variance_by_class(bare), bias_variance(bare)):
        assert "no intervals" in text(figure)
        assert "no intervals" in str(figure.get_label())


@pytest.mark.parametrize("by_class", [False, True])
def test_bytes_captions_and_frames(by_class: bool) -> None:
    rows = table((0.1,), classes=3, permutations=2)
    rows = rows[rows["train_eps"] == 0.1] if by_class else rows
    draw = bias_variance_by_class if by_class else bias_variance
    figure: Any = draw(rows)
    assert drawing.to_svg(figure) == drawing.to_svg(draw(rows)) == drawing.to_svg(figure)
    caption = str(figure.get_label())
    assert "n = 9" in caption
    assert "n = 9" in text(figure)
    assert "k/(k-1)" in caption
    with drawing.style():
        figure.draw_without_rendering()
        for written in (figure._supxlabel, figure.axes[0].yaxis.label, figure.axes[0].xaxis.label, *figure.legends):
            box = written.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height


def test_bad_tables_are_refused() -> None:
    rows = table(classes=2)
    with pytest.raises(UnmovedError, match="none of train_eps"):
        bias_variance(rows.drop(columns="train_eps"))
    with pytest.raises(UnmovedError, match=r"came only \[\('KL', 'k/\(k-1\)'\)\]"):
        bias_variance(rows, loss="squared error")
    with pytest.raises(UnmovedError, match="no row"):
        bias_variance(rows[rows["class"] >= 0])
    with pytest.raises(UnmovedError, match="several for 0; merge"):
        bias_variance(pd.concat([rows, rows[rows["train_eps"] == 0]]))
    with pytest.raises(UnmovedError, match="one row for each class"):
        bias_variance_by_class(rows)
    with pytest.raises(UnmovedError, match="no row"):
        bias_variance_by_class(rows[rows["class"] < 0])
