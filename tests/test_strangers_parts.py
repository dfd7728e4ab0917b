"""A stranger's own term, attack, defense, model, data and optimizer: no file of ours changes, and nothing is imported
that the user did not allow by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import RECIPE, recipe, unmoved

from unmoved.runs.folder import Run
from unmoved.testing import check_attack, check_defense, check_term

MARK = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"
LAB = {
    "__init__": "",
    "losses": """
from dataclasses import dataclass
import torch.nn.functional as F

@dataclass(frozen=True)
class Entropy:
    floor: float = 0.0

    def __call__(self, views):
        p = F.log_softmax(views.adv, dim=1)
        return F.cross_entropy(views.adv, views.y, reduction="none") - 0.1 * (p.exp() * p).sum(dim=1) + self.floor

def not_a_term(number):
    return number
""",
    "attacks": """
class Shift:
    '''Adds a constant, brighter or darker by the label's parity.'''
    kind = "queries"

    def __init__(self, threat, seed, share=1.0):
        self.threat, self.seed, self.share = threat, seed, share

    def __call__(self, model, batch):
        sign = (batch.y % 2 * 2 - 1)[:, None, None, None]
        return self.threat.project(batch.x + self.share * self.threat.radius * sign, batch.x)

class Far(Shift):
    def __call__(self, model, batch):
        return (batch.x + 0.5).clamp(0, 1)
""",
    "defenses": """
from dataclasses import dataclass

@dataclass(frozen=True)
class Clipped:
    '''The ordinary step with a gradient of length at most ``most``.'''
    most: float = 1.0

    def __call__(self, model, optimizer, backward):
        import torch
        optimizer.zero_grad()
        loss = backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.most)
        optimizer.step()
        return loss
""",
    "nets": """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, num_classes, width: int = 8):
        super().__init__()
        c, h, w = shape
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, width), nn.Tanh(), nn.Linear(width, num_classes))

    def forward(self, x):
        return self.body(x)

def nothing(**given):
    return None
""",
    "data": """
import torch
from unmoved.data import ArraySplit, DataSet

def squares(n=200, seed=0):
    draw = torch.Generator().manual_seed(seed)
    def part(count):
        y = torch.randint(3, (count,), generator=draw)
        x = 0.4 * torch.rand(count, 1, 6, 6, generator=draw)
        for k in range(3):
            x[y == k, :, 2 * k : 2 * k + 2] += 0.5
        return ArraySplit.of(x, y, classes=["a", "b", "c"])
    return DataSet.of(part(n), part(60), "squares")

def pair():
    return 1, 2
""",
    "optim": """
import torch

class Slow:
    def __init__(self, lr):
        self.lr = lr

    def __call__(self, groups):
        return torch.optim.RMSprop(groups, lr=self.lr)
""",
    "torn": "def half(:\n",
    "broken": "raise RuntimeError('no licence found')\n",
}
THEIRS = """
[data]
use = "my_lab.data:squares"
n = 150

[model]
use = "my_lab.nets:Net"
width = 12

[threat]
eps = 0.1

[training]
epochs = 2
batch_size = 32
seed = 3

[optimizer]
use = "my_lab.optim:Slow"
lr = 0.01

[attack]
use = "my_lab.attacks:Shift"
share = 0.5
eps = 0.05

[objective.mine]
use = "my_lab.losses:Entropy"
floor = 0.5
weight = 2.0

[defense]
use = "my_lab.defenses:Clipped"
most = 0.5

[validation]
use = "my_lab.attacks:Shift"

[evaluation.attacks.shift]
use = "my_lab.attacks:Shift"

[evaluation.attacks.pgd]
use = "pgd"
steps = 2
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the stranger's package, from which the command is run."""
    (tmp_path / "my_lab").mkdir()
    for name, text in LAB.items():
        (tmp_path / "my_lab" / f"{name}.py").write_text((MARK if name not in ("torn",) else "") + text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def imported(lab: Path) -> set[str]:
    return {path.stem for path in lab.rglob("*.imported")}


def test_everything_may_be_theirs(lab: Path) -> None:
    recipe(lab, THEIRS, "theirs")
    said = unmoved("train", "theirs.toml", "--out", "run", "--allow", "my_lab").fine()
    assert "\nepoch 1/2: loss" in said.out
    assert said.out.startswith("note: training ends with attacks within eps 0.05")  # half of what judges
    assert imported(lab) == {"__init__", "data", "nets", "attacks", "losses", "defenses", "optim"}
    run = Run.open("run")
    log = run.metrics
    assert log["loss"].tolist() == pytest.approx((2 * log["parts.entropy"]).tolist())
    assert (log["parts.entropy"] > 0.5).all()  # its argument arrived
    assert log["eps"].tolist() == [0.05, 0.05]  # its own eps, not that of the recipe
    unmoved("evaluate", "run", "--allow", "my_lab").fine()
    assert run.evaluation["attacks"].keys() == {"shift", "pgd"}
    assert run.evaluation["classes"] == ["a", "b", "c"]
    assert run.evaluation["kinds"] == {"shift": {"shift": "queries"}, "pgd": {"pgd": "fixed-step gradients"}}
    unmoved("report", "run").fine()  # reads tables, imports nothing
    assert (lab / "report.html").exists()
    unmoved("train", "theirs.toml", "--out", "run", "--resume", "--allow", "my_lab").fine()


def test_threat_seed_shape_and_classes_are_given_to_who_asks(lab: Path) -> None:
    from unmoved.runs import recipe as config
    from unmoved.runs.assembly import Assembly

    built = Assembly(config.read(recipe(lab, THEIRS)), allow=["my_lab"])
    method = built.phases.at(0, 2)
    assert (method.attack.threat.radius, method.attack.seed, method.attack.share) == (0.05, 3, 0.5)
    assert built.check.threat == built.threat
    assert built.model().body[1].weight.shape == (12, 36)
    assert built.num_classes == 3


def test_strangers_may_sit_the_exam(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(lab))
    from my_lab import attacks, defenses, losses  # type: ignore[import-not-found]

    check_term(losses.Entropy())
    check_attack(lambda threat: attacks.Shift(threat, seed=0), maximises=False)
    check_defense(defenses.Clipped())


@pytest.mark.parametrize("allowed", [(), ("--allow", "my_other_lab"), ("--allow", "my_lab.losses")])
def test_nothing_is_imported_that_was_not_allowed(lab: Path, allowed: tuple[str, ...]) -> None:
    recipe(lab, RECIPE.replace("[objective.ce]", '[objective.mine]\nuse = "my_lab.losses:Entropy"'))
    message = unmoved("train", "tiny.toml", "--out", "run", *allowed).mistake()
    assert "'my_lab.losses:Entropy', which is not part of unmoved" in message
    assert message.endswith("repeat the command with --allow my_lab")
    assert imported(lab) == set()
    assert not (lab / "run").exists()


def test_neither_show_nor_report_nor_evaluate_imports_unasked(lab: Path) -> None:
    recipe(lab, RECIPE.replace("[objective.ce]", '[objective.mine]\nuse = "my_lab.losses:Entropy"'))
    assert "my_lab.losses:Entropy" in unmoved("show", "tiny.toml").fine().out
    assert imported(lab) == set()
    unmoved("train", "tiny.toml", "--out", "run", "--allow", "my_lab").fine()
    for path in lab.rglob("*.imported"):
        path.unlink()
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]
    assert "--allow my_lab" in unmoved("evaluate", "run").mistake()
    assert imported(lab) == set()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("my_lab.losses:Entropy", "my_lab.lossess:Entropy", "cannot import 'my_lab.lossess' (No module named"),
        ("my_lab.losses:Entropy", "my_lab.losses:Entrophy", "my_lab.losses has no 'Entrophy'; did you mean 'Entropy'?"),
        ("my_lab.losses:Entropy", "my_lab.torn:Entropy", "cannot import 'my_lab.torn' (SyntaxError: "),
        ("my_lab.losses:Entropy", "my_lab.broken:Entropy", "cannot import 'my_lab.broken' (RuntimeError: no licence"),
        ("floor = 0.5", "flor = 0.5", "unexpected keyword argument 'flor'; its arguments are the other keys"),
        ("lr = 0.01", "", "it needs lr: lr = VALUE in the same table"),
        ("my_lab.nets:Net", "my_lab.nets:nothing", "expected a function that returns an nn.Module, came NoneType"),
        ("my_lab.data:squares\"\nn = 150", "my_lab.data:pair\"", "function that returns a DataSet, came tuple"),
        ("my_lab.losses:Entropy\"\nfloor = 0.5", "my_lab.losses:not_a_term\"\nnumber = 1", "expected a term"),
        ("my_lab.losses:Entropy", "my_lab.losses:F", "my_lab.losses:F"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(lab: Path, old: str, new: str, words: str) -> None:
    assert old in THEIRS
    recipe(lab, THEIRS.replace(old, new), "theirs")
    message = unmoved("train", "theirs.toml", "--out", "run", "--allow", "my_lab").mistake()
    assert words in message
    assert not (lab / "run").exists()


def test_a_strangers_attack_that_leaves_the_ball_is_not_counted(lab: Path) -> None:
    recipe(lab, THEIRS.replace("[evaluation.attacks.shift]\nuse = \"my_lab.attacks:Shift\"",
                               "[evaluation.attacks.far]\nuse = \"my_lab.attacks:Far\""), "theirs")  # fmt: skip
    unmoved("train", "theirs.toml", "--out", "run", "--allow", "my_lab").fine()
    message = unmoved("evaluate", "run", "--allow", "my_lab").mistake()
    assert "attack 'far' left the threat model: distance 0.5 > eps 0.1" in message
    assert Run.open("run").evaluation is None


def test_a_strangers_attack_of_an_unknown_kind_is_named_before_it_is_run(lab: Path) -> None:
    recipe(lab, THEIRS, "theirs")
    unmoved("train", "theirs.toml", "--out", "run", "--allow", "my_lab").fine()
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]
    (lab / "my_lab" / "attacks.py").write_text(LAB["attacks"].replace('kind = "queries"', 'kind = "query"'))
    message = unmoved("evaluate", "run", "--allow", "my_lab").mistake()
    assert "Shift.kind: unknown value 'query'; did you mean 'queries'?" in message
    assert Run.open("run").evaluation is None


def test_a_strangers_code_that_changed_under_a_run_is_named(lab: Path) -> None:
    """The recipe is the same, the model it names is not."""
    recipe(lab, THEIRS, "theirs")
    unmoved("train", "theirs.toml", "--out", "run", "--allow", "my_lab", "--set", "training.epochs=2").fine()
    state = Run.open("run").load_state()
    Run.open("run").save_state(state | {"epochs": 1})
    Path("run/metrics.jsonl").unlink()  # with a whole log nobody would look at the state
    (lab / "my_lab" / "nets.py").write_text(LAB["nets"].replace("nn.Tanh()", "nn.Linear(width, width)"))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]
    message = unmoved("train", "theirs.toml", "--out", "run", "--resume", "--allow", "my_lab").mistake()
    assert "the state of another model" in message
    assert "these are the weights of another model" in unmoved("evaluate", "run", "--allow", "my_lab").mistake()
