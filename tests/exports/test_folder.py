"""Exports are written whole, over nothing that somebody else wrote; whatever was changed since is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import digests, unmoved
from safetensors.torch import load_file

from unmoved import models
from unmoved.exports.folder import NAMES
from unmoved.runs.folder import Run


@pytest.fixture
def folder(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "folder"))


# --- what is exported


def test_the_weights_are_those_that_were_judged_byte_for_byte(judged: Path, export: Path) -> None:
    assert (export / "model.safetensors").read_bytes() == (judged / "best.safetensors").read_bytes()
    assert {path.name for path in export.iterdir()} == set(NAMES)


def test_last_weights_are_exported_where_they_were_judged(changed: Callable[..., Path]) -> None:
    run = changed("evaluation", "verdict", "doctor.json", "validation")
    unmoved("evaluate", run, "--weights", "last", "--no-doctor").fine()
    unmoved("export", run).fine()
    assert (run / "export" / "model.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()


@pytest.mark.parametrize("without", [("verdict",), ("evaluation",), ("doctor.json",), ("validation",)])
def test_parts_of_a_verdict_are_exported(changed: Callable[..., Path], without: tuple[str, ...]) -> None:
    run = changed(*without)
    said = unmoved("export", run).fine().out
    found = json.loads((run / "export" / "evidence.json").read_text(encoding="utf-8"))
    kinds = [kind for kind in ("evaluation", "verdict", "validation") if kind not in without]
    assert [judgement["kind"] for judgement in found["judgements"]] == kinds
    # The doctor's opinion is about AutoAttack's outcomes: without these it is about others than those that are shown.
    assert (found["doctor"] is None) == bool({"doctor.json", "verdict"} & {*without})
    assert ("the doctor's opinion is about other outcomes" in said) == ("verdict" in without)
    assert ("the doctor was not asked" in said) == ("doctor.json" in without)
    assert ("AutoAttack did not judge it" in said) == ("verdict" in without)
    unmoved("export", "--verify", run).fine()


@pytest.mark.parametrize("without", [("evaluation", "verdict"), ("evaluation", "verdict", "validation", "doctor.json")])
def test_a_run_that_was_not_judged_is_told_how(changed: Callable[..., Path], without: tuple[str, ...]) -> None:
    run = changed(*without)
    assert unmoved("export", run).mistake() == (
        f"{run}: expected an evaluated run, came none; run `unmoved evaluate {run}` first"
    )
    assert not (run / "export").exists()


def test_a_run_that_was_trained_since_is_told_so(changed: Callable[..., Path]) -> None:
    run = changed()
    shutil.copy(run / "last.safetensors", run / "best.safetensors")
    data = bytearray((run / "best.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "best.safetensors").write_bytes(data)
    assert "it was trained since; run `unmoved evaluate" in unmoved("export", run).mistake()
    (run / "best.safetensors").unlink()
    assert "came no file; train the run again" in unmoved("export", run).mistake()


def test_what_is_about_other_weights_is_left_out_and_said(changed: Callable[..., Path]) -> None:
    run = changed()
    other = {name: tensor + 0.001 for name, tensor in load_file(run / "last.safetensors").items()}
    models.save_tensors(other, run / "last.safetensors")
    unmoved("evaluate", run, "--weights", "last", "--no-doctor").fine()
    said = unmoved("export", run).fine().out
    found = json.loads((run / "export" / "evidence.json").read_text(encoding="utf-8"))
    assert [judgement["kind"] for judgement in found["judgements"]] == ["evaluation"]
    assert found["doctor"] is None
    assert len(found["left_out"]) == 3
    for what in ("AutoAttack's verdict", "the doctor's opinion", "validation images"):
        assert sum(what in line for line in found["left_out"]) == 1
        assert what in said


# --- what it replaces


def test_an_export_is_renewed(changed: Callable[..., Path]) -> None:
    run = changed("doctor.json")
    unmoved("export", run).fine()
    unmoved("doctor", run, "--n", 5).fine()
    unmoved("export", run).fine()
    assert json.loads((run / "export" / "evidence.json").read_text(encoding="utf-8"))["doctor"]["n"] == 5
    unmoved("export", "--verify", run / "export").fine()


def test_what_somebody_else_wrote_is_not_replaced(judged: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert "README.md there was not exported" in unmoved("export", judged, "--out", tmp_path).mistake()
    assert digests(tmp_path).keys() == {"README.md"}
    assert "came a run folder" in unmoved("export", judged, "--out", judged).mistake()


def test_what_was_changed_by_hand_is_not_replaced(judged: Path, folder: Path) -> None:
    with open(folder / "README.md", "a", encoding="utf-8") as file:
        file.write("More about this model.\n")
    before = digests(folder)
    assert (
        "README.md changed since it was exported and would be lost"
        in unmoved("export", judged, "--out", folder).mistake()
    )
    assert digests(folder) == before
    (folder / "README.md").unlink()
    unmoved("export", judged, "--out", folder).fine()


def test_a_folder_that_cannot_be_written(judged: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "could not write" in unmoved("export", judged, "--out", tmp_path / "file" / "x").mistake()


# --- what was changed since


def test_an_intact_export(folder: Path) -> None:
    before = digests(folder)
    said = unmoved("export", folder, "--verify").fine().out
    assert "intact" in said
    assert "5 files" in said
    assert digests(folder) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    place = data.index(b"digits") if name == "evidence.json" else len(data) // 2
    data[place] ^= 1
    (folder / name).write_bytes(data)
    message = unmoved("export", folder, "--verify").mistake()
    assert f"came {name} changed; " in message


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = unmoved("export", folder, "--verify").mistake()
    assert (f"came {name} missing; " in message) or (name == "evidence.json" and "it has no evidence.json" in message)


def test_a_figure_of_the_evidence_cannot_be_rounded_up(folder: Path) -> None:
    text = (folder / "evidence.json").read_text(encoding="utf-8")
    (folder / "evidence.json").write_text(text.replace('"correct": ', '"correct": 1', 1), encoding="utf-8")
    assert "came evidence.json changed; " in unmoved("export", folder, "--verify").mistake()


def test_all_changes_are_in_one_message(folder: Path) -> None:
    (folder / "README.md").write_text("other", encoding="utf-8")
    (folder / "doctor.sarif").unlink()
    (folder / "below" / "deep").mkdir(parents=True)
    (folder / "below" / "deep" / "x.bin").write_bytes(b"x")
    (folder / ".hidden").write_bytes(b"x")
    message = unmoved("export", folder, "--verify").mistake()
    assert message.startswith(f"{folder}: expected the files as they were exported, came ")
    assert "README.md changed, doctor.sarif missing, .hidden added, below/deep/x.bin added" in message


def test_many_added_files_are_counted(folder: Path) -> None:
    for number in range(30):
        (folder / f"{number:02}.txt").write_bytes(b"")
    message = unmoved("export", folder, "--verify").mistake()
    assert "19.txt added and 10 more" in message


def test_what_version_control_and_killed_commands_leave_is_no_addition(folder: Path) -> None:
    for name in (".git/HEAD", ".gitattributes", ".cache/huggingface/x", f".export.{'0' * 32}.tmp/README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    unmoved("export", folder, "--verify").fine()
    (folder / "below").mkdir()
    (folder / "below" / ".gitattributes").write_bytes(b"x")
    assert "below/.gitattributes added" in unmoved("export", folder, "--verify").mistake()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in the file system are of POSIX")
@pytest.mark.parametrize("name", NAMES)
def test_whatever_lies_in_the_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in unmoved("export", folder, "--verify").mistake()
    (folder / name).unlink()
    with open(folder / name, "wb") as file:
        file.truncate(2**40)
    assert name in unmoved("export", folder, "--verify").mistake()
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in unmoved("export", folder, "--verify").mistake()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "came a list"),
        ('{"format": 2}', "format"),
        ('{"format": 1, "sha256": "x"}', "sha256"),
    ],
)
def test_evidence_that_is_none(folder: Path, text: str, words: str) -> None:
    (folder / "evidence.json").write_text(text, encoding="utf-8")
    message = unmoved("export", folder, "--verify").mistake()
    assert str(folder / "evidence.json") in message
    assert words in message


@pytest.mark.parametrize("name", ["../README.md", "/etc/passwd", "a/b", ".."])
def test_only_names_of_files_are_looked_up(folder: Path, name: str) -> None:
    told = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    told["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (folder / "evidence.json").write_text(json.dumps(told), encoding="utf-8")
    assert f"{name} listed, which is no name of a file" in unmoved("export", folder, "--verify").mistake()


def test_a_folder_that_is_no_export(tmp_path: Path, judged: Path) -> None:
    assert "expected a folder that `unmoved export` wrote" in unmoved("export", tmp_path, "--verify").mistake()
    assert "expected a folder that `unmoved export` wrote" in unmoved("export", judged, "--verify").mistake()
    assert "expected a folder" in unmoved("export", tmp_path / "nothing", "--verify").mistake()


# --- the command


def test_the_command_line(judged: Path, tmp_path: Path) -> None:
    assert "expected a run folder or --schema" in unmoved("export").mistake()
    out = ("--out", tmp_path / "out")
    for word, words in {
        "license": "expected KEY=VALUE",
        "licence=mit": "did you mean 'license'",
        "license=MIT License": "a license of the hub",
        "link=javascript:x": "https://",
        "authors=a\nb": "printable",
    }.items():
        assert words in unmoved("export", judged, *out, "--about", word).mistake()
    assert not (tmp_path / "out").exists()
    unmoved("export", judged, *out, "--about", "license=apache-2.0").fine()
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").startswith('---\nlicense: "apache-2.0"\n')
    assert Run(judged).doctor is not None
