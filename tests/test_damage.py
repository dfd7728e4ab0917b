"""Files that were torn or in which bits flipped: noticed, mended where that can be done, and never trained on."""

from __future__ import annotations

import io
import pickle
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from road import RECIPE, digests, recipe, unmoved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmoved import checkpoint, disk, loop, models
from unmoved.errors import UnmovedError
from unmoved.run import Run

EPOCHS = 3
DRAW = random.Random(0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(recipe, the finished run, the same run interrupted after its second epoch of three), not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    path = recipe(folder, RECIPE.replace("epochs = 2", f"epochs = {EPOCHS}"))
    unmoved("train", path, "--out", folder / "finished").fine()
    interrupted(path, folder / "stopped")
    return path, folder / "finished", folder / "stopped"


def interrupted(path: Path, run: Path) -> None:
    """Train the recipe until its second epoch is saved."""
    real, saved = Run.save_state, []

    def save_state(run: Run, state: dict[str, Any]) -> None:
        real(run, state)
        saved.append(run)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_state", save_state)
        assert unmoved("train", path, "--out", run).code == 130


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
    assert len(Run.open(run).load_state()["log"]) == epochs - 1
    said = unmoved("train", path, "--out", run, "--resume").fine().out
    assert f"note: {run / 'trainer.pt'} is damaged (its checksum differs); going on from trainer.previous.pt" in said
    assert said.count("damaged") == 1
    assert re.findall(r"epoch (\d)/3", said) == [str(k) for k in range(epochs, EPOCHS + 1)]
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
    return {"model": {"w": torch.full((3,), float(step))}, "log": [{"epoch": step}], "best": [0.5, 0.5]}


def plain(state: dict[str, Any] | None) -> str:
    return repr(state)


def test_no_single_bit_anywhere_in_a_state_goes_unnoticed_or_changes_what_is_read(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, small_state(step))
    path = tmp_path / "trainer.pt"
    whole, expected = path.read_bytes(), [plain(small_state(step)) for step in (1, 2)]
    seal = range(len(whole) - 64 - len(checkpoint._SEAL), len(whole) - 64)
    for place in {*range(0, len(whole), 3), *range(len(whole) - 100, len(whole))}:  # to the end of the archive: all
        flip(path, place, place % 8)
        notes: list[str] = []
        # A bit of the seal's own words makes it a file of an older version, whose state is whole nevertheless.
        assert plain(checkpoint.load(tmp_path, notes.append)) == expected[place in seal], place
        assert len(notes) == (place not in seal)
        path.write_bytes(whole)
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        assert plain(checkpoint.load(tmp_path)) == expected[length in seal or length == seal.stop], length


def test_a_damaged_state_does_not_take_the_place_of_the_whole_one_before(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mended from the epoch before, then killed while the next one is saved: that epoch must still be there."""
    path, finished, cut = stopped
    run, real = Path(shutil.copytree(cut, tmp_path / "run")), disk.os.replace
    flip(run / "trainer.pt", 1000)

    def replace(source: Path, target: Path) -> None:
        if target.name == "trainer.pt":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "replace", replace)
        assert unmoved("train", path, "--out", run, "--resume").code == 130
    assert len(Run.open(run).load_state()["log"]) == 1
    unmoved("train", path, "--out", run, "--resume").fine()
    same(run, finished)


def test_killed_between_the_two_renames_the_state_before_is_there(
    stopped: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, finished, _ = stopped
    run, real = tmp_path / "run", disk.os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == "trainer.pt" and (run / "trainer.previous.pt").exists():
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "replace", replace)
        assert unmoved("train", path, "--out", run).code == 130
    assert not (run / "trainer.pt").exists()
    assert len(Run.open(run).load_state()["log"]) == 1
    said = unmoved("train", path, "--out", run, "--resume").fine().out
    assert "damaged" not in said
    same(run, finished)


def test_a_state_of_an_older_version_is_read(stopped: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Without a seal, without the best weights, without the state before; and weights without a checksum."""
    path, finished, cut = stopped
    run = Path(shutil.copytree(cut, tmp_path / "run"))
    state = torch.load(run / "trainer.pt", weights_only=True)  # any program may read it
    del state["best_model"]
    torch.save(state, run / "trainer.pt")
    (run / "trainer.previous.pt").unlink()
    for name in ("best.safetensors", "last.safetensors"):
        save_file(load_file(run / name), run / name)
    unmoved("evaluate", run, "--n", 5, "--no-doctor").fine()
    said = unmoved("train", path, "--out", run, "--resume").fine().out
    assert re.findall(r"epoch (\d)/3", said) == ["3"]
    assert "note" not in said
    assert (run / "last.safetensors").read_bytes() == (finished / "last.safetensors").read_bytes()
    old, new = (load_file(folder / "best.safetensors") for folder in (run, finished))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


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
        return {"validation_clean": 0.9, "validation_robust": next(scores)}

    monkeypatch.setattr(loop, "_validate", validated)


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
        interrupted(path, run)
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


def test_what_is_whole_is_not_touched_by_mending(stopped: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Weights that somebody put there stay: they are not damaged, only others."""
    _, finished, _ = stopped
    run = Run.open(shutil.copytree(finished, tmp_path / "run"))
    other: dict[str, Tensor] = {name: value + 1 for name, value in load_file(run.path / "best.safetensors").items()}
    models.save_tensors(other, run.path / "best.safetensors")
    before, notes = digests(run.path), []
    run.mend_weights(run.load_state(), notes.append)
    assert digests(run.path) == before
    assert notes == []


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

    monkeypatch.setattr(disk, "open", lambda path, mode: Full(path, mode), raising=False)
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
