"""Attack by random search over square windows, which needs the logits alone and no gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import Best, broken, value_at
from unmoved.attacks.incremental_inference import Incremental
from unmoved.attacks.minimum_norm import searching
from unmoved.attacks.square_proposals import Draws, Flips, Tiles, mosaic, stripes
from unmoved.attacks.traced_layers import first_layers
from unmoved.core.batch import Batch, Image, PerSample
from unmoved.core.errors import UnmovedError, flag_field, keep_field, number_field, require_seed, whole_field
from unmoved.core.preconditions import require_loss
from unmoved.core.protocols import QUERIES, Term
from unmoved.core.threat import ThreatModel, require_threat
from unmoved.core.views import Views
from unmoved.terms import Margin

# After each of these iterations the share of the image that a window covers is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
SCHEDULED = 10_000
# Iterations whose random numbers are drawn at once; broken samples leave the computation between them.
BLOCK = 25
# Proposals a pass where patches are computed, several of a sample if need be.
TOGETHER = 256


@dataclass(frozen=True)
class Square:
    """The Square attack (Andriushchenko et al. 2020, algorithms 1-3): random search, without any gradient.

    Each proposal changes one window of side ``sqrt(p h w)`` (in l2 and l1 it moves mass between two) and is kept where
    the loss rises or the sample becomes misclassified; a misclassified sample is done. ``p`` is halved after 10, 50,
    200, 500, 1000, 2000, 4000, 6000 and 8000 iterations.

    Args:
        threat: the ball.
        queries: images that the model sees for each sample and restart at most, the start included.
        p: share of the image that the first windows cover.
        restarts: independent searches; a success is final.
        loss: the term of the adversarial view to maximise; the margin, as in AutoAttack.
        rescale_schedule: whether the schedule of ``p`` is stretched from 10000 iterations to ``queries``.
        seed: keys the proposals.

    Raises:
        UnmovedError: a value outside its bounds; images that are not (B, C, H, W).

    Deviations: each sample has windows and signs of its own (the authors' code shares them within a batch). A window
    may reach the last row and column, as in the paper (the code never moves them). The code asks once more than
    ``queries``. A proposal that changes no pixel is not computed, since a deterministic model would repeat itself, but
    counts as a query. A rise within the rounding of the loss does not count. In linf on a CPU the first layers are
    computed only where a window reaches, if that is cheaper (`Incremental`): a few queries are computed both ways
    first, each success is confirmed by a pass over the whole image, and proposals that share a pass with one that is
    kept are computed again later; each counts once.
    """

    threat: ThreatModel
    queries: int = 5000
    p: float = 0.8
    restarts: int = 1
    loss: Term = Margin()
    rescale_schedule: bool = False
    seed: int = 0
    kind = QUERIES

    def __post_init__(self) -> None:
        require_threat("Square.threat", self.threat)
        require_loss("Square.loss", self.loss)
        whole_field(self, "Square.queries", at_least=1)
        number_field(self, "Square.p", above=0, at_most=1)
        whole_field(self, "Square.restarts", at_least=1)
        flag_field(self, "Square.rescale_schedule")
        keep_field(self, "Square.seed", require_seed)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        with searching(model, batch, self.threat) as views, torch.no_grad():
            if views.x.ndim != 4:
                came = tuple(views.x.shape)
                raise UnmovedError(f"Square: expected images (B, C, H, W), came {came}; windows need both")
            if self.threat.radius == 0:
                return views.x.clone()
            best, rest = Best(), torch.arange(len(batch), device=batch.x.device)
            for restart in range(self.restarts):
                best.offer(*self._search(views if restart == 0 else views.take(rest), restart), rest)
                rest = torch.nonzero(~best.wrong).flatten()
                if len(rest) == 0:
                    break
            return best.x if best.x is not None else batch.x

    def _search(self, base: Views, restart: int) -> tuple[Image, PerSample, Tensor]:
        """Return the best images (B, C, H, W), their losses (B,) and which are misclassified (B,)."""
        start, kind = (stripes, Flips) if self.threat.norm == "linf" else (mosaic, Tiles)
        stream = restart << 32
        x_best = start(self.threat, base.batch, self.seed, stream)
        # In l2 and l1 a proposal changes every pixel, since it is scaled.
        with first_layers(base.model, x_best, self.threat.norm == "linf") as layers:
            value, logits = value_at(base, x_best, self.loss)
        wrong = broken(base.model, x_best, logits, base.y)
        rows = torch.arange(len(wrong), device=wrong.device)
        part, known, was = base, Incremental(base.model, [], x_best, 1), 0
        for first, length, side in self._blocks(*x_best.shape[2:]):
            kept = torch.nonzero(~wrong[rows]).flatten()
            if len(kept) == 0:
                break
            if len(kept) < len(rows):
                rows = rows[kept]
                part = base.take(rows)
                known.take(kept)
            if side != was:
                known, was = Incremental(base.model, [] if known.is_wrong else layers, x_best[rows], side), side
            propose = kind(self.threat, part.batch, Draws(side, length, self.seed, stream + 1 + first))
            x_best[rows], value[rows], wrong[rows] = self._block(
                part, propose, length, x_best[rows], value[rows], known
            )
        return x_best, value, wrong

    def _block(
        self, base: Views, propose: Flips | Tiles, length: int, x_best: Image, value: PerSample, known: Incremental
    ) -> tuple[Image, PerSample, Tensor]:
        """Iterate over samples that are not misclassified; ``x_best`` and ``value`` are written to.

        With patches a query is cheap compared with the overhead of a call, so several iterations of a sample share a
        pass if few proposals are kept. Proposals after the first one kept started from an image that has changed:
        they are discarded and made anew.
        """
        wrong, layout = torch.zeros_like(value, dtype=torch.bool), _layout(base.model)
        at, together, asked, changed = torch.zeros_like(base.y), 1, 0, 0
        while len(left := torch.nonzero(~wrong & (at < length)).flatten()):
            turns = at.index_select(0, left)[:, None] + torch.arange(together, device=at.device)
            row, column = torch.nonzero(turns < length, as_tuple=True)
            rows, turns = left.index_select(0, row), turns[row, column]
            at[left] += together
            which, x_new = propose(x_best, rows, turns)
            if len(which) == 0:
                continue
            rows, turns = rows.index_select(0, which), turns.index_select(0, which)
            part = base if together == 1 and len(rows) == len(wrong) else base.take(rows)
            x_new = x_new.contiguous(memory_format=layout)
            logits = known.logits(x_new, rows, *propose.place(rows, turns)) if known.is_on else None
            new, logits = value_at(part, x_new, self.loss, logits)
            lost = logits.argmax(dim=1) != part.y
            if lost.any():  # rarely
                lost = broken(base.model, x_new, logits, part.y)
            if known.is_on:
                lost = _confirmed(part, x_new, lost)
            old = value.index_select(0, rows)
            better = torch.nonzero(lost | (new - old > 32 * torch.finfo(new.dtype).eps * old.abs())).flatten()
            kept = rows.index_select(0, better)
            is_first = torch.ones_like(kept, dtype=torch.bool)
            is_first[1:] = kept[1:] != kept[:-1]
            better, kept = better[is_first], kept[is_first]
            for best, proposed in ((x_best, x_new), (value, new), (wrong, lost), (at, turns + 1)):
                best.index_copy_(0, kept, proposed.index_select(0, better))
            if known.is_on:
                known.accept(kept, better)
                # At most about a fifth is discarded.
                asked, changed = asked + len(rows), changed + len(kept)
                together = max(1, min(TOGETHER // len(left), asked // (2 * changed + 1)))
        return x_best, value, wrong

    def _blocks(self, height: int, width: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first iteration, number of iterations, side of the window) of blocks, the side constant in each."""
        for halvings, stretch in itertools.groupby(range(self.queries - 1), self._halvings):
            side = round(math.sqrt(self.p / 2**halvings * height * width))
            # A tile has two halves and a middle.
            side = max(side, 1) if self.threat.norm == "linf" else max(side + (side % 2 == 0), 3)
            iterations = list(stretch)
            for first in range(0, len(iterations), BLOCK):
                block = iterations[first : first + BLOCK]
                yield block[0], len(block), min(side, height, width)

    def _halvings(self, iteration: int) -> int:
        scheduled = int(iteration / self.queries * SCHEDULED) if self.rescale_schedule else iteration
        return sum(scheduled > threshold for threshold in HALVINGS)


def _confirmed(views: Views, x_adv: Image, lost: Tensor) -> Tensor:
    """Return which of the ``lost`` proposals are misclassified in a pass over whole images, too, (B,) bool."""
    asked = torch.nonzero(lost).flatten()
    if len(asked) == 0:
        return lost
    few, x = views.take(asked), x_adv.index_select(0, asked)
    with torch.no_grad():
        wrong = broken(few.model, x, few.at(x).adv, few.y)
    return torch.zeros_like(lost).index_copy_(0, asked, wrong)


def _layout(model: nn.Module) -> torch.memory_format:
    """Return the memory format of the model's convolutions, so that the first of them need not convert the images."""
    turned = torch.channels_last
    kernels = (p for p in model.parameters() if p.ndim == 4 and not p.is_contiguous())
    return turned if any(p.is_contiguous(memory_format=turned) for p in kernels) else torch.contiguous_format
