"""The ``datasets`` library through a small stand-in with its interface; the real one is an extra."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unmoved.core.errors import UnmovedError
from unmoved.data import hf

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


class Table:
    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None = None) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: types.SimpleNamespace() for name in columns}
        if names is not None:
            self.features["label"] = types.SimpleNamespace(names=names)

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, key: int | str) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}


def serve(monkeypatch: pytest.MonkeyPatch, **splits: Table) -> None:
    def load_dataset(name: str, *, split: str) -> Table:
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
        return splits[split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]


def table(labels: list[Any], names: list[str] | None = None, **more: list[Any]) -> Table:
    return Table({"img": [Image.fromarray(p) for p in PIXELS[: len(labels)]], "label": labels, **more}, names)


def test_images_and_labels_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, train=table([0, 1, 2, 0, 1, 2], ["x", "y", "z"]), test=table([1, 0], ["x", "y", "z"]))
    data = hf("owner/pets")
    assert data.classes == ("x", "y", "z")
    assert torch.equal(data.train.images, torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()))
    assert data.test.labels.tolist() == [1, 0]
    assert data.name == "owner/pets"
    assert hf("owner/pets", size=8, grey=True).train.shape == (1, 8, 8)


def test_plain_numbers_and_texts_are_labels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, train=table([0, 2, 1]), validation=table([0, 0]))
    assert hf("pets", test="validation").classes == ("0", "1", "2")
    serve(monkeypatch, train=table(["dog", "cat"]), test=table(["dog", "dog"]))
    data = hf("pets")
    assert (data.classes, data.test.labels.tolist()) == (("cat", "dog"), [1, 1])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good = table([0, 1])
    serve(monkeypatch, train=good, test=good)
    with pytest.raises(UnmovedError, match=r"split 'held' .* Should be one of"):
        hf("pets", test="held")
    with pytest.raises(UnmovedError, match="expected a column 'fine' in pets, came img, label"):
        hf("pets", label="fine")
    with pytest.raises(UnmovedError, match="expected a column 'photo'"):
        hf("pets", image="photo")
    with pytest.raises(UnmovedError, match="two different splits"):
        hf("pets", test="train")
    serve(monkeypatch, train=table([0, 1], mask=[Image.new("L", (4, 4))] * 2), test=good)
    with pytest.raises(UnmovedError, match=r"one column of images .*'img', 'mask'.*say image"):
        hf("pets")
    serve(monkeypatch, train=table([0, -1]), test=good)
    with pytest.raises(UnmovedError, match="came -1"):
        hf("pets")
    serve(monkeypatch, train=table([0.5, 1]), test=good)
    with pytest.raises(UnmovedError, match="whole numbers or texts"):
        hf("pets")
    odd = table([0, 1])
    odd.columns["img"][1] = Image.new("RGB", (9, 9))
    serve(monkeypatch, train=odd, test=good)
    with pytest.raises(UnmovedError, match=r"one size in pets/train.*row 1; set size"):
        hf("pets")
    odd.columns["img"][1] = Image.new("I;16", (4, 5))
    with pytest.raises(UnmovedError, match="pets/train, row 1: expected 8 bits"):
        hf("pets")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnmovedError, match=r"pip install 'unmoved\[hf\]'"):
        hf("pets")
