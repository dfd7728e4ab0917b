"""T17: normalisation lives in the model, so eps is in pixels; and wrong input is refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unmoved import models
from unmoved.core.errors import UnmovedError

SHAPE = (3, 16, 16)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
FACTORIES: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"hidden": (8,)},
    "small_cnn": {"width": 4},
    "preact_resnet18": {"width": 4},
    "wide_resnet": {"depth": 10, "width": 1},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same weights with and without normalisation inside."""
    factory = getattr(models, name)
    plain = factory(SHAPE, 5, **FACTORIES[name]).eval()
    inside = factory(SHAPE, 5, **FACTORIES[name], mean=MEAN, std=STD).eval()
    for parameter in plain.parameters():  # among others the zero last layer of small_cnn
        nn.init.normal_(parameter, 0, 0.2)
    inside.load_state_dict(plain.state_dict(), strict=False)
    return plain, inside


def outside(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_normalisation_inside_is_normalisation_outside(name: str) -> None:
    plain, inside = pair(name)
    x = torch.rand(4, *SHAPE)
    expected = plain(outside(x))
    assert torch.equal(inside(x), expected)
    assert torch.equal(models.normalized(plain, MEAN, STD)(x), expected)
    assert not torch.allclose(plain(x), expected)


def test_the_gradient_by_the_pixels_is_divided_by_std() -> None:
    plain, inside = pair("linear")
    x = torch.rand(2, *SHAPE, requires_grad=True)
    (by_pixel,) = torch.autograd.grad(inside(x)[:, 0].sum(), x)
    weight = plain.linear.weight[0].reshape(SHAPE)
    torch.testing.assert_close(by_pixel[0], weight / torch.tensor(STD).reshape(3, 1, 1))


def test_one_number_serves_all_channels() -> None:
    x = torch.rand(2, *SHAPE)
    assert torch.equal(models.Normalize([0.5], [0.25])(x), (x - 0.5) / 0.25)


def test_normalize_follows_the_type_of_the_model_and_has_no_parameters() -> None:
    layer = models.Normalize(MEAN, STD).double()
    assert layer(torch.rand(1, *SHAPE).double()).dtype == torch.float64
    assert not list(layer.parameters())
    assert "mean=[0.49" in repr(layer)
    assert set(layer.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(4, 1, 28, 28), r"expected images \(B, 3, 16, 16\), came \(4, 1, 28, 28\)"),
        (torch.rand(3, 16, 16), r"expected images \(B, 3, 16, 16\), came \(3, 16, 16\)"),
        (torch.rand(4, 16, 16, 3), r"expected images \(B, 3, 16, 16\), came \(4, 16, 16, 3\)"),
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), r"float images in \[0, 1\], came torch.uint8; use .* / 255"),
    ],
)
@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_wrong_images_are_refused(name: str, x: torch.Tensor, message: str) -> None:
    with pytest.raises(UnmovedError, match=message):
        getattr(models, name)(SHAPE, 5, **FACTORIES[name])(x)


@pytest.mark.parametrize(
    ("shape", "classes", "statistics", "message"),
    [
        ((16, 16), 5, {}, "shape: expected (channels, height, width), each at least 1, came (16, 16)"),
        ((3, 0, 16), 5, {}, "shape: height: expected a whole number >= 1, came 0"),
        (768, 5, {}, "shape: expected (channels, height, width), each at least 1, came 768"),
        (SHAPE, 1, {}, "num_classes: expected a whole number >= 2, came 1"),
        (SHAPE, 5, {"mean": MEAN}, "std: expected a value because mean is given"),
        (SHAPE, 5, {"std": STD}, "mean: expected a value because std is given"),
        (SHAPE, 5, {"mean": MEAN, "std": (0.5,)}, "mean, std: expected as many means as stds, came 3 and 1"),
        (SHAPE, 5, {"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "mean: expected 3 numbers, one for each channel, came 2"),
        (SHAPE, 5, {"mean": MEAN, "std": (0.5, 0.0, 0.5)}, "std: expected a finite number > 0, came 0.0"),
        (SHAPE, 5, {"mean": (0.5, float("nan"), 0), "std": STD}, "mean: expected a finite number, came nan"),
        (SHAPE, 5, {"mean": 0.5, "std": 0.5}, "mean: expected a list with a number for each channel, came 0.5"),
        (SHAPE, 5, {"mean": (), "std": ()}, "mean: expected a list with a number for each channel, came ()"),
    ],
)
def test_what_cannot_be_built_says_why(shape: Any, classes: int, statistics: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmovedError) as error:
        models.linear(shape, classes, **statistics)
    assert message in str(error.value)


def test_normalized_refuses_other_channels() -> None:
    with pytest.raises(UnmovedError, match=r"Normalize: expected images \(B, 3, H, W\), came \(2, 1, 8, 8\)"):
        models.normalized(nn.Flatten(), MEAN, STD)(torch.rand(2, 1, 8, 8))
