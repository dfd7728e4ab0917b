"""A sampled verdict on a run: what was asked stays answered, and nothing of it is called a complete verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli import RECIPE, recipe, unmoved
from torch import Tensor, nn

from unmoved.attacks.ensembles import distance_estimator
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Attack
from unmoved.evaluation import judge
from unmoved.evaluation.estimate import LEVEL, Estimate, error_of_look
from unmoved.evaluation.sampling import Design, Survivors
from unmoved.runs import records, sampled_autoattack
from unmoved.runs.assembly import Assembly
from unmoved.runs.evaluate import evaluate_run, examine_run
from unmoved.runs.evaluator import Evaluator
from unmoved.runs.folder import Run
from unmoved.runs.load import Opened, opened
from unmoved.runs.recipe import read

N = 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    text = RECIPE.replace("epochs = 2", "epochs = 12").replace("eps = 0.1", "eps = 0.05")
    unmoved("train", recipe(folder, text), "--out", folder / "run").fine()
    return folder / "run"


@pytest.fixture(scope="module")
def judged(trained: Path) -> Path:
    """The same run with a sampled verdict."""
    folder = Path(shutil.copytree(trained, trained.parent / "judged"))
    evaluate_run(Run.open(folder), attacks="standard", n=N, sample=20)
    return folder


@pytest.fixture
def run(judged: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(judged, tmp_path / "run"))


def estimate_of(run: Run) -> Estimate:
    estimate = records.estimate(run.sampled)
    assert estimate is not None
    return estimate


def asked_about(run: Run) -> set[int]:
    table = run.asked_outcomes
    assert table is not None
    return set(table["index"])


def test_the_estimate_counts_what_the_tables_hold(run: Run) -> None:
    cheap, asked, estimate = run.sampled_outcomes, run.asked_outcomes, estimate_of(run)
    assert cheap is not None
    assert asked is not None
    assert (estimate.n, estimate.survivors) == (N, int((~cheap["success"]).sum()))
    assert estimate.survivors > sampled_autoattack.FEWEST  # else nothing here is sampled
    assert set(asked["index"]) <= set(cheap.loc[~cheap["success"], "index"])
    assert len(asked) == estimate.asked == 20
    assert estimate.near_broken + estimate.far_broken == int(asked["success"].sum())
    assert run.verdict is None


def test_what_is_drawn_does_not_depend_on_batches_and_threads(run: Run, trained: Path, tmp_path: Path) -> None:
    other = Run.open(shutil.copytree(trained, tmp_path / "other"))
    evaluate_run(other, attacks="standard", n=N, sample=20, batch_size=17, workers=2)
    assert asked_about(other) == asked_about(run)
    assert estimate_of(other) == estimate_of(run)


def test_larger_samples_and_the_complete_verdict_go_on_from_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first part of AutoAttack, only those are attacked that no sample before was asked about."""
    attacked: list[str] = []
    propose = judge.propose

    def noted(model, attack, batch, threat, name, precision="float32"):  # type: ignore[no-untyped-def]
        if name == "apgd-ce" and "100" in repr(attack):
            attacked.extend(map(str, batch.index.tolist()))
        return propose(model, attack, batch, threat, name, precision)

    monkeypatch.setattr(judge, "propose", noted)
    first = asked_about(run)
    evaluate_run(run, attacks="standard", n=N, sample=26)
    larger = asked_about(run)
    assert first < larger
    assert set(map(int, attacked)) == larger - first
    assert estimate_of(run).asked == 26
    complete = evaluate_run(run, attacks="standard", n=N)["verdict"]
    right = complete.loc[complete["clean_prediction"] == complete["label"], "index"]
    assert sorted(map(int, attacked)) == sorted(set(right) - first)
    low, high = estimate_of(run).interval
    cheap = run.sampled_outcomes
    assert cheap is not None
    both = (~complete.set_index("index")["success"] & ~cheap.set_index("index")["success"]).sum()
    assert low <= both <= high  # of this draw: the seed is fixed
    attacked.clear()
    again = evaluate_run(run, attacks="standard", n=N, sample=20)  # what is complete is not sampled any more
    assert list(again) == ["verdict"]
    assert attacked == []


def test_the_number_shown_and_the_doctors_are_of_the_sample(run: Run) -> None:
    assert run.shown == "sampled"
    answer = examine_run(run, n=20)
    assert answer["evaluation"] == run.sampled["files"]["asked.csv"]  # type: ignore[index]
    together = run.shown_outcomes
    assert together is not None
    left = (~together.loc[together["attack"] == "autoattack", "success"]).sum()
    assert left == estimate_of(run).survivors - estimate_of(run).near_broken - estimate_of(run).far_broken


def test_a_sample_of_all_survivors_is_the_complete_verdict(trained: Path, tmp_path: Path) -> None:
    few, many = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("few", "many"))
    said = unmoved("evaluate", many, "--attacks", "standard", "--sample", 100, "--n", 60, "--no-doctor").fine()
    assert "complete verdict" in said.out
    assert "sampled" not in said.out
    assert list(evaluate_run(Run.open(few), attacks="standard", n=25, sample=10)) == ["verdict"]
    for folder in (few, many):
        assert (Run.open(folder).verdict, Run.open(folder).sampled) != (None, None)
        assert Run.open(folder).sampled is None


def test_the_table_of_the_search_says_that_the_verdict_stands_below(run: Run) -> None:
    ask = ("--attacks", "standard", "--n", N, "--no-doctor")
    said = " ".join(unmoved("evaluate", run.path, *ask, "--sample", 20).fine().out.split())
    assert said.index("under quick alone; the verdict stands below") < said.index("AutoAttack, sampled:")
    assert "upper bound" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--attacks", "quick", "--sample", 5), "expected --attacks standard"),
        (("--attacks", "rand", "--within", 5), "expected --attacks standard"),
        (("--attacks", "standard,pgd", "--sample", 5), "expected --attacks standard"),
        (("--attacks", "standard", "--sample", 5, "--validation"), "without --save-adversarial and --validation"),
        (("--attacks", "standard", "--within", 0), "--within"),
        (("--attacks", "standard", "--sample", 5, "--eps", "0.1"), "--sample"),
    ],
)
def test_what_cannot_be_sampled_is_refused(run: Run, options: tuple[object, ...], words: str) -> None:
    assert words in unmoved("evaluate", run.path, *options).mistake()


class Noisy(nn.Module):
    """A model whose answers are drawn anew at each pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + torch.randn_like(logits)


def test_a_randomised_model_is_refused(run: Run) -> None:
    assembly, model = opened(run, "best", "cpu", ())
    with pytest.raises(UnmovedError, match=r"answers alike each time.*--attacks rand"):
        evaluate_run(run, attacks="standard", n=N, sample=20, ready=lambda: Opened(assembly, Noisy(model).eval()))


def test_survivors_are_found_where_the_data_holds_them(run: Run) -> None:
    """Each has the distance that is estimated for it alone, whatever the batches and threads."""
    assembly, model = opened(run, "best", "cpu", ())
    split, standing = assembly.data.test, np.array([1, 4, 5, 9, 11])
    ours = sampled_autoattack.survivors_of(model, split, assembly.threat, standing, 5, batch_size=3, workers=2)
    assert ours.position.tolist() == [1, 4, 5, 9, 11]
    assert (ours.index.tolist(), ours.seed) == (split.index[standing].tolist(), 5)
    (one,) = split.select(torch.tensor([5])).batches(1)
    alone = distance_estimator(assembly.threat)(model, one).distance
    assert ours.distance[2] == pytest.approx(float(alone), rel=1e-3)
    assert len(set(ours.distance)) == 5


class Answers:
    """In the place of both attacks: each breaks the samples of these identities, and no other; all are right clean."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken: dict[str, set[int]] = {"quick": set(), "autoattack": set()}
        monkeypatch.setattr(
            Evaluator, "evaluate", lambda evaluator, chosen, *_, **more: self.table(evaluator, chosen, **more)
        )

    def table(
        self, evaluator: Evaluator, chosen: dict[str, Attack], *, among: np.ndarray | None = None, keep: object = None
    ) -> pd.DataFrame:
        ((name, _),) = chosen.items()
        rows = np.arange(len(evaluator.split)) if among is None else np.sort(among)
        index, label = (column.numpy()[rows] for column in (evaluator.split.index, evaluator.split.labels))
        success = np.isin(index, list(self.broken[name]))
        facts = {"index": index, "label": label, "attack": name, "eps": 0.1, "norm": "linf", "clean_prediction": label}
        facts |= {"adversarial_prediction": (label + success) % 10, "distance": 0.0, "success": success}
        return pd.DataFrame(facts | {"by": np.where(success, name, "none")})


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


@pytest.fixture
def untrained(tmp_path: Path) -> Run:
    parsed = read(recipe(tmp_path, RECIPE, "untrained"), ["training.seed=5"])
    run = Run.create(tmp_path / "untrained", parsed.tables())
    run.save_weights(Assembly(parsed).model(), "best")
    return run


def survivors_in(run: Run, broken: set[int]) -> Survivors:
    assembly, model = opened(run, "best", "cpu", ())
    split = assembly.data.test.take(N, seed=0)
    standing = np.flatnonzero(~np.isin(split.index.numpy(), list(broken)))
    return sampled_autoattack.survivors_of(model, split, assembly.threat, standing, assembly.recipe.training.seed)


def test_near_and_drawn_are_counted_each_by_themselves(untrained: Run, answers: Answers) -> None:
    """Those that the design names, of this run's seed: two near ones break here, and five of the others."""
    split = opened(untrained, "best", "cpu", ()).assembly.data.test.take(N, seed=0)
    answers.broken["quick"] = set(split.index[:30].tolist())
    near, drawn = survivors_in(untrained, answers.broken["quick"]).design(20)
    answers.broken["autoattack"] = set(split.index[np.concatenate([near, drawn[:5]])].tolist())
    evaluate_run(untrained, attacks="standard", n=N, sample=20)
    estimate = estimate_of(untrained)
    assert asked_about(untrained) == set(split.index[np.concatenate([near, drawn])].tolist())
    assert (estimate.n, estimate.survivors) == (N, 70)
    assert (estimate.near, estimate.near_broken, estimate.far_asked, estimate.far_broken) == (2, 2, 18, 5)


@pytest.mark.parametrize(("size", "error"), [({"sample": 20}, 1 - LEVEL), ({"within": 60}, error_of_look(0))], ids=str)
def test_the_error_of_a_look_is_that_of_the_interval_on_record(
    untrained: Run, answers: Answers, size: dict[str, int], error: float
) -> None:
    """Whoever might have gone on asking may not say 95 % of what the first look saw."""
    evaluate_run(untrained, attacks="standard", n=N, **size)  # type: ignore[arg-type]
    assert estimate_of(untrained).error == pytest.approx(error)


def test_a_complete_verdict_on_other_images_or_weights_is_no_answer(untrained: Run, answers: Answers) -> None:
    evaluate_run(untrained, attacks="standard", n=60)
    assert list(evaluate_run(untrained, attacks="standard", n=60, sample=20)) == ["verdict"]
    assert list(evaluate_run(untrained, attacks="standard", n=N, sample=20)) == ["sampled"]
    untrained.save_weights(Assembly(read(untrained.path / "recipe.toml", ["training.seed=6"])).model(), "best")
    assert list(evaluate_run(untrained, attacks="standard", n=60, sample=20)) == ["sampled"]


# --- until the interval is short enough


def truth(breaks: np.ndarray, n: int, asked: list[int]):  # type: ignore[no-untyped-def]
    """AutoAttack's outcomes, as `sampled_autoattack.estimated` asks for them."""

    def ask(design: Design, error: float) -> tuple[pd.DataFrame, Estimate]:
        asked.append(len(design.near) + len(design.drawn))
        near, far = (int(breaks[part].sum()) for part in design)
        return pd.DataFrame(), Estimate(n, len(breaks), len(design.near), near, len(design.drawn), far, error)

    return ask


def test_each_look_spends_its_own_share_of_the_error_on_a_larger_sample() -> None:
    """Stopping when it looks well would otherwise miss more often than said; the shares sum to the error."""
    breaks, asked, errors = np.zeros(200, dtype=bool), [], []  # type: ignore[var-annotated]
    breaks[::20] = True
    answer = truth(breaks, 220, asked)

    def ask(design: Design, error: float) -> tuple[pd.DataFrame, Estimate]:
        errors.append(error)
        return answer(design, error)  # type: ignore[no-any-return]

    lost = Survivors(np.arange(200), np.arange(200), np.full(200, np.inf))
    found = sampled_autoattack.estimated(lost, sampled_autoattack.Size(within=2.0), 220, ask)
    assert found is not None
    assert len(asked) > 1  # else it stopped at once, and nothing is tested
    assert asked == sorted(set(asked))
    assert errors == [error_of_look(look) for look in range(len(asked))]
    assert found[1].half_width <= 0.02


def test_what_cannot_be_reached_says_what_was() -> None:
    breaks, asked = np.zeros(300, dtype=bool), []  # type: ignore[var-annotated]
    lost = Survivors(np.arange(300), np.arange(300), np.full(300, np.inf))
    found = sampled_autoattack.estimated(lost, sampled_autoattack.Size(20, 1.0), 300, truth(breaks, 300, asked))
    assert found is not None
    assert asked == [20]
    assert found[1].half_width > 0.01


def test_within_is_said_to_be_missed(run: Run) -> None:
    evaluate_run(run, attacks="standard", n=N, sample=21, within=0.1)
    facts = json.loads((run.path / "sampled" / "sampled.json").read_text())
    assert any("--within 0.1 was not reached: with 21 survivors asked" in note for note in facts["notes"])
