"""The study's page: the protocol's rule against examples by hand, and what stands there is what the tables make."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import results
import study_words
from helpers.cli import ROOT
from study_judgement import Comparison, Judged, Outcome, compared, over_images, over_seeds
from study_methods import STUDIES
from study_tables import zipped

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.estimate import Estimate

N = 100
Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Make a run of 100 images, the first ``clean`` of which are right and those from ``first`` to ``last`` left."""

    def make(first: int, last: int, *, clean: int = N, pgd40: int = N, seed: int = 0, **sample: float) -> Outcome:
        index = range(N)
        images = pd.DataFrame({"index": index, "label": 0, "clean_prediction": [int(k >= clean) for k in index]})
        images["pgd40"] = [int(k >= pgd40) for k in index]
        images["quick"] = images["autoattack"] = [int(not first <= k < last) for k in index]
        if sample:
            images["autoattack"] = math.nan
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv.gz"
        path.write_bytes(zipped(images))
        row = {"method": "m", "seed": seed, "n": N, "clean": clean, "pgd40": pgd40, "left": last - first, "failed": ""}
        row |= {"complete": "no" if sample else "yes", **sample}
        return Outcome({name: str(value) for name, value in row.items()}, path)

    return make


def test_over_seeds_is_students_t() -> None:
    low, high = over_seeds([1.0, 2.0, 3.0]) or (0, 0)
    half = 4.302653 / math.sqrt(3)  # the table of t with two degrees of freedom; the deviation is 1
    assert (low, high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert over_seeds([1.0, 1.0]) is None


def test_over_images_of_complete_verdicts_is_paired(run: Run) -> None:
    """15 images are left by the first alone and 5 by the second alone: d = 0.1, its variance 0.19 * 100 / 99."""
    half = 1.959964 * math.sqrt(0.19 / 99)
    assert over_images(run(0, 60), run(15, 65), "autoattack") == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)


def test_over_images_of_samples_adds_what_they_do_not_tell(run: Run) -> None:
    """Where every far survivor was asked, nothing is unknown: the bound of the variance alone is wider."""
    known = {"survivors": 60, "near": 0, "near_broken": 0, "far_asked": 60, "far_broken": 0, "error": 0.035}
    half = 2.241403 * math.sqrt(0.2 / N)  # z at 0.9875: half of the error
    sampled = over_images(run(0, 60, **known), run(15, 65), "autoattack")
    assert sampled == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    part = known | {"far_asked": 30}
    low, high = Estimate(N, 60, 0, 0, 30, 0, error=0.035 / 4).interval  # each of two samples has a quarter
    assert high == 60
    both = over_images(run(0, 60, **part), run(10, 70, **part), "autoattack")
    half = 2.241403 * math.sqrt((20 + 2 * (60 - low)) / N / N)
    assert both == pytest.approx(((low - 60) / N - half, (60 - low) / N + half), abs=1e-6)


def test_runs_on_other_images_are_not_compared(run: Run, tmp_path: Path) -> None:
    one, other = run(0, 60), run(0, 60)
    other.path.write_bytes(zipped(pd.read_csv(other.path).iloc[1:]))
    with pytest.raises(UnmovedError, match="same images"):
        over_images(one, other, "clean")


def test_the_images_are_those_of_the_median_seed(run: Run) -> None:
    lasts = (50, 90, 70)
    pairs = [(run(0, last, seed=seed), run(0, 40, seed=seed)) for seed, last in enumerate(lasts)]
    found = compared(pairs, "autoattack")
    low, high = over_images(*pairs[2], "autoattack")
    assert (found.mean, found.count) == (pytest.approx(30), 3)
    assert found.images == pytest.approx((100 * low, 100 * high))


def test_of_seeds_with_the_same_difference_rounding_chooses_none(run: Run) -> None:
    """0.07 - 0.06 is greater than 0.02 - 0.01 by rounding alone; the two intervals are not the same."""
    pairs = [(run(0, 7, seed=0), run(0, 6, seed=0)), (run(0, 2, seed=1), run(2, 3, seed=1))]
    assert 0.07 - 0.06 > 0.02 - 0.01
    low, high = over_images(*pairs[0], "autoattack")
    assert compared(pairs, "autoattack").images == pytest.approx((100 * low, 100 * high))


ABOVE, AROUND, BELOW = (0.1, 0.9), (-0.4, 0.6), (-0.9, -0.1)


@pytest.mark.parametrize(
    ("mean", "seeds", "images", "word"),
    [
        (0.5, ABOVE, ABOVE, "shown"),
        (0.5, ABOVE, AROUND, "suggested"),
        (0.5, AROUND, ABOVE, "suggested"),
        (0.5, None, ABOVE, "suggested"),  # one seed, however clear
        (0.5, AROUND, AROUND, "not shown"),
        (0.5, AROUND, BELOW, "not shown"),  # the median seed says the opposite of the mean
        (-0.5, BELOW, BELOW, "shown"),
        (0.0, AROUND, AROUND, "not shown"),
    ],
)
def test_the_word_is_that_of_the_protocol(
    mean: float, seeds: tuple[float, float] | None, images: tuple[float, float], word: str
) -> None:
    assert Judged(mean, seeds, images, 3).word == word


GAIN, MAYBE, NONE, LOSS = (
    Judged(0.5, ABOVE, ABOVE, 3),
    Judged(0.5, ABOVE, AROUND, 3),
    Judged(0.1, AROUND, AROUND, 3),
    Judged(-0.5, BELOW, BELOW, 3),
)


@pytest.mark.parametrize(
    ("clean", "pgd40", "autoattack", "words"),
    [
        (NONE, GAIN, GAIN, "better at no price"),
        (LOSS, GAIN, GAIN, "better, at a price in clean accuracy"),
        (NONE, GAIN, NONE, "masking: PGD-40 +0.5, AutoAttack +0.1"),
        (GAIN, GAIN, LOSS, "masking: PGD-40 +0.5, AutoAttack -0.5"),
        (NONE, GAIN, MAYBE, ""),
        (NONE, MAYBE, NONE, ""),
        (GAIN, NONE, LOSS, "worse"),
    ],
)
def test_masking_is_a_gain_that_pgd_alone_shows(clean: Judged, pgd40: Judged, autoattack: Judged, words: str) -> None:
    assert Comparison("a", "b", {"clean": clean, "pgd40": pgd40, "autoattack": autoattack}).words() == words


def test_a_passage_is_filled_from_the_tables_or_left_out() -> None:
    facts = {"mnist": {"SENSE": {"clean": "99.1"}, "AT": {}}}
    passages = ["SENSE: {mnist/SENSE/clean} %.", "{mnist/SENSE/clean} {mnist/FAT/clean} {mnist/SENSE/clean_word}"]
    missing: study_words.Missing = {}
    assert [study_words.filled(text, facts, "v", missing) for text in passages] == ["SENSE: 99.1 %.", ""]
    assert missing == {"mnist": {"FAT": None, "AT": None}}
    for wrong in ("{mnist/SENSE/cleam}", "{mnist/SENS/clean}", "{minst/SENSE/clean}"):
        with pytest.raises(UnmovedError, match=r"v: .*expected"):
            study_words.filled(wrong, facts, "v")


def test_a_verdict_names_the_study_of_each_figure_whichever_methods_were_run_first() -> None:
    ran = {"clean": "99.1", "pgd40": "3.0", "autoattack": "0.1", "interval": "[0.0, 0.2]", "kind": "sampled"}
    ran |= {"n": "10,000", "seeds": "1", "hardware": "a machine"}
    beside = {f"{name}_{part}": part for name in study_words.MEASURES for part in ("difference", "word", "ends")}
    facts = {
        "mnist": {
            "DRSL": ran,
            "DRSL on AT": {},
            "DRSL on TRADES": ran | beside | {"judgement": "", "seeds": "2"},
            "TRADES": ran | {"hardware": "another"},
        },
        "digits": {"DRSL": {}, "DRSL on AT": {"failed": "failed, seed 0"}, "DRSL on TRADES": {}},
    }
    written = {
        "claim": "Claim.",
        "methods": ["DRSL", "DRSL on AT", "DRSL on TRADES"],
        "mnist": ["{mnist/DRSL/pgd40}!"],
        "digits": ["Not yet."],
    }
    said = " ".join(study_words.verdict("DRSL", written, facts, "v").split())
    assert said.startswith(
        f"**DRSL.** Claim. **{STUDIES['mnist']['title']}** (n = 10,000, seeds: 1 or 2, AutoAttack sampled, a machine "
        "and another). Alone, on clean images: 0.1 % [0.0, 0.2] under AutoAttack, 3.0 under PGD-40. Added to TRADES: "
        "difference points under AutoAttack, word (ends); clean accuracy difference, word; PGD-40 difference, word. "
        f"3.0! **{STUDIES['digits']['title']}**. DRSL on AT: failed, seed 0. (Not run yet: "
    )
    assert said.endswith(
        "(Not run yet: MNIST, linf 0.3: DRSL on AT; Digits of 8x8 pixels, linf 0.2: DRSL, DRSL on TRADES.)"
    )


def test_what_chance_would_show_is_counted_where_something_can_be_shown() -> None:
    def study(*counts: int) -> results.Study:
        beside = {
            str(k): Comparison("a", "b", {"clean": Judged(0, None, None, count)}) for k, count in enumerate(counts)
        }
        return results.Study({}, beside, {}, [])

    assert results.by_chance({"mnist": study(1, 2), "digits": study()}) == ""
    words = results.by_chance({"mnist": study(1, 2), "digits": study(*[5] * 40)})
    assert words.startswith(" 40 methods")
    assert "about 2 would" in words


def test_trials_show_the_value_that_is_chosen_once_all_are_there() -> None:
    """The middle value is the most robust one; the last would be, were it not two points worse on clean images."""
    counts = {"3.0": (900, 300), "1.0": (905, 400), "6.0": (885, 500)}
    rows = [
        {"method": "TRADES", "value": value, "clean": str(clean), "worst": str(worst), "n": "1000", "failed": ""}
        for value, (clean, worst) in counts.items()
    ]
    assert "| TRADES | beta | 3: 90.0 / 30.0, **1: 90.5 / 40.0**, 6: 88.5 / 50.0 |" in results._trials(rows)[1]
    assert "**" not in results._trials(rows[:2])[1]
    assert results._trials([]) == []


def test_a_table_on_another_page_is_filled_and_the_rest_is_left() -> None:
    aa = {"clean": "90.0", "pgd40": "50.0", "autoattack": "40.0", "interval": "[35.0, 45.0]", "kind": "complete"}
    facts = {"digits": {"AT": aa | {"n": "449", "seeds": "5"}, "SENSE": {}}}
    before, after = "# Page\n\n<!-- study digits: AT,\n     SENSE -->\n", "<!-- end of study -->\n\nMore.\n"
    text = study_words.with_tables(f"{before}old\n{after}", facts, "p")
    assert text.startswith(before)
    assert text.endswith(after)
    assert "| AT | 90.0 | 50.0 | **40.0** [35.0, 45.0] |" in text
    assert "| SENSE | not run yet |" in text
    assert study_words.with_tables(text, facts, "p") == text
    for wrong in ("digits: ATT", "digit: AT"):
        with pytest.raises(UnmovedError, match=r"p: expected a study and methods"):
            study_words.with_tables(f"<!-- study {wrong} -->\n<!-- end of study -->", facts, "p")


def test_the_page_is_what_the_tables_make() -> None:
    page, tables = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
    studies = results.studies_in(tables)
    text = results.page(studies, tables / "verdicts.toml")
    assert page.exists() == (text != "")
    if not text:
        pytest.skip("no tables yet")
    assert page.read_text(encoding="utf-8") == text, "run `python benchmarks/results.py`"
    facts = results.all_facts(studies)
    for path in results.pages(ROOT / "docs"):
        words = path.read_text(encoding="utf-8")
        assert study_words.with_tables(words, facts, path.name) == words, (
            f"{path.name}: run `python benchmarks/results.py`"
        )
    drawn = {path.stem for path in (ROOT / "docs" / "images" / "results").glob("*.svg")}
    assert drawn == {name for name in STUDIES if (ROOT / "docs" / "results" / name / "runs.csv").exists()}
