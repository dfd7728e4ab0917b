"""Any attack x any sum of terms x any defense: two steps of each combination on a small network."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

from unmoved import data
from unmoved.attacks import IAAT, PGD, Friendly, Sensible
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.defenses import APD, ASAM, AWP, SAM, Plain
from unmoved.runs.folder import Run
from unmoved.terms import CE, DRSL, KL, MART, PRSL, TRADES, GlobalProbability, Sum
from unmoved.training import optim
from unmoved.training.loop import train

THREAT = ThreatModel("linf", 0.1)
ATTACKS = {
    "pgd": lambda: PGD(THREAT, steps=2),
    "kl": lambda: PGD(THREAT, loss=KL(), start="gaussian", steps=2),
    "sensible": lambda: PGD(THREAT, steps=2, stop=Sensible(0.5)),
    "friendly": lambda: PGD(THREAT, steps=2, stop=Friendly(0)),
    "iaat": lambda: IAAT(THREAT, steps=2),
}
BASES = {"ce": CE, "trades": lambda: TRADES(6.0), "mart": lambda: MART(5.0)}
EXTRAS = {
    "none": lambda w: [],
    "drsl": lambda w: [(0.1 * w, DRSL())],
    "global": lambda w: [(1.0 * w, GlobalProbability(10))],
    "both": lambda w: [(0.1 * w, DRSL("adv")), (1.0 * w, GlobalProbability(10, update="ema"))],
}
DEFENSES = {
    "plain": Plain(),
    "sam": SAM(0.05),
    "asam": ASAM(0.2),
    "awp": AWP(0.01),
    "apd": APD(0.02),
}
SPLIT = data.digits().train.take(32, seed=0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))


def run_steps(method, epochs=2, **settings):
    model = network()
    log = train(
        model,
        method,
        SPLIT,
        epochs=epochs,
        batch_size=32,
        optimizer=optim.SGD(lr=0.05),
        precision="float32",
        **settings,
    )
    return model.state_dict(), log


def method(attack, base, extra, defense, weight=1.0):
    objective = Sum((1.0, BASES[base]()), *EXTRAS[extra](weight))
    return Method(ATTACKS[attack](), objective, DEFENSES[defense])


@functools.cache
def straight_run(attack, base, extra, defense):
    """Two epochs without a stop, which two tests compare others with."""
    return run_steps(method(attack, base, extra, defense))


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_combination_trains(attack, defense):
    start = network().state_dict()
    for base in BASES:
        plain, _ = straight_run(attack, base, "none", defense)
        assert all(torch.isfinite(value).all() for value in plain.values())
        assert not equal(start, plain)
        for extra in ("drsl", "global", "both"):
            state, log = straight_run(attack, base, extra, defense)
            assert all(torch.isfinite(value).all() for value in state.values()), (base, extra)
            assert not equal(state, plain), (base, extra)
            assert set(log[-1]["parts"]) > {"ce"} - {"ce" if base == "mart" else ""}
            without, _ = run_steps(method(attack, base, extra, defense, weight=0.0))
            assert equal(without, plain), (base, extra, "a weight of zero is not the base method bit for bit")


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_resume_equals_a_straight_run(attack, defense, tmp_path):
    for base, extra in itertools.product(BASES, EXTRAS):
        straight, log = straight_run(attack, base, extra, defense)
        folder, recipe = tmp_path / f"{base}-{extra}", {"name": "grid", "training": {"seed": 0}}
        run_steps(method(attack, base, extra, defense), epochs=1, run=Run.create(folder, recipe))
        resumed, again = run_steps(method(attack, base, extra, defense), epochs=2, run=Run.open(folder))
        assert equal(straight, resumed), (base, extra)
        facts = [copy.deepcopy(record) for record in (log[-1], again[-1])]
        for record in facts:
            record.pop("seconds")
        assert len(log) == len(again) == 2
        assert facts[0] == facts[1], (base, extra)


@pytest.mark.parametrize(
    ("zero", "defense"), [(SAM(0.0), "sam"), (ASAM(0.0), "asam"), (AWP(0.0), "awp"), (APD(0.0), "apd")]
)
def test_strength_zero_is_plain_bit_for_bit(zero, defense):
    plain, _ = run_steps(method("pgd", "trades", "both", "plain"))
    ours, _ = run_steps(Method(ATTACKS["pgd"](), method("pgd", "trades", "both", "plain").objective, zero))
    assert equal(plain, ours)


def test_the_log_tells_what_the_global_term_learned():
    _, log = run_steps(method("pgd", "trades", "global", "plain"))
    facts = log[-1]["terms"]["global_probability"]
    assert set(facts) == {"q", "p_clean_mean", "p_clean_variance", "p_adv_mean", "p_adv_variance"}
    assert all(len(values) == 10 for values in facts.values())
    assert facts["q"] != log[0]["terms"]["global_probability"]["q"]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (GlobalProbability(7), "expected num_classes = 10, as the model has, came 7"),
        (PRSL(end=10), "at most 9 wrong classes, came 10"),
    ],
)
def test_what_the_objective_refuses_is_refused_before_training_starts(term, message):
    """Also in a later phase: nothing is trained, not even a running statistic."""
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    later = Method(PGD(THREAT, steps=1), Sum((1.0, CE()), (1.0, term)))
    with pytest.raises(UnmovedError, match=message):
        train(model, [(0, Method(None, CE("clean"))), (1, later)], SPLIT, epochs=2)
    assert equal(before, model.state_dict())


def test_what_the_defense_refuses_is_refused_before_training_starts():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    phases = [(0, Method(None, CE("clean"))), (1, Method(None, CE("clean"), APD(0.1, n=1000)))]
    with pytest.raises(UnmovedError, match="n: expected a whole number >= 1 and <= 418, came 1000"):
        train(model, phases, SPLIT, epochs=2)
    assert equal(before, model.state_dict())


def test_two_classes_are_too_few_for_drsl():
    two = data.ArraySplit.of(torch.rand(8, 1, 8, 8), torch.arange(8) % 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UnmovedError, match="DRSL needs at least 3 classes, came 2"):
        train(model, Method(None, Sum((1.0, CE("clean")), (1.0, DRSL()))), two, epochs=1)
