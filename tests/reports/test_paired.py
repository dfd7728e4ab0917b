"""A method beside its base: paired differences against a plain count, and the words that follow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.estimate import Estimate
from unmoved.evaluation.outcomes import wilson
from unmoved.reports.paired import beside, difference
from unmoved.runs.by_recipe import EvaluatedRun, RecipeResult


def outcomes_of(right_clean, right_attacked):
    """Outcomes of one attack: label 0 everywhere, prediction 1 where wrong."""
    n = len(right_clean)
    clean, attacked = np.asarray(right_clean, bool), np.asarray(right_clean, bool) & np.asarray(right_attacked, bool)
    return pd.DataFrame(
        {
            "index": np.arange(n),
            "label": 0,
            "attack": "apgd",
            "eps": 0.1,
            "norm": "linf",
            "clean_prediction": (~clean).astype(int),
            "adversarial_prediction": (~attacked).astype(int),
            "distance": 0.05,
            "success": ~attacked,
            "by": np.where(attacked, "none", "apgd"),
        }
    )


def verdict(name, tables, base=None, autoattack=None, estimates=None):
    recipe, facts, judged = {"base": base} if base else {}, {"split": "t"}, autoattack or {}
    estimates = estimates or {}
    runs = tuple(
        EvaluatedRun(
            None,
            name,
            seed,
            recipe,
            {},
            pd.DataFrame(),
            table,
            None,
            None,
            facts,
            judged.get(seed),
            estimate=estimates.get(seed),
        )
        for seed, table in tables.items()
    )
    return RecipeResult(name, runs)


def test_the_difference_is_paired():
    draw = np.random.default_rng(0)
    ours = [draw.random(200) < 0.7 for _ in range(2)]
    theirs = [draw.random(200) < 0.5 for _ in range(2)]
    full = np.ones(200, bool)
    mean, low, high = difference(
        [outcomes_of(full, r) for r in ours], [outcomes_of(full, r) for r in theirs], "worst case"
    )
    d = [sum(int(o[i]) - int(t[i]) for o, t in zip(ours, theirs, strict=True)) / 2 for i in range(200)]
    center = sum(d) / 200
    spread = (sum((v - center) ** 2 for v in d) / 199) ** 0.5
    assert mean == pytest.approx(center)
    assert (low, high) == pytest.approx((center - 1.96 * spread / 200**0.5, center + 1.96 * spread / 200**0.5))
    same = difference([outcomes_of(full, ours[0])], [outcomes_of(full, ours[0])], "worst case")
    assert same == (0, 0, 0)


def test_seeds_that_disagree_show_nothing():
    full, half = np.ones(300, bool), np.arange(300) % 2 == 0
    base = verdict("base", {0: outcomes_of(full, half), 1: outcomes_of(full, half)})
    mixed = verdict(
        "mixed", {0: outcomes_of(full, full), 1: outcomes_of(full, half & (np.arange(300) > 9))}, base="base"
    )
    table = beside([base, mixed]).set_index("recipe")
    assert "[+" in table.loc["mixed", "robust"]
    assert table.loc["mixed", "conclusion"].endswith("robust: no difference shown")
    mirrored = verdict("mirrored", {0: base.runs[0].outcomes, 1: base.runs[1].outcomes}, base="mixed")
    table = beside([mixed, mirrored]).set_index("recipe")
    assert ", -" in table.loc["mirrored", "robust"]
    assert table.loc["mirrored", "conclusion"].endswith("robust: no difference shown")


def test_a_real_gain_near_zero_is_not_called_help():
    full, none = np.ones(300, bool), np.zeros(300, bool)
    base = verdict("base", {0: outcomes_of(full, none)})
    gain = verdict("gain", {0: outcomes_of(full, np.arange(300) < 12)}, base="base")
    table = beside([base, gain]).set_index("recipe")
    assert table.loc["gain", "robust"].startswith("4.0 (+4.0 [+1")
    assert table.loc["gain", "conclusion"].endswith("robust: next to nothing either way")


def test_words_and_rows():
    full, half = np.ones(300, bool), np.arange(300) % 2 == 0
    base = verdict("base", {0: outcomes_of(full, half)})
    better = verdict("better", {0: outcomes_of(full, full)}, base="base")
    worse = verdict("worse", {0: outcomes_of(half, half & (np.arange(300) > 99))}, base="base")
    same = verdict("same", {0: outcomes_of(full, ~half)}, base="base")
    stranger = verdict("stranger", {0: outcomes_of(full, full)}, base="not here")
    other_seed = verdict("other seed", {5: outcomes_of(full, full)}, base="base")
    table = beside([base, better, worse, same, stranger, other_seed]).set_index("recipe")
    assert list(table.index) == ["better", "worse", "same"]
    assert table.loc["better", "conclusion"] == "clean: no difference shown; robust: helps"
    assert table.loc["worse", "conclusion"] == "clean: hurts; robust: hurts"
    assert table.loc["same", "conclusion"] == "clean: no difference shown; robust: no difference shown"
    assert table.loc["better", "robust"].startswith("100.0 (+50.0 [")
    assert set(table["n"]) == {300}
    assert beside([base, stranger]).empty


def test_autoattack_is_compared_where_it_has_judged_both():
    full, half = np.ones(300, bool), np.arange(300) % 2 == 0
    weak = {0: outcomes_of(full, full), 1: outcomes_of(full, full)}  # an attack that finds nothing
    strong = {seed: outcomes_of(full, half).assign(attack="autoattack") for seed in (0, 1)}
    base = verdict("base", {0: outcomes_of(full, half), 1: outcomes_of(full, half)}, autoattack=strong)
    few = {1: strong[1][strong[1]["index"] < 100]}
    one = verdict("one", weak, base="base", autoattack=few)
    none = verdict("none", weak, base="base")
    table = beside([base, one, none]).set_index("recipe")
    assert list(table.columns).index("AutoAttack") == list(table.columns).index("robust") + 1
    assert table.loc["one", "AutoAttack"] == "50.0 (+0.0 [+0.0, +0.0]), n = 100, 1 of 2 seeds"
    said = "clean: no difference shown; robust: helps; AutoAttack: no difference shown"
    assert table.loc["one", "conclusion"] == said  # the gain was over a weak attack
    assert table.loc["none", "AutoAttack"] == "-"
    rand = {seed: rows.assign(attack="autoattack-rand") for seed, rows in strong.items()}
    other = verdict("other", weak, base="base", autoattack=rand)
    assert "AutoAttack" not in beside([base, other, none]).columns  # another version is no comparison
    alone = [verdict("base", strong, autoattack=strong), verdict("a", strong, base="base", autoattack=strong)]
    assert "AutoAttack" not in beside(alone).columns  # it is the robust column already


def test_a_sampled_verdict_is_not_paired_and_both_figures_have_their_intervals():
    full, half = np.ones(300, bool), np.arange(300) % 2 == 0
    weak, strong = {0: outcomes_of(full, full)}, {0: outcomes_of(full, half).assign(attack="autoattack")}
    base = verdict("base", weak, autoattack=strong)
    near, far = ({0: Estimate(300, left, 0, 0, 100, 2)} for left in (150, 290))
    table = beside([base, *(verdict(str(k), weak, "base", estimates=e) for k, e in enumerate((near, far)))])
    low, high = (f"{100 * end:.1f}" for end in near[0].population)
    below, above = (f"{100 * end:.1f}" for end in wilson(150, 300))
    assert table["AutoAttack"].iloc[0] == f"49.0 [{low}, {high}] beside 50.0 [{below}, {above}], sampled"
    said = [words.partition("AutoAttack: ")[2] for words in table["conclusion"]]
    assert said == ["sampled, the intervals overlap", "sampled, the intervals are apart"]
    both = verdict("both", weak | {1: weak[0]}, "base", autoattack=strong, estimates={1: near[0]})
    assert "+0.0" in beside([base, both])["AutoAttack"].iloc[0]  # the seed that is complete in both is paired


def test_samples_are_paired_by_their_identity_and_never_with_others():
    draw = np.random.default_rng(1)
    ours = [outcomes_of(np.ones(60, bool), draw.random(60) < share) for share in (0.3, 0.6)]
    theirs = [outcomes_of(np.ones(60, bool), draw.random(60) < share) for share in (0.5, 0.4)]
    right = difference(ours, theirs, "worst case")
    shuffled = [ours[0].sample(frac=1, random_state=0), ours[1]], [theirs[0], theirs[1].sample(frac=1, random_state=1)]
    assert difference(*shuffled, "worst case") == pytest.approx(right, abs=1e-12)
    for other in (
        theirs[1].assign(index=theirs[1]["index"] + 20),
        theirs[1][theirs[1]["index"] < 59],
        theirs[1].assign(label=1, clean_prediction=1, success=False, by="none", adversarial_prediction=1),
    ):
        with pytest.raises(UnmovedError, match="expected runs on the same data"):
            difference(ours, [theirs[0], other], "worst case")
