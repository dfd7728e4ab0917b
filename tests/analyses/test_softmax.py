"""Statistics against loops and the notes, a linear model whose boundary is known, and the rules behind the words."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from unmoved.analyses import softmax
from unmoved.analyses.softmax import CLAIMED, COLUMNS, STATISTICS
from unmoved.attacks import FAB, FMN, PGD
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.evaluation.outcomes import wilson
from unmoved.terms.margin import margin
from unmoved.terms.wrong_classes import DRSL, ComplementEntropy
from unmoved.testing.fixtures import Failing, Planned, network, same_random_state, small_batch, untouched

WRONG = ("variance", "std", "entropy", "gap")
DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


def logits_of(n=50, k=6, seed=0, size=4.0):
    draw = torch.Generator().manual_seed(seed)
    z = size * torch.randn(n, k, generator=draw, dtype=torch.float64)
    return z, torch.randint(k, (n,), generator=draw)


# --- statistics


def test_vectors_of_the_notes():
    """drsl.md 2.2: the sum of squares of (3, 2, 1) about 2 is 2, and 24 + 14 / 3 - 14 for (0, 1, 1), by 3 each."""
    z, y = torch.tensor([[5.0, 3, 2, 1], [0, 4, 1, 1]]), torch.tensor([0, 1])
    found = softmax.statistics(z, y)
    assert found["variance"].tolist() == pytest.approx([2 / 3, 2 / 9])
    assert (3 * found["variance"]).mean() == pytest.approx((2 + 2 / 3) / 2)  # half of 2.6666667, a sum over the batch
    assert -found["p_true"].map(math.log)[0] == pytest.approx(0.1851825, abs=1e-7)  # the cross-entropy
    # 3.1: the complement entropy of the same logits, -0.2080989, is divided by K = 4.
    assert -found["entropy"][0] / 4 == pytest.approx(-0.2080989, abs=1e-7)
    assert found["gap"].tolist() == pytest.approx([1, 0])
    assert found["margin"].tolist() == pytest.approx([2, 3])


def test_against_a_loop_over_the_definitions():
    z, y = logits_of()
    found = softmax.statistics(z, y)
    assert list(found) == list(STATISTICS)
    for i, (row, label) in enumerate(zip(z.numpy(), y.tolist(), strict=True)):
        p = np.exp(row) / np.exp(row).sum()
        wrong = [j for j in range(6) if j != label]
        log_p, r = [math.log(p[j]) for j in wrong], [p[j] / (1 - p[label]) for j in wrong]
        first, second = sorted((row[j] for j in wrong), reverse=True)[:2]
        expected = {
            "variance": sum((v - sum(log_p) / 5) ** 2 for v in log_p) / 5,
            "std": (sum((p[j] - sum(p[wrong]) / 5) ** 2 for j in wrong) / 5) ** 0.5,
            "entropy": -sum(v * math.log(v) for v in r),
            "gap": first - second,
            "p_true": p[label],
            "margin": row[label] - first,
        }
        assert found.loc[i].to_dict() == pytest.approx(expected, rel=1e-9)


def test_they_are_the_quantities_of_the_losses():
    z, y = logits_of()
    views, found = Views.of(y=y, clean=z, adv=z), softmax.statistics(z, y)
    np.testing.assert_allclose(5 * found["variance"], DRSL()(views))
    np.testing.assert_allclose(-found["entropy"] / 6, ComplementEntropy()(views))
    np.testing.assert_allclose(found["margin"], -margin(z, y), atol=1e-12)


def test_a_constant_added_to_a_row_changes_nothing():
    z, y = logits_of()
    moved = softmax.statistics(z + 1000 * torch.arange(50)[:, None], y)
    pd.testing.assert_frame_equal(moved, softmax.statistics(z, y), rtol=1e-9, atol=1e-9)


def test_the_order_of_the_classes_changes_nothing():
    z, y = logits_of()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    moved = softmax.statistics(z[:, order], torch.argsort(order)[y])
    pd.testing.assert_frame_equal(moved, softmax.statistics(z, y))


def test_huge_logits_stay_finite_and_float32_is_enough():
    z, y = logits_of(size=3000)
    found = softmax.statistics(z.float(), y)
    assert np.isfinite(found.to_numpy()).all()
    np.testing.assert_allclose(5 * found["variance"], DRSL()(Views.of(y=y, clean=z.float().double())), rtol=1e-9)


def test_equal_wrong_classes_are_the_extreme():
    found = softmax.statistics(torch.tensor([[3.0, 1, 1, 1, 1]]), torch.tensor([0])).iloc[0]
    assert found[["variance", "std", "gap"]].tolist() == pytest.approx([0, 0, 0], abs=1e-15)
    assert found["entropy"] == pytest.approx(math.log(4))


def test_one_wrong_class_has_no_distribution():
    found = softmax.statistics(torch.tensor([[2.0, -1], [0, 5]]), torch.tensor([0, 0]))
    assert (found[list(WRONG)] == 0).all().all()
    assert found["margin"].tolist() == pytest.approx([3, -5])


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), "expected logits"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), "K >= 2"),
        (torch.zeros(2, 3), torch.zeros(2), "int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"expected 0\.\.2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"expected 0\.\.2"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "finite logits"),
    ],
)
def test_bad_logits(z, y, message):
    with pytest.raises(UnmovedError, match=message):
        softmax.statistics(z, y)


# --- observe


def three():
    """Right and fallen into the second of the wrong classes; right and standing; wrong as it was."""
    clean = torch.tensor([[5.0, 3, 2, 1], [0, 9, 0, 0], [1, 0, 0, 4]])
    adv = torch.tensor([[1.0, 0, 7, 0], [0, 3, 2, 0], [0, 0, 0, 8]])
    return {
        "index": torch.tensor([7, 3, 11]),
        "y": torch.tensor([0, 1, 2]),
        "clean_logits": clean,
        "adv_logits": adv,
        "success": torch.tensor([True, False, True]),
        "min_eps": torch.tensor([0.25, torch.nan, 0]),
    }


def test_three_samples_by_hand():
    table = softmax.observe(**three())
    assert tuple(table.columns) == COLUMNS
    assert table["view"].tolist() == ["clean"] * 3 + ["adversarial"] * 3
    assert table["index"].tolist() == [7, 3, 11] * 2
    assert table["label"].tolist() == [0, 1, 2] * 2
    assert table["prediction"].tolist() == [0, 1, 3, 2, 1, 3]
    assert table["clean_correct"].tolist() == [True, True, False] * 2
    assert table["success"].tolist() == [True, False, True] * 2
    np.testing.assert_array_equal(table["min_eps"], [0.25, np.nan, 0] * 2)
    np.testing.assert_array_equal(table["landed"], [2, np.nan, np.nan] * 2)
    np.testing.assert_array_equal(table["landing_rank"], [2, np.nan, np.nan] * 2)  # 3 > 2 > 1 among the wrong, clean
    assert (table["num_classes"] == 4).all()
    for view, z in (("clean", three()["clean_logits"]), ("adversarial", three()["adv_logits"])):
        rows = table.loc[table["view"] == view, list(STATISTICS)].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, softmax.statistics(z, three()["y"]))


def test_min_eps_may_be_unknown():
    assert softmax.observe(**three() | {"min_eps": None})["min_eps"].isna().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"success": torch.tensor([True, True, True])}, "expected success only where"),
        ({"success": torch.tensor([1, 0, 1])}, "success of shape .3,., bool"),
        ({"min_eps": torch.zeros(2)}, "expected min_eps of shape"),
        ({"index": torch.arange(2)}, "expected index of shape"),
        ({"adv_logits": torch.zeros(3, 5)}, "logits of one shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(UnmovedError, match=message):
        softmax.observe(**three() | change)


# --- collect


class Counting(nn.Module):
    """Counts forward passes and images."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes, self.images = inner, 0, []

    def forward(self, x):
        self.passes += 1
        self.images.append(len(x))
        return self.inner(x)


def linear_case(n=24, k=5, seed=0, wrong=3):
    """A linear model in float64 and images near the middle of the box; the last ``wrong`` labels are not its own."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, k)).double().requires_grad_(False)
    model[1].weight.copy_(torch.randn(k, 16, generator=draw, dtype=torch.float64))
    model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    x = 0.5 + 0.04 * torch.randn(n, 1, 4, 4, generator=draw, dtype=torch.float64)
    y = model(x).argmax(1)
    y[n - wrong :] = (y[n - wrong :] + 1) % k
    return model, Batch(x, y, torch.arange(100, 100 + n))


def nearest(model, batch, norm):
    """``min_j (z_y - z_j) / ||w_y - w_j||_q``, and the class j."""
    z, w = model(batch.x), model[1].weight
    gap = z.gather(1, batch.y[:, None]) - z
    slope = torch.linalg.vector_norm(w[batch.y][:, None] - w[None], ord=DUAL[norm], dim=2)
    return (gap / slope).scatter(1, batch.y[:, None], torch.inf).min(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("k", "search"), [(2, FMN), (5, FAB)])
def test_a_linear_model_falls_where_its_nearest_boundary_is_within_eps(norm, k, search):
    """Of two classes FMN, which is the default, is exact; of five, FAB, which tries each boundary."""
    model, batch = linear_case(k=k)
    right = model(batch.x).argmax(1) == batch.y
    true, towards = nearest(model, batch, norm)
    eps = float(true[right].sort().values[10:12].mean())  # on nobody's boundary
    threat = ThreatModel(norm, eps)
    attack = PGD(threat, steps=40, start="none", keep="best")
    chosen = None if search is FMN else search(threat)
    table = softmax.collect(model, [batch], attack, threat, min_norm_attack=chosen).query("view == 'clean'")
    assert table["clean_correct"].tolist() == right.tolist()
    assert (table["min_eps"][~right.numpy()] == 0).all()
    assert table["success"][~right.numpy()].all()
    assert table["landing_rank"][~right.numpy()].isna().all()
    table, true, towards = table[right.numpy()], true[right].numpy(), towards[right].numpy()
    np.testing.assert_allclose(table["min_eps"], true, rtol=2e-3 if k == 2 else 6e-3)  # FAB ends 0.5 % beyond
    assert (table["min_eps"] >= true * (1 - 1e-9)).all()  # an upper bound
    assert not (table["success"] & (true > eps)).any()
    if k == 2 and norm != "l1":  # steps along one gradient reach the boundary, in l1 only pixel by pixel
        assert table["success"].tolist() == (true <= eps).tolist()
        assert table["landed"][table["success"]].tolist() == towards[table["success"]].tolist()
    assert 0 < table["success"].sum() < len(table)
    assert (table["landed"][table["success"]] != table["label"][table["success"]]).all()


@dataclass(frozen=True)
class Moved:
    """Proposes x + delta without asking the model."""

    delta: object
    minimum_norm: bool = False

    def __call__(self, model, batch):
        return (batch.x + self.delta).clamp(0, 1)


def towards(model, size):
    """A step of ``size`` in l2 from class 0 to class 1."""
    w = model[1].weight[1] - model[1].weight[0]
    return (size * w / w.norm()).reshape(1, 1, 4, 4)


def test_each_pass_is_made_once_and_only_what_is_right_is_attacked():
    model, batch = linear_case()
    counting, threat = Counting(model), ThreatModel("l2", 0.5)
    softmax.collect_batch(counting, batch, Moved(0.01), threat, Moved(0.01))
    assert counting.images == [24, 21, 21]  # clean once; each attack's proposals once
    counting = Counting(model)
    softmax.collect(counting, [batch], Moved(0.01), threat, min_norm_attack=FMN(threat, steps=5))
    assert (
        counting.passes == 3 + 1 + 5 + 1 + 1
    )  # and FMN's own: where it starts, its steps, its last point, clear of rounding
    wrong = replace(batch, y=(batch.y + 1) % 5).take(torch.arange(20))
    counting = Counting(model)
    table = softmax.collect_batch(counting, wrong, Moved(9.0), threat)
    assert counting.images == [20]  # nothing to attack
    assert (table["success"] & (table["min_eps"] == 0)).all()
    clean, adv = (table[table["view"] == view].reset_index(drop=True) for view in ("clean", "adversarial"))
    pd.testing.assert_frame_equal(clean.drop(columns="view"), adv.drop(columns="view"))


def test_success_is_within_eps_and_min_eps_the_smaller_of_the_two():
    model, batch = linear_case(wrong=0)
    batch = batch.take(batch.y == 0)
    far, near = towards(model, 1.6), towards(model, 1.2)
    distance = [ThreatModel("l2", 9.0).distance((batch.x + d).clamp(0, 1), batch.x) for d in (far, near)]
    wrong = [model((batch.x + d).clamp(0, 1)).argmax(1) != 0 for d in (far, near)]
    assert all(w.all() for w in wrong)

    def min_eps(attack, other, eps):
        table = softmax.collect_batch(model, batch, attack, ThreatModel("l2", eps), other).query("view == 'clean'")
        return table["success"].tolist(), table["min_eps"].to_numpy()

    all_of, none_of = [True] * len(batch), [False] * len(batch)
    for attack, other, eps, success, expected in (
        (Moved(near), Moved(far, True), 2.0, all_of, distance[1]),  # the attack's is smaller
        (Moved(far), Moved(near, True), 2.0, all_of, distance[1]),
        (Moved(near), Moved(0.0), 2.0, all_of, distance[1]),  # the other found nothing
        (Moved(near, True), Moved(far, True), 0.1, none_of, distance[1]),  # it may leave the ball: known, no success
    ):
        found, eps_found = min_eps(attack, other, eps)
        assert found == success
        np.testing.assert_allclose(eps_found, expected)
    found, eps_found = min_eps(Moved(0.0), Moved(0.0), 2.0)
    assert found == none_of
    assert np.isnan(eps_found).all()


def test_who_leaves_the_rules_is_told():
    model, batch = linear_case()
    threat = ThreatModel("l2", 0.1)
    with pytest.raises(UnmovedError, match="'Moved' left the threat model"):
        softmax.collect_batch(model, batch, Moved(0.5), threat)
    with pytest.raises(UnmovedError, match=r"expected pixels in \[0, 1\]"):
        softmax.collect_batch(model, replace(batch, x=2 * batch.x), Moved(0.0), threat)
    with pytest.raises(UnmovedError, match="labels"):
        softmax.collect_batch(model, replace(batch, y=batch.y + 3), Moved(0.0), threat)
    with pytest.raises(UnmovedError, match="at least one sample"):
        softmax.collect(model, [], Moved(0.0), threat)
    outside = type("Outside", (), {"minimum_norm": True, "__call__": lambda self, model, batch: batch.x + 2})()
    with pytest.raises(UnmovedError, match="left the valid images"):
        softmax.collect_batch(model, batch, outside, threat)


def test_an_attack_that_writes_into_its_images_moves_nothing():
    class Rude:
        def __call__(self, model, batch):
            return batch.x.add_(0.3)

    model, batch = linear_case()
    before = batch.x.clone()
    with pytest.raises(UnmovedError, match="left the threat model"):
        softmax.collect_batch(model, batch, Rude(), ThreatModel("linf", 0.1))
    assert torch.equal(batch.x, before)


def test_the_table_does_not_depend_on_how_the_samples_are_cut():
    model, batch = linear_case()
    threat = ThreatModel("linf", 0.05)
    attack, fmn = PGD(threat, steps=5), FMN(threat, steps=10)

    sizes = []

    class AsSplit:
        def batches(self, size, *, shuffle=None):
            sizes.append(size)
            return (batch.take(part) for part in torch.arange(24).split(size))

    whole = softmax.collect(model, [batch], attack, threat, min_norm_attack=fmn)
    for size in (7, 24):
        sizes.clear()
        cut = softmax.collect(model, AsSplit(), attack, threat, min_norm_attack=fmn, batch_size=size)
        by = ["view", "index"]
        pd.testing.assert_frame_equal(
            cut.sort_values(by, ignore_index=True), whole.sort_values(by, ignore_index=True), rtol=1e-9
        )
        assert sizes == [size]


def test_the_model_is_left_as_it_was_also_when_it_fails():
    model, batch, threat = network(), small_batch(), ThreatModel("linf", 0.1)
    model.train()
    model[0].eval()
    own = model(batch.x)  # BatchNorm has moved: running statistics that are worth restoring
    own.sum().backward()
    attack = PGD(threat, steps=2, mode="train")
    with untouched(model), same_random_state():
        first = softmax.collect(model, [batch], attack, threat)
    with untouched(model), same_random_state(), pytest.raises(Planned):
        softmax.collect(Failing(model, 3), [batch], attack, threat)
    torch.rand(3)
    pd.testing.assert_frame_equal(softmax.collect(model, [batch], attack, threat), first)


def test_a_randomised_model_draws_the_same_whoever_asks():
    class Noisy(nn.Module):
        def forward(self, x):
            return torch.randn(len(x), 5) + 3 * torch.eye(5)[0]

    _, batch = linear_case()
    batch = replace(batch, y=torch.zeros(24, dtype=torch.long))
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with same_random_state():
            tables.append(
                softmax.collect(Noisy(), [batch], Moved(0.0), ThreatModel("l2", 0.1), min_norm_attack=Moved(0.0))
            )
    pd.testing.assert_frame_equal(*tables)


# --- within


def synthetic(n=400, seed=0, wrong=20, slope=1.0):
    """A table whose samples fall by a noisy variance, and not by the margin; the last ``wrong`` are wrong as they are.

    Wrong samples have values that would turn every result if they were counted.
    """
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(size=n) for name in STATISTICS}
    hidden = slope * columns["variance"] + rng.normal(size=n)
    table = pd.DataFrame(columns).assign(
        index=np.arange(n),
        label=0,
        num_classes=4,
        clean_correct=np.arange(n) < n - wrong,
        success=hidden > 0,
        min_eps=np.exp(-hidden),
        prediction=0,
    )
    lost = ~table["clean_correct"]
    table.loc[lost, ["success", "min_eps", "variance"]] = [True, 0.0, -1e6]
    rank = np.where(table["success"] & ~lost, 1 + rng.integers(0, 3, n) * (rng.random(n) < 0.5), np.nan)
    table = table.assign(landing_rank=rank, landed=rank)
    return pd.concat([table.assign(view=view) for view in softmax.VIEWS])[list(COLUMNS)]


def test_within_is_scipy_on_what_the_model_gets_right():
    table = synthetic()
    known = table["index"] % 7 > 0
    table.loc[~known, "min_eps"] = np.nan
    found = softmax.within(table, bootstraps=50)
    assert len(found) == 2 * 2 * 6
    assert set(found["measure"] + found["against"]) == {"AUCattack succeeded", "Spearmanminimal eps"}
    right = table[table["clean_correct"]]
    for _, row in found.iterrows():
        rows = right[right["view"] == row["view"]]
        if row["measure"] == "AUC":
            fell = rows["success"].astype(bool)
            value = rows[row["statistic"]]
            u = stats.mannwhitneyu(value[fell], value[~fell]).statistic
            expected = u / (fell.sum() * (~fell).sum())
        else:
            rows = rows[rows["min_eps"].notna()]
            expected = stats.spearmanr(rows[row["statistic"]], rows["min_eps"]).statistic
        assert row["n"] == len(rows)
        assert row["value"] == pytest.approx(expected, abs=1e-12)
        assert row["low"] < row["value"] < row["high"]
    clean = found[(found["view"] == "clean") & (found["measure"] == "AUC")].set_index("statistic")
    assert clean.loc["variance", "low"] > 0.65
    assert clean.loc["variance", "over_low"] > 0
    assert clean.loc["margin", ["over_margin", "over_low", "over_high"]].tolist() == [0, 0, 0]
    spread = (clean["value"] - 0.5).abs()
    np.testing.assert_allclose(clean["over_margin"], spread - spread["margin"])
    pd.testing.assert_frame_equal(found, softmax.within(table, bootstraps=50))
    # A statistic that says the same as the margin, in whichever direction, says no more: resample by resample.
    for same in (table["margin"], -(table["margin"] ** 3)):
        over = softmax.within(table.assign(gap=same), bootstraps=50).query("statistic == 'gap'")
        np.testing.assert_allclose(over[["over_margin", "over_low", "over_high"]], 0, atol=1e-12)


def test_the_order_of_rows_and_a_file_between_change_nothing(tmp_path):
    table = synthetic(100)
    table.to_csv(tmp_path / "t.csv", index=False)
    read = pd.read_csv(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(softmax.within(read, bootstraps=20), softmax.within(table, bootstraps=20))


def test_nothing_to_tell_apart_gives_nan_a_note_and_no_warning():
    table = synthetic()
    constant = table.assign(**dict.fromkeys(WRONG, 0.0))
    standing, unknown = table.assign(success=False), table.assign(min_eps=np.nan)
    lost = table.assign(clean_correct=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other, words in (
            (constant, "the same"),
            (standing, "positive: 0 of 380"),
            (unknown, "0 samples"),
            (lost, "positive: 0 of 0"),
        ):
            found = softmax.within(other, bootstraps=20)
            missing = found[found["value"].isna()]
            assert len(missing)
            assert missing[["low", "high", "over_margin", "over_low", "over_high"]].isna().all().all()
            assert words in missing["note"].iloc[0]
            assert (found.loc[found["value"].notna(), "note"] == "").all()


def test_a_table_that_is_no_observation_is_refused():
    table = synthetic(50)
    for ask in (softmax.within, softmax.landings, lambda t: softmax.summary({"a": t})):
        with pytest.raises(UnmovedError, match="none of landing_rank"):
            ask(table.drop(columns="landing_rank"))
        with pytest.raises(UnmovedError, match="no row"):
            ask(table.iloc[:0])
        with pytest.raises(UnmovedError, match="sample 0 stands twice"):
            ask(pd.concat([table, table.iloc[:1]]))


# --- landings and runs


def test_landings_count_the_fallen_once():
    table = softmax.observe(**three())
    found = softmax.landings(table)
    assert found["rank"].tolist() == [1, 2, 3]
    assert found["count"].tolist() == [0, 1, 0]
    assert (found["n"] == 1).all()
    assert found["share"].tolist() == [0, 1, 0]
    assert found.loc[1, ["low", "high"]].tolist() == pytest.approx(wilson(1, 1))
    assert found["uniform"].tolist() == pytest.approx([1 / 3] * 3)
    large = softmax.landings(synthetic())
    assert large["count"].sum() == large["n"].iloc[0]
    assert large["share"].sum() == pytest.approx(1)
    nobody = softmax.landings(table.assign(landing_rank=np.nan))
    assert nobody[["share", "low", "high"]].isna().all().all()
    assert nobody["count"].tolist() == [0, 0, 0]
    with pytest.raises(UnmovedError, match="one number of classes"):
        softmax.landings(pd.concat([table, table.assign(num_classes=9, index=table["index"] + 99)]))


def test_two_classes_go_all_the_way():
    z, y = logits_of(40, 2)
    table = softmax.observe(torch.arange(40), y, z, -z, z.argmax(1) == y)
    assert softmax.landings(table)["uniform"].tolist() == [1]
    found = softmax.within(table, bootstraps=20)
    assert found["value"].isna().all()  # nothing varies, or all fell
    claims = softmax.claims({"a": found}, {"a": softmax.landings(table)}, across_table(range(5), range(5)))
    assert [c.word for c in claims[:3]] == ["undecided"] * 3
    rounded = {"a": landing_table(0.9, 1 - 1e-12, uniform=1.0)}  # the interval of 40 of 40, up to rounding
    assert softmax.claims({"a": found}, rounded, across_table(range(5), range(5)))[2].word == "undecided"


def test_summary_of_three_samples():
    found = softmax.summary({"a": softmax.observe(**three())})
    assert found.loc[0, ["run", "n"]].tolist() == ["a", 3]
    assert found.loc[0, "clean_accuracy"] == pytest.approx(2 / 3)
    assert found.loc[0, "robust_accuracy"] == pytest.approx(1 / 3)
    clean = softmax.statistics(three()["clean_logits"], three()["y"])
    assert found.loc[0, list(STATISTICS)].tolist() == pytest.approx(clean.mean().tolist())
    lost = softmax.observe(**three() | {"success": torch.tensor([True, False, False])})
    assert softmax.summary({"a": lost}).loc[0, "robust_accuracy"] == pytest.approx(
        1 / 3
    )  # wrong as it was, all the same
    with pytest.raises(UnmovedError, match="at least one run"):
        softmax.summary({})


def test_across_is_scipy_with_fishers_interval():
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=7) for name in ("clean_accuracy", "robust_accuracy", *STATISTICS)}
    found = softmax.across(pd.DataFrame(columns))
    assert len(found) == 6 * 2 * 2
    for _, row in found.iterrows():
        a, b = columns[row["statistic"]], columns[row["against"].replace(" ", "_")]
        expected = (stats.pearsonr if row["measure"] == "Pearson" else stats.spearmanr)(a, b)
        assert row["value"] == pytest.approx(expected.statistic)
        assert row["low"] < row["value"] < row["high"]
        assert row["n"] == 7
    for n, known in ((2, 0), (3, 24)):
        few = softmax.across(pd.DataFrame(columns).iloc[:n])
        assert few["value"].notna().sum() == known
        assert few[["low", "high"]].isna().all().all()
        assert few["note"].str.contains(f"came {n}").all()
    with pytest.raises(UnmovedError, match="none of robust_accuracy"):
        softmax.across(pd.DataFrame(columns).drop(columns="robust_accuracy"))


# --- the words


def within_table(low, high, over=(-0.2, -0.1), statistic="variance"):
    row = {"view": "clean", "statistic": statistic, "measure": "AUC", "value": (low + high) / 2, "low": low}
    row |= {"high": high, "over_margin": sum(over) / 2, "over_low": over[0], "over_high": over[1]}
    # Rows that must not be read.
    others = [row | {"view": "adversarial", "low": 0.9, "high": 0.99}, row | {"measure": "Spearman", "low": 0.8}]
    return pd.DataFrame([*others, row, row | {"statistic": "margin", "low": 0.0, "high": 0.1}])


def landing_table(low, high, uniform=1 / 9):
    return pd.DataFrame({"rank": [1], "share": [(low + high) / 2], "low": [low], "high": [high], "uniform": [uniform]})


def across_table(mean, robust, clean=None):
    summary = pd.DataFrame({name: np.asarray(mean, dtype=float) for name in STATISTICS})
    summary = summary.assign(robust_accuracy=np.asarray(robust, dtype=float))
    return softmax.across(
        summary.assign(clean_accuracy=summary["robust_accuracy"] if clean is None else np.asarray(clean, dtype=float))
    )


ABOVE, AROUND, BELOW, UNKNOWN = (0.55, 0.7), (0.45, 0.6), (0.2, 0.4), (math.nan, math.nan)


@pytest.mark.parametrize(
    ("runs", "word"),
    [
        ([ABOVE] * 3, "confirmed"),
        ([ABOVE, ABOVE, AROUND], "confirmed"),
        ([ABOVE, AROUND], "undecided"),  # half is not more than half
        ([ABOVE, ABOVE, ABOVE, BELOW], "undecided"),  # one against
        ([BELOW, BELOW, AROUND], "refuted"),
        ([BELOW, BELOW, ABOVE], "undecided"),
        ([AROUND] * 3, "undecided"),
        ([ABOVE, UNKNOWN, UNKNOWN], "confirmed"),  # those without an interval do not judge
        ([UNKNOWN] * 2, "undecided"),
        ([(0.5, 0.7)], "undecided"),  # wholly above means above
    ],
)
def test_the_rule_of_the_count(runs, word):
    across = across_table(range(6), range(6))
    some = {str(k): landing_table(0.5, 0.6) for k in range(len(runs))}
    fall, beyond, _, *_ = softmax.claims({str(k): within_table(*r) for k, r in enumerate(runs)}, some, across)
    assert fall.word == word
    assert f": {word}; " in fall.sentence
    # The same rule for entropy, which claims the contrary sign ...
    turned = {str(k): within_table(1 - r[1], 1 - r[0], statistic="entropy") for k, r in enumerate(runs)}
    assert softmax.claims(turned, some, across, "entropy")[0].word == word
    # ... for what is more than the margin, about 0 ...
    over = {str(k): within_table(0.4, 0.6, (r[0] - 0.5, r[1] - 0.5)) for k, r in enumerate(runs)}
    assert softmax.claims(over, some, across)[1].word == word
    # ... and for landings, about uniform.
    land = {str(k): landing_table(*r, uniform=0.5) for k, r in enumerate(runs)}
    assert softmax.claims(over, land, across)[2].word == word
    assert beyond.word == "refuted"
    assert f"0 of {len(runs)} runs for it, {len(runs)} against" in beyond.sentence


@pytest.mark.parametrize(
    ("mean", "accuracy", "robust", "clean"),
    [
        (range(8), [8, 7, 6, 5, 4, 3, 2, 1], "confirmed", "confirmed"),
        (range(8), range(8), "refuted", "refuted"),
        (range(8), [3, 1, 4, 1, 5, 9, 2, 6], "undecided", "undecided"),
        (range(4), [4, 3, 2, 1], "undecided", "undecided"),  # four in order may be luck
        (range(3), [3, 2, 1], "undecided", "undecided"),
        (range(2), [2, 1], "undecided", "undecided"),
        (np.arange(200), np.random.default_rng(0).normal(size=200) - np.arange(200) / 90, "confirmed", "confirmed"),
        # A weak association is no strong one, however sure.
        (np.arange(200), np.random.default_rng(0).normal(size=200) - np.arange(200) / 190, "undecided", "confirmed"),
        (np.arange(200), np.random.default_rng(0).normal(size=200), "undecided", "confirmed"),
        # A sure positive one is a positive one, however weak.
        (np.arange(200), np.random.default_rng(0).normal(size=200) + np.arange(200) / 190, "refuted", "refuted"),
    ],
)
def test_the_rule_over_runs(mean, accuracy, robust, clean):
    within, land = {"a": within_table(*ABOVE)}, {"a": landing_table(0.5, 0.6)}
    *_, first, second = softmax.claims(within, land, across_table(mean, accuracy))
    assert (first.claim, first.word) == ("robust accuracy", robust)
    assert (second.claim, second.word) == ("clean accuracy", clean)
    turned = across_table(-np.asarray(mean), accuracy)
    entropy = {"a": within_table(*BELOW, statistic="entropy")}
    assert [c.word for c in softmax.claims(entropy, land, turned, "entropy")][3:] == [robust, clean]
    assert f"Over {len(list(mean))} runs" in first.sentence


def test_the_words_of_tables_that_were_computed():
    """A planted effect is found, its reverse is refuted, and none is neither."""
    across = across_table(range(6), range(6))
    for slope, word in ((1.0, "confirmed"), (-1.0, "refuted"), (0.0, "undecided")):
        tables = {str(seed): synthetic(seed=seed, slope=slope) for seed in range(3)}
        within = {name: softmax.within(table, bootstraps=200) for name, table in tables.items()}
        claims = softmax.claims(within, {n: softmax.landings(t) for n, t in tables.items()}, across)
        assert claims[0].word == word
        assert claims[2].word == "confirmed"


def test_a_verdict_without_its_tables_is_refused():
    within, land, across = {"a": within_table(*ABOVE)}, {"a": landing_table(0.5, 0.6)}, across_table(range(5), range(5))
    for call, message in (
        (lambda: softmax.claims({}, {}, across), "at least one"),
        (lambda: softmax.claims(within, {"b": land["a"]}, across), "same runs"),
        (lambda: softmax.claims(within, land, across, "margin"), "margin"),
        (lambda: softmax.claims(within, land, across, "gap"), "expected rows of .*gap"),
        (lambda: softmax.claims({"a": within["a"].drop(columns="low")}, land, across), "a: .* none of low"),
        (lambda: softmax.claims(within, {"a": land["a"].drop(columns="uniform")}, across), "a: .* none of uniform"),
        (lambda: softmax.claims(within, land, across.drop(columns="note")), "across: .* none of note"),
    ):
        with pytest.raises(UnmovedError, match=message):
            call()
    assert CLAIMED.keys() == set(STATISTICS)
