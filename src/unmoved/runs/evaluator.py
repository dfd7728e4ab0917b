"""Evaluate a run's model under attacks and save the outcomes in its folder; an interrupted evaluation is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import numpy as np
import pandas as pd
from torch import nn

from unmoved.attacks import PGD
from unmoved.core import untrusted
from unmoved.core.protocols import Attack, kinds_of, notes_of
from unmoved.core.untrusted import Json
from unmoved.data import ArraySplit, Selection
from unmoved.evaluation import adversarial_images, curve_and_gallery, judge
from unmoved.evaluation.journal import Journal
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run
from unmoved.runs.load import weights_digest
from unmoved.runs.provenance import versions
from unmoved.runs.records import Evaluation

CURVE_SAMPLES = 500


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Hold a run with the settings of `evaluate_run`, and evaluate its model under attacks.

    Attributes:
        split: the images to evaluate on.
        data: the digest of the part of the data that these images were drawn from.
        count: the number of images that the user asked for; None for all.
        attacks: their names, as the user gave them.
        precision: ``"float32"`` or ``"bf16"``.
        data_and_code: what else the outcomes depend on, as `load.data_and_code` returns it.
    """

    run: Run
    assembly: Assembly
    model: nn.Module
    split: ArraySplit | Selection
    data: str
    count: int | None
    attacks: str
    weights: str
    precision: str
    batch_size: int
    workers: int
    data_and_code: Json

    def evaluate_and_save(
        self, kind: str, chosen: dict[str, Attack], save_adversarial: bool, report: Callable[[float, str], None]
    ) -> pd.DataFrame:
        """Evaluate under these attacks, save the outcomes in the folder ``kind`` and return them."""
        began, folder = time.monotonic(), self.run.path / kind
        steps = curve_and_gallery.radii(self.assembly.threat) if kind == "evaluation" else []
        most = 0.8 if steps else 1.0  # the share of the work that is attacks; the rest is the curve
        digest = self.digest(chosen)
        images = f".adversarial-{digest[:16]}" if save_adversarial else None
        journal = self.journal(kind, chosen, images)
        adversarial_images.clear(folder, images)
        keep = None if images is None else adversarial_images.saver(folder / images)
        table = self.evaluate(chosen, journal, lambda share, words: report(most * share, words), keep=keep)
        curve = self._curve(steps, report) if kind == "evaluation" else None
        gallery = None
        if kind == "evaluation":
            name, shown = next(reversed(chosen.items()))
            gallery = curve_and_gallery.gallery(
                self.model,
                self.split,
                shown,
                self.assembly.threat,
                name=name,
                table=table,
            )
        facts = self.facts(chosen, began)
        self.run.save_evaluation(
            table, facts, kind=kind, curve=curve, gallery=gallery, images=images, journal=journal.path.name
        )
        journal.close()
        return table

    def evaluate(
        self,
        chosen: Mapping[str, Attack],
        journal: Journal,
        report: Callable[[float, str], None],
        *,
        among: np.ndarray | None = None,
        keep: judge.Keep | None = None,
    ) -> pd.DataFrame:
        """Return the outcomes of `judge.evaluate` for these attacks, on all samples or on those at these positions."""
        return judge.evaluate(
            self.model,
            self.split,
            chosen,
            self.assembly.threat,
            batch_size=self.batch_size,
            precision=self.precision,
            workers=self.workers,
            among=among,
            journal=journal,
            keep=keep,
            progress=lambda done, total, words: report(done / total, words),
        )

    def journal(self, kind: str, chosen: Mapping[str, Attack], images: str | None = None) -> Journal:
        """Open the journal of the folder ``kind``, with the outcomes that an interrupted evaluation left there."""
        return Journal(self.run.path / kind / "journal.jsonl", self._inputs(chosen) | {"kept": images})

    def digest(self, chosen: Mapping[str, Attack]) -> str:
        """Return the sha256 of everything that the outcomes of these attacks depend on."""
        return hashlib.sha256(json.dumps(self._inputs(chosen), sort_keys=True).encode()).hexdigest()

    def _inputs(self, chosen: Mapping[str, Attack]) -> Json:
        """Return everything that the outcomes of these attacks depend on."""
        attacks: Json = {name: repr(attack) for name, attack in chosen.items()}
        weights = weights_digest(self.run, self.weights)
        return {
            "weights": weights,
            "attacks": attacks,
            "asked": self.attacks,
            "precision": self.precision,
            **self.data_and_code,
        }

    def facts(self, attacks: Mapping[str, Attack], began: float) -> Evaluation:
        """Describe the evaluation, for the JSON file beside its outcomes; ``began`` is by the monotonic clock."""
        threat, num_classes = self.assembly.threat, self.split.num_classes
        return {
            "images": self.split.digest,
            "data": self.data,
            "n": len(self.split),
            "asked_n": self.count,
            "split": self.split.name,
            "shape": list(self.assembly.shape),
            "weights": "last" if self.weights == "last" else "best",
            "weights_sha256": weights_digest(self.run, self.weights),
            "precision": self.precision,
            "threat": {"norm": threat.norm, "eps": threat.radius},
            "asked": untrusted.readable(self.attacks),
            "attacks": {name: repr(attack) for name, attack in attacks.items()},
            "kinds": {name: kinds_of(name, attack, num_classes) for name, attack in attacks.items()},
            "notes": [note for attack in attacks.values() for note in notes_of(attack, num_classes)],
            "classes": list(self.assembly.data.classes),
            "versions": versions(),
            "question": self.digest(attacks),
            "seconds": round(time.monotonic() - began, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _curve(self, steps: list[float], report: Callable[[float, str], None]) -> pd.DataFrame:
        """Measure accuracy against eps on some of the images."""
        threat = self.assembly.threat
        return curve_and_gallery.curve(
            self.model,
            self.split.take(min(CURVE_SAMPLES, len(self.split)), seed=0),
            PGD(threat, steps=20, keep="best", seed=self.assembly.recipe.training.seed),
            threat,
            steps,
            batch_size=self.batch_size,
            workers=self.workers,
            progress=lambda done, total: report(0.8 + 0.2 * done / total, "accuracy against eps"),
        )
