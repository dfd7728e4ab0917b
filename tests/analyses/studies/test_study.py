"""What studies read of runs that were judged before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from unmoved.analyses.studies.study import answers
from unmoved.evaluation.estimate import Estimate
from unmoved.runs import records
from unmoved.runs.folder import Run

N = 40


def outcomes_of(attack: str, robust: int) -> pd.DataFrame:
    """Outcomes in which the first so many of the samples stand."""
    stands = np.arange(N) < robust
    table = pd.DataFrame({"index": np.arange(N), "label": 0, "attack": attack, "eps": 0.1, "norm": "linf"})
    table["clean_prediction"], table["adversarial_prediction"] = 0, (~stands).astype(int)
    return table.assign(distance=0.1, success=~stands, by=np.where(stands, "none", attack))


def judged(folder: Path, data: str = "0", **robust: int) -> Any:
    """A run with the outcomes of these kinds: an evaluation by quick, a verdict, and a sampled verdict."""
    run = Run.create(folder, {"name": folder.name, "training": {"seed": 0}})
    for kind, left in robust.items():
        name = "autoattack" if kind == "verdict" else "quick"
        facts: Any = {"n": N, "weights": "best", "weights_sha256": "0", "attacks": {name: "A()"}, "split": "test"}
        facts |= {"threat": {"norm": "linf", "eps": 0.1}, "data": data}
        asked = None
        if kind == "sampled":
            facts["sample"] = records.sample(Estimate(N, left, 0, 0, left // 2, 1), "AutoAttack()", {})
            asked = outcomes_of("autoattack", left // 2)
        run.save_evaluation(outcomes_of(name, left), facts, kind=kind, asked=asked)
    return SimpleNamespace(name=folder.name, run=Run.open(folder))


@pytest.mark.parametrize("first", ["evaluation", "sampled"])
def test_of_a_sampled_verdict_studies_read_the_search_that_judged_all_images(first: str, tmp_path: Path) -> None:
    a, b = judged(tmp_path / "a", **{first: 30}), judged(tmp_path / "b", evaluation=20, verdict=10, sampled=20)
    c = judged(tmp_path / "c", evaluation=25, sampled=25)
    found = answers(cast(Any, [a, b, c]))
    assert found is not None
    tables, source = found
    assert source == "quick"  # and not AutoAttack, which left nobody knows which
    assert {name: int(table["worst case"].sum()) for name, table in tables.items()} == {"a": 30, "b": 20, "c": 25}


def test_runs_judged_before_and_after_their_images_were_replaced_are_not_read_together(tmp_path: Path) -> None:
    before, after = judged(tmp_path / "before", evaluation=30), judged(tmp_path / "after", data="1", evaluation=20)
    assert answers(cast(Any, [before, after])) is None
    assert answers(cast(Any, [before, judged(tmp_path / "again", evaluation=20)])) is not None
