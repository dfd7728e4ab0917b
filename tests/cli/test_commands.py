"""The command as a user sees it: exit code 0, or one message and 1, or 2 for a wrong command line; no traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from helpers.cli import RECIPE, Said, digests, recipe, unmoved

from unmoved.runs import components
from unmoved.runs import recipe as config
from unmoved.runs.folder import Run
from unmoved.training import loop

ANSI = re.compile(r"\x1b\[")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its finished, evaluated run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    path = recipe(folder / "lab")
    unmoved("train", path, "--out", folder / "run").fine()
    unmoved("evaluate", folder / "run").fine()
    return path, folder / "run"


@pytest.fixture
def ours(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the recipe and the run that may be spoilt."""
    path, run = trained
    shutil.copytree(run, tmp_path / "run")
    return path, tmp_path / "run"


def in_a_process(*arguments: object, cwd: Path | None = None, **environment: str) -> Said:
    """The command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "unmoved", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Said(done.returncode, done.stdout, done.stderr)


# --- the journey


def test_train_evaluate_and_report_in_plain_lines(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    said = unmoved("train", path, "--out", tmp_path / "run", "--set", "training.epochs=1").fine()
    first, *rest = said.out.splitlines()
    assert re.fullmatch(r"epoch 1/1: loss \d\.\d{4}, validation clean \d+\.\d%, robust \d+\.\d%, \d+ s", first)
    assert rest == [f"trained: {tmp_path / 'run'}", f"next: unmoved evaluate {tmp_path / 'run'}"]
    said = unmoved("evaluate", tmp_path / "run", "--n", "20").fine()
    assert "worst case" in said.out
    assert f"next: unmoved report {tmp_path / 'run'}" in said.out
    assert not ANSI.search(said.out)
    assert len(Run.open(tmp_path / "run").outcomes) == 20
    said = unmoved("report", tmp_path / "run", "--out", tmp_path / "pages" / "r.html", "--title", "Ours").fine()
    assert said.out == f"report: {tmp_path / 'pages' / 'r.html'}\n"
    assert "<title>Ours" in (tmp_path / "pages" / "r.html").read_text()


def test_a_training_in_another_ball_than_the_judged_one_is_told(tmp_path: Path) -> None:
    path, short = recipe(tmp_path), ("--set", "training.epochs=1")
    words = "note: training ends with attacks within eps 0.3, where the threat model that judges has 0.1"
    for name, eps in (("larger", "0.3"), ("ramp", "{ from = 0.0, to = 0.3 }")):
        said = unmoved("train", path, "--out", tmp_path / name, *short, "--set", f"attack.eps={eps}").fine()
        assert said.out.startswith(words)
    for name, eps in (("same", "0.1"), ("a little more", "0.12")):
        said = unmoved("train", path, "--out", tmp_path / name, *short, "--set", f"attack.eps={eps}").fine()
        assert "note" not in said.out


def test_weights_that_are_not_there_are_missed_before_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(test: int) -> None:
        raise AssertionError("read")

    monkeypatch.setitem(components.KINDS["data"], "digits", read)
    path = recipe(tmp_path, RECIPE.replace("[model]", '[model]\nweights = "nat.pt"'))
    assert (
        "nat.pt: expected a file of weights, came none" in unmoved("train", path, "--out", tmp_path / "run").mistake()
    )


def test_the_real_command_trains_and_says_so_without_colours(tmp_path: Path) -> None:
    recipe(tmp_path)
    said = in_a_process("train", "tiny.toml", "--out", "run", cwd=tmp_path, TERM="xterm-256color").fine()
    assert len(said.out.splitlines()) == 4
    assert not ANSI.search(said.out + said.err)
    assert said.err == ""  # no warning of a library, no stray word
    assert Run.open(tmp_path / "run").metrics["epoch"].tolist() == [1, 2]


def test_the_real_command_answers_a_wrong_command_line() -> None:
    said = in_a_process("trian")
    assert said.code == 2
    assert "No such command" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    "arguments", [("--nonsense",), ("train",), ("train", "x.toml"), ("evaluate", "x", "--n", "0"), ("report",)]
)
def test_a_wrong_command_line_is_2(arguments: tuple[str, ...]) -> None:
    said = unmoved(*arguments)
    assert said.code == 2
    assert "Usage" in said.err


def test_help_is_0_and_names_every_command() -> None:
    said = unmoved("--help").fine()
    for command in ("train", "evaluate", "compare", "report", "show", "list"):
        assert command in said.out


def test_list_names_everything_and_the_recipes() -> None:
    lines = unmoved("list").fine().out.splitlines()
    for word in ("trades", "pgd", "awp", "small_cnn", "digits", "one_cycle"):
        assert any(re.match(rf"  {word} +\S", line) for line in lines), word
    assert any(line.strip().startswith("digits/at ") for line in lines)
    assert not any(ANSI.search(line) for line in lines)


def test_list_says_what_is_a_reconstruction_before_a_screen_cuts_the_line() -> None:
    ours = re.compile(r"  (\S*probscut\S*|global_probability|softmax) ")
    lines = [line[:80] for line in unmoved("list").fine().out.splitlines() if ours.match(line)]
    assert len(lines) == 12
    assert all("reconstruction" in line for line in lines)


def test_show_prints_the_resolved_recipe_and_the_schema(tmp_path: Path) -> None:
    path = recipe(tmp_path / "lab")
    said = unmoved("show", path, "--set", "training.epochs=9").fine()
    assert tomllib.loads(said.out) == config.read(path, ["training.epochs=9"]).tables()
    (tmp_path / "again.toml").write_text(said.out)
    assert unmoved("show", tmp_path / "again.toml").out == said.out
    schema = json.loads(unmoved("show", "--schema").fine().out)
    assert schema["title"] == "Recipe"
    assert "expected a recipe, the name of a part or --schema, came none" in unmoved("show").mistake()


def test_show_prints_counts_whole_and_shares_as_they_are(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    said = unmoved("show", path, "--set", "training.validation=200").fine().out
    assert "\nvalidation = 200\n" in said
    assert "\ntest = 1500\n" in said
    said = unmoved("show", path, "--set", "training.validation=0.5", "--set", "data.test=0.25").fine().out
    assert "\nvalidation = 0.5\n" in said
    assert "\ntest = 0.25\n" in said


# --- mistakes of training


def test_a_run_is_not_trained_over(ours: tuple[Path, Path]) -> None:
    path, run = ours
    before = digests(run)
    assert "already holds a run: pass --resume" in unmoved("train", path, "--out", run).mistake()
    assert digests(run) == before


def test_resume_of_a_finished_run_changes_nothing(ours: tuple[Path, Path]) -> None:
    path, run = ours
    before = digests(run)
    said = unmoved("train", path, "--out", run, "--resume").fine()
    assert said.out.startswith("trained:")
    assert digests(run) == before


def test_resume_of_another_recipe_is_refused_and_says_where_they_differ(ours: tuple[Path, Path]) -> None:
    path, run = ours
    before = digests(run)
    said = unmoved("train", path, "--out", run, "--resume", "--set", "training.epochs=9", "--set", "threat.eps=0.2")
    assert "another recipe (it differs in: threat, training)" in said.mistake()
    assert str(run / "recipe.toml") in said.mistake()
    assert digests(run) == before


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_resume_with_nothing_saved_starts(tmp_path: Path, there: str) -> None:
    path = recipe(tmp_path)
    if there == "an empty folder":
        (tmp_path / "run").mkdir()
    said = unmoved("train", path, "--out", tmp_path / "run", "--resume").fine()
    assert said.out.startswith("epoch 1/2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("attack.steps=-1", "PGD.steps: expected a whole number >= 0, came -1"),
        ("model.hidden=[0]", "hidden"),
        ("training.validation=5000", "digits/train: held-out size"),
        ("data.test=5000", "digits"),
        ("model.use=small_cnn", "expected images of at least"),
        ("attack.eps=9", "threat.eps"),
    ],
)
def test_a_recipe_that_cannot_be_built_makes_no_folder(tmp_path: Path, change: str, words: str) -> None:
    said = unmoved("train", recipe(tmp_path), "--out", tmp_path / "run", "--set", change)
    assert words in said.mistake()
    assert not (tmp_path / "run").exists()


def test_devices_that_are_not_there(ours: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = ours
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device, words in (("gpu", "did you mean"), ("cuda", "came 'cuda'")):
        assert words in unmoved("train", path, "--out", tmp_path / "new", "--device", device).mistake()
        assert words in unmoved("evaluate", run, "--device", device).mistake()
    assert not (tmp_path / "new").exists()


def test_a_diverging_loss_stops_at_once_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    # Float32 overflows in a few steps of this size; a threat of zero keeps the attack out of it.
    path = recipe(tmp_path, RECIPE.replace('use = "adam"\nlr = 0.01', 'use = "sgd"\nlr = 1e30'))
    said = unmoved("train", path, "--out", tmp_path / "run", "--set", "attack=none", "--set", "objective.ce.view=clean")
    assert re.search(r"at step \d+ .*in epoch 1: training stopped; try a smaller lr", said.mistake())
    assert not (tmp_path / "run" / "trainer.pt").exists()
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_nan_in_a_later_epoch_keeps_the_epoch_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers NaN from step 7 on (epochs have 5 steps)."""
    lab = tmp_path / "bad_lab"
    lab.mkdir()
    (lab / "__init__.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, shape, num_classes):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(64, num_classes)\n"
        "        self.steps = 0\n"
        "    def forward(self, x):\n"
        "        self.steps += self.training\n"
        "        return self.linear(x.flatten(1)) * (float('nan') if self.steps > 7 else 1.0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = recipe(tmp_path, RECIPE.replace('use = "mlp"\nhidden = [16]', 'use = "bad_lab:Net"'))
    run = tmp_path / "run"
    message = unmoved("train", path, "--out", run, "--allow", "bad_lab").mistake()
    assert "the loss became nan at step 7 (ce = nan), in epoch 2: training stopped" in message
    assert f"{run} keeps the state after epoch 1" in message
    assert Run.open(run).load_state()["epochs"] == 1
    assert Run.open(run).metrics["epoch"].tolist() == [1]


# --- spoilt folders


@pytest.mark.parametrize(
    ("file", "content", "command", "words"),
    [
        ("recipe.toml", None, "evaluate", "recipe.toml is missing, so this is no run or a half written one"),
        ("provenance.json", None, "evaluate", "provenance.json is missing"),
        ("provenance.json", b'{"format": 99}', "evaluate", "expected format 1, came 99; use the version of unmoved"),
        ("provenance.json", b"{}", "report", "expected format 1, came None"),
        ("provenance.json", b'{"form', "evaluate", "not valid JSON"),
        ("provenance.json", b"[]", "report", "expected a JSON object, came a list"),
        ("recipe.toml", b"name = ", "evaluate", "recipe.toml: not valid TOML"),
        ("recipe.toml", b"\xff\xfe", "evaluate", "recipe.toml: expected text in UTF-8"),
        ("recipe.toml", b'name = "x"\n', "evaluate", "data: expected a value, came none"),
        ("best.safetensors", None, "evaluate", "no best.safetensors yet; train first"),
        ("best.safetensors", b"torn", "evaluate", "not a whole safetensors file"),
        ("best.safetensors", b"\x80\x02cos\nsystem\n", "evaluate", "came a pickle"),
        ("evaluation/outcomes.csv", b"index,lab", "report", "the file is cut short"),
        ("evaluation/outcomes.csv", b"index,label\n1,2\n", "report", "came none of "),
        ("evaluation/outcomes.csv", None, "report", "expected an evaluated run"),
        ("evaluation/evaluation.json", None, "report", "expected an evaluated run"),
        ("evaluation/evaluation.json", b'{"n":', "report", "not valid JSON"),
        ("evaluation/gallery.npz", b"PK\x03\x04torn", "report", "gallery.npz: expected an .npz file"),
        ("evaluation/curve.csv", b"", "report", "curve.csv: "),
        ("metrics.jsonl", b'{"epoch": 1, "loss\n', "report", "metrics.jsonl: line 1: not valid JSON"),
        ("trainer.pt", b"PK\x03\x04torn", "resume", "not a trainer state that can be read safely"),
        ("trainer.pt", b"", "resume", "not a trainer state that can be read safely"),
    ],
)
def test_spoilt_runs_are_named(
    ours: tuple[Path, Path], file: str, content: bytes | None, command: str, words: str, tmp_path: Path
) -> None:
    path, run = ours
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
        if file == "trainer.pt":
            (run / "trainer.previous.pt").write_bytes(content)
            (run / "metrics.jsonl").unlink()  # with a whole log nobody would look at the state
    before = digests(run)
    arguments = {
        "evaluate": ["evaluate", run],
        "report": ["report", run, "--out", tmp_path / "r.html"],
        "resume": ["train", path, "--out", run, "--resume"],
    }
    message = unmoved(*arguments[command]).mistake()
    assert words in message
    assert str(run) in message
    assert digests(run) == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("file", ["trainer.pt", "best.safetensors"])
def test_torn_files_are_refused_wherever_they_are_torn(ours: tuple[Path, Path], file: str, share: float) -> None:
    path, run = ours
    whole = (run / file).read_bytes()
    (run / file).write_bytes(whole[: int(share * len(whole))])
    if file == "trainer.pt":
        (run / "trainer.previous.pt").write_bytes(whole[: int(share * len(whole))])
        (run / "metrics.jsonl").unlink()  # with a whole log nobody would look at the state
    said = unmoved("train", path, "--out", run, "--resume") if file == "trainer.pt" else unmoved("evaluate", run)
    assert str(run / file) in said.mistake()


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for name in ("missing", "file"):
        for command in ("evaluate", "report"):
            assert "expected a folder made by 'unmoved train'" in unmoved(command, tmp_path / name).mistake()
    assert "unknown value 'beste'; did you mean 'best'?" in unmoved("evaluate", "x", "--weights", "beste").mistake()


def test_evaluate_of_the_last_weights(ours: tuple[Path, Path]) -> None:
    _, run = ours
    unmoved("evaluate", run, "--weights", "last", "--n", "10").fine()
    assert Run.open(run).evaluation["weights"] == "last"


def test_every_recipe_in_one_report_is_judged_alike(ours: tuple[Path, Path], tmp_path: Path) -> None:
    path, run = ours
    unmoved("train", path, "--out", tmp_path / "other", "--set", "name=other").fine()
    unmoved("evaluate", tmp_path / "other", "--n", "10").fine()
    said = unmoved("report", run, tmp_path / "other", "--out", tmp_path / "r.html")
    assert "n" in said.mistake()


# --- disks


def test_folders_that_cannot_be_written(ours: tuple[Path, Path], tmp_path: Path) -> None:
    path, run = ours
    (tmp_path / "file").write_text("in the way")
    before = digests(run)
    said = unmoved("train", path, "--out", tmp_path / "file" / "run")
    assert f"could not write {tmp_path / 'file' / 'run'}" in said.mistake()
    assert str(tmp_path / "file") in unmoved("report", run, "--out", tmp_path / "file" / "r.html").mistake()
    shutil.rmtree(run / "evaluation")
    (run / "evaluation").write_text("in the way")
    assert "could not write" in unmoved("evaluate", run).mistake()
    assert {name: value for name, value in digests(run).items() if name != "evaluation"} == {
        name: value for name, value in before.items() if not name.startswith("evaluation")
    }


def test_a_disk_that_fills_at_any_write_leaves_a_state_to_go_on_from(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write syncs its file once: each of these calls fails once, and the run ends as if it never had."""
    path, finished = trained
    real, calls, full_at = os.fsync, 0, -1

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    unmoved("train", path, "--out", tmp_path / "uncut").fine()
    writes = calls
    assert writes in (9, 10)  # provenance and recipe; last, metrics and state of two epochs, and one or two bests
    for full_at in range(1, writes + 1):
        run, calls = tmp_path / f"full{full_at}", 0
        message = unmoved("train", path, "--out", run).mistake()
        assert str(run) in message
        assert "disk is full" in message or "No space left" in message
        assert not [name for name in digests(run) if name.endswith(".tmp")]
        unmoved("train", path, "--out", run, "--resume").fine()
        for name in ("best.safetensors", "last.safetensors"):
            assert (run / name).read_bytes() == (finished / name).read_bytes(), (full_at, name)
        assert Run.open(run).metrics.drop(columns="seconds").equals(Run.open(finished).metrics.drop(columns="seconds"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_fills_after_the_first_epoch(
    trained: tuple[Path, Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, finished = trained
    run, filler, real = small_disk / "run", small_disk / "filler", Run.save_state

    def save_state(self: Run, state: dict[str, object]) -> None:
        real(self, state)
        filler.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 4096))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", save_state)
        message = unmoved("train", path, "--out", run).mistake()
    assert "disk is full" in message or "No space left" in message
    assert str(run) in message
    assert Run.open(run).load_state()["epochs"] == 1
    filler.unlink()
    unmoved("train", path, "--out", run, "--resume").fine()
    assert (run / "best.safetensors").read_bytes() == (finished / "best.safetensors").read_bytes()


def test_an_interrupted_evaluation_is_no_evaluation(ours: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = ours

    def full(*anything: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = Run.open(run).evaluation
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "disk is full" in unmoved("evaluate", run).mistake()
    assert Run.open(run).evaluation == before, "nothing was computed yet: what was there stays"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "disk is full" in unmoved("evaluate", run).mistake()
    assert Run.open(run).evaluation == before, "it is replaced as a whole"
    unmoved("evaluate", run).fine()
    assert isinstance(Run.open(run).outcomes, pd.DataFrame)


def test_an_interrupt_is_130_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    train = ("train", recipe(tmp_path), "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", interrupted)
        said = unmoved(*train)
    assert said.code == 130
    assert f"nothing was saved yet; this begins anew:\n  {shlex.join(['unmoved', *map(str, train)])}\n" in said.err
    unmoved(*train).fine()


def test_tensorboard_gets_a_point_an_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = unmoved("train", recipe(tmp_path), "--out", tmp_path / "run", "--tensorboard")
    assert said.code == 0, said
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    epochs = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    for name in ("loss", "validation_robust", "parts/ce"):
        assert points[name] == list(range(1, epochs + 1))
