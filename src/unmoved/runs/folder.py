"""Read and write run folders: recipe, provenance, log, weights, evaluations. No pickle is ever executed.

recipe.toml          the fully resolved recipe
provenance.json      versions, hardware, seed, git state, times
metrics.jsonl        one record an epoch
per_class.jsonl      what terms report by class, one line an epoch; only where one does
best.safetensors     weights with the highest validation robust accuracy
last.safetensors     weights after the last saved epoch
trainer.pt           everything that --resume needs; written after the weights, so that a run resumes from it
trainer.previous.pt  the one before, for when trainer.pt is damaged
evaluation/          outcomes.csv, curve.csv, gallery.npz, evaluation.json
verdict/             outcomes.csv, verdict.json: AutoAttack's
sampled/             outcomes.csv, asked.csv, sampled.json: of a cheap attack, and of AutoAttack on survivors of it
validation/          outcomes.csv, validation.json: of images held out of training, to choose settings by
export/              what `unmoved export` wrote
error.txt            the traceback of a run of `unmoved compare` that failed, until it succeeds
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w
from torch import nn

from unmoved import models
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.core.files import finish_set, latest, remove_leftovers, write_atomic, write_set
from unmoved.core.untrusted import Json
from unmoved.evaluation import outcomes, sampling
from unmoved.runs import lock, records
from unmoved.runs.provenance import provenance
from unmoved.runs.suggestions import run_meant
from unmoved.training import checkpoint
from unmoved.training.log import METRICS, PER_CLASS, Log, by_class, divided
from unmoved.training.state import SavedState, Tensors

logger = logging.getLogger("unmoved")
FORMAT = 1
KINDS = ("evaluation", "verdict", "sampled", "validation")  # folders of outcomes
GALLERY = ("x", "x_adv", "label", "clean_prediction", "adversarial_prediction", "attack")


def folder_name(recipe: str) -> str:
    """Return what a comparison calls the folder of a recipe's runs: its name, with hyphens for slashes and spaces."""
    return re.sub(r"[/\s]+", "-", recipe)


class Run:
    """A run folder on disk; see the module for its files, which are read anew at each access."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._tables: dict[str, tuple[tuple[int, ...], pd.DataFrame]] = {}

    @classmethod
    def create(cls, path: Path | str, recipe: Json, weights: models.Loaded | None = None) -> Run:
        """Make a new run folder; refuse a folder that holds files of a run.

        Args:
            weights: what was read of the file of weights that the recipe names; the provenance says it.
        """
        run = cls(path)
        if records.is_begun(run.path):
            raise UnmovedError(f"{run.path} already holds a run: pass --resume to go on with it, or another --out")
        write_atomic(run.path / "provenance.json", _json({"format": FORMAT, **provenance(recipe, weights)}))
        write_atomic(run.path / "recipe.toml", tomli_w.dumps(recipe).encode())
        return run

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Return the run in a folder.

        Raises:
            UnmovedError: a folder that is missing, half written or of another version.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise UnmovedError(f"run folder {run.path}: expected a folder made by 'unmoved train'{run_meant(run.path)}")
        if not os.path.lexists(run.path / "recipe.toml") and (inside := run_meant(run.path)):
            raise UnmovedError(f"run folder {run.path}: expected one run, a folder made by 'unmoved train'{inside}")
        for name in ("recipe.toml", "provenance.json"):
            if not os.path.lexists(run.path / name):  # if it is not a regular file, its reader reports it
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
    def _recipe(self) -> tuple[Json, records.RecipeHead]:
        try:
            return records.recipe(self.path / "recipe.toml", "train again")
        except FileNotFoundError as error:
            raise UnmovedError(f"run folder {self.path}: recipe.toml is missing; train again") from error

    @property
    def recipe(self) -> Json:
        """Return the tables of the resolved recipe."""
        return self._recipe[0]

    @cached_property
    def provenance(self) -> records.Provenance:
        """Return where the run was made: versions, hardware, git state; empty if there is no such file."""
        return records.read(records.PROVENANCE, self.path / "provenance.json", "train again") or {}

    @property
    def name(self) -> str:
        """Return the name of the recipe, or of the folder where the recipe has none."""
        name = self._recipe[1].name
        return self.path.name if name is None else name

    @property
    def seed(self) -> int:
        """Return the seed of training."""
        return self._recipe[1].training.seed

    @property
    def metrics(self) -> pd.DataFrame:
        """Return the training log, one row an epoch; the objective's parts as columns ``parts.ce`` and so on."""
        return pd.json_normalize(records.log(self.path / METRICS, "train again"))

    @property
    def per_class(self) -> pd.DataFrame:
        """Return what terms report by class, such as `GlobalProbability`'s q: a row for each epoch, term and class."""
        lines = records.per_class(self.path / PER_CLASS, "train again")
        if lines is not None:
            return by_class(lines)
        log = records.log(self.path / METRICS, "train again")  # an older version kept it there
        return by_class({"epoch": record["epoch"], **divided(record)[1]} for record in log)

    # --- training state

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the run for training or evaluation, and remove files that killed processes left half written.

        Raises:
            UnmovedError: another process trains or evaluates it.
        """
        with lock.alone(self.path):
            remove_leftovers(self.path, spare="doctor.json")
            for kind in KINDS:
                finish_set(self.path / kind, kind)
                remove_leftovers(self.path / kind)
                for folder in (self.path / kind).glob("*adversarial*"):
                    remove_leftovers(folder)
            for folder in (self.path, self.path / "analysis"):  # doctor and analyses may be writing there at the moment
                remove_leftovers(folder, older_than=3600.0)
            yield

    def save_state(self, state: SavedState) -> None:
        """Save the trainer's state, of tensors, numbers, strings and plain containers; the one before is kept."""
        checkpoint.save(self.path, state)

    def load_state(self, *, mend: bool = False) -> SavedState | None:
        """Load the newest whole state, or None; see `checkpoint.load`."""
        return checkpoint.load(self.path, mend=mend)

    def mend_weights(self, state: SavedState) -> None:
        """Restore weights files that are missing or damaged from what `load_state` returned."""
        for which, tensors in (("last", state.get("average", state["model"])), ("best", state.get("best_model"))):
            path = self.path / f"{which}.safetensors"
            if tensors is not None and not models.is_whole(path):
                models.save_tensors(tensors, path)
                logger.warning("%s was missing or damaged: restored from the trainer's state", path)

    @cached_property
    def log(self) -> Log:
        """Return the log: the files that training appends an epoch's record to."""
        return Log(self.path)

    def mend_log(self, state: SavedState) -> None:
        """Truncate the log to its length when this state was saved, and append the line of the state's epoch."""
        self.log.go_back(state["log"], state["epochs"])
        self.log.add(state["record"])

    def is_done(self, epochs: int) -> bool:
        """Return whether all epochs are saved, by the log, and their weights are whole; nothing else is read.

        A training that was stopped for overfitting has fewer epochs, and is done.
        """
        try:
            lines = records.log(self.path / METRICS, "")
        except UnmovedError:
            return False
        logged = [line["epoch"] for line in lines]
        epochs = len(lines) if lines and "stopped" in lines[-1] else epochs
        weights = (self.path / f"{which}.safetensors" for which in ("best", "last"))
        return logged == list(range(1, epochs + 1)) and all(map(models.is_whole, weights))

    def save_weights(self, model: nn.Module, which: str, state: Tensors | None = None) -> None:
        """Save the weights of a model, or those that its ``state_dict`` returned at another time."""
        models.save_weights(model, self.path / f"{which}.safetensors", state)

    def load_weights(self, model: nn.Module, which: str) -> None:
        """Copy the ``"best"`` or ``"last"`` weights into a model.

        Raises:
            UnmovedError: as `models.load_weights`; there are none yet.
        """
        path = self.path / f"{which}.safetensors"
        recipe, out = (shlex.quote(str(path)) for path in (self.path / "recipe.toml", self.path))
        train = f"`unmoved train {recipe} --out {out} --resume`"
        if not self.recipe.get("trained", True):
            train = "the call of `judge` that made this folder"
        if not os.path.lexists(path):
            raise UnmovedError(f"run folder {self.path}: no {path.name} yet; train first: {train}")
        try:
            models.load_weights(model, path)
        except models.DamagedFile as error:
            raise UnmovedError(f"{error}; {train} restores it from the trainer's state") from error

    # --- evaluation

    def save_evaluation(
        self,
        table: pd.DataFrame,
        facts: records.Evaluation,
        *,
        kind: str = "evaluation",
        asked: pd.DataFrame | None = None,
        curve: pd.DataFrame | None = None,
        gallery: dict[str, np.ndarray] | None = None,
        images: str | None = None,
        journal: str | None = None,
    ) -> None:
        """Save an evaluation in the folder ``kind``; it replaces the one there as a whole, or not at all.

        Args:
            facts: if their ``question`` is that of the old evaluation, its adversarial images are kept.
            asked: the outcomes of AutoAttack on a sample.
            images: the folder in ``kind`` that becomes ``adversarial``.
            journal: the journal in ``kind``, which is emptied.
        """
        folder = self.path / kind
        files = {"outcomes.csv": outcomes.as_csv(table, str(folder / "outcomes.csv"))}
        for name, more in (("asked.csv", asked), ("curve.csv", curve)):
            if more is not None:
                files[name] = outcomes.as_csv(more, str(folder / name))
        if gallery is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **gallery)  # type: ignore[arg-type]
            files["gallery.npz"] = buffer.getvalue()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        files[f"{kind}.json"] = _json({**facts, "files": digests})
        if journal is not None:
            files[journal] = b""  # together with the rest, or it would be resumed without its images
        folders = {"adversarial": images or ""}
        with suppress(UnmovedError):  # facts that are damaged are about to be replaced
            before = self.facts(kind)
            if images is None and before is not None and before.get("question") == facts.get("question", ""):
                folders = {}
        write_set(folder, kind, files, folders)

    @property
    def evaluation(self) -> records.Evaluation | None:
        """Return the facts of the evaluation, or None."""
        return self.facts("evaluation")

    @property
    def verdict(self) -> records.Evaluation | None:
        """Return the facts of the evaluation with AutoAttack, or None."""
        return self.facts("verdict")

    @property
    def sampled(self) -> records.Evaluation | None:
        """Return the facts of an evaluation with AutoAttack on a sample, or None."""
        return self.facts("sampled")

    @property
    def shown(self) -> str:
        """Return the folder of the outcomes that the reported number is from.

        Of AutoAttack's complete verdict, "verdict", and the sampled one, "sampled", the one on more images, if it is
        about the same model and data as the evaluation; otherwise "evaluation".
        """
        found = {kind: facts for kind in ("verdict", "sampled") if (facts := self.facts(kind)) is not None}
        evaluation = self.evaluation or next(iter(found.values()), None)
        if evaluation is None:
            return "evaluation"
        same = {kind: facts["n"] for kind, facts in found.items() if not records.difference(evaluation, facts)}
        return max(same, key=lambda kind: same[kind], default="evaluation")

    @property
    def validation(self) -> records.Evaluation | None:
        """Return the facts of an evaluation on validation images, or None."""
        return self.facts("validation")

    def facts(self, kind: str) -> records.Evaluation | None:
        """Return the facts of the evaluation in the folder ``kind``, or None."""
        path = latest(self.path / kind, kind, f"{kind}.json")
        return records.read(records.EVALUATION, path, self._again("evaluate"))

    def _require_own(self, kind: str, path: Path) -> None:
        """Raise `UnmovedError` where a file is not the one that was saved with the facts beside it."""
        facts = self.facts(kind)
        expected = None if facts is None else facts.get("files", {}).get(path.name)
        if expected is not None and untrusted.digest(path) != expected:
            raise UnmovedError(
                f"{path}: expected what {kind}.json was saved with, came something else; if another process was "
                f"saving just now, repeat the command, otherwise {self._again('evaluate')}"
            )

    @property
    def doctor(self) -> records.Doctor | None:
        """Return what `unmoved doctor` found and about which weights, or None if it was not run."""
        return records.read(records.DOCTOR, self.path / "doctor.json", self._again("doctor"))

    @property
    def outcomes(self) -> pd.DataFrame | None:
        """Return the outcomes of the evaluation, or None."""
        return self._outcomes("evaluation", "outcomes.csv")

    @property
    def verdict_outcomes(self) -> pd.DataFrame | None:
        """Return the outcomes of the evaluation with AutoAttack, or None."""
        return self._outcomes("verdict", "outcomes.csv")

    @property
    def sampled_outcomes(self) -> pd.DataFrame | None:
        """Return the outcomes of the cheap attack of a sampled verdict, or None."""
        return self._outcomes("sampled", "outcomes.csv")

    @property
    def asked_outcomes(self) -> pd.DataFrame | None:
        """Return the outcomes of AutoAttack on the sample of a sampled verdict, or None."""
        return self._outcomes("sampled", "asked.csv")

    @property
    def shown_outcomes(self) -> pd.DataFrame | None:
        """Return the outcomes behind the reported number; for a sampled verdict those of both attacks together."""
        if (kind := self.shown) != "sampled":
            return self._outcomes(kind, "outcomes.csv")
        cheap, asked = self.sampled_outcomes, self.asked_outcomes
        return None if cheap is None or asked is None else sampling.together(cheap, asked)

    @property
    def validation_outcomes(self) -> pd.DataFrame | None:
        return self._outcomes("validation", "outcomes.csv")

    @property
    def curve(self) -> pd.DataFrame | None:
        """Return the outcomes at several eps, or None."""
        return self._outcomes("evaluation", "curve.csv")

    def _outcomes(self, kind: str, name: str) -> pd.DataFrame | None:
        """Read a table of outcomes; it is checked once as long as its file is the same, by size, time and number."""
        path = latest(self.path / kind, kind, name)
        try:
            with untrusted.regular(path) as file:
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        key, stamp = f"{kind}/{name}", (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self._tables or self._tables[key][0] != stamp:
            table = outcomes.read(path)
            self._require_own(kind, path)
            self._tables[key] = stamp, table
        return self._tables[key][1].copy()  # a copy, which the caller may change

    @property
    def gallery(self) -> dict[str, np.ndarray] | None:
        """Return the arrays `GALLERY` of a few images, or None."""
        path = latest(self.path / "evaluation", "evaluation", "gallery.npz")
        if not os.path.lexists(path):
            return None
        try:
            arrays = untrusted.npz(path, GALLERY)
        except UnmovedError as error:
            raise UnmovedError(f"{error}; {self._again('evaluate')}") from error
        self._require_own("evaluation", path)
        return arrays or None

    def _again(self, command: str) -> str:
        return f"run `unmoved {command} {self.path}` again"


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
