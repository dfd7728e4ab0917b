"""The exam that every exported method sits, and strangers may sit too.

    from unmoved.testing import check_term
    check_term(my_lab.Entropy())

Each check raises `ExamFailed` with the property that does not hold; returning means that all do.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.protocols import Attack, Batch, ParameterDefense, StatefulTerm, Term
from unmoved.threat import ThreatModel
from unmoved.views import Views


class ExamFailed(AssertionError):
    """A property that the contract asks for does not hold."""


def _require(holds: bool | Tensor, property_: str) -> None:
    if not bool(holds):
        raise ExamFailed(property_)


# --- terms


def check_term(term: Term, *, num_classes: int = 5, couples_samples: bool = False) -> None:
    """A term is pure and gives one finite, differentiable number per sample, whatever the logits.

    Args:
        term: the term; a `StatefulTerm` must not change in ``forward``.
        num_classes: classes of the logits that it is tried on.
        couples_samples: set for a term whose value of one sample depends on the others; batch laws are skipped.

    Raises:
        ExamFailed: naming the property.
    """
    draw = torch.Generator().manual_seed(1)
    clean, adv = (3 * torch.randn(12, num_classes, generator=draw, dtype=torch.float64) for _ in range(2))
    y = torch.randint(num_classes, (12,), generator=draw)
    if isinstance(term, StatefulTerm):
        term = copy.deepcopy(term).double()

    def value(which: Any = slice(None), dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return term(Views.of(y=y[which], clean=(clean[which] * scale).to(dtype), adv=(adv[which] * scale).to(dtype)))

    with _untouched(term), _same_random_state():
        whole = value()
    _require(whole.shape == (12,), f"{term!r}: expected one value per sample (12,), came {tuple(whole.shape)}")
    _require(whole.is_floating_point() and torch.isfinite(whole).all(), f"{term!r}: values are not finite floats")
    _require(torch.equal(whole, value()), f"{term!r}: two calls on the same views differ")
    if not couples_samples:
        order = torch.randperm(12, generator=draw)
        _require(torch.allclose(value(order), whole[order]), f"{term!r}: permuting the batch changes the values")
        _require(torch.allclose(value(slice(0, 1)), whole[:1]), f"{term!r}: a batch of one sample gives another value")
    _require(
        torch.allclose(value(dtype=torch.float32).double(), whole, rtol=1e-3, atol=1e-3),
        f"{term!r}: float32 and float64 disagree",
    )
    for scale in (0.0, 1e4):
        _check_gradient_finite(term, clean * scale, adv * scale, y)
    clean_leaf, adv_leaf = clean.clone().requires_grad_(True), adv.clone().requires_grad_(True)

    def function(c: Tensor, a: Tensor) -> Tensor:
        # Adding zero times both keeps the graph connected for a term of one view alone.
        return term(Views.of(y=y, clean=c, adv=a)) + 0 * (c.sum() + a.sum())

    _require(
        torch.autograd.gradcheck(function, (clean_leaf, adv_leaf), raise_exception=False),
        f"{term!r}: the gradient disagrees with finite differences",
    )


def _check_gradient_finite(term: Term, clean: Tensor, adv: Tensor, y: Tensor) -> None:
    leaves = [logits.float().clone().requires_grad_(True) for logits in (clean, adv)]
    single = copy.deepcopy(term).float() if isinstance(term, StatefulTerm) else term
    values = single(Views.of(y=y, clean=leaves[0], adv=leaves[1]))
    size = float(clean.abs().max())
    _require(torch.isfinite(values).all(), f"{term!r}: not finite at logits of {size:.0f}")
    for gradient in torch.autograd.grad(values.sum(), leaves, allow_unused=True):
        _require(gradient is None or torch.isfinite(gradient).all(), f"{term!r}: gradient not finite at {size:.0f}")


# --- attacks


def check_attack(
    make: Callable[[ThreatModel], Attack],
    *,
    norm: str = "linf",
    maximises: bool = True,
    batch_statistics: bool = False,
) -> None:
    """An attack stays in the ball, leaves the caller as it was, and beats the linear model as theory says.

    Args:
        make: threat model -> the attack.
        norm: of the threat model.
        maximises: whether the attack seeks the largest loss; if not (early stopping), the oracle is skipped.
        batch_statistics: whether it attacks the model in training mode, so that samples depend on each other by
            design; the laws of order and batch size are then skipped.

    Raises:
        ExamFailed: naming the property.
    """
    threat = ThreatModel(norm, 0.08 if norm == "linf" else 0.5)
    attack, model, batch = make(threat), _network(), _batch()
    name = repr(attack)
    model[1].eval()  # one frozen BatchNorm inside a training model: modes are restored one by one
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with _untouched(model), _same_random_state():
        x_adv = attack(model, batch)
    _require(not x_adv.requires_grad, f"{name}: the proposal still carries a graph")
    threat.check(x_adv, batch.x, name)
    _require(torch.equal(batch.x, _batch().x) and torch.equal(batch.y, _batch().y), f"{name}: changed its input")
    _require(torch.equal(x_adv, attack(model, batch)), f"{name}: two calls on the same batch differ")
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            _require(torch.equal(x_adv, attack(model, batch)), f"{name}: differs inside {guard.__name__}")
    _require(torch.equal(make(dataclasses.replace(threat, eps=0.0))(model, batch), batch.x), f"{name}: eps = 0 moves x")
    if not batch_statistics:
        _check_batch_laws(attack, model, batch, name)
    for fails_at in (1, 2):
        broken = _Failing(model, fails_at)
        with _untouched(model), _same_random_state(), suppress(_Planned):
            attack(broken, batch)
    if maximises:
        _check_linear_oracle(attack, threat, name)


def _check_batch_laws(attack: Attack, model: nn.Module, batch: Batch, name: str) -> None:
    """In float64, where rounding does not decide a sign, a sample's fate is its own."""
    exact, wide = copy.deepcopy(model).double(), dataclasses.replace(batch, x=batch.x.double())
    whole = attack(exact, wide)
    order = torch.arange(len(wide) - 1, -1, -1)
    _require(torch.allclose(attack(exact, wide.take(order)), whole[order]), f"{name}: depends on the batch's order")
    alone = torch.cat([attack(exact, wide.take(torch.tensor([k]))) for k in range(len(wide))])
    _require(torch.allclose(alone, whole), f"{name}: depends on the other samples of the batch")


def _check_linear_oracle(attack: Attack, threat: ThreatModel, name: str) -> None:
    """On two linear logits the smallest reachable margin is ``margin - eps ||w||_dual``: Goodfellow et al. 2015."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(16, generator=draw, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False)).double()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.stack([-weight, weight]) / 2)
    # Far from the box of valid images, so that only the ball binds.
    x = 0.5 + 0.02 * torch.randn(64, 1, 4, 4, generator=draw, dtype=torch.float64)
    score = x.flatten(1) @ weight
    y = (score > 0).long()
    reach = threat.radius * float(weight.abs().sum() if threat.norm == "linf" else weight.norm())
    batch = Batch(x, y)
    after = (attack(model, batch).flatten(1) @ weight) * (2 * y - 1)
    best = score.abs() - reach
    # Madry's rule walks 2.5 eps in all, which from a random start leaves an l2 attack 2-3 % short of the best.
    gap = float((after - best).max())
    _require((after >= best - 1e-9).all(), f"{name}: better than the optimum on the linear model: it left the ball")
    _require(gap <= 0.05 * reach, f"{name}: {gap / reach:.0%} short of the optimum on the linear model (5 % allowed)")


# --- defenses


def check_defense(defense: ParameterDefense, *, zero: ParameterDefense | None = None) -> None:
    """A defense moves what the optimizer owns, once, and leaves nothing else changed.

    Args:
        defense: the defense.
        zero: the same defense at strength zero, which must take the plain path bit for bit.

    Raises:
        ExamFailed: naming the property.
    """
    name = repr(defense)
    state, views = _steps(defense, 1)
    for key, count in state.items():
        if key.endswith("num_batches_tracked"):
            _require(count == views, f"{name}: BatchNorm saw {int(count)} passes in one step, not one per view")
    if zero is not None:
        plain, _ = _steps(_plain, 3)
        ours, _ = _steps(zero, 3)
        _require(_equal(plain, ours), f"{zero!r}: strength zero is not the plain step bit for bit")
    before, _ = _steps(defense, 0)
    still, _ = _steps(defense, 2, lr=0.0)
    parameters = [key for key in before if "running" not in key and "tracked" not in key]
    _require(all(torch.equal(before[k], still[k]) for k in parameters), f"{name}: lr = 0 changes the weights")
    twice, _ = _steps(defense, 2)
    _require(
        not torch.equal(twice["extra"], before["extra"]), f"{name}: a learned term in the optimizer is not trained"
    )
    resumed, _ = _steps(defense, 2, resume_after=1)
    _require(_equal(twice, resumed), f"{name}: two steps are not one step plus one resumed step")
    losses = _losses(defense, 30)
    _require(losses[-1] < losses[0], f"{name}: thirty steps do not lower the loss")
    for fails_at in (1, 2, 3):
        _check_restored(defense, fails_at, name)


def _plain(model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
    optimizer.zero_grad()
    loss = backward()
    optimizer.step()
    return loss


class _Setting:
    """A small training problem: a network with BatchNorm, a learned extra parameter, a clean and a noisy view."""

    def __init__(self, lr: float = 0.1) -> None:
        self.model = _network().train()
        self.extra = nn.Parameter(torch.tensor(0.5))
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        groups.append({"params": [self.extra], "weight_decay": 0.0})
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-3)
        self.batch = _batch()
        self.views = 2

    def loss(self) -> Tensor:
        views = Views(self.model, self.batch, (self.batch.x + 0.05).clamp(0, 1))
        both = nn.functional.cross_entropy(views.clean, views.y) + nn.functional.cross_entropy(views.adv, views.y)
        return both + (self.extra - both.detach()) ** 2

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        return state | {"extra": self.extra.detach().clone()}


def _steps(
    defense: ParameterDefense, count: int, *, lr: float = 0.1, resume_after: int | None = None
) -> tuple[dict[str, Tensor], int]:
    setting = _Setting(lr)
    for step in range(count):
        if step == resume_after:
            fresh = _Setting(lr)
            fresh.model.load_state_dict(setting.model.state_dict())
            fresh.extra.data.copy_(setting.extra.data)
            fresh.optimizer.load_state_dict(copy.deepcopy(setting.optimizer.state_dict()))
            setting = fresh
        defense(setting.model, setting.optimizer, setting.backward)
    return setting.state(), setting.views


def _losses(defense: ParameterDefense, count: int) -> list[float]:
    setting = _Setting()
    return [float(defense(setting.model, setting.optimizer, setting.backward)) for _ in range(count)]


def _check_restored(defense: ParameterDefense, fails_at: int, name: str) -> None:
    """An exception in any pass leaves the weights as they were, and the modes too."""
    setting, calls = _Setting(), 0
    before = setting.state()

    def backward() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise _Planned
        return setting.backward()

    try:
        defense(setting.model, setting.optimizer, backward)
    except _Planned:
        after = setting.state()
        same = all(
            torch.equal(before[key], after[key]) for key in before if "running" not in key and "tracked" not in key
        )
        _require(same, f"{name}: weights are not restored when pass {fails_at} raises")
    tracking = [m.track_running_stats for m in setting.model.modules() if isinstance(m, nn.BatchNorm2d)]
    _require(all(tracking) and setting.model.training, f"{name}: a mode is not restored after pass {fails_at}")


# --- what the exam is held on


def _network() -> nn.Sequential:
    """A small network with two BatchNorms and a (null) dropout, in training mode, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(
            *first, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(64, 5)
        )


def _batch() -> Batch:
    draw = torch.Generator().manual_seed(2)
    x = torch.rand(8, 1, 8, 8, generator=draw)
    return Batch(x, torch.randint(5, (8,), generator=draw), index=torch.arange(100, 108), step=7)


class _Planned(Exception):
    """Raised on purpose."""


class _Failing(nn.Module):
    """A model whose n-th forward pass raises."""

    def __init__(self, inner: nn.Module, fails_at: int) -> None:
        super().__init__()
        self.inner, self.left = inner, fails_at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise _Planned
        return self.inner(x)


@contextmanager
def _untouched(subject: object) -> Iterator[None]:
    """Parameters, buffers, gradients, requires_grad and modes of a module are the same after the block."""
    if not isinstance(subject, nn.Module):
        yield
        return
    before = _fingerprint(subject)
    yield
    after = _fingerprint(subject)
    for key, old in before.items():
        new = after[key]
        same = (
            torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old is new or old == new
        )
        _require(same, f"{type(subject).__name__}: {key} changed")


def _fingerprint(module: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {f"state {key}": value.clone() for key, value in module.state_dict().items()}
    for name, p in module.named_parameters():
        facts[f"gradient of {name}"] = None if p.grad is None else p.grad.clone()
        facts[f"requires_grad of {name}"] = p.requires_grad
    for name, sub in module.named_modules():
        facts[f"mode of {name or 'the model'}"] = sub.training
        if isinstance(sub, nn.BatchNorm2d):
            facts[f"tracking of {name}"] = sub.track_running_stats
    return facts


@contextmanager
def _same_random_state() -> Iterator[None]:
    before = torch.random.get_rng_state()
    yield
    _require(torch.equal(before, torch.random.get_rng_state()), "the global random state changed")


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
