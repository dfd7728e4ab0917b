"""Auto-PGD's step with momentum, by hand."""

from __future__ import annotations

import pytest
import torch

from unmoved.attacks.apgd_steps import with_momentum
from unmoved.core.threat import ThreatModel


@pytest.mark.parametrize(("step", "expected"), [(0, 0.56), (1, 0.555), (7, 0.555)])
def test_a_quarter_of_a_step_goes_on_as_the_last_one_went_but_for_the_first(step: int, expected: float) -> None:
    """z = 0.52 + 0.04; 0.52 + 0.75 (z - 0.52) + 0.25 (0.52 - 0.50)."""
    x, x_adv, x_old = (torch.full((1, 1, 2, 2), value, dtype=torch.float64) for value in (0.5, 0.52, 0.5))
    moved = with_momentum(ThreatModel("linf", 0.1), x, x_adv, x_old, torch.ones_like(x), 0.04, step)
    assert torch.allclose(moved, torch.full_like(x, expected))
