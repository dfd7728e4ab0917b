from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from unmoved.core.errors import UnmovedError
from unmoved.evaluation import outcomes


def make(label: list[int], clean: list[int], *, eps: float = 0.3, **attacks: list[int]) -> pd.DataFrame:
    """Outcomes from predictions; every proposal lies inside the ball."""
    frames = [
        pd.DataFrame(
            {
                "index": np.arange(len(label)) + 100,
                "label": label,
                "attack": name,
                "eps": eps,
                "norm": "linf",
                "clean_prediction": clean,
                "adversarial_prediction": adversarial,
                "distance": eps / 2,
                "success": np.array(adversarial) != np.array(label),
                "by": np.where(np.array(adversarial) != np.array(label), name, "none"),
            }
        )
        for name, adversarial in attacks.items()
    ]
    return pd.concat(frames, ignore_index=True)


def small() -> pd.DataFrame:
    # Sample 3 is wrong clean; the first attack moves sample 0, the second sample 1: the worst case keeps sample 2 only.
    return make([0, 1, 1, 2], [0, 1, 1, 0], pgd=[1, 1, 1, 0], square=[0, 0, 1, 0])


def random_table(seed: int, samples: int = 40, attacks: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, samples)
    noisy = {f"a{k}": np.where(rng.random(samples) < 0.4, rng.integers(0, 4, samples), label) for k in range(attacks)}
    clean = np.where(rng.random(samples) < 0.2, rng.integers(0, 4, samples), label)
    return make(label.tolist(), clean.tolist(), **{name: values.tolist() for name, values in noisy.items()})


# --- on disk


def test_written_outcomes_come_back_bit_for_bit(tmp_path: Path) -> None:
    table = random_table(0)
    table["eps"] = 8 / 255
    table["distance"] = np.random.default_rng(1).random(len(table)) * 8 / 255
    table["attack"] = table["attack"].replace({"a0": 'apgd-ce, "fast"\nmode'})
    outcomes.write(table, tmp_path / "o.csv")
    pd.testing.assert_frame_equal(outcomes.read(tmp_path / "o.csv"), outcomes.checked(table), check_exact=True)
    assert list(outcomes.read(tmp_path / "o.csv").columns) == list(outcomes.COLUMNS)


def test_attacks_called_like_a_missing_value_stay_names(tmp_path: Path) -> None:
    outcomes.write(make([0], [0], null=[0], NA=[1]), tmp_path / "o.csv")
    assert outcomes.summary(outcomes.read(tmp_path / "o.csv"))["measure"].tolist()[1:3] == ["null", "NA"]


def test_a_failed_write_leaves_the_old_table_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.csv"
    outcomes.write(small(), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnmovedError, match="no space"):
        outcomes.write(random_table(0), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["o.csv"]


def test_every_cut_through_the_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    outcomes.write(small(), path)
    whole = path.read_bytes()
    # Fewer samples of the first attack alone are a table in themselves: only the evaluation's own n could tell.
    lines = whole.splitlines(keepends=True)
    tables = {len(b"".join(lines[:count])) for count in range(2, 6)}
    for cut in range(len(whole)):
        if cut not in tables:
            path.write_bytes(whole[:cut])
            with pytest.raises(UnmovedError, match=r"o\.csv"):
                outcomes.read(path)


def test_no_file_and_no_table_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnmovedError, match="no file"):
        outcomes.read(tmp_path / "absent.csv")
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe\n")
    with pytest.raises(UnmovedError, match="expected an outcomes table in CSV"):
        outcomes.read(tmp_path / "image.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UnmovedError, match="came none of index, label"):
        outcomes.read(tmp_path / "other.csv")


def test_a_column_that_an_older_table_lacks_is_made_from_the_others(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    table = small().assign(by=lambda t: t["by"].mask(t["clean_prediction"] != t["label"], "clean"))
    table.drop(columns="by").to_csv(path, index=False)
    pd.testing.assert_frame_equal(outcomes.read(path), outcomes.checked(table))
    assert set(outcomes.read(path)["by"]) == {"pgd", "square", "clean", "none"}


def test_columns_that_only_newer_versions_know_are_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    newer = small()[["success", "index", *(name for name in small() if name not in ("success", "index"))]]
    newer.insert(3, "queries", range(8))
    newer["note"] = ["a, b", "", "NA", "1.50", "x", "y", "z", '"']
    newer.to_csv(path, index=False)
    read = outcomes.read(path)
    assert list(read.columns) == [*outcomes.COLUMNS, "queries", "note"]
    assert read["queries"].tolist() == list("01234567")
    assert read["note"].tolist() == newer["note"].tolist()
    pd.testing.assert_frame_equal(outcomes.summary(read), outcomes.summary(small()))
    outcomes.write(read, tmp_path / "again.csv")
    pd.testing.assert_frame_equal(outcomes.read(tmp_path / "again.csv"), read)


# --- what a table must be


def change(column: str, row: int, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def apply(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype({column: object})
        table.loc[row, column] = value
        return table

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="distance"), "came none of distance"),
        (lambda t: t.iloc[:0], "came no row"),
        (change("label", 2, "cat"), "'label', row 3: expected an integer, came 'cat'"),
        (change("label", 2, 1.5), "expected an integer, came 1.5"),
        (change("eps", 0, math.nan), "'eps', row 1: expected a finite number"),
        (change("distance", 0, math.inf), "expected a finite number >= 0, came inf"),
        (change("success", 0, "maybe"), "'success', row 1: expected True or False, came 'maybe'"),
        (change("success", 0, 1), "expected True or False, came 1"),
        (change("attack", 0, ""), "expected a name"),
        (change("norm", 0, "l2"), "one norm, came"),
        (lambda t: t.iloc[:-1], "same 4 samples, came 3 under 'square', eps 0.3"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "sample 100 stands twice"),
        (change("clean_prediction", 0, 2), "2 different values of 'clean_prediction'"),
        (change("label", 0, 2), "sample 100 has 2 different values of 'label'"),
        (change("success", 0, False), "success must be"),
        (change("success", 2, True), "success must be"),
        (change("distance", 0, 0.5), "success must be"),
        (change("by", 0, "none"), "by must be 'none' where success is False and only there"),
        (change("by", 2, "pgd"), "by must be 'none'"),
        (lambda t: t.replace({"attack": {"pgd": "worst case"}}), "'worst case' is a measure's name"),
    ],
)
def test_bad_tables_are_refused_in_words(
    spoil: Callable[[pd.DataFrame], pd.DataFrame], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnmovedError, match=message):
        outcomes.write(spoil(small()), tmp_path / "o.csv")
    assert not list(tmp_path.iterdir())
    spoil(small()).to_csv(tmp_path / "o.csv", index=False)
    with pytest.raises(UnmovedError):
        outcomes.read(tmp_path / "o.csv")


def test_a_proposal_outside_the_ball_is_no_success() -> None:
    # A minimum-norm attack may leave the ball; a wrong prediction there says nothing about this eps.
    table = make([0, 0], [0, 0], fab=[1, 1])
    table.loc[0, ["distance", "success", "by"]] = [0.9, False, "none"]
    assert outcomes.summary(table).set_index("measure")["correct"].to_dict() == {"clean": 2, "fab": 1, "worst case": 1}


# --- what is said from a table


def test_the_worst_case_is_taken_per_sample() -> None:
    table = outcomes.summary(small()).set_index("measure")
    assert table["correct"].to_dict() == {"clean": 3, "pgd": 2, "square": 2, "worst case": 1}
    assert (table["n"] == 4).all()
    assert table["eps"].tolist() == [0.0, 0.3, 0.3, 0.3]


@pytest.mark.parametrize("seed", range(5))
def test_summary_agrees_with_counting_by_hand(seed: int) -> None:
    table = random_table(seed)
    summary = outcomes.summary(table).set_index("measure")
    samples: dict[int, list[pd.Series]] = {}
    for _, row in table.iterrows():
        samples.setdefault(row["index"], []).append(row)
    right = [
        [r["clean_prediction"] == r["label"] == r["adversarial_prediction"] for r in rows] for rows in samples.values()
    ]
    assert summary.loc["worst case", "correct"] == sum(all(r) for r in right)
    assert summary.loc["a1", "correct"] == sum(r[1] for r in right)
    assert summary.loc["worst case", "accuracy"] <= summary["accuracy"].min()
    shuffled = table.sample(frac=1, random_state=seed)
    pd.testing.assert_frame_equal(
        outcomes.summary(shuffled).sort_values("measure", ignore_index=True),
        summary.reset_index().sort_values("measure", ignore_index=True),
    )
    classes = outcomes.per_class(table)
    for measure in ("clean", "worst case"):
        assert classes.loc[classes["measure"] == measure, "correct"].sum() == summary.loc[measure, "correct"]
    assert classes["n"].sum() == 2 * len(samples)


def test_one_more_attack_never_raises_the_worst_case() -> None:
    table = random_table(7)
    fewer = table[table["attack"] != "a2"]
    worst = [outcomes.summary(t).set_index("measure").loc["worst case", "correct"] for t in (fewer, table)]
    assert worst[1] <= worst[0]


def test_a_worst_case_over_several_eps_is_refused() -> None:
    table = pd.concat([make([0], [0], pgd=[0]), make([0], [0], pgd=[1], eps=0.4)])
    with pytest.raises(UnmovedError, match="expected one eps"):
        outcomes.summary(table)
    table["clean_prediction"] = [0, 1]  # a sample on the edge may fall otherwise in another pass over the data
    curve = outcomes.curve_summary(table)
    assert curve["eps"].tolist() == [0.3, 0.4]
    assert curve["accuracy"].tolist() == [1.0, 0.0]
    assert curve.columns.tolist() == ["attack", "eps", "correct", "n", "accuracy", "low", "high"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_that_of_scipy(counts: tuple[int, int]) -> None:
    low, high = outcomes.wilson(*counts)
    theirs = binomtest(*counts).proportion_ci(confidence_level=0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1
    mirrored = outcomes.wilson(counts[1] - counts[0], counts[1])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_at_the_edges() -> None:
    z2 = 1.959963984540054**2
    assert outcomes.wilson(0, 10) == pytest.approx((0, z2 / (10 + z2)), abs=1e-12)
    assert outcomes.wilson(10, 10) == pytest.approx((10 / (10 + z2), 1), abs=1e-12)
    assert outcomes.wilson(5, 10, level=0.5)[0] > outcomes.wilson(5, 10)[0]
    for successes, n, level in [(0, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)]:
        with pytest.raises(UnmovedError, match="0 <= successes <= n"):
            outcomes.wilson(successes, n, level)


# --- several seeds


def test_seeds_give_mean_spread_and_the_hull_of_their_intervals() -> None:
    tables = [random_table(seed) for seed in range(3)]
    single = [outcomes.summary(t).set_index("measure") for t in tables]
    together = outcomes.across_seeds(tables).set_index("measure")
    for measure in single[0].index:
        values = [s.loc[measure, "accuracy"] for s in single]
        row = together.loc[measure]
        assert row["accuracy"] == pytest.approx(np.mean(values))
        assert row["std"] == pytest.approx(np.std(values, ddof=1))
        assert row["low"] == min(s.loc[measure, "low"] for s in single)
        assert row["high"] == max(s.loc[measure, "high"] for s in single)
    assert (together["seeds"] == 3).all()
    assert (together["n"] == 40).all()  # per seed, not pooled
    assert list(together.index) == list(single[0].index)


def test_one_seed_keeps_its_own_interval_and_has_no_spread() -> None:
    alone, one = outcomes.summary(small()), outcomes.across_seeds([small()])
    pd.testing.assert_frame_equal(
        alone[["measure", "accuracy", "low", "high"]], one[["measure", "accuracy", "low", "high"]]
    )
    assert one["std"].isna().all()


def test_seeds_average_classes_and_curves_too() -> None:
    classes = outcomes.across_seeds([small(), small().iloc[[0, 1, 2, 4, 5, 6]]], outcomes.per_class)
    assert classes[["class", "measure"]].drop_duplicates().shape == (6, 2)
    assert classes.set_index(["class", "measure"]).loc[(2, "clean"), "seeds"] == 1  # the second seed saw no class 2
    curve = outcomes.across_seeds([small(), small()], outcomes.curve_summary)
    assert curve.columns.tolist() == ["attack", "eps", "seeds", "n", "accuracy", "std", "low", "high"]
    assert curve["std"].tolist() == [0, 0]


def test_seeds_attacked_differently_are_refused() -> None:
    with pytest.raises(UnmovedError, match=r"square.*some seeds only"):
        outcomes.across_seeds([small(), small()[small()["attack"] == "pgd"]])
    with pytest.raises(UnmovedError, match="at least one seed"):
        outcomes.across_seeds([])
