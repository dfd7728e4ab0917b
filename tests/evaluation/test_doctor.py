"""The doctor catches every broken defense by the check that names its cause, and accuses no honest model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from helpers.masked_models import BROKEN, HONEST, THREAT, after, at, before, digits, log_softmax, rounded, standard
from torch import Tensor, nn

from unmoved import Batch, attacks, models
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import kinds_of
from unmoved.core.threat import ThreatModel
from unmoved.data import ArraySplit
from unmoved.evaluation.doctor import examine as doctor
from unmoved.evaluation.doctor import outcomes_table, reported
from unmoved.evaluation.doctor.evidence import Evidence
from unmoved.evaluation.doctor.examine import examine
from unmoved.evaluation.doctor.finding import Finding, summary
from unmoved.evaluation.doctor.reported import ReportedOutcomes
from unmoved.evaluation.outcomes import ROBUST
from unmoved.testing.fixtures import network, same_random_state, untouched

N = 40


def examined(model: nn.Module, n: int = N, **how: object) -> list[Finding]:
    return examine(model, digits().test, THREAT, n=n, **how)  # type: ignore[arg-type]


def checks(findings: list[Finding], grade: str = "do not believe") -> set[str]:
    return {finding.check for finding in findings if finding.grade == grade}


# --- the library


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defense_is_caught_by_the_check_that_names_its_cause(name: str) -> None:
    model = BROKEN[name].make()
    findings = examine(model, BROKEN[name].shown(model), THREAT, n=N)
    assert set(BROKEN[name].cause) <= checks(findings), findings
    assert summary(findings).startswith("Do not believe this number: ")
    grades = [finding.grade for finding in findings]
    assert grades == sorted(grades, key=["do not believe", "look closer", "note"].index)
    for finding in findings:
        assert all((finding.measured, finding.why, finding.do)), finding


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_is_not_accused(name: str) -> None:
    findings = examined(HONEST[name](), n=100)
    assert checks(findings) | checks(findings, "look closer") == set(), findings
    assert summary(findings) == ""


def test_log_probabilities_are_logits() -> None:
    assert examined(after(at(), log_softmax)) == []


def test_an_honest_model_in_training_mode_is_not_accused_where_the_mode_changes_nothing() -> None:
    assert "training mode" not in checks(examined(copy.deepcopy(at()).train(), n=10))


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("l1", 1.0)])
def test_other_norms(norm: str, eps: float) -> None:
    findings = examine(at(), digits().test, ThreatModel(norm, eps), n=20)
    assert checks(findings) | checks(findings, "look closer") == set(), findings


def test_two_classes() -> None:
    two = digits().test.select(digits().test.labels < 2)
    split = ArraySplit.of(two.images, two.labels)
    model = models.linear((1, 8, 8), 2)
    means = torch.stack([split.images[split.labels == k].mean(dim=0).flatten() for k in (0, 1)])
    with torch.no_grad():
        model.linear.weight.copy_(2 * means)
        model.linear.bias.copy_(-(means**2).sum(dim=1))
    assert examine(model.eval(), split, THREAT, n=20) == []


def test_a_constant_model_is_not_accused_of_failing_at_eps_1() -> None:
    def constant(z: Tensor) -> Tensor:
        return 0 * z + torch.eye(10)[3]

    assert "fails at eps = 1" not in checks(examined(after(standard(), constant)))


# --- what each check compares


def test_transfer_from_a_surrogate_beats_a_model_without_gradients() -> None:
    assert "transfer stronger" in checks(examined(before(standard(), rounded), surrogate=standard()))
    assert "transfer stronger" not in checks(examined(at(), surrogate=standard()))


class Planned(nn.Module):
    """Two logits: class 0 wins by what the plan says of the pixels, (B, 16), in units of eps from mid-grey."""

    def __init__(self, plan: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        gap = self.plan((x.flatten(1) - 0.5) / THREAT.radius)
        return torch.stack([gap / 2, -gap / 2], dim=1)


def luck(d: Tensor) -> Tensor:
    """Uphill leads over the boundary only from a start in a small part of the ball."""
    first = d[:, 0]
    return torch.where(first > 0.7, 0.9 - first, 2 + first)


def corridor(d: Tensor) -> Tensor:
    """One pixel after the other opens, so that an ascent goes on and on."""
    opened = torch.cumprod((d.detach() > 0.9).float(), dim=1)
    reached = torch.cat([torch.ones_like(opened[:, :1]), opened[:, :-1]], dim=1)
    return 20 - (reached * d).sum(dim=1)


def needles(d: Tensor) -> Tensor:
    """Wrong between the levels of 8 bits, right on them."""
    x = 0.5 + THREAT.radius * d
    return 0.5 - (torch.pi * 255 * x).sin().square().mean(dim=1)


@pytest.mark.parametrize(
    ("plan", "check"),
    [(luck, "restarts still matter"), (corridor, "loss still rising"), (needles, "undone by 8 bits")],
)
def test_a_plan_is_found_out(plan: Callable[[Tensor], Tensor], check: str) -> None:
    grid = round(0.5 * 255) / 255
    images, labels = torch.full((30, 1, 4, 4), grid), torch.zeros(30, dtype=torch.int64)
    split = ArraySplit.of(images, labels, classes=["a", "b"], layout="NCHW")
    findings = examine(Planned(plan), split, THREAT, n=30)
    assert check in checks(findings), findings


def test_nothing_right_is_said() -> None:
    test = digits().test.select(standard()(digits().test.images).argmax(dim=1) == digits().test.labels)
    wrong = after(standard(), lambda z: z.roll(1, dims=1))
    assert "names of the classes" in checks(examine(wrong, test, THREAT, n=10))


def test_logits_that_are_not_finite_are_said_and_nothing_is_attacked() -> None:
    findings = examined(after(standard(), lambda z: z / 0))
    assert [finding.check for finding in findings] == ["not finite"]


# --- the evaluation's own table


def table(outcomes: dict[str, Callable[[int], str]], n: int = 100, index: list[int] | None = None) -> pd.DataFrame:
    """Outcomes of ``n`` samples that are right clean: attack -> (sample -> the part that broke it, "" for none)."""
    rows = []
    for attack, by in outcomes.items():
        for k in range(n):
            part = by(k)
            rows.append(
                {
                    "index": k if index is None else index[k],
                    "label": 0,
                    "attack": attack,
                    "eps": 0.1,
                    "norm": "linf",
                    "clean_prediction": 0,
                    "adversarial_prediction": int(part != ""),
                    "distance": 0.1,
                    "success": part != "",
                    "by": part or ROBUST,
                }
            )
    return pd.DataFrame(rows)


def told(rows: pd.DataFrame, kinds: dict[str, object] | None = None) -> Evidence:
    """What the checks of a table read: nothing of the model."""
    batch = Batch(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return Evidence(nn.Identity(), batch, THREAT, reported=ReportedOutcomes(rows, kinds or {}))


@pytest.mark.parametrize(
    ("broken", "grade"), [(5, None), (20, "note"), (35, "look closer"), (45, "do not believe"), (100, "do not believe")]
)
def test_the_gap_between_pgd_and_the_strongest_is_read_from_the_table(broken: int, grade: str | None) -> None:
    rows = table({"pgd": lambda k: "", "strong": lambda k: "apgd-t" if k < broken else ""})
    read = outcomes_table.pgd_overrates(told(rows))
    assert (None if read is None else read.grade) == grade


def test_a_gap_needs_pgd_and_something_else() -> None:
    assert outcomes_table.pgd_overrates(told(table({"pgd": lambda k: "pgd"}))) is None
    assert outcomes_table.pgd_overrates(told(table({"apgd": lambda k: "", "square": lambda k: "square"}))) is None


@pytest.mark.parametrize(("broken", "grade"), [(0, None), (4, "note"), (7, "look closer"), (10, "do not believe")])
def test_attacks_without_gradients_that_win_are_read_from_the_table(broken: int, grade: str | None) -> None:
    ensemble = table({"autoattack": lambda k: "apgd-ce" if k >= 50 else "square" if k < broken else ""})
    alone = table({"apgd": lambda k: "apgd" if k >= 50 else "", "blind": lambda k: "blind" if k < broken else ""})
    for rows, those in ((ensemble, {}), (alone, {"blind": "Square(threat=...)"})):
        found = outcomes_table.gradient_free_wins(told(rows, dict(those)))
        assert (None if found is None else found.grade) == grade, rows


EXPORTED = {
    "pgd": attacks.PGD(THREAT),
    "fgsm": attacks.FGSM(THREAT),
    "apgd": attacks.APGD(THREAT),
    "square": attacks.Square(THREAT),
    "spsa": attacks.SPSA(THREAT),
    "hop_skip_jump": attacks.HopSkipJump(THREAT),
    "iaat": attacks.IAAT(THREAT),
    "fab": attacks.FAB(THREAT),
    "transfer": attacks.Transfer(THREAT, nn.Flatten()),
    "autoattack": attacks.AutoAttack(THREAT),
    "quick": attacks.Quick(THREAT),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_table_of_an_older_run_has_reprs_or_names_alone_and_says_the_same(name: str) -> None:
    rows, attack = table({name: lambda k: ""}), EXPORTED[name]
    declared = reported.kinds_in(rows, {name: attack})
    assert declared == {name: kinds_of(name, attack, 10)}
    assert reported.kinds_in(rows, {name: declared[name]}) == declared, "as evaluations record it"
    assert reported.kinds_in(rows, {name: repr(attack)}) == declared
    assert reported.kinds_in(rows, {}) == declared


def test_what_a_stranger_declares_goes_before_its_name() -> None:
    class Square:
        kind = "gradients"

        def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
            return batch.x

    rows = table({"square": lambda k: "", "pgd": lambda k: ""})
    assert ReportedOutcomes(rows, {}).has_both_kinds
    assert not ReportedOutcomes(rows, {"square": Square()}).has_both_kinds
    assert ReportedOutcomes(rows, {"square": Square()}).has_weak
    assert not ReportedOutcomes(rows, {"square": {"square": "fixed-step gradients"}}).has_weak


def test_autoattack_for_randomised_models_asks_for_gradients_alone() -> None:
    rows = table({"autoattack-rand": lambda k: ""})
    for attack in ({}, {"autoattack-rand": attacks.AutoAttack(THREAT, version="rand")}):
        read = ReportedOutcomes(rows, attack)
        assert (read.has_both_kinds, read.by_rand, read.by_autoattack) == (False, True, False)


def test_samples_that_gradients_break_too_do_not_count_for_the_blind() -> None:
    rows = table({"apgd": lambda k: "apgd" if k < 50 else "", "square": lambda k: "square" if k < 50 else ""})
    assert outcomes_table.gradient_free_wins(told(rows)) is None


def test_a_table_of_blind_attacks_alone_proves_nothing() -> None:
    assert outcomes_table.gradient_free_wins(told(table({"square": lambda k: "square"}))) is None


def test_searches_that_the_table_answers_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rows = table({"pgd": lambda k: "", "autoattack": lambda k: ""})
    examined(at(), n=5, outcomes=rows, progress=lambda done, total, name: seen.append(name))
    assert not {"black box", "other loss"} & set(seen)
    assert {"pgd overrates", "gradient free wins", "table is weak"} <= set(seen)


def test_a_table_that_the_doctors_own_searches_refute_is_said() -> None:
    indices = digits().test.index.tolist()
    nobody = table({"apgd": lambda k: ""}, n=len(indices), index=indices)
    assert "attacked too weakly" in checks(examined(standard(), outcomes=nobody))
    everybody = table({"apgd": lambda k: "apgd"}, n=len(indices), index=indices)
    assert "attacked too weakly" not in {finding.check for finding in examined(standard(), outcomes=everybody)}


# --- the caller's things


class Random(nn.Module):
    """A training network with noise from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("make", [network, Random])
def test_the_caller_is_left_as_found(make: Callable[[], nn.Module]) -> None:
    model = make()
    draw = torch.Generator().manual_seed(0)
    split = ArraySplit.of(torch.rand(8, 1, 8, 8, generator=draw), torch.arange(8) % 5)
    with untouched(model), same_random_state():
        first = examine(model, split, THREAT, n=8)
    assert first == examine(model, split, THREAT, n=8)


def test_samples_are_drawn_from_the_whole_split() -> None:
    """Classes may be stored one after the other: the first n would be one class."""
    test = digits().test
    ordered = test.select(test.labels.argsort())
    (seen,) = (doctor._evidence(at(), ordered, THREAT, N, 0, None).batch.y.unique() for _ in range(1))
    assert len(seen) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "n: expected a whole number >= 1"),
        ({"split": ArraySplit.of(torch.rand(4, 1, 8, 8), torch.arange(4) + 9)}, "labels: expected 0..9 for 10 logits"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"model": at(), "split": digits().test, "threat": THREAT, "n": 4} | change
    with pytest.raises(UnmovedError, match=words):
        examine(**arguments)  # type: ignore[arg-type]


def test_an_unknown_grade_is_refused() -> None:
    with pytest.raises(UnmovedError, match="did you mean 'note'"):
        Finding("x", "notes", "m", "w", "d")


def test_the_verdict_names_the_gravest_checks_once() -> None:
    def finding(check: str, grade: str) -> Finding:
        return Finding(check, grade, "m", "w", "d")

    assert summary([]) == summary([finding("a", "note")]) == ""
    assert summary([finding("a", "look closer"), finding("b", "note")]) == "Look closer at this number: a."
    grave = [finding("c", "do not believe"), finding("c", "do not believe"), finding("a", "look closer")]
    assert summary(grave) == "Do not believe this number: c."
