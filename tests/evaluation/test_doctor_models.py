"""The doctor names what is wrong with ten more models, and speaks about the number that is shown."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers.masked_models import THREAT, after, at, before, digits, noisy, scaled, softmax, standard
from helpers.pattern_models import BROKEN, HONEST, classifier, images, labelled, split
from torch import Tensor, nn

from unmoved import Method, attacks, evaluate, models
from unmoved.data import ArraySplit
from unmoved.evaluation.doctor import confidence
from unmoved.evaluation.doctor.examine import UNDER_AUTOATTACK, examine
from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, GRADES, LOOK_CLOSER, NOTE, Finding
from unmoved.evaluation.outcomes import ROBUST
from unmoved.terms import CE
from unmoved.training.loop import train
from unmoved.training.optim import Adam


def graded(findings: list[Finding], *grades: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.grade in grades}


def objections(findings: list[Finding]) -> dict[str, Finding]:
    return graded(findings, DO_NOT_BELIEVE, LOOK_CLOSER)


# --- the library


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_caught_by_the_check_that_names_its_fault(name: str) -> None:
    broken = BROKEN[name]
    model, shown = broken.make()
    findings = graded(examine(model, shown, THREAT, n=len(shown)), broken.grade)
    assert broken.check in findings, findings
    assert re.search(broken.words, findings[broken.check].measured), findings[broken.check]


@pytest.mark.parametrize("name", ["constant", "chance", "one class lost clean", "labels shifted by one"])
def test_the_fault_is_read_from_a_table_too(name: str) -> None:
    model, shown = BROKEN[name].make()
    table = evaluate(model, shown, {"pgd": attacks.PGD(THREAT, steps=2)}, THREAT)
    findings = examine(model, shown, THREAT, n=2, outcomes=table)
    assert BROKEN[name].check in graded(findings, BROKEN[name].grade), findings


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_is_not_accused(name: str) -> None:
    model, shown = HONEST[name]()
    findings = examine(model, shown, THREAT, n=len(shown))
    assert not objections(findings), findings


def of_classes(given: ArraySplit, classes: list[int]) -> ArraySplit:
    kept = given.select(torch.isin(given.labels, torch.tensor(classes)))
    labels = torch.tensor([classes.index(int(label)) for label in kept.labels])
    return ArraySplit.of(kept.images, labels, classes=[str(k) for k in classes], layout="NCHW")


@pytest.mark.parametrize(("classes", "n"), [([3, 8], 16), ([3, 8], 24), ([1, 8, 9], 16), ([1, 8, 9], 60)])
def test_an_honest_network_of_few_classes_is_not_accused_on_few_images(classes: list[int], n: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.mlp((1, 8, 8), len(classes), hidden=(64,))
    fitting = of_classes(digits().train, classes)
    train(model, Method(None, CE("clean")), fitting, epochs=4, batch_size=64, optimizer=Adam(lr=4e-3), device="cpu")
    findings = examine(model.eval(), of_classes(digits().test, classes), THREAT, n=n)
    assert not objections(findings), findings


# --- what n supports


def test_the_bounds_are_clopper_and_pearsons() -> None:
    for count, n in ((0, 7), (1, 16), (5, 16), (16, 16), (30, 100)):
        interval = scipy.stats.binomtest(count, n).proportion_ci(0.9, method="exact")
        assert confidence.lower(count, n) == pytest.approx(interval.low)
        assert confidence.upper(count, n) == pytest.approx(interval.high)
        for share in (0.1, 0.5):
            expected = scipy.stats.binomtest(count, n, share, alternative="greater").pvalue
            assert confidence.by_luck(count, n, share) == pytest.approx(expected)


def test_a_share_is_graded_by_what_its_n_supports() -> None:
    assert [confidence.grade(n // 2, n, 0.25, 0.35) for n in (4, 16, 40)] == [None, LOOK_CLOSER, DO_NOT_BELIEVE]


def test_a_gain_that_may_be_an_accident_is_none() -> None:
    assert confidence.grade_of_gain(8, 0, 16, 0.1, 0.2, tries=6) == DO_NOT_BELIEVE
    assert confidence.grade_of_gain(8, 0, 16, 0.1, 0.2, tries=60) is None
    assert confidence.grade_of_gain(20, 12, 40, 0.1, 0.2, tries=1) is None


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_luck_accuses_no_honest_model_more_often_than_its_level_says(classes: int) -> None:
    """Of a classifier that is right as often as luck and half of the way from there to 1: the least of the honest."""
    chance = 1 / classes
    honest = chance + (1 - chance) / 2
    for n in (16, 24, 60, 200):
        accused = [k for k in range(n + 1) if (confidence.upper(k, n) - chance) / (1 - chance) <= 0.5]
        assert scipy.stats.binom.cdf(max(accused, default=-1), n, honest) <= 0.05


@pytest.mark.parametrize("name", BROKEN)
def test_three_images_do_not_suffice(name: str) -> None:
    model, shown = BROKEN[name].make()
    assert not graded(examine(model, shown, THREAT, n=3), DO_NOT_BELIEVE)


def test_a_model_that_gets_nothing_right_is_said_to_on_any_number_of_images() -> None:
    wrong = labelled(split(3, 10), torch.tensor([1, 2, 1]))
    (found,) = examine(classifier(10), wrong, THREAT, n=3)
    assert (found.check, found.grade) == ("no better than chance", NOTE)


def test_less_than_the_most_frequent_class_is_a_note_where_predictions_go_with_the_labels() -> None:
    """Made for classes of equal weight and shown 9 to 1: recalls of 8/9 and 1, accuracy 0.9."""
    label = (torch.arange(200) % 10 == 9).long()
    seen = torch.where(torch.arange(200) % 10 == 0, 1, label)
    given = ArraySplit.of(images(seen), label, classes=["a", "b"], layout="NCHW")
    assert not objections(examine(classifier(2), given, THREAT, n=200))


def test_a_class_of_two_images_is_not_called_lost() -> None:
    model, shown = BROKEN["one class lost clean"].make()
    few = shown.select(torch.cat([torch.where(shown.labels != 2)[0], torch.where(shown.labels == 2)[0][:2]]))
    assert "class lost" not in objections(examine(model, few, THREAT, n=len(few)))


def test_other_pixels_that_the_model_refuses_are_passed_over() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier(3)

        def forward(self, x: Tensor) -> Tensor:
            assert -0.2 <= float(x.detach().min()) <= float(x.detach().max()) <= 1.2, "pixels"
            return self.inner(x)

    assert not objections(examine(Strict().eval(), split(30, 3), THREAT, n=30))


# --- the number shown is AutoAttack's


def test_no_objection_to_an_honest_figure_of_autoattack() -> None:
    """PGD is fooled by saturated logits; the number shown is not PGD's."""
    shown, model = digits().test.select(torch.arange(16)), after(at(), scaled)
    tried = {"pgd": attacks.PGD(THREAT, steps=20), "autoattack": attacks.AutoAttack(THREAT)}
    table = evaluate(model, shown, tried, THREAT)
    findings = examine(model, shown, THREAT, n=16, outcomes=table)
    assert not objections(findings), findings
    assert "saturated logits" in graded(findings, NOTE)
    for finding in findings:
        assert "--attacks standard" not in finding.do


def rows(outcome: dict[str, Callable[[int], str]], index: list[int], label: list[int]) -> pd.DataFrame:
    """Outcomes of samples that are right clean: attack -> (position -> the part that broke it, "" for none)."""
    wrong = [(k + 1) % 10 for k in label]
    tables = []
    for name, by in outcome.items():
        parts = [by(k) for k in range(len(index))]
        broken = np.array([part != "" for part in parts])
        tables.append(
            pd.DataFrame(
                {
                    "index": index,
                    "label": label,
                    "attack": name,
                    "eps": THREAT.radius,
                    "norm": "linf",
                    "clean_prediction": label,
                    "adversarial_prediction": np.where(broken, wrong, label),
                    "distance": 0.1,
                    "success": broken,
                    "by": [part or ROBUST for part in parts],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def told(outcome: dict[str, Callable[[int], str]], n: int = 40) -> list[Finding]:
    """What is found on a model of proven robustness, whose table says so."""
    shown = split(n, 10)
    return examine(classifier(10), shown, THREAT, n=n, outcomes=rows(outcome, list(range(n)), shown.labels.tolist()))


def test_what_pgd_overrates_is_a_note_beside_autoattack() -> None:
    gap = {"pgd": lambda k: "", "strong": lambda k: "apgd-t" if k % 10 and k % 3 else ""}
    assert "PGD overrates" in graded(told(gap), DO_NOT_BELIEVE)
    beside = told({**gap, "autoattack": gap["strong"]})
    assert "quote AutoAttack's figure" in graded(beside, NOTE)["PGD overrates"].do
    assert not objections(beside)


def test_what_autoattacks_square_alone_broke_is_worth_a_look() -> None:
    square = told({"autoattack": lambda k: "square" if k % 2 else ""})
    assert list(objections(square)) == ["black-box stronger"]
    assert graded(square, LOOK_CLOSER)


@pytest.mark.parametrize("names", [("autoattack",), ("pgd", "autoattack")])
def test_samples_that_the_doctor_broke_are_the_reason_not_to_believe_autoattack(names: tuple[str, ...]) -> None:
    model, shown = standard(), digits().test.select(torch.arange(40))
    right = shown.select(model(shown.images).argmax(dim=1) == shown.labels)
    table = rows({name: lambda k: "" for name in names}, right.index.tolist(), right.labels.tolist())
    findings = examine(model, right, THREAT, n=len(right), outcomes=table)
    assert list(graded(findings, DO_NOT_BELIEVE)) == ["attacked too weakly"], findings
    assert all("--attacks standard" not in finding.do for finding in findings)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda: before(standard(), lambda x: (8 * x).round() / 8), "zero gradients"),
        (lambda: before(standard(), noisy), "randomness"),
        (lambda: nn.Sequential(nn.Dropout(0.2), standard()).train(), "training mode"),
    ],
)
def test_a_fault_voids_autoattacks_figure_too(make: Callable[[], nn.Module], check: str) -> None:
    model, shown = make(), digits().test
    everybody = rows({"autoattack": lambda k: "apgd-ce"}, shown.index.tolist(), shown.labels.tolist())
    found = graded(examine(model, shown, THREAT, n=40, outcomes=everybody), DO_NOT_BELIEVE)
    assert check in found
    assert "Square" not in found[check].do, "it has run"


def test_probabilities_are_worth_a_look_under_autoattack() -> None:
    model, shown = after(at(), softmax), digits().test
    everybody = rows({"autoattack": lambda k: "apgd-ce"}, shown.index.tolist(), shown.labels.tolist())
    findings = examine(model, shown, THREAT, n=40, outcomes=everybody)
    assert "probabilities" in graded(findings, LOOK_CLOSER)


def test_the_version_for_randomised_models_is_not_advised_where_it_ran() -> None:
    model, shown = before(standard(), noisy), digits().test
    everybody = rows({"autoattack-rand": lambda k: "apgd-ce"}, shown.index.tolist(), shown.labels.tolist())
    findings = examine(model, shown, THREAT, n=20, outcomes=everybody)
    assert "rand" not in graded(findings, NOTE)["randomness"].do


def test_every_check_that_autoattack_lowers_is_one_of_the_doctors() -> None:
    assert set(UNDER_AUTOATTACK.values()) <= set(GRADES) - {DO_NOT_BELIEVE}
