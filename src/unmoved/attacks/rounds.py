"""Run the restarts and targets of an attack in rounds, several stacked in one pass where few samples are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmoved.attacks.gradients import Best
from unmoved.core.batch import Batch, Image
from unmoved.core.views import Views, ranked_wrong

ROWS = 128  # at about this batch size a small network is fastest per image on a CPU
ROWS_ON_DEVICE = 1024
COMPACT_EVERY = 10  # steps between compactions on a device, where each one waits for the device


def compacts(device: torch.device, step: int) -> bool:
    """Return whether rows that are done are left out after this step."""
    return device.type == "cpu" or step % COMPACT_EVERY == COMPACT_EVERY - 1


@dataclass(frozen=True)
class Round:
    """One attempt per sample: a restart, targeted at the wrong class of this rank by clean logits or untargeted."""

    restart: int
    rank: int | None = None

    @property
    def stream(self) -> int:
        """Return the stream of noise of this round; that of a first untargeted restart is 0."""
        return self.restart + (0 if self.rank is None else 1000 * (self.rank + 1))


def rounds_of(restarts: int, targets: int, num_classes: int) -> list[Round]:
    """List targets in the order of their clean logits, each with all its restarts; 0 targets make untargeted rounds."""
    ranks: Sequence[int | None] = range(min(targets, num_classes - 1)) if targets else [None]
    return [Round(restart, rank) for rank in ranks for restart in range(restarts)]


class Retired:
    """Track the rows that are done: broken ones, and those of later rounds for a sample that an earlier round broke.

    Earlier rounds continue, so that the result does not depend on how many rounds shared a pass.
    """

    def __init__(self, owner: Tensor) -> None:
        self.owner = owner
        self.first = torch.full((int(owner.max()) + 1,), len(owner), device=owner.device)

    def __call__(self, wrong: Tensor, position: Tensor) -> Tensor:
        """Return a mask over the rows at ``position``: those that need no further step."""
        owner = self.owner[position]
        reached = torch.where(wrong, position, len(self.owner))
        self.first = self.first.scatter_reduce(0, owner, reached, "amin")
        return position >= self.first[owner]


Start = Callable[[Batch, Round], Image]
Climb = Callable[[Views, Image, Retired | None], Best]


def in_rounds(base: Views, restarts: int, targets: int, start: Start, climb: Climb, *, until_broken: bool) -> Image:
    """Run all rounds; return the best proposal for each sample.

    Args:
        base: the views of the batch.
        start: (batch, round) -> first iterates.
        climb: (views, first iterates, which rows may stop) -> the best of each row.
        until_broken: stop attacking a sample as soon as a round broke it.
    """
    left = torch.arange(len(base.y), device=base.y.device)
    full = ROWS if left.device.type == "cpu" else ROWS_ON_DEVICE
    with torch.no_grad():
        order = ranked_wrong(base.clean, base.y) if targets else None
    waiting = rounds_of(restarts, targets, 0 if order is None else order.shape[1] + 1)
    best = Best()
    while waiting and len(left):
        together = max(1, full // len(left))
        now, waiting = waiting[:together], waiting[together:]
        few = base.take(left)
        x_start = torch.cat([start(few.batch, each) for each in now])
        rows = few if len(now) == 1 else few.take(torch.arange(len(left), device=left.device).repeat(len(now)))
        if order is not None:
            rows = rows.aim(torch.cat([order[left, each.rank] for each in now]))
        owner = torch.arange(len(left), device=left.device).repeat(len(now))
        climbed = climb(rows, x_start, Retired(owner) if until_broken else None)
        for k in range(len(now)):
            part = slice(k * len(left), (k + 1) * len(left))
            if climbed.x is not None:
                # Of two rounds that broke a sample the first is kept, as if the second had never been run.
                settled = climbed.wrong[part] & until_broken
                best.offer(climbed.x[part], climbed.value[part].masked_fill(settled, 0.0), climbed.wrong[part], left)
        if until_broken:
            left = left[~best.wrong[left]]
    return best.x if best.x is not None else base.x
