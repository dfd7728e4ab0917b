"""The claims of Yu et al. on tables whose answer is known by construction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from unmoved.analyses.bias_variance_claims import DOMINATES, RISES, UNIMODAL, claims
from unmoved.core.errors import UnmovedError


def rows(bias: Sequence[float], variance: Sequence[float], half: float = 0.01, **more: object) -> pd.DataFrame:
    bias_, variance_ = np.array(bias, float), np.array(variance, float)
    table = pd.DataFrame({"train_eps": np.arange(len(bias_)) / 10, "loss": "KL", "correction": "k/(k-1)", "class": -1})
    for name, middle in (("bias", bias_), ("variance", variance_), ("risk", bias_ + variance_)):
        table = table.assign(**{name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half})
    return table.assign(**more)


def words(table: pd.DataFrame) -> dict[str, str]:
    return claims(table).set_index("claim")["verdict"].to_dict()


UP, HILL = (0.5, 0.6, 0.7, 0.8), (0.1, 0.3, 0.2, 0.1)


def test_what_the_paper_saw_is_confirmed() -> None:
    table = rows(UP, HILL).sample(frac=1, random_state=0)
    assert words(table) == dict.fromkeys((RISES, DOMINATES, UNIMODAL), "confirmed")
    found = claims(table).set_index("claim")
    assert found.loc[RISES, "value"] == 1
    assert found.loc[DOMINATES, "value"] == pytest.approx(0.6 / 0.9)
    assert found.loc[UNIMODAL, "value"] == 0.1
    assert "1.00 [1.00, 1.00]" in found.loc[RISES, "words"]


@pytest.mark.parametrize(
    ("claim", "bias", "variance", "half", "word"),
    [
        (RISES, (0.5, 0.7, 0.65, 0.8), HILL, 0.01, "refuted"),  # a clear fall on the way
        (RISES, (0.5, 0.7, 0.69, 0.8), HILL, 0.01, "confirmed"),  # a fall within the intervals
        (RISES, (0.8, 0.7, 0.6, 0.5), HILL, 0.01, "refuted"),
        (RISES, UP, HILL, 0.2, "undecided"),  # intervals too wide
        (RISES, (0.5, 0.5, 0.5, 0.5), HILL, 0.01, "undecided"),
        (RISES, (0.5, 0.5, 0.5, 0.5), HILL, 0.0, "undecided"),
        (RISES, (0.5, 0.8), (0.1, 0.1), 0.01, "undecided"),  # two eps are too few
        (DOMINATES, UP, (0.1, 0.6, 0.2, 0.1), 0.01, "undecided"),
        (DOMINATES, UP, (0.1, 0.7, 0.2, 0.1), 0.01, "refuted"),
        (DOMINATES, UP, (0.48, 0.5, 0.5, 0.5), 0.01, "undecided"),  # touching: 0.49 and 0.49
        (DOMINATES, (0.5,), (0.1,), 0.01, "confirmed"),
        (UNIMODAL, UP, (0.1, 0.3, 0.2, 0.3), 0.01, "refuted"),  # a valley
        (UNIMODAL, UP, (0.1, 0.3, 0.295, 0.3), 0.01, "undecided"),  # no clear fall after
        (UNIMODAL, UP, (0.1, 0.2, 0.3, 0.4), 0.01, "undecided"),  # the peak may be further on
        (UNIMODAL, UP, (0.3, 0.2, 0.1, 0.05), 0.01, "undecided"),
        (UNIMODAL, (*UP, 0.9), (0.1, 0.3, 0.29, 0.295, 0.1), 0.01, "confirmed"),  # a valley within the intervals
        (UNIMODAL, (*UP, 0.9), (0.3, 0.1, 0.15, 0.1, 0.3), 0.01, "refuted"),
        (UNIMODAL, (0.5, 0.8), (0.1, 0.2), 0.01, "undecided"),
    ],
)
def test_each_rule(claim: str, bias: tuple[float, ...], variance: tuple[float, ...], half: float, word: str) -> None:
    assert words(rows(bias, variance, half))[claim] == word


def test_a_rise_from_end_to_end_is_not_enough() -> None:
    """Between clear ends, two eps so uncertain that the order of all four may be any."""
    bias, half = (0.5, 0.9, 0.3, 0.55), np.array([0.01, 0.5, 0.5, 0.01])
    table = rows(bias, (0.1,) * 4)
    table["bias_low"], table["bias_high"] = bias - half, bias + half
    assert words(table)[RISES] == "undecided"


def test_permutations_that_disagree_widen_the_intervals() -> None:
    """Half-widths .01 of images; std .1 of three permutations adds 4.30 * .1 / sqrt(3) = .25."""
    table = rows(UP, HILL, bias_std=0.1, variance_std=0.1, risk_std=0.1, permutations=3)
    assert set(words(table).values()) == {"undecided"}
    table["bias_std"] = table["variance_std"] = 0.001
    assert set(words(table).values()) == {"confirmed"}
    alone = rows(UP, HILL, bias_std=np.nan, variance_std=np.nan, risk_std=np.nan, permutations=1)
    assert set(words(alone).values()) == {"confirmed"}
    edge = rows((0.5,), (0.0,), bias_std=0.1, variance_std=0.0, permutations=3)  # low end: .5 - hypot(.01, .2484)
    edge[["variance", "variance_low", "variance_high"]] = 0.2513
    assert words(edge)[DOMINATES] == "confirmed"
    edge[["variance", "variance_low", "variance_high"]] = 0.2515
    assert words(edge)[DOMINATES] == "undecided"


def test_conditions_are_judged_apart() -> None:
    both = pd.concat([rows(UP, HILL, eval_eps=0.0), rows(UP[::-1], HILL, eval_eps=0.1)])
    found = claims(both).set_index(["eval_eps", "claim"])["verdict"]
    assert (found[0.0, RISES], found[0.1, RISES]) == ("confirmed", "refuted")
    named = both.rename(columns={"eval_eps": "width"})
    assert claims(named, by=["width"])["verdict"].tolist() == claims(both)["verdict"].tolist()
    with pytest.raises(UnmovedError, match="several of 0; merge"):
        claims(named)


def test_rows_of_classes_play_no_part() -> None:
    classes = rows(UP[::-1], HILL).assign(**{"class": 3})
    assert words(pd.concat([rows(UP, HILL), classes]))[RISES] == "confirmed"
    with pytest.raises(UnmovedError, match="no row of class -1"):
        claims(classes)
    with pytest.raises(UnmovedError, match="none of train_eps, width"):
        claims(rows(UP, HILL).drop(columns="train_eps"), by=["width"])
