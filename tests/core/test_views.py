"""Views: each set of logits is computed at most once, and only what is a set of logits is taken for one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.views import Views, eval_logits, logits


class Counting(nn.Module):
    """A linear model that remembers which images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.linear(x.flatten(1))


@pytest.fixture
def model() -> Counting:
    torch.manual_seed(0)
    return Counting()


@pytest.fixture
def batch() -> Batch:
    x = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.tensor([0, 1, 2, 0, 1]), index=torch.tensor([10, 20, 30, 40, 50]), step=7)


# --- how often the model runs


def test_nothing_is_computed_before_it_is_asked_for(model: Counting, batch: Batch) -> None:
    views = Views(model, batch, batch.x + 0.1)
    assert (views.y is batch.y, views.index is batch.index, views.x is batch.x, views.batch is batch) == (True,) * 4
    assert views.model is model
    views.at(batch.x)
    assert model.seen == []


def test_each_set_of_logits_is_computed_at_most_once(model: Counting, batch: Batch) -> None:
    x_adv = batch.x + 0.1
    views = Views(model, batch, x_adv)
    for _ in range(3):
        assert torch.equal(views.adv, model.linear(x_adv.flatten(1)))
        assert torch.equal(views.clean, model.linear(batch.x.flatten(1)))
        assert views.logits("clean") is views.clean
        assert views.logits("adv") is views.adv
    assert [torch.equal(x, x_adv) for x in model.seen] == [True, False]
    assert torch.equal(model.seen[1], batch.x)


def test_without_an_attack_the_adversarial_view_is_the_clean_one(model: Counting, batch: Batch) -> None:
    views = Views(model, batch)
    assert views.adv is views.clean
    assert len(model.seen) == 1


def test_an_attack_computes_the_clean_logits_once_for_all_its_steps(model: Counting, batch: Batch) -> None:
    base = Views(model, batch)
    for k in range(4):
        step = base.at(batch.x + k + 1)
        assert step.adv.requires_grad
        assert not step.clean.requires_grad
        assert (step.y is batch.y, step.index is batch.index) == (True, True)
        assert torch.equal(step.clean, model.linear(batch.x.flatten(1)))
        assert torch.equal(step.at(batch.x).clean, step.clean)
    assert sum(torch.equal(x, batch.x) for x in model.seen) == 1
    assert len(model.seen) == 5


def test_the_clean_logits_of_a_step_are_constant_whenever_they_were_computed(model: Counting, batch: Batch) -> None:
    base = Views(model, batch)
    assert base.clean.requires_grad
    assert not base.at(batch.x).clean.requires_grad


def test_a_step_does_not_take_the_gradient_from_its_base(model: Counting, batch: Batch) -> None:
    base = Views(model, batch)
    _ = base.at(batch.x).clean
    assert base.clean.requires_grad


def test_taking_a_part_keeps_what_was_computed(model: Counting, batch: Batch) -> None:
    views = Views(model, batch, batch.x + 0.1)
    clean, mask = views.clean, torch.tensor([True, False, True, False, False])
    part = views.take(mask)
    assert torch.equal(part.clean, clean[mask])
    assert part.index.tolist() == [10, 30]
    assert part.batch.step == 7
    assert len(model.seen) == 1
    assert torch.equal(part.adv, model.linear((batch.x[mask] + 0.1).flatten(1)))
    assert len(model.seen[-1]) == 2
    assert torch.equal(Views(model, batch).take(mask).adv, clean[mask])


def test_a_part_of_a_step_has_constant_clean_logits_too(model: Counting, batch: Batch) -> None:
    assert not Views(model, batch).at(batch.x).take(torch.tensor([0, 1])).clean.requires_grad


# --- ready logits


def test_ready_logits_need_no_model() -> None:
    y, clean, adv = torch.tensor([0, 1]), torch.rand(2, 3), torch.rand(2, 3)
    views = Views.of(y=y, clean=clean, adv=adv)
    assert (views.clean is clean, views.adv is adv, views.y is y) == (True, True, True)
    assert views.index.tolist() == [0, 1]
    assert Views.of(y=y, index=torch.tensor([4, 5])).index.tolist() == [4, 5]


def test_missing_ready_logits_are_asked_for_by_name() -> None:
    y = torch.tensor([0, 1])
    with pytest.raises(UnmovedError, match=r"needs the clean logits: pass Views.of\(..., clean=logits\)"):
        _ = Views.of(y=y, adv=torch.rand(2, 3)).clean
    with pytest.raises(UnmovedError, match=r"needs the adversarial logits: pass Views.of\(..., adv=logits\)"):
        _ = Views.of(y=y, clean=torch.rand(2, 3)).adv
    for use in (
        lambda v: v.at(torch.rand(2, 1, 2, 2)),
        lambda v: v.take(torch.tensor([0])),
        lambda v: v.model,
        lambda v: v.batch,
        lambda v: v.x,
    ):
        with pytest.raises(UnmovedError, match=r"ready logits: make them with Views\(model, batch\)"):
            use(Views.of(y=y, clean=torch.rand(2, 3)))


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 4, 1)])
def test_ready_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for name in ("clean", "adv"):
        with pytest.raises(UnmovedError, match=rf"Views.of {name}: expected \(2, K\) logits, came \({shape[0]}, ?"):
            Views.of(y=torch.tensor([0, 1]), **{name: torch.rand(shape)})


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(UnmovedError, match="clean"):
        Views.of(y=torch.tensor([0, 1]), adv=torch.rand(2, 3)).logits("cleen")


# --- what counts as logits


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


def test_the_advice_for_one_logit_keeps_its_probability() -> None:
    with pytest.raises(UnmovedError) as raised:
        logits(Returns(torch.rand(2, 1)), torch.rand(2, 1, 2, 2))
    z = torch.tensor([[-2.0], [0.3]])
    names = {"torch": torch, "z": z}
    steps = re.search(r"(z = z\.\w+\(\)), then (torch\.stack\(.*\)), whose", str(raised.value))
    assert steps is not None
    exec(steps[1], names)
    assert torch.allclose(eval(steps[2], names).softmax(1)[:, 1], z.sigmoid().flatten())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((torch.rand(2, 3), torch.rand(2, 3)), r"came a tuple; wrap the model in a module whose forward returns"),
        ({"logits": torch.rand(2, 3)}, r"came a dict; wrap the model"),
        (None, r"came a NoneType; wrap the model"),
        (torch.rand(2), r"with K >= 2, came \(2,\); of one logit z for two classes make two"),
        (torch.rand(2, 1), r"with K >= 2, came \(2, 1\); of one logit z for two classes make two"),
        (torch.rand(3, 4), r"with K >= 2, came \(3, 4\); wrap the model"),
        (torch.rand(2, 3, 1, 1), r"came \(2, 3, 1, 1\)"),
        (torch.tensor(0.5), r"came \(\)"),
    ],
)
def test_what_is_no_set_of_logits_is_refused_by_the_models_name(value: Any, message: str) -> None:
    with pytest.raises(UnmovedError, match=r"model Returns: expected logits of shape \(\w, K\).*" + message):
        logits(Returns(value), torch.rand(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("came", "becomes"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_logits_become_float32_and_float64_stays(came: torch.dtype, becomes: torch.dtype) -> None:
    value = torch.rand(2, 3).to(came)
    out = logits(Returns(value), torch.rand(2, 1, 2, 2))
    assert out.dtype == becomes
    assert torch.equal(out.double(), value.double())


def test_logits_under_autocast_are_float32_and_keep_their_graph(model: Counting, batch: Batch) -> None:  # T10, T19
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch.x).dtype == torch.bfloat16
        out = Views(model, batch).clean
    assert out.dtype == torch.float32
    out.sum().backward()
    assert model.linear.weight.grad is not None


def test_logits_of_a_verdict_are_float32_in_evaluation_mode_whatever_the_caller_is_in(batch: Batch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    model(torch.rand(8, 1, 2, 2))  # statistics that are not those of the batch
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        ours, rough = eval_logits(model, batch.x), nn.functional.linear(batch.x.flatten(1), model[1].weight)
    assert rough.dtype == torch.bfloat16
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ours, model.eval()(batch.x), rtol=0, atol=0)


def test_logits_of_a_randomised_model_are_the_mean_of_its_draws(batch: Batch) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.drawn = getattr(self, "drawn", 0) + 1
            return torch.full((len(x), 2), float(self.drawn))

    assert eval_logits(Counts(), batch.x, draws=3).eq(2.0).all()
