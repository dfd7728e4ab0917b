"""Parts of a data set are read when they are asked for, into one array each, and are what reading all at once gives."""

from __future__ import annotations

import gc
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from unmoved.core.errors import UnmovedError
from unmoved.data import (
    ArraySplit,
    DataSet,
    Selection,
    arrays,
    cifar10,
    cifar10_data,
    folder,
    folder_data,
    growing_array,
    mnist,
    mnist_idx,
    stored_arrays,
)

N, SIDE = 240, 24
X = np.random.default_rng(0).integers(0, 256, (N, 3, SIDE, SIDE), dtype=np.uint8)
Y = np.arange(N) % 4
CUT = 180
Load = Callable[..., DataSet]


def split_npz(path: Path, x: np.ndarray = X, **more: Any) -> Load:
    np.savez(path / "split.npz", x_train=x[:CUT], y_train=Y[:CUT], x_test=x[CUT:], y_test=Y[CUT:])
    return lambda **how: arrays(path / "split.npz", **more, **how)


def whole_npz(path: Path) -> Load:
    np.savez(path / "whole.npz", x=X, y=Y)
    return lambda **how: arrays(path / "whole.npz", **how)


def packed_npz(path: Path) -> Load:
    np.savez_compressed(path / "packed.npz", x=X, y=Y)
    return lambda **how: arrays(path / "packed.npz", **how)


def last_npz(path: Path) -> Load:
    return split_npz(path, X.transpose(0, 2, 3, 1).copy(), layout="NHWC")


def columns_npz(path: Path) -> Load:
    return split_npz(path, np.asfortranarray(X))


def levels_npz(path: Path) -> Load:
    return split_npz(path, X / 255)


def floats_npz(path: Path) -> Load:
    return split_npz(path, X / np.float32(300))


def mixed_npz(path: Path) -> Load:
    """Exact bytes at first, and one image that is none."""
    x = (X / np.float32(255)).astype(np.float32)
    x[CUT - 2, 0, 0, 0] = 0.3
    return split_npz(path, x)


def idx_files(path: Path) -> Load:
    for part, x, y in (("train", X[:CUT, 0], Y[:CUT]), ("t10k", X[CUT:, 0], Y[CUT:])):
        (path / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *x.shape) + x.tobytes())
        (path / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, len(y)) + y.astype(np.uint8).tobytes()
        )
    return lambda **how: mnist(path, **how)


def pictures(path: Path, parts: tuple[str, ...]) -> Path:
    for k in range(40):
        place = path / "pets" / parts[k % len(parts)] / "ab"[k // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(X[k].transpose(1, 2, 0)).save(place / f"{k}.png")
    return path / "pets"


def flat_folder(path: Path) -> Load:
    root = pictures(path, (".",))
    return lambda **how: folder(root, cache=path / "cache", **how)


def parted_folder(path: Path) -> Load:
    root = pictures(path, ("train", "test"))
    return lambda **how: folder(root, cache=path / "cache", **how)


def uncached_folder(path: Path) -> Load:
    root = pictures(path, (".",))
    return lambda **how: folder(root, cache=False, **how)


def records(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    monkeypatch.setattr(cifar10_data, "RECORDS", 20)
    rng = np.random.default_rng(1)
    return {
        f"{name}.bin": np.hstack(
            [rng.integers(0, 10, (20, 1), dtype=np.uint8), rng.integers(0, 256, (20, 3072), dtype=np.uint8)]
        ).tobytes()
        for name in (*cifar10_data.TRAIN, *cifar10_data.TEST)
    }


@pytest.fixture(
    params=[
        split_npz,
        whole_npz,
        packed_npz,
        last_npz,
        columns_npz,
        levels_npz,
        floats_npz,
        mixed_npz,
        idx_files,
        flat_folder,
        parted_folder,
        uncached_folder,
        "cifar",
        "cifar packed",
    ],
    ids=lambda make: getattr(make, "__name__", make),
)
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    if not isinstance(request.param, str):
        return request.param(tmp_path)
    for name, raw in records(tmp_path, monkeypatch).items():
        (tmp_path / name).write_bytes(raw)
    if request.param == "cifar":
        return lambda **how: cifar10(tmp_path, **how)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        for file in sorted(tmp_path.glob("*.bin"), reverse=True):  # the test batch first
            tar.add(file, file.name)
    return lambda **how: cifar10(tmp_path / "c.tar.gz", **how)


def same(one: ArraySplit | Selection, two: ArraySplit | Selection) -> bool:
    fields = all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("images", "labels", "index"))
    return fields and (one.name, one.classes, one.shape) == (two.name, two.classes, two.shape)


def test_a_part_that_is_asked_for_is_the_part(load: Load) -> None:
    """Read alone, after the other, or again after it was let go."""
    for order in (("train", "test"), ("test", "train"), ("test", "test")):
        whole, lazy = load(), load(lazily=True)
        assert (lazy.name, lazy.classes, lazy.shape, lazy.skipped) == (whole.name, whole.classes, whole.shape, ())
        for part in order:
            assert torch.equal(lazy.index(part), getattr(whole, part).index)
            assert same(getattr(lazy, part), getattr(whole, part))


def test_the_values_are_those_of_numpy(tmp_path: Path) -> None:
    for make, want in (
        (split_npz, X),
        (last_npz, X),
        (columns_npz, X),
        (levels_npz, X),
        (floats_npz, torch.from_numpy(X / np.float32(300))),
    ):
        train = make(tmp_path)(lazily=True).train
        assert torch.equal(train.images, torch.as_tensor(want[:CUT]))
    mixed = mixed_npz(tmp_path)(lazily=True)
    expected = torch.from_numpy(X[:CUT]).float() / 255
    expected[CUT - 2, 0, 0, 0] = 0.3
    assert torch.equal(mixed.train.images, expected)
    assert mixed.test.images.dtype == torch.uint8
    whole = whole_npz(tmp_path)(lazily=True)
    for part in (whole.train, whole.test):
        assert torch.equal(part.images, torch.from_numpy(X)[part.index])
        assert torch.equal(part.labels, torch.from_numpy(Y)[part.index])


class Large(TorchDispatchMode):
    """Counts the tensors of at least so many bytes that get memory of their own."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, set[int]()
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.least:
            self.seen.add(result.untyped_storage().data_ptr())
            self._kept.append(result)  # so that no address comes twice
        return result


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    "make", [split_npz, whole_npz, packed_npz, last_npz, levels_npz, floats_npz, idx_files, flat_folder, parted_folder]
)
def test_images_are_in_memory_once_and_those_of_the_other_part_never(
    make: Callable[[Path], Load], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (growing_array, stored_arrays, mnist_idx, folder_data):
        monkeypatch.setattr(module, "PIECE", 2**12)
    load = make(tmp_path)

    def once() -> tuple[ArraySplit, set[int], int]:
        """The part, its large tensors, and the most that numpy and Python held."""
        tracemalloc.start()
        try:
            with Large(size // 2) as large:
                split = getattr(load(lazily=True), part)
            return split, large.seen, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    size = getattr(load(), part).images.nbytes  # folders are decoded here
    with Large(size // 2):
        getattr(load(lazily=True), part)  # what is imported at the first use is not counted
    split, seen, peak = once()
    assert split.images.nbytes == size
    if make is idx_files:  # into an array of numpy's, whose memory the tensor has
        assert seen <= {split.images.data_ptr()}
        assert peak < size + 2**16
    else:
        assert seen == {split.images.data_ptr()}
        assert peak < 2**17


def test_a_part_that_nobody_holds_is_let_go(tmp_path: Path) -> None:
    data = split_npz(tmp_path)(lazily=True)
    train = data.train
    assert data.train is train  # not read again as long as somebody has it
    (tmp_path / "split.npz").write_bytes(b"")
    assert data.train is train
    del train
    gc.collect()
    with pytest.raises(UnmovedError, match=r"expected a readable .npz file|expected an .npz file"):
        _ = data.train  # gone


def test_a_part_of_the_training_data_is_known_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = split_npz(tmp_path)
    want, lazy = load().train.part(1, 3, 2), load(lazily=True).part_of_train(1, 3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(stored_arrays.Stored, "pieces", lambda self: pytest.fail("it was read"))
        assert torch.equal(lazy.index("train"), want.index)
        assert lazy.shape == want.shape
    assert same(lazy.train, want)
    assert same(load().part_of_train(1, 3, 2).train, want)
    for wrong in ((3, 3), (0, 0), (0, 181)):
        for data in (load(), load(lazily=True)):
            with pytest.raises(UnmovedError, match="part"):
                data.part_of_train(*wrong)


def test_a_damaged_cache_is_found_when_it_is_read_and_made_anew(tmp_path: Path) -> None:
    for make in (flat_folder, parted_folder):
        place = tmp_path / make.__name__
        place.mkdir()
        load = make(place)
        want = load()
        (file,) = (place / "cache").iterdir()
        raw = bytearray(file.read_bytes())
        middle = raw.index(X[20].tobytes()[:50])  # in the middle of an image
        raw[middle] ^= 1
        file.write_bytes(raw)
        lazy = load(lazily=True)
        assert same(lazy.test, want.test)
        assert same(lazy.train, want.train)
        assert same(load(lazily=True).train, want.train)


def test_what_was_changed_meanwhile_is_named(tmp_path: Path) -> None:
    data = split_npz(tmp_path)(lazily=True)
    np.savez(tmp_path / "split.npz", x_train=X[:7], y_train=Y[:7], x_test=X[:9], y_test=Y[:9])
    with pytest.raises(UnmovedError, match="the file was changed"):
        _ = data.train


# --- a selection shares the memory of its whole


@pytest.mark.parametrize("mask", [True, False])
def test_a_selection_is_what_select_copies(mask: bool) -> None:
    split = ArraySplit.of(X, Y, name="mine")
    where = torch.from_numpy(Y % 3 == 0) if mask else torch.tensor([5, 2, 9, 200])
    lent, copied = split.lent(where), split.select(where)
    assert same(lent, copied)
    assert (len(lent), lent.num_classes) == (len(copied), 4)
    for shuffle in (None, 7):
        for one, two in zip(lent.batches(3, shuffle=shuffle), copied.batches(3, shuffle=shuffle), strict=True):
            assert torch.equal(one.x, two.x)
            assert torch.equal(one.y, two.y)
            assert torch.equal(one.index, two.index)
    assert same(lent.take(3, seed=1), copied.take(3, seed=1))
    assert same(lent.select(torch.tensor([1, 0])), copied.select(torch.tensor([1, 0])))
    assert lent.to("cpu") is lent
    moved = lent.to("meta")
    assert moved.images.shape == copied.images.shape
    with pytest.raises(UnmovedError, match="batch size"):
        lent.batches(0)
    with pytest.raises(UnmovedError, match=f"at most its {len(lent)} samples"):
        lent.take(len(lent) + 1)


def test_holding_out_copies_no_image(tmp_path: Path) -> None:
    """Training and validation images lie in the memory of the training data, and are those of `hold_out`."""
    split = ArraySplit.of(X, Y, name="mine")
    chosen = split.held_out(0.2, seed=0)
    with Large(2**16) as large:
        train, held = split.lent(~chosen), split.lent(chosen, "mine/validation")
        next(train.batches(4))
    assert large.seen <= {split.images.data_ptr()}
    assert all(same(a, b) for a, b in zip((train, held), split.hold_out(0.2, seed=0), strict=True))
