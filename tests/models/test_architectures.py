"""Every model of ours: published sizes, an oracle for its topology, and what all attacks rely on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmoved import models
from unmoved.core.errors import UnmovedError
from unmoved.core.weights import evaluating
from unmoved.models.resnets import GlobalMean

SMALL: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "linear": ((3, 8, 8), {}),
    "mlp": ((3, 8, 8), {"hidden": (16, 8)}),
    "small_cnn": ((3, 8, 8), {"padding": 1, "width": 4}),
    "preact_resnet18": ((3, 16, 16), {"width": 4}),
    "wide_resnet": ((3, 16, 16), {"depth": 10, "width": 2, "dropout": 0.3}),
}
OURS = sorted(SMALL)
STATISTICS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def build(name: str, **more: Any) -> nn.Module:
    """A small model of 5 classes in which nothing is at its trivial initial value."""
    shape, chosen = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: nn.Module = getattr(models, name)(shape, 5, **chosen | more)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.1)
                nn.init.normal_(module.bias, 0, 0.1)
    return net


def images(name: str, n: int = 4) -> Tensor:
    return torch.rand(n, *SMALL[name][0], generator=torch.Generator().manual_seed(1))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# --- sizes


@pytest.mark.parametrize(
    ("name", "shape", "chosen", "published"),
    [
        ("small_cnn", (1, 28, 28), {}, 312_202),  # summed by hand over the layers of TRADES' small_cnn.py
        ("preact_resnet18", (3, 32, 32), {}, 11_172_170),  # with the last BN: robust overfitting, AWP
        ("preact_resnet18", (3, 32, 32), {"final_bn": False}, 11_171_146),  # without: pytorch-cifar
        ("wide_resnet", (3, 32, 32), {}, 46_160_474),  # WRN-34-10
        ("wide_resnet", (3, 32, 32), {"depth": 34, "width": 20}, 184_531_674),
        ("wide_resnet", (3, 32, 32), {"depth": 28}, 36_479_194),
        ("wide_resnet", (3, 32, 32), {"depth": 28, "width": 2}, 1_467_610),
        ("wide_resnet", (3, 32, 32), {"depth": 10}, 7_435_354),
        ("linear", (1, 28, 28), {}, 7_850),
        ("mlp", (1, 28, 28), {}, 784 * 256 + 256 + 2_570),
    ],
)
def test_the_number_of_parameters_is_the_published_one(
    name: str, shape: tuple[int, int, int], chosen: dict[str, Any], published: int
) -> None:
    with torch.device("meta"):
        net = getattr(models, name)(shape, 10, **chosen)
    assert count(net) == published


def test_small_cnn_has_the_1024_features_of_the_original_on_28x28() -> None:
    assert models.small_cnn((1, 28, 28), 10).features(torch.zeros(1, 1, 28, 28)).shape == (1, 64, 4, 4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_small_cnn_is_built_exactly_where_it_can_run(height: int, breadth: int, padding: int) -> None:
    shape = (1, height, breadth)
    x, features = torch.zeros(2, *shape), models.small_cnn((1, 40, 40), 3, padding=padding, width=2).features
    try:
        features(x)
    except RuntimeError:  # a kernel larger than its input, or nothing left to pool
        with pytest.raises(UnmovedError, match=f"came {height}x{breadth}"):
            models.small_cnn(shape, 3, padding=padding, width=2)
    else:
        assert models.small_cnn(shape, 3, padding=padding, width=2)(x).shape == (2, 3)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 17)])
def test_preact_resnet18_takes_any_size(size: tuple[int, int]) -> None:
    net = models.preact_resnet18((1, *size), 3, width=2).eval()
    assert net(torch.rand(2, 1, *size)).shape == (2, 3)


# --- topology against a plain transcription


def reference(net: nn.Module, x: Tensor, stages: int) -> Tensor:
    """Pre-activation in evaluation mode, written from the papers' equations over the named weights."""
    w = net.state_dict()

    def activated(v: Tensor, bn: str) -> Tensor:
        mean, var = w[f"{bn}.running_mean"], w[f"{bn}.running_var"]
        v = (v - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return (v * w[f"{bn}.weight"][:, None, None] + w[f"{bn}.bias"][:, None, None]).clamp_min(0)

    h = F.conv2d(x, w["conv.weight"], padding=1)
    for stage in range(1, stages + 1):
        block = 0
        while (at := f"stage{stage}.{block}") + ".conv1.weight" in w:
            stride = 2 if stage > 1 and block == 0 else 1
            a = activated(h, f"{at}.bn1")
            side = F.conv2d(a, w[f"{at}.shortcut.weight"], stride=stride) if f"{at}.shortcut.weight" in w else h
            inner = activated(F.conv2d(a, w[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn2")
            h = F.conv2d(inner, w[f"{at}.conv2.weight"], padding=1) + side
            block += 1
    if "bn.weight" in w:
        h = activated(h, "bn")
    return h.mean(dim=(2, 3)) @ w["linear.weight"].T + w["linear.bias"]


@pytest.mark.parametrize(
    ("name", "chosen", "stages"),
    [("preact_resnet18", {}, 4), ("preact_resnet18", {"final_bn": False}, 4), ("wide_resnet", {"depth": 16}, 3)],
)
def test_residual_networks_follow_their_equations(name: str, chosen: dict[str, Any], stages: int) -> None:
    net, x = build(name, **chosen).double().eval(), images(name).double()
    torch.testing.assert_close(net(x), reference(net, x, stages), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("activation", "equation"),
    [
        ("relu", lambda z: z.clamp_min(0)),
        ("silu", lambda z: z / (1 + torch.exp(-z))),
        ("softplus", lambda z: torch.log1p(torch.exp(z))),
    ],
)
def test_small_cnn_follows_its_equations(activation: Any, equation: Callable[[Tensor], Tensor]) -> None:
    net = models.small_cnn((1, 28, 28), 10, dropout=0.0, activation=activation).double()
    nn.init.normal_(net.classifier.fc3.weight)
    w, h = net.state_dict(), torch.rand(3, 1, 28, 28, dtype=torch.float64)
    x = h
    for k in (1, 2, 3, 4):
        h = equation(F.conv2d(h, w[f"features.conv{k}.weight"], w[f"features.conv{k}.bias"]))
        h = F.max_pool2d(h, 2) if k % 2 == 0 else h
    h = h.reshape(3, 1024)
    for k in (1, 2):
        h = equation(h @ w[f"classifier.fc{k}.weight"].T + w[f"classifier.fc{k}.bias"])
    torch.testing.assert_close(net(x), h @ w["classifier.fc3.weight"].T, rtol=1e-10, atol=1e-10)


def test_small_cnn_drops_once_between_the_first_two_connected_layers() -> None:
    net = models.small_cnn((1, 28, 28), 10)
    assert [name for name, m in net.named_modules() if isinstance(m, nn.Dropout)] == ["classifier.drop"]
    assert list(dict(net.classifier.named_children())) == ["fc1", "relu1", "drop", "fc2", "relu2", "fc3"]
    assert net.classifier.drop.p == 0.5


def test_small_cnn_starts_as_trades_does() -> None:
    net = models.small_cnn((1, 28, 28), 10)
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    logits = net(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 1])), x)
    assert torch.count_nonzero(logits) == 0  # the last layer is zero,
    assert torch.count_nonzero(gradient) == 0  # so an attack on an untrained one has no direction (T11)
    assert all(torch.count_nonzero(b) == 0 for n, b in net.features.named_parameters() if n.endswith("bias"))
    assert net.features.conv4.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_wide_resnet_starts_as_trades_does() -> None:
    net = models.wide_resnet((3, 32, 32), 10, depth=10, width=4)
    # By fan-out: this layer has 16 channels in and 64 out, so the two rules differ by a factor of two.
    assert net.stage1[0].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert torch.count_nonzero(net.linear.bias) == 0


def test_wide_resnet_drops_before_the_second_convolution_of_every_block() -> None:
    """What drops everything leaves the shortcuts alone, as second convolutions of weight zero do."""
    dropping = build("wide_resnet", dropout=1.0).train()
    silent = copy.deepcopy(dropping)
    for name, parameter in silent.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.zeros_(parameter)
    x = images("wide_resnet")
    torch.testing.assert_close(dropping(x), silent(x))
    assert sum(isinstance(m, nn.Dropout) for m in dropping.modules()) == 3
    assert not torch.allclose(dropping.eval()(x), silent.eval()(x), atol=1e-2)


def test_global_mean_is_adaptive_pooling() -> None:
    x = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(GlobalMean()(x), F.adaptive_avg_pool2d(x, 1).flatten(1))


# --- what attacks and training rely on


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_are_finite_and_reach_everything(name: str, training: bool) -> None:
    net, x = build(name).train(training), images(name).requires_grad_()
    logits = net(x)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert logits.shape == (4, 5)
    assert logits.isfinite().all()
    for parameter in [x, *net.parameters()]:
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", OURS)
def test_in_evaluation_a_sample_does_not_know_its_batch(name: str) -> None:  # T15
    net, x = build(name).double().eval(), images(name, 5).double()
    alone = torch.cat([net(one) for one in x.split(1)])
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(x), alone, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(net(x[order]), alone[order], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18", "wide_resnet"])
def test_training_mode_differs_from_evaluation(name: str) -> None:  # T1: why the mode of an attack is a setting
    net, x = build(name), images(name)
    noisy = net.train()(x)
    with evaluating(net):
        assert not torch.allclose(net(x), noisy, atol=1e-3)
        assert torch.equal(net(x), net(x))
    assert net.training


@pytest.mark.parametrize("name", ["small_cnn", "wide_resnet"])
def test_dropout_zero_uses_no_random_numbers(name: str) -> None:
    net = build(name, dropout=0.0).train()
    before = torch.get_rng_state()
    net(images(name))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", OURS)
def test_float64_and_channels_last_agree_to_rounding(name: str) -> None:
    net, x = build(name, **STATISTICS).eval(), images(name)
    single = net(x)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    double = copy.deepcopy(net).double()(x.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(last, single, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_the_same_seed_builds_the_same_model(name: str) -> None:
    shape, chosen = SMALL[name]
    states = []
    for seed in (7, 7, 8):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            states.append(
                torch.cat([p.detach().flatten() for p in getattr(models, name)(shape, 5, **chosen).parameters()])
            )
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", models.__all__)
def test_a_factory_takes_shape_and_classes_and_then_keywords(name: str) -> None:
    first, second, *rest = inspect.signature(getattr(models, name)).parameters.values()
    assert (first.name, second.name) == ("shape", "num_classes")
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in rest)
    assert {"mean", "std"} <= {parameter.name for parameter in rest}


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("small_cnn", {"padding": 0}, "at least 16x16 with padding=0, came 8x8; set padding=1"),
        ("small_cnn", {"padding": -1}, "padding: expected a whole number >= 0, came -1"),
        ("small_cnn", {"padding": 1, "dropout": 1.5}, "dropout: expected a finite number >= 0 and <= 1, came 1.5"),
        ("small_cnn", {"padding": 1, "width": 0}, "width: expected a whole number >= 1, came 0"),
        ("small_cnn", {"padding": 1, "activation": "sylu"}, "activation: unknown value 'sylu'; did you mean 'silu'"),
        ("preact_resnet18", {"width": 2.5}, "width: expected a whole number >= 1, came 2.5"),
        ("wide_resnet", {"depth": 32}, "depth: expected 6n + 4, came 32; use 28 or 34"),
        ("wide_resnet", {"depth": 4}, "depth: expected a whole number >= 10, came 4"),
        ("wide_resnet", {"width": True}, "width: expected a whole number >= 1, came True"),
        ("mlp", {"hidden": 256}, "hidden: expected a list of widths, came 256"),
        ("mlp", {"hidden": (16, 0)}, "hidden: expected a whole number >= 1, came 0"),
    ],
)
def test_a_bad_setting_says_what_was_expected(name: str, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmovedError) as error:
        getattr(models, name)((3, 8, 8), 5, **chosen)
    assert message in str(error.value)


def test_small_cnn_advises_another_model_where_no_padding_helps() -> None:
    with pytest.raises(UnmovedError, match=r"at least 4x4 with padding=1, came 3x9; use mlp"):
        models.small_cnn((1, 3, 9), 5, padding=1)
