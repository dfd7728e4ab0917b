"""Make run folders for models that were trained elsewhere, and check that a folder is about the same model and data."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from unmoved import models
from unmoved.core.errors import UnmovedError
from unmoved.core.model_errors import require_finite
from unmoved.core.precision import device_of
from unmoved.core.untrusted import Json
from unmoved.core.views import eval_logits
from unmoved.data import ArraySplit, Selection
from unmoved.runs import recipe as config
from unmoved.runs.assembly import IN_PYTHON, Assembly
from unmoved.runs.folder import Run

_LOOKED_AT = 8  # images whose logits identify what a model computes


def first_logits(model: nn.Module, split: ArraySplit | Selection) -> Tensor:
    """Return a model's logits (B, K) for the first images of the data, the same at each call.

    Raises:
        UnmovedError: as `eval_logits`; logits that are not finite.
    """
    x = next(split.batches(min(_LOOKED_AT, len(split)))).x
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = eval_logits(model, x.to(device_of(model)))
    require_finite(logits, model)
    return logits


def tables_of_objects(model: nn.Module, split: ArraySplit | Selection, logits: Tensor) -> Json:
    """Return the tables of a recipe for a model and data that are objects in Python.

    They identify both by content: the model by its tensors and its `first_logits` (which also change with its code and
    with settings that are not tensors), the data by its digest.
    """
    kind = type(model)
    use = f"{kind.__module__}:{kind.__qualname__.rpartition('.')[2]}"
    use = use if use.isascii() else "python:model"
    return {
        "trained": False,
        "model": {"use": use, "content": fingerprint(model, logits)},
        "data": {"use": IN_PYTHON, "content": split.digest},
    }


def fingerprint(model: nn.Module, logits: Tensor) -> str:
    """Compute the sha256 of a model's tensors and of some of its logits, rounded to 0.001."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    digest = hashlib.sha256(models.checksum(tensors).encode())
    rounded = logits.double().round(decimals=3) + 0.0  # no -0.0
    digest.update(rounded.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def is_of_other_weights(path: Path, sha256: str) -> bool:
    """Return whether ``path`` is a run folder of a model whose weights came from another file."""
    if not os.path.lexists(path / "recipe.toml"):
        return False
    return Run.open(path).provenance.get("weights", {}).get("sha256") != sha256


def judged_run(path: Path, assembly: Assembly, model: nn.Module, loaded: models.Loaded | None) -> Run:
    """Make the run folder of a model that was trained elsewhere, or open the one made for it before.

    Raises:
        UnmovedError: the folder holds another run, or one of other weights.
    """
    tables, run = assembly.recipe.tables(), Run(path)
    if os.path.lexists(path / "recipe.toml"):
        run = Run.open(path)
        is_other = loaded is not None and is_of_other_weights(path, loaded.sha256)
        begun = config.parse(run.recipe, str(path / "recipe.toml"))
        if begun.model.weights and assembly.recipe.model.weights:  # compared by content, so its path may differ
            begun.model.weights.file = assembly.recipe.model.weights.file
        if differ := config.differing(begun, tables) + ["the file of weights"] * is_other:
            raise UnmovedError(f"{path} holds another run (it differs in: {', '.join(differ)}); choose another folder")
        if loaded is not None and models.is_whole(path / "best.safetensors"):
            return run
    else:
        run = Run.create(path, tables, weights=loaded)
    with run.alone():
        run.save_weights(model, "best")
    return run
