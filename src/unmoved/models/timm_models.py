"""Make models of the timm library, which the ``timm`` extra installs."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

import torch
from torch import nn

from unmoved.core.environment import variable
from unmoved.core.errors import UnmovedError, did_you_mean, require_flag
from unmoved.models.input_layers import entrance, require_sizes

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _library() -> ModuleType:
    try:
        import timm as module
    except ModuleNotFoundError as error:
        raise UnmovedError(f"model timm: expected {error.name} to be installed; pip install 'unmoved[timm]'") from error
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError here
        raise UnmovedError(f"model timm: the timm library does not import ({error}); {_fitting()}") from error
    library: ModuleType = module
    return library


def _fitting() -> str:
    """Say which torchvision fits the installed torch: 0.(15 + n) is made for 2.n (its README has the table)."""
    try:
        came = f"torchvision {metadata.version('torchvision')}"
    except metadata.PackageNotFoundError:
        came = "no torchvision"
    wanted = re.match(r"2\.(\d+)", torch.__version__)
    fits = f"install torchvision 0.{15 + int(wanted[1])}" if wanted else "install the torchvision that belongs to it"
    return f"{came} is installed beside torch {torch.__version__}: {fits}"


def timm(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    model: str,
    pretrained: bool = False,
    options: Mapping[str, object] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Make a model of the timm library by its name there, with our input check and normalisation before it.

    Args:
        model: timm's name, such as ``"resnet18"``, or ``"hf-hub:owner/name"``.
        pretrained: fetch timm's weights; the last layer is new if the number of classes differs.
        options: handed to ``timm.create_model``, such as ``{"img_size": 32}`` for a vision transformer.
        mean, std: by default what the pretrained weights were made with; without pretrained weights, none.

    Raises:
        UnmovedError: timm is not installed or does not import, the name is unknown, the weights cannot be fetched, or
            the model cannot take images of this shape; otherwise as `entrance`.
    """
    shape, num_classes = require_sizes(shape, num_classes)
    pretrained = require_flag("pretrained", pretrained)
    entrance(shape, num_classes, mean, std)  # mean and std are refused before the library is loaded
    library = _library()
    if ":" not in model and not library.is_model(model):
        raise UnmovedError(f"model timm: unknown name {model!r}" + did_you_mean(model, library.list_models()))
    settings = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": shape[0], **(options or {})}
    try:
        with _no_pickles():
            net = library.create_model(model, **settings)
    except Exception as error:
        raise UnmovedError(f"model timm: {model!r} cannot be made with {settings}: {error}") from error
    if pretrained and mean is None and std is None:
        mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    whole = nn.Sequential(OrderedDict(entrance(shape, num_classes, mean, std), model=net))
    _try_out(whole, shape, model)
    return whole


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Read weights as weights alone: some versions of timm unpickle files that a recipe's options name."""
    with variable(_WEIGHTS_ONLY, "1"):  # torch.load obeys it whatever its caller says
        yield


def _try_out(net: nn.Module, shape: Sequence[int], name: str) -> None:
    """Pass one image through the new model, so that a wrong image size is known now and not in the first batch."""
    net.eval()
    try:
        with torch.no_grad():
            net(next(net.parameters()).new_zeros(1, *shape))
    except UnmovedError:
        raise
    except Exception as error:
        raise UnmovedError(
            f"model timm: {name!r} cannot take images {tuple(shape)}: {error}; try options={{'img_size': {shape[1]}}}"
        ) from error
    net.train()
