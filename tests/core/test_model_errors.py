"""A model that does not go with the images or with gradients: one sentence with cause and mend, wherever it is met."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from unmoved import Batch, Method, ThreatModel, UnmovedError, attacks, data, evaluate, terms, train, train_step
from unmoved.evaluation.doctor import examine

THREAT = ThreatModel("linf", 0.1)
X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
SPLIT = data.ArraySplit.of(X, torch.arange(8) % 3, layout="NCHW")
PGD = attacks.PGD(THREAT, steps=1)
METHOD = Method(PGD, terms.CE())


def stepped(model: nn.Module, batch: Batch) -> None:
    train_step(model, METHOD, torch.optim.SGD(model.parameters(), lr=0.1), batch, "float32")


# How a model is used: (model, batch). A test of a model is one of every way.
USES: dict[str, Callable[[nn.Module, Batch], Any]] = {
    "train": lambda model, batch: train(model, METHOD, SPLIT, epochs=1, precision="float32"),
    "train_step": stepped,
    "evaluate": lambda model, batch: evaluate(model, SPLIT, {"pgd": PGD}, THREAT),
    "doctor": lambda model, batch: examine.examine(model, SPLIT, THREAT),
    "pgd": PGD,
    "apgd": attacks.APGD(THREAT, steps=2),
    "deepfool": attacks.DeepFool(THREAT, steps=1),
    "fab": attacks.FAB(THREAT, steps=1),
    "cw": attacks.CW(ThreatModel("l2", 0.1), steps=1, search_steps=1),
    "fmn": attacks.FMN(THREAT, steps=1),
    "spsa": attacks.SPSA(THREAT, steps=1, samples=2),
    "square": attacks.Square(THREAT, queries=2),
}
GRADIENT = ("train", "train_step", "evaluate", "pgd", "apgd", "deepfool", "fab", "cw", "fmn")


def plain(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear((x * mask).flatten(1))


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(36, 3), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x.flatten(1)))


def inferred() -> nn.Module:
    with torch.inference_mode():
        return plain()


TYPE = "expected weights and images of one type, came weights of {} and images of float32; use model.float"
CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{
        f"{model.__name__} of {name}": (
            lambda model=model, name=name: model().to(getattr(torch, name)),
            TYPE.format(name),
        )
        for model in (plain, convolution)
        for name in ("float16", "bfloat16", "float64")
    },
    "two inputs": (Two, "expected a forward that takes the images alone.*mask.*wrap the model"),
    "tuple": (lambda: Returns(lambda z: (z, z)), "came a tuple; wrap the model"),
    "dict": (lambda: Returns(lambda z: {"logits": z}), "came a dict; wrap the model"),
    "no forward": (lambda: nn.ModuleList([plain()]), "it has no forward; hand over the module"),
    "one type in two": (lambda: nn.Sequential(plain(), nn.Linear(3, 3).double()), TYPE.format("float64")),
    "takes integers": (lambda: nn.Sequential(nn.Flatten(), nn.Embedding(5, 3)), "does not take images, .*float32"),
    "one pixel": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 6), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(4, 3)),
        "more than 1 spatial element",
    ),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten()), "it cannot take images"),
    "other images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        r"it cannot take images of shape \(1, 6, 6\).*make it for them",
    ),
    "other channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3)),
        r"it cannot take images of shape \(1, 6, 6\).*convert them in a module around it: x\.expand\(-1, 3, -1, -1\)",
    ),
    "larger images": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 9), nn.Flatten(), nn.Linear(2, 3)),
        r"it cannot take images of shape \(1, 6, 6\)",
    ),
}


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_that_does_not_go_with_the_images(case: str, use: str) -> None:
    make, words = CASES[case]
    with pytest.raises(UnmovedError, match=words) as caught:
        USES[use](make(), next(SPLIT.batches(8)))
    assert "epoch" not in str(caught.value)  # before training, and said once
    assert str(caught.value).startswith("model ")


class Numpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.from_numpy(x.numpy()).flatten(1))


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hidden = checkpoint(lambda z: torch.tanh(self.first(z)), x.flatten(1), use_reentrant=True)
        return self.last(hidden)


@pytest.mark.parametrize("use", GRADIENT)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Numpy, r"leaves the autograd graph by .numpy\(\).*compute with torch alone"),
        (inferred, "made in torch.inference_mode, its weights .* have no gradient"),
        (Reentrant, "of the reentrant kind.*use_reentrant=False"),
    ],
)
def test_a_model_whose_gradient_over_the_images_torch_refuses(
    model: Callable[[], nn.Module], words: str, use: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnmovedError, match=words) as caught:
        USES[use](model(), next(SPLIT.batches(8)))
    assert str(caught.value).startswith("model")
    assert "epoch" not in str(caught.value)


def test_attacks_without_gradients_and_trainings_without_attack_need_none() -> None:
    batch = next(SPLIT.batches(8))
    for model in (Numpy(), Reentrant()):
        for attack in (attacks.SPSA(THREAT, steps=1, samples=2), attacks.Square(THREAT, queries=2)):
            attack(model, batch)
        train(model, Method(None, terms.CE("clean")), SPLIT, epochs=1)


def test_a_mistake_within_a_model_is_shown_as_it_is() -> None:
    def broken(z: Tensor) -> Tensor:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        evaluate(Returns(broken), SPLIT, {"pgd": PGD}, THREAT)
    with pytest.raises(RuntimeError, match="view size"):
        evaluate(Returns(lambda z: z.t().view(-1)), SPLIT, {"pgd": PGD}, THREAT)


def test_images_of_another_type_than_the_weights() -> None:
    x, y = X.double(), torch.arange(8) % 3
    with pytest.raises(UnmovedError, match=r"weights of float32 and images of float64; use .*images.float\(\)"):
        PGD(plain(), Batch(x, y))
    assert PGD(plain().double(), Batch(x, y)).dtype == torch.float64


def trained(model: nn.Module) -> nn.Module:
    train(model, METHOD, SPLIT, epochs=1)
    return model


def test_models_of_every_make_are_taken() -> None:
    x = torch.rand(8, 1, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {
            "traced": torch.jit.trace(plain(), x),
            "scripted": torch.jit.script(plain()),
            "fx": torch.fx.symbolic_trace(plain()),
            "compiled": torch.compile(plain(), backend="eager"),
            "parallel": nn.DataParallel(plain()),
            "volumes": nn.Sequential(
                nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 3, 3)), nn.Flatten(), nn.Linear(32, 3)
            ),
            "half within": HalfWithin(),
        }
        judged = made | {
            "frozen": plain().requires_grad_(False),
            "without weights": nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(3)),
            "frozen script": torch.jit.freeze(torch.jit.script(plain().eval())),
        }
        for model in judged.values():
            assert len(evaluate(model, SPLIT, {"pgd": PGD}, THREAT, workers=2)) == 8
            examine.examine(model, SPLIT, THREAT)
        for model in made.values():
            before = [p.detach().clone() for p in model.parameters()]
            assert any(not torch.equal(*pair) for pair in zip(before, trained(model).parameters(), strict=True))


class HalfWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1).half())


def test_an_exported_program_says_what_it_was_exported_for() -> None:
    fixed = torch.export.export(plain(), (torch.rand(3, 1, 6, 6),))
    with pytest.raises(UnmovedError, match=r"hand over program.module\(\)"):
        evaluate(fixed, SPLIT, {"pgd": PGD}, THREAT)  # type: ignore[arg-type]
    with pytest.raises(UnmovedError, match=r"exported for batches of another size .*dynamic batch dimension"):
        evaluate(fixed.module(), SPLIT, {"pgd": PGD}, THREAT)
    with pytest.raises(UnmovedError, match=r"training mode.*train the module that it was exported from"):
        train(torch.export.export(plain(), (X,)).module(), METHOD, SPLIT, epochs=1)


@pytest.mark.parametrize("given", [lambda x: x, SPLIT, None, METHOD], ids=["function", "split", "none", "method"])
def test_a_step_of_what_is_no_model(given: Any) -> None:
    optimizer = torch.optim.SGD(plain().parameters(), lr=0.1)
    with pytest.raises(UnmovedError, match=r"the order is train_step\(model, Method"):
        train_step(given, METHOD, optimizer, next(SPLIT.batches(8)))


LOADER = DataLoader(TensorDataset(X, torch.arange(8) % 3), batch_size=4)


@pytest.mark.parametrize("use", ["train", "evaluate", "doctor", "validation"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (LOADER, r"came DataLoader; make one of images in \[0, 1\].*zip\(\*loader.dataset\)"),
        (LOADER.dataset, r"came TensorDataset; make .*zip\(\*dataset\)"),
        ((X, torch.arange(8) % 3), r"came tuple; make one of images and labels: data.ArraySplit.of"),
        (X.numpy(), "came ndarray; make one of images and labels"),
        ([1, 2], "came list; make one of images and labels"),
        (None, "came None; the order is"),
        (THREAT, "came ThreatModel; the order is"),
        (data.ArraySplit, "came ArraySplit; the order is"),
        (SPLIT.select(torch.zeros(0, dtype=torch.int64)), "at least one sample, came none"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_split(given: Any, words: str, use: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "train": lambda: train(plain(), METHOD, given, epochs=1),
        "validation": lambda: train(plain(), METHOD, SPLIT, validation=given, threat=THREAT, epochs=1),
        "evaluate": lambda: evaluate(plain(), given, {"pgd": PGD}, THREAT),
        "doctor": lambda: examine.examine(plain(), given, THREAT),
    }
    if given is None and use == "validation":
        pytest.skip("means that there is none")
    with pytest.raises(UnmovedError, match=words):
        calls[use]()


def test_the_advice_for_a_loader_works() -> None:
    x, y = zip(*LOADER.dataset, strict=True)
    made = data.ArraySplit.of(torch.stack(x), torch.tensor(y), layout="NCHW")
    assert len(evaluate(plain(), made, {"pgd": PGD}, THREAT)) == 8


@pytest.mark.parametrize("use", ["evaluate", "doctor"])
def test_what_is_no_model(use: str) -> None:
    for given, words in (
        (lambda x: x.flatten(1)[:, :3], "call the function in the forward of an nn.Module"),
        (nn.Linear, r"came the class Linear; use Linear\(...\)"),
        (SPLIT, "came ArraySplit; the order is "),
        (None, "came None; the order is "),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "is lazy"),
    ):
        with pytest.raises(UnmovedError, match=words):
            USES[use](given, next(SPLIT.batches(8)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "at least one attack by its name.*came none"),
        ([PGD], "at least one attack by its name.*came list"),
        (PGD, "came PGD"),
        ({"pgd": attacks.PGD}, r"attack 'pgd': .*the class PGD; use PGD\(...\)"),
        ({"pgd": THREAT}, "attack 'pgd': expected something that is called"),
    ],
    ids=str,
)
def test_what_are_no_attacks_by_name(given: Any, words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        evaluate(plain(), SPLIT, given, THREAT)
    with pytest.raises(UnmovedError, match="threat: expected a ThreatModel"):
        evaluate(plain(), SPLIT, {"pgd": PGD}, 0.1)  # type: ignore[arg-type]
