"""Remember a tensor for each sample by its identity, the same in every process that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from unmoved.core import collectives
from unmoved.core.batch import Index


class SampleMemory:
    """Store one row per sample seen, by its identity, which may be any 64-bit number, such as a hash."""

    def __init__(self) -> None:
        # Rows are stored in order of arrival, with spare room at the end; the sorted identities point to them.
        self._index, self._place = (torch.empty(0, dtype=torch.int64) for _ in range(2))
        self._rows = torch.empty(0)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: Index, default: Tensor) -> Tensor:
        """Return the rows (B, ...) of these samples; those of ``default`` (B, ...) for samples not seen before."""
        if not len(self):
            return default
        place, is_known = self._places(index)
        return torch.where(is_known.reshape(-1, *[1] * (default.ndim - 1)), self._rows[place], default)

    def write(self, index: Index, rows: Tensor) -> None:
        """Remember the rows (B, ...) of these samples, and of those that the other processes have in this batch."""
        # Another process may have the sample in the next epoch, so every process remembers all rows.
        index, rows = collectives.gathered(index), collectives.gathered(rows)
        is_new = ~self._places(index)[1] if len(self) else torch.ones_like(index, dtype=torch.bool)
        if is_new.any():
            self._make_room(index[is_new].unique(), rows)
        self._rows[self._places(index)[0]] = rows

    def _places(self, index: Index) -> tuple[Tensor, Tensor]:
        """Return where the rows of these samples stand, on their device, and which of them are there at all."""
        self._index, self._place, self._rows = (
            tensor.to(index.device) for tensor in (self._index, self._place, self._rows)
        )
        found = torch.searchsorted(self._index, index).clamp_max(len(self) - 1)
        return self._place[found], self._index[found] == index

    def _make_room(self, new: Index, like: Tensor) -> None:
        before, after = len(self), len(self) + len(new)
        if after > len(self._rows):  # double the room, so that each row is moved only a few times
            wider = like.new_zeros(max(after, 2 * before), *like.shape[1:])
            if before:
                wider[:before] = self._rows[:before]
            self._rows = wider
        places = torch.arange(before, after, device=new.device)
        self._index, order = torch.cat([self._index.to(new), new]).sort()
        self._place = torch.cat([self._place.to(new), places])[order]

    def state(self) -> tuple[Index, Tensor]:
        """Return the identities (N,) and their rows (N, ...), in the order of these."""
        return self._index, self._rows[self._place]

    def load(self, index: Index, rows: Tensor) -> None:
        """Restore the memory from what `state` returned."""
        self._index, order = index.clone().sort()
        self._place, self._rows = order, rows.clone()
