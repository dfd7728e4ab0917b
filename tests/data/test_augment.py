"""Augmentation against a naive loop, and the theorems: keyed by identity, pure, chains are flat and independent."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from unmoved.core import noise
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.data import ArraySplit, Augmentation, Chain, CutMix, Cutout, Flip, PadCrop, augmentation
from unmoved.data.augment import CROP, CUTMIX, CUTOUT, positions

# Eleven images to be pasted, of five classes, with identities that are no positions.
POOL = ArraySplit.of(
    torch.rand(11, 3, 9, 7, generator=torch.Generator().manual_seed(1)),
    torch.arange(11) % 5,
    index=torch.arange(11) * 3 + 1,
    layout="NCHW",
)
ALL = [
    PadCrop(),
    PadCrop(2, "reflect"),
    PadCrop(0),
    Flip(),
    Chain(),
    Chain(PadCrop(3), Flip(0.3)),
    Chain(Flip(), Flip()),
    Cutout(),
    Cutout(3, 0.0),
    Chain(PadCrop(3), Flip(0.3), Cutout(5)),
    CutMix().over(POOL),
    Chain(CutMix(Chain(PadCrop(3), Flip(0.3)))).over(POOL),
]


def make(n: int = 64, step: int = 3, dtype: torch.dtype = torch.float32) -> Batch:
    x = torch.rand(n, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Batch(x, torch.arange(n) % 5, torch.arange(n) * 17 + 5, step)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_crop_is_the_naive_loop(mode: str) -> None:
    batch, pad = make(), 2
    draws = noise.uniform(batch.index, (2,), seed=11, step=batch.step, stream=CROP)
    want = []
    for image, (u, v) in zip(batch.x, draws.tolist(), strict=True):
        padded = functional.pad(image[None], (pad,) * 4, mode="constant" if mode == "zeros" else "reflect")[0]
        top, left = int(u * 5), int(v * 5)
        want.append(padded[:, top : top + 9, left : left + 7])
    assert torch.equal(PadCrop(pad, mode)(batch, 11).x, torch.stack(want))


def test_all_places_of_the_crop_are_equally_likely() -> None:
    n = 5000
    image = torch.zeros(1, 1, 5, 5)
    image[..., 2, 2] = 1  # the centre can be seen wherever it goes
    batch = Batch(image.expand(n, 1, 5, 5).contiguous(), torch.zeros(n).long())
    places = PadCrop(2)(batch, 0).x.sum(0)[0]
    expected = n / 25
    assert places.sum() == n
    assert ((places - expected) ** 2 / expected).sum() < 51.2  # chi-square, 24 degrees of freedom, p = 0.001


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_flip_mirrors_each_image_with_probability_p(p: float) -> None:
    batch = make(4000)
    x = Flip(p)(batch, 1).x
    flipped = (x == batch.x.flip(-1)).flatten(1).all(1)
    kept = (x == batch.x).flatten(1).all(1)
    assert torch.equal(flipped, ~kept)
    assert abs(flipped.float().mean().item() - p) < 0.025


@pytest.mark.parametrize(("size", "side"), [(None, 3), (1, 1), (4, 4), (5, 5), (40, 40)])
def test_cutout_is_the_naive_loop(size: int | None, side: int) -> None:
    batch = make()
    draws = noise.uniform(batch.index, (2,), seed=11, step=batch.step, stream=CUTOUT)
    want = batch.x.clone()
    for image, (u, v) in zip(want, draws.tolist(), strict=True):
        top, left = int(u * 9) - side // 2, int(v * 7) - side // 2
        for row in range(9):
            for column in range(7):
                if top <= row < top + side and left <= column < left + side:
                    image[:, row, column] = 0.5
    assert torch.equal(Cutout(size)(batch, 11).x, want)


def test_all_middles_of_the_cut_are_equally_likely() -> None:
    n = 5000
    batch = Batch(torch.zeros(n, 1, 5, 5), torch.zeros(n).long())
    places = Cutout(1, 1.0)(batch, 0).x.sum(0)[0]
    assert places.sum() == n
    assert ((places - n / 25) ** 2 / (n / 25)).sum() < 51.2  # chi-square, 24 degrees of freedom, p = 0.001


@pytest.mark.parametrize("before", [Chain(), Chain(PadCrop(2), Flip())], ids=repr)
def test_cutmix_is_the_naive_loop(before: Augmentation) -> None:
    batch = make()
    out = CutMix(before).over(POOL)(batch, 11)
    draws = noise.uniform(batch.index, (5,), seed=11, step=batch.step, stream=CUTMIX).tolist()
    want = before(batch, 11).x.clone()
    assert out.other is not None
    assert out.share is not None
    for k, (high, low, mix, row, column) in enumerate(draws):
        at = math.floor(11 * (high + low / 2**24))
        partner = before(Batch(POOL.images[[at]], POOL.labels[[at]], POOL.index[[at]], batch.step), 11)
        size, pasted = math.sqrt(1 - mix), 0
        top, bottom = round(max(9 * (row - size / 2), 0)), round(min(9 * (row + size / 2), 9))
        left, right = round(max(7 * (column - size / 2), 0)), round(min(7 * (column + size / 2), 7))
        for y in range(top, bottom):
            for x in range(left, right):
                want[k, :, y, x] = partner.x[0, :, y, x]
                pasted += 1
        assert out.other[k] == partner.y[0]
        assert out.share[k].item() == pytest.approx(1 - pasted / 63)
        assert out.largest[k] == (batch.y[k] if pasted < 31.5 else partner.y[0])
    assert torch.equal(out.x, want)


def test_positions_are_exact_in_large_data() -> None:
    bits, count = 2**24, 3_000_000_001
    high, low = (torch.randint(bits, (200,), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    high[0] = low[0] = bits - 1
    want = [(h * bits + n) * count // bits**2 for h, n in zip(high.tolist(), low.tolist(), strict=True)]
    assert positions(high / bits, low / bits, count).tolist() == want
    assert want[0] == count - 1


def test_partners_are_all_equally_likely_and_boxes_as_large_as_they_should_be() -> None:
    """The box is cut off at the edges: of sides r = sqrt(1 - lambda) there remain r - r^2 / 4 on average.

    So the first label's share is 1 - E[(r - r^2/4)^2] = 1 - (1/2 - 1/5 + 1/48) = 163/240, lambda = 1 - r^2 uniform.
    """
    n, side = 5000, 32
    pool = ArraySplit.of(torch.ones(5, 1, side, side), torch.arange(5), layout="NCHW")
    batch = Batch(torch.zeros(1, 1, side, side).expand(n, -1, -1, -1), torch.zeros(n).long())
    out = CutMix().over(pool)(batch, 0)
    assert out.other is not None
    assert out.share is not None
    assert ((out.other.bincount() - n / 5) ** 2 / (n / 5)).sum() < 18.5  # chi-square, 4 degrees, p = 0.001
    assert out.share.mean().item() == pytest.approx(163 / 240, abs=0.011)  # 3 standard errors
    assert torch.allclose(out.share, 1 - out.x.mean(dim=(1, 2, 3)))
    rows = out.x.amax(dim=(1, 3)).sum(dim=1)  # how high the boxes are
    inside = (out.x[:, 0, 0].amax(dim=1) == 0) & (out.x[:, 0, -1].amax(dim=1) == 0)
    # Of height r, a share of 1 - r of the middles leave the box whole: lambda given that has the density ~ 1 - r.
    assert (rows[inside] / side).mean().item() == pytest.approx(0.5, abs=0.03)  # int 2 r (1 - r) r / int 2 r (1 - r)


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_what_happens_to_a_sample_does_not_depend_on_its_batch(augment: Augmentation) -> None:
    batch = make()
    whole = augment(batch, 7)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    parts = [augment(batch.take(part), 7) for part in torch.arange(64).split(5)]
    for name in ("x", "y", "other", "share"):
        of_all = getattr(whole, name)
        if of_all is not None:
            assert torch.equal(getattr(augment(batch.take(order), 7), name), of_all[order])
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), of_all)


@pytest.mark.parametrize("augment", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_the_images_move(augment: Augmentation, dtype: torch.dtype) -> None:
    batch, state = make(dtype=dtype), torch.get_rng_state()
    before = batch.x.clone()
    out = augment(batch, 7)
    assert out.x.shape == batch.x.shape
    assert out.x.dtype == dtype
    assert torch.equal(out.y, batch.y)
    assert torch.equal(out.index, batch.index)
    assert out.step == batch.step
    assert torch.equal(batch.x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augment(batch, 7).x, out.x)


@pytest.mark.parametrize("augment", [PadCrop(), Flip(), Cutout(), CutMix().over(POOL), ALL[5]], ids=repr)
def test_seed_and_step_draw_anew(augment: Augmentation) -> None:
    batch = make()
    x = augment(batch, 7).x
    assert not torch.equal(augment(batch, 8).x, x)
    assert not torch.equal(augment(replace(batch, step=4), 7).x, x)


def test_chains_are_flat_and_their_parts_independent() -> None:
    a, b, c = PadCrop(), Flip(), Flip(0.3)
    assert Chain(Chain(a, b), c) == Chain(a, Chain(b, c)) == Chain(a, b, c)
    assert repr(Chain(a, b)) == "Chain(PadCrop(pad=4, mode='zeros'), Flip(p=0.5))"
    assert eval(repr(Chain(a, b))) == Chain(a, b)
    batch = make(4000)
    twice = Chain(Flip(), Flip())(batch, 0).x
    assert abs((twice == batch.x).flatten(1).all(1).float().mean().item() - 0.5) < 0.03
    assert torch.equal(Chain()(batch, 0).x, batch.x)


def test_the_names_that_recipes_use() -> None:
    names = {"none": Chain(), "crop": PadCrop(), "flip": Flip(), "crop-flip": Chain(PadCrop(), Flip())}
    names |= {"cutout": Cutout(), "crop-flip-cutout": Chain(PadCrop(), Flip(), Cutout())}
    names |= {"cutmix": CutMix(), "cutout-cutmix": CutMix(Cutout()), "crop-flip-cutmix": CutMix(names["crop-flip"])}
    names |= {"crop2": PadCrop(2), "crop12-cutout8-cutmix": CutMix(Chain(PadCrop(12), Cutout(8)))}
    assert {name: augmentation(name) for name in names} == names
    for wrong in ("cropflip", "crop2flip", "crop-flip2", "crop100-flip"):
        with pytest.raises(UnmovedError, match=f"unknown value '{wrong}'; did you mean"):
            augmentation(wrong)
    with pytest.raises(UnmovedError, match=r"cutout.size.*0"):
        augmentation("cutout0")


def test_wrong_settings() -> None:
    for wrong in (-1, 1.5, True):
        with pytest.raises(UnmovedError, match=r"crop.pad"):
            PadCrop(wrong)  # type: ignore[arg-type]
    with pytest.raises(UnmovedError, match=r"crop.mode"):
        PadCrop(4, "wrap")
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(UnmovedError, match=r"flip.p"):
            Flip(p)
    with pytest.raises(UnmovedError, match=r"cutout.size"):
        Cutout(0)
    with pytest.raises(UnmovedError, match=r"cutout.fill"):
        Cutout(4, 2.0)
    with pytest.raises(UnmovedError, match="less than the image side"):
        PadCrop(7, "reflect")(make(), 0)
    with pytest.raises(UnmovedError, match=r"to draw partners from, came none; use CutMix\(\).over"):
        CutMix()(make(), 0)
    with pytest.raises(UnmovedError, match="not mixed yet, came mixed ones"):
        Chain(CutMix(), CutMix()).over(POOL)(make(), 0)
