"""`unmoved analyze`: tables, pages and words from run folders; nothing is computed twice; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli import RECIPE, digests, here, recipe, unmoved

from unmoved import analyses
from unmoved.analyses import studies
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.runs.folder import Run

SWEEP = ("--sweep", "attack.eps=0,0.05,0.1", "--splits", 2, "--set", "training.epochs=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three strengths of one recipe, each on two disjoint halves of the data: six runs."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        here(patch)
        unmoved(
            "compare", recipe(folder), "--set", "name=tiny", *SWEEP, "--out", folder / "out", "--analyze",
            "softmax,corruption,bias-variance,tradeoff", "--analysis-n", 40,
        ).fine()  # fmt: skip
    return folder / "out"


def paths(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/*/recipe.toml"))


def test_compare_puts_every_chapter_into_the_report_and_its_tables_on_disk(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    for title in ("Softmax over the wrong classes", "Flatness under", "Bias and variance", "The price of robustness"):
        assert title in page
    for name in studies.STUDIES:
        folder = trained / "analysis" / name
        assert json.loads((folder / "verdict.json").read_text())["settings"]["n"] > 0
        assert (folder / "index.html").is_file()
        assert list(folder.glob("*.csv"))
        assert list(folder.glob("index-figures/*.svg"))
        assert (folder / "index.html").read_text(encoding="utf-8").count("<figure>") == len(
            list(folder.glob("index-figures/*.svg"))
        )


def test_a_report_of_the_same_runs_is_the_page_of_the_comparison_and_computes_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    page = (trained / "report.html").read_text(encoding="utf-8")
    (title,) = re.findall("<title>(.*)</title>", page)
    runs = [moved / Path(run).relative_to(trained) for run in facts_of(trained, "softmax")["settings"]["runs"]]
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a pass whose table is cached"))
    (moved / "report.html").unlink()
    shutil.rmtree(moved / "report-figures")
    unmoved("report", *runs, "--out", moved / "report.html", "--title", title).fine()
    assert (moved / "report.html").read_text(encoding="utf-8").replace(str(moved), str(trained)) == page
    fewer = unmoved("report", *runs[1:], "--out", tmp_path / "fewer.html").fine()
    assert "Softmax over the wrong classes" not in (tmp_path / "fewer.html").read_text(encoding="utf-8")
    assert fewer.err == "", "some of the runs alone never had an analysis"


def test_a_report_whose_chapters_cannot_be_made_says_so(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    (moved / "analysis/corruption/verdict.json").write_text("{")
    said = unmoved("report", *paths(moved), "--out", tmp_path / "r.html")
    assert said.code == 0
    assert "note: the report lacks analyses" in said.err
    assert "verdict.json" in said.err


def facts_of(out: Path, name: str) -> Any:
    return json.loads((out / "analysis" / name / "verdict.json").read_text())


@pytest.mark.parametrize("what", studies.STUDIES)
def test_each_analysis_of_the_command_line_says_the_same_twice_and_computes_once(
    what: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = paths(trained)
    first = unmoved("analyze", what, *runs, "--n", 40, "--out", tmp_path / "one").fine()
    for room, name in ((torch.nn.Linear, "forward"), (torch.nn.Conv2d, "forward")):
        monkeypatch.setattr(room, name, lambda *_: pytest.fail("a pass whose table is cached"))
    second = unmoved("analyze", what, *runs, "--n", 40, "--out", tmp_path / "two").fine()
    assert digests(tmp_path / "one" / what) == digests(tmp_path / "two" / what)
    assert [line for line in first.out.splitlines() if line.startswith("- ")] == [
        line for line in second.out.splitlines() if line.startswith("- ")
    ]


def test_an_interrupted_analysis_goes_on_and_ends_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(trained, straight)
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    for folder in (straight, broken):
        for cache in folder.glob("*/*/analysis"):
            shutil.rmtree(cache)
    for name in ("softmax", "corruption", "bias-variance"):
        unmoved("analyze", name, *paths(straight)[:4], "--n", 30, "--out", straight / "a").fine()
    real = torch.nn.Linear.forward
    for name in ("softmax", "corruption", "bias-variance"):
        for last in (50, 90):
            calls = iter(range(last))

            def dies(layer: torch.nn.Linear, x: torch.Tensor, calls: Iterator[int] = calls) -> torch.Tensor:
                if next(calls, None) is None:
                    raise UnmovedError("the power went out")
                return real(layer, x)

            monkeypatch.setattr(torch.nn.Linear, "forward", dies)
            said = unmoved("analyze", name, *paths(broken)[:4], "--n", 30, "--out", broken / "a")
            monkeypatch.setattr(torch.nn.Linear, "forward", real)
            assert "the power went out" in said.mistake()
        unmoved("analyze", name, *paths(broken)[:4], "--n", 30, "--out", broken / "a").fine()
        ours, theirs = (
            {k: v for k, v in digests(f / "a" / name).items() if k.endswith(".csv")} for f in (broken, straight)
        )
        assert ours == theirs


def test_the_softmax_table_is_what_the_functions_say(trained: Path) -> None:
    run = Run.open(paths(trained)[0])
    table = pd.read_csv(trained / "analysis/softmax/samples.csv")
    mine = table[(table["run"] == studies.names_of([Run.open(p) for p in paths(trained)])[0])]
    (subject,) = studies.subjects([run], 40)
    (batch,) = subject.split.batches(40)
    with torch.no_grad():
        logits = subject.model(batch.x)
    direct = analyses.softmax.statistics(logits, batch.y)
    clean = mine[mine["view"] == "clean"]
    assert clean["index"].tolist() == batch.index.tolist()
    np.testing.assert_allclose(clean["variance"], direct["variance"], rtol=1e-9)


def test_bias_and_variance_of_the_study_are_those_of_the_formulas(trained: Path) -> None:
    runs = [Run.open(path) for path in paths(trained)]
    found = studies.subjects(runs, 40)
    table = pd.read_csv(trained / "analysis/bias-variance/decompositions.csv")
    row = table[
        (table["method"] == found[0].run.name)
        & (table["eval_eps"] == 0)
        & (table["loss"] == "squared error")
        & (table["correction"] == "k/(k-1)")
        & (table["class"] == -1)
    ].iloc[0]
    pair = [subject for subject in found if subject.run.name == found[0].run.name]
    (batch,) = pair[0].split.batches(40)
    with torch.no_grad():
        p = torch.stack([torch.softmax(subject.model(batch.x).double(), dim=1) for subject in pair])
    want = analyses.bias_variance.decompose_mse(p, batch.y)
    assert (row["risk"], row["bias"], row["variance"]) == pytest.approx((want.risk, want.bias, want.variance), rel=1e-6)
    assert set(table["train_eps"]) == {0, 0.05, 0.1}
    assert set(table["eval_eps"]) == {0, 0.1}


def test_the_three_modes_differ_and_own_is_the_worst(trained: Path, tmp_path: Path) -> None:
    runs = paths(trained)
    unmoved(
        "analyze", "bias-variance", *runs, "--n", 40, "--eps", "0.1", "--modes", "own,shared,joint", "--out", tmp_path
    ).fine()
    table = pd.read_csv(tmp_path / "bias-variance/decompositions.csv")
    risk = table[(table["class"] == -1) & (table["loss"] == "KL") & (table["correction"] == "plug-in")]
    by_mode = risk.groupby("mode")["risk"].mean()
    assert by_mode["own"] > by_mode["shared"]
    assert by_mode["own"] > by_mode["joint"]


# --- what is refused


def test_what_is_refused(trained: Path, tmp_path: Path) -> None:
    runs = paths(trained)
    assert "did you mean 'softmax'" in unmoved("analyze", "softmx", runs[0]).mistake()
    one = unmoved("analyze", "bias-variance", runs[0], "--out", tmp_path).mistake()
    assert "expected at least 2 models" in one
    assert "compare --splits" in one
    assert "each run once" in unmoved("analyze", "softmax", runs[0], runs[0], "--out", tmp_path).mistake()
    assert "--eps" in unmoved("analyze", "bias-variance", *runs, "--eps", "a", "--out", tmp_path).mistake()
    assert "mode" in unmoved("analyze", "bias-variance", *runs, "--modes", "own,theirs", "--out", tmp_path).mistake()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "option", "words"),
    [
        (
            "softmax",
            ("--eps", "0.1"),
            "--eps: expected an option of softmax, came one of another; it has none",
        ),
        ("tradeoff", ("--hessian",), "--hessian: expected an option of tradeoff"),
        ("bias-variance", ("--no-deep",), "--deep: expected an option of bias-variance"),
        ("bias-variance", ("--top", "3"), "its own are --eps, --modes"),
        ("corruption", ("--modes", "own"), "its own are --norm, --top, --deep, --hessian"),
    ],
)
def test_an_option_of_another_analysis_is_refused(what: str, option: tuple[str, ...], words: str) -> None:
    """Before any run is opened, and also where the value is the one by default."""
    assert words in unmoved("analyze", what, "nowhere", *option).mistake()


def test_the_chapter_of_a_report_leaves_out_the_surfaces() -> None:
    for kind in studies.STUDIES.values():
        assert kind.for_report() == (kind.of({"deep": False}) if kind.name == "corruption" else kind())


def test_the_options_reach_the_study(trained: Path, tmp_path: Path) -> None:
    options = ("--norm", "linf", "--top", 5, "--no-deep", "--n", 10)
    unmoved("analyze", "corruption", paths(trained)[0], *options, "--out", tmp_path).fine()
    settings = json.loads((tmp_path / "corruption/verdict.json").read_text())["settings"]
    assert (settings["p"], settings["top"], settings["n"]) == ("inf", 5, 10)
    assert not (tmp_path / "corruption/plane.csv").exists()
    assert set(pd.read_csv(tmp_path / "corruption/sweep.csv")["n"]) == {5}


def made(folder: Path, text: str, name: str, *extra: object) -> Path:
    unmoved("train", recipe(folder, text, name), "--out", folder / name, "--set", "training.epochs=1", *extra).fine()
    return folder / name


def test_runs_that_do_not_belong_together_are_refused(trained: Path, tmp_path: Path) -> None:
    first = paths(trained)[0]
    other = made(tmp_path, RECIPE.replace("test = 1500", "test = 1400"), "other")
    assert "test images differ" in unmoved("analyze", "softmax", first, other, "--out", tmp_path / "o").mistake()
    drawn = made(tmp_path, RECIPE.replace("test = 1500", "test = 1500\nseed = 1"), "drawn")  # as many, others
    assert "test images differ" in unmoved("analyze", "softmax", first, drawn, "--out", tmp_path / "o").mistake()
    ball = made(tmp_path, RECIPE.replace("eps = 0.1", "eps = 0.2"), "ball")
    assert "expected runs in one ball" in unmoved("analyze", "softmax", first, ball, "--out", tmp_path / "o").mistake()
    same = ("--set", "name=same")
    whole = [made(tmp_path, RECIPE, name, *same, "--set", f"training.seed={k}") for k, name in enumerate(("a", "b"))]
    overlap = unmoved("analyze", "bias-variance", *whole, "--out", tmp_path / "o").mistake()
    assert "images that two of" in overlap
    assert "the estimate would be wrong" in overlap
    assert "judged by the same attacks" in unmoved("analyze", "tradeoff", *whole, "--out", tmp_path / "o").mistake()
    assert not (tmp_path / "o").exists()


def test_a_subject_keeps_its_model_as_it_was(trained: Path) -> None:
    (subject,) = studies.subjects([Run.open(paths(trained)[0])], 20)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    shutil.rmtree(subject.run.path / "analysis")
    for kind in studies.STUDIES.values():
        kind.for_report().prepare(subject)
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    assert isinstance(next(iter(subject.split.batches(1))), Batch)
