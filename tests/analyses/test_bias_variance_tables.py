"""Tables of decompositions: the notes' vectors, exact identities, Monte-Carlo truth, intervals, permutations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from unmoved.analyses.bias_variance import CORRECTIONS, LOSSES, MEASURES, decompose_kl, decompose_mse, merge, table
from unmoved.core.errors import UnmovedError

P = torch.tensor([[[0.7, 0.2, 0.1]], [[0.5, 0.3, 0.2]]], dtype=torch.float64)
Y = torch.tensor([0])
KINDS = [("squared error", "plug-in"), ("squared error", "k/(k-1)"), *(("KL", name) for name in CORRECTIONS)]


def some(k: int = 3, n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=draw)
    return torch.softmax(torch.randn(k, n, 5, generator=draw, dtype=torch.float64), dim=2), y  # class 4 never occurs


def overall(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["class"] == -1].set_index(["loss", "correction"])


# --- the numbers


def test_vectors_of_the_notes() -> None:
    """bias-variance.md 4.1 and 4.2; at k = 2 the jackknife is k/(k-1)."""
    rows = overall(table(P, Y))
    assert rows.index.tolist() == KINDS
    found = {kind: tuple(rows.loc[kind, list(MEASURES)]) for kind in KINDS}
    assert found["squared error", "plug-in"] == pytest.approx((0.26, 0.245, 0.015))
    assert found["squared error", "k/(k-1)"] == pytest.approx((0.26, 0.23, 0.03))
    assert found["KL", "plug-in"] == pytest.approx((0.524911, 0.502643, 0.022268), abs=1e-6)
    for name in ("k/(k-1)", "jackknife"):
        assert found["KL", name] == pytest.approx((0.524911, 0.480375, 0.044536), abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_rows_are_the_decompositions_and_add_up(k: int) -> None:
    p, y = some(k)
    rows = table(p, y, bootstraps=20)
    np.testing.assert_allclose(rows["risk"], rows["bias"] + rows["variance"], rtol=1e-12)
    for label in (-1, 0, 1, 2, 3):
        own = torch.ones_like(y, dtype=torch.bool) if label == -1 else y == label
        part = rows[rows["class"] == label].set_index(["loss", "correction"])
        assert (part["n"] == int(own.sum())).all()
        assert (part["k"] == k).all()
        results = {("squared error", "k/(k-1)"): decompose_mse(p[:, own], y[own])}
        results |= {("KL", name): decompose_kl(p[:, own], y[own], name) for name in CORRECTIONS}
        for kind, one in results.items():
            assert tuple(part.loc[kind, list(MEASURES)]) == pytest.approx((one.risk, one.bias, one.variance))
    assert sorted(rows["class"].unique()) == [-1, 0, 1, 2, 3]
    assert set(table(p, y, classes=False, bootstraps=5)["class"]) == {-1}


def test_classes_weighted_by_their_counts_give_the_whole() -> None:
    rows = table(*some(4, 77), bootstraps=0)
    whole = overall(rows)
    for kind, part in rows[rows["class"] >= 0].groupby(["loss", "correction"]):
        assert part["n"].sum() == whole.loc[kind, "n"] == 77
        for name in MEASURES:
            assert np.average(part[name], weights=part["n"]) == pytest.approx(whole.loc[kind, name])
        assert part["bias"].std() > 0.01  # and the classes do differ


def test_the_plug_in_bias_is_that_of_the_mean_model_and_the_jackknife_is_the_correction() -> None:
    """Squared error: ``||pbar - e||^2``; leaving models out one by one gives k/(k-1) exactly."""
    p, y = some(4)
    rows = overall(table(p, y, bootstraps=0))
    e = torch.eye(5, dtype=torch.float64)[y]
    bias = ((p.mean(0) - e) ** 2).sum(1).mean().item()
    assert rows.loc[("squared error", "plug-in"), "bias"] == pytest.approx(bias)

    def plug_in(q: Tensor) -> float:
        return ((q - q.mean(0)) ** 2).sum(2).mean().item()

    left_out = np.mean([plug_in(torch.cat([p[:i], p[i + 1 :]])) for i in range(4)])
    jackknife = 4 * plug_in(p) - 3 * left_out
    assert rows.loc[("squared error", "k/(k-1)"), "variance"] == pytest.approx(jackknife)


def test_the_jackknife_of_kl_is_the_naive_loop() -> None:
    p, y = some(4)

    def plug_in(q: Tensor) -> float:
        pi = q.log().mean(0).softmax(1)
        return (pi * (pi.log() - q.log())).sum(2).mean().item()

    left_out = np.mean([plug_in(torch.cat([p[:i], p[i + 1 :]])) for i in range(4)])
    rows = overall(table(p, y, bootstraps=0))
    assert rows.loc[("KL", "jackknife"), "variance"] == pytest.approx(4 * plug_in(p) - 3 * left_out)
    assert rows.loc[("KL", "plug-in"), "variance"] == pytest.approx(plug_in(p))


# --- Monte-Carlo truth


def population(k: int, n: int, draw: torch.Generator) -> Tensor:
    """k independent models; each image has its own mean logits and its own truth is the average over many models."""
    mean = torch.linspace(-1, 1.5, n, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.0, -0.5, 0.3])
    return torch.softmax(mean + torch.randn(k, n, 4, generator=draw, dtype=torch.float64), dim=2)


def test_the_corrected_squared_error_is_unbiased_and_the_plug_in_low_by_its_factor() -> None:
    """Within three standard errors; the plug-in variance has the mean (k-1)/k Var, its bias takes the rest."""
    draw, y = torch.Generator().manual_seed(0), torch.zeros(10, dtype=torch.long)
    truth = decompose_mse(population(200_000, 10, draw), y)
    for k in (2, 3, 5):
        runs = [overall(table(population(k, 10, draw), y, False, losses=LOSSES[:1], bootstraps=0)) for _ in range(200)]
        values = {
            (kind, name): np.array([one.loc[("squared error", kind), name] for one in runs])
            for kind in ("plug-in", "k/(k-1)")
            for name in ("bias", "variance")
        }
        for (kind, name), value in values.items():
            error = value.std(ddof=1) / np.sqrt(len(value))
            low = truth.variance / k if kind == "plug-in" else 0.0
            expected = truth.variance - low if name == "variance" else truth.bias + low
            assert abs(value.mean() - expected) < 3 * error
            if kind == "plug-in":
                assert abs(value.mean() - getattr(truth, name)) > 5 * error  # so three errors do tell them apart


def test_the_corrections_of_kl_come_close_and_the_plug_in_is_low() -> None:
    draw, y = torch.Generator().manual_seed(1), torch.zeros(10, dtype=torch.long)
    truth = decompose_kl(population(200_000, 10, draw), y)
    for k, factor in ((2, 0.5), (3, 2 / 3), (5, 0.8)):
        p = torch.cat([population(k, 10, draw) for _ in range(300)], dim=1)
        rows = overall(table(p, y.repeat(300), False, losses=["KL"], bootstraps=0)).loc["KL"]
        assert rows.loc["plug-in", "variance"] == pytest.approx(factor * truth.variance, rel=0.06)
        for name in CORRECTIONS[1:]:
            assert rows.loc[name, "variance"] == pytest.approx(truth.variance, rel=0.06)
            assert rows.loc[name, "bias"] == pytest.approx(truth.bias, rel=0.06)


# --- intervals


def test_intervals_are_those_of_a_mean_over_images() -> None:
    """Normal theory: the half-width is 1.96 standard errors of the images' contributions, those of a class its own."""
    p, y = some(3, 900)
    rows = table(p, y, bootstraps=3000)
    pbar = p.mean(0)
    for label in (-1, 2):
        own = y >= 0 if label == -1 else y == label
        variance = (1.5 * ((p - pbar) ** 2).sum(2).mean(0))[own]
        target = torch.eye(5, dtype=torch.float64)[y]
        bias = ((p - target) ** 2).sum(2).mean(0)[own] - variance
        row = rows[(rows["class"] == label) & (rows["correction"] == "k/(k-1)") & (rows["loss"] == LOSSES[0])].iloc[0]
        for name, values in (("variance", variance), ("bias", bias), ("risk", variance + bias)):
            half = 1.96 * values.std().item() / len(values) ** 0.5
            assert (row[f"{name}_high"] - row[f"{name}_low"]) / 2 == pytest.approx(half, rel=0.08)
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_the_same_seed_gives_the_same_table_and_no_draw_no_interval() -> None:
    p, y = some()
    state = torch.get_rng_state()
    pd.testing.assert_frame_equal(table(p, y, bootstraps=30), table(p.float().double(), y, bootstraps=30), rtol=1e-5)
    pd.testing.assert_frame_equal(table(p, y, bootstraps=30), table(p, y, bootstraps=30))
    assert not table(p, y, bootstraps=30, seed=1).equals(table(p, y, bootstraps=30))
    bare = table(p, y, bootstraps=0)
    assert bare.filter(regex="low|high").isna().all(axis=None)
    assert bare[list(MEASURES)].notna().all(axis=None)
    assert torch.equal(state, torch.get_rng_state())


# --- permutations


def test_merging_takes_means_and_spreads_row_by_row() -> None:
    tables = [table(*some(seed=seed), classes=False, bootstraps=20).assign(train_eps=0.1) for seed in range(3)]
    shuffled = [tables[0], tables[1].iloc[::-1], tables[2]]
    merged = merge(shuffled)
    assert (merged["permutations"] == 3).all()
    for place, row in merged.iterrows():
        of_each = [one.iloc[int(place)] for one in tables]  # type: ignore[arg-type]
        assert all((one["loss"], one["correction"]) == (row["loss"], row["correction"]) for one in of_each)
        for name in MEASURES:
            values = [one[name] for one in of_each]
            assert row[name] == pytest.approx(np.mean(values))
            assert row[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
            assert row[f"{name}_low"] == pytest.approx(np.mean([one[f"{name}_low"] for one in of_each]))
    np.testing.assert_allclose(merged["risk"], merged["bias"] + merged["variance"])
    alone = merge(tables[:1])
    pd.testing.assert_frame_equal(alone[list(tables[0].columns)], tables[0], check_like=True)
    assert alone["bias_std"].isna().all()


def test_merging_unlike_tables_is_refused() -> None:
    one, other = (table(*some(k), classes=False, bootstraps=0) for k in (2, 3))
    with pytest.raises(UnmovedError, match="at least one permutation"):
        merge([])
    with pytest.raises(UnmovedError, match="each row once in each of 2 tables"):
        merge([one, other])
    with pytest.raises(UnmovedError, match="each row once in each of 2 tables"):
        merge([one, pd.concat([one, one])])
    with pytest.raises(UnmovedError, match="each row once in each of 2 tables"):
        merge([one.iloc[:-1], pd.concat([one.iloc[:-2], one.iloc[-1:]])])
    with pytest.raises(UnmovedError, match="each row once in each of 2 tables"):
        merge([pd.concat([one, one]), one.iloc[:0]])  # twice in all, yet not once in each
    with pytest.raises(UnmovedError, match="same columns"):
        merge([one, one.assign(mode="joint")])
    with pytest.raises(UnmovedError, match="same columns"):
        merge([one[["loss", "correction"]]])


# --- bad input


def test_bad_input() -> None:
    p, y = some()
    with pytest.raises(UnmovedError, match="at least 2 models"):
        table(p[:1], y)
    with pytest.raises(UnmovedError, match="loss: unknown value 'mse'"):
        table(p, y, losses=["mse"])
    sure = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert len(table(sure, Y, losses=["squared error"])) == 4
    with pytest.raises(UnmovedError, match="positive"):
        table(sure, Y)
