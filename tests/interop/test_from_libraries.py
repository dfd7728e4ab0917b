"""Attacks of torchattacks, foolbox, ART and adv-lib keep the contract of ours, and do what ours do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.interop_marks import QUIET, THREAT
from torch import nn

from unmoved import Batch, ThreatModel, UnmovedError, attacks, evaluate, interop
from unmoved.core.protocols import FIXED_STEP, GRADIENTS, QUERIES, Attack
from unmoved.data import ArraySplit
from unmoved.testing import check_attack

pytestmark = QUIET
STEPS, STEP = 5, 0.03
LIBRARIES = ("torchattacks", "foolbox", "art", "adv_lib")


def theirs(library: str, threat: ThreatModel = THREAT, *, random_start: bool = False, steps: int = STEPS) -> Attack:
    """Each library's PGD in linf, with the same steps."""
    if library == "torchattacks":
        return interop.from_torchattacks("PGD", threat, alpha=STEP, steps=steps, random_start=random_start)
    if library == "foolbox":
        return interop.from_foolbox("LinfPGD", threat, abs_stepsize=STEP, steps=steps, random_start=random_start)
    if library == "art":
        settings: dict[str, Any] = {"eps_step": STEP, "max_iter": steps, "num_random_init": int(random_start)}
        return interop.from_art("ProjectedGradientDescentPyTorch", threat, **settings)
    return interop.from_adv_lib("pgd_linf", threat, absolute_step_size=STEP, steps=steps, random_init=random_start)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue(request.param)
    return str(request.param)


def broken(model: nn.Module, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x_adv).argmax(dim=1) != y


def test_the_same_steps_end_at_the_same_images(library: str, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    ours = attacks.PGD(THREAT, steps=STEPS, step_size=STEP, start="none")(model, batch)
    found = theirs(library)(model, batch)
    assert (found != batch.x).any()
    if library == "adv_lib":  # it looks for success before each step, and returns the last image that had it
        before = [attacks.PGD(THREAT, steps=k, step_size=STEP, start="none")(model, batch) for k in range(STEPS)]
        ours = batch.x.clone()
        for x_adv in before:
            won = broken(model, x_adv, batch.y)
            ours[won] = x_adv[won]
    assert torch.allclose(found, ours, atol=1e-6, rtol=0)


def test_they_keep_the_contract_of_an_attack(library: str) -> None:
    def make(threat: ThreatModel) -> Attack:
        attack: Any = theirs(library, steps=10)
        return replace(attack, threat=threat)

    # adv-lib's returns the clean image where it has no success; ART rounds to float32, beyond the exam's optimum.
    check_attack(make, maximises=library in ("torchattacks", "foolbox"))


def test_a_random_start_is_drawn_by_seed_step_and_samples_alone(library: str, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    attack: Any = theirs(library, random_start=True, steps=1)
    first = attack(model, batch)
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(first, attack(model, batch))
    others = (replace(attack, seed=1), replace(batch, step=1), replace(batch, index=batch.index + 1))
    calls = ((others[0], batch), (attack, others[1]), (attack, others[2]))
    changed = [not torch.equal(first, each(model, asked)) for each, asked in calls]
    assert all(changed) or library == "adv_lib" and any(changed)


def test_the_callers_random_states_gradients_and_modes_stay(library: str, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    held = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    try:
        theirs(library, random_start=True)(model, batch)
        assert modes == [m.training for m in model.modules()]
        assert all(p.requires_grad for p in model.parameters())
        assert [p.grad is None for p in model.parameters()] == [p is not weight for p in model.parameters()]
        assert torch.equal(weight.grad, torch.ones_like(weight))
    finally:
        model.zero_grad()
        model.eval()
    assert random.getstate() == held[0]
    assert np.array_equal(np.random.get_state()[1], held[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), held[2])


def test_the_judge_accepts_them_in_several_threads(library: str, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    split = ArraySplit.of(batch.x[:32], batch.y[:32], classes=[str(k) for k in range(10)])
    tables = [
        evaluate(model, split, {"it": theirs(library, random_start=True)}, THREAT, batch_size=8, workers=w)
        for w in (1, 2)
    ]
    assert tables[0]["success"].any()
    assert tables[0].equals(tables[1])


APGD: dict[str, Callable[[ThreatModel], Attack]] = {
    "torchattacks": lambda ball: interop.from_torchattacks("APGD", ball, steps=20, loss="ce"),
    "art": lambda ball: interop.from_art(
        "AutoProjectedGradientDescent", ball, max_iter=20, nb_random_init=1, eps_step=2 * ball.radius
    ),
    "adv_lib": lambda ball: interop.from_adv_lib("apgd", ball, n_iter=20, loss_function="ce"),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", sorted(APGD))
def test_apgd_breaks_as_much_as_ours(
    name: str, norm: str, digits: tuple[nn.Module, Batch], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    model, batch = digits
    ball = ThreatModel(norm, {"linf": 0.1, "l2": 0.4}[norm])
    found = APGD[name](ball)(model, batch)
    ball.check(found, batch.x)
    ours = broken(model, attacks.APGD(ball, steps=20)(model, batch), batch.y).float().mean()
    share = broken(model, found, batch.y).float().mean()
    assert 0.1 < ours < 0.9
    assert abs(share - ours) <= 0.1


@pytest.mark.parametrize("name", ["torchattacks", "foolbox", "art", "adv_lib"])
def test_a_minimum_norm_attack_finds_the_boundary(name: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(name)
    makes: dict[str, Callable[[ThreatModel], Attack]] = {
        "torchattacks": lambda ball: interop.from_torchattacks("DeepFool", ball),
        "foolbox": lambda ball: interop.from_foolbox("L2DeepFoolAttack", ball, overshoot=0.02),
        "art": lambda ball: interop.from_art("DeepFool", ball, epsilon=0.02, nb_grads=2),
        "adv_lib": lambda ball: interop.from_adv_lib("df", ball),
    }
    attack: Any = makes[name](ThreatModel("l2", 0.5))
    assert attack.minimum_norm
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    weight = torch.randn(16, generator=generator)
    with torch.no_grad():
        next(model.parameters()).copy_(torch.stack([-weight, weight]) / 2)
    x = 0.5 + 0.02 * torch.randn(32, 1, 4, 4, generator=generator)
    score = x.flatten(1) @ weight
    batch = Batch(x, (score > 0).long())
    x_adv = attack(model, batch)
    assert broken(model, x_adv, batch.y).all()
    distance, nearest = (x_adv - x).flatten(1).norm(dim=1), score.abs() / weight.norm()
    assert ((distance / nearest >= 0.999) & (distance / nearest <= 1.05)).all()


@pytest.mark.parametrize(
    ("library", "name", "kind", "minimum_norm"),
    [
        ("torchattacks", "PGD", FIXED_STEP, False),
        ("torchattacks", "APGD", GRADIENTS, False),
        ("torchattacks", "PIFGSM", FIXED_STEP, False),
        ("torchattacks", "CW", GRADIENTS, True),
        ("torchattacks", "Square", QUERIES, False),
        ("torchattacks", "OnePixel", QUERIES, True),
        ("torchattacks", "FAB", GRADIENTS, False),
        ("foolbox", "LinfPGD", FIXED_STEP, False),
        ("foolbox", "FGSM", FIXED_STEP, False),
        ("foolbox", "LinfAdditiveUniformNoiseAttack", QUERIES, False),
        ("foolbox", "LinfDeepFoolAttack", GRADIENTS, True),
        ("foolbox", "BoundaryAttack", QUERIES, True),
        ("art", "ProjectedGradientDescent", FIXED_STEP, False),
        ("art", "FastGradientMethod", FIXED_STEP, False),
        ("art", "AutoProjectedGradientDescent", GRADIENTS, False),
        ("art", "HopSkipJump", QUERIES, True),
        ("adv_lib", "pgd_linf", FIXED_STEP, False),
        ("adv_lib", "apgd", GRADIENTS, False),
        ("adv_lib", "ddn", GRADIENTS, True),
        ("adv_lib", "fab", GRADIENTS, True),
        ("adv_lib", "tr", GRADIENTS, True),
    ],
)
def test_what_an_attack_is_is_declared(
    library: str, name: str, kind: str, minimum_norm: bool, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(library)
    make = getattr(interop, f"from_{library}")
    attack = make(name, THREAT)
    assert (attack.kind, attack.minimum_norm) == (kind, minimum_norm)
    said = make(name, THREAT, kind=QUERIES, minimum_norm=True)
    assert (said.kind, said.minimum_norm) == (QUERIES, True)
    rebuilt = eval(repr(attack), {"LibraryAttack": interop.LibraryAttack, "ThreatModel": ThreatModel})
    assert rebuilt == attack


def test_the_class_itself_and_a_function_that_makes_it_are_taken(
    torchattacks: Any, foolbox: Any, digits: tuple[nn.Module, Batch]
) -> None:
    model, batch = digits
    settings = {"alpha": STEP, "steps": STEPS, "random_start": False}
    by_name = interop.from_torchattacks("PGD", THREAT, **settings)(model, batch)
    by_class = interop.from_torchattacks(torchattacks.PGD, THREAT, **settings)(model, batch)
    own = interop.from_torchattacks(lambda net: torchattacks.PGD(net, eps=0.1, **settings), THREAT)
    assert torch.equal(by_name, by_class)
    assert torch.equal(by_name, own(model, batch))
    assert not own.minimum_norm
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=False)
    assert torch.equal(interop.from_foolbox(pgd, THREAT)(model, batch), theirs("foolbox")(model, batch))


@pytest.mark.parametrize(
    ("library", "arguments", "settings", "words"),
    [
        ("torchattacks", ("PGDD", THREAT), {}, "torchattacks has no attack 'PGDD'; known: APGD, "),
        ("torchattacks", ("wrapper_method", THREAT), {}, "has no attack 'wrapper_method'"),
        ("torchattacks", ("PGD", THREAT), {"step": 3}, "torchattacks PGD: it takes no 'step'; did you mean 'steps'"),
        (
            "torchattacks",
            ("PGDL2", THREAT),
            {},
            "torchattacks PGDL2: it is an attack in l2, and the threat model is in",
        ),
        ("torchattacks", ("PGD", ThreatModel("l2", 0.5)), {}, "it is an attack in linf"),
        ("torchattacks", ("PGD", ThreatModel("linf", 0.1, (-1, 1))), {}, "expected a threat model on images in"),
        ("torchattacks", (3, THREAT), {}, "expected the name, class or function of an attack, came 3"),
        ("torchattacks", ("PGD", 0.1), {}, "LibraryAttack.threat: expected a ThreatModel"),
        ("foolbox", ("L2PGD", THREAT), {}, "foolbox L2PGD: it is an attack in l2"),
        ("art", ("BasicIterativeMethod", ThreatModel("l2", 0.5)), {}, "it is an attack in linf"),
        ("adv_lib", ("apgdd", THREAT), {}, "adv_lib.attacks has no attack 'apgdd'; did you mean 'apgd'?"),
        ("adv_lib", ("pgd_linf", ThreatModel("l2", 0.5)), {}, "it is an attack in linf"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(
    library: str, arguments: tuple[Any, ...], settings: dict[str, Any], words: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(library)
    with pytest.raises(UnmovedError) as caught:
        getattr(interop, f"from_{library}")(*arguments, **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("library", "name", "package"),
    [
        ("torchattacks", "PGD", "torchattacks"),
        ("foolbox", "LinfPGD", "foolbox"),
        ("art", "ProjectedGradientDescent", "adversarial-robustness-toolbox"),
        ("adv_lib", "apgd", "adv-lib"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    library: str, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    monkeypatch.setattr("unmoved.interop.libraries.importlib.import_module", absent)
    with pytest.raises(UnmovedError, match=f"expected {library} to be installed; pip install {package}$"):
        getattr(interop, f"from_{library}")(name, THREAT)


def test_a_library_that_does_not_import_is_told_from_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(module: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("unmoved.interop.libraries.importlib.import_module", unfit)
    with pytest.raises(UnmovedError, match=r"does not import \(operator torchvision::nms does not exist\)"):
        interop.from_adv_lib("apgd", THREAT)


def test_an_attack_that_leaves_the_ball_is_refused_by_the_judge(
    torchattacks: Any, digits: tuple[nn.Module, Batch]
) -> None:
    model, batch = digits
    wide = interop.from_torchattacks("PGD", THREAT, eps=0.3, alpha=0.1, steps=3)
    split = ArraySplit.of(batch.x, batch.y, classes=[str(k) for k in range(10)])
    with pytest.raises(UnmovedError, match="left the threat model"):
        evaluate(model, split, {"wide": wide}, THREAT)


def test_calls_in_two_threads_draw_what_each_draws_alone(torchattacks: Any, digits: tuple[nn.Module, Batch]) -> None:
    model, batch = digits
    attack = theirs("torchattacks", random_start=True)
    halves = [batch.take(torch.arange(32)), batch.take(torch.arange(32, 64))]
    alone = [attack(model, half) for half in halves]
    beside: dict[int, torch.Tensor] = {}

    def call(k: int) -> None:
        beside[k] = attack(model, halves[k])

    threads = [threading.Thread(target=call, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[k], beside[k]) for k in (0, 1))
