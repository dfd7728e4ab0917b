"""Files that were torn or in which bits flipped: noticed, mended where that can be done, and never trained on."""

from __future__ import annotations

import io
import pickle
import random
import re
import shlex
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import RECIPE, digests, interrupted, recipe, unmoved
from safetensors.torch import load_file
from torch import Tensor, nn

from unmoved import models
from unmoved.core import files
from unmoved.core.errors import UnmovedError
from unmoved.runs.folder import Run
from unmoved.training import checkpoint
from unmoved.training.validation import Validation

EPOCHS = 3
DRAW = random.Random(0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(recipe, the finished run, the same run interrupted after its second epoch of three), not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    path = recipe(folder, RECIPE.replace("epochs = 2", f"epochs = {EPOCHS}"))
    unmoved("train", path, "--out", folder / "finished").fine()
    interrupted(path, folder / "stopped", saves=2)
    return path, folder / "finished", folder / "stopped"


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises this, whatever it is given."""

    def refuse(*anything: Any, **settings: Any) -> None:
        raise error

    return refuse


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def same(one: Path, two: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert Run.open(one).metrics.drop(columns="seconds").equals(Run.open(two).metrics.drop(columns="seconds"))


# --- the trainer's state


def place_of(kind: str, size: int) -> int:
    return {"first": 0, "last": size - 1, "seal": size - 70, "end of the archive": size - 90}.get(
        kind, DRAW.randrange(size)
    )


@pytest.mark.parametrize("kind", ["first", "last", "end of the archive", *(f"random {k}" for k in range(6))])
@pytest.mark.parametrize("which", [1, 2], ids=["finished", "stopped"])
def test_a_flipped_bit_in_the_state_costs_an_epoch_and_the_end_is_the_same(
    stopped: tuple[Path, Path, Path], tmp_path: Path, kind: str, which: int
) -> None:
    path, finished, _ = stopped
    run = Path(shutil.copytree(stopped[which], tmp_path / "run"))
    flip(run / "trainer.pt", place_of(kind, (run / "trainer.pt").stat().st_size), DRAW.randrange(8))
    epochs = {1: 3, 2: 2}[which]
    assert Run.open(run).load_state()["epochs"] == epochs - 1
    if which == 1:
        (run / "metrics.jsonl").write_bytes(b"")  # with a whole log nobody would look at the state
    said = unmoved("train", path, "--out", run, "--resume").fine().out
    assert f"note: {run / 'trainer.pt'} is damaged (its checksum differs); going on from trainer.previous.pt" in said
    assert said.count("damaged") == 1
    assert re.findall(r"epoch (\d)/3", said) == [str(k) for k in range(epochs, EPOCHS + 1)]
    if which == 1:  # one line was saved before the state before, and is lost
        (run / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    same(run, finished)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_state_costs_an_epoch_and_the_end_is_the_same(
    stopped: tuple[Path, Path, Path], tmp_path: Path, share: float
) -> None:
    path, finished, cut = stopped
    run = Path(shutil.copytree(cut, tmp_path / "run"))
    whole = (run / "trainer.pt").read_bytes()
    (run / "trainer.pt").write_bytes(whole[: int(share * len(whole))])
    assert "is damaged" in unmoved("train", path, "--out", run, "--resume").fine().out
    same(run, finished)


def test_both_states_damaged_is_one_clear_error(stopped: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, finished, cut = stopped
    run = Path(shutil.copytree(cut, tmp_path / "run"))
    for name in ("trainer.pt", "trainer.previous.pt"):
        flip(run / name, 1000)
    before = digests(run)
    message = unmoved("train", path, "--out", run, "--resume").mistake()
    assert message.startswith(f"{run / 'trainer.pt'}: not a trainer state that can be read safely")
    assert message.endswith("delete it and trainer.previous.pt to train this run from its start")
    assert digests(run) == before
    for name in ("trainer.pt", "trainer.previous.pt"):  # what it says to do does help
        (run / name).unlink()
    unmoved("train", path, "--out", run, "--resume").fine()
    same(run, finished)


def small_state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), float(step))}, "log": {"epoch": step}, "best": [0.5, 0.5]}


def test_no_single_bit_anywhere_in_a_state_goes_unnoticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, small_state(step))
    path = tmp_path / "trainer.pt"
    whole, before = path.read_bytes(), repr(small_state(1))
    for place in {*range(0, len(whole), 3), *range(len(whole) - 100, len(whole))}:  # to the end of the archive: all
        flip(path, place, place % 8)
        caplog.clear()
        assert repr(checkpoint.load(tmp_path)) == before, place
        assert caplog.messages == []  # of who only looks
        assert repr(checkpoint.load(tmp_path, mend=True)) == before, place
        assert len(caplog.messages) == 1
        path.write_bytes(whole)
    for length in [*range(0, len(whole), 50), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:length])
        assert repr(checkpoint.load(tmp_path)) == before, length


def test_a_state_is_written_once_and_never_held_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that reach the disk, and those of Python that were alive meanwhile."""
    state = {**small_state(1), "model": {f"w{k}": torch.randn(50_000) for k in range(20)}}  # 4 MB, 0.2 each
    written: list[int] = []

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            written.append(len(data))
            return super().write(data)

    monkeypatch.setattr(files, "open", lambda path, mode: Counted(path, mode), raising=False)
    checkpoint.save(tmp_path, state)  # what torch imports at its first call is not the state's
    for work in (lambda: checkpoint.save(tmp_path, state), lambda: checkpoint.load(tmp_path)):
        written.clear()
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3_000_000  # a piece of a megabyte, where a copy would be four
        assert sum(written) in (0, (tmp_path / "trainer.pt").stat().st_size)


NOW = (
    PermissionError(13, "Permission denied"),
    OSError(5, "Input/output error"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    OSError(12, "Cannot allocate memory"),
)


@pytest.mark.parametrize("where", ["open", "_require_seal", "torch.load"])
@pytest.mark.parametrize("error", NOW, ids=lambda error: str(error)[:20])
def test_a_state_that_cannot_be_read_now_is_not_damaged(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """Nothing is removed, nobody is told to delete anything, and once the cause is gone it goes on."""
    run = Path(shutil.copytree(stopped[2], tmp_path / "run"))
    before, refuse = digests(run), raising(error)
    with monkeypatch.context() as patch:
        if where == "torch.load":
            patch.setattr(torch, "load", refuse)
        else:
            patch.setattr(checkpoint, where, refuse, raising=False)
        message = unmoved("train", stopped[0], "--out", run, "--resume").mistake()
    assert message.startswith(f"{run / 'trainer.pt'}: the trainer's state cannot be read at the moment (")
    assert (error.strerror if isinstance(error, OSError) else str(error).split(";")[0]) in message
    assert "delete" not in message
    assert digests(run) == before


@pytest.mark.parametrize("error", NOW[2:4], ids=["MemoryError", "RuntimeError"])
def test_no_room_to_restore_a_state_is_not_another_model(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = Path(shutil.copytree(stopped[2], tmp_path / "run"))
    before, refuse = digests(run), raising(error)
    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", refuse)
    message = unmoved("train", stopped[0], "--out", run, "--resume").mistake()
    assert "not enough memory" in message
    assert "delete" not in message
    assert digests(run) == before


@pytest.mark.parametrize("error", NOW, ids=lambda error: str(error)[:20])
def test_weights_that_cannot_be_read_now_are_not_damaged(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nor written anew from the state: what is there may be somebody's."""
    run = Path(shutil.copytree(stopped[2], tmp_path / "run"))
    before, refuse = digests(run), raising(error)
    monkeypatch.setattr(models.weights_file, "safe_open", refuse)
    for command in (["train", stopped[0], "--out", run, "--resume"], ["evaluate", run, "--n", 5]):
        message = unmoved(*command).mistake()
        assert "cannot be read at the moment" in message
        assert "whole" not in message
        assert "save it again" not in message
    assert digests(run) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
def test_what_stops_the_writing_of_a_state_is_what_is_said(tmp_path: Path, error: BaseException) -> None:
    """Wherever it stops; torch's archive writer would complain of its own position."""
    checkpoint.save(tmp_path, small_state(1))
    before, calls, stop_at = digests(tmp_path), 0, -1

    class Stopping(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise error
            return super().write(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", lambda path, mode: Stopping(path, mode), raising=False)
        checkpoint.save(tmp_path / "counted", small_state(2))
        for place in range(1, calls + 1):
            calls, stop_at = 0, place
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UnmovedError) as said:
                checkpoint.save(tmp_path, small_state(2))
            assert isinstance(error, KeyboardInterrupt) or "the disk is full" in str(said.value)
            assert {name: digest for name, digest in digests(tmp_path).items() if "/" not in name} == before


def test_a_damaged_state_does_not_take_the_place_of_the_whole_one_before(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mended from the epoch before, then killed while the next one is saved: that epoch must still be there."""
    path, finished, cut = stopped
    run, real = Path(shutil.copytree(cut, tmp_path / "run")), files.os.replace
    flip(run / "trainer.pt", 1000)

    def replace(source: Path, target: Path) -> None:
        if target.name == "trainer.pt":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        assert unmoved("train", path, "--out", run, "--resume").code == 130
    assert Run.open(run).load_state()["epochs"] == 1
    unmoved("train", path, "--out", run, "--resume").fine()
    same(run, finished)


def test_killed_between_the_two_renames_the_state_before_is_there(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, finished, _ = stopped
    run, real = tmp_path / "run", files.os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == "trainer.pt" and (run / "trainer.previous.pt").exists():
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        assert unmoved("train", path, "--out", run).code == 130
    assert not (run / "trainer.pt").exists()
    assert Run.open(run).load_state()["epochs"] == 1
    said = unmoved("train", path, "--out", run, "--resume").fine().out
    assert "damaged" not in said
    same(run, finished)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("evil", ["trainer.pt", "trainer.previous.pt", "sealed"])
def test_no_pickle_is_executed_in_either_state(stopped: tuple[Path, Path, Path], tmp_path: Path, evil: str) -> None:
    path, _, cut = stopped
    run, target = Path(shutil.copytree(cut, tmp_path / "run")), tmp_path / "executed"
    if evil == "sealed":
        checkpoint.save(run, {"log": Evil(target)})
    else:
        (run / evil).write_bytes(pickle.dumps({"log": Evil(target)}))
    if evil == "trainer.previous.pt":
        flip(run / "trainer.pt", 500)
        assert "read safely" in unmoved("train", path, "--out", run, "--resume").mistake()
    else:
        assert "is damaged" in unmoved("train", path, "--out", run, "--resume").fine().out
    assert not target.exists()
    pickle.loads(pickle.dumps({"log": Evil(target)}))  # the trap does work
    assert target.exists()


# --- weights


def test_no_single_bit_anywhere_in_a_weights_file_changes_what_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), tmp_path / "w.safetensors"
    models.save_weights(model, path)
    whole, own, read = path.read_bytes(), model.state_dict(), []
    for place in range(len(whole)):
        flip(path, place, place % 8)
        try:
            models.load_weights(other := nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), path)
        except models.DamagedFile:
            assert not models.is_whole(path)
        else:  # a bit of the checksum's name, so that there is none: but these are the weights
            assert all(torch.equal(own[name], value) for name, value in other.state_dict().items())
            read.append(place)
        path.write_bytes(whole)
    assert len(read) <= len("sha256")
    assert models.is_whole(path)


@pytest.fixture
def first_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter((0.9, 0.5, 0.1))

    def validated(*anything: object) -> dict[str, float]:
        return {"validation_clean": 0.9, "validation_robust": next(scores), "validation_n": 100}

    monkeypatch.setattr(Validation, "accuracy", validated)


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("how", ["flipped", "torn", "missing"])
@pytest.mark.parametrize("when", ["finished", "stopped"])
def test_damaged_weights_are_named_and_the_command_that_it_says_restores_them(
    first_is_best: None, tmp_path: Path, which: str, how: str, when: str
) -> None:
    path = recipe(tmp_path, RECIPE.replace("epochs = 2", f"epochs = {EPOCHS}"))
    run = tmp_path / "my run"
    if when == "finished":
        unmoved("train", path, "--out", run).fine()
    else:
        interrupted(path, run, saves=2)
    file = run / f"{which}.safetensors"
    whole = file.read_bytes()
    assert whole != (run / f"{ {'best': 'last', 'last': 'best'}[which] }.safetensors").read_bytes()
    if how == "flipped":
        flip(file, len(whole) - 10)
    elif how == "torn":
        file.write_bytes(whole[:-10])
    else:
        file.unlink()
    message = unmoved("evaluate", run, "--weights", which, "--n", 5).mistake()
    assert str(file) in message or file.name in message
    assert "--resume" in message
    if how != "missing":
        (command,) = re.findall(r"`unmoved (.*?)`", message)
        arguments = shlex.split(command)
    else:
        arguments = ["train", str(run / "recipe.toml"), "--out", str(run), "--resume"]
    said = unmoved(*arguments).fine().out
    assert f"note: {file} was missing or damaged: restored from the trainer's state" in said
    if which == "best" or when == "finished":
        assert file.read_bytes() == whole
    assert models.is_whole(file)
    assert "note" not in unmoved(*arguments).fine().out
    unmoved("evaluate", run, "--weights", which, "--n", 5, "--no-doctor").fine()


def test_what_is_whole_is_not_touched_by_mending(
    stopped: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that somebody put there stay: they are not damaged, only others."""
    _, finished, _ = stopped
    run = Run.open(shutil.copytree(finished, tmp_path / "run"))
    other: dict[str, Tensor] = {name: value + 1 for name, value in load_file(run.path / "best.safetensors").items()}
    models.save_tensors(other, run.path / "best.safetensors")
    before = digests(run.path)
    run.mend_weights(run.load_state())
    assert digests(run.path) == before
    assert caplog.messages == []


def test_weights_without_a_run_are_refused_too(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    models.save_weights(net, tmp_path / "w.safetensors")
    flip(tmp_path / "w.safetensors", (tmp_path / "w.safetensors").stat().st_size - 1)
    with pytest.raises(UnmovedError, match=r"changed since it was saved \(its checksum differs\); copy or save it"):
        models.load_weights(net, tmp_path / "w.safetensors")


# --- disks that are full in the middle of a file


def test_a_disk_that_is_full_in_the_middle_of_a_file_stops_in_one_message(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of the file is written, then there is no space: each write of a training once."""
    path, finished, _ = stopped
    calls, full_at = 0, 0

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == full_at:
                super().write(bytes(data)[: len(data) // 2])
                raise OSError(28, "No space left on device")
            return super().write(data)

    # A buffer that holds a whole file: each is one write, or this would train once for each tensor of each state.
    buffered = lambda path, mode: io.BufferedWriter(Full(path, mode), 1 << 24)  # noqa: E731
    monkeypatch.setattr(files, "open", buffered, raising=False)
    unmoved("train", path, "--out", tmp_path / "counted").fine()
    assert calls >= 2 + 3 * EPOCHS
    for full_at in range(1, calls + 1):
        run, calls = tmp_path / f"full{full_at}", 0
        message = unmoved("train", path, "--out", run).mistake()
        assert f"could not write {run}" in message
        assert "the disk is full" in message
        assert not list(run.rglob(".*"))
        said = unmoved("train", path, "--out", run, "--resume").fine()
        assert "note" not in said.out
        same(run, finished)
