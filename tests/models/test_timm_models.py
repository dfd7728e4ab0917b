"""The timm extra: the real library where it is installed, a stand-in for the wiring where it is not."""

from __future__ import annotations

import builtins
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from unmoved import models
from unmoved.core.errors import UnmovedError

SHAPE = (3, 8, 8)


class Stub(nn.Module):
    """What timm returns: a network that insists on its own image size and carries the record of its weights."""

    pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    def __init__(self, num_classes: int, in_chans: int, img_size: int = 8) -> None:
        super().__init__()
        self.img_size = img_size
        self.bn = nn.BatchNorm2d(in_chans)
        self.fc = nn.Linear(in_chans * img_size**2, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.img_size:
            raise AssertionError(f"Input size ({x.shape[-1]}) does not match model ({self.img_size})")
        return self.fc(self.bn(x).flatten(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Puts a stand-in for the library in place; what it was asked for."""
    seen: list[tuple[str, bool]] = []

    def create_model(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        seen.append((name, pretrained))
        if name.startswith("hf-hub:") and pretrained:
            raise OSError("no network")
        return Stub(**settings)

    known = ["resnet18", "resnet50"]
    library = SimpleNamespace(create_model=create_model, is_model=known.__contains__, list_models=lambda: known)
    monkeypatch.setitem(sys.modules, "timm", library)
    return seen


def test_the_model_gets_channels_and_classes_and_trains(calls: list[tuple[str, bool]]) -> None:
    net = models.timm((1, 8, 8), 4, model="resnet18")
    assert calls == [("resnet18", False)]
    assert all(module.training for module in net.modules())
    assert net.model.bn.num_batches_tracked == 0  # the try-out left nothing behind (T1)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert not any("normalize" in key for key in net.state_dict())


@pytest.mark.usefixtures("calls")
def test_pretrained_weights_bring_their_normalisation_unless_told_otherwise() -> None:  # T17
    net = models.timm(SHAPE, 4, model="resnet18", pretrained=True).eval()
    x = torch.rand(2, *SHAPE)
    assert torch.equal(net(x), net.model(models.Normalize(**Stub.pretrained_cfg)(x)))
    own = models.timm(SHAPE, 4, model="resnet18", pretrained=True, mean=[0.5], std=[0.5]).eval()
    assert torch.equal(own(x), own.model((x - 0.5) / 0.5))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    ("shape", "chosen", "message"),
    [
        (SHAPE, {"model": "resnet81"}, "unknown name 'resnet81'; did you mean 'resnet18'?"),
        (
            (3, 9, 9),
            {"model": "resnet18"},
            "cannot take images (3, 9, 9): Input size (9) does not match model (8); try",
        ),
        (
            SHAPE,
            {"model": "resnet18", "options": {"nonsense": 1}},
            "'resnet18' cannot be made with {'pretrained': False",
        ),
        (SHAPE, {"model": "hf-hub:a/b", "pretrained": True}, "cannot be made with {'pretrained': True"),
        (
            (1, 8, 8),
            {"model": "resnet18", "pretrained": True},
            "mean: expected 1 numbers, one for each channel, came 3",
        ),
        (SHAPE, {"model": "resnet18", "mean": [0.5]}, "std: expected a value because mean is given"),
    ],
)
def test_what_cannot_be_made_says_why(shape: tuple[int, int, int], chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(UnmovedError) as error:
        models.timm(shape, 4, **chosen)
    assert message in str(error.value)


@pytest.mark.usefixtures("calls")
def test_options_reach_the_library() -> None:
    assert models.timm((3, 9, 9), 4, model="resnet18", options={"img_size": 9})(torch.rand(2, 3, 9, 9)).shape == (2, 4)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            r"timm to be installed; pip install 'unmoved\[timm\]'",
        ),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            r"nms does not exist\); \w*.*install torchvision 0\.\d+",
        ),
    ],
)
def test_a_missing_or_broken_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    real = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise failure
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UnmovedError, match=message):
        models.timm(SHAPE, 4, model="resnet18")


def test_the_real_library() -> None:
    try:
        import timm  # noqa: F401
    except Exception as error:  # absent, or its torchvision is of another torch
        pytest.skip(f"timm does not import: {error}")
    net = models.timm((1, 28, 28), 4, model="resnet10t", mean=[0.13], std=[0.31])
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 4)
    with pytest.raises(UnmovedError, match="did you mean 'resnet18'"):
        models.timm((3, 32, 32), 4, model="resnet81")
    with pytest.raises(UnmovedError, match="cannot take images"):
        models.timm((3, 32, 32), 4, model="vit_tiny_patch16_224")
