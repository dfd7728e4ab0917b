"""The IDX reader: the published bytes come back, and no bytes of strangers raise anything but UnmovedError."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmoved.core.errors import UnmovedError
from unmoved.data import mnist
from unmoved.data.mnist_idx import read_idx

SHARED = Path(os.environ.get("UNMOVED_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
MD5 = {  # of the uncompressed files
    "train": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
    "test": ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
}
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5), dtype=np.uint8)


def labels(n: int) -> np.ndarray:
    return (np.arange(n) % 10).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, array in zip(NAMES, (images(12), labels(12), images(5, 1), labels(5)), strict=True):
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def test_the_published_files_come_back_byte_for_byte() -> None:
    if not (SHARED / "mnist").is_dir():
        pytest.skip("no MNIST here")
    data = mnist(SHARED / "mnist")
    for part, split in (("train", data.train), ("test", data.test)):
        content = (idx(split.images[:, 0].numpy()), idx(split.labels.numpy().astype(np.uint8)))
        assert tuple(hashlib.md5(raw).hexdigest() for raw in content) == MD5[part]
    assert (data.train.shape, data.classes, data.name) == ((1, 28, 28), tuple("0123456789"), "mnist")
    assert data.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_known_layouts_give_the_same(root: Path, tmp_path: Path, place: str, zipped: bool, dotted: bool) -> None:
    want = mnist(root)
    top = tmp_path / "other"
    (top / place).mkdir(parents=True)
    for name in NAMES:
        raw = (root / name).read_bytes()
        target = top / place / (name.replace("-idx", ".idx" if dotted else "-idx") + (".gz" if zipped else ""))
        target.write_bytes(gzip.compress(raw) if zipped else raw)
    data = mnist(top)
    assert torch.equal(data.train.images, want.train.images)
    assert torch.equal(data.test.labels, want.test.labels)
    assert torch.equal(want.test.images[:, 0], torch.from_numpy(images(5, 1)))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "magic 00000803, came nothing"),
        (lambda raw: raw[:3], "came 000008"),
        (lambda raw: b"\x89PNG" + raw[4:], "magic 00000803, came 89504e47"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "came 00000d03"),
        (lambda raw: idx(labels(12)), "came 00000801"),
        (lambda raw: raw[:10], "3 sizes after the magic number"),
        (lambda raw: raw[:-1], "expected 240 bytes for the shape .12, 4, 5., came 239"),
        (lambda raw: raw + b"\0", "came more"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "expected a size between"),
        (lambda raw: raw[:4] + bytes(12) + raw[16:], "expected a size between"),
        (lambda raw: idx(images(11)), "11 images in .* 12 labels"),
    ],
)
def test_damaged_files_are_named(root: Path, damage, message: str, zipped: bool) -> None:
    raw = damage((root / NAMES[0]).read_bytes())
    (root / NAMES[0]).write_bytes(gzip.compress(raw) if zipped else raw)
    with pytest.raises(UnmovedError, match=message) as error:
        mnist(root)
    assert str(root / NAMES[0]) in str(error.value)


def test_damaged_gzip_streams(root: Path) -> None:
    file = root / NAMES[0]
    whole = gzip.compress(file.read_bytes())
    broken = [whole[:-9], whole[:20], whole[:30] + bytes(20) + whole[50:], whole[:-8] + bytes(8)]
    for raw in broken:
        file.write_bytes(raw)
        with pytest.raises(UnmovedError, match="train-images-idx3-ubyte: "):
            mnist(root)


def test_a_small_gzip_of_a_huge_content_stops_at_the_announced_size(root: Path) -> None:
    (root / NAMES[0]).write_bytes(gzip.compress(idx(images(12)) + bytes(2**26)))
    with pytest.raises(UnmovedError, match="came more"):
        mnist(root)


def test_missing_files_and_folders(root: Path, tmp_path: Path) -> None:
    (root / NAMES[3]).unlink()
    with pytest.raises(UnmovedError, match=r"expected a file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        mnist(root)
    with pytest.raises(UnmovedError, match="expected an existing file or folder"):
        mnist(tmp_path / "nowhere")
    with pytest.raises(UnmovedError, match="expected the path"):
        mnist(None)  # type: ignore[arg-type]


def test_labels_outside_the_ten_digits(root: Path) -> None:
    (root / NAMES[1]).write_bytes(idx(np.full(12, 10, np.uint8)))
    with pytest.raises(UnmovedError, match=r"0..9 for 10 classes, came 10"):
        mnist(root)


heads = st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\0\0\0\0\0\0\3", b"\0\0\x08\3", b"\0\0\x08\3\0\0\0\1\0\0\0\2"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(head=heads, tail=st.binary(max_size=80), zipped=st.booleans())
def test_arbitrary_bytes_are_an_array_or_an_unmoved_error(
    tmp_path: Path, head: bytes, tail: bytes, zipped: bool
) -> None:
    file, raw = tmp_path / "stranger", head + tail
    file.write_bytes(gzip.compress(raw) if zipped else raw)
    try:
        array = read_idx(file, 3)
    except UnmovedError:
        return
    assert idx(array) == raw or raw[:2] == b"\x1f\x8b"
