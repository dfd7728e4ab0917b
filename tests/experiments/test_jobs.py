"""Sweeps and splits: what they set, what their runs are called, and that parts of the data never overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.cli import RECIPE, here, recipe, unmoved
from hypothesis import given
from hypothesis import strategies as st

from unmoved.core.errors import UnmovedError
from unmoved.data import ArraySplit
from unmoved.experiments import jobs
from unmoved.runs.assembly import Assembly
from unmoved.runs.by_recipe import results_by_recipe
from unmoved.runs.folder import Run
from unmoved.runs.recipe import parse


def numbers(n: int) -> ArraySplit:
    return ArraySplit.of(torch.zeros(n, 1, 5, 5), torch.arange(n) % 2)


@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 3))
def test_parts_are_disjoint_equal_and_all_but_complete(n: int, of: int, permutation: int) -> None:
    if of > n:
        return
    split = numbers(n)
    parts = [split.part(number, of, permutation).index.tolist() for number in range(of)]
    assert {len(part) for part in parts} == {n // of}
    assert len(set().union(*parts)) == of * (n // of)
    assert parts == [split.part(number, of, permutation).index.tolist() for number in range(of)]


def test_another_permutation_cuts_otherwise() -> None:
    split = numbers(40)
    assert set(split.part(0, 2, 0).index.tolist()) != set(split.part(0, 2, 1).index.tolist())
    with pytest.raises(UnmovedError, match="data: part: expected a whole number >= 0 and <= 1, came 2"):
        split.part(2, 2)
    with pytest.raises(UnmovedError, match="expected at most 40 parts"):
        split.part(0, 41)


def test_a_sweep_is_a_product_and_names_what_it_set(tmp_path: Path) -> None:
    swept = jobs.read([recipe(tmp_path)], ["name=a/b"], ["objective.ce.weight=0.5,2", "training.epochs=1,3"])
    assert [r.name for r in swept] == [
        f"a/b ce.weight={w} training.epochs={e}" for w in ("0.5", "2") for e in ("1", "3")
    ]
    assert [(r.objective["ce"].weight, r.training.epochs) for r in swept] == [(0.5, 1), (0.5, 3), (2.0, 1), (2.0, 3)]
    assert swept[0].swept is not None
    assert (swept[0].swept.method, swept[0].swept.values) == (
        "a/b",
        {"objective.ce.weight": "0.5", "training.epochs": "1"},
    )
    assert parse(swept[0].tables()).tables() == swept[0].tables()
    assert jobs.read([recipe(tmp_path)], [])[0].swept is None


@pytest.mark.parametrize("sweep", ["objective.ce.weight", "a=", "=1", "a=1,1", "a=1,,2"])
def test_a_sweep_without_values_is_refused(tmp_path: Path, sweep: str) -> None:
    with pytest.raises(UnmovedError, match="expected a key and different values"):
        jobs.read([recipe(tmp_path)], [], [sweep])


def planned(tmp_path: Path, seeds: tuple[int, ...] = (0,), **settings: int) -> list[jobs.Job]:
    return jobs.jobs_of(jobs.read([recipe(tmp_path)], ["name=a"]), seeds, tmp_path, (), 1, **settings)


def test_each_part_of_each_permutation_is_a_run_with_a_seed_of_its_own(tmp_path: Path) -> None:
    made = planned(tmp_path, (5,), splits=2, permutations=2)
    assert [Path(job.path).name for job in made] == [f"permutation{i}-part{j}of2" for i in (0, 1) for j in (1, 2)]
    assert [job.tables["training"]["seed"] for job in made] == [5, 6, 7, 8]
    assert made[3].label == "a seed 8 permutation 1 part 2 of 2"
    trained = [set(Assembly(parse(job.tables)).data.train.index.tolist()) for job in made]
    assert not trained[0] & trained[1]
    assert not trained[2] & trained[3]
    assert trained[0] & trained[2]
    assert len(trained[0] | trained[1]) >= len(Assembly(parse(planned(tmp_path)[0].tables)).data.train) - 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"splits": 1}, "expected --splits of at least 2 and --permutations of at least 1, came 1 and 1"),
        ({"splits": -2}, "expected --splits of at least 2"),
        ({"splits": 2, "permutations": 0}, "came 2 and 0"),
        ({"permutations": 2}, "give --splits too"),
        ({"splits": 2, "seeds": (0, 1)}, "so expected one --seeds, came 2"),
    ],
)
def test_splits_that_mean_nothing_are_refused(tmp_path: Path, settings: dict[str, int], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        planned(tmp_path, **settings)


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnmovedError, match=r"training\.part: expected a part 0..1, came 2"):
        parse({**tables(), "training": {"part": {"of": 2, "number": 2}}})


def tables() -> dict[str, object]:
    import tomllib

    return tomllib.loads(RECIPE)


def test_a_comparison_of_parts_trains_and_is_reported_as_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    said = unmoved(
        "compare", recipe(tmp_path), "--set", "training.epochs=1", "--set", "evaluation.n=20", "--splits", 2, "--sweep",
        "attack.eps=0,0.1", "--workers", 1, "--out", tmp_path / "out",
    ).fine()  # fmt: skip
    assert "permutation 0 part 2 of 2" in " ".join(said.out.split())
    runs = [Run.open(path.parent) for path in sorted(tmp_path.glob("out/*/*/recipe.toml"))]
    assert len(runs) == 4
    judged = results_by_recipe(runs)
    assert [len(verdict.runs) for verdict in judged] == [2, 2]
    assert {verdict.name.split()[-1] for verdict in judged} == {"attack.eps=0", "attack.eps=0.1"}
