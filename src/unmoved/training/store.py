"""Define the protocol that training saves through, so that it depends on no run folder: `unmoved.Run` is one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import nn

from unmoved.training.log import Log
from unmoved.training.state import SavedState, Tensors


class Store(Protocol):
    """Keep a training's log, weights and state; raise `UnmovedError` where that fails."""

    @property
    def path(self) -> Path:
        """Return the place of the store, for messages."""
        ...

    @property
    def log(self) -> Log:
        """Return the records of the epochs."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Keep others from training into the same place."""
        ...

    def save_state(self, state: SavedState) -> None:
        """Save everything that resuming needs."""
        ...

    def load_state(self, *, mend: bool) -> SavedState | None:
        """Return the newest whole state, or None; damage is logged, and with ``mend`` removed."""
        ...

    def save_weights(self, model: nn.Module, which: str, state: Tensors | None = None) -> None:
        """Save the ``"best"`` or ``"last"`` weights: the model's, or those in ``state``."""
        ...

    def mend_weights(self, state: SavedState) -> None:
        """Rewrite weights that are missing or damaged, from a saved state."""
        ...

    def mend_log(self, state: SavedState) -> None:
        """Truncate the log to its length when the state was saved."""
        ...
