"""Take data as other libraries hold it: a DataLoader, a Dataset, arrays, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from unmoved.core.errors import UnmovedError
from unmoved.data.dataset import DataSet
from unmoved.data.split import ArraySplit, Selection
from unmoved.data.validation import as_labels, numbered

IMAGES = ("image", "images", "img", "x", "pixel_values", "pixels", "inputs")
LABELS = ("label", "labels", "y", "target", "targets", "fine_label", "class")
FORMS = (
    "a DataLoader, a torch Dataset, (images, labels) as tensors or numpy arrays, a Hugging Face dataset with image and "
    "label, or a split of unmoved.data"
)
Arrays: TypeAlias = Tensor | np.ndarray


@runtime_checkable
class Table(Protocol):
    """The part of a Hugging Face dataset that is used here."""

    column_names: list[str]
    features: Mapping[str, object]

    def __getitem__(self, key: int | str) -> object: ...

    def __len__(self) -> int: ...


def as_split(
    data: object, *, classes: Sequence[str] | None = None, layout: str | None = None
) -> tuple[ArraySplit | Selection, list[str]]:
    """Return the images and labels of ``data`` as a split in memory, and notes on conversions.

    A DataLoader's dataset is read in stored order, so that a sample keeps its identity however the loader
    shuffles. Images of uint8 are divided by 255; floating ones must lie in [0, 1].

    Args:
        data: one of `FORMS`; of a `DataSet` the test part.
        classes: names; by default those that the data has, else ``"0"``, ``"1"``, ...
        layout: as in `ArraySplit.of`.

    Raises:
        UnmovedError: something else; no sample; images or labels that do not fit; names or a layout for a split, which
            has its own.
    """
    if isinstance(data, DataSet | ArraySplit | Selection) and not (classes is None and layout is None):
        raise UnmovedError("data: expected neither classes nor layout with a split of unmoved.data, which has its own")
    if isinstance(data, DataSet):
        data = data.test
    if isinstance(data, ArraySplit | Selection):
        if not len(data):
            raise UnmovedError(f"data {data.name}: expected at least one sample, came none")
        return data, []
    names = classes if classes is not None else names_of(data)
    images, labels = _arrays(data)
    if not len(images):
        raise UnmovedError("data: expected at least one sample, came none")
    labels = as_labels("data labels", labels, len(images))
    if names is None:
        names = numbered("data labels", max(int(labels.max()), 1))
    notes = []
    if images.dtype in (torch.uint8, np.uint8):
        largest = int(images.max())
        darkest = "" if largest > 127 else f"; the largest pixel is {largest}: if that is white, divide by it yourself"
        notes.append("images of 0..255 (uint8) were divided by 255" + darkest)
    if layout is None and isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3, 4):
        layout = "NCHW"  # torch's layout, if the shape alone does not tell
    return ArraySplit.of(images, labels, classes=names, layout=layout), notes


def _arrays(data: object) -> tuple[Arrays, Arrays]:
    """Return all images and labels as one array each."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return data[0], data[1] if isinstance(data[1], Tensor | np.ndarray) else np.asarray(data[1])
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return data.tensors[0], data.tensors[1]
    if isinstance(data, Table):
        return _table(data)
    if callable(batches := getattr(data, "batches", None)):
        return _gathered((batch.x, batch.y) for batch in batches(256))
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or data.batch_size is None:
            return _gathered(map(_pair, data))
        collate = _collated if data.collate_fn is default_collate else data.collate_fn
        whole, size, workers = _chosen(data), data.batch_size, data.num_workers
        return _gathered(map(_pair, DataLoader(whole, size, collate_fn=collate, num_workers=workers)))
    if isinstance(data, Dataset):
        return _gathered(map(_pair, DataLoader(data, 256, collate_fn=_collated)))
    raise UnmovedError(f"data: expected {FORMS}; came a {type(data).__name__}")


def _chosen(loader: DataLoader[object]) -> Dataset[object]:
    """Return the samples that a loader goes through, in the order in which they are stored."""
    sampler, batches = loader.sampler, loader.batch_sampler
    if isinstance(sampler, SubsetRandomSampler) and type(batches) is BatchSampler:
        return Subset(loader.dataset, sorted({int(k) for k in sampler.indices}))
    if isinstance(sampler, SequentialSampler | RandomSampler) and type(batches) is BatchSampler:
        return loader.dataset
    raise UnmovedError(
        f"data: expected a DataLoader that goes through its data set, came one with a sampler of its own "
        f"({type(sampler).__name__}, {type(batches).__name__}); hand over torch.utils.data.Subset(dataset, indices)"
    )


def _gathered(batches: Iterable[tuple[Arrays, Arrays]]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for x, y in batches:
        images.append(torch.as_tensor(x).detach().cpu())
        labels.append(torch.as_tensor(y).detach().cpu())
    if not images:
        raise UnmovedError("data: expected at least one sample, came none")
    try:
        return torch.cat(images), torch.cat(labels)
    except RuntimeError as error:
        shapes = sorted({tuple(x.shape[1:]) for x in images})
        raise UnmovedError(f"data: expected images of one shape, came {shapes}; resize them first") from error


def _pair(batch: object) -> tuple[Arrays, Arrays]:
    """Return images and labels of a batch, or of a sample: the first two of a sequence, or by their usual names."""
    if isinstance(batch, Mapping):
        found = [next((batch[name] for name in names if name in batch), None) for names in (IMAGES, LABELS)]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
        raise UnmovedError(
            f"data: expected images under one of {', '.join(IMAGES)} and labels under one of {', '.join(LABELS)}, "
            f"came {', '.join(map(repr, batch))}"
        )
    if isinstance(batch, Sequence) and len(batch) >= 2:
        return batch[0], batch[1]
    raise UnmovedError(f"data: expected batches of (images, labels), came a {type(batch).__name__}")


def _collated(samples: list[object]) -> tuple[Tensor, Tensor]:
    """Stack samples, whose images may be Pillow's."""
    images, labels = zip(*map(_pair, samples), strict=True)
    pixels = [torch.as_tensor(_pixels(image)) for image in images]
    if len({tuple(image.shape) for image in pixels}) > 1:
        raise UnmovedError(
            f"data: expected images of one shape, came {sorted({tuple(x.shape) for x in pixels})}; resize them first"
        )
    try:
        return torch.stack(pixels), torch.stack([torch.as_tensor(label) for label in labels])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnmovedError(f"data: expected a whole number as each label, came {str(labels[0])[:80]!r}") from error


def _pixels(image: object) -> Arrays:
    if isinstance(image, Pillow.Image):
        if image.mode == "P":  # indices into a palette
            image = image.convert("RGB")
        if image.mode not in ("L", "RGB"):
            raise UnmovedError(f"data: expected Pillow images of mode L or RGB, came {image.mode}; convert them first")
        values = np.array(image)
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if isinstance(image, Tensor | np.ndarray):
        return image
    raise UnmovedError(f"data: expected images as tensors, arrays or Pillow's, came a {type(image).__name__}")


def _table(table: Table) -> tuple[Tensor, Tensor]:
    """Return the image and the label column of a Hugging Face dataset."""
    columns = [next((name for name in names if name in table.column_names), None) for names in (IMAGES, LABELS)]
    if None in columns:
        raise UnmovedError(
            f"data: expected a column of images ({', '.join(IMAGES)}) and one of labels ({', '.join(LABELS)}), came "
            f"{', '.join(table.column_names)}"
        )

    def samples() -> Iterator[object]:
        for row in range(len(table)):
            sample = table[row]
            assert isinstance(sample, Mapping)
            yield sample[columns[0]], sample[columns[1]]

    return _collated(list(samples()))


def names_of(data: object) -> Sequence[str] | None:
    """Return the class names that a data set has, if it has any."""
    if isinstance(data, DataLoader | Subset):
        return names_of(data.dataset)
    if isinstance(data, Table):
        feature = next((data.features[name] for name in LABELS if name in data.features), None)
        return list(names) if (names := getattr(feature, "names", None)) else None
    names = getattr(data, "classes", None)
    return [str(name) for name in names] if isinstance(names, Sequence) and not isinstance(names, str) else None
