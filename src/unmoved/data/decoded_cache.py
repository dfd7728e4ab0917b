"""Cache decoded folders of images, one .npz each. A stale, damaged or unwritable cache is ignored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmoved.core.errors import UnmovedError
from unmoved.core.files import replacing
from unmoved.core.untrusted import npz
from unmoved.data.stored_arrays import Stored, stored

FORMAT = "1"  # raise it when decoding changes its results


@dataclass(frozen=True, eq=False)
class Decoded:
    """Hold a decoded folder, training images first.

    Attributes:
        images: (N, C, H, W) uint8, in memory or in the cache.
        labels: (N,) int64.
        train: the first ``train`` images are the training part; N where the folder has no parts.
        classes: class names.
        skipped: names of files left out.
    """

    images: np.ndarray | Stored
    labels: np.ndarray
    train: int
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slot:
    """Hold the cache file of one folder with one set of settings, and the stamp by which it is valid."""

    file: Path
    stamp: str

    @staticmethod
    def of(cache: bool | str | os.PathLike[str], path: Path, settings: str, stamps: Iterable[str]) -> Slot | None:
        """Return the slot of a folder or archive, or None without a cache.

        Args:
            cache: True for the user's cache folder (``$UNMOVED_CACHE``, else ``$XDG_CACHE_HOME/unmoved``, else
                ``~/.cache/unmoved``), or a folder.
            stamps: every file with its size and time.
        """
        if not isinstance(cache, bool | str | os.PathLike):
            raise UnmovedError(f"cache: expected true, false or a folder, came {cache!r}")
        if cache is False:
            return None
        folder = _user_folder() if isinstance(cache, bool) else Path(cache).expanduser()
        key = _digest([FORMAT, str(path.absolute()), settings])
        return Slot(folder / f"{path.name}-{key[:16]}.npz", _digest([key, *stamps]))

    def load(self) -> Decoded | None:
        """Load the cached folder if its stamp fits; its images are checked when they are read."""
        try:
            kept = npz(self.file, ("stamp", "labels", "train", "classes", "skipped"))
            if str(kept["stamp"]) != self.stamp:
                return None
            texts = [tuple(str(text) for text in kept[key]) for key in ("classes", "skipped")]
            images = stored(self.file, ["images"])["images"]
            found = Decoded(images, kept["labels"], int(kept["train"]), *texts)
        except Exception:  # a damaged cache may raise any error of zip and numpy; the images are decoded again
            return None
        labels = found.labels
        fits = images.dtype == np.uint8 and len(images.shape) == 4 and labels.dtype == np.int64
        fits = fits and labels.shape == images.shape[:1] and 0 < found.train <= len(labels)
        return found if fits and labels.min() >= 0 and labels.max() < len(found.classes) else None

    def save(self, decoded: Decoded) -> None:
        """Write the images to the cache, all of them, or none if that fails."""
        with suppress(UnmovedError), replacing(self.file) as file:  # without a cache the next start only takes longer
            np.savez(
                file,
                stamp=np.array(self.stamp),
                images=np.asarray(decoded.images),
                labels=decoded.labels,
                train=np.array(decoded.train),
                classes=np.array(decoded.classes, dtype=np.str_),
                skipped=np.array(decoded.skipped, dtype=np.str_),
            )


def _user_folder() -> Path:
    if own := os.environ.get("UNMOVED_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmoved"


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
