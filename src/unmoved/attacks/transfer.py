"""Attack a model with images that were made against another model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from unmoved.attacks.call_signature import takes_images
from unmoved.attacks.gradients import require_attackable
from unmoved.attacks.pgd import PGD
from unmoved.core.batch import Batch, Image
from unmoved.core.errors import UnmovedError
from unmoved.core.preconditions import require_callable
from unmoved.core.protocols import TRANSFER, Attack, is_minimum_norm, leaves_ball
from unmoved.core.threat import ThreatModel, require_threat, with_threat


@dataclass(frozen=True)
class Transfer:
    """An attack on a source model, its result proposed as it is (Szegedy et al. 2014; Papernot et al. 2016).

    ``x' = attack(source, x)``. The attacked model is not used, so that masked gradients do not matter: if a transferred
    attack succeeds more often than one on the model itself, the latter attack is too weak.

    Args:
        threat: the ball; it replaces the threat model of ``attack`` wherever that has one.
        source: the model that is attacked instead; it is left as it was.
        attack: any attack; ``None`` is `PGD` with 50 steps that keeps its best point.

    Raises:
        UnmovedError: a source that is no ``nn.Module``; a source and images on different devices.
    """

    threat: ThreatModel
    source: nn.Module
    attack: Attack | None = None
    kind = TRANSFER

    def __post_init__(self) -> None:
        require_threat("Transfer.threat", self.threat)
        if self.attack is not None:
            require_callable("Transfer.attack", self.attack, "model, batch")
        if not isinstance(self.source, nn.Module):
            raise UnmovedError(f"Transfer.source: expected an nn.Module, came {type(self.source).__name__}")

    def __repr__(self) -> str:
        """Name the source by its weights, so that recorded outcomes are not mistaken for those of another source."""
        digest = hashlib.sha256()
        for name, tensor in self.source.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        source = f"<{type(self.source).__name__} {digest.hexdigest()[:12]}>"
        return f"Transfer(threat={self.threat!r}, source={source}, attack={self.attack!r})"

    @property
    def minimum_norm(self) -> bool:
        """Return whether the attack that it runs may leave the ball."""
        return self.attack is not None and is_minimum_norm(self.attack)

    @property
    def leaves_ball(self) -> bool:
        """Return whether the attack that it runs leaves the ball by design."""
        return self.attack is not None and leaves_ball(self.attack)

    @takes_images
    def __call__(self, model: nn.Module, batch: Batch) -> Image:
        require_attackable(model, batch, self.threat)
        for tensor in (*self.source.parameters(), *self.source.buffers()):
            if tensor.device != batch.x.device:
                raise UnmovedError(
                    f"Transfer.source: expected a model on {batch.x.device}, where the images are, came one on "
                    f'{tensor.device}; move it with source.to("{batch.x.device}")'
                )
        attack = self.attack or PGD(self.threat, steps=50, keep="best")
        return (with_threat(attack, self.threat) or attack)(self.source, batch)
