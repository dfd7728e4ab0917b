"""Data of other libraries: whatever holds them, the same images and labels come out, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from unmoved.core.errors import UnmovedError
from unmoved.data import ArraySplit, DataSet
from unmoved.data.adapters import as_split

X = torch.randint(0, 256, (12, 3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
Y = torch.arange(12) % 3
FLOATS = X.float() / 255


class Rows(Dataset[Any]):
    """Samples one at a time, as torchvision's data sets give them."""

    classes = ("ant", "bee", "cat")

    def __init__(self, sample: Callable[[int], Any], count: int = 12) -> None:
        self.sample, self.count = sample, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> Any:
        if k >= self.count:
            raise IndexError(k)
        return self.sample(k)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((FLOATS[k], int(Y[k])) for k in range(12))


class Names:
    """The label feature of a Hugging Face dataset."""

    names = ("ant", "bee", "cat")


class HuggingFace:
    """What is used of a Hugging Face dataset."""

    def __init__(self, image: str = "image", label: str = "label") -> None:
        self.column_names, self.features = [image, label], {image: None, label: Names()}
        self.image, self.label = image, label

    def __len__(self) -> int:
        return 12

    def __getitem__(self, k: int | str) -> Any:
        return {self.image: picture(int(k)), self.label: int(Y[int(k)])}


def picture(k: int) -> Image.Image:
    return Image.fromarray(X[k].permute(1, 2, 0).numpy())


def split() -> ArraySplit:
    return ArraySplit.of(X, Y, classes=("ant", "bee", "cat"))


FORMS: dict[str, Callable[[], Any]] = {
    "uint8 tensors": lambda: (X, Y),
    "float tensors": lambda: (FLOATS, Y),
    "a list": lambda: [FLOATS, Y],
    "numpy arrays": lambda: (X.numpy(), Y.numpy()),
    "numpy, channels last": lambda: (X.permute(0, 2, 3, 1).numpy(), Y.numpy()),
    "labels in a list": lambda: (FLOATS, Y.tolist()),
    "a TensorDataset": lambda: TensorDataset(FLOATS, Y),
    "a Dataset": lambda: Rows(lambda k: (FLOATS[k], int(Y[k]))),
    "a Dataset of Pillow images": lambda: Rows(lambda k: (picture(k), int(Y[k]))),
    "a Dataset of dictionaries": lambda: Rows(lambda k: {"pixel_values": FLOATS[k], "labels": int(Y[k])}),
    "a Dataset with more than labels": lambda: Rows(lambda k: (FLOATS[k], Y[k], "path")),
    "a DataLoader": lambda: DataLoader(TensorDataset(FLOATS, Y), 5),
    "a DataLoader that shuffles": lambda: DataLoader(TensorDataset(FLOATS, Y), 5, shuffle=True),
    "a DataLoader that drops": lambda: DataLoader(TensorDataset(FLOATS, Y), 5, drop_last=True),
    "a DataLoader of dictionaries": lambda: DataLoader(Rows(lambda k: {"image": FLOATS[k], "label": int(Y[k])}), 4),
    "a DataLoader of Pillow images": lambda: DataLoader(Rows(lambda k: (picture(k), int(Y[k]))), 4),
    "a DataLoader of a stream": lambda: DataLoader(Stream(), 5),
    "a Subset": lambda: Subset(Rows(lambda k: (FLOATS[k], int(Y[k])), 12), range(12)),
    "a Hugging Face dataset": HuggingFace,
    "a Hugging Face dataset, img": lambda: HuggingFace("img", "fine_label"),
    "a split": split,
    "a selection": lambda: split().lent(torch.arange(12)),
    "a DataSet": lambda: DataSet(split(), split()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples_in_the_order_they_are_stored_in(form: str) -> None:
    found, notes = as_split(FORMS[form]())
    batch = next(found.batches(12))
    assert torch.equal(batch.x, FLOATS)
    assert torch.equal(batch.y, Y)
    assert torch.equal(batch.index, torch.arange(12))
    is_uint8 = any(word in form for word in ("uint8", "numpy", "Pillow", "Hugging"))
    assert notes == (["images of 0..255 (uint8) were divided by 255"] if is_uint8 else [])
    if any(word in form for word in ("Hugging", "Subset", "Pillow", "split", "selection", "DataSet")):
        assert found.classes == ("ant", "bee", "cat")


def test_names_are_taken_from_the_caller_first() -> None:
    assert as_split(FORMS["a Dataset"](), classes=("x", "y", "z"))[0].classes == ("x", "y", "z")
    assert as_split((X, Y))[0].classes == ("0", "1", "2")


def test_a_loader_of_some_samples_is_judged_on_these() -> None:
    """As a validation loader of the training data is made."""
    loader = DataLoader(TensorDataset(FLOATS, Y), 4, sampler=SubsetRandomSampler([7, 2, 5]))
    found, _ = as_split(loader)
    assert torch.equal(next(found.batches(9)).x, FLOATS[[2, 5, 7]])
    for sampler in (WeightedRandomSampler([1.0] * 12, 5), [3, 1]):
        with pytest.raises(UnmovedError, match=r"with a sampler of its own .*Subset"):
            as_split(DataLoader(TensorDataset(FLOATS, Y), 4, sampler=sampler))


def test_pictures_of_a_palette_are_colours() -> None:
    colours = Rows(lambda k: (picture(k).convert("P", palette=Image.Palette.ADAPTIVE), int(Y[k])))
    assert as_split(colours)[0].shape == (3, 5, 6)
    with pytest.raises(UnmovedError, match="mode L or RGB, came CMYK"):
        as_split(Rows(lambda k: (picture(k).convert("CMYK"), 0)))


def test_one_class_alone_is_data_of_two() -> None:
    assert as_split((FLOATS, Y * 0))[0].classes == ("0", "1")


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a path": (lambda: "data/mnist", "expected a DataLoader, .*came a str"),
    "images alone": (lambda: FLOATS, "came a Tensor"),
    "three arrays": (lambda: (FLOATS, Y, Y), "came a tuple"),
    "nothing": (lambda: TensorDataset(FLOATS[:0], Y[:0]), "at least one"),
    "an empty loader": (lambda: DataLoader(Rows(lambda k: (FLOATS[k], 0), 0), 4), "at least one sample, came none"),
    "normalised": (lambda: ((FLOATS - 0.5) / 0.25, Y), "they look normalised"),
    "0..255 floats": (lambda: (X.float(), Y), r"expected pixels in \[0, 1\], came 0 to 255"),
    "one-hot": (lambda: (FLOATS, torch.eye(3)[Y]), r"came \(12, 3\); use labels\.argmax\(1\)"),
    "zeros and ones": (
        lambda: ((X > 9).to(torch.uint8), Y),
        "none above 1; if 1 is white, hand the images over as floats",
    ),
    "too few labels": (lambda: (FLOATS, Y[:5]), "expected one label per image, came 5 labels for 12"),
    "images alone in batches": (
        lambda: DataLoader(FLOATS, 4),
        "whole numbers|batches of",
    ),
    "other names": (
        lambda: DataLoader(Rows(lambda k: {"picture": FLOATS[k], "kind": 1}), 4),
        "came 'picture', 'kind'",
    ),
    "other columns": (lambda: HuggingFace("picture", "kind"), "column of images .* came picture, kind"),
    "other sizes": (
        lambda: Rows(lambda k: (FLOATS[k, :, : 3 + k % 2], 0)),
        "expected images of one shape, came .*resize them first",
    ),
    "labels of no kind": (
        lambda: Rows(lambda k: (FLOATS[k], None)),
        "expected a whole number as each label, came 'None'",
    ),
    "floating labels": (lambda: Rows(lambda k: (FLOATS[k], 0.9)), "expected whole numbers"),
    "text": (lambda: Rows(lambda k: ("image.png", 0)), "expected images as tensors, arrays or Pillow's, came a str"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_holds_no_images_and_labels_is_refused_in_one_sentence(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises(UnmovedError, match=words):
        as_split(make())


def test_images_of_few_levels_are_told_of() -> None:
    assert as_split((X % 17, Y))[1][0].endswith("; the largest pixel is 16: if that is white, divide by it yourself")
    assert torch.equal(next(as_split(((X > 9).float(), Y))[0].batches(12)).x, (X > 9).float())


@pytest.mark.parametrize("settings", [{"classes": "abc"}, {"layout": "NHWC"}])
def test_a_split_has_its_own_names_and_layout(settings: dict[str, str]) -> None:
    for whole in (split(), split().lent(torch.arange(12)), DataSet(split(), split())):
        with pytest.raises(UnmovedError, match="neither classes nor layout with a split"):
            as_split(whole, **settings)


def test_tensors_have_their_channels_first_where_the_shape_does_not_tell() -> None:
    found, _ = as_split((FLOATS[..., :4], Y))
    assert found.shape == (3, 5, 4)
    with pytest.raises(UnmovedError, match="layout="):
        as_split((FLOATS[..., :4].numpy(), Y))
    assert as_split((FLOATS[..., :4].numpy(), Y), layout="NCHW")[0].shape == (3, 5, 4)


def test_numpy_labels_of_any_integer_type() -> None:
    for kind in (np.uint8, np.int16, np.int32):
        assert torch.equal(next(as_split((FLOATS, Y.numpy().astype(kind)))[0].batches(12)).y, Y)
