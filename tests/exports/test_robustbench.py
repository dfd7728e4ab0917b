"""The entry for RobustBench: its published fields, and no weaker ensemble in AutoAttack's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import unmoved

from unmoved.evaluation import outcomes
from unmoved.runs import records
from unmoved.runs.folder import Run

# The fields of a published entry, in order: model_info/cifar10/Linf/Wang2023Better_WRN-70-16.json of RobustBench, of
# which robustbench.utils.ModelInfo gives the types.
FIELDS = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture"),
    *("eps", "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable"),
)


def entry(export: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((export / "robustbench.json").read_text(encoding="utf-8"))
    return found


def percent(table: Any, measure: str) -> str:
    rows = outcomes.summary(table).set_index("measure")
    return str(round(100 * rows.accuracy[measure], 2))


def test_the_fields_are_those_of_a_published_entry(judged: Path, export: Path) -> None:
    found, run = entry(export), Run(judged)
    assert tuple(found) == FIELDS
    assert (found["autoattack_acc"], found["clean_acc"]) == tuple(
        percent(run.verdict_outcomes, measure) for measure in ("worst case", "clean")
    )
    assert found["reported"] == percent(run.outcomes, "worst case")
    assert [found[name] for name in ("link", "name", "authors", "venue")] == [None] * 4
    assert found["additional_data"] is False
    assert found["number_forward_passes"] == 1
    assert (found["dataset"], found["eps"], found["architecture"]) == ("digits", "0.1", "mlp(hidden=[16])")
    assert "under AutoAttack standard in linf, on n = 8 images" in found["footnote"]
    assert "quick (Quick, not AutoAttack)" in found["footnote"]
    assert float(found["clean_acc"]) >= float(found["autoattack_acc"])


def test_what_the_user_says_stands_in_it(judged: Path, tmp_path: Path) -> None:
    said = {"title": "A Paper", "authors": "A, B", "link": "https://arxiv.org/abs/2302.04638", "venue": "ICML 2023"}
    words = [word for key, value in said.items() for word in ("--about", f"{key}={value}")]
    unmoved("export", judged, "--out", tmp_path / "out", *words).fine()
    found = entry(tmp_path / "out")
    assert [found[name] for name in ("name", "authors", "link", "venue")] == list(said.values())


def test_without_autoattack_there_is_no_figure_of_it(changed: Callable[..., Path]) -> None:
    run = changed("verdict")
    unmoved("export", run).fine()
    found = entry(run / "export")
    assert found["autoattack_acc"] is None
    assert found["clean_acc"] == percent(Run(run).outcomes, "clean")


def test_a_sampled_verdict_stands_with_its_intervals_in_the_footnote_alone(sampled: Path, tmp_path: Path) -> None:
    unmoved("export", sampled, "--out", tmp_path / "out").fine()
    found, estimate = entry(tmp_path / "out"), records.estimate(Run(sampled).sampled)
    assert estimate is not None
    assert found["autoattack_acc"] is None
    ends = [100 * end / estimate.n for end in estimate.interval] + [100 * share for share in estimate.population]
    intervals = "({:.2f} to {:.2f} % of these images; 95 % interval {:.2f} to {:.2f} %)".format(*ends)
    figure = f"{100 * estimate.left / estimate.n:.2f} % {intervals}"
    asked = f"{estimate.asked} of {estimate.survivors} survivors of it asked"
    assert f"AutoAttack standard, sampled, {asked}: {figure}" in found["footnote"]


@pytest.mark.parametrize(
    "settings", ["Quick(threat=ThreatModel())", "AutoAttack(threat=ThreatModel(), version='rand')"]
)
def test_another_attack_under_its_name_is_not_autoattack(changed: Callable[..., Path], settings: str) -> None:
    run = changed()
    path = run / "verdict" / "verdict.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["attacks"]["autoattack"] = settings
    path.write_text(json.dumps(facts), encoding="utf-8")
    unmoved("export", run).fine()
    assert entry(run / "export")["autoattack_acc"] is None
    assert "AutoAttack (standard)" not in (run / "export" / "README.md").read_text(encoding="utf-8")
    evidence = json.loads((run / "export" / "evidence.json").read_text(encoding="utf-8"))
    assert [attack["autoattack"] for judged in evidence["judgements"] for attack in judged["attacks"]] == [None] * 4


def test_an_attack_that_a_recipe_calls_autoattack_is_not(changed: Callable[..., Path], tmp_path: Path) -> None:
    run = changed("verdict")
    for name in ("evaluation.json", "outcomes.csv"):
        path = run / "evaluation" / name
        path.write_text(path.read_text(encoding="utf-8").replace("quick", "autoattack"), encoding="utf-8")
    facts = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8")) | {"files": {}}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(facts), encoding="utf-8")
    (run / "doctor.json").unlink()
    unmoved("export", run).fine()
    assert entry(run / "export")["autoattack_acc"] is None
    assert "autoattack (Quick, not AutoAttack)" in entry(run / "export")["footnote"]
    assert "autoattack (Quick)" in (run / "export" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("grades", "said"), [([], False), (["note", "look closer"], False), (["do not believe"], True)]
)
def test_what_the_doctor_does_not_believe_is_unreliable(
    changed: Callable[..., Path], grades: list[str], said: bool
) -> None:
    run = changed()
    doctor = json.loads((run / "doctor.json").read_text(encoding="utf-8"))
    doctor["findings"] = [{"check": "c", "grade": grade, "measured": "m", "why": "w", "do": "d"} for grade in grades]
    (run / "doctor.json").write_text(json.dumps(doctor), encoding="utf-8")
    unmoved("export", run).fine()
    assert entry(run / "export")["unreliable"] is said


def test_what_nobody_knows_is_null(changed: Callable[..., Path]) -> None:
    run = changed("doctor.json", words=('use = "mlp"', 'use = "my_nets:Net"'))
    unmoved("export", run).fine()
    found = entry(run / "export")
    assert [found[name] for name in ("unreliable", "additional_data", "number_forward_passes")] == [None] * 3
