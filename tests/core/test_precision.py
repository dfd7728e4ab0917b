"""bf16, channels_last and torch.compile against float32, contiguous and eager: what each may change, and how much."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning_fabric  # it puts its own function around torch.compile
import pytest
import torch
from torch import Tensor, nn

from unmoved import Batch, Method, ThreatModel, attacks, defenses, models, terms, train
from unmoved.attacks import gradients
from unmoved.attacks.gradients import attacking, gradient_at
from unmoved.core import precision
from unmoved.core.errors import UnmovedError
from unmoved.data import digits
from unmoved.evaluation import judge, outcomes
from unmoved.training.averaging import EMA
from unmoved.training.optim import Adam, OneCycle
from unmoved.training.step import train_step

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 1.0)
AT = Method(attacks.PGD(LINF, steps=2), terms.CE())
DATA = digits(test=797)
COMPILE = torch.compile
assert lightning_fabric


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    if name == "small_cnn":
        return models.small_cnn((1, 8, 8), 10, padding=1, width=8, dropout=0.0)
    return models.preact_resnet18((1, 8, 8), 10, width=8)


def fit(model: nn.Module, part: Any, epochs: int, form: str = "float32") -> nn.Module:
    how: dict[str, Any] = {"optimizer": Adam(lr=5e-3), "schedule": OneCycle(), "batch_size": 64, "device": "cpu"}
    train(model, AT, part, epochs=epochs, precision=form, **how)
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> dict[str, nn.Module]:
    """Networks that real digits taught, one of them with BatchNorm."""
    part = DATA.train.take(500, seed=0)
    return {name: fit(network(name), part, epochs) for name, epochs in (("small_cnn", 4), ("preact_resnet18", 2))}


def first_gradient(model: nn.Module, batch: Batch, form: str = "float32") -> tuple[Tensor, Tensor]:
    """The gradient that an attack's first step goes by, and the logits."""
    with precision.autocast(form, "cpu"), attacking(model, batch, LINF) as views:
        _, gradient, logits = gradient_at(views, batch.x, terms.CE())
    return gradient, logits


def agreement(exact: Tensor, other: Tensor) -> float:
    """The share of pixels whose signs agree, of those whose exact gradient is above 1e-3 of the sample's largest."""
    counted = exact.abs() > 1e-3 * exact.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert counted.float().mean() > 0.9, "nearly every pixel is judged"
    return float((exact.sign() == other.sign())[counted].float().mean())


# --- bf16


@pytest.mark.parametrize(("name", "bound"), [("small_cnn", 0.97), ("preact_resnet18", 0.95)])
def test_the_first_attack_gradient_in_bf16_has_the_signs_of_float32(
    trained: dict[str, nn.Module], name: str, bound: float
) -> None:
    """At least 97 % of the signs agree in a small network, 95 % through 18 layers with BatchNorm.

    Measured over seeds: 0.982 to 0.990, and 0.973 to 0.976. The pixels that differ weigh little: what they hold of the
    gradient's l1 norm, by which a signed step raises the loss, is below 2 %.
    """
    batch = next(DATA.test.batches(128))
    exact, _ = first_gradient(trained[name], batch)
    rough, _ = first_gradient(trained[name], batch, "bf16")
    assert not torch.equal(exact, rough)
    assert agreement(exact, rough) >= bound
    assert (exact * rough.sign()).sum() >= 0.98 * exact.abs().sum()


def test_training_in_bf16_ends_with_the_robustness_of_float32() -> None:
    """Robust accuracies differ by at most 3 points of 100 (over 5 seeds: 0.2 to 1.5), judged by one APGD."""
    robust = {}
    for form in ("float32", "bf16"):
        model = fit(network("small_cnn"), DATA.train.take(600, seed=0), 8, form)
        table = judge.evaluate(model, DATA.test, {"apgd": attacks.APGD(LINF, steps=10)}, LINF, batch_size=400)
        robust[form] = float(outcomes.summary(table).set_index("measure")["accuracy"]["apgd"])
    assert min(robust.values()) > 0.4, "both have learned to resist"
    assert abs(robust["bf16"] - robust["float32"]) <= 0.03


# --- float32 on a GPU: torch's convolutions take TF32 there unless told not to


CUDNN: Any = torch.backends.cudnn
SWITCHES: tuple[Any, ...] = (CUDNN.conv, CUDNN.rnn, torch.backends.cuda.matmul)


def kinds() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


def test_float32_on_a_gpu_is_not_tf32() -> None:
    """The switches need no GPU; whatever they were comes back, after an exception too."""
    before = kinds()
    assert before[0] == "tf32", "torch's default, which this is about"
    for context in (precision.autocast("float32", "cuda"), precision.no_tf32("float32", "cuda"), precision._ieee()):
        with context:
            assert kinds() == ["ieee"] * 3
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert kinds() == before
    with pytest.raises(KeyError), precision.no_tf32("float32", "cuda"):
        raise KeyError
    assert kinds() == before
    assert torch.backends.cudnn.allow_tf32
    for context in (precision.no_tf32("bf16", "cuda"), precision.no_tf32("float32", "cpu")):
        with context:
            assert kinds() == before


class Asked(nn.Sequential):
    """Notes for each pass whether float32 was asked for, going in and coming back."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.exact, self.passes = False, list[bool]()
        self[1].weight.register_hook(lambda _: self.passes.append(self.exact))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(self.exact)
        return super().forward(x)


def test_float32_is_asked_for_in_every_pass_of_a_step_and_of_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Asked(), next(DATA.test.batches(8))

    @contextmanager
    def no_tf32(form: str, device: Any) -> Iterator[None]:
        before, model.exact = model.exact, model.exact or form == "float32"
        yield
        model.exact = before

    monkeypatch.setattr(precision, "no_tf32", no_tf32)
    method = Method(attacks.PGD(LINF, steps=2), terms.TRADES(), defenses.AWP(gamma=0.01))
    for form, asked in (("float32", True), ("bf16", False)):
        model.passes.clear()
        train_step(model, method, torch.optim.SGD(model.parameters(), lr=0.0), batch, form)
        assert len(model.passes) >= 8  # of the attack, of two closures, and back
        assert set(model.passes) == {asked}
    with precision.autocast("bf16", "cpu"):  # whatever a caller is in
        model.passes.clear()
        judge.predict(model, batch.x, batch.y)
        attacks.FAB(LINF, steps=2)(model, batch)
        attacks.Square(LINF, queries=3)(model, batch)
        assert set(model.passes) == {True}
        logits = model(batch.x)
        model.passes.clear()
        gradients.broken(model, batch.x, -logits, batch.y)
        assert model.passes == [True]


# --- channels_last


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18"])
def test_channels_last_changes_rounding_alone(trained: dict[str, nn.Module], name: str) -> None:
    """Logits within 1e-5 of the largest, 99.9 % of the gradient's signs (measured: all of them)."""
    batch = next(DATA.test.batches(128))
    plain, last = (
        first_gradient(copy.deepcopy(trained[name]).to(memory_format=form), batch)  # type: ignore[call-overload]
        for form in (torch.contiguous_format, torch.channels_last)
    )
    assert torch.allclose(plain[1], last[1], rtol=0, atol=1e-5 * float(plain[1].abs().max()))
    assert agreement(plain[0], last[0]) >= 0.999


@pytest.mark.parametrize(
    ("build", "is_last"),
    [
        (lambda: models.small_cnn((1, 8, 8), 10, padding=1, width=4), True),
        (lambda: models.preact_resnet18((1, 8, 8), 10, width=16), True),
        (lambda: models.preact_resnet18((1, 8, 8), 10, width=4), False),
        (lambda: nn.Conv2d(3, 8, 1), True),
        (lambda: nn.Conv2d(3, 8, 3, stride=2), True),
        (lambda: nn.Conv2d(3, 8, 1, stride=2, padding="valid"), False),
        (lambda: nn.Conv2d(16, 8, 1, stride=(1, 2)), True),
        (lambda: nn.Conv2d(16, 8, 1, stride=(1, 2), groups=2), False),
        (lambda: models.linear((1, 8, 8), 10), True),
    ],
)
def test_layout_is_channels_last_but_where_its_gradients_are_wrong(build: Any, is_last: bool) -> None:
    model = build()
    assert precision.memory_format_for(model, "cpu") == (torch.channels_last if is_last else torch.contiguous_format)
    assert precision.memory_format_for(model, "cuda") == torch.channels_last


class Point(nn.Module):
    """A 1x1 convolution with a stride that is a call, no module: of its parameter, of other weights, or not yet."""

    def __init__(self, kind: str, stride: int = 2, width: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.first, self.kind, self.stride = nn.Conv2d(1, width, 3), kind, stride
        self.kernel = nn.Parameter(torch.zeros(3, width, 1, 1)) if kind in ("parameter", "later") else None
        self.matrix = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.first(x)
        if self.kind == "refuses":
            raise ValueError(self.kind)
        if self.kind == {True: "evaluation", False: "training"}[self.training] or self.kind == "later":
            return features.mean((2, 3)) @ self.matrix.weight.T
        weight = self.matrix.weight[:, :, None, None] if self.kernel is None else self.kernel
        return nn.functional.conv2d(features, weight, stride=self.stride).mean((2, 3))


@pytest.mark.parametrize(
    ("build", "is_last"),
    [
        (lambda: Point("parameter"), False),
        (lambda: Point("matrix"), False),
        (lambda: nn.Sequential(nn.Identity(), Point("training")), False),
        (lambda: Point("evaluation"), False),
        (lambda: Point("later"), False),
        (lambda: Point("refuses"), False),
        (lambda: Point("matrix", stride=1), True),
        (lambda: Point("matrix", width=16), True),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 1, stride=2)), False),
        (lambda: nn.ConvTranspose2d(1, 2, 1, stride=2), False),
    ],
)
def test_layout_sees_the_convolutions_that_are_calls(build: Any, is_last: bool) -> None:
    model, x = build(), torch.rand(2, 1, 6, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    form = precision.memory_format_for(model, "cpu", x)
    assert form == (torch.channels_last if is_last else torch.contiguous_format)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_looked_at_stays_contiguous() -> None:
    assert precision.memory_format_for(Point("matrix", stride=1), "cpu") == torch.contiguous_format


def test_a_training_asks_for_the_layout_with_images_of_its_own() -> None:
    """One step of a model whose convolution is a call is that of float64."""
    torch.manual_seed(0)
    model = Point("matrix", classes=10)
    exact, part = copy.deepcopy(model).double(), DATA.train.take(32, seed=0)
    batch = next(iter(part.batches(32)))
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 32, "precision": "float32", "device": "cpu"}
    train(model, Method(None, terms.CE("clean")), part, optimizer=lambda g: torch.optim.SGD(g, lr=0.1), **settings)
    assert model.first.weight.is_contiguous()
    nn.functional.cross_entropy(exact(batch.x.double()), batch.y).backward()
    for p, q in ((exact.first.weight, model.first.weight), (exact.matrix.weight, model.matrix.weight)):
        assert torch.allclose(p - 0.1 * p.grad, q.double(), rtol=0, atol=1e-6)


def test_in_its_layout_a_narrow_network_has_the_gradients_of_float64() -> None:
    """In channels_last, oneDNN writes past its memory here: wrong gradients, a crash or no end."""
    torch.manual_seed(0)
    exact = models.preact_resnet18((1, 8, 8), 10, width=4).double()
    narrow = copy.deepcopy(exact).float()
    form = precision.memory_format_for(narrow, "cpu")
    assert form == torch.contiguous_format  # before anything is computed
    narrow.to(memory_format=form)
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    for model in (exact, narrow):
        nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()
    for p, q in zip(exact.parameters(), narrow.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-7


# --- torch.compile


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(144, 10))


def compiled(model: nn.Module, graphs: list[Any]) -> Any:
    """The model through torch.compile's tracing and guards, run by torch's own kernels; keeps the graphs it made."""
    from torch._dynamo.backends.debugging import aot_eager

    def keep(graph: Any, inputs: Any, **settings: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs, **settings)

    torch.compiler.reset()
    return COMPILE(model, backend=keep)


@pytest.mark.parametrize(
    "defense",
    [
        defenses.Plain(),
        defenses.SAM(0.1),
        defenses.AWP(0.05),
        defenses.APD(0.05, steps=2, relative=True),
    ],
    ids=lambda defense: type(defense).__name__,
)
def test_a_compiled_model_trains_as_the_eager_one(defense: Any) -> None:
    """Evaluation in the attack, training after it, weights moved in place, statistics frozen: the graphs follow."""
    method = Method(attacks.PGD(L2, loss=terms.KL(), start="gaussian", steps=3), terms.TRADES(6.0), defense)
    batch = Batch(*(part[:32] for part in (DATA.train.images / 1.0, DATA.train.labels)))
    eager, inner, graphs = tiny(), tiny(), list[Any]()
    fast = compiled(inner, graphs)
    losses = []
    for bare, model in ((eager, eager), (inner, fast)):
        optimizer = torch.optim.SGD(bare.parameters(), lr=0.05, momentum=0.9)
        model.train()
        steps = [Batch(batch.x, batch.y, step=k) for k in range(3)]
        losses.append([float(train_step(model, method, optimizer, each, "float32").loss) for each in steps])
    assert graphs, "something was compiled"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(p.requires_grad for p in inner.parameters())
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, inner.state_dict()[name], rtol=1e-4, atol=1e-6), name


def test_a_compiled_model_is_attacked_without_gradients_of_its_weights() -> None:
    """A compiled graph computes every gradient that may be asked for; an eager pass only those that are."""
    model, graphs = tiny(), list[Any]()
    fast = compiled(model, graphs)
    with precision.constant_weights(fast):
        assert not any(p.requires_grad for p in model.parameters())
    with precision.constant_weights(model):
        assert all(p.requires_grad for p in model.parameters()), "eager models stay as they are"
    model[0].weight.requires_grad_(False)
    with pytest.raises(KeyError), precision.constant_weights(fast):
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == [False] + 5 * [True]
    batch = next(DATA.test.batches(16))
    exact, _ = first_gradient(model, batch)
    with precision.constant_weights(fast):
        same, _ = first_gradient(fast, batch)
    assert graphs
    assert torch.allclose(exact, same, rtol=1e-4, atol=1e-7)


def test_a_recipe_may_ask_for_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's `compiled`: the eager run's weights, averaged ones included."""
    graphs = list[Any]()
    eager, fast = tiny(), tiny()
    method = Method(attacks.PGD(L2, steps=2), terms.CE(), defenses.AWP(0.05))
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 20, "average": EMA(0.5), "device": "cpu"}
    settings |= {"precision": "float32"}
    part = DATA.train.take(40, seed=0)
    logs = [train(eager, method, part, **settings)]
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled(model, graphs))
    logs.append(train(fast, method, part, compiled=True, **settings))
    assert graphs
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, fast.state_dict()[name], rtol=1e-3, atol=1e-5), name
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_what_torch_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any, **settings: Any) -> Any:
        raise OSError("no C++ compiler")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda model, **_: COMPILE(model, backend=broken))
    with pytest.raises(UnmovedError, match=r"torch.compile cannot build this model here.*leave training"):
        train(tiny(), Method(None, terms.CE("clean")), DATA.train.take(40), epochs=1, compiled=True, device="cpu")
