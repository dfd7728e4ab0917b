"""Save the successful adversarial images of an evaluation while it runs."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmoved.core.batch import Batch, Image
from unmoved.core.files import write_atomic
from unmoved.evaluation import judge


def saver(folder: Path) -> judge.Keep:
    """Return a function that saves the successful images of each chunk: index, label, x_adv."""

    def keep(part: str, batch: Batch, proposal: Image, success: np.ndarray) -> None:
        path = folder / f"{part}-{int(batch.index[0]):08d}.npz"
        if not success.any():
            path.unlink(missing_ok=True)  # left by an interruption between saving images and results
            return
        won = torch.from_numpy(success).to(proposal.device)
        arrays: dict[str, Tensor] = {"index": batch.index[won], "label": batch.y[won], "x_adv": proposal[won]}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())

    return keep


def clear(folder: Path, spare: str | None) -> None:
    """Remove the images of interrupted evaluations, except of the one that is resumed (``spare``)."""
    begun = (folder / "journal.jsonl").exists()
    for kept in folder.glob(".adversarial-*"):
        if not kept.is_symlink() and not (begun and kept.name == spare):
            shutil.rmtree(kept, ignore_errors=True)
