"""Load a run's trained model: built from its recipe, with the best or the last weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from unmoved import models
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.precision import memory_format_for, require_device
from unmoved.core.untrusted import Json
from unmoved.data import ArraySplit, DataSet, Selection
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run
from unmoved.runs.provenance import code


class Opened(NamedTuple):
    """Hold a run's objects and its model with the weights asked for, in evaluation mode on the device."""

    assembly: Assembly
    model: nn.Module


def opened(
    run: Run,
    weights: str,
    device: str,
    allow: Collection[str],
    *,
    source: DataSet | None = None,
    assembly: Assembly | None = None,
) -> Opened:
    """Build the run's objects and load its model with these weights.

    Args:
        source: the data of its recipe, if it is loaded already.
        assembly: the objects of its recipe, if they are built already.
    """
    require_device(device)
    if assembly is None:
        assembly = Assembly(config.parse(run.recipe, str(run.path / "recipe.toml")), allow, source=source)
    model = assembly.model()
    run.load_weights(model, weights)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    form = memory_format_for(model, where, torch.zeros(2, *assembly.shape))
    model.to(where).to(memory_format=form)  # type: ignore[call-overload]  # the same numbers, faster
    return Opened(assembly, model.eval())


def weights_digest(run: Run, weights: str) -> str:
    """Return the sha256 of a weights file, by which an evaluation identifies its weights."""
    path = run.path / f"{weights}.safetensors"
    try:
        status = path.stat()
        return _digest(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    except FileNotFoundError:
        raise UnmovedError(f"{path}: expected a weights file, came none; train first") from None


@lru_cache(maxsize=64)
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """Compute the sha256 of a file, cached by its stamp, since weights may be large."""
    models.require_header(path)  # refuses a huge sparse file before it is hashed
    return untrusted.digest(path)


def data_and_code(assembly: Assembly, split: ArraySplit | Selection, allow: Collection[str]) -> Json:
    """Return what a result about a run's model depends on beside its weights and the settings: data and code."""
    recipe = json.dumps(assembly.recipe.setting(), sort_keys=True, default=str)
    return {
        "images": split.digest,
        "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        "versions": [metadata.version("unmoved"), torch.__version__, code(allow)],
    }
