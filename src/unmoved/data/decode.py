"""Decode one image with Pillow; any decoding error becomes `CorruptImage`."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unmoved.core.errors import UnmovedError, require_flag, require_whole
from unmoved.core.untrusted import brief

# EPS and WMF run other programs, the rest are stubs that only know a format's name.
REFUSED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC"})
USUAL = frozenset({"JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"})
EIGHT_BIT = frozenset({"1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"})
# Decoding takes about ten bytes a pixel: only one image of more pixels than this is decoded at a time.
MANY_PIXELS, _many = 2**24, threading.Lock()
ORIENTATION = 0x0112  # the EXIF tag of a camera held on its side


@dataclass(frozen=True)
class Pixels:
    """Say what every image is decoded to: uint8, (3, H, W) or grey (1, H, W), resized to ``size`` = (H, W) if given."""

    size: tuple[int, int] | None = None
    grey: bool = False

    @staticmethod
    def of(size: int | tuple[int, int] | None, grey: bool) -> Pixels:
        """Make it from a recipe's settings; one number means a square."""
        sides = None
        if size is not None:
            pair = size if isinstance(size, tuple | list) else (size, size)
            advice = f"expected is a side such as 32, or [height, width], came {size!r}"
            if len(pair) != 2:
                raise UnmovedError(f"size: {advice}")
            height, width = (require_whole("size", side, at_least=1, advice=advice) for side in pair)
            sides = (height, width)
        return Pixels(sides, require_flag("grey", grey))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Convert to (C, H, W) uint8: turned upright, transparency dropped, resized (bilinear, antialiased).

        Raises:
            UnmovedError: more than 8 bits per value.
        """
        if image.mode not in EIGHT_BIT:
            raise UnmovedError(f"expected 8 bits per value, came mode {image.mode}; convert it to an 8-bit image")
        if _lies_on_its_side(image):
            image = ImageOps.exif_transpose(image)
        if "transparency" in image.info and image.mode == "P":
            image = image.convert("RGBA")
        image = image.convert("L" if self.grey else "RGB")
        if self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        values = np.asarray(image)
        return values[None] if self.grey else values.transpose(2, 0, 1)


def _lies_on_its_side(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get(ORIENTATION, 1) != 1)
    except Exception:  # metadata may be broken in many ways; the image is still good
        return False


class CorruptImage(Exception):
    """Report bytes that are not a complete image of a known format; only such images may be skipped."""


def decode(data: bytes, pixels: Pixels, formats: list[str]) -> np.ndarray:
    """Decode the pixels of one image.

    Raises:
        CorruptImage: the bytes cannot be read as an image.
        UnmovedError: an image that is readable, but too large or of more than 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            with _many if image.width * image.height > MANY_PIXELS else nullcontext():
                return pixels(image)
    except UnmovedError:
        raise
    except MemoryError as error:  # memory is short at the moment; the image is not at fault
        raise UnmovedError("expected memory to decode it, came none; free some, or set a smaller size") from error
    except UnidentifiedImageError as error:
        raise CorruptImage("of no known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnmovedError(
            f"expected at most PIL.Image.MAX_IMAGE_PIXELS pixels, came more ({error}); it may be a decompression bomb: "
            "remove it or make it smaller"
        ) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise CorruptImage(brief(error)) from error


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Turn Pillow's decompression bomb warning into an error; ignore warnings on metadata and old formats."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*Pillow")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def known_formats() -> list[str]:
    """Return the formats that may be decoded: all that Pillow and its plugins know but the refused ones."""
    Image.init()
    # The usual formats first: one without a signature costs an attempt for each image of later formats.
    return sorted((name for name in Image.OPEN if name not in REFUSED), key=lambda name: name not in USUAL)
