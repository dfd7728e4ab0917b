"""evidence.json: valid by its published schema, its hashes right, its figures those of the outcomes."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers.cli import ROOT, unmoved
from scipy.stats import binomtest

from unmoved.exports import evidence
from unmoved.runs import records
from unmoved.runs.folder import Run

SCHEMA = json.loads((ROOT / "docs" / "evidence.schema.json").read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def told(export: Path) -> dict[str, Any]:
    """What an export says, after it was held against the schema of the documentation."""
    found: dict[str, Any] = json.loads((export / "evidence.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def test_the_documented_schema_is_that_of_the_code() -> None:
    said = unmoved("export", "--schema").fine().out
    assert json.loads(said) == SCHEMA == evidence.schema(), (
        "renew it: unmoved export --schema > docs/evidence.schema.json"
    )


def test_every_key_is_explained() -> None:
    def keys(node: dict[str, Any]) -> set[str]:
        return set(node.get("properties", {})).union(*map(keys, node.get("$defs", {}).values()))

    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert [key for key in sorted(keys(SCHEMA)) if f"`{key}`" not in page] == []


def test_every_hash_is_right(judged: Path, export: Path) -> None:
    found = told(export)
    assert set(found["files"]) | {"evidence.json"} == {path.name for path in export.iterdir()}
    for name, listed in found["files"].items():
        assert listed == {"sha256": sha256(export / name), "bytes": (export / name).stat().st_size}
    for name, digest in found["run_files"].items():
        assert digest == sha256(judged / name)
    assert set(found["run_files"]) == {"recipe.toml", "provenance.json", "metrics.jsonl", "doctor.json"}
    for judgement in found["judgements"]:
        assert {f"{judgement['kind']}/{judgement['kind']}.json", f"{judgement['kind']}/outcomes.csv"} <= set(
            judgement["files"]
        )
        for name, digest in judgement["files"].items():
            assert digest == sha256(judged / name)
    assert found["model"]["sha256"] == sha256(judged / "best.safetensors") == sha256(export / "model.safetensors")
    data = (export / "evidence.json").read_bytes().replace(found["sha256"].encode(), b"0" * 64)
    assert found["sha256"] == hashlib.sha256(data).hexdigest(), "as docs/evidence.md says"


def test_the_figures_are_counted_from_the_outcomes(judged: Path, export: Path) -> None:
    found = told(export)
    assert [judgement["kind"] for judgement in found["judgements"]] == ["evaluation", "verdict", "validation"]
    for judgement in found["judgements"]:
        with open(judged / judgement["kind"] / "outcomes.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        right = {row["index"]: row["label"] == row["clean_prediction"] for row in rows}
        broken: dict[str, set[str]] = {}
        for row in rows:
            broken.setdefault(row["attack"], set()).update([row["index"]] * (row["success"] == "True"))
        left = {name: {i for i in right if right[i]} - lost for name, lost in broken.items()}
        counts = {"clean": sum(right.values()), **{name: len(kept) for name, kept in left.items()}}
        counts["worst case"] = len(set.intersection(*left.values()))
        assert {result["measure"]: result["correct"] for result in judgement["results"]} == counts
        for result in judgement["results"]:
            interval = binomtest(result["correct"], len(right)).proportion_ci(method="wilson")
            assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
            assert (result["n"], result["accuracy"]) == (len(right), result["correct"] / len(right))


def test_what_was_tried_by_what_on_what(judged: Path, export: Path) -> None:
    found, facts = told(export), Run(judged).evaluation
    assert facts is not None
    own, verdict, validation = found["judgements"]
    assert own["images"] == {"split": "digits/test", "n": 30, "asked_n": 30, "sha256": facts["images"]}
    assert validation["images"]["split"] == "digits/train/validation"
    assert own["asked"] == "recipe,quick"
    assert [(attack["name"], attack["autoattack"]) for attack in own["attacks"]] == [("pgd", None), ("quick", None)]
    assert [(attack["name"], attack["autoattack"]) for attack in verdict["attacks"]] == [("autoattack", "standard")]
    assert own["attacks"][0]["settings"].startswith("PGD(threat=ThreatModel(norm='linf', eps=0.1")
    assert own["versions"] == found["provenance"]["versions"], "one environment trained and judged"
    assert own["finished"].endswith("+00:00")
    assert found["model"]["shape"] == [1, 8, 8]
    assert found["doctor"]["about"] == "verdict"
    assert found["recipe"]["training"]["epochs"] == 8
    assert (found["model"]["trained_by_unmoved"], found["model"]["training_seed"]) == (True, 0)


def test_a_sampled_verdict_is_an_estimate_with_both_intervals(sampled: Path, tmp_path: Path) -> None:
    unmoved("export", sampled, "--out", tmp_path / "out").fine()
    found, facts = told(tmp_path / "out"), Run(sampled).sampled
    estimate = records.estimate(facts)
    assert facts is not None
    assert estimate is not None
    own, judgement, validation = found["judgements"]
    assert [own["kind"], judgement["kind"], validation["kind"]] == ["evaluation", "sampled", "validation"]
    assert own["estimate"] is validation["estimate"] is None
    assert [attack["autoattack"] for attack in judgement["attacks"]] == [None]
    assert {row["measure"] for row in judgement["results"]} == {"clean", "quick", "worst case"}
    said = judgement["estimate"]
    assert {key: said[key] for key in vars(estimate) if key in said} == {
        key: value for key, value in vars(estimate).items() if key in said
    }
    assert (said["method"], said["attack"]["autoattack"]) == ("sampled", "standard")
    assert said["accuracy"] == estimate.left / estimate.n
    assert said["of_these_images"] == [end / estimate.n for end in estimate.interval]
    assert said["of_all_images"] == list(estimate.population)
    assert judgement["files"]["sampled/asked.csv"] == sha256(sampled / "sampled" / "asked.csv")


def test_a_sample_of_another_attack_is_refused(sampled: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(sampled, tmp_path / "run"))
    path = run / "sampled" / "sampled.json"
    path.write_text(path.read_text(encoding="utf-8").replace("AutoAttack(", "Quick("), encoding="utf-8")
    assert "expected a sampled verdict of AutoAttack's standard version" in unmoved("export", run).mistake()


def test_an_evaluation_by_an_older_version(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ROOT / "tests/runs/before_0_2/finished", tmp_path / "run"))
    unmoved("export", run).fine()
    (judgement,) = told(run / "export")["judgements"]
    assert (judgement["versions"], judgement["finished"]) == ({}, None)
    assert told(run / "export")["model"]["shape"] == [1, 8, 8], "of its gallery"


def test_a_model_that_was_trained_elsewhere(judged: Path, tmp_path: Path) -> None:
    weights, run = tmp_path / "net.safetensors", tmp_path / "run"
    shutil.copy(judged / "best.safetensors", weights)
    said = ("--model-set", "hidden=[16]", "--data", "digits", "--data-set", "test=1500", "--eps", 0.1)
    unmoved("judge", "mlp", "--weights", weights, *said, "--attacks", "pgd", "--n", 8, "--out", run).fine()
    unmoved("export", run).fine()
    found = told(run / "export")
    assert (found["model"]["trained_by_unmoved"], found["model"]["training_seed"]) == (False, None)
    assert found["provenance"]["weights"]["sha256"] == sha256(weights)
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "trained elsewhere and judged by unmoved" in card
    assert "of one training run" not in card
    entry = json.loads((run / "export" / "robustbench.json").read_text(encoding="utf-8"))
    assert entry["additional_data"] is None
    unmoved("export", run, "--verify").fine()


def test_numbers_that_json_lacks_are_texts(changed: Callable[..., Path]) -> None:
    run = changed(words=("[data]", "[data]\nodd = [inf, nan, 1979-05-27]"))
    unmoved("export", run).fine()
    assert told(run / "export")["recipe"]["data"]["odd"] == ["inf", "nan", "1979-05-27"]
