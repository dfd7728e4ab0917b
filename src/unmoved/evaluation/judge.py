"""Evaluate a model under attacks: attacks propose images, the judge checks them and decides in float32."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from torch import nn

from unmoved.core.batch import Batch, Image, Label
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.core.model_errors import require_finite
from unmoved.core.precision import autocast, device_of
from unmoved.core.preconditions import require_attack, require_images, require_labels, require_model, require_split
from unmoved.core.protocols import (
    Attack,
    Ensemble,
    Split,
    draws_of,
    is_minimum_norm,
    kind_of,
    parts_of,
    require_in_ball,
)
from unmoved.core.split_batches import one_pass, require_distinct
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import eval_logits
from unmoved.evaluation.journal import Journal
from unmoved.evaluation.outcomes import CLEAN, ROBUST, completed
from unmoved.evaluation.threads import Workers

ORDER = "evaluate(model, split, {name: attack, ...}, threat)"
Progress = Callable[[float, float, str], None]
Keep = Callable[[str, Batch, Image, np.ndarray], None]


def evaluate(
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, Attack],
    threat: ThreatModel,
    *,
    batch_size: int = 128,
    precision: str = "float32",
    workers: int = 1,
    among: np.ndarray | None = None,
    journal: Journal | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Run attacks on a model and return one row per sample and attack, judged in float32 in evaluation mode.

    Attacks run on the samples that the model gets right; a sample misclassified as it is counts as lost with distance
    0. The parts of an ensemble run one after the other over all the data, each on the samples that are still robust.
    Images outside [0, 1] are refused, and images outside the ball do not count as successes.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K); on any device.
        split: the data; read again for each attack, so that memory does not grow with it.
        attacks: name -> attack or ensemble.
        threat: the ball that the judge holds every proposal to.
        batch_size: images per pass; the outcomes do not depend on it.
        precision: of the attacks only: ``"float32"``, ``"bf16"`` or ``"auto"``.
        workers: threads that attack at a time on a CPU, each with a copy of the model; 0 for as many as torch uses.
        among: positions in the split; only these samples are attacked and listed. They may share a journal with others.
        journal: where results are written as they come, and read from after an interruption.
        keep: called with (part, batch, proposals, which are successes), to save the images; with several attacks a
            part is named ``attack,part``.
        progress: called with (work done, work in all, a line of text on the state).

    Returns:
        A table with the columns of `unmoved.outcomes`.

    Raises:
        UnmovedError: arguments that are no model, split, attacks by name and threat model; no attack or no data;
            images or labels out of range; one identity for two samples; logits that are not finite; a proposal outside
            the threat model.
    """
    require_model(model, ORDER)
    require_split(split, ORDER)
    require_threat("threat", threat)
    require_attacks(attacks, threat)
    batch_size = require_whole("batch_size", batch_size, at_least=1)
    workers = require_whole("workers", workers, at_least=0)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # A randomised model draws from the global generator: fix its draws, and restore the caller's state afterwards.
    with torch.random.fork_rng(devices), Workers(model, workers) as pool:
        torch.manual_seed(0)
        run = _Evaluation(model, split, attacks, threat, batch_size, precision, pool, among, journal, keep, progress)
        tables = [run.outcomes(name) for name in attacks]
    return pd.concat(tables, ignore_index=True).sort_values(["attack", "index"], kind="stable", ignore_index=True)


def measured(
    model: nn.Module,
    split: Split,
    measure: Callable[[nn.Module, Batch], torch.Tensor],
    threat: ThreatModel,
    *,
    among: np.ndarray,
    batch_size: int = 128,
    workers: int = 1,
) -> np.ndarray:
    """Compute a measure (model, batch) -> (B,) for the samples at these increasing positions, (N,) float64.

    Args:
        workers: threads that measure at a time, as in `evaluate`.
    """
    mask = np.zeros(int(among[-1]) + 1 if len(among) else 0, dtype=bool)
    mask[among] = True
    with Workers(model, workers) as pool:
        size = max(1, min(batch_size, -(-len(among) // pool.count)))
        chunks = _chunks(model, split, mask, size, threat) if len(among) else ()
        values = [value.double().cpu().numpy() for _, value in pool.map(lambda m, chunk: measure(m, chunk[1]), chunks)]
    return np.concatenate([np.empty(0), *values])


@dataclasses.dataclass
class _Evaluation:
    """Run attacks on one model and its data; the fields are the arguments of `evaluate`, and the threads."""

    model: nn.Module
    split: Split
    attacks: Mapping[str, Attack]
    threat: ThreatModel
    batch_size: int
    precision: str
    pool: Workers
    among: np.ndarray | None
    journal: Journal | None
    keep: Keep | None
    progress: Progress | None

    def __post_init__(self) -> None:
        self.clean = _Clean(self.model, self.split, self.batch_size, self.threat, self.among)
        self.parts = {name: parts_of(name, attack, self.clean.num_classes) for name, attack in self.attacks.items()}
        self._attacks_of_part = Counter(part for parts in self.parts.values() for part in parts)
        # Work is counted in samples: each part counts as many as the model gets right.
        self._right = int(self.clean.attacked.sum())
        self._done, self._total = 0.0, float(sum(map(len, self.parts.values())) * max(self._right, 1))

    def outcomes(self, name: str) -> pd.DataFrame:
        """Run an attack, or the parts of an ensemble in turn, each on the samples that are still robust."""
        sheet = _Sheet(name, self.clean, self.threat, cumulative=isinstance(self.attacks[name], Ensemble))
        for part, attack in self.parts[name].items():
            self._run(sheet, part, attack)
            self._done += float(self._right)
            self._tell(self._done, sheet, part)
        return sheet.table()

    def _run(self, sheet: _Sheet, part: str, attack: Attack) -> None:
        """Enter the results of one part on the samples that are still robust: from the journal, then by running it."""
        sheet.begin()
        met = max(int(sheet.open.sum()), 1)
        if self.journal is not None:
            sheet.enter(part, *sheet.awaited(*self.journal.read(sheet.name, part)))
        # The same chunks after an interruption, so that not even rounding differs.
        size = max(1, min(self.batch_size, -(-met // self.pool.count)))
        chunks = _chunks(self.model, self.split, sheet.waiting, size, self.threat)

        def ask(model: nn.Module, chunk: _Chunk) -> tuple[Image, np.ndarray, np.ndarray]:
            batch = chunk[1]
            proposal = propose(model, attack, batch, self.threat, part, self.precision)
            prediction = predict(model, proposal, batch.y, draws_of(attack))
            return proposal, prediction.cpu().numpy(), self.threat.distance(proposal, batch.x).cpu().numpy()

        label, ran = part if self._attacks_of_part[part] == 1 else f"{sheet.name},{part}", 0
        for (position, batch), (proposal, prediction, distance) in self.pool.map(ask, chunks):
            if self.keep is not None:
                self.keep(label, batch, proposal, sheet.success(prediction, batch.y.cpu().numpy(), distance))
            if self.journal is not None:
                self.journal.add(sheet.name, part, position, prediction, distance)
            sheet.enter(part, position, prediction, distance)
            ran += len(position)
            self._tell(min(self._done + self._right * ran / met, self._total), sheet, part)

    def _tell(self, done: float, sheet: _Sheet, part: str) -> None:
        if self.progress is not None:
            self.progress(done, self._total, sheet.words(part))


def require_attacks(attacks: Mapping[str, Attack], threat: ThreatModel) -> None:
    """Raise `UnmovedError` unless these are attacks by name that may judge a model in this ball."""
    if not isinstance(attacks, Mapping) or not attacks:
        came = "none" if isinstance(attacks, Mapping) else type(attacks).__name__
        raise UnmovedError(
            f'attacks: expected at least one attack by its name, such as {{"pgd": PGD(threat)}}, came {came}'
        )
    for name, attack in attacks.items():
        require_attack(f"attack {name!r}", attack)
        require_in_ball(f"attack {name!r}", attack)
        kind_of(attack)
        draws_of(attack)
        may_leave, ball = is_minimum_norm(attack), getattr(attack, "threat", threat)
        if may_leave or not isinstance(ball, ThreatModel) or ball.norm != threat.norm:
            continue
        if ball.radius > threat.radius + threat.tolerance:
            raise UnmovedError(
                f"attack {name!r}: expected eps of at most the threat model's {threat.radius:g}, came "
                f"{ball.radius:g}; leave its eps out, or judge in a ball of that size"
            )


class _Clean:
    """Hold the model's predictions for the clean images, and which samples are evaluated and attacked."""

    def __init__(
        self, model: nn.Module, split: Split, size: int, threat: ThreatModel, among: np.ndarray | None
    ) -> None:
        index: list[np.ndarray] = []
        label: list[np.ndarray] = []
        prediction: list[np.ndarray] = []
        for batch in checked_batches(model, split, size, threat):
            if len(index) == 1:  # a split that numbers each batch from 0 is noticed here, before all data is read
                require_distinct(torch.cat([torch.from_numpy(index[0]), batch.index.cpu()]))
            guess, self.num_classes = predicted(model, batch.x, batch.y)
            index.append(batch.index.cpu().numpy())
            label.append(batch.y.cpu().numpy())
            prediction.append(guess.cpu().numpy())
        self.index, self.label, self.prediction = map(np.concatenate, (index, label, prediction))
        require_distinct(torch.from_numpy(self.index))
        self.judged = np.ones(len(self.label), dtype=bool)
        if among is not None:
            self.judged[:] = False
            self.judged[among] = True
        self.attacked = self.judged & (self.prediction == self.label)


class _Sheet:
    """Hold the results of one attack on each sample so far."""

    def __init__(self, name: str, clean: _Clean, threat: ThreatModel, cumulative: bool) -> None:
        self.name, self.clean, self.threat, self.cumulative = name, clean, threat, cumulative
        self.prediction, self.distance = clean.prediction.copy(), np.zeros(len(clean.label))
        self.by = np.where(clean.prediction == clean.label, ROBUST, CLEAN).astype(object)
        self.open = clean.attacked.copy()
        self._asked = np.zeros_like(self.open)

    def begin(self) -> None:
        """Begin a new part of the attack, which has not run on any sample."""
        self._asked[:] = False

    @property
    def waiting(self) -> np.ndarray:
        """Return a mask of the samples that the current part is still to be run on."""
        mask: np.ndarray = self.open & ~self._asked
        return mask

    def success(self, prediction: np.ndarray, label: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Return which proposals are misclassified and lie within the ball, up to rounding."""
        is_success: np.ndarray = (prediction != label) & (distance <= self.threat.radius + self.threat.tolerance)
        return is_success

    def awaited(
        self, position: np.ndarray, prediction: np.ndarray, distance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Select the results of a journal that are about samples still to be attacked."""
        mine = position < len(self.open)
        mine[mine] = self.waiting[position[mine]] & (prediction[mine] < self.clean.num_classes)
        return position[mine], prediction[mine], distance[mine]

    def enter(self, part: str, position: np.ndarray, prediction: np.ndarray, distance: np.ndarray) -> None:
        self._asked[position] = True
        won = self.success(prediction, self.clean.label[position], distance)
        # An ensemble that fails proposes the clean image; a single attack is recorded with its own proposal.
        shown = won if self.cumulative else np.ones_like(won)
        self.prediction[position[shown]], self.distance[position[shown]] = prediction[shown], distance[shown]
        self.by[position[won]] = part
        self.open[position[won]] = False

    def words(self, part: str) -> str:
        return f"{part}: robust accuracy at most {self.open[self.clean.judged].mean():.1%}"

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame(
            {
                "index": self.clean.index,
                "label": self.clean.label,
                "attack": self.name,
                "eps": self.threat.radius,
                "norm": self.threat.norm,
                "clean_prediction": self.clean.prediction,
                "adversarial_prediction": self.prediction,
                "distance": self.distance,
                "success": ~self.open,
                "by": self.by,
            }
        )
        return completed(table[self.clean.judged])


_Chunk = tuple[np.ndarray, Batch]


def _chunks(model: nn.Module, split: Split, mask: np.ndarray, size: int, threat: ThreatModel) -> Iterator[_Chunk]:
    """Iterate over (positions in the split, batch) of the samples where the mask is true, ``size`` at a time."""
    held: list[Batch] = []
    where = np.flatnonzero(mask)
    read = yielded = 0
    for batch in checked_batches(model, split, max(size, 256), threat):
        few = torch.from_numpy(np.flatnonzero(mask[read : read + len(batch)])).to(batch.y.device)
        read += len(batch)
        if len(few):
            held.append(batch.take(few))
        is_last = read >= len(mask)
        while held and (sum(map(len, held)) >= size or is_last):
            x, y, index = (torch.cat([getattr(batch, name) for batch in held]) for name in ("x", "y", "index"))
            joined = Batch(x, y, index)
            rest = torch.arange(len(joined), device=joined.y.device)
            yield where[yielded : yielded + size], joined.take(rest[:size])
            yielded += min(size, len(joined))
            held = [joined.take(rest[size:])] if len(joined) > size else []
        if is_last:  # a mask may end before the data does
            return


def propose(
    model: nn.Module, attack: Attack, batch: Batch, threat: ThreatModel, name: str, precision: str = "float32"
) -> Image:
    """Run an attack and check its proposals against the threat model."""
    require_in_ball(f"attack {name!r}", attack)
    # Copies, since the distance is measured from the clean images, into which an attack might write.
    theirs = dataclasses.replace(batch, x=batch.x.clone(), y=batch.y.clone())
    with autocast(precision, batch.x.device):
        proposal = attack(model, theirs)
    if not isinstance(proposal, torch.Tensor):
        raise UnmovedError(f"attack {name!r}: expected a tensor of images, came {type(proposal).__name__}")
    if proposal.dtype != batch.x.dtype:
        raise UnmovedError(f"attack {name!r}: expected images of {batch.x.dtype}, came {proposal.dtype}")
    # A minimum-norm attack may leave the ball, without success; no attack may leave the valid images.
    (_whole_box(threat, batch) if is_minimum_norm(attack) else threat).check(proposal, batch.x, name)
    return proposal.detach()


def _whole_box(threat: ThreatModel, batch: Batch) -> ThreatModel:
    """Return a ball in which every valid image lies."""
    pixels = 1 if threat.norm == "linf" else batch.x[0].numel()
    return dataclasses.replace(threat, eps=pixels * (threat.bounds[1] - threat.bounds[0]))


def predict(model: nn.Module, x: Image, y: Label, draws: int = 1) -> Label:
    """Predict classes (B,) in float32 and evaluation mode; for a randomised model by the mean of ``draws`` logits.

    Raises:
        UnmovedError: logits that are not finite, or labels that the logits have no column for.
    """
    return predicted(model, x, y, draws)[0]


def predicted(model: nn.Module, x: Image, y: Label, draws: int = 1) -> tuple[Label, int]:
    """Return (the predicted classes (B,), the number of classes)."""
    draws = require_whole("draws", draws, at_least=1)
    logits = eval_logits(model, x, draws=draws)
    require_finite(logits, model)
    require_labels(y, logits.shape[1])
    return logits.argmax(dim=1), logits.shape[1]


def checked_batches(model: nn.Module, split: Split, size: int, threat: ThreatModel) -> Iterator[Batch]:
    """Iterate over a split in batches on the model's device, with images and labels checked."""
    device = device_of(model)
    for batch in one_pass(split, size):
        require_images(batch.x, threat.bounds)
        require_labels(batch.y)
        yield batch.to(device)
