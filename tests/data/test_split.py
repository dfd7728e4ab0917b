"""ArraySplit: what it holds is what was given, batches partition it, hold_out is disjoint, stratified and seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmoved.core.errors import UnmovedError
from unmoved.data import ArraySplit, DataSet, digits


def make(n: int = 23, classes: int = 3, seed: int = 0) -> ArraySplit:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    return ArraySplit.of(rng.integers(0, 256, (n, 3, 5, 6), dtype=np.uint8), labels)


def test_every_level_of_a_byte_survives_as_float_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(2, 0)
    for given_images in (levels, levels / 255, (levels / np.float32(255)), torch.from_numpy(levels) / 255):
        split = ArraySplit.of(given_images, np.array([0, 1]))
        assert split.images.dtype == torch.uint8
        (batch,) = split.batches(2)
        assert batch.x.dtype == torch.float32
        assert torch.equal(batch.x, torch.from_numpy(levels).float() / 255)


def test_floats_between_the_levels_are_kept_exactly() -> None:
    images = np.arange(17)[:, None, None] / 16 * np.ones((17, 2, 2))
    split = ArraySplit.of(images, np.arange(17))
    assert split.images.dtype == torch.float32
    assert torch.equal(next(split.batches(17)).x * 16, torch.arange(17.0)[:, None, None, None].expand(17, 1, 2, 2))


def test_a_split_is_a_copy_and_so_are_its_batches() -> None:
    for images in (np.full((2, 4, 4), 7, np.uint8), np.full((2, 4, 4), 0.3), torch.full((2, 4, 4), 0.3)):
        split = ArraySplit.of(images, np.array([0, 1]))
        before = split.images.clone()
        images[:] = 0
        next(split.batches(2)).x.zero_()
        assert torch.equal(split.images, before)


def test_layouts_mean_the_same_images() -> None:
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 5), dtype=np.uint8)
    y = np.array([0, 1, 0, 1])
    want = ArraySplit.of(x, y).images
    assert torch.equal(ArraySplit.of(x.transpose(0, 2, 3, 1), y).images, want)
    assert torch.equal(ArraySplit.of(x.transpose(0, 2, 3, 1), y, layout="NHWC").images, want)
    assert torch.equal(ArraySplit.of(x[:, 0], y).images, want[:, :1])
    assert torch.equal(ArraySplit.of(x[::-1, :, ::-1], y).images, want.flip(0, 2))
    assert torch.equal(ArraySplit.of(x.astype(">f4") / 255, y).images, want)
    last = torch.from_numpy(x).to(memory_format=torch.channels_last)
    for handed in (last, last / 255, last / 300):
        assert ArraySplit.of(handed, y).images.is_contiguous(), "the layout is the model's, which knows what is right"


@given(n=st.integers(3, 40), size=st.integers(1, 50), shuffle=st.none() | st.integers(0, 2**63 - 1))
def test_batches_partition_the_split(n: int, size: int, shuffle: int | None) -> None:
    split = make(n)
    batches = list(split.batches(size, shuffle=shuffle))
    assert [len(b) for b in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    index = torch.cat([b.index for b in batches])
    assert torch.equal(index.sort().values, torch.arange(n))
    for key, stored in (("x", split.images.float() / 255), ("y", split.labels)):
        assert torch.equal(torch.cat([getattr(b, key) for b in batches]), stored[index])


def test_the_order_is_the_seed_alone_and_the_callers_random_state_stays() -> None:
    split, state = make(200), torch.get_rng_state()
    orders = [torch.cat([b.index for b in split.batches(7, shuffle=seed)]) for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(torch.cat([b.index for b in split.batches(7)]), torch.arange(200))
    split.take(5, seed=3)
    split.hold_out(0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_hold_out_is_disjoint_complete_and_stratified(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])[torch.randperm(sum(sizes))]
    total = len(labels)
    count = round(share * total)
    split = ArraySplit.of(torch.zeros(total, 1, 1), labels, classes=[str(k) for k in range(len(sizes))])
    if not 0 < count < total:
        with pytest.raises(UnmovedError, match="at least one sample on each side"):
            split.hold_out(share, seed)
        return
    train, held = split.hold_out(share, seed)
    assert len(held) == count
    assert torch.equal(torch.cat([train.index, held.index]).sort().values, torch.arange(total))
    for part in (train, held):
        assert torch.equal(part.labels, labels[part.index])
        assert torch.equal(part.index, part.index.sort().values)
    for n, came in zip(sizes, held.labels.bincount(minlength=len(sizes)).tolist(), strict=True):
        assert n * count // total <= came <= -(-n * count // total)


def test_hold_out_depends_on_the_seed_and_takes_counts() -> None:
    split = make(100)
    a, b, c = (split.hold_out(30, seed)[1].index for seed in (0, 0, 1))
    assert len(a) == 30
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(split.hold_out(30.0, 0)[1].index, a)
    assert torch.equal(split.hold_out(0.3, 0)[1].index, a)
    again = split.hold_out(30, 0)[0].hold_out(20, 0)
    assert not set(again[1].index.tolist()) & set(a.tolist())


def test_take_and_select_keep_identities() -> None:
    split = make(50)
    assert torch.equal(split.take(4).index, torch.arange(4))
    few, more = (set(split.take(n, seed=5).index.tolist()) for n in (10, 20))
    assert len(few) == 10
    assert few < more
    chosen = split.select(torch.tensor([9, 3]))
    assert torch.equal(chosen.images, split.images[[9, 3]])
    assert torch.equal(next(chosen.batches(2)).index, torch.tensor([9, 3]))
    assert torch.equal(split.select(split.labels == 1).labels, torch.ones(int((split.labels == 1).sum())).long())
    assert torch.equal(chosen.to("cpu").images, chosen.images)


GOOD = np.zeros((4, 3, 8, 8), np.uint8)
Y = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "settings", "message"),
    [
        (GOOD.astype(float) + 1.5, Y, {}, r"in \[0, 1\], came 1.5 to 1.5; .*augmentation"),
        (GOOD - 0.1, Y, {}, r"in \[0, 1\]"),
        (np.full(GOOD.shape, np.nan), Y, {}, r"in \[0, 1\], came nan to nan"),
        (np.full(GOOD.shape, np.inf), Y, {}, r"in \[0, 1\]"),
        (GOOD.astype(np.int64), Y, {}, "uint8"),
        (GOOD.astype(bool), Y, {}, "expected numbers"),
        (GOOD.astype(object), Y, {}, "expected numbers"),
        (GOOD[:, 0, 0], Y, {}, "expected shape"),
        (GOOD[:0], Y[:0], {}, "at least one image"),
        (GOOD.tolist(), Y, {}, "torch tensor or a numpy array"),
        (np.zeros((4, 3, 8, 3), np.uint8), Y, {}, "say layout"),
        (np.zeros((4, 8, 8, 8), np.uint8), Y, {}, "say layout"),
        (GOOD, Y, {"layout": "CHWN"}, "unknown value 'CHWN'"),
        (GOOD, Y[:3], {}, "3 labels for 4 images"),
        (GOOD, Y.astype(float), {}, "integer type"),
        (GOOD, np.array([0, 1, 0, np.nan]), {}, "with NaN"),
        (GOOD, torch.tensor([True, False, True, False]), {}, "integer type"),
        (GOOD, np.eye(4, dtype=int), {}, "argmax"),
        (GOOD, Y - 1, {}, "came -1"),
        (GOOD, np.full(4, 2**64 - 1, np.uint64), {}, "came -1"),
        (GOOD, Y + 1, {"classes": ("a", "b")}, "0..1 for 2 classes, came 2"),
        (GOOD, Y * 0, {}, "at least two classes"),
        (GOOD, Y, {"classes": ("a", "a")}, "distinct names"),
        (GOOD, Y, {"classes": "ab"}, "sequence"),
        (GOOD, Y, {"index": np.array([1, 1, 2, 3])}, "more than once"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(images: object, labels: object, settings: dict, message: str) -> None:
    with pytest.raises(UnmovedError, match=message) as error:
        ArraySplit.of(images, labels, name="mine", **settings)
    assert str(error.value).startswith("mine ")


@pytest.mark.parametrize("size", [0, 1.0, 0.0, 1.5, -3, 50, True, float("nan"), "half"])
def test_impossible_hold_outs(size: object) -> None:
    with pytest.raises(UnmovedError, match="held-out size"):
        make(50).hold_out(size, 0)  # type: ignore[arg-type]


def test_impossible_batches_and_takes() -> None:
    split = make(10)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(UnmovedError, match="batch size"):
            split.batches(wrong)  # type: ignore[arg-type] - raised at once, not at the first batch
        with pytest.raises(UnmovedError, match="number of samples"):
            split.take(wrong)  # type: ignore[arg-type]
    with pytest.raises(UnmovedError, match="at most its 10 samples, came 11"):
        split.take(11)
    with pytest.raises(UnmovedError, match="seed"):
        split.batches(2, shuffle=2**64)


def test_raw_tensors_of_another_type_are_refused() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    for wrong in ((x.double(), y, y), (x[0], y, y), (x, y.int(), y), (x, y, y[:1])):
        with pytest.raises(UnmovedError, match=r"ArraySplit.of"):
            ArraySplit(*wrong, classes=("a", "b"))


def test_parts_of_a_data_set_belong_together() -> None:
    with pytest.raises(UnmovedError, match="same image shape and classes"):
        DataSet(make(9, 3), make(9, 4))


def test_digits_are_scikit_learns_sixteenths() -> None:
    from sklearn.datasets import load_digits

    source, data = load_digits(), digits()
    assert (data.name, data.train.name, data.test.name) == ("digits", "digits/train", "digits/test")
    assert (len(data.train), len(data.test), data.train.shape) == (1348, 449, (1, 8, 8))
    assert data.classes == tuple("0123456789")
    for part in (data.train, data.test):
        assert torch.equal(part.images[:, 0] * 16, torch.from_numpy(source.images[part.index]).float())
        assert torch.equal(part.labels, torch.from_numpy(source.target[part.index]))
    assert torch.equal(digits(seed=0).test.index, data.test.index)
    assert not torch.equal(digits(seed=1).test.index, data.test.index)
    assert len(digits(test=100).test) == 100
