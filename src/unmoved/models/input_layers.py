"""Check images and normalise them inside the model, so that eps stays in pixel units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from unmoved.core.batch import Image
from unmoved.core.errors import UnmovedError, require_number, require_whole


class Images(nn.Module):
    """Check the shape and type of images, and hand them on unchanged.

    Raises:
        UnmovedError: the input is not (B, *shape) of a floating type.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Image) -> Image:
        if tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(str(n) for n in self.shape)
            raise UnmovedError(
                f"model: expected images (B, {expected}), came {tuple(x.shape)}; "
                "build the model for the shape of the data"
            )
        if not x.is_floating_point():
            raise UnmovedError(f"model: expected float images in [0, 1], came {x.dtype}; use images.float() / 255")
        return x

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, as a layer: the attack moves pixels, the network sees normalised ones.

    Both are buffers, so they follow the model's device and type and are part of its weights file.

    Args:
        mean, std: one number for each channel, or a single one for all of them, in units of [0, 1] images.

    Raises:
        UnmovedError: different lengths, a std that is not positive; at call, another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, Sequence) or not len(values):
                raise UnmovedError(f"{name}: expected a list with a number for each channel, came {values!r}")
        means, stds = list(mean), list(std)
        if len(means) != len(stds):
            raise UnmovedError(f"mean, std: expected as many means as stds, came {len(means)} and {len(stds)}")
        for name, value in [("mean", value) for value in means] + [("std", value) for value in stds]:
            require_number(name, value, above=0 if name == "std" else float("-inf"))
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, x: Image) -> Image:
        if x.ndim != 4 or len(self.mean) not in (1, x.shape[1]):
            raise UnmovedError(f"Normalize: expected images (B, {len(self.mean)}, H, W), came {tuple(x.shape)}")
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalized(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """Make a model take images in [0, 1]: `Normalize`, then ``model``; raise as `Normalize`."""
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


def require_unit_mean(mean: Iterable[float], where: str = "mean") -> None:
    """Raise `UnmovedError` where the mean is none of images in [0, 1], but of 0..255: every image would look black."""
    if (largest := max(mean)) > 1:
        raise UnmovedError(
            f"{where}: expected the mean of images in [0, 1], came {largest:g}; if mean and std are of images in "
            "0..255, divide both by 255"
        )


def require_sizes(shape: Sequence[int], num_classes: int) -> tuple[tuple[int, int, int], int]:
    """Return (channels, height, width) and the number of classes as plain ints.

    Raises:
        UnmovedError: a shape that is not (C, H, W), or fewer than two classes.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 3:
        raise UnmovedError(f"shape: expected (channels, height, width), each at least 1, came {shape!r}")
    names = ("channels", "height", "width")
    channels, height, width = (
        require_whole(f"shape: {name}", n, at_least=1) for name, n in zip(names, shape, strict=True)
    )
    return (channels, height, width), require_whole("num_classes", num_classes, at_least=2)


def entrance(
    shape: Sequence[int], num_classes: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, nn.Module]:
    """Make the first layers of a model: the check of its input and, where mean and std are given, `Normalize`.

    Raises:
        UnmovedError: a shape that is not (C, H, W), fewer than two classes, or mean and std that do not fit.
    """
    sizes, _ = require_sizes(shape, num_classes)
    layers: dict[str, nn.Module] = {"images": Images(sizes)}
    if mean is None and std is None:
        return layers
    if mean is None or std is None:
        given, absent = ("mean", "std") if std is None else ("std", "mean")
        raise UnmovedError(f"{absent}: expected a value because {given} is given; set both or neither")
    normalize = Normalize(mean, std)
    require_unit_mean(mean)
    if len(mean) not in (1, sizes[0]):
        raise UnmovedError(f"mean: expected {sizes[0]} numbers, one for each channel, came {len(mean)}")
    return layers | {"normalize": normalize}
