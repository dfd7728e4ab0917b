"""From a run folder to its verdict: kept through kills, the same for any number of workers, honest about its name."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved
from helpers.fork_server import Nursery
from torch import nn

from unmoved import evaluate
from unmoved.attacks import APGD, FAB, PGD, AutoAttack, Quick, Square
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.threat import ThreatModel
from unmoved.data import ArraySplit, digits
from unmoved.evaluation import outcomes
from unmoved.evaluation.journal import Journal
from unmoved.runs import evaluate as evaluation
from unmoved.runs import evaluator
from unmoved.runs.assembly import Assembly
from unmoved.runs.folder import Run
from unmoved.runs.load import data_and_code, opened, weights_digest
from unmoved.runs.recipe import read

if not hasattr(os, "fork"):
    pytest.skip("these tests fork", allow_module_level=True)

THREAT = ThreatModel("linf", 0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    unmoved("train", recipe(folder, RECIPE.replace("epochs = 2", "epochs = 8")), "--out", folder / "run").fine()
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "errors")
    yield nursery
    nursery.close()


def model_of(run: Path) -> tuple[nn.Module, Assembly]:
    assembly = Assembly(read(run / "recipe.toml"))
    model = assembly.model()
    Run.open(run).load_weights(model, "best")
    return model, assembly


# --- AutoAttack is what its name says


def test_the_verdict_is_that_of_its_parts_one_after_the_other(run: Path) -> None:
    """Each part alone, from the clean image, on everything: a sample stands where it stands against all four."""
    model, assembly = model_of(run)
    split = assembly.data.test.take(60, seed=0)
    whole = evaluate(model, split, {"aa": AutoAttack(THREAT)}, THREAT, batch_size=40).set_index("index")
    alone = {
        name: evaluate(model, split, {name: part}, THREAT, batch_size=60).set_index("index")["success"]
        for name, part in AutoAttack(THREAT).parts(10).items()
    }
    broken = pd.DataFrame(alone)
    assert (whole["success"] == broken.any(axis=1)).all()
    first = broken.idxmax(axis=1).where(broken.any(axis=1), "none")
    expected = first.where(whole["clean_prediction"] == whole["label"], "clean")
    assert (whole["by"] == expected).all()
    assert {"clean", "none", "apgd-ce"} <= set(whole["by"])


def test_the_budgets_are_the_references() -> None:
    """T26."""
    for norm, restarts, targets in (("linf", 1, 9), ("l2", 1, 9), ("l1", 5, 5)):
        parts = AutoAttack(ThreatModel(norm, 0.3)).parts(10)
        assert list(parts) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        first, second, fab, square = parts.values()
        assert isinstance(first, APGD)
        assert (first.steps, first.restarts, first.targets, first.large_first) == (100, restarts, 0, norm == "l1")
        assert isinstance(second, APGD)
        assert (second.steps, second.restarts, second.targets, second.large_first) == (100, 1, targets, norm == "l1")
        assert isinstance(fab, FAB)
        assert (fab.steps, fab.restarts, fab.targets, fab.targeted) == (100, 1, 9, True)
        assert (fab.alpha_max, fab.eta, fab.beta) == (0.1, 1.05, 0.9)
        assert isinstance(square, Square)
        assert (square.queries, square.p, square.restarts, square.rescale_schedule) == (5000, 0.8, 1, False)
    rand = AutoAttack(THREAT, version="rand").parts(10)
    assert list(rand) == ["apgd-ce", "apgd-dlr"]
    assert all(isinstance(part, APGD) and part.draws == 20 and part.steps == 100 for part in rand.values())


@pytest.mark.parametrize(
    ("classes", "words"), [(10, []), (4, ["3 targets"]), (3, ["2 targets", "margin"]), (2, ["1 targets", "margin"])]
)
def test_few_classes_are_adapted_to_and_said(classes: int, words: list[str]) -> None:
    """The reference breaks on fewer than four classes."""
    notes = AutoAttack(THREAT).notes(classes)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    batch = Batch(torch.rand(6, 1, 4, 4, generator=draw), torch.zeros(6, dtype=torch.long))
    batch = Batch(batch.x, model(batch.x).argmax(1))
    x_adv = AutoAttack(ThreatModel("linf", 0.9))(model, batch)
    assert (model(x_adv).argmax(1) != batch.y).any()


def test_quick_is_never_called_autoattack(run: Path) -> None:
    said = unmoved("evaluate", run, "--attacks", "quick", "--n", 20, "--no-doctor").fine()
    assert "quick" in said.out
    assert "autoattack" not in said.out.lower()
    assert not (run / "verdict").exists()


def test_the_quick_ensemble_never_leaves_less_than_its_parts(run: Path) -> None:
    model, assembly = model_of(run)
    split = assembly.data.test.take(100, seed=0)
    quick = evaluate(model, split, {"quick": Quick(THREAT)}, THREAT)
    pgd = evaluate(model, split, {"pgd": PGD(THREAT, steps=40, keep="best")}, THREAT)
    assert quick["success"].sum() >= pgd["success"].sum()


@pytest.mark.parametrize(("classes", "norm"), [(2, "linf"), (3, "l2"), (5, "l1"), (5, "linf")])
def test_on_a_linear_model_the_verdict_is_the_analytic_one(classes: int, norm: str) -> None:
    """A sample stands exactly where every other class lies farther than eps: ``margin_k > eps ||w_y - w_k||_dual``."""
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    weight = torch.randn(classes, 36, generator=draw)
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(-weight.sum(1) / 2)  # grey lies on every boundary
    spread = 0.01 if norm == "l1" else 0.05  # far from black and white, also where one pixel moves: only the ball binds
    x = 0.5 + spread * torch.randn(60, 1, 6, 6, generator=draw)
    y = model(x).argmax(1)
    order = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]
    gap = (model(x).gather(1, y[:, None]) - model(x)).detach()
    reach = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=order, dim=2).clamp_min(1e-9)
    nearest = (gap / reach).masked_fill(torch.nn.functional.one_hot(y, classes).bool(), torch.inf).amin(1)
    eps = float(nearest.median())
    clear = (nearest / eps - 1).abs() > 0.01
    split = ArraySplit.of(x, y, classes=[str(k) for k in range(classes)], layout="NCHW")
    ball = ThreatModel(norm, eps)
    for attack in (AutoAttack(ball), Quick(ball)):
        table = evaluate(model, split, {"a": attack}, ball).sort_values("index")
        assert (torch.tensor(table["success"].tolist()) == (nearest < eps))[clear].all()


# --- the same verdict for any number of workers, batches, orders


def test_workers_and_batches_change_nothing(run: Path) -> None:
    model, assembly = model_of(run)
    split, exact = assembly.data.test.take(16, seed=0), {"aa": AutoAttack(THREAT)}
    one = evaluate(model, split, exact, THREAT, batch_size=16)
    for workers, size in ((2, 16), (1, 15)):
        other = evaluate(model, split, exact, THREAT, batch_size=size, workers=workers)
        assert (one[["index", "success", "by"]] == other[["index", "success", "by"]]).all(axis=None)


# --- kept through kills


def test_killed_verdicts_go_on_and_end_in_the_same_bits(nursery: Nursery, run: Path, tmp_path: Path) -> None:
    command = ["--attacks", "quick,fab", "--n", 100, "--batch-size", 4, "--no-doctor"]
    uncut = Path(shutil.copytree(run, tmp_path / "uncut"))
    assert nursery.run("evaluate", uncut, *command) == 0
    moments, kills, lines = random.Random(0), 0, [0]
    journal = run / "evaluation" / "journal.jsonl"
    while True:
        patience = moments.uniform(0.3, 1.5) * 1.2**kills  # a slow machine gets there too
        code = nursery.run("evaluate", run, *command, kill_after=patience)
        assert code in (-signal.SIGKILL, 0)
        if code == 0:
            break
        kills += 1
        if lines[-1] and not journal.exists():  # killed when all was saved; the same command begins anew
            assert (run / "evaluation" / "evaluation.json").exists()
            lines = [0]
            continue
        lines.append(len(journal.read_text().splitlines()) if journal.exists() else 0)
        assert lines[-1] >= lines[-2], "nothing that was on disk is lost"
    assert kills >= 2
    assert not journal.exists()
    for name in ("outcomes.csv", "curve.csv"):
        assert (run / "evaluation" / name).read_bytes() == (uncut / "evaluation" / name).read_bytes()


def test_what_is_in_the_journal_is_not_computed_again(run: Path, tmp_path: Path) -> None:
    model, assembly = model_of(run)
    split, asked = assembly.data.test.take(24, seed=0), []

    class Counting:
        def __init__(self, fails_at: int | None = None) -> None:
            self.fails_at = fails_at

        def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
            if self.fails_at == len(asked):
                raise RuntimeError("interrupted")
            asked.append(batch.index.tolist())
            return PGD(THREAT, steps=3)(model, batch)

    def judged(attack: Counting) -> pd.DataFrame:
        return evaluate(model, split, {"a": attack}, THREAT, batch_size=4, journal=Journal(tmp_path / "j", {}))

    with pytest.raises(RuntimeError, match="interrupted"):
        judged(Counting(fails_at=2))
    again = judged(Counting())
    flat = [index for chunk in asked for index in chunk]
    assert len(flat) == len(set(flat)), "no sample was attacked twice"
    fresh = evaluate(model, split, {"a": PGD(THREAT, steps=3)}, THREAT, batch_size=4)
    assert again.equals(fresh)


def test_other_weights_are_another_question(run: Path) -> None:
    unmoved("evaluate", run, "--attacks", "pgd", "--n", 10, "--no-doctor").fine()
    folder = run / "evaluation"
    Journal(folder / "journal.jsonl", {"old": 1}).add("pgd", "pgd", *(np.zeros(1, dtype=int),) * 2, np.zeros(1))
    before = (folder / "outcomes.csv").read_bytes()
    unmoved("evaluate", run, "--attacks", "pgd", "--n", 10, "--no-doctor").fine()
    assert (folder / "outcomes.csv").read_bytes() == before
    assert not (folder / "journal.jsonl").exists()


def test_the_precision_of_the_search_is_the_machines_and_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``auto`` began in bf16 does not go on in float32 on another machine."""
    asked: list[str] = []

    def noted(path: Path, question: dict[str, Any]) -> Journal:
        asked.append(question["precision"])
        return Journal(path, question)

    monkeypatch.setattr(evaluator, "Journal", noted)
    for features, expected in (({}, "float32"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        unmoved("evaluate", run, "--attacks", "pgd", "--n", 10, "--no-doctor").fine()
        assert json.loads((run / "evaluation" / "evaluation.json").read_text())["precision"] == expected
    assert asked == ["float32", "bf16"]


# --- memory, images, names


class Streamed:
    """A split that makes each batch when it is asked for, and counts the images alive at a time."""

    num_classes, shape = 10, (1, 8, 8)

    def __init__(self, size: int) -> None:
        self.size, source = size, digits().test
        self.source = next(source.batches(64))

    def __len__(self) -> int:
        return self.size

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        for start in range(0, self.size, size):
            index = torch.arange(start, min(start + size, self.size))
            where = index % 64
            yield Batch(self.source.x[where].clone(), self.source.y[where], index)


def test_memory_does_not_grow_with_the_data(run: Path) -> None:
    """Only the outcomes table does: the images alive at a time are as many for 16,000 as for 4,000."""
    model, _ = model_of(run)
    most: dict[int, int] = {}

    def alive() -> None:
        gc.collect()  # what nobody holds does not count
        images = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 4]
        most[size] = max(most.get(size, 0), sum(len(t) for t in images))

    class Still:
        def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
            alive()
            return batch.x

    gc.freeze()  # what was there before is neither counted nor looked through each time
    try:
        for size in (4000, 16000):
            evaluate(model, Streamed(size), {"a": Still()}, THREAT, batch_size=50)
    finally:
        gc.unfreeze()
    assert 50 <= most[16000] <= 1.1 * most[4000]


def test_the_images_that_broke_it_are_kept_when_asked(run: Path) -> None:
    unmoved("evaluate", run, "--attacks", "standard", "--n", 24, "--save-adversarial", "--no-doctor").fine()
    table = outcomes.read(run / "verdict" / "outcomes.csv").set_index("index")
    model, _ = model_of(run)
    found = 0
    for path in (run / "verdict" / "adversarial").glob("*.npz"):
        with np.load(path) as arrays:
            x_adv, label, index = (torch.from_numpy(arrays[name]) for name in ("x_adv", "label", "index"))
        assert (model(x_adv).argmax(1) != label).all()
        assert set(table.loc[index.tolist(), "by"]) == {path.stem.rsplit("-", 1)[0]}
        found += len(index)
    assert found == (~table["by"].isin(["clean", "none"])).sum() > 0


def test_several_names_at_once_and_unknown_ones(run: Path) -> None:
    unmoved("evaluate", run, "--attacks", "pgd, quick,standard", "--n", 12, "--no-doctor").fine()
    opened = Run.open(run)
    assert set(opened.outcomes["attack"]) == {"pgd", "quick"}
    assert set(opened.verdict_outcomes["attack"]) == {"autoattack"}
    message = unmoved("evaluate", run, "--attacks", "standart").mistake()
    assert "did you mean 'standard'" in message


def test_no_attack_by_name_is_called_autoattack_but_the_two_versions(run: Path) -> None:
    assembly = Assembly(read(run / "recipe.toml"))
    for name in ("recipe", "quick", "pgd", "apgd", "fab", "square"):
        (chosen,) = evaluation.chosen_attacks(name, assembly, ()).values()
        assert not any("auto" in label for label in chosen)


def test_a_transfer_from_another_run(run: Path, trained: Path, tmp_path: Path) -> None:
    unmoved("evaluate", run, "--attacks", f"transfer:{trained}, pgd", "--n", 20, "--no-doctor").fine()
    assert set(Run.open(run).outcomes["attack"]) == {"transfer", "pgd"}
    message = unmoved("evaluate", run, "--attacks", f"transfer:{tmp_path / 'nowhere'}").mistake()
    assert "found none" in message


@pytest.fixture
def two(tmp_path: Path) -> Run:
    """A run whose best weights say class 0 of every image, and whose last ones class 1."""
    text = RECIPE.replace('use = "mlp"\nhidden = [16]', 'use = "linear"')
    parsed = read(recipe(tmp_path, text, "two"))
    run, model = Run.create(tmp_path / "two", parsed.tables()), Assembly(parsed).model()
    for label, which in enumerate(("best", "last")):
        for p in model.parameters():
            nn.init.zeros_(p)
        model.linear.bias.data[label] = 1.0  # type: ignore[union-attr, index]
        run.save_weights(model, which)
    return run


@pytest.mark.parametrize(("which", "label"), [("best", 0), ("last", 1)])
def test_the_weights_that_were_asked_for_are_judged_and_examined(
    two: Run, which: str, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = evaluation.evaluate_run(two, attacks="fgsm", n=20, weights=which)["evaluation"]
    assert set(table["clean_prediction"]) == {label}
    facts = two.evaluation
    assert facts is not None
    assert (facts["weights"], facts["weights_sha256"]) == (which, weights_digest(two, which))
    seen: list[int] = []

    def examine(model: nn.Module, *_: Any, **__: Any) -> list[Any]:
        seen.append(int(model(torch.zeros(1, 1, 8, 8)).argmax()))
        return []

    monkeypatch.setattr(evaluation.examine, "examine", examine)
    evaluation.examine_run(two, n=10)
    assert seen == [label]


def test_a_question_is_about_all_that_could_change_an_answer(two: Run) -> None:
    assembly, model = opened(two, "best", "cpu", ())

    def asked(n: int = 8) -> evaluator.Evaluator:
        split = assembly.data.test.take(n, seed=0)
        about = data_and_code(assembly, split, ())
        return evaluator.Evaluator(two, assembly, model, split, "data", n, "pgd", "best", "float32", 128, 1, about)

    weak, strong, ours = PGD(THREAT, steps=1), PGD(THREAT, steps=2), asked()
    first = ours.digest({"pgd": weak})
    assert first == replace(asked(), batch_size=5, workers=2).digest({"pgd": weak})
    elsewhere = (asked(9), replace(ours, precision="bf16"), replace(ours, weights="last"))
    others = {
        ours.digest({"pgd": strong}),
        ours.digest({"mine": weak}),
        *(one.digest({"pgd": weak}) for one in elsewhere),
    }
    assert len({first, *others}) == 6


def test_weights_that_are_missing(run: Path) -> None:
    (run / "best.safetensors").unlink()
    with pytest.raises(UnmovedError, match="train first"):
        evaluation.evaluate_run(Run.open(run))
