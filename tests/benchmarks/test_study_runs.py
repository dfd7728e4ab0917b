"""The study: each method is the recipe that the protocol says, and what has its tables is not made again."""

from __future__ import annotations

import argparse
import gzip
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import results
import study
from helpers.cli import RECIPE, digests, here, recipe
from study_methods import METHODS, STUDIES, recipe_of
from study_tables import choice, read, record, zipped

from unmoved.attacks import PGD
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.runs import recipe as config
from unmoved.runs.evaluate import examine_run

SETTINGS = {entry["tuned"][0]: entry["tuned"][1][0] for entry in METHODS.values() if "tuned" in entry}
REAL = list(STUDIES)


def made(name: str, method: str, is_trial: bool = False, **settings: float) -> config.Recipe:
    return recipe_of(name, method, SETTINGS | settings, 7, data=Path("images"), is_trial=is_trial)


def eps_at(recipe: config.Recipe, share: float) -> float:
    """The eps of the attack when a share of the training is done, from the tables alone."""
    epochs, parts = recipe.training.epochs, recipe.phase_parts()
    k = max(number for number, (start, _) in enumerate(parts) if start <= share * epochs)
    start, end = parts[k][0], parts[k + 1][0] if k + 1 < len(parts) else epochs
    eps: Any = parts[k][1]["attack"]["eps"]
    if not isinstance(eps, dict):
        return float(eps)
    done = (share * epochs - start) / (end - start) / eps["over"]
    return float(eps["from"] + (eps["to"] - eps["from"]) * min(done, 1))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("is_trial", [False, True])
def test_each_method_is_the_studys_recipe_but_for_what_the_protocol_changes(name: str, is_trial: bool) -> None:
    at = made(name, "AT", is_trial)
    for method, entry in METHODS.items():
        one = made(name, method, is_trial)
        changed = set(config.differing(one, at.tables())) - {"name", "base"}
        assert changed <= {"objective", "attack", "defense", "phases"}, method
        tables: Any = one.tables()
        if one.attack is None:
            assert not one.phases
        else:
            assert tables["attack"]["loss"]["use"] == ("kl" if "trades" in tables["objective"] else "ce"), method
            moments = [k / 40 for k in range(40)]
            ours, theirs = ([eps_at(recipe, share) for share in moments] for recipe in (one, at))
            # IAAT's radii do not ramp: from where they are its own, the cap is the eps with which the ramp ends.
            late = method == "IAAT"
            same = [share for share in moments if not late or share * one.training.epochs < one.phases[-1].from_epoch]
            assert ours[: len(same)] == pytest.approx(theirs[: len(same)]), method
            assert ours[len(same) :] == pytest.approx([eps_at(at, 0.999)] * (40 - len(same)))
        for value in entry["tuned"][1][1:] if "tuned" in entry else ():
            assert config.differing(made(name, method, is_trial, **{entry["tuned"][0]: value}), tables), method


def test_a_trial_has_the_schedule_in_half_the_time() -> None:
    run, trial = made("mnist", "TRADES"), made("mnist", "TRADES", is_trial=True)
    assert (run.training.epochs, trial.training.epochs) == (8, 4)
    moments = [k / 16 for k in range(16)]
    assert [eps_at(trial, share) for share in moments] == pytest.approx([eps_at(run, share) for share in moments])
    assert set(trial.evaluation.attacks) == {"square", "smoothed"}
    assert (trial.evaluation.n, run.evaluation.n) == (None, 10_000)


def test_a_setting_without_a_value_is_named() -> None:
    with pytest.raises(UnmovedError, match="TRADES-AWP: expected a value of 'awp'"):
        recipe_of("mnist", "TRADES-AWP", {"beta": 3.0}, 0, data=None)


def rows(*counts: tuple[float, int, int]) -> list[dict[str, str]]:
    return [{"value": str(v), "clean": str(clean), "worst": str(worst), "n": "2000"} for v, clean, worst in counts]


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ([(3, 1980, 1700), (1, 1980, 1800), (6, 1980, 1750)], 1),
        ([(3, 1980, 1700), (1, 1960, 1800), (6, 1959, 1900)], 1),  # a point of 2,000 is 20 images: 1960 may, 1959 not
        ([(3, 1980, 1800), (1, 1985, 1800), (6, 1970, 1800)], 3),  # ties go to the default
        ([(6, 1980, 1800), (3, 1970, 1800), (1, 0, 1900)], 3),  # whatever the order of the rows; a run that failed
    ],
)
def test_the_highest_worst_case_among_those_a_point_below_the_best_is_chosen(
    counts: list[tuple[float, int, int]], chosen: float
) -> None:
    assert choice(rows(*counts), (3, 1, 6)) == chosen


def test_seed_0_of_all_methods_comes_first() -> None:
    asked: dict[str, Any] = {"study": "mnist", "data": Path(), "out": Path(), "results": Path(), "complete": None}
    jobs = study.jobs_of(argparse.Namespace(**asked, only="SENSE,standard", seeds=None))
    assert [job.label for job in jobs] == [f"{method} seed {k}" for k in range(3) for method in ("standard", "SENSE")]
    with pytest.raises(UnmovedError, match="came 'TRADE'"):
        study.jobs_of(argparse.Namespace(**asked, only="TRADE", seeds="0"))


def test_a_table_is_in_the_order_of_the_protocol_and_has_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for method, seed, n in (("SENSE", 1, 1), ("SENSE", 0, 1), ("AT", 0, 1), ("SENSE", 0, 2)):
        record(path, {"method": method, "seed": seed, "n": n}, ("method", "seed"))
    assert path.read_text(encoding="utf-8") == "method,seed,n\nAT,0,1\nSENSE,0,2\nSENSE,1,1\n"
    data = zipped(pd.DataFrame({"index": [1, 2]}))
    assert data[4:8] == bytes(4), "no time"
    assert gzip.decompress(data) == b"index\n1\n2\n"


# --- in miniature

Command = Callable[..., None]


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The study's command on digits: three methods, two of them tuned, with attacks of a few steps."""
    here(monkeypatch)
    text = (
        RECIPE.replace("test = 1500", "test = 600")
        .replace("epochs = 2", "epochs = 4")
        .replace("eps = 0.1", "eps = 0.03")
    )
    about = {"recipe": str(recipe(tmp_path, text)), "title": "Digits", "n": 200, "sampled": True, "seeds": [0]}
    monkeypatch.setitem(STUDIES, "tiny", about | {"methods": ["AT", "TRADES", "DRSL on TRADES"]})
    for method in ("TRADES", "DRSL on TRADES"):
        name, values = METHODS[method]["tuned"]
        monkeypatch.setitem(METHODS, method, METHODS[method] | {"tuned": (name, values[:2])})
    monkeypatch.setattr(study, "WITHIN", 20.0)
    monkeypatch.setattr(study, "examine_run", partial(examine_run, n=4))
    monkeypatch.setattr(
        "unmoved.runs.evaluate.AutoAttack", lambda threat, version, seed: PGD(threat, steps=3, seed=seed)
    )
    monkeypatch.setattr("unmoved.runs.sampled_autoattack.Quick", lambda threat, seed: PGD(threat, steps=1, seed=seed))
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return lambda *more: study.main(["tiny", *where, *more])


def pgd(threat: ThreatModel, steps: int, seed: int, version: str = "") -> PGD:
    return PGD(threat, steps=steps, seed=seed)


def forbid(patch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("made anew")

    for name in ("train_recipe", "evaluate_run", "examine_run"):
        patch.setattr(study, name, never)


def test_the_study_in_miniature(miniature: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature()
    tables = tmp_path / "results" / "tiny"
    tuning, runs = read(tables / "tuning.csv"), read(tables / "runs.csv")
    assert [(row["method"], row["value"]) for row in tuning] == [
        ("TRADES", "3.0"), ("TRADES", "1.0"), ("DRSL on TRADES", "0.64"), ("DRSL on TRADES", "0.16")
    ]  # fmt: skip
    beta, weight = choice(tuning[:2], (3.0, 1.0)), choice(tuning[2:], (0.64, 0.16))
    assert [row["setting"] for row in runs] == ["", f"beta={beta:g}", f"beta={beta:g} drsl={weight:g}"]
    for row in runs:
        images = pd.read_csv(study.outcomes_path(tables, row["method"], row["seed"]))
        right = images["label"] == images["clean_prediction"]
        assert row["complete"] == "no", "the premise: a sample was asked"
        assert len(images) == int(row["n"]) == 200
        assert (right.sum(), (images["pgd40"] == 0).sum()) == (int(row["clean"]), int(row["pgd40"]))
        assert images["asked"].sum() == int(row["asked"]) < (images["quick"] == 0).sum() == int(row["survivors"])
        # Two of the attack, one a view of the step; and KL asks for the clean logits, which have no gradient there.
        assert (float(row["forward"]), float(row["backward"])) == ((3, 3) if row["method"] == "AT" else (5, 4))
    before = digests(tmp_path / "results")
    with monkeypatch.context() as patch:
        forbid(patch)
        miniature()
        job = study.Job("tiny", "TRADES", 0, tmp_path, tmp_path / "runs", tmp_path / "results")
        study.tune(job, "TRADES", 3.0)  # as one who waited while another process tried this value
        shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
        miniature()
        assert digests(tmp_path / "results") == before
        with pytest.raises(SystemExit, match="complete it where it was made"):
            miniature("--complete", "AT:0")
        study.outcomes_path(tables, "AT", 0).unlink()
        with pytest.raises(SystemExit) as said:
            miniature()
        assert [line.split(": ")[2] for line in str(said.value).splitlines()] == ["AT seed 0"]
    shutil.move(tmp_path / "elsewhere", tmp_path / "runs")
    miniature("--complete", "AT:0")
    (done,) = [row for row in read(tables / "runs.csv") if row["method"] == "AT"]
    assert (done["complete"], done["asked"], done["low"]) == ("yes", "200", done["left"])
    assert pd.read_csv(study.outcomes_path(tables, "AT", 0))["asked"].all()
    page = results.page(results.studies_in(tmp_path / "results"), tmp_path / "verdicts.toml")
    assert f"| DRSL on TRADES | beta={beta:g} drsl={weight:g} | 1 | 200 |" in page
    results.figure("tiny", results.studies_in(tmp_path / "results")["tiny"])


def test_settings_of_another_study_are_asked_for_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "work", None)  # nothing that a process could do
    with pytest.raises(SystemExit, match=r"mnist/tuning\.csv: expected a row for each of beta = 3\.0, 1\.0, 6\.0"):
        study.main(["mnist-l2", "--data", "x", "--results", str(tmp_path), "--out", str(tmp_path / "runs")])
    assert not list(tmp_path.iterdir())
