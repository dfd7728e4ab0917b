"""A run folder: what was asked, where and when it was done, how it went, and the weights. No pickle is ever executed.

recipe.toml          the fully resolved recipe
provenance.json      versions, hardware, seed, git state, times
metrics.jsonl        one record an epoch
best.safetensors     weights with the highest validation robust accuracy
last.safetensors     weights after the last finished epoch
trainer.pt           everything that --resume needs; written last, so it is the point a run comes back to
trainer.previous.pt  the one before, for when trainer.pt is damaged
evaluation/          outcomes.csv, curve.csv, gallery.npz, evaluation.json
verdict/             outcomes.csv, verdict.json: AutoAttack's
validation/          outcomes.csv, validation.json: of images held out of training, to choose settings by
"""

from __future__ import annotations

import io
import json
import shlex
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tomli_w
from torch import nn

from unmoved import checkpoint, lock, models, outcomes
from unmoved.disk import remove_leftovers, write_atomic
from unmoved.errors import UnmovedError
from unmoved.provenance import provenance

FORMAT = 1


class Run:
    """A run folder on disk; see the module for what it holds.

    Raises:
        UnmovedError: `open`: a folder that is missing, half written or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._tables: dict[str, tuple[tuple[int, ...], pd.DataFrame]] = {}

    @classmethod
    def create(cls, path: Path | str, recipe: dict[str, Any]) -> Run:
        """A new run folder; a folder that already holds a run is refused."""
        run = cls(path)
        if (run.path / "recipe.toml").exists():
            raise UnmovedError(f"{run.path} already holds a run: pass --resume to go on with it, or another --out")
        write_atomic(run.path / "provenance.json", _json({"format": FORMAT, **provenance(recipe)}))
        write_atomic(run.path / "recipe.toml", tomli_w.dumps(recipe).encode())
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        run = cls(path)
        if not run.path.is_dir():
            raise UnmovedError(f"run folder {run.path}: expected a folder made by 'unmoved train', found none")
        for name in ("recipe.toml", "provenance.json"):
            if not (run.path / name).is_file():
                raise UnmovedError(
                    f"run folder {run.path}: {name} is missing, so this is no run or a half written one; train again"
                )
        if run.provenance.get("format") != FORMAT:
            raise UnmovedError(
                f"run folder {run.path}: expected format {FORMAT}, came {run.provenance.get('format')!r}; "
                "use the version of unmoved that wrote it, or train again"
            )
        return run

    @cached_property
    def recipe(self) -> dict[str, Any]:
        try:
            return tomllib.loads((self.path / "recipe.toml").read_text())
        except (OSError, ValueError) as error:
            raise UnmovedError(f"run folder {self.path}: recipe.toml cannot be read: {error}") from error

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return self._read_json("provenance.json") or {}

    @property
    def name(self) -> str:
        return str(self.recipe.get("name", self.path.name))

    @property
    def seed(self) -> int:
        return int(self.recipe.get("training", {}).get("seed", 0))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row an epoch; the objective's parts as columns ``parts.ce`` and so on."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            return pd.json_normalize([json.loads(line) for line in lines])
        except ValueError as error:
            raise UnmovedError(f"{path}: a line is not JSON ({error}); the file was changed or torn") from error

    # --- training state

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one who trains or evaluates this run, and clear away what killed processes left half written.

        Raises:
            UnmovedError: another process is at it.
        """
        with lock.alone(self.path):
            remove_leftovers(self.path, spare="doctor.json")
            for kind in ("evaluation", "verdict", "validation"):
                remove_leftovers(self.path / kind)
                remove_leftovers(self.path / kind / "adversarial")
            for folder in (self.path, self.path / "analysis"):  # where doctor and analyses may be writing right now
                remove_leftovers(folder, older_than=3600.0)
            yield

    def save_state(self, state: dict[str, Any]) -> None:
        """The trainer's state: tensors, numbers, strings and plain containers only. The one before is kept."""
        checkpoint.save(self.path, state)

    def load_state(
        self, tell: Callable[[str], None] = checkpoint.silent, *, mend: bool = False
    ) -> dict[str, Any] | None:
        """The newest whole state that `save_state` saved, or None; nothing in it is run.

        Args:
            tell: called with a sentence where the newest is damaged and the one before is taken.
            mend: whether the damaged one is removed, for whoever goes on and saves.
        """
        return checkpoint.load(self.path, tell, mend=mend)

    def mend_weights(self, state: dict[str, Any], tell: Callable[[str], None] = checkpoint.silent) -> None:
        """Write weights files that are missing or damaged anew, from what `load_state` returned."""
        for which, tensors in (("last", state.get("average", state["model"])), ("best", state.get("best_model"))):
            path = self.path / f"{which}.safetensors"
            if tensors is not None and not models.is_whole(path):
                models.save_tensors(tensors, path)
                tell(f"{path} was missing or damaged: restored from the trainer's state")

    def save_metrics(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(self.path / "metrics.jsonl", lines.encode())

    def save_weights(self, model: nn.Module, which: str) -> None:
        models.save_weights(model, self.path / f"{which}.safetensors")

    def load_weights(self, model: nn.Module, which: str) -> None:
        path = self.path / f"{which}.safetensors"
        if not path.exists():
            raise UnmovedError(f"run folder {self.path}: no {path.name} yet; train first (unmoved train --resume)")
        try:
            models.load_weights(model, path)
        except models.DamagedFile as error:
            recipe, out = (shlex.quote(str(path)) for path in (self.path / "recipe.toml", self.path))
            raise UnmovedError(
                f"{error}; `unmoved train {recipe} --out {out} --resume` restores it from the trainer's state"
            ) from error

    # --- evaluation

    def save_evaluation(
        self,
        table: pd.DataFrame,
        facts: dict[str, Any],
        *,
        kind: str = "evaluation",
        curve: pd.DataFrame | None = None,
        gallery: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Into the folder ``kind``; ``<kind>.json`` comes last: an evaluation is there when it is."""
        folder = self.path / kind
        with suppress(NotADirectoryError):  # the writes below say it better
            (folder / f"{kind}.json").unlink(missing_ok=True)
        outcomes.write(table, folder / "outcomes.csv")
        if curve is not None:
            outcomes.write(curve, folder / "curve.csv")
        if gallery is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **gallery)  # type: ignore[arg-type]
            write_atomic(folder / "gallery.npz", buffer.getvalue())
        write_atomic(folder / f"{kind}.json", _json(facts))

    @property
    def evaluation(self) -> dict[str, Any] | None:
        return self._read_json("evaluation/evaluation.json")

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The facts of AutoAttack's verdict, or None."""
        return self._read_json("verdict/verdict.json")

    @property
    def validation(self) -> dict[str, Any] | None:
        """The facts of a judgement of validation images, or None."""
        return self._read_json("validation/validation.json")

    @property
    def doctor(self) -> dict[str, Any] | None:
        """What `unmoved doctor` found and about which weights, or None where nobody looked."""
        return self._read_json("doctor.json")

    @property
    def outcomes(self) -> pd.DataFrame | None:
        return self._outcomes("evaluation/outcomes.csv")

    @property
    def verdict_outcomes(self) -> pd.DataFrame | None:
        return self._outcomes("verdict/outcomes.csv")

    @property
    def curve(self) -> pd.DataFrame | None:
        return self._outcomes("evaluation/curve.csv")

    def _outcomes(self, name: str) -> pd.DataFrame | None:
        """A table, looked through once as long as its file is the same: a new one never has all of these alike."""
        path = self.path / name
        if not path.exists():
            return None
        status = path.stat()
        stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if name not in self._tables or self._tables[name][0] != stamp:
            self._tables[name] = stamp, outcomes.read(path)
        return self._tables[name][1].copy()  # what a caller changes is his own

    @property
    def gallery(self) -> dict[str, np.ndarray] | None:
        path = self.path / "evaluation" / "gallery.npz"
        if not path.exists():
            return None
        try:
            # numpy leaves a torn file open, so it is opened here.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files} or None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UnmovedError(f"{path}: cannot be read ({error}); run 'unmoved evaluate {self.path}' again") from error

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UnmovedError(f"{path}: not valid JSON ({error}); the file was changed or torn") from error


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
