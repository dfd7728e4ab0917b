"""Take an image classifier of Hugging Face's transformers as a plain module from [0, 1] images to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from unmoved.core.batch import Image, Logits
from unmoved.core.errors import UnmovedError
from unmoved.models import Normalize

_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_RESCALED = 1 / 255


class HuggingFaceLogits(nn.Module):
    """``model(x).logits`` of images in [0, 1], which are resized, cropped and normalised as a processor says.

    The steps are differentiable, so that an attack moves pixels of the images as they come, and eps is in their units.
    Where the processor rounds the resized image to bytes, this module does not.

    Args:
        model: called with ``pixel_values`` (B, C, H, W); returns an object with ``.logits``, or the logits.
        processor: the model's image processor, or its settings; None where images need neither.

    Raises:
        UnmovedError: a setting of the processor that is not known here.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__()
        settings = _settings(processor)
        self.size = _size(settings) if settings.get("do_resize") else None
        self.mode = _mode(settings) if settings.get("do_resize") else "bilinear"
        self.crop = _sides(settings["crop_size"]) if settings.get("do_center_crop") else None
        self.normalize = (
            Normalize(list(settings["image_mean"]), list(settings["image_std"]))
            if settings.get("do_normalize")
            else nn.Identity()
        )
        self.model = model

    def forward(self, x: Image) -> Logits:
        out = self.model(self.normalize(self._cropped(self._resized(x))))
        logits: Tensor = getattr(out, "logits", out)
        return logits

    def _resized(self, x: Image) -> Image:
        if self.size is None:
            return x
        height, width = x.shape[-2:]
        if isinstance(self.size, int):  # of the shorter side
            short = min(height, width)
            size = (self.size * height // short, self.size * width // short)
        else:
            size = self.size
        if size == (height, width):
            return x
        if self.mode == "nearest":
            return F.interpolate(x, size, mode="nearest")
        # The cubic overshoots: the processor's bytes do not.
        return F.interpolate(x, size, mode=self.mode, antialias=True).clamp(0, 1)

    def _cropped(self, x: Image) -> Image:
        if self.crop is None:
            return x
        (height, width), (high, wide) = x.shape[-2:], self.crop
        if high > height or wide > width:
            raise UnmovedError(
                f"hugging_face: expected images of at least {high}x{wide} to crop, came {height}x{width}"
            )
        top, left = (height - high) // 2, (width - wide) // 2
        return x[..., top : top + high, left : left + wide]


def hugging_face(model: nn.Module, processor: Any = None) -> HuggingFaceLogits:
    """Return an image classifier of transformers as a module from images in [0, 1] to logits.

    ``hugging_face(AutoModelForImageClassification.from_pretrained(name), AutoImageProcessor.from_pretrained(name))``

    Raises:
        UnmovedError: as `HuggingFaceLogits`.
    """
    return HuggingFaceLogits(model, processor)


def _settings(processor: Any) -> dict[str, Any]:
    """Return the settings of an image processor.

    Raises:
        UnmovedError: one that changes images in a way that is not known here.
    """
    settings = {} if processor is None else dict(processor if isinstance(processor, Mapping) else processor.to_dict())
    factor = settings.get("rescale_factor") or _RESCALED
    if settings.get("do_rescale", True) and abs(factor - _RESCALED) > 1e-6:
        raise UnmovedError(f"hugging_face: expected a processor that divides by 255, came rescale_factor={factor:g}")
    for name in ("rescale_offset", "do_pad", "crop_pct"):
        if settings.get(name):
            raise UnmovedError(
                f"hugging_face: the processor's {name}={settings[name]} is not known here; write a module whose "
                "forward prepares the images and returns model(images).logits"
            )
    return settings


def _mode(settings: Mapping[str, Any]) -> str:
    resample = int(settings.get("resample") or 0)
    if resample not in _RESAMPLING:
        raise UnmovedError(f"hugging_face: expected nearest, bilinear or bicubic resizing, came resample={resample}")
    return _RESAMPLING[resample]


def _size(settings: Mapping[str, Any]) -> int | tuple[int, int]:
    """Return the shorter side, or (height, width)."""
    size = settings["size"]
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _sides(size)


def _sides(size: Any) -> tuple[int, int]:
    """Return (height, width) of a number or a table."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise UnmovedError(f"hugging_face: expected a size with height and width, came {size!r:.80}")
