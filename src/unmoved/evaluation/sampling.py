"""Sample survivors of a cheap attack for an expensive one: those nearest to the boundary, and a draw of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from unmoved.core import noise
from unmoved.evaluation.estimate import Estimate

NEAR = 0.1  # share of the sample that goes to the nearest survivors
STREAM = 7_000_003  # the stream of noise that orders the survivors


class Design(NamedTuple):
    """Hold the positions in the data of the survivors that the expensive attack is run on.

    Attributes:
        near: the nearest survivors, all of them.
        drawn: a simple random sample of the others.
    """

    near: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class Survivors:
    """Hold the samples that the cheap attack left robust, with the estimated distance of each to the boundary.

    Args:
        position: (N,) in the data.
        index: (N,) identities, which key the draw.
        distance: (N,) estimated, to the decision boundary; infinity where no boundary was found.
        seed: keys the draw.
    """

    position: np.ndarray
    index: np.ndarray
    distance: np.ndarray
    seed: int = 0

    def __len__(self) -> int:
        return len(self.position)

    def design(self, sample: int) -> Design:
        """Choose ``sample`` survivors, by seed, identities and distances alone; a larger sample contains a smaller one.

        Those drawn are the first in a random order; in a larger sample more of them count as near.
        """
        near = self._near(sample)
        by_distance = np.lexsort((self.index, self.distance))
        draw = noise.uniform(torch.from_numpy(self.index.astype(np.int64)), (2,), seed=self.seed, stream=STREAM).numpy()
        others = by_distance[near:]
        shuffled = others[np.lexsort((self.index[others], draw[others, 1], draw[others, 0]))]
        return Design(self.position[by_distance[:near]], self.position[shuffled[: max(sample - near, 0)]])

    def smallest(self, within: float, n: int, far_broken: int, error: float) -> int:
        """Return the smallest sample whose interval reaches ``within`` of ``n`` from the estimate, or all survivors.

        Args:
            far_broken: the broken samples among the far ones that are counted with.
            error: as in `Estimate`.
        """
        low, high = min(len(self), far_broken + 1), len(self)
        while low < high:
            middle = (low + high) // 2
            near = self._near(middle)
            far = middle - near
            if far >= far_broken and Estimate(n, len(self), near, 0, far, far_broken, error).half_width <= within:
                high = middle
            else:
                low = middle + 1
        return low

    def _near(self, sample: int) -> int:
        """Return how many survivors count as near: a share of the sample, and none without a boundary."""
        return min(round(NEAR * sample), int(np.isfinite(self.distance).sum()))


def together(cheap: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """Return the outcomes of a cheap attack and of both together, as another attack with the name of the second.

    A sample that the second was not asked about stands there as the first left it: the table is no verdict of the
    second, and what it leaves robust is more than `Estimate.left`.

    Args:
        cheap: outcomes of one attack on all samples.
        asked: outcomes of another one on some of them.
    """
    both = cheap.assign(attack=str(asked["attack"].iloc[0])).set_index("index")
    won = asked[asked["success"] & (asked["clean_prediction"] == asked["label"])].set_index("index")
    columns = ["adversarial_prediction", "distance", "success", "by"]
    both.loc[won.index, columns] = won[columns]
    return pd.concat([cheap, both.reset_index()[list(cheap.columns)]], ignore_index=True)
