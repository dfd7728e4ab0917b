"""The one loop: resuming changes no bit, nothing of the caller's moves, and each step is what the method says."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from unmoved import train, train_step
from unmoved.attacks import PGD
from unmoved.attacks.gradients import gradient_at
from unmoved.core import precision
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.phases import Phases, Ramp
from unmoved.core.protocols import Method, StatefulTerm
from unmoved.core.threat import ThreatModel
from unmoved.core.views import Views
from unmoved.data import ArraySplit, augmentation, digits
from unmoved.defenses import APD, AWP, SAM, Plain
from unmoved.runs.folder import Run
from unmoved.terms import CE, DRSL, KL, MART, TRADES, GlobalProbability, Sum, TargetedMargin
from unmoved.training.optim import SGD, Adam, Constant, Cosine, MultiStep, OneCycle

THREAT = ThreatModel("linf", 0.1)
MADRY = Method(PGD(THREAT, steps=2), CE())
NESTEROV = SGD(nesterov=True)
DATA = digits(test=1600)
PART = DATA.train  # 197 images: 4 steps of 64 an epoch, the last of 5
STEPS = 4


def network() -> nn.Sequential:
    """Everything that has a state: BatchNorm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*first, nn.Dropout(0.3), nn.Linear(144, 10))


def linear() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fit(model: nn.Module, method: Any, part: Any = PART, **settings: Any) -> list[dict[str, Any]]:
    defaults: dict[str, Any] = {"epochs": 1, "batch_size": 64, "optimizer": SGD(lr=0.05), "precision": "float32"}
    defaults |= {"checkpoint_share": 1.0}  # a state of each epoch
    return train(model, method, part, device="cpu", **(defaults | settings))


def equal(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- tiny methods that remember


class Centre(StatefulTerm):
    """Cross-entropy with a learned temperature, minus a running mean of the logits: a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(10))
        self.updates: int = 0

    def forward(self, views: Views) -> Tensor:
        return F.cross_entropy((views.adv - self.mean) * self.scale, views.y, reduction="none")

    def update(self, views: Views) -> None:
        self.updates += 1
        self.mean.mul_(0.9).add_(0.1 * views.adv.mean(dim=0))


class Memory:
    """A stateful attack: each sample starts from the perturbation of its last visit."""

    def __init__(self, eps: float = 0.1) -> None:
        self.threat = ThreatModel("linf", eps)
        self.delta = torch.zeros(1797, 1, 8, 8)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        x = self.threat.project(batch.x + self.delta[batch.index], batch.x)
        return PGD(self.threat, steps=1, start="none")(model, replace(batch, x=x)).sub(x).add(x)

    def update(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> None:
        self.delta[batch.index] = 0.5 * (x_adv - batch.x)

    def state_dict(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.delta.copy_(state["delta"])


@dataclass(frozen=True)
class Spy:
    """An attack that writes down when it is called, with which eps and on which weights."""

    threat: ThreatModel = THREAT
    name: str = "spy"
    seen: list[tuple[str, int, float]] = field(default_factory=list, compare=False)
    weights: list[Tensor] = field(default_factory=list, compare=False)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.seen.append((self.name, batch.step, self.threat.radius))
        self.weights.append(next(model.parameters()).detach().clone())
        return PGD(self.threat, steps=1)(model, batch)


# --- resuming


class Cut(Exception):
    """Stops a training from outside, as a kill would."""


def cut_after(epoch: int, share: float | None) -> Callable[[dict[str, Any]], None]:
    def progress(record: dict[str, Any]) -> None:
        if share is None and record["epoch"] == epoch and "step" in record:
            raise Cut
        if share is not None and record["epoch"] == epoch and record.get("share", 0) >= share:
            raise Cut

    return progress


@pytest.mark.parametrize(
    ("make", "settings", "cut"),
    [
        (lambda: MADRY, {"optimizer": SGD(lr=0.05, momentum=0.9)}, (1, None)),
        (lambda: MADRY, {"optimizer": Adam(lr=1e-2), "schedule": OneCycle()}, (1, 0.5)),
        (lambda: replace(MADRY, defense=SAM()), {"schedule": Cosine()}, (1, None)),
        (lambda: replace(MADRY, defense=SAM()), {"optimizer": Adam(decoupled=True, weight_decay=0.1)}, (1, 0.7)),
        (lambda: replace(MADRY, defense=AWP()), {"schedule": MultiStep((1,)), "optimizer": NESTEROV}, (1, 0.2)),
        (lambda: replace(MADRY, defense=AWP()), {"optimizer": Adam(), "schedule": OneCycle()}, (1, None)),
        (lambda: Method(Memory(), CE()), {}, (1, 0.7)),
        (lambda: Method(PGD(THREAT, steps=1), Sum((1, Centre()), (0.5, KL()))), {"optimizer": Adam()}, (1, None)),
        (lambda: [(0, Method(None, CE("clean"))), (1, Method(Memory(), Centre(), AWP()))], {}, (1, 0.5)),
        (lambda: MADRY, {"augment": augmentation("crop-flip"), "precision": "bf16"}, (1, None)),
        (lambda: MADRY, {"validation": DATA.test.take(50), "threat": THREAT, "optimizer": Adam()}, (1, None)),
    ],
    ids=lambda value: None if callable(value) else str(value)[:40],
)  # fmt: skip
def test_two_epochs_are_one_and_one_resumed_bit_for_bit(
    make: Callable[[], Any], settings: dict[str, Any], cut: tuple[int, float | None], tmp_path: Path
) -> None:
    whole, parts = network(), network()
    one, two = Run.create(tmp_path / "one", {"name": "one"}), Run.create(tmp_path / "two", {"name": "two"})
    log = fit(whole, make(), epochs=2, run=one, **settings)
    with pytest.raises(Cut):
        fit(parts, make(), epochs=2, run=two, progress=cut_after(*cut), **settings)
    assert not equal(whole, parts)
    torch.manual_seed(5)  # the new process knows nothing of the old one
    parts = nn.Sequential(*list(network().children()))
    for p in parts.parameters():
        p.data.normal_()
    resumed = fit(parts, make(), epochs=2, run=two, **settings)
    assert equal(whole, parts)
    assert [{**row, "seconds": 0} for row in log] == [{**row, "seconds": 0} for row in resumed]
    for name in ("best.safetensors", "last.safetensors"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    old, new = one.load_state(), two.load_state()
    for key in old.keys() - {"log", "record"}:
        assert repr(old[key]) == repr(new[key]), key


def test_a_finished_training_is_not_gone_on_with(tmp_path: Path) -> None:
    run, model = Run.create(tmp_path, {"name": "run"}), linear()
    fit(model, MADRY, run=run)
    before, again = model.state_dict(), linear()
    fit(again, MADRY, run=run)
    assert all(torch.equal(before[key], value) for key, value in again.state_dict().items())


# --- the caller's state


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_random_state_is_left_alone(fails: bool) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the caller's global state is the point
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    if fails:
        with pytest.raises(Cut):
            fit(network(), MADRY, progress=cut_after(0, 0.5))
    else:
        validation = DATA.test.take(20)
        fit(network(), MADRY, validation=validation, threat=THREAT, augment=augmentation("crop-flip"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_the_seed_and_nothing_else_decides() -> None:
    models = [network() for _ in range(3)]
    for model, outside, seed in zip(models, (1, 2, 2), (0, 0, 1), strict=True):
        torch.manual_seed(outside)
        fit(model, MADRY, seed=seed)
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


def test_each_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    """By the seed; the second epoch of one seed is not the first of the next."""

    def orders(seed: int) -> list[tuple[int, ...]]:
        seen: list[int] = []

        def attack(model: nn.Module, batch: Batch) -> Tensor:
            seen.extend(batch.index.tolist())
            return batch.x

        fit(linear(), Method(attack, CE()), epochs=2, seed=seed, rehearsal=False)
        return [tuple(seen[: len(PART)]), tuple(seen[len(PART) :])]

    first, second = orders(0), orders(1)
    assert all(sorted(order) == sorted(PART.index.tolist()) for order in (*first, *second))
    assert len({*first, *second}) == 4
    assert orders(0) == first


def test_the_data_is_not_changed() -> None:
    before = PART.images.clone(), PART.labels.clone()
    fit(network(), Method(Memory(), CE(), AWP()), augment=augmentation("crop-flip"))
    assert torch.equal(before[0], PART.images)
    assert torch.equal(before[1], PART.labels)


# --- a step is what it says


@dataclass(frozen=True)
class InOrder:
    """A split whose order nobody can change, in any float type."""

    part: ArraySplit
    dtype: torch.dtype = torch.float32

    @property
    def num_classes(self) -> int:
        return self.part.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.part.shape

    def __len__(self) -> int:
        return len(self.part)

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        for batch in self.part.batches(size):
            yield replace(batch, x=batch.x.to(self.dtype))


def test_standard_training_is_the_loop_one_would_write() -> None:
    """Against torch alone: same order, same bits."""
    ours, theirs = linear(), linear()
    fit(ours, Method(None, CE("clean")), InOrder(PART), epochs=2, optimizer=SGD(lr=0.1), schedule=Cosine())
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    for _ in range(2):
        for batch in PART.batches(64):
            optimizer.zero_grad()
            F.cross_entropy(theirs(batch.x), batch.y).backward()
            optimizer.step()
            schedule.step()
    assert equal(ours, theirs)


def test_a_users_own_loop_of_five_lines() -> None:
    model, losses = network(), []
    method = Method(PGD(THREAT, steps=2), Sum((1, CE("clean")), (6, KL())), AWP())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        batch = replace(next(iter(PART.batches(64, shuffle=step))), step=step)
        losses.append(train_step(model, method, optimizer, batch))
    assert losses[-1].loss < losses[0].loss
    assert losses[-1].parts.keys() == {"ce", "kl"}
    total = losses[-1].parts["ce"] + 6 * losses[-1].parts["kl"]
    torch.testing.assert_close(total, losses[-1].loss)
    assert not losses[-1].loss.requires_grad
    assert model.training


def test_steps_report_the_uncorrupted_weights() -> None:
    """Loss, parts and accuracy are those at the weights before the step, whatever the defense does."""
    batch = next(iter(PART.batches(64)))
    for defense in (Plain(), SAM(rho=5.0), AWP(gamma=0.5)):
        model = linear()
        logits = model(batch.x).detach()
        step = train_step(model, Method(None, CE("clean"), defense), SGD()([{"params": model.parameters()}]), batch)
        torch.testing.assert_close(step.loss, F.cross_entropy(logits, batch.y), rtol=1e-2, atol=1e-2)
        assert step.accuracy == (logits.argmax(dim=1) == batch.y).float().mean()


@pytest.mark.parametrize("defense", [None, Plain(), SAM(), AWP()], ids=repr)
@pytest.mark.parametrize(
    ("objective", "views"), [(CE("clean"), 1), (CE("adv"), 1), (Sum((1, CE("clean")), (6, KL())), 2)], ids=repr
)
def test_running_statistics_move_once_per_view_and_step(objective: Any, views: int, defense: Any) -> None:
    """T4, T20, T21: no pass of an attack, of a corruption or of a metric is counted."""
    model = network()
    validation = DATA.test.take(20)
    fit(model, Method(PGD(THREAT, steps=2), objective, defense), epochs=2, validation=validation, threat=THREAT)
    assert model[1].num_batches_tracked == 2 * STEPS * views


class Stays(nn.Module):
    """Freezes its BatchNorm by a `train` of its own, as many fine-tuning scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def train(self, mode: bool = True) -> Stays:
        super().train(mode)
        self.net[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("freeze", "moves"),
    [
        (lambda m: m, True),
        (lambda m: m.eval(), True),
        (lambda m: m[1].eval(), False),
        (lambda m: m.eval()[5].train(), False),  # the head alone trains, in a model in evaluation mode
        (lambda m: m[4].eval(), True),
    ],
    ids=["training", "as loaded", "BatchNorm", "all but the head", "dropout"],
)
def test_a_training_leaves_the_modes_that_the_caller_set(
    freeze: Any, moves: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """T2: what was frozen stays so in each epoch, after validation and after resuming; all modes are as before."""
    caplog.set_level(logging.INFO, "unmoved")
    seen, models = set(), [network() for _ in range(2)]
    for model, run in zip(models, (None, Run.create(tmp_path / "run", {})), strict=True):
        freeze(model)
        modes, before = [m.training for m in model.modules()], model[1].running_mean.clone()
        model.register_forward_hook(lambda m, *_: seen.add(tuple(part.training for part in m.modules())))
        settings: dict[str, Any] = {"validation": DATA.test.take(20), "threat": THREAT}
        for epochs in (2,) if run is None else (1, 2):
            fit(model, MADRY, run=run, epochs=epochs, **settings)
            assert [m.training for m in model.modules()] == modes
        assert torch.equal(model[1].running_mean, before) != moves
    expected = tuple(modes) if any(modes) else (True,) * len(modes)
    assert seen == {expected, (False,) * len(modes)}  # in the steps, and in attacks and validation
    said = ["in evaluation mode, as they came, stay" in message for message in caplog.messages]
    assert said == [True] * 3 * (not all(modes) and any(modes))  # once a training


def test_a_model_that_freezes_by_itself_does() -> None:
    model = Stays()
    before = model.net[1].running_mean.clone()
    fit(model, MADRY)
    assert torch.equal(model.net[1].running_mean, before)


@pytest.mark.parametrize("defense", [Plain(), SAM(), AWP(), APD(0.1)], ids=repr)
def test_an_optimizer_of_the_head_alone_leaves_the_body_and_its_gradients(defense: Any) -> None:
    model = network()
    body = [*model[0].parameters(), *model[1].parameters()]
    before = [p.detach().clone() for p in body]
    fit(
        model,
        Method(PGD(THREAT, steps=2), CE(), defense),
        optimizer=lambda _: torch.optim.SGD(model[5].parameters(), 0.1),
    )
    assert all(torch.equal(p, old) for p, old in zip(body, before, strict=True))
    assert all(p.grad is None and p.requires_grad for p in body)


@pytest.mark.parametrize("objective", [TargetedMargin(), Sum((1, TargetedMargin()), (1, CE("clean")))], ids=repr)
def test_to_choose_a_target_moves_no_statistics(objective: Any) -> None:
    """T4: the pass that asks for the most likely wrong class is no view that is trained on."""
    model = network()
    fit(model, Method(PGD(THREAT, steps=2), objective))
    assert model[1].num_batches_tracked == STEPS * (2 if isinstance(objective, Sum) else 1)


@pytest.mark.parametrize("defense", [Plain(), SAM(), AWP()], ids=repr)
def test_the_attack_is_called_once_a_step_on_the_weights_before_the_defense(defense: Any) -> None:
    model, spy, before = linear(), Spy(), []

    def remember(model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
        assert len(spy.seen) == len(before) + 1  # x_adv is there already
        before.append(next(model.parameters()).detach().clone())
        return defense(model, optimizer, backward)

    fit(model, Method(spy, CE(), remember), epochs=2)
    assert [step for _, step, _ in spy.seen] == list(range(2 * STEPS))
    assert all(torch.equal(*pair) for pair in zip(spy.weights, before, strict=True))


def test_each_pass_of_a_defense_sees_the_same_adversarial_images() -> None:
    """SAM and AWP take two passes: one crafting, two uses."""
    for defense, passes in ((Plain(), 1), (SAM(), 2), (AWP(), 2)):
        seen: list[Tensor] = []
        model = linear()
        hook = model.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0]) if m.training else None)
        fit(model, Method(PGD(THREAT, steps=2), CE(), defense), PART.take(64), rehearsal=False)
        hook.remove()
        assert len(seen) == passes
        assert all(torch.equal(part, seen[0]) for part in seen)


def test_terms_and_attacks_that_remember_are_updated_once_a_step() -> None:
    for defense in (Plain(), SAM(), AWP()):
        term = Centre()
        fit(network(), Method(Memory(), term, defense), epochs=2)
        assert term.updates == 2 * STEPS
        assert term.scale != 1.0  # its parameter is in the optimizer
        assert term.mean.abs().sum() > 0


def test_what_a_term_learns_is_not_decayed() -> None:
    """Its gradient is zero here, so that weight decay alone could move it."""

    class Idle(Centre):
        def forward(self, views: Views) -> Tensor:
            return F.cross_entropy(views.adv, views.y, reduction="none") + 0 * self.scale

    term, model = Idle(), linear()
    before = model[1].weight.norm().item()
    fit(model, Method(None, term), optimizer=SGD(lr=0.1, weight_decay=1.0))
    assert term.scale == 1.0
    assert model[1].weight.norm() < before


# --- phases and ramps


class NothingAsked(TorchDispatchMode):
    """Fails on every operation for whose answer a program waits, as a GPU would have to be waited for."""

    ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_a_mask = function is torch.ops.aten.index.Tensor and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        assert function not in self.ASKING, function
        assert not of_a_mask, "the number of chosen rows is asked for"
        return function(*args, **(kwargs or {}))


LINF_STEPS = PGD(THREAT, steps=2)


@pytest.mark.parametrize(
    "method",
    [
        Method(LINF_STEPS, CE()),
        Method(PGD(THREAT, loss=KL(), start="gaussian", steps=2), TRADES()),
        Method(PGD(ThreatModel("l2", 1.0), steps=2), MART()),
        Method(LINF_STEPS, Sum((1, CE()), (1, DRSL()))),
        Method(LINF_STEPS, CE(), AWP(gamma=0.01)),
        Method(LINF_STEPS, CE(), SAM(rho=0.05)),
        Method(LINF_STEPS, CE(), APD(eps=0.01, relative=True)),
        Method(LINF_STEPS, CE(), APD(eps=0.1, p=float("inf"))),
    ],
    ids=lambda method: repr(method)[:60],
)
def test_a_step_that_nobody_watches_asks_the_device_nothing(method: Method) -> None:
    """Or each step would wait for the one before. Rules that stop samples do ask, once a step of the attack."""
    model, batch = network(), next(PART.batches(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    with NothingAsked():
        train_step(model, method, optimizer, batch, "float32", watch=False)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingAsked():
        train_step(model, method, optimizer, batch, "float32")


def test_phases_switch_at_the_first_step_of_their_epoch() -> None:
    a, b = Spy(name="a"), Spy(name="b")
    fit(linear(), [(0, Method(a, CE())), (1, Method(None, CE("clean"))), (2, Method(b, CE()))], epochs=4)
    assert [(name, step) for name, step, _ in a.seen] == [("a", step) for step in range(STEPS)]
    assert [(name, step) for name, step, _ in b.seen] == [("b", step) for step in range(2 * STEPS, 4 * STEPS)]


def test_ramps_go_by_steps_and_reach_their_target() -> None:
    seen: list[tuple[str, int, float]] = []
    first = Spy(ThreatModel("linf", Ramp(0.0, 0.1, over=0.5)), seen=seen)
    second = Spy(ThreatModel("linf", Ramp(0.1, 0.2)), seen=seen)
    log = fit(linear(), Phases((0, Method(first, CE())), (2, Method(second, CE()))), epochs=4)
    # Phase one: 8 steps, the ramp over the first 4; phase two: 8 steps, the ramp over all of them.
    expected = [0.1 * min(k / 4, 1) for k in range(8)] + [0.1 + 0.1 * k / 8 for k in range(8)]
    assert [eps for _, _, eps in seen] == pytest.approx(expected)
    assert [row["eps"] for row in log] == pytest.approx([0.075, 0.1, 0.1375, 0.1875])


def test_the_learning_rate_is_stepped_once_a_step() -> None:
    log = fit(linear(), MADRY, epochs=2, optimizer=SGD(lr=0.1), schedule=MultiStep((1,), gamma=0.5))
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.05])  # what the next step would use
    log = fit(linear(), MADRY, epochs=2, optimizer=SGD(lr=0.1), schedule=Cosine())
    assert [row["lr"] for row in log] == pytest.approx([0.05, 0.0])
    assert [row["lr"] for row in fit(linear(), MADRY, optimizer=SGD(lr=0.1), schedule=Constant())] == [0.1]
    assert fit(linear(), MADRY, optimizer=SGD(lr=0.1), schedule=OneCycle(0.5))[0]["lr"] < 0.1


# --- what the log says


def test_a_term_that_ramps_in_is_averaged_over_the_steps_that_computed_it() -> None:
    """At the first step its weight is zero and it has no value: its mean is over the others alone."""
    seen: list[float] = []

    class Noted:
        def __call__(self, views: Views) -> Tensor:
            loss = nn.functional.cross_entropy(views.adv, views.y, reduction="none")
            if loss.requires_grad:
                seen.append(float(loss.detach().mean()))
            return loss

    ramped = Sum((1.0, CE()), (Ramp(0.0, 1.0), Noted()))
    (record,) = fit(linear(), Method(None, ramped), PART.select(torch.arange(len(PART)) < 64 * (len(PART) // 64)))
    computed = seen[-(len(PART) // 64 - 1) :]  # before them, a rehearsal may have asked
    assert record["parts"]["noted"] == pytest.approx(sum(computed) / len(computed))


def test_what_a_term_learns_is_stepped_like_the_weights_but_does_not_decay() -> None:
    kept: list[dict[str, Any]] = []

    def optimizer(groups: Any) -> Optimizer:
        made = SGD(lr=0.05, weight_decay=0.2)(groups)
        kept.extend(made.param_groups)
        return made

    term = GlobalProbability(10)
    fit(linear(), Method(None, Sum((1, CE()), (1, term))), optimizer=optimizer)
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in kept] == [(0.05, 0.9, 0.2), (0.05, 0.9, 0.0)]
    assert kept[1]["params"] == [term.theta]


def test_averages_are_over_samples_also_with_a_ragged_last_batch() -> None:
    """T23. With lr = 0 the weights stand still, so the means are those of the whole data."""
    model = linear()
    still = SGD(lr=0.0, weight_decay=0.0)
    held_out = DATA.test.take(70)
    (row,) = fit(
        model, Method(None, Sum((1, CE("clean")), (2.0, CE("clean", 0.1)))), optimizer=still, validation=held_out,
        threat=THREAT, check=PGD(THREAT, steps=2), batch_size=192,
    )  # fmt: skip
    whole = next(iter(PART.batches(len(PART))))
    with torch.no_grad():
        logits = model(whole.x)
    ce, smooth = F.cross_entropy(logits, whole.y), F.cross_entropy(logits, whole.y, label_smoothing=0.1)
    assert row["parts"] == pytest.approx({"ce": float(ce), "ce_2": float(smooth)}, rel=1e-5)
    assert row["loss"] == pytest.approx(float(ce + 2 * smooth), rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(float((logits.argmax(dim=1) == whole.y).double().mean()), rel=1e-6)
    batches = [float(F.cross_entropy(model(b.x), b.y).detach()) for b in PART.batches(192)]
    assert abs(np.mean(batches) - float(ce)) > 1e-3  # the mean over batches is another number
    # Validation: whole counts, whatever the batch size.
    x, y = next(iter(held_out.batches(70))).x, held_out.labels
    assert row["validation_clean"] == int((model(x).argmax(dim=1) == y).sum()) / 70
    adv = PGD(THREAT, steps=2)(model, Batch(x, y, held_out.index))
    assert row["validation_robust"] <= row["validation_clean"]
    robust = (model(adv).argmax(dim=1) == y) & (model(x).argmax(dim=1) == y)
    assert row["validation_robust"] == int(robust.sum()) / 70
    assert row["validation_n"] == 70


def test_progress_is_told_after_each_step_and_epoch() -> None:
    told: list[dict[str, Any]] = []
    log = fit(linear(), MADRY, epochs=2, progress=told.append)
    assert [record["share"] for record in told if "share" in record] == [0.25, 0.5, 0.75, 1.0] * 2
    assert [record for record in told if "share" not in record] == log
    assert all(record["seconds"] > 0 for record in log)


# --- precision


@pytest.fixture(scope="module")
def judged() -> tuple[nn.Sequential, Batch]:
    """A trained model and images that it is attacked on."""
    model = network()
    fit(model, Method(None, CE("clean")), digits(test=797).train, epochs=5, optimizer=Adam(lr=1e-2))
    return model.eval(), next(iter(DATA.test.batches(256)))


def test_bf16_keeps_parameters_statistics_and_losses_in_float32() -> None:
    model, optimizer = network(), None
    optimizer = torch.optim.Adam(model.parameters())
    for defense in (Plain(), SAM(), AWP()):
        method = Method(PGD(THREAT, steps=2), Sum((1, CE("clean")), (6, KL())), defense)
        step = train_step(model, method, optimizer, next(iter(PART.batches(64))), "bf16")
        assert {step.loss.dtype, step.parts["kl"].dtype} == {torch.float32}
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert model[1].running_mean.dtype == torch.float32
    assert fit(network(), MADRY, precision="bf16")[0]["loss"] == pytest.approx(
        fit(network(), MADRY)[0]["loss"], rel=0.02
    )


def test_attack_gradients_under_bf16_point_as_in_float32(judged: tuple[nn.Sequential, Batch]) -> None:
    """T9, T10: at least 98 % of the signs agree, and at most 0.5 % of the gradients vanish."""
    model, batch = judged
    views = Views(model, batch)
    _, exact, _ = gradient_at(views, batch.x, CE())
    with precision.autocast("bf16", "cpu"):
        _, rough, logits = gradient_at(views, batch.x, CE())
    assert logits.dtype == rough.dtype == torch.float32
    moving = exact != 0
    assert not torch.equal(exact, rough)
    assert (rough[moving] == 0).float().mean() <= 0.005
    assert (exact.sign() == rough.sign())[moving].float().mean() >= 0.98


def test_attacks_under_bf16_raise_the_loss_as_in_float32(judged: tuple[nn.Sequential, Batch]) -> None:
    model, batch = judged
    attack = PGD(THREAT, steps=5)
    with precision.autocast("bf16", "cpu"):
        rough = attack(model, batch)
    exact = attack(model, batch)
    assert rough.dtype == torch.float32
    with torch.no_grad():
        clean, far, near = (F.cross_entropy(model(x), batch.y) for x in (batch.x, exact, rough))
    assert far > clean + 0.5
    assert near - clean > 0.97 * (far - clean)


def test_auto_precision_is_one_of_the_two_and_float32_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.resolve("auto", "cpu") in ("float32", "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert precision.resolve("auto", "cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert precision.resolve("auto", "cpu") == "bf16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert precision.resolve("auto", "cpu") == "float32"
    with pytest.raises(UnmovedError, match="precision: unknown value 'fp16'"):
        precision.resolve("fp16", "cpu")


def test_float64_models_stay_float64() -> None:
    model = network().double()
    method = Method(PGD(THREAT, steps=2), Sum((1, CE("clean")), (6, KL())), AWP())
    data = InOrder(PART, torch.float64)
    (row,) = fit(model, method, data, validation=InOrder(DATA.test.take(20), torch.float64), threat=THREAT)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}
    single = network()
    (other,) = fit(single, method, InOrder(PART))
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert row["loss"] != other["loss"]


# --- what stops a training


class Breaks(nn.Module):
    """Logits that become NaN from a training pass on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner, self.left = linear(), after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        return self.inner(x) * (float("nan") if self.left < 0 else 1.0)


@pytest.mark.parametrize("defense", [Plain(), SAM(), AWP()], ids=repr)
def test_a_loss_that_is_not_finite_stops_the_step_before_it_changes_anything(defense: Any) -> None:
    batch = replace(next(iter(PART.batches(64))), step=7)
    for after in (0, 1):
        model = Breaks(after)
        if after == 1 and isinstance(defense, Plain):
            continue
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(UnmovedError, match=r"the loss became nan at step 7 \(ce = nan\)"):
            train_step(model, Method(None, CE("clean"), defense), optimizer, batch)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert not optimizer.state


def test_training_stops_at_the_step_and_keeps_the_epoch_before(tmp_path: Path) -> None:
    run = Run.create(tmp_path, {"name": "run"})
    with pytest.raises(UnmovedError) as caught:
        fit(Breaks(6), Method(None, CE("clean")), epochs=3, run=run)
    assert f"at step 6 (ce = nan), in epoch 2: training stopped; {tmp_path} keeps the state after epoch 1" in str(
        caught.value
    )
    kept = Breaks(0)
    run.load_weights(kept, "last")
    other = Breaks(1000)
    fit(other, Method(None, CE("clean")), epochs=1)
    assert equal(kept, other)


class Root(nn.Module):
    """Its loss is finite, the gradient of its square root at zero is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.zero = linear(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.zero.sqrt()


@pytest.mark.parametrize("validation", [None, DATA.test.take(20)], ids=["blind", "validated"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, validation: Any) -> None:
    run = Run.create(tmp_path, {"name": "run"})
    with pytest.raises(UnmovedError, match=r"a weight became NaN or infinite by step 0, in epoch 1: training stopped"):
        fit(Root(), Method(None, CE("clean")), PART.take(64), run=run, validation=validation, threat=THREAT)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.toml", "provenance.json"}


def test_a_validation_that_cannot_be_judged_stops_the_training_in_words(tmp_path: Path) -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if self.training else self.inner(x) * float("inf")

    data: dict[str, Any] = {"validation": DATA.test.take(20), "threat": THREAT}
    with pytest.raises(
        UnmovedError, match=r"expected finite logits[^;]*; a verdict would mean nothing; look for an [^;]*$"
    ):
        fit(Blind(), Method(None, CE("clean")), **data)  # before anything is trained
    with pytest.raises(UnmovedError, match=r"expected finite logits.*in epoch 1: training stopped$"):
        fit(Blind(), Method(None, CE("clean")), **data, rehearsal=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs: expected a whole number >= 1, came 0"),
        ({"batch_size": 0}, "batch_size: "),
        ({"precision": "half"}, "precision: unknown value 'half'"),
        ({"device": "gpu"}, "device: unknown value 'gpu'"),
        ({"validation": DATA.test.take(20)}, "validation needs the threat model"),
        ({"split": DATA.test.select(torch.zeros(0, dtype=torch.int64))}, "expected at least one sample, came none"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"split": PART, "epochs": 1, "batch_size": 64} | settings
    with pytest.raises(UnmovedError, match=words):
        train(linear(), MADRY, **arguments)
