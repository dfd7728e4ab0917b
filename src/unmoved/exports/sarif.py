"""Write the doctor's findings in SARIF 2.1.0, the format that viewers of analysis results read.

Static Analysis Results Interchange Format, OASIS standard, version 2.1.0 (2020): a run of a tool, its rules, and a
result for each finding.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from unmoved.evaluation.doctor.finding import DO_NOT_BELIEVE, LOOK_CLOSER, NOTE
from unmoved.exports.exported_run import ExportedRun

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {DO_NOT_BELIEVE: "error", LOOK_CLOSER: "warning", NOTE: "note"}


def sarif(exported: ExportedRun, weights: str) -> dict[str, Any]:
    """Return the SARIF log of the doctor's findings about an exported model.

    A run without ``results`` is one in which nothing was examined (section 3.14.23): it says so in a notification.

    Args:
        weights: the name of the file of weights, which the findings are about.
    """
    doctor = exported.doctor
    findings = [] if doctor is None else doctor["findings"]
    rules: dict[str, dict[str, Any]] = {}
    results = []
    for found in findings:
        name = _slug(found["check"])
        rules.setdefault(
            name,
            {
                "id": name,
                "shortDescription": {"text": found["check"]},
                "fullDescription": {"text": found["why"]},
                "help": {"text": found["do"]},
                "defaultConfiguration": {"level": LEVELS[found["grade"]]},
            },
        )
        results.append(
            {
                "ruleId": name,
                "ruleIndex": list(rules).index(name),
                "level": LEVELS[found["grade"]],
                "message": {"text": f"{found['check']}: {found['measured']}. {found['why']}. To do: {found['do']}."},
                "locations": [{"physicalLocation": {"artifactLocation": {"uri": weights, "index": 0}}}],
                "properties": {"grade": found["grade"]},
            }
        )
    driver = {"name": "unmoved doctor", "version": metadata.version("unmoved"), "rules": list(rules.values())}
    artifact = {"location": {"uri": weights}, "roles": ["analysisTarget"], "hashes": {"sha-256": exported.sha256}}
    run: dict[str, Any] = {"tool": {"driver": driver}, "artifacts": [artifact]}
    if doctor is None:
        said = "the doctor was not asked about these weights and outcomes: `unmoved doctor RUN` does"
        notification = {"level": "warning", "message": {"text": said}}
        run["invocations"] = [{"executionSuccessful": False, "toolExecutionNotifications": [notification]}]
    else:
        run |= {"invocations": [{"executionSuccessful": True}], "results": results}
        run["properties"] = {"sentence": doctor.get("sentence", ""), "n": doctor.get("n")}
        if exported.sampled is not None and exported.sampled.estimate is not None:
            run["properties"]["about"] = exported.sampled.estimate.words()
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _slug(check: str) -> str:
    """Return an identifier of a check: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", check.lower()).strip("-") or "check"
