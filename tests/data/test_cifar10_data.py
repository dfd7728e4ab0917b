"""CIFAR-10: both official forms, folder and archive, give the same images; a pickle is described, never run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unmoved.core.errors import UnmovedError
from unmoved.data import cifar10, cifar10_data
from unmoved.data.cifar10_pickle import StoredArray, loads

N = 20  # records in a file here; 10,000 in the published ones
NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, N, 3072), dtype=np.uint8)
LABELS = RNG.integers(0, 10, (6, N))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_data, "RECORDS", N)


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2 and numpy 1 wrote: protocol 2, byte strings everywhere."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value  # BINSTRING

    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"(" + b"".join(b"M" + n.to_bytes(2, "little") for n in pixels.shape) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
    items = text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"training batch 1 of 5")
    return b"\x80\x02}(" + items + b"u."


def binary(k: int) -> bytes:
    return np.concatenate([LABELS[k][:, None].astype(np.uint8), PIXELS[k]], 1).tobytes()


def pickled(k: int, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": PIXELS[k], "labels": LABELS[k].tolist()}, protocol=protocol)


def fill(folder: Path, form: str) -> Path:
    folder.mkdir(parents=True)
    for k, name in enumerate(NAMES):
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(binary(k))
        elif form == "python2":
            (folder / name).write_bytes(python2_pickle(PIXELS[k], LABELS[k].tolist()))
        else:
            (folder / name).write_bytes(pickled(k, int(form)))
    (folder / "batches.meta").write_bytes(b"never read")
    return folder


def pack(folder: Path, target: Path, names: list[str] | None = None) -> Path:
    with tarfile.open(target, "w:gz") as tar:
        for name in names or sorted(file.name for file in folder.iterdir()):
            tar.add(folder / name, f"{folder.name}/{name}")
    return target


@pytest.mark.parametrize("form", ["binary", "python2", "2", "4", "5"])
@pytest.mark.parametrize("place", ["folder", "parent", "archive", "parent of archive"])
def test_every_form_in_every_place_gives_the_images(tmp_path: Path, form: str, place: str) -> None:
    kind = "bin" if form == "binary" else "py"
    folder = fill(tmp_path / "a" / f"cifar-10-batches-{kind}", form)
    path = {"folder": folder, "parent": folder.parent}.get(place)
    if path is None:
        (tmp_path / "b").mkdir()
        name = "binary" if kind == "bin" else "python"
        archive = pack(folder, tmp_path / "b" / f"cifar-10-{name}.tar.gz", sorted(os.listdir(folder), reverse=True))
        path = archive if place == "archive" else archive.parent
    data = cifar10(path)
    assert torch.equal(data.train.images, torch.from_numpy(PIXELS[:5].reshape(-1, 3, 32, 32)))
    assert torch.equal(data.test.images, torch.from_numpy(PIXELS[5].reshape(-1, 3, 32, 32)))
    assert torch.equal(data.train.labels, torch.from_numpy(LABELS[:5].ravel()))
    assert torch.equal(data.test.labels, torch.from_numpy(LABELS[5]))
    assert data.classes[3] == "cat"
    assert data.train.name == "cifar10/train"


def test_the_python2_pickle_of_this_test_is_one() -> None:
    raw = python2_pickle(PIXELS[0], LABELS[0].tolist())
    pickletools.dis(raw, out=io.StringIO())  # raises where the stream is not well formed
    content = pickle.loads(raw, encoding="bytes")
    assert np.array_equal(content[b"data"], PIXELS[0])


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path: Path, hidden: bool) -> None:
    marker = tmp_path / "was-here"
    evil = pickle.dumps({"data": PIXELS[0], "labels": [Evil(marker)]} if hidden else Evil(marker))
    pickle.loads(evil)
    assert marker.exists()  # it is a weapon indeed
    marker.unlink()
    folder = fill(tmp_path / "cifar-10-batches-py", "2")
    (folder / "data_batch_3").write_bytes(evil)
    for path in (folder, pack(folder, tmp_path / "c.tar.gz")):
        with pytest.raises(UnmovedError, match=r"data_batch_3: .*refused .*system"):
            cifar10(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"cos\nsystem\n.",
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"cnumpy\nload\n.",
        b"c_codecs\ndecode\n.",
        b"cnumpy\nndarray\n(K\x05tR.",  # calls a name
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ on it
        b"cnumpy.core.multiarray\n_reconstruct\n(N}X\x04\x00\x00\x00callK\x01stb.",  # BUILD on it
        b"c_codecs\nencode\n(]X\x06\x00\x00\x00latin1tR.",
        b"\x80\x02]r\x40\x42\x0f\x00.",  # LONG_BINPUT: room for a million memories
        b"\x82\x01.",  # EXT1
        b"Pperson\n.",  # PERSID
        b"\x96" + b"\xff" * 8 + b".",  # a bytearray of 2^64 bytes
        b"",
        b"garbage",
        pickle.dumps(PIXELS[0], protocol=4)[:-100],
    ],
)
def test_no_other_global_nor_damage_passes(raw: bytes) -> None:
    with pytest.raises(UnmovedError, match=r"thing: expected a pickle of arrays and plain containers"):
        loads(raw, "thing")
    assert isinstance(loads(pickle.dumps(PIXELS[0]), "thing"), StoredArray)  # and no pickle spoils the next


def test_stored_arrays_are_the_arrays() -> None:
    for array in (PIXELS[0], np.asfortranarray(PIXELS[0]), PIXELS[0][:1]):
        for protocol in range(2, 6):
            stored = loads(pickle.dumps(array, protocol=protocol), "x")
            assert np.array_equal(stored.as_bytes("x"), array)
    for wrong in (PIXELS[0].astype(float), PIXELS[0].astype(object), PIXELS[0].astype("S1")):
        with pytest.raises(UnmovedError, match="x: expected an array of unsigned bytes"):
            loads(pickle.dumps(wrong, protocol=4), "x").as_bytes("x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "came a list"),
        ({"data": PIXELS[0]}, "came the keys .'data'."),
        ({"data": PIXELS[0].tolist(), "labels": LABELS[0].tolist()}, "an array 'data'"),
        ({"data": PIXELS[0], "labels": LABELS[0].tolist()[:-1]}, "expected 20 labels 0..9, came 19"),
        ({"data": PIXELS[0][:-1], "labels": LABELS[0].tolist()}, r"images \(20, 3072\), came \(19, 3072\)"),
        ({"data": PIXELS[0], "labels": [10] * N}, "labels 0..9"),
        ({"data": PIXELS[0], "labels": [0.5] * N}, "labels 0..9"),
        ({"data": PIXELS[0], "fine_labels": LABELS[0].tolist()}, "fine_labels"),
    ],
)
def test_pickles_with_other_content_are_named(tmp_path: Path, content: object, message: str) -> None:
    folder = fill(tmp_path / "py", "2")
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(UnmovedError, match=f"test_batch: .*{message}"):
        cifar10(folder)


def test_damaged_binaries_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "bin", "binary")
    for raw in (binary(0)[:-1], binary(0)[:-3073], binary(0) + b"\0", b""):
        (folder / "data_batch_2.bin").write_bytes(raw)
        with pytest.raises(UnmovedError, match=rf"data_batch_2.bin: expected 61460 bytes .* came {len(raw)}"):
            cifar10(folder)
    (folder / "data_batch_2.bin").write_bytes(b"\x0a" + binary(0)[1:])
    with pytest.raises(UnmovedError, match=r"data_batch_2.bin: .* largest 10"):
        cifar10(folder)


def test_missing_batches_and_other_folders(tmp_path: Path) -> None:
    folder = fill(tmp_path / "cifar-10-batches-bin", "binary")
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(UnmovedError, match=r"expected six batch files, came all but data_batch_4.bin"):
        cifar10(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnmovedError, match="came none of them"):
        cifar10(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnmovedError, match="came none of them"):
        cifar10(tmp_path / "notes.txt")
