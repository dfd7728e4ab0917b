"""Auto-PGD's step with momentum, by hand."""

from __future__ import annotations

import pytest
import torch

from unmoved.attacks import APGD
from unmoved.attacks.apgd_steps import MomentumSteps, with_momentum
from unmoved.core.threat import ThreatModel


@pytest.mark.parametrize(("step", "expected"), [(0, 0.56), (1, 0.555), (7, 0.555)])
def test_a_quarter_of_a_step_goes_on_as_the_last_one_went_but_for_the_first(step: int, expected: float) -> None:
    """z = 0.52 + 0.04; 0.52 + 0.75 (z - 0.52) + 0.25 (0.52 - 0.50)."""
    x, x_adv, x_old = (torch.full((1, 1, 2, 2), value, dtype=torch.float64) for value in (0.5, 0.52, 0.5))
    moved = with_momentum(ThreatModel("linf", 0.1), x, x_adv, x_old, torch.ones_like(x), 0.04, step)
    assert torch.allclose(moved, torch.full_like(x, expected))


def test_large_balls_come_first_and_the_last_is_its_own() -> None:
    """Croce and Hein 2021, section 4.2: 30 % of the steps in 3 eps, 30 % in 2 eps, the rest in eps."""
    sizes = {steps: APGD(ThreatModel("l1", 2.0), steps=steps, large_first=True)._phases() for steps in (10, 100)}
    for steps, phases in sizes.items():
        assert [(ball.norm, ball.radius) for ball, _ in phases] == [("l1", 6.0), ("l1", 4.0), ("l1", 2.0)]
        assert [count for _, count in phases] == [0.3 * steps, 0.3 * steps, 0.4 * steps]
    assert APGD(ThreatModel("l1", 2.0), steps=10)._phases() == [(ThreatModel("l1", 2.0), 10)]


def by_the_paper(start, values, slopes, eps, steps, compat):
    """Croce and Hein 2020, algorithm 1, for one pixel around 0, where each iterate meets the next of ``values``.

    Returns:
        The iterates, and what halved the step at each checkpoint: "rises", "stuck", "too early to be stuck" or "".
    """

    def project(v):
        return max(min(v, eps), -eps)

    interval, at, old, size = max(int(0.22 * steps), 1), start, start, 2 * eps
    value, slope = values[0], slopes[0]
    losses, best, checked, reduced, since = [0.0 if compat else value], (value, start, slope), value, True, 0
    path, reasons = [], []
    for step in range(steps):
        z = project(at + size * ((slope > 0) - (slope < 0)))
        share = 0.75 if step else 1.0
        old, at = at, project(at + share * (z - at) + (1 - share) * (at - old))
        path.append(at)
        value, slope, since = values[step + 1], slopes[step + 1], since + 1
        losses.append(value)
        if value > best[0]:
            best = (value, at, slope)
        if since < interval:
            continue
        few = sum(losses[-j] > losses[-j - 1] for j in range(1, interval + 1)) <= 0.75 * interval
        same = checked >= best[0]
        stuck = same and not reduced
        reasons.append("rises" if few else "stuck" if stuck else "too early to be stuck" if same else "")
        reduced, checked, since = few or stuck, best[0], 0
        interval = max(interval - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
        if reduced:
            size, (_, at, slope) = size / 2, best
    return path, reasons


@pytest.mark.parametrize("compat", [False, True])
def test_auto_pgd_is_the_papers_loop(compat: bool) -> None:
    """T27: over losses and slopes that are drawn, so that every rule of a checkpoint decides somewhere."""
    samples, steps, eps = 60, 100, 0.1
    draw = torch.Generator().manual_seed(0)
    rising = torch.linspace(0.5, 1.0, samples, dtype=torch.float64)
    rises = torch.rand(steps, samples, generator=draw, dtype=torch.float64) < rising
    values = torch.cat([torch.zeros(1, samples, dtype=torch.float64), torch.where(rises, 0.1, -0.5).cumsum(0)])
    values[0, ::2] = 5.0  # a start that is not reached again for long
    slopes = torch.randn(steps + 1, samples, generator=draw, dtype=torch.float64)
    x = torch.zeros(samples, 1, 1, 1, dtype=torch.float64)
    start = (0.2 * torch.rand(samples, generator=draw, dtype=torch.float64) - 0.1).reshape(x.shape)
    slope = slopes[0].reshape(x.shape)
    threat = ThreatModel("linf", eps, bounds=(-9.0, 9.0))
    pace, at, path = MomentumSteps(threat, x, start, values[0], slope, steps, compat), start, []
    for step in range(steps):
        at = pace.move(at, slope, step)
        path.append(at.flatten())
        at, slope = pace.observe(at, values[step + 1], slopes[step + 1].reshape(x.shape), step)
    reasons = set()
    for i in range(samples):
        columns = values[:, i].tolist(), slopes[:, i].tolist()
        expected, why = by_the_paper(float(start[i]), *columns, eps, steps, compat)
        assert torch.stack(path)[:, i].tolist() == pytest.approx(expected, abs=1e-12)
        reasons |= set(why)
    assert reasons == {"rises", "stuck", "too early to be stuck", ""}
