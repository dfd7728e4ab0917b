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

from unmoved.core.errors import UnmovedError
from unmoved.reports import drawing, figures
from unmoved.reports.figures import breakdown, runs


def tradeoff_table(names: tuple[str, ...] = ("digits/plain", "digits/at"), seeds: int = 1) -> pd.DataFrame:
    rows = [
        {"recipe": name, "seed": seed, "measure": measure, "n": 200}
        | {"accuracy": base + seed / 100, "low": base - 0.03 - seed / 200, "high": base + 0.05 + seed / 100}
        for k, name in enumerate(names)
        for seed in range(seeds)
        for measure, base in (("clean", 0.9 - 0.02 * k), ("worst case", 0.1 + 0.04 * k))
    ]
    return pd.DataFrame(rows)


def curve_table() -> pd.DataFrame:
    eps = np.linspace(0, 0.3, 4)
    one = pd.DataFrame({"eps": eps, "accuracy": 0.9 - 2 * eps, "low": 0.85 - 2 * eps, "high": 0.95 - 2 * eps})
    return pd.concat([one.assign(recipe=name, attack="pgd", n=50) for name in ("a", "b")])


def metrics_table() -> pd.DataFrame:
    robust = [0.2, 0.5, 0.5, 0.3]  # best at epoch 3, then robust overfitting
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4],
            "train_accuracy": [0.3, 0.6, 0.7, 0.8],
            "validation_clean": [0.5, 0.6, 0.7, 0.75],
            "validation_robust": robust,
            "validation_n": 40,
        }
    )


def class_table(count: int = 3) -> pd.DataFrame:
    rows = [
        {"class": k, "measure": measure, "accuracy": value, "low": value - 0.1, "high": value + 0.1, "n": 20 + k}
        for k in range(count)
        for measure, value in (("clean", 0.85), ("worst case", 0.2 + 0.6 * k / count))
    ]
    return pd.DataFrame(rows)


def broken_table() -> pd.DataFrame:
    lost = [("clean", -1.0, 0.25), ("apgd-ce", 0.0, 0.4), ("fab-t", 5.0, 0.05), ("none", np.inf, 0.3)]
    rows = [{"recipe": "a", "source": "AutoAttack", "by": b, "place": p, "share": s, "n": 40} for b, p, s in lost]
    return pd.DataFrame([*rows, {"recipe": "b", "source": "quick", "by": "none", "place": np.inf, "share": 1, "n": 90}])


def pictures(channels: int = 1, size: float = 0.1, count: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.8, (count, channels, 6, 6)).astype(np.float32)
    return {
        "x": x,
        "x_adv": x + np.float32(size) * rng.choice([-1, 1], x.shape).astype(np.float32),
        "label": np.arange(count),
        "clean_prediction": np.arange(count),
        "adversarial_prediction": np.array([2] * count),
        "attack": np.array(["pgd"] * count),
    }


DRAW: dict[str, Callable[[], Figure]] = {
    "tradeoff": lambda: figures.tradeoff(tradeoff_table(seeds=3)),
    "robustness_curve": lambda: figures.robustness_curve(curve_table(), norm="linf", eps=0.15),
    "training_curves": lambda: figures.training_curves(metrics_table()),
    "per_class": lambda: figures.per_class(class_table(), ["cat", "dog", "ship"]),
    "gallery": lambda: figures.gallery(pictures(), ["cat", "dog", "ship"]),
    "breakdown": lambda: breakdown(broken_table()),
}


@functools.cache
def drawn(name: str) -> Figure:
    return DRAW[name]()


def words(figure: Figure) -> list[str]:
    root = ElementTree.fromstring(drawing.to_svg(figure))
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


# --- what holds for every figure


@pytest.mark.parametrize("name", DRAW)
def test_the_same_table_gives_the_same_bytes_whatever_the_users_style(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    svg = drawing.to_svg(drawn(name))
    assert svg == drawing.to_svg(drawn(name))
    assert "<metadata" not in svg
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with matplotlib.rc_context({"font.size": 31, "xtick.direction": "in", "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        assert svg == drawing.to_svg(DRAW[name]())
        assert dict(matplotlib.rcParams) == before  # and the user's style is left as it was


@pytest.mark.parametrize("name", DRAW)
def test_captions_state_n_and_axes_are_named_with_units(name: str) -> None:
    figure = drawn(name)
    if name == "gallery":
        assert str(figure.get_label()).startswith("3 test images")
        return
    assert "n = " in str(figure.get_label())
    assert any("n = " in text for text in words(figure))  # in the picture too: it may stand alone
    (axes,) = figure.axes
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert "(%)" in axes.get_xlabel() + axes.get_ylabel()


PICTURES = Path(figures.__file__).parent
ROOMS = [*PICTURES.glob("*.py")] + [
    PICTURES.parents[1] / path
    for path in (
        "evaluation/outcomes.py",
        "reports/drawing.py",
        "reports/pages.py",
        "reports/report.py",
        "runs/by_recipe.py",
        "runs/evaluated.py",
    )
]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_pictures_of_tables_need_neither_torch_nor_pyplot(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    imported = [
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    ]
    imported += [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert imported
    assert not [name for name in imported if name.split(".")[0] == "torch" or "pyplot" in name]


@pytest.mark.parametrize(
    "draw", [figures.tradeoff, figures.robustness_curve, figures.training_curves, figures.per_class, breakdown]
)
def test_a_table_without_its_columns_or_rows_is_refused(draw: Callable[[pd.DataFrame], Figure]) -> None:
    with pytest.raises(UnmovedError, match=f"{draw.__name__}: expected a table with .* came none of"):
        draw(pd.DataFrame({"epoch": [1]}))
    full = pd.concat([tradeoff_table(), curve_table(), metrics_table(), class_table(), broken_table()])
    with pytest.raises(UnmovedError, match="came no row"):
        draw(full.iloc[:0])


def test_a_missing_measure_is_refused() -> None:
    for draw, table in ((figures.tradeoff, tradeoff_table()), (figures.per_class, class_table())):
        with pytest.raises(UnmovedError, match=r"none of .'worst case'"):
            draw(table[table["measure"] == "clean"])


# --- telling series apart


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_series_differ_in_colour_and_without_colour() -> None:
    looks = [drawing.look(k) for k in range(40)]
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == 40
    assert len({look["marker"] for look in looks[: drawing.MOST]}) == drawing.MOST
    clean, worst = runs.MEASURES.values()
    assert clean["marker"] != worst["marker"]
    assert clean["linestyle"] != worst["linestyle"]


# Linear RGB as the colour-blind see it (Machado et al. 2009, severity 1): protanopia, deuteranopia, tritanopia.
SIGHTS = {
    "ordinary": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_twelve_recipes_have_twelve_colours_in_the_eyes_of_the_colour_blind_too(sight: str) -> None:
    """Any two lie 15 units of CIELAB (1976) apart, where 2 are seen side by side; and none is the ink's."""
    rgb = np.array([to_rgb(color) for color in (*drawing.COLOURS, drawing.INK)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHTS[sight]).T, 0, 1)
    xyz = seen @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1e3 * np.eye(len(lab))
    assert len(lab) == 13
    assert apart.min() > 15


def test_a_recipe_has_one_look_in_all_pictures_and_shares_it_with_its_seeds_alone() -> None:
    runs_of = ["at seed 0", "at seed 1", "mart seed 0"]
    ours = drawing.looks(runs_of)
    assert ours["at seed 0"] == ours["at seed 1"] == drawing.looks(["at", "mart"])["at"]
    assert ours["mart seed 0"]["color"] != ours["at seed 0"]["color"]
    many = [f"m{k}" for k in range(40)]
    told = drawing.looks(many, many[20:32])  # where there are too many, those that are told apart have the colours
    assert len({look["color"] for look in told.values()}) == drawing.MOST == len(told)


def test_names_lose_a_folder_that_all_share() -> None:
    assert drawing.short_names(["digits/at", "digits/mart"]) == {"digits/at": "at", "digits/mart": "mart"}
    for names in (["digits/at", "mnist/at"], ["digits/at"], ["digits/at", "mart"]):
        assert drawing.short_names(names) == {name: name for name in names}


# --- each figure shows its table


def test_tradeoff_shows_means_hulls_names_and_single_seeds() -> None:
    table = tradeoff_table(seeds=3)
    (axes,) = (figure := figures.tradeoff(table)).axes
    assert {"plain", "at"} <= set(words(figure))
    faint = [line for line in axes.lines if line.get_alpha() == 0.35]
    strong = [container.lines[0] for container in axes.containers]
    for k, (_, rows) in enumerate(table.groupby("recipe", sort=False)):
        clean, worst = (rows[rows["measure"] == name] for name in ("clean", "worst case"))
        np.testing.assert_allclose(faint[k].get_xydata(), 100 * np.column_stack([clean["accuracy"], worst["accuracy"]]))
        np.testing.assert_allclose(
            strong[k].get_xydata(), 100 * np.array([[clean["accuracy"].mean(), worst["accuracy"].mean()]])
        )
        along_x, along_y = (bars.get_segments()[0] for bars in axes.containers[k].lines[2])
        np.testing.assert_allclose(along_x[:, 0], [100 * clean["low"].min(), 100 * clean["high"].max()])
        np.testing.assert_allclose(along_y[:, 1], [100 * worst["low"].min(), 100 * worst["high"].max()])
    assert "single seeds" in str(figure.get_label())
    alone = figures.tradeoff(tradeoff_table())
    assert "single seeds" not in str(alone.get_label())
    assert not [line for line in alone.axes[0].lines if line.get_alpha() == 0.35]


@pytest.mark.parametrize(("measure", "ends"), [(figures.AUTOATTACK, []), (figures.SAMPLED, [21.0, 34.0])])
def test_autoattack_is_hollow_and_has_its_interval_where_it_is_sampled(measure: str, ends: list[float]) -> None:
    table = tradeoff_table()
    row = {"recipe": "digits/at", "seed": 0, "measure": measure, "accuracy": 0.3, "low": 0.21, "high": 0.34, "n": 300}
    figure = figures.tradeoff(pd.concat([table, pd.DataFrame([row])]))
    (hollow,) = [one for one in figure.axes[0].containers if one.lines[0].get_ydata()[0] == 30.0]
    assert hollow.lines[0].get_markerfacecolor() == drawing.PAPER
    bars = [segment[:, 1].tolist() for lines in hollow.lines[2] for segment in lines.get_segments()]
    assert bars == [ends][: len(ends)]
    assert ("sampled" in str(figure.get_label())) == bool(ends)


@pytest.mark.parametrize(("count", "apart"), [(1, 1.0), (6, 1.0), (4, 0.15), (4, 0.0)])
def test_names_in_the_tradeoff_neither_meet_nor_hide_markers_nor_leave_the_frame(count: int, apart: float) -> None:
    table = tradeoff_table(tuple(f"digits/recipe-{k}" for k in range(count)))
    for name in ("accuracy", "low", "high"):
        middle = table.groupby("measure")[name].transform("mean")
        table[name] = middle + apart * (table[name] - middle)
    figure: Any = figures.tradeoff(table)
    with drawing.style():
        figure.draw_without_rendering()
        axes = figure.axes[0]
        frame = axes.get_window_extent().padded(1)
        boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
        markers = axes.transData.transform([bars.lines[0].get_xydata()[0] for bars in axes.containers])
    assert len(boxes) == count
    for k, box in enumerate(boxes):
        assert frame.contains(box.x0, box.y0)
        assert frame.contains(box.x1, box.y1)
        assert box.count_overlaps(boxes[:k]) == 0
        assert not [marker for marker in markers if box.contains(*marker)]


def test_long_names_go_to_a_legend() -> None:
    figure = figures.tradeoff(tradeoff_table(("short", "x" * 40)))
    assert not figure.axes[0].texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["short", "x" * 40]


def crowd(count: int) -> pd.DataFrame:
    """Recipes scattered below a line, each third of them on it."""
    draw, rows = np.random.default_rng(0), []
    for k in range(count):
        clean = 0.6 + 0.3 * k / count
        worst = 0.9 - 0.5 * clean - (0 if k % 3 == 0 else 0.2 + 0.2 * draw.random())
        for measure, value in (("clean", clean), ("worst case", worst)):
            row = {"recipe": f"m{k}", "seed": 0, "measure": measure, "n": 200, "accuracy": value}
            rows.append(row | {"low": value - 0.03, "high": value + 0.03})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("count", [12, 13, 30, 160])
def test_of_many_recipes_the_front_is_named_and_the_others_are_one_artist_that_says_how_many(count: int) -> None:
    figure = figures.tradeoff(crowd(count))
    (axes,) = figure.axes
    named, others = len(axes.containers), count - drawing.MOST
    assert named == drawing.MOST
    if not others:
        assert len(axes.texts) == count
        assert not figure.legends
        return
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == named + 1
    assert f"{others} other recipes" in texts
    assert f"{others} other recipes" in str(figure.get_label())
    (grey,) = [line for line in axes.lines if line.get_label() == f"{others} other recipes"]
    assert np.isfinite(grey.get_xdata()).sum() == others  # all are there
    on_front = {f"m{k}" for k in range(0, count, 3)}
    assert len(on_front & set(texts)) == min(drawing.MOST, len(on_front))
    assert not axes.texts


def test_of_many_curves_the_most_robust_are_told_apart() -> None:
    one = curve_table()[curve_table()["recipe"] == "a"]
    lines = [one.assign(recipe=f"m{k}", accuracy=one["accuracy"] * (0.5 + k / 200)) for k in range(40)]
    figure = figures.robustness_curve(pd.concat(lines), eps=0.1)
    (axes,) = figure.axes
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(texts) == {"28 other lines", *(f"m{k}" for k in range(28, 40))}
    assert len(axes.collections) == 12
    assert "28 other lines" in str(figure.get_label())
    assert len(axes.lines) == 12 + 1 + 1  # the others are one, and eps has its line


def test_legends_leave_the_picture_its_room() -> None:
    def height(table: pd.DataFrame) -> float:
        (axes,) = (figure := figures.tradeoff(table)).axes
        return float(axes.get_position().height * figure.get_figheight())

    assert height(crowd(160)) > 0.9 * height(crowd(3))
    assert height(tradeoff_table(tuple(f"{k}" + "x" * 40 for k in range(12)))) > 0.9 * height(crowd(3))


def test_names_are_placed_without_an_artist_for_each_place_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One text is measured and one annotation made for each name: not twelve, each laid out anew."""
    made: list[int] = []
    real = matplotlib.text.Text.__init__
    axes: Any = drawing.canvas(5, 4).add_subplot()
    points = [(float(k % 7), float(k), f"name {k}") for k in range(30)]
    axes.plot(*np.array([p[:2] for p in points]).T)

    def counted(self: Any, *args: Any, **settings: Any) -> None:
        made.append(1)
        real(self, *args, **settings)

    axes.figure.draw_without_rendering()  # ticks have texts, too
    monkeypatch.setattr(matplotlib.text.Text, "__init__", counted)
    drawing.place_names(axes.figure, points, [])
    assert len(made) <= 2 * len(points)
    assert sorted(text.get_text() for text in axes.texts) == sorted(name for *_, name in points)


def test_the_front_is_what_no_point_beats_in_both() -> None:
    draw = np.random.default_rng(1)
    x, y = (pd.Series(draw.random(60)) for _ in range(2))
    beaten = [any(x[j] >= x[k] and y[j] >= y[k] and j != k for j in range(60)) for k in range(60)]
    assert sorted(drawing.front(x, y)) == [k for k in range(60) if not beaten[k]]
    assert len(drawing.front(pd.Series(range(50)), -pd.Series(range(50)))) == drawing.MOST


def test_the_curve_shows_accuracies_bands_and_the_verdict_eps() -> None:
    table = curve_table().sample(frac=1, random_state=0)  # order of rows must not matter
    (axes,) = (figure := figures.robustness_curve(table, norm="linf", eps=0.15)).axes
    for name, line in zip(table["recipe"].unique(), axes.lines[:2], strict=True):
        rows = table[table["recipe"] == name].sort_values("eps")
        np.testing.assert_allclose(line.get_xydata(), np.column_stack([rows["eps"], 100 * rows["accuracy"]]))
    assert len(axes.collections) == 2
    assert axes.lines[2].get_xdata()[0] == 0.15
    assert "linf" in axes.get_xlabel()
    assert {"a", "b", "eps = 0.15"} <= set(words(figure))
    two = pd.concat([curve_table(), curve_table().assign(attack="square")])
    assert {"a (pgd)", "b (square)"} <= set(words(figures.robustness_curve(two)))


def test_training_curves_show_the_log_and_mark_the_best_epoch() -> None:
    (axes,) = (figure := figures.training_curves(metrics_table())).axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert lines["best epoch"].get_xydata().tolist() == [[3, 50]]
    np.testing.assert_allclose(lines["validation, attacked"].get_ydata(), [20, 50, 50, 30])
    np.testing.assert_allclose(lines["training"].get_ydata(), [30, 60, 70, 80])
    assert "epoch by validation: 3." in str(figure.get_label())


def test_the_best_epoch_is_the_one_that_training_keeps() -> None:
    table = metrics_table()
    assert figures.best_epoch(table) == 3  # 2 and 3 are equally robust, 3 is better clean
    assert figures.best_epoch(table.assign(validation_clean=0.5)) == 2  # the first of equals
    assert figures.best_epoch(table.assign(validation_robust=[None, 0.1, None, 0.05])) == 2
    assert figures.best_epoch(table.assign(validation_robust=np.nan)) is None


def test_without_validation_the_training_line_stands_alone() -> None:
    figure = figures.training_curves(metrics_table()[["epoch", "train_accuracy"]])
    assert [str(line.get_label()) for line in figure.axes[0].lines] == ["training"]
    assert "no validation" in words(figure)
    assert "no best epoch" in str(figure.get_label())


def test_seeds_of_a_recipe_share_one_legend() -> None:
    both = pd.concat([metrics_table().assign(seed=0), metrics_table().iloc[:1].assign(seed=1)])
    figure = figures.training_curves(both)
    assert words(figure).count("validation, clean") == 1
    assert "3, 1" in str(figure.get_label())


def test_classes_are_named_and_the_least_robust_are_shown_where_there_are_many() -> None:
    assert {"cat", "dog", "ship", "n = 20 to 22 test images per class"} <= set(words(drawn("per_class")))
    few = figures.per_class(class_table(40), most=5)
    assert [label.get_text() for label in few.axes[0].get_yticklabels()] == ["0", "1", "2", "3", "4"]
    assert "the 5 least robust of 40" in str(few.get_label())
    np.testing.assert_allclose(few.axes[0].containers[1].lines[0].get_xdata(), [20, 21.5, 23, 24.5, 26])


def test_what_broke_it_adds_up_from_left_to_right_in_the_order_of_attacks() -> None:
    table = broken_table().sample(frac=1, random_state=1)  # order of rows must not matter but for the recipes
    table = table.sort_values("recipe", kind="stable")
    figure = breakdown(table)
    (axes,) = figure.axes
    labels = [container.get_label() for container in axes.containers]
    assert labels == [
        "misclassified as it is",
        "broken by apgd-ce",
        "broken by fab-t",
        "still robust (the recipe's colour)",
    ]
    shares = [(bars[0].get_x(), bars[0].get_width()) for bars in axes.containers]
    np.testing.assert_allclose(shares, [(0, 25), (25, 40), (65, 5), (70, 30)])
    np.testing.assert_allclose([bars[1].get_width() for bars in axes.containers], [0, 0, 0, 100])
    text = words(figure)
    assert {"a (AutoAttack, n = 40)", "b (quick, n = 90)", "25.0", "40.0", "30.0", "100.0"} <= set(text)
    assert not {"5.0", "0.0"} & set(text)  # too small for a number
    assert "n = 40 to 90" in str(figure.get_label())


def test_what_broke_it_is_told_apart_without_colour() -> None:
    parts = [f"part-{k}" for k in range(6)]
    rows = [{"recipe": "a", "source": "x", "by": by, "place": k, "share": 0.1, "n": 9} for k, by in enumerate(parts)]
    ends = [("clean", -1), ("none", 99)]
    rows += [{"recipe": "a", "source": "x", "by": by, "place": k, "share": 0.2, "n": 9} for by, k in ends]
    (axes,) = breakdown(pd.DataFrame(rows)).axes
    bars = {container.get_label(): container[0] for container in axes.containers}
    clean, robust = bars.pop("misclassified as it is"), bars.pop("still robust (the recipe's colour)")
    assert len({bar.get_hatch() for bar in bars.values()}) == 6
    assert clean.get_hatch() is robust.get_hatch() is None
    assert luminance(clean.get_facecolor()[:3]) < 0.05 < 0.9 < luminance(robust.get_facecolor()[:3])


def test_a_recipe_with_a_long_name_keeps_its_bar_apart() -> None:
    table = broken_table()
    table.loc[table["recipe"] == "b", "recipe"] = "x" * 150
    figure: Any = breakdown(table)
    with drawing.style():
        figure.draw_without_rendering()
        heads = [text for text in figure.axes[0].texts if "n = " in text.get_text()]
        boxes = [head.get_window_extent() for head in heads]
        bars = [bar.get_window_extent() for container in figure.axes[0].containers for bar in container]
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert all(box.count_overlaps([bar for bar in bars if bar.width]) == 0 for box in boxes)


@pytest.mark.parametrize(("channels", "shape"), [(1, (6, 6)), (3, (6, 6, 3)), (4, (6, 6))])
def test_the_gallery_shows_clean_perturbation_and_sum(channels: int, shape: tuple[int, ...]) -> None:
    arrays = pictures(channels)
    figure = figures.gallery(arrays, ["cat", "dog", "ship"], most=2)
    assert len(figure.axes) == 6  # a column an image
    first = [axes.images[0].get_array() for axes in figure.axes[::2]]
    assert first[0].shape == shape
    if channels == 3:
        np.testing.assert_allclose(first[0], arrays["x"][0].transpose(1, 2, 0))
        np.testing.assert_allclose(first[1], 0.5 + 5 * (first[2] - first[0]), atol=1e-6)  # 5 * 0.1 fills half the range
        np.testing.assert_allclose(first[2], arrays["x_adv"][0].transpose(1, 2, 0))
    text = words(figure)
    assert "attack x 5" in text
    assert {"cat", "dog", "ship"} <= set(text)
    assert "(pgd)" in str(figure.get_label())


@pytest.mark.parametrize(("size", "magnified"), [(0.0, 500), (8 / 255, 10), (0.9, 1)])
def test_the_magnification_never_clips_and_is_stated(size: float, magnified: int) -> None:
    figure = figures.gallery(pictures(size=size, count=1))
    assert f"attack x {magnified}" in words(figure)
    assert f"magnified {magnified} times" in str(figure.get_label())


def test_the_gallery_of_a_report_is_of_attacks_that_broke_the_model() -> None:
    arrays = pictures()  # the attack leaves class 2 in its place
    arrays["clean_prediction"] = np.array([0, 2, 2])  # and 1 is wrong as it is
    assert figures.successes(arrays)["label"].tolist() == [0]


def test_a_gallery_of_nothing_or_of_unequal_lengths_is_refused() -> None:
    for spoil in ({"x": np.zeros((2, 1, 6, 6))}, {name: value[:0] for name, value in pictures().items()}):
        with pytest.raises(UnmovedError, match="arrays of one length"):
            figures.gallery({**pictures(), **spoil})
    with pytest.raises(UnmovedError, match="'attack': None"):
        figures.gallery({name: value for name, value in pictures().items() if name != "attack"})


# --- on disk and on the page


def test_names_are_text_not_markup_nor_formulas() -> None:
    svg = drawing.to_svg(figures.tradeoff(tradeoff_table(("<script>alert(1)</script>", "a$b$ & c_d"))))
    assert "<script" not in svg
    root = ElementTree.fromstring(svg)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"<script>alert(1)</script>", "a$b$ & c_d"} <= texts


def test_save_writes_svg_only(tmp_path: Path) -> None:
    figure = drawn("per_class")
    drawing.save(figure, tmp_path / "f.svg")
    assert (tmp_path / "f.svg").read_text(encoding="utf-8") == drawing.to_svg(figure)
    with pytest.raises(UnmovedError, match=r"ending in \.svg"):
        drawing.save(figure, tmp_path / "f.png")


def test_on_a_page_ids_are_the_figures_own_and_references_follow() -> None:
    svg = drawing.to_svg(drawn("robustness_curve"))
    root = ElementTree.fromstring(drawing.to_html(svg, "curve", 'accuracy "falls" <so>'))
    assert root.tag == "svg"  # no namespace: an element of an HTML page
    assert root.get("aria-label") == 'accuracy "falls" <so>'
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 5
    assert all(name.startswith("curve-") for name in ids if name)
    uses = [element.get("href", "") for element in root.iter("use")]
    clips = [value[5:-1] for element in root.iter() for key, value in element.items() if key == "clip-path"]
    assert uses
    assert clips
    assert {use[1:] for use in uses} | set(clips) <= set(ids)


def test_on_a_page_our_colours_are_the_pages_own() -> None:
    html = drawing.to_html(drawing.to_svg(drawn("tradeoff")), "t", "t")
    assert not {c for c in (drawing.INK, drawing.GRID, drawing.PAPER, *drawing.COLOURS[:2]) if c in html}
    assert {"var(--ink)", "var(--grid)", "var(--paper)", "var(--c0)", "var(--c1)"} <= {
        v for v in ("var(--ink)", "var(--grid)", "var(--paper)", "var(--c0)", "var(--c1)") if v in html
    }
    assert "http" not in html
