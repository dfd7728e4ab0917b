"""A user's .npz: arrays of numbers come through, objects are never loaded."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unmoved.core.errors import UnmovedError
from unmoved.data import arrays

X = np.random.default_rng(0).integers(0, 256, (20, 3, 6, 6), dtype=np.uint8)
Y = np.arange(20) % 4


def save(path: Path, **content: object) -> Path:
    np.savez(path / "mine.npz", **content)  # type: ignore[arg-type]
    return path / "mine.npz"


def test_four_arrays(tmp_path: Path) -> None:
    data = arrays(save(tmp_path, x_train=X[:15], y_train=Y[:15], x_test=X[15:18] / 255, y_test=Y[15:18] * 0))
    assert (data.name, data.train.name) == ("mine", "mine/train")
    assert torch.equal(data.train.images, torch.from_numpy(X[:15]))
    assert torch.equal(data.test.images, torch.from_numpy(X[15:18]))
    assert data.classes == ("0", "1", "2", "3")  # of both parts together


def test_two_arrays_are_split_by_the_seed(tmp_path: Path) -> None:
    file = save(tmp_path, x=X.transpose(0, 2, 3, 1), y=Y, classes=np.array(["a", "b", "c", "d"]))
    data = arrays(file, test=0.4)
    assert (len(data.train), len(data.test), data.classes) == (12, 8, ("a", "b", "c", "d"))
    assert torch.equal(data.test.images, torch.from_numpy(X)[data.test.index])
    assert data.test.labels.bincount().tolist() == [2, 2, 2, 2]
    assert not torch.equal(arrays(file, test=0.4, seed=1).test.index, data.test.index)


def test_zeros_and_ones_are_no_images_of_256_levels(tmp_path: Path) -> None:
    binary = (X > 99).astype(np.uint8)
    data = arrays(save(tmp_path, x=binary, y=Y), lazily=True)
    with pytest.raises(
        UnmovedError, match=r"mine.*: expected uint8 pixels of 0\.\.255, came none above 1; if 1 is white"
    ):
        data.test  # noqa: B018 - reads it
    assert set(arrays(save(tmp_path, x=binary / 1.0, y=Y)).test.images.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("lazily", [False, True])
def test_all_of_two_arrays_may_be_test_data(tmp_path: Path, lazily: bool) -> None:
    data = arrays(save(tmp_path, x=X, y=Y), test="all", lazily=lazily)
    assert torch.equal(data.test.images, torch.from_numpy(X))
    assert (data.test.index.tolist(), len(data.train)) == ([*range(20)], 0)
    with pytest.raises(UnmovedError, match=r"expected no parts with test='all', came training and test data"):
        arrays(save(tmp_path, x_train=X, y_train=Y, x_test=X, y_test=Y), test="all")


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


def test_objects_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    file = save(tmp_path, x=X, y=np.array([Evil(marker)] * 20, dtype=object))
    with pytest.raises(UnmovedError, match="an array of objects, which is a pickle and never loaded"):
        arrays(file)
    assert not marker.exists()


def test_other_files_and_contents(tmp_path: Path) -> None:
    file = save(tmp_path, x_train=X, y_train=Y, images=X)
    with pytest.raises(UnmovedError, match=r"expected arrays x_train, .* came images, x_train, y_train"):
        arrays(file)
    with pytest.raises(UnmovedError, match=r"came images, labels; save"):
        arrays(save(tmp_path, images=X, labels=Y))
    with pytest.raises(UnmovedError, match=r"came texts; numpy.unique\(labels, return_inverse=True\)"):
        arrays(save(tmp_path, x=X, y=Y.astype(str)))
    with pytest.raises(UnmovedError, match=r"came \(20, 108\); reshape them"):
        arrays(save(tmp_path, x=X.reshape(20, -1), y=Y))
    whole = save(tmp_path, x=X, y=Y).read_bytes()
    single = io.BytesIO()
    np.save(single, X)
    for raw in (b"", b"hello", whole[:-30], single.getvalue()):
        file.write_bytes(raw)
        with pytest.raises(UnmovedError, match=r"mine.npz: expected an .npz file"):
            arrays(file)
    middle = len(whole) // 3
    file.write_bytes(whole[:middle] + bytes(60) + whole[middle + 60 :])
    with pytest.raises(UnmovedError, match=r"mine.npz: expected a readable .npz file"):
        arrays(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.txt", "hello")
        archive.writestr("x", "hello")
        archive.writestr("y", "hello")
    with pytest.raises(UnmovedError, match="'x': expected an array, came something else"):
        arrays(file)
    for labels, message in ((Y[:-1], "19 labels"), (Y / 2, "integer type"), (Y - 1, "came -1")):
        with pytest.raises(UnmovedError, match=f"mine.npz.*{message}"):
            arrays(save(tmp_path, x=X, y=labels))
    with pytest.raises(UnmovedError, match="same image shape"):
        arrays(save(tmp_path, x_train=X, y_train=Y, x_test=X[:, :, 1:], y_test=Y))
