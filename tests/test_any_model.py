"""Any model is judged in one command or three lines: the same figures, a report, and one sentence for each mistake."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli import unmoved
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import unmoved as package
from unmoved import Run, UnmovedError, data, models
from unmoved.runs import components

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden: int = 16, *, deep: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(64, hidden), nn.Linear(hidden, 10)

    def forward(self, x):
        return self.b(self.a(x.flatten(1)).relu())

class Sized(Net):
    def __init__(self, width: int, colours: int) -> None:
        super().__init__(width)
"""


class Net(nn.Module):
    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def digits() -> data.ArraySplit:
    return data.digits(test=500).test


@pytest.fixture(scope="module")
def trained() -> Net:
    """A network of which some images can be broken and others cannot, on images that its loader normalised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, split = Net(), data.digits(test=500).train
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for epoch in range(4):
            for batch in split.batches(64, shuffle=epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net((batch.x - 0.3) / 0.35), batch.y).backward()
                optimizer.step()
    return net


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Net) -> Iterator[Path]:
    """What somebody has who trained elsewhere: a module and a checkpoint."""
    (tmp_path / "my_models.py").write_text(MODULE)
    torch.save(
        {"epoch": 3, "model_state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}},
        tmp_path / "net.pt",
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_models", None)  # the next test has its own


COMMAND = (
    *("judge", "my_models:Net", "--weights", "net.pt", "--data", "digits", "--data-set", "test=500", "--mean", "0.3"),
    *("--std", "0.35", "--eps", "0.1", "--n", "40", "--attacks", "fgsm,pgd(steps=3)", "--out", "runs/mine"),
    *("--allow", "my_models"),
)


def test_one_command_and_three_lines_write_the_same_figures(
    folder: Path, trained: Net, digits: data.ArraySplit
) -> None:
    said = unmoved(*COMMAND).fine().out
    assert "doctor: " in said
    assert "report: runs/mine/report.html" in said
    by_command = Run.open("runs/mine").outcomes

    model = models.normalized(trained, [0.3], [0.35])
    loader = DataLoader(TensorDataset(digits.images, digits.labels), 50)
    judgement = package.judge(model, loader, eps=0.1, attacks="fgsm,pgd(steps=3)", n=40, progress=False)

    columns = [name for name in by_command.columns if name != "index"]  # which images are which, the source alone knows
    for table in (by_command, judgement.outcomes):
        assert 0 < table["success"].sum() < len(table)
    pd.testing.assert_frame_equal(package.outcomes.summary(by_command), package.outcomes.summary(judgement.outcomes))
    assert sorted(by_command["label"]) == sorted(judgement.outcomes["label"]), columns
    assert judgement.doctor["sentence"] == json.loads(Path("runs/mine/doctor.json").read_text())["sentence"]


def test_the_folder_says_that_nothing_was_trained_and_every_command_reads_it(folder: Path) -> None:
    unmoved(*COMMAND).fine()
    recipe = Path("runs/mine/recipe.toml").read_text()
    assert "trained = false" in recipe
    assert not any(word in recipe for word in ("training", "optimizer", "schedule", "objective", "defense", "average"))
    provenance = json.loads(Path("runs/mine/provenance.json").read_text())
    assert provenance["weights"]["key"] == "model_state_dict"
    assert not Path("runs/mine/metrics.jsonl").exists()
    report = Path("runs/mine/report.html").read_text()
    assert "judged, not trained" in report
    assert 'id="training"' not in report
    Path("net.pt").unlink()  # what is needed of it is in the run folder
    unmoved("evaluate", "runs/mine", "--n", "20", "--attacks", "fgsm", "--allow", "my_models").fine()
    unmoved("doctor", "runs/mine", "--n", "20", "--allow", "my_models").fine()
    unmoved("report", "runs/mine").fine()
    unmoved("analyze", "softmax", "runs/mine", "--n", "20", "--allow", "my_models").fine()


def test_a_run_is_judged_in_other_balls_than_its_own(folder: Path, trained: Net) -> None:
    unmoved(*COMMAND).fine()
    command = ("evaluate", "runs/mine", "--n", "20", "--attacks", "pgd(steps=3)", "--allow", "my_models", "--no-doctor")
    said = unmoved(*command, "--eps", "0.02,1/5").fine().out
    assert "runs/mine/balls/linf-0.02" in said
    tables = [Run.open(f"runs/mine/balls/linf-{eps}").outcomes for eps in ("0.02", "0.2")]
    model = models.normalized(trained, [0.3], [0.35]).eval()
    split = data.digits(test=500).test.take(20, seed=0)
    for table, eps in zip(tables, (0.02, 0.2), strict=True):
        attack = package.attacks.PGD(package.ThreatModel("linf", eps), steps=3)
        expected = package.evaluate(model, split, {"pgd(steps=3)": attack}, package.ThreatModel("linf", eps))
        pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert tables[0]["success"].sum() < tables[1]["success"].sum()
    assert Run.open("runs/mine").evaluation["n"] == 40  # that of its own ball stays
    unmoved(*command, "--norm", "l2", "--eps", "0.5").fine()
    assert set(Run.open("runs/mine/balls/l2-0.5").outcomes["norm"]) == {"l2"}
    assert "expected none of --validation" in unmoved(*command, "--eps", "0.1", "--validation").mistake()
    assert "expected a number or a fraction" in unmoved(*command, "--eps", "big").mistake()
    assert "norm" in unmoved(*command, "--norm", "l3").mistake()


def test_the_same_command_goes_on_and_another_one_is_refused(folder: Path, trained: Net) -> None:
    unmoved(*COMMAND).fine()
    before = Path("runs/mine/best.safetensors").stat().st_mtime_ns
    unmoved(*COMMAND).fine()
    assert Path("runs/mine/best.safetensors").stat().st_mtime_ns == before
    other = ["0.2" if word == "0.1" else word for word in COMMAND]
    assert "holds another run (it differs in: threat)" in unmoved(*other).mistake()
    moved = ["kept.pt" if word == "net.pt" else word for word in COMMAND]
    shutil.copy("net.pt", "kept.pt")
    unmoved(*moved).fine()  # the same weights, wherever they lie
    torch.save(Net().state_dict(), "net.pt")
    assert "it differs in: the file of weights" in unmoved(*COMMAND).mistake()


BAD: dict[str, tuple[dict[str, str | None], str]] = {
    "not allowed": ({"my_models": "other_lab"}, "repeat the command with --allow my_models"),
    "no such class": ({"my_models:Net": "my_models:Nett"}, "my_models has no 'Nett'; did you mean 'Net'"),
    "needs arguments": (
        {"my_models:Net": "my_models:Sized"},
        "needs width and colours: --model-set width=VALUE",
    ),
    "unknown argument": ({"--data-set": "--model-set", "test=500": "depth=3"}, "depth.*its arguments"),
    "no data": ({"digits": "digitz"}, "did you mean 'digits'"),
    "no weights there": ({"net.pt": "nat.pt"}, "nat.pt: expected a file of weights, came none"),
    "no eps": ({"0.1": "a lot"}, "expected a number or a fraction"),
    "no attack": ({"fgsm,pgd(steps=3)": "pgdd"}, "did you mean 'pgd'"),
    "mean of bytes": ({"0.3": "78", "0.35": "89"}, "the mean of images in .0, 1., came 78; if .* divide both by 255"),
    "three colours": ({"--mean": "--mean", "0.3": "0.3,0.3,0.3", "0.35": "0.3,0.3,0.3"}, "expected images"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_on_the_command_line_ends_in_one_message_and_no_folder(folder: Path, case: str) -> None:
    changes, words = BAD[case]
    said = unmoved(*(changes.get(word, word) for word in COMMAND)).mistake()
    assert re.search(words, said), said
    assert not Path("runs/mine/recipe.toml").exists()


@pytest.mark.parametrize(
    ("outputs", "classes", "words"),
    [
        (5, None, "the model has 5 outputs, the data labels up to 9.*is it the model of this data"),
        (1000, [str(k) for k in range(10)], "the model has 1000 outputs, the data 10 classes: expected as many"),
    ],
)
def test_other_numbers_of_classes_are_refused(
    digits: data.ArraySplit, outputs: int, classes: list[str] | None, words: str
) -> None:
    with pytest.raises(UnmovedError, match=words):
        package.judge(Net(outputs), (digits.images, digits.labels), eps=0.1, n=4, classes=classes, progress=False)


def test_labels_that_begin_at_1_are_told_so(digits: data.ArraySplit) -> None:
    with pytest.raises(UnmovedError, match="number the classes from 0, as labels - 1 does"):
        package.judge(Net(), (digits.images, digits.labels + 1), eps=0.1, n=4, progress=False)


def test_weights_that_are_not_numbers_are_named_and_make_no_folder(
    trained: Net, digits: data.ArraySplit, folder: Path
) -> None:
    spoilt = copy.deepcopy(trained)
    with torch.no_grad():
        spoilt.b.bias[3] = torch.nan
    with pytest.raises(UnmovedError, match=r"expected finite logits, .*'b\.bias' among its weights hold NaN"):
        package.judge(spoilt, digits, eps=0.1, attacks="fgsm", out="runs/mine", progress=False)
    torch.save(spoilt.state_dict(), "net.pt")
    assert "'model.b.bias' among its weights hold NaN" in unmoved(*COMMAND).mistake()
    assert not Path("runs").exists()


class Unreadable(Dataset[Any]):
    def __len__(self) -> int:
        raise AssertionError("read")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({"eps": "8/25x"}, "expected a number or a fraction"),
    "norm": ({"norm": "l3"}, "norm"),
    "attack": ({"attacks": "fgsm,pdg"}, "did you mean 'pgd'"),
    "setting": ({"attacks": "pgd(stepz=3)"}, "stepz"),
    "value": ({"attacks": "pgd(steps=-1)"}, "steps"),
    "attack of another ball": ({"attacks": "pgd(eps=0.5)"}, "expected eps of at most"),
    "attack out of the ball": ({"attacks": "nfgsm"}, "leaves it by design"),
    "module": ({"attacks": "my_lab:Mine"}, "--allow my_lab"),
    "n": ({"n": 0}, "n: expected a whole number >= 1"),
    "batch size": ({"batch_size": 0}, "batch_size"),
    "sample": ({"attacks": "quick", "sample": 5}, "expected --attacks standard"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_the_question_is_said_before_data_is_read(case: str) -> None:
    settings, words = WRONG[case]
    with pytest.raises(UnmovedError, match=words):
        package.judge(Net(), Unreadable(), progress=False, **{"eps": 0.1, **settings})


@pytest.mark.parametrize("case", ["not allowed", "no such class", "no weights there", "no attack"])
def test_the_command_does_not_decode_images_for_a_mistake(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(test: int) -> None:
        raise AssertionError("read")

    monkeypatch.setitem(components.KINDS["data"], "digits", read)
    changes, words = BAD[case]
    assert re.search(words, unmoved(*(changes.get(word, word) for word in COMMAND)).mistake())


def test_data_without_names_may_lack_the_last_classes(digits: data.ArraySplit) -> None:
    few = digits.select(digits.labels < 3)
    found = package.judge(Net(), (few.images, few.labels), eps=0.1, attacks="fgsm", n=9, doctor=False, progress=False)
    assert found.run.evaluation["classes"] == [str(k) for k in range(10)]


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "in training mode": lambda model: model.train(),
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "frozen": lambda model: model.requires_grad_(False),
    "scripted": torch.jit.script,
    "a frozen script": lambda model: torch.jit.freeze(torch.jit.script(model.eval())),
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.filterwarnings(r"ignore:.*torch\.jit")  # what torch says of it, by version
def test_a_model_is_judged_as_it_comes_and_left_as_it_was(trained: Net, digits: data.ArraySplit, how: str) -> None:
    x, y = digits.images[:30], digits.labels[:30]
    net = Net()
    net.load_state_dict(trained.state_dict())
    model = WRAPPED[how](net)
    mode, wants = getattr(model, "training", False), [p.requires_grad for p in model.parameters()]
    found = package.judge(model, (x, y), eps=0.1, attacks="fgsm", doctor="script" in how, progress=False)
    expected = package.judge(trained.eval(), (x, y), eps=0.1, attacks="fgsm", doctor=False, progress=False)
    assert found.outcomes.equals(expected.outcomes)
    assert (getattr(model, "training", False), [p.requires_grad for p in model.parameters()]) == (mode, wants)
    assert any("training mode" in note for note in found.notes) == mode


def test_a_judgement_is_read_by_its_attributes_and_shown(trained: Net, digits: data.ArraySplit, tmp_path: Path) -> None:
    x, y = np.asarray(digits.images[:40]), np.asarray(digits.labels[:40])
    found = package.judge(trained.eval(), (x, y), eps="1/10", attacks="fgsm,pgd", progress=False, name="mine")
    table = found.outcomes
    lost = table.groupby("index")["success"].any() | (table.groupby("index")["clean_prediction"].first() != y)
    assert found.accuracy == pytest.approx(1 - lost.mean())
    assert found.clean == pytest.approx((table.groupby("index")["clean_prediction"].first() == y).mean())
    low, high = found.interval
    assert low < found.accuracy < high
    words = repr(found)
    for line in (f"worst case: {100 * found.accuracy:.1f} %", "n = 40", "doctor: "):
        assert line in words
    for piece in ("<table", "doctor: "):
        assert piece in found._repr_html_()
    page = found.report(tmp_path / "out.html")
    assert page == tmp_path / "out.html"
    assert "mine" in page.read_text()


def test_a_judgement_by_a_sample_shows_the_estimate_and_its_interval(trained: Net, digits: data.ArraySplit) -> None:
    model, images = models.normalized(trained, [0.3], [0.35]), (digits.images[:60], digits.labels[:60])
    ask: dict[str, Any] = {"eps": 0.05, "doctor": False, "progress": False}
    found = package.judge(model, images, attacks="standard", sample=10, **ask)
    assert found.estimate is not None
    assert set(found.outcomes["attack"]) == {"quick"}
    assert found.estimate.survivors == (~found.outcomes["success"]).sum()
    assert (found.accuracy, found.interval) == (found.estimate.left / 60, found.estimate.population)
    low, high = (f"{100 * end:.1f}" for end in found.interval)
    for shown in (repr(found), found._repr_html_()):
        assert found.estimate.words() in shown
        assert f"{low} to {high}" in shown
        assert "worst case" not in shown  # of the cheap search alone
    with pytest.raises(UnmovedError, match="expected --attacks standard"):
        package.judge(model, images, sample=10, **ask)


def test_the_command_judges_by_a_sample(folder: Path) -> None:
    asked = [*COMMAND, "--no-doctor", "--sample", 10]
    asked[asked.index("--attacks") + 1], asked[asked.index("0.1")], asked[asked.index("40")] = "standard", "0.05", "60"
    said = unmoved(*asked).fine().out
    assert re.search(r"AutoAttack, sampled: [\d.]+ \[[\d.]+, [\d.]+\], 10 of \d+ survivors asked", said)
    assert "AutoAttack, sampled" in Path("runs/mine/report.html").read_text()
    asked[asked.index("standard")] = "quick"
    shutil.rmtree("runs/mine")
    assert "expected --attacks standard" in unmoved(*asked).mistake()
    assert not Path("runs/mine").exists()


def test_a_folder_is_of_one_model_and_of_one_data_set(trained: Net, digits: data.ArraySplit, tmp_path: Path) -> None:
    class Masked(Net):
        """What it computes depends on a setting that is no tensor."""

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    def judged(model: nn.Module, labels: Tensor) -> object:
        how = {"eps": 0.1, "attacks": "fgsm", "out": tmp_path / "mine", "doctor": False, "progress": False}
        return package.judge(model.eval(), (digits.images[:20], labels[:20]), **how)

    one, other = Masked(1.0), Masked(2.0)
    for model in (one, other):
        model.load_state_dict(trained.state_dict())
    first: Any = judged(one, digits.labels)
    again: Any = judged(one, digits.labels)
    assert again.outcomes.equals(first.outcomes)
    with pytest.raises(UnmovedError, match=r"another run \(it differs in: model\)"):
        judged(other, digits.labels)
    with pytest.raises(UnmovedError, match=r"another run \(it differs in: data\)"):
        judged(one, (digits.labels + 1) % 10)
    assert first.doctor is None
    said = unmoved("doctor", tmp_path / "mine").mistake()
    assert "were objects in Python; call unmoved.judge" in said


@pytest.mark.parametrize("attacks", ["pgd,pgd(steps=3),recipe", "clean", "fgsm,my_models:fgsm"])
def test_two_attacks_of_one_name_are_refused(folder: Path, attacks: str) -> None:
    (folder / "my_models.py").write_text(
        MODULE + "from unmoved import attacks, ThreatModel\n"
        "def fgsm(threat: ThreatModel) -> attacks.PGD: return attacks.FGSM(threat)\nclean = fgsm\n"
    )
    named = {"fgsm,pgd(steps=3)": attacks.replace("clean", "my_models:clean")}
    assert "expected each name once" in unmoved(*(named.get(word, word) for word in COMMAND)).mistake()


def test_progress_and_a_folder_of_ones_own(trained: Net, digits: data.ArraySplit, tmp_path: Path) -> None:
    shares: list[float] = []
    found = package.judge(
        trained.eval(),
        digits.take(20),
        eps=0.1,
        attacks="fgsm",
        out=tmp_path / "mine",
        progress=lambda share, words: shares.append(share),
    )
    assert shares == sorted(shares) or max(shares) <= 1
    assert found.run.path == tmp_path / "mine"
    assert package.report(tmp_path / "mine", tmp_path / "page.html").is_file()


def test_the_doctor_is_asked_alone(trained: Net, digits: data.ArraySplit) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x * 8).round() / 8)

    checks = [finding.check for finding in package.doctor(Masked().eval(), digits.take(40), eps=0.1, n=40)]
    assert any("gradient" in check for check in checks), checks


def test_fine_tuning_starts_from_a_checkpoint(folder: Path, trained: Net, tmp_path: Path) -> None:
    Path("tune.toml").write_text(
        '[data]\nuse = "digits"\ntest = 1500\n[model]\nuse = "my_models:Net"\nweights = "net.pt"\n'
        "normalize = { mean = [0.3], std = [0.35] }\n[threat]\neps = 0.1\n[training]\nepochs = 1\n"
        '[optimizer]\nuse = "sgd"\nlr = 1e-9\n[objective.ce]\nview = "clean"\n[evaluation]\nn = 9\n'
    )
    unmoved("train", "tune.toml", "--out", "runs/tuned", "--allow", "my_models").fine()
    tuned = models.normalized(Net(), [0.3], [0.35])
    Run.open("runs/tuned").load_weights(tuned, "last")
    for ours, theirs in zip(tuned.get_submodule("model").parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert json.loads(Path("runs/tuned/provenance.json").read_text())["weights"]["key"] == "model_state_dict"
    again = ("train", "tune.toml", "--out", "runs/tuned", "--allow", "my_models", "--resume")
    Path("net.pt").unlink()
    unmoved(*again).fine()  # what was saved holds the weights
    unmoved("evaluate", "runs/tuned", "--attacks", "fgsm", "--no-doctor", "--allow", "my_models").fine()


def test_what_is_judged_only_is_not_trained(folder: Path) -> None:
    unmoved(*COMMAND).fine()
    said = unmoved("train", "runs/mine/recipe.toml", "--out", "runs/again", "--allow", "my_models")
    assert "came trained = false" in said.mistake()
