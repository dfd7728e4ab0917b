"""Every exported method sits the same exam; and the exam fails those who break its rules."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from unmoved import attacks, defenses, terms
from unmoved.attacks import (
    APGD,
    CW,
    FAB,
    IAAT,
    PGD,
    SPSA,
    AutoAttack,
    Friendly,
    HopSkipJump,
    PriorFGSM,
    Quick,
    Sensible,
    Square,
    Transfer,
)
from unmoved.attacks.ensembles import in_turn
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.core.weights import evaluating, frozen_buffers
from unmoved.defenses import APD, ASAM, AWP, SAM, Plain
from unmoved.terms import (
    CE,
    DRSL,
    KL,
    MART,
    PRSL,
    GlobalProbability,
    Margin,
    Sum,
    TargetedDLR,
    TargetedMargin,
)
from unmoved.testing import (
    ExamFailed,
    balls_of,
    check_attack,
    check_defense,
    check_term,
    default_case,
    missing,
    without_case,
)
from unmoved.testing.cases import BALLS

# What is written here are variants, and what needs arguments; every other export sits the exam as its constructor makes
# it, without being named.
TERMS = [
    CE(),
    CE("clean"),
    CE("adv", label_smoothing=0.1),
    Sum((0.5, CE("clean")), (2.0, Margin())),
    Margin(),
    DRSL(),
    DRSL("adv", mean_divisor="K"),
    PRSL(),
    PRSL(start=1, end=3),
    *(
        GlobalProbability(5, divergence=divergence, view=view)
        for divergence in ("generalized", "bernoulli", "qp", "pq")
        for view in ("adv", "clean", "both")
    ),
    GlobalProbability(5, update="ema"),
]
FOUND_TERMS = without_case(terms, TERMS, num_classes=5)
TERMS += [default_case(make, num_classes=5) for make in FOUND_TERMS.values() if not missing(make, ["num_classes"])]


class Pixels(nn.Module):
    """A source for transfer that takes any dtype."""

    def forward(self, x):
        return 3 * x.flatten(1)[:, :5]


@dataclass(frozen=True)
class Small:
    """An ensemble with a tenth of its steps and queries, so that the exam is soon over."""

    whole: AutoAttack

    def __call__(self, model, batch):
        return in_turn(model, batch, self.threat, self.parts)

    @property
    def threat(self):
        return self.whole.threat

    def parts(self, num_classes):
        short = {"steps": 10, "queries": 50, "draws": 2, "targets": 3}
        return {
            name: replace(part, **{key: value for key, value in short.items() if getattr(part, key, 1) > value})
            for name, part in self.whole.parts(num_classes).items()
        }


# (name, threat model -> attack, seeks the largest loss); the last where a linear optimum is no measure of it.
ATTACKS = [
    ("pgd", lambda t: PGD(t, steps=30), True),
    ("pgd-best", lambda t: PGD(t, steps=30, keep="best"), True),
    ("pgd-restarts", lambda t: PGD(t, steps=30, restarts=2), True),
    ("pgd-no-start", lambda t: PGD(t, start="none"), True),
    ("pgd-margin", lambda t: PGD(t, steps=30, loss=Margin()), True),
    ("pgd-train-mode", lambda t: PGD(t, steps=5, mode="train"), False),
    ("pgd-kl", lambda t: PGD(t, loss=KL(), start="gaussian"), False),
    ("pgd-mart", lambda t: PGD(t, steps=5, loss=MART()), False),
    ("apgd", lambda t: APGD(t, steps=20), True),
    ("apgd-restarts", lambda t: APGD(t, steps=20, restarts=2), True),
    ("apgd-targeted", lambda t: APGD(t, TargetedMargin(), steps=20, targets=9), True),
    ("apgd-targeted-dlr", lambda t: APGD(t, TargetedDLR(), steps=5, targets=2, until_broken=True), False),
    ("apgd-draws", lambda t: APGD(t, steps=5, draws=2, compat=True), False),
    ("square", lambda t: Square(t, queries=60), False),
    ("spsa", lambda t: SPSA(t, steps=40, samples=16), False),
    ("transfer", lambda t: Transfer(t, source=Pixels()), False),
    ("autoattack", lambda t: Small(AutoAttack(t)), False),
    ("autoattack-rand", lambda t: Small(AutoAttack(t, version="rand")), False),
    ("quick", Quick, False),
    ("sensible", lambda t: PGD(t, steps=5, stop=Sensible(0.5)), False),
    ("sensible-kl", lambda t: PGD(t, loss=KL(), steps=5, stop=Sensible(0.5, adaptive=False)), False),
    ("prior_fgsm", PriorFGSM, False),  # from a vertex one step reaches the middle of the ball
    ("iaat", lambda t: IAAT(t, steps=30, step_size=0.05), True),
    ("friendly", lambda t: PGD(t, steps=5, stop=Friendly(1, omega=0.001)), False),
]

# (name, threat model -> attack, how far beyond the boundary of a linear model it may stop)
MINIMUM_NORM = [
    ("fab", lambda t: FAB(t, steps=30), 0.05),
    ("fab-untargeted", lambda t: FAB(t, steps=30, targeted=False), 0.05),
    (
        "fab-until-broken",
        lambda t: FAB(t, steps=30, restarts=2, until_broken=True),
        0.5,
    ),  # stops at the first point in the ball
    ("cw", lambda t: CW(t, steps=100, search_steps=6, lr=0.05), 0.05),
    ("hop-skip-jump", lambda t: HopSkipJump(t, queries=1500), 0.25),
]
NORMS_OF = {"cw": ("l2",), "hop-skip-jump": ("linf", "l2")}

WRITTEN_ATTACKS = [make(BALLS[1]) for _, make, _ in (*ATTACKS, *MINIMUM_NORM)]
FOUND_ATTACKS = {
    name: make
    for name, make in without_case(attacks, WRITTEN_ATTACKS, threat=BALLS[1]).items()
    if not missing(make, ["threat"])
}

# (defense, the same at strength zero)
DEFENSES = [
    (SAM(0.05), SAM(0.0)),
    (ASAM(0.2), ASAM(0.0)),
    (AWP(0.01), AWP(0.0)),
    (APD(0.05), APD(0.0)),
    (APD(0.01, steps=3, p=float("inf"), n=20, risk="last"), APD(0.0)),
    (APD(0.01, relative=True), APD(0.0, relative=True)),
]
FOUND_DEFENSES = without_case(defenses, [defense for defense, _ in DEFENSES])
DEFENSES += [(default_case(make), None) for make in FOUND_DEFENSES.values() if not missing(make, ())]


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_terms_sit_the_exam(term):
    check_term(term)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("make", "maximises"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
def test_attacks_sit_the_exam(make, maximises, norm):
    check_attack(make, norm=norm, maximises=maximises)


L1 = [
    ("apgd", lambda t: APGD(t, steps=100), True),
    ("apgd-large-first", lambda t: APGD(t, steps=20, large_first=True, until_broken=True), False),
    ("square", lambda t: Square(t, queries=60), False),
    ("autoattack", lambda t: Small(AutoAttack(t)), False),
    ("quick", Quick, False),
]


@pytest.mark.parametrize(("make", "maximises"), [a[1:] for a in L1], ids=[a[0] for a in L1])
def test_attacks_that_know_l1_sit_it_there(make, maximises):
    check_attack(make, norm="l1", maximises=maximises)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("name", "make", "reach"), MINIMUM_NORM, ids=[a[0] for a in MINIMUM_NORM])
def test_minimum_norm_attacks_sit_it(name, make, reach, norm):
    if norm in NORMS_OF.get(name, (norm,)):
        check_attack(make, norm=norm, minimum_norm=True, reach=reach)
    else:
        with pytest.raises(UnmovedError, match=f"came {norm}"):
            make(ThreatModel(norm, 0.1))


@pytest.mark.parametrize(
    ("make", "threat"),
    [
        pytest.param(make, ball, id=f"{name}-{ball.norm}")
        for name, make in FOUND_ATTACKS.items()
        for ball in balls_of(make)
    ],
)
def test_other_attacks_sit_it_as_their_constructors_make_them(make, threat):
    check_attack(lambda ball: default_case(make, threat=ball), norm=threat.norm)


def test_an_attack_of_one_label_does_not_take_two():
    @dataclass(frozen=True)
    class FirstLabel(PGD):
        takes_mixed = True

        def __call__(self, model, batch):
            return super().__call__(model, replace(batch, other=None, share=None))

    with pytest.raises(ExamFailed, match="a label of no share of the image counts"):
        check_attack(lambda t: FirstLabel(t, steps=3), maximises=False)


def test_training_mode_couples_the_samples():
    with pytest.raises(ExamFailed, match=r"order|other samples"):
        check_attack(lambda t: PGD(t, steps=5, mode="train"), maximises=False, batch_statistics=False)


@pytest.mark.parametrize(("defense", "zero"), DEFENSES, ids=[repr(d[0]) for d in DEFENSES])
def test_defenses_sit_the_exam(defense, zero):
    check_defense(defense, zero=zero)


def test_every_exported_method_sits_it():
    """What is not found by itself, since its constructor needs arguments, is written by hand."""
    made = [default_case(make, threat=BALLS[1]) for make in FOUND_ATTACKS.values() if BALLS[1] in balls_of(make)]
    assert without_case(terms, TERMS, num_classes=5) == {}
    assert without_case(attacks, [*WRITTEN_ATTACKS, *made], threat=BALLS[1]) == {}
    assert without_case(defenses, [defense for defense, _ in DEFENSES]) == {}


@pytest.mark.parametrize(
    ("namespace", "name"), [(terms, "Sum"), (attacks, "Transfer"), (defenses, "APD")], ids=["term", "attack", "defense"]
)
def test_what_needs_arguments_is_missed_where_nobody_wrote_its_case(namespace, name):
    make = getattr(namespace, name)
    assert name in without_case(namespace, [], threat=BALLS[1], num_classes=5)
    with pytest.raises(ExamFailed, match=f"{name}: its constructor needs .*; write a case for it by hand"):
        default_case(make, threat=BALLS[1], num_classes=5)


NAMES = {name: getattr(terms, name) for name in terms.__all__}
NAMES |= {name: getattr(attacks, name) for name in attacks.__all__} | {"ThreatModel": ThreatModel, "inf": float("inf")}
NAMES |= {name: getattr(defenses, name) for name in defenses.__all__} | {"Small": Small}


@pytest.mark.parametrize("value", [*TERMS, *WRITTEN_ATTACKS, *(d for d, _ in DEFENSES)], ids=repr)
def test_repr_rebuilds(value):
    if isinstance(value, Transfer):
        pytest.skip("its source is a model, which has no such repr")
    again = eval(repr(value), NAMES)
    assert repr(again) == repr(value)
    assert again == value or isinstance(value, GlobalProbability | IAAT | PriorFGSM)  # these have state, so identity


# --- the exam can fail: each impostor breaks one rule


@dataclasses.dataclass(frozen=True)
class Impostor:
    rule: str

    def __call__(self, views):
        ce = nn.functional.cross_entropy(views.adv, views.y, reduction="none")
        if self.rule == "mean":
            return ce.mean()
        if self.rule == "log p":
            return -views.adv.softmax(1).gather(1, views.y[:, None]).squeeze(1).log()
        if self.rule == "random":
            return ce + torch.rand(len(ce))
        if self.rule == "batch":
            return ce - ce.mean()
        if self.rule == "no gradient":
            return ce.detach() * views.adv.sum(1)
        return ce


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mean", "one value per sample"),
        ("log p", "not finite"),
        ("random", "random state"),
        ("batch", "batch of one"),
        ("no gradient", "finite differences"),
    ],
)
def test_the_exam_catches_terms(rule, message):
    with pytest.raises(ExamFailed, match=message):
        check_term(Impostor(rule))


@dataclasses.dataclass(frozen=True)
class Cheat:
    threat: ThreatModel
    rule: str

    def __call__(self, model, batch):
        if self.rule in ("mode", "tracks"):
            return self.step(model, batch)
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            return self.step(model, dataclasses.replace(batch, x=batch.x.clone(), y=batch.y.clone()))

    def step(self, model, batch):
        x = batch.x.detach().clone().requires_grad_(True)
        if self.rule == "mode":
            model.eval()
        if self.rule == "rng":
            torch.rand(1)
        loss = nn.functional.cross_entropy(model(x), batch.y, reduction="sum")
        if self.rule == "gradient":
            loss.backward()
            gradient = x.grad
        else:
            (gradient,) = torch.autograd.grad(loss, x)
        if self.rule == "descends":
            gradient = -gradient
        scale = 2.0 if self.rule == "far" else 1.0
        x_adv = (batch.x + scale * self.threat.radius * self.threat.steepest(gradient)).clamp(0, 1)
        return x_adv if self.rule != "attached" else x_adv + 0 * x


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mode", "mode of"),
        ("rng", "random state"),
        ("gradient", "gradient of"),
        ("far", "left the threat model"),
        ("attached", "carries a graph"),
        ("tracks", "running_mean|num_batches_tracked"),
    ],
)
def test_the_exam_catches_attacks(rule, message):
    with pytest.raises((ExamFailed, ValueError), match=message):
        check_attack(lambda threat: Cheat(threat, rule))


def test_the_exam_catches_an_attack_that_descends():
    check_attack(lambda threat: Cheat(threat, "honest"))
    with pytest.raises(ExamFailed, match="short of the linear model"):
        check_attack(lambda threat: Cheat(threat, "descends"))


@dataclasses.dataclass(frozen=True)
class BadDefense:
    rule: str

    def __call__(self, model, optimizer, backward):
        optimizer.zero_grad()
        loss = backward()
        if self.rule == "two tracked passes":
            optimizer.zero_grad()
            backward()
        if self.rule == "drifts":
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 1e-6)
        if self.rule == "own parameters only":
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)
            return loss
        if self.rule == "ascends":
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.neg_()
        if self.rule == "not restored":
            with torch.no_grad():
                saved = [p.clone() for p in model.parameters()]
                for p in model.parameters():
                    p.add_(0.01)
            with frozen_buffers(model):
                backward()
            with torch.no_grad():
                for p, old in zip(model.parameters(), saved, strict=True):
                    p.copy_(old)
        optimizer.step()
        return loss


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("two tracked passes", "BatchNorm saw"),
        ("drifts", "lr = 0"),
        ("own parameters only", "lr = 0|learned term"),
        ("ascends", "do not lower"),
        ("not restored", "not restored"),
    ],
)
def test_the_exam_catches_defenses(rule, message):
    with pytest.raises(ExamFailed, match=message):
        check_defense(BadDefense(rule))


def test_strength_zero_must_be_plain():
    with pytest.raises(ExamFailed, match="strength zero"):
        check_defense(Plain(), zero=SAM(1e-3))
