"""Check that a defense keeps its contract."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core.protocols import ParameterDefense
from unmoved.core.views import Views
from unmoved.testing.fixtures import Planned, network, require, small_batch


def check_defense(defense: ParameterDefense, *, zero: ParameterDefense | None = None) -> None:
    """Check that a defense moves what the optimizer owns, once, and leaves nothing else changed.

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
            require(count == views, f"{name}: BatchNorm saw {int(count)} passes in one step, not one per view")
    if zero is not None:
        plain, _ = _steps(_plain, 3)
        ours, _ = _steps(zero, 3)
        require(_equal(plain, ours), f"{zero!r}: strength zero is not the plain step bit for bit")
    before, _ = _steps(defense, 0)
    still, _ = _steps(defense, 2, lr=0.0)
    parameters = [key for key in before if "running" not in key and "tracked" not in key]
    require(all(torch.equal(before[k], still[k]) for k in parameters), f"{name}: lr = 0 changes the weights")
    twice, _ = _steps(defense, 2)
    require(not torch.equal(twice["extra"], before["extra"]), f"{name}: a learned term in the optimizer is not trained")
    resumed, _ = _steps(defense, 2, resume_after=1)
    require(_equal(twice, resumed), f"{name}: two steps are not one step plus one resumed step")
    losses = _losses(defense, 30)
    require(losses[-1] < losses[0], f"{name}: thirty steps do not lower the loss")
    for fails_at in (1, 2, 3):
        _check_restored(defense, fails_at, name)


def _plain(model: nn.Module, optimizer: Optimizer, backward: Callable[[], Tensor]) -> Tensor:
    optimizer.zero_grad()
    loss = backward()
    optimizer.step()
    return loss


class _Setting:
    """Set up a small training problem: a network with BatchNorm, a learned parameter, a clean and a noisy view."""

    def __init__(self, lr: float = 0.1) -> None:
        self.model = network().train()
        self.extra = nn.Parameter(torch.tensor(0.5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
        self.optimizer.add_param_group({"params": [self.extra], "weight_decay": 0.0})
        self.batch = small_batch()
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
    """Check that an exception in a pass leaves the weights as they were, and the modes too."""
    setting, calls = _Setting(), 0
    before = setting.state()

    def backward() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise Planned
        return setting.backward()

    try:
        defense(setting.model, setting.optimizer, backward)
    except Planned:
        after = setting.state()
        same = all(
            torch.equal(before[key], after[key]) for key in before if "running" not in key and "tracked" not in key
        )
        require(same, f"{name}: weights are not restored when pass {fails_at} raises")
    tracking = [m.track_running_stats for m in setting.model.modules() if isinstance(m, nn.BatchNorm2d)]
    require(all(tracking) and setting.model.training, f"{name}: a mode is not restored after pass {fails_at}")


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
