"""Every file of a run folder, whatever lies in its place: one sentence that names it, soon, and in bounded memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli import RECIPE, recipe, unmoved

from unmoved import models
from unmoved.analyses.studies.table_cache import TableCache
from unmoved.cli.grid_watch import epochs_done
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.data import arrays, cifar10, folder, mnist
from unmoved.data.decoded_cache import Slot
from unmoved.evaluation import outcomes
from unmoved.evaluation.journal import Journal
from unmoved.runs import lock, records

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in the file system are of POSIX")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, judged and examined run, not to be changed."""
    place = tmp_path_factory.mktemp("whole")
    unmoved(
        "train", recipe(place, 'name = "r"\n' + RECIPE), "--out", place / "run", "--set", "training.epochs=2"
    ).fine()
    unmoved("evaluate", place / "run", "--n", "10").fine()
    return place / "run"


FILES = {
    "report": (
        *("recipe.toml", "provenance.json", "metrics.jsonl", "doctor.json", "evaluation/evaluation.json"),
        *("evaluation/outcomes.csv", "evaluation/curve.csv", "evaluation/gallery.npz"),
    ),
    "doctor": ("best.safetensors", "evaluation/outcomes.csv", "evaluation/evaluation.json"),
    "evaluate": ("recipe.toml", "best.safetensors", "evaluation/journal.jsonl", ".lock"),
    "resume": ("recipe.toml", "provenance.json"),
    "analyze softmax": ("recipe.toml", "best.safetensors"),
    "export": (
        *("recipe.toml", "provenance.json", "metrics.jsonl", "doctor.json", "evaluation/evaluation.json"),
        *("evaluation/outcomes.csv", "evaluation/gallery.npz", "best.safetensors"),
    ),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def inside(path: Path) -> None:
    path.mkdir()


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def noise(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\0" + bytes(range(256)))


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


def command(what: str, run: Path) -> Any:
    if what == "resume":
        return unmoved("train", run.parent / "tiny.toml", "--out", run, "--resume", "--set", "training.epochs=2")
    out = ("--out", run.parent / "out.html") if what == "report" else ("--out", run.parent / "out") * (what[0] == "a")
    return unmoved(*what.split(), run, *out)


@posix
@pytest.mark.parametrize("make", [pipe, device, inside, circle, sparse, noise], ids=lambda make: make.__name__)
@pytest.mark.parametrize("what", FILES)
def test_whatever_lies_in_the_place_of_a_file_is_named(
    whole: Path, tmp_path: Path, what: str, make: Callable[[Path], None]
) -> None:
    """A pipe would be waited for, a device read for ever, a sparse file fill the memory."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copy(whole.parent / "tiny.toml", tmp_path)
    for name in FILES[what]:
        if name == ".lock" and make in (sparse, noise):  # a regular file: nobody reads it
            continue
        kept = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).unlink(missing_ok=True)
        make(run / name)
        if name.endswith("journal.jsonl") and make is noise:
            (run / name).write_bytes(b"\xff")
        message = command(what, run).mistake()
        assert str(run / name) in message, name
        assert len(message) < 1500
        (run / name).rmdir() if make is inside else (run / name).unlink()
        if kept is not None:
            (run / name).write_bytes(kept)
    command(what, run).fine()


@posix
@pytest.mark.parametrize("make", [pipe, device, inside, circle, sparse, noise], ids=lambda make: make.__name__)
def test_whatever_lies_in_the_place_of_the_trainers_state(
    whole: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """What is no file is named and left alone; what is none of ours is damaged, before a terabyte of it is read."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    log = run / "metrics.jsonl"  # cut: of a run whose log has its last epoch the state is not read
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    (run / "trainer.pt").unlink()
    make(run / "trainer.pt")
    shutil.copy(whole.parent / "tiny.toml", tmp_path)
    if make in (sparse, noise):
        assert "is damaged" in command("resume", run).fine().out
    else:
        assert str(run / "trainer.pt") in command("resume", run).mistake()


@posix
def test_links_to_regular_files_are_read_like_files(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for path in whole.rglob("*"):
        if path.is_file():
            (run / path.relative_to(whole)).parent.mkdir(parents=True, exist_ok=True)
            (run / path.relative_to(whole)).symlink_to(path)
    command("report", run).fine()


JSON: list[tuple[str, str]] = [
    ('{"a":' * 100_000, "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"a": 99999999999999999999}', "at most 64 bits"),
    ('{"a": 1, "a": 2}', "a key comes twice"),
    ('\ufeff{"a": 1}', "not valid JSON"),
    ("\0", "not valid JSON"),
    ("", "not valid JSON"),
    ("[]", "came a list"),
    ("3", "came a int"),
]


@pytest.mark.parametrize(("text", "words"), JSON, ids=range(len(JSON)))
def test_json_of_a_run_folder(whole: Path, tmp_path: Path, text: str, words: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("evaluation/evaluation.json", "doctor.json", "provenance.json", "metrics.jsonl"):
        kept = (run / name).read_bytes()
        (run / name).write_text(text + "\n" * (name == "metrics.jsonl"), encoding="utf-8")
        message = command("report", run).mistake()
        assert str(run / name) in message
        assert words in message, (name, message)
        (run / name).write_bytes(kept)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "Infinity", "true", '"1"', "[1]", "null", "1" * 400])
@pytest.mark.parametrize(("name", "key"), [("evaluation/evaluation.json", "n"), ("metrics.jsonl", "seconds")])
def test_numbers_that_are_none(whole: Path, tmp_path: Path, name: str, key: str, value: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    text = (run / name).read_text(encoding="utf-8")
    record = json.loads(text.split("\n")[0] if name.endswith("l") else text) | {key: "HERE"}
    (run / name).write_text(json.dumps(record).replace('"HERE"', value) + "\n", encoding="utf-8")
    assert str(run / name) in command("report", run).mistake()


@pytest.mark.parametrize(
    "text", ["training = 3", "name = 3", "training = [[]]", "base = 1", "[training]\nseed = 1.5", "[training]\nseed=[]"]
)
def test_a_recipe_of_other_types(whole: Path, tmp_path: Path, text: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "recipe.toml").write_text(text, encoding="utf-8")
    shutil.copy(whole.parent / "tiny.toml", tmp_path)
    for what in FILES:
        assert str(run / "recipe.toml") in command(what, run).mistake()


def test_a_log_without_common_keys_is_no_square(tmp_path: Path) -> None:
    """Each of n lines with a key of its own makes a table of n^2 cells."""
    path = tmp_path / "metrics.jsonl"
    lines = (json.dumps({"epoch": 1, "seconds": 1, "parts": {f"k{k}": 1.0}}) for k in range(8000))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UnmovedError, match=r"metrics.jsonl: expected at most \d+ numbers"):
        records.log(path, "train again")


# --- arrays


def member(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + data


def described(dtype: str, shape: str) -> bytes:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}\n".encode()


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"",
        member(described("'<f4'", "(1000000000000,)")),
        member(described("'<f4'", "(-1,)")),
        member(described("'<U1000000000'", "(1,)")),
        member(described("'<U0'", "(1000000000000,)")),
        member(described("'|V0'", "(1000000000000,)")),
        member(described("'|O'", "(1,)"), b"."),
        member(described("[('a', '<f4')]", "(1,)"), bytes(4)),
        member(described("'<f4'", "(" * 5000)),
        member(b"{" * 60000),
        b"\x93NUMPY\x09\0" + bytes(100),
    ],
    ids=range(12),
)
def test_what_an_array_announces_is_looked_at_before_there_is_room_for_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "gallery.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data)
    with pytest.raises(UnmovedError, match=r"gallery\.npz: ") as caught:
        untrusted.npz(path)
    assert len(str(caught.value)) < 600


def test_a_bomb_is_known_by_its_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**22))
    claims = bytearray(buffer.getvalue())
    place = claims.index(b"PK\x01\x02") + 24  # of the size in the archive's own list
    claims[place : place + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(claims)
    with pytest.raises(UnmovedError, match="decompression bomb"):
        untrusted.npz(tmp_path / "x.npz")


def test_numbers_and_texts_come_back_as_they_were(tmp_path: Path) -> None:
    kept = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array(["x\ny", ""]), "c": np.array(3), "d": np.zeros((0, 5))}
    np.savez_compressed(tmp_path / "x.npz", **kept)  # type: ignore[arg-type]
    found = untrusted.npz(tmp_path / "x.npz")
    assert found.keys() == kept.keys()
    assert all(np.array_equal(found[name], kept[name]) for name in kept)


def test_want_of_memory_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file that cannot be read at the moment is not to be thrown away."""

    def none(*arguments: Any, **settings: Any) -> Any:
        raise MemoryError

    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    monkeypatch.setattr(np, "load", none)
    with pytest.raises(UnmovedError, match="cannot be read at the moment"):
        untrusted.npz(tmp_path / "x.npz")
    from torch import nn

    from unmoved.models import weights_file

    models.save_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    monkeypatch.setattr(weights_file, "safe_open", none)
    with pytest.raises(UnmovedError, match="cannot be read at the moment") as caught:
        models.is_whole(tmp_path / "w.safetensors")
    assert not isinstance(caught.value, models.DamagedFile)


# --- tables


@pytest.mark.parametrize(
    "row",
    ["," * 10**6, "1," * 10**6, '"' + "\n" * 5000, "x" * 10**6, '"a\n\n"' * 300, "\0" * 300],
    ids=["commas", "values", "open quote", "long", "quotes", "zeros"],
)
def test_rows_of_a_table_that_nobody_wrote(tmp_path: Path, row: str) -> None:
    path = tmp_path / "outcomes.csv"
    path.write_text(",".join(outcomes.COLUMNS) + "\n" + (row + "\n") * 2, encoding="utf-8")
    with pytest.raises(UnmovedError, match=r"outcomes\.csv") as caught:
        outcomes.read(path)
    assert len(str(caught.value)) < 1000


# --- every other reader


@posix
@pytest.mark.parametrize("make", [pipe, device], ids=["pipe", "device"])
def test_no_reader_waits_for_a_pipe_or_follows_a_device(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path, tree = tmp_path / "x.safetensors", tmp_path / "tree"
    tree.mkdir()
    for place in (path, *(tree / name for name in ("train-images-idx3-ubyte", "data_batch_1", "metrics.jsonl"))):
        make(place)
    readers: list[Callable[[], Any]] = [
        lambda: untrusted.content(path, 10),
        lambda: untrusted.npz(path),
        lambda: untrusted.toml_file(path),
        lambda: records.log(path, ""),
        lambda: outcomes.read(path),
        lambda: Journal(path, {}),
        lambda: arrays(path),
        lambda: folder(path),
        lambda: cifar10(tree),
        lambda: mnist(tree),
    ]
    for read in readers:
        with pytest.raises(UnmovedError):
            read()
    assert not models.is_whole(path)
    assert Slot(path, "stamp").load() is None
    assert epochs_done(type("Job", (), {"path": str(tree), "epochs": 1})) == 0


@posix
def test_a_link_to_a_device_among_images_is_not_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.png").symlink_to("/dev/zero")
    with pytest.raises(UnmovedError, match=r"0\.png: expected a regular file, came a device"):
        folder(tmp_path / "tree", cache=False)


@posix
def test_a_table_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    import pandas as pd

    table = pd.DataFrame({"x": [0.5]})
    TableCache(tmp_path).table("t", {}, lambda: table)
    (path,) = tmp_path.iterdir()
    path.unlink()
    pipe(path)
    assert TableCache(tmp_path).table("t", {}, lambda: table).equals(table)
    assert path.is_file()


@posix
def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        with pytest.raises(UnmovedError, match="expected a regular file, came a socket"):
            untrusted.content(Path("s"), 10)


@posix
def test_the_lock_does_not_reach_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnmovedError, match="lock"), lock.alone(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@posix
def test_a_recipe_from_the_shells_own_pipe_is_read(tmp_path: Path) -> None:
    """``unmoved show <(...)``: what a shell puts in its place is a pipe that is open already."""
    from unmoved.runs import recipe as config

    text = recipe(tmp_path).read_bytes()
    ours, theirs = os.pipe()
    os.write(theirs, text)
    os.close(theirs)
    try:
        assert config.read(f"/dev/fd/{ours}").training.epochs == 2
    finally:
        os.close(ours)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UnmovedError, match="expected a regular file, came a named pipe"):
        config.read(tmp_path / "pipe.toml")
