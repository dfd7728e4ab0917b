"""Whoever changes weights, modes, statistics or random state restores them exactly, on exceptions too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from unmoved.core.weights import constant_beside, evaluating, frozen_buffers, in_training, norm, perturbed, trainable

GUARDS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "evaluating": evaluating,
    "evaluating in training mode": lambda net: evaluating(net, "train"),
    "frozen_buffers": frozen_buffers,
    "perturbed": lambda net: perturbed(trainable(net), [torch.full_like(p, 1 / 3) for p in trainable(net)]),
}
EVERY_GUARD = pytest.mark.parametrize("guard", GUARDS.values(), ids=list(GUARDS))


class Failure(Exception):
    """What goes wrong inside a block."""


def network() -> nn.Sequential:
    """In training, but with one BatchNorm and one Dropout frozen, as in fine-tuning."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)
    )
    net(torch.rand(3, 1, 8, 8))
    net[1].eval()
    net[2].eval()
    return net


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def everything(net: nn.Module) -> tuple[object, ...]:
    """All hidden state that a guard may touch, but for the tensors."""
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
    return flags, [(p.requires_grad, p.grad is None) for p in net.parameters()]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


# --- every guard


@EVERY_GUARD
@pytest.mark.parametrize("fails", [False, True])
def test_a_guard_restores_modes_flags_and_tensors(
    guard: Callable[[nn.Module], AbstractContextManager[None]], fails: bool
) -> None:
    """T1, T2: each submodule gets back its own mode, whatever happens inside the block."""
    net = network()
    before, flags = bits(net), everything(net)
    try:
        with guard(net):
            if fails:
                raise Failure
    except Failure:
        pass
    assert everything(net) == flags
    assert same(bits(net), before)


@EVERY_GUARD
def test_guards_nest(guard: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    for other in GUARDS.values():
        net = network()
        before, flags = bits(net), everything(net)
        with guard(net):
            between, between_flags = bits(net), everything(net)
            with other(net):
                pass
            assert same(bits(net), between)
            assert everything(net) == between_flags
        assert same(bits(net), before)
        assert everything(net) == flags


# --- perturbed


def test_inside_the_block_the_weights_are_moved_by_the_corruption() -> None:
    net = network()
    parameters = trainable(net)
    old = [p.detach().clone() for p in parameters]
    corruption = [torch.randn_like(p) for p in parameters]
    with perturbed(parameters, corruption):
        for p, w, v in zip(parameters, old, corruption, strict=True):
            assert torch.equal(p, w + v)
            assert p.requires_grad


def test_restoring_is_exact_where_subtracting_is_not() -> None:
    """T20: in floating point (w + v) - v is not w, so the weights must be kept and not recomputed."""
    w, v = nn.Parameter(torch.tensor([1e-8, 0.1, -0.0, 3e38])), torch.tensor([1.0, 1e8, 0.0, 3e38])
    before = w.detach().clone()
    assert not torch.equal((w + v) - v, before)
    with perturbed([w], [v]):
        assert w.isinf().any()
    assert torch.equal(w.detach().view(torch.int32), before.view(torch.int32))


def test_gradients_of_the_block_stay_and_are_those_of_the_moved_weights() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    with perturbed([w], [torch.tensor([0.5, -1.0])]):
        (w**2).sum().backward()
    assert torch.equal(w.grad, torch.tensor([3.0, 2.0]))
    assert torch.equal(w.detach(), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "corruption", [[torch.ones(2)], [torch.ones(2), torch.ones(3)]], ids=["too few", "wrong shape"]
)
def test_a_corruption_that_does_not_fit_leaves_no_trace(corruption: list[Tensor]) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    with pytest.raises((ValueError, RuntimeError)), perturbed(parameters, corruption):
        pass
    assert all(p.count_nonzero() == 0 for p in parameters)


def test_perturbed_reaches_the_weights_that_autocast_has_cast_already() -> None:
    layer, x = nn.Linear(4, 3), torch.ones(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with perturbed(list(layer.parameters()), [torch.ones(3, 4), torch.zeros(3)]):
            moved = layer(x)
        again = layer(x)
    assert ((moved - plain).float() > 3).all()
    assert torch.equal(again, plain)


# --- evaluating


def test_evaluating_puts_every_submodule_into_evaluation() -> None:
    net = network()
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        assert torch.equal(net(images()), net(images()))
    assert [net[k].training for k in range(6)] == [True, False, False, True, True, True]


def test_a_mode_is_read_when_the_block_begins() -> None:  # T2
    net, guard = network(), evaluating
    net.eval()
    with guard(net):
        pass
    assert not any(module.training for module in net.modules())


def test_training_mode_uses_batch_statistics_and_dropout_and_moves_nothing() -> None:  # T1, T6
    net = network()
    before, state = bits(net), torch.get_rng_state()
    with evaluating(net, "train"):
        first = net(images())
        assert not torch.equal(net(images()), first)  # dropout draws on
        x = torch.rand(6, 2, 4, 4) + 100
        assert net[4](x).mean().abs() < 1e-3  # the last BatchNorm takes the mean of the batch away
    assert same(bits(net), before)
    assert torch.equal(torch.get_rng_state(), state)
    with evaluating(net, "train"):
        assert torch.equal(net(images()), first)  # from the same state as before


def test_training_mode_leaves_frozen_submodules_frozen() -> None:
    net = network()
    with evaluating(net, "train"):
        assert [net[k].training for k in range(6)] == [True, False, False, True, True, True]


# --- frozen_buffers


@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_buffers_normalises_by_the_batch_and_leaves_its_buffers(momentum: float | None) -> None:  # T1, T4
    layer, x = nn.BatchNorm2d(3, momentum=momentum), 2 + 3 * torch.rand(8, 3, 4, 4)
    layer(x)
    before = bits(layer)
    with frozen_buffers(layer):
        out = layer(x + 5)
    assert same(bits(layer), before)
    assert before["num_batches_tracked"] == 1
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(out, (x - mean) / (variance + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)
    layer(x)
    assert layer.num_batches_tracked == 2  # and afterwards they move again


def test_frozen_buffers_reaches_every_dimension_and_leaves_evaluation_alone() -> None:
    layers = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2)])
    still = nn.BatchNorm1d(2).eval()
    still.running_mean.fill_(5.0)
    before = bits(layers)
    with frozen_buffers(nn.ModuleList([*layers, still])):
        for dimension, layer in enumerate(layers):
            layer(torch.rand(4, 2, *[3] * (dimension + 1)))
        torch.testing.assert_close(still(torch.full((3, 2), 5.0)), torch.zeros(3, 2))
    assert same(bits(layers), before)


def test_a_batchnorm_without_running_statistics_stays_without() -> None:
    layer = nn.BatchNorm2d(2, track_running_stats=False)
    with frozen_buffers(layer):
        pass
    assert layer.track_running_stats is False


def test_training_mode_freezes_the_statistics_of_instance_norm() -> None:  # T1
    layer = nn.InstanceNorm2d(2, track_running_stats=True)
    before = bits(layer)
    with evaluating(layer, "train"):
        layer(torch.rand(4, 2, 5, 5))
    assert same(bits(layer), before)


class Remembers(nn.Module):
    """Every way in which a pass can leave something behind in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("added", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2))  # written past autograd's count, as BatchNorm's kernel does
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("first", None)
        self.register_buffer("removed", torch.zeros(2))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("resized", torch.zeros(2))
        self.register_buffer("spread", torch.zeros(1).expand(2))
        self.plain, self.plain_replaced = torch.zeros(2), torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for tensor in (self.added, self.hidden.data, self.unsaved, self.plain):
                tensor.add_(1)
            self.replaced, self.plain_replaced, self.spread = (
                self.replaced + 1,
                self.plain_replaced + 1,
                self.spread + 1,
            )
            self.first = torch.ones(2) if self.first is None else self.first + 1
            del self.removed
            self.resized.resize_(3).fill_(1)
        return x + self.added.sum()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("guard", [frozen_buffers, evaluating, lambda net: evaluating(net, "train")])
def test_a_pass_leaves_no_trace_in_any_tensor(
    guard: Callable[[nn.Module], AbstractContextManager[None]], fails: bool
) -> None:
    net = Remembers()
    before = {name: getattr(net, name) for name in (*net._buffers, "plain", "plain_replaced")}
    try:
        with guard(net):
            net(torch.zeros(2))
            assert [net.first.sum(), net.added.sum(), len(net.resized)] == [2, 2, 3]
            if fails:
                raise Failure
    except Failure:
        pass
    for name, tensor in before.items():
        assert getattr(net, name) is tensor, name
        assert tensor is None or tensor.tolist() == [0, 0], name
    net(torch.zeros(2))
    assert net.added.tolist() == [1, 1]  # and afterwards they move again


def old_spectral_norm() -> nn.Module:
    return torch.nn.utils.spectral_norm(nn.Linear(4, 3))


def new_spectral_norm() -> nn.Module:
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 1))
    nn.init.eye_(layer.parametrizations.weight.original[:2, :, 0, 0].data).mul_(torch.tensor([[1.0], [7.0]]))
    return layer  # whose vectors are those of another weight, so that they have to move


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (old_spectral_norm, (2, 4)),
        (new_spectral_norm, (2, 2, 3, 3)),
        (lambda: nn.BatchNorm1d(4, momentum=None), (8, 4)),
        (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (8, 4, 5)),
        (lambda: torch.jit.script(nn.BatchNorm1d(4)), (8, 4)),
    ],
    ids=["spectral norm", "spectral norm as a parametrization", "batch", "instance", "script"],
)
def test_whatever_layer_of_torch_it_is(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net = make().train()
    before = bits(net)
    with evaluating(net, "train"):
        net(torch.rand(shape))
        assert not same(bits(net), before), "it is one that remembers"
    assert same(bits(net), before)


def test_a_cache_that_has_grown_stays() -> None:
    """Its owner may have written down how large it is."""
    net = nn.Module()
    net.register_buffer("cache", torch.zeros(2))
    with frozen_buffers(net):
        net.cache = torch.ones(5)
    assert len(net.cache) == 5


def test_a_graph_goes_on_after_the_guard() -> None:
    """A pass that saved a buffer for its way back is not spoilt by putting the same numbers back."""
    net = nn.Module()
    net.register_buffer("scale", torch.full((2,), 3.0))
    x = torch.ones(2, requires_grad=True)
    y = (x * net.scale).sum()
    with evaluating(net):
        pass
    y.backward()
    assert x.grad.tolist() == [3.0, 3.0]


# --- constant_beside and in_training


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_optimizer_does_not_step_is_constant_inside(fails: bool) -> None:
    body, head, still = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    body.weight.grad = mine = torch.ones(2, 2)
    still.weight.grad = torch.ones(2, 2)
    net, x = nn.Sequential(body, head, still), torch.ones(1, 2)
    try:
        with constant_beside(torch.optim.SGD(head.parameters(), lr=1.0), net):
            assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, False, False]
            assert all(p.grad is None for p in net.parameters())
            net(x).sum().backward()
            if fails:
                raise Failure
    except Failure:
        pass
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, True, False, False]
    assert body.weight.grad is mine
    assert mine.tolist() == [[1, 1], [1, 1]]
    assert body.bias.grad is None
    assert head.weight.grad is not None
    assert still.weight.grad is not None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("frozen", [[], [1], [0, 2], [1, 2, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_in_training_keeps_what_is_frozen_but_a_model_that_is_frozen_as_a_whole(frozen: list[int], fails: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    modules = list(net.modules())  # the whole, a layer, a part, and what is in the part
    modes = [k not in frozen for k in range(4)]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    try:
        with in_training(net) as (train, names):
            for _ in range(2):
                train()
                assert [m.training for m in modules] == (modes if any(modes) else [True] * 4)
                net.eval()
            assert len(names) == (len(frozen) if any(modes) else 0)
            if fails:
                raise Failure
    except Failure:
        pass
    assert [m.training for m in modules] == modes


# --- norms and parameters


def test_the_norm_is_that_of_the_concatenation() -> None:
    parts = [torch.rand(3, 4), torch.rand(5), torch.rand(())]
    whole = torch.cat([part.flatten() for part in parts])
    torch.testing.assert_close(norm(parts), torch.linalg.vector_norm(whole))
    torch.testing.assert_close(norm(part for part in parts), norm(parts))


def test_trainable_are_those_with_a_gradient_each_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].bias.requires_grad_(False)
    net[1].weight = net[0].weight
    assert [id(p) for p in trainable(net)] == [id(net[0].weight), id(net[1].bias)]


def test_trainable_are_those_that_the_optimizer_steps() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [net[1].weight]}, {"params": [net[1].bias, nn.Parameter(torch.ones(1))]}])
    assert [id(p) for p in trainable(net, optimizer)] == [id(net[1].weight)]


def test_the_norm_of_nothing_is_zero() -> None:
    assert norm([]) == 0
