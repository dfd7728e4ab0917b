"""The table of docs/attacks/README.md says what an attack costs: forward and backward passes an image, at most."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cli import ROOT
from torch import Tensor, nn

from unmoved import Batch, ThreatModel, UnmovedError, attacks

ROW = re.compile(r"^\| \[.*?\]\((\w+)\.md\) \| .*? \| ([\w, ]+) \| (?:about )?([\d,]+) and ([\d,]+)", re.MULTILINE)
TABLE = {row[0]: row[1:] for row in ROW.findall((ROOT / "docs/attacks/README.md").read_text())}
NAMES = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): name for name in attacks.__all__}
EXACT = {"pgd", "fgsm", "nfgsm", "prior_fgsm", "apgd", "spsa", "iaat", "transfer"}  # nothing ends them early


class Counted(torch.autograd.Function):
    passes = [0, 0]

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        Counted.passes[0] += len(x)
        return x.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        Counted.passes[1] += len(gradient)
        return gradient


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(Counted.apply(x))


def passes(name: str, threat: ThreatModel, model: nn.Module, batch: Batch) -> tuple[float, float]:
    attack = getattr(attacks, NAMES[name])
    made = attack(threat, model) if name == "transfer" else attack(threat)
    Counted.passes = [0, 0]
    made(model, batch)
    return Counted.passes[0] / len(batch.x), Counted.passes[1] / len(batch.x)


@pytest.fixture(scope="module")
def case() -> tuple[Net, Batch]:
    """A network and images, none of which is misclassified."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net().eval(), torch.rand(4, 1, 8, 8)
    return model, Batch(x, model(x).argmax(dim=1))


def test_every_attack_has_a_row() -> None:
    assert set(TABLE) == set(NAMES) - {"sensible", "friendly", "stopping_rule"}


def row(name: str) -> tuple[int, int]:
    forward, backward = (int(number.replace(",", "")) for number in TABLE[name][1:])
    return forward, backward


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"auto_attack", "cw"}))
def test_an_attack_costs_what_the_page_says(name: str, case: tuple[Net, Batch]) -> None:
    """In a ball so small that nothing breaks."""
    threats = [ThreatModel(norm, 1e-4) for norm in TABLE[name][0].split(", ")]
    for threat in threats if name in EXACT else threats[:1]:
        found = passes(name, threat, *case)
        most = row(name)
        assert found == most if name in EXACT else found[0] <= most[0] and found[1] <= most[1], threat
    for threat in threats if name != "transfer" else []:
        getattr(attacks, NAMES[name])(threat)
    for norm in {"linf", "l2", "l1"} - {threat.norm for threat in threats}:
        with pytest.raises(UnmovedError):
            getattr(attacks, NAMES[name])(ThreatModel(norm, 0.1))


def test_those_of_many_passes_cost_the_sum_of_their_parts() -> None:
    """AutoAttack: APGD once, and on 9 targets, FAB and Square; Carlini and Wagner: as many searches as settings say."""
    parts = [10 * a + b + c for a, b, c in zip(row("apgd"), row("fab"), row("square"), strict=True)]
    assert row("auto_attack") == pytest.approx(parts, rel=0.01)
    cw = attacks.CW(ThreatModel("l2", 0.5))
    assert row("cw") == pytest.approx((cw.search_steps * (cw.steps + 1), cw.search_steps * cw.steps), abs=2)


def test_quick_is_dear_where_the_boundary_is_near(case: tuple[Net, Batch]) -> None:
    model, batch = case
    one = Batch(batch.x[:1], batch.y[:1])
    distance = (attacks.FMN(ThreatModel("linf", 1.0))(model, one) - one.x).abs().max()
    assert passes("quick", ThreatModel("linf", 0.95 * float(distance)), model, one) == pytest.approx(
        row("quick"), rel=0.05
    )
