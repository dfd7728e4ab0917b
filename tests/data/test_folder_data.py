"""A folder of images and a tar archive of it give the same pixels; what is wrong in either is named."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unmoved.core.errors import UnmovedError
from unmoved.data import folder

SIDE = 6


def pixels(seed: int, h: int = SIDE, w: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def write(root: Path, names: list[str], first: int = 0) -> Path:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(first + k)).save(root / name)
    return root


NAMES = [f"{c}/{n}.png" for c in ("ant", "bee", "cat") for n in range(4)]
SPLIT = [f"{part}/{c}/{n}.png" for part in ("train", "test") for c in ("ant", "bee") for n in range(3)]


def pack(root: Path, target: Path, prefix: str = "") -> Path:
    suffix = target.name.rpartition(".")[2]
    with tarfile.open(target, f"w:{'' if suffix == 'tar' else suffix}") as tar:  # type: ignore[call-overload]
        for file in sorted(root.rglob("*"), key=str, reverse=True):  # an order that is not the sorted one
            tar.add(file, f"{prefix}{file.relative_to(root)}", recursive=False)
    return target


def test_every_image_arrives_under_its_class(tmp_path: Path) -> None:
    data = folder(write(tmp_path / "pets", NAMES), cache=False, test=0.25)
    assert (data.name, data.classes, data.skipped) == ("pets", ("ant", "bee", "cat"), ())
    assert (len(data.train), len(data.test), data.train.shape) == (9, 3, (3, SIDE, SIDE))
    assert data.test.labels.tolist() == [0, 1, 2]
    for part in (data.train, data.test):
        for image, label, k in zip(part.images, part.labels, part.index.tolist(), strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(k))
            assert label == k // 4
    again, other = (folder(tmp_path / "pets", cache=False, test=0.25, seed=s).test.index for s in (0, 1))
    assert torch.equal(again, data.test.index)
    assert not torch.equal(other, data.test.index)


@pytest.mark.parametrize("lazily", [False, True])
def test_masks_of_zeros_and_ones_are_no_images(tmp_path: Path, lazily: bool) -> None:
    for k, name in enumerate(NAMES):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(k)[..., 0] // 128).save(tmp_path / "pets" / name)
    for _ in range(2):  # decoded, and from the cache
        with pytest.raises(UnmovedError, match=r"expected uint8 pixels of 0\.\.255, came none above 1"):
            len(folder(tmp_path / "pets", cache=tmp_path / "cache", lazily=lazily).test)


def test_train_and_test_folders_are_used(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", SPLIT)
    (root / "README.md").write_text("beside the class folders: left alone")
    (root / "train" / ".DS_Store").write_text("litter")
    (root / "train" / "ant" / "Thumbs.db").write_text("litter")
    write(root, ["extra/ant/0.png"])
    data = folder(root, cache=False)
    assert [len(data.train), len(data.test)] == [6, 6]
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.test.images[0].permute(1, 2, 0).numpy(), pixels(6))
    assert data.test.name == "pets/test"


@pytest.mark.parametrize("lazily", [False, True])
def test_all_of_a_folder_may_be_test_data(tmp_path: Path, lazily: bool) -> None:
    root = write(tmp_path / "pets", NAMES)
    for _ in range(2):  # decoded, and from the cache
        data = folder(root, cache=tmp_path / "cache", test="all", lazily=lazily)
        assert (len(data.train), data.test.index.tolist()) == (0, [*range(12)])
        assert np.array_equal(data.test.images[7].permute(1, 2, 0).numpy(), pixels(7))
    with pytest.raises(UnmovedError, match=r"split: expected no parts with test='all'"):
        folder(write(tmp_path / "split", SPLIT), test="all")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
@pytest.mark.parametrize("prefix", ["", "./", "pets-1.0/", "./a/b/"])
@pytest.mark.parametrize("names", [NAMES, SPLIT], ids=["whole", "split"])
def test_an_archive_is_the_folder(tmp_path: Path, suffix: str, prefix: str, names: list[str]) -> None:
    root = write(tmp_path / "pets", names)
    (root / "README.md").write_text("left alone")
    want = folder(root, cache=False)
    data = folder(pack(root, tmp_path / f"pets.{suffix}", prefix), cache=False)
    assert (data.name, data.classes) == (want.name, want.classes)
    for part in ("train", "test"):
        for key in ("images", "labels", "index"):
            assert torch.equal(getattr(getattr(data, part), key), getattr(getattr(want, part), key))


def test_formats_modes_and_turns(tmp_path: Path) -> None:
    root = write(tmp_path, ["a/0.png", "b/0.bmp", "b/1.ppm", "b/2.tif"])
    image = Image.fromarray(pixels(9))
    tag = Image.Exif()
    tag[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(root / "a/1.png", exif=tag)
    image.convert("RGBA").save(root / "a/2.png")
    image.convert("L").save(root / "a/3.png")
    image.quantize(16).save(root / "a/4.gif")
    palette = image.quantize(16)
    palette.save(root / "a/5.png", transparency=bytes(range(16)))
    image.save(root / "a/6", "PNG")  # the content tells, not the name
    data = folder(root, cache=False, test=1)
    by_place = {k: x for part in (data.train, data.test) for k, x in zip(part.index.tolist(), part.images, strict=True)}
    upright = {k: x.permute(1, 2, 0).numpy() for k, x in by_place.items()}
    assert np.array_equal(upright[1], np.rot90(pixels(9), -1))
    assert np.array_equal(upright[2], pixels(9))
    assert np.array_equal(upright[3], np.asarray(image.convert("L"))[..., None].repeat(3, -1))
    assert np.array_equal(upright[4], np.asarray(palette.convert("RGB")))
    assert np.array_equal(upright[5], np.asarray(palette.convert("RGB")))
    assert np.array_equal(upright[6], pixels(9))
    for k in range(3):
        assert np.array_equal(upright[7 + k], pixels(1 + k))


def test_sizes_are_made_one_on_request_only(tmp_path: Path) -> None:
    root = write(tmp_path, ["a/0.png", "b/0.png"])
    Image.fromarray(pixels(5, 8, 4)).save(root / "b/1.png")
    with pytest.raises(UnmovedError, match=r"came 6 x 6 .* in .*a/0.png and 8 x 4 .* in .*b/1.png; set size"):
        folder(root, cache=False)
    assert folder(root, cache=False, test=1, size=5).train.shape == (3, 5, 5)
    assert folder(root, cache=False, test=1, size=(7, 3), grey=True).train.shape == (1, 7, 3)
    Image.new("RGB", (40, 20), (10, 20, 30)).save(root / "b/2.png")
    flat = folder(root, cache=False, test=1, size=4)
    index = torch.cat([flat.train.index, flat.test.index])
    values = torch.cat([flat.train.images, flat.test.images])[index == 3]
    assert torch.equal(values, torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 4))
    for wrong in (0, -3, (4,), (4, 0), "big", 2.5, True):
        with pytest.raises(UnmovedError, match="size"):
            folder(root, size=wrong)  # type: ignore[arg-type]


def truncated(form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(0, 64, 64)).save(stream, form)
    return stream.getvalue()[: len(stream.getvalue()) // 2]


CORRUPT = [b"", b"not an image", truncated("PNG"), truncated("JPEG"), truncated("GIF"), b"%!PS-Adobe-3.0 EPSF-3.0\n"]


@pytest.mark.parametrize("raw", CORRUPT, ids=["empty", "text", "png", "jpeg", "gif", "eps"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_corrupt_image_is_named_or_skipped_and_counted(tmp_path: Path, raw: bytes, packed: bool) -> None:
    root = write(tmp_path / "pets", NAMES)
    want = folder(root, cache=False, test=3)
    (root / "bee" / "00.png").write_bytes(raw)
    path = pack(root, tmp_path / "pets.tar") if packed else root
    with pytest.raises(UnmovedError, match=r"bee/00.png: expected a readable image, came corrupt .*skip_corrupt"):
        folder(path, cache=False)
    for _ in range(2):  # the second time from the cache
        data = folder(path, cache=tmp_path / "cache", skip_corrupt=True, test=3)
        assert len(data.skipped) == 1
        assert data.skipped[0].endswith("bee/00.png")
        assert torch.equal(data.train.images, want.train.images)
        assert torch.equal(data.train.labels, want.train.labels)
    with pytest.raises(UnmovedError, match=r"bee/00.png: expected a readable image"):
        folder(path, cache=tmp_path / "cache")


def test_eps_would_run_a_program_and_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, NAMES)
    Image.fromarray(pixels(0)).save(root / "cat" / "9.eps")
    ran: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: ran.append(_) or Image.new("RGB", (1, 1)).im)
    with Image.open(root / "cat" / "9.eps") as image:
        image.load()
    assert ran  # Pillow alone would
    ran.clear()
    with pytest.raises(UnmovedError, match=r"cat/9.eps: expected a readable image"):
        folder(root, cache=False)
    assert not ran


def test_a_class_with_corrupt_images_only(tmp_path: Path) -> None:
    root = write(tmp_path, SPLIT)
    for k in range(3):
        (root / f"test/bee/{k}.png").write_bytes(b"")
    with pytest.raises(UnmovedError, match="only corrupt ones in 'bee'"):
        folder(root, cache=False, skip_corrupt=True)


def test_sixteen_bits_are_refused_even_when_corrupt_ones_are_skipped(tmp_path: Path) -> None:
    root = write(tmp_path, NAMES)
    Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16)).save(root / "cat/9.png")
    with pytest.raises(UnmovedError, match=r"cat/9.png: expected 8 bits per value, came mode I;16"):
        folder(root, cache=False, skip_corrupt=True)


@pytest.mark.parametrize("limit", [SIDE * SIDE - 1, SIDE * SIDE // 2 - 1], ids=["warning", "error"])
@pytest.mark.filterwarnings("default")
def test_decompression_bombs_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnmovedError, match=r"ant/0.png: .*decompression bomb"):
        folder(write(tmp_path, NAMES), cache=False, skip_corrupt=True)


def test_trees_that_are_none(tmp_path: Path) -> None:
    def refused(message: str, *names: str, empty: str = "") -> None:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        write(root, list(names))
        if empty:
            (root / empty).mkdir(parents=True)
        with pytest.raises(UnmovedError, match=message):
            folder(root, cache=False)
        if names:
            with pytest.raises(UnmovedError, match=message):
                folder(pack(root, tmp_path / f"{root.name}.tar"), cache=False)

    refused("at least two class folders .* came none")
    refused("at least two class folders .* came none", "0.png", "1.png")
    refused("at least two class folders .* came cat", "cat/0.png", "cat/1.png")
    refused("came the empty 'dog'", "cat/0.png", "ant/0.png", empty="dog")
    refused("train: .* came the empty 'dog'", *SPLIT, empty="train/dog")
    refused("same class folders in train and test, came 'cow'", *SPLIT, "test/cow/0.png")
    refused(
        "directly in their class folder .* came (train|val)/ant/0.png.*train and test",
        "train/ant/0.png",
        "val/ant/0.png",
    )
    refused("directly in their class folder", "cat/0.png", "dog/small/0.png")
    refused("directly in their class folder .* train and test", "train/ant/0.png", "train/bee/0.png")
    with pytest.raises(UnmovedError, match="expected an existing file or folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "pets.zip").write_bytes(b"PK")
    with pytest.raises(UnmovedError, match=r"expected a folder or one of .tar"):
        folder(tmp_path / "pets.zip")
    for settings in ({"skip_corrupt": 1}, {"grey": "yes"}, {"cache": 3}, {"test": 1.5}):
        with pytest.raises(UnmovedError):
            folder(write(tmp_path / "good", NAMES), **{"cache": False, **settings})  # type: ignore[arg-type]


def test_a_link_to_nowhere_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, NAMES)
    (root / "ant" / "x.png").symlink_to(root / "gone.png")
    with pytest.raises(UnmovedError, match=r"expected a readable folder, came .*x.png"):
        folder(root, cache=False)


@pytest.mark.parametrize("name", ["../evil.png", "/tmp/evil.png", "a/../../evil.png"])
def test_members_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as tar:
        tar.addfile(tarfile.TarInfo("ant/0.png"), io.BytesIO())
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnmovedError, match="climbs out of it"):
        folder(file, cache=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("ant/0.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UnmovedError, match=r"link or device 'ant/0.png'"):
        folder(file, cache=False)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_damaged_archives_are_named_wherever_they_end(tmp_path: Path, suffix: str) -> None:
    file = pack(write(tmp_path / "pets", NAMES), tmp_path / f"pets.{suffix}")
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0")) if suffix == "tar" else len(whole)
    for cut in (0, 3, 700, end // 2 // 512 * 512, end // 2 + 100, end - 9):
        if cut < end:
            file.write_bytes(whole[:cut])
            with pytest.raises(UnmovedError, match=rf"pets.{suffix}: "):
                folder(file, cache=False)
    if suffix == "tar":  # a header in the middle is damaged: tarfile alone would take that for the end
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            offset = tar.getmembers()[5].offset
        file.write_bytes(whole[:offset] + b"\xff" * 512 + whole[offset + 512 :])
        with pytest.raises(UnmovedError, match="expected the end of the archive after"):
            folder(file, cache=False)


@pytest.mark.parametrize("packed", [False, True])
def test_the_cache_is_used_until_something_changes(tmp_path: Path, packed: bool) -> None:
    root, cache, decoded = write(tmp_path / "pets", NAMES), tmp_path / "cache", []

    def path() -> Path:
        return pack(root, tmp_path / "pets.tar") if packed else root

    def load(path: Path, **settings: object) -> tuple[bool, list[bytes]]:
        """Whether images were decoded, and all images."""
        decoded.clear()
        data = folder(path, cache=cache, progress=lambda done, _: decoded.append(done), **settings)  # type: ignore[arg-type]
        return bool(decoded), sorted(x.numpy().tobytes() for part in (data.train, data.test) for x in part.images)

    here = path()
    fresh, images = load(here)
    (kept,) = cache.iterdir()
    assert fresh
    assert load(here) == (False, images)
    assert load(here, test=0.5, seed=3) == (False, images)  # the split is made after the cache
    assert load(here, grey=True)[0]
    assert load(here, size=4)[0]
    assert load(here) == (False, images)

    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:800] + bytes(50) + whole[850:]):
        kept.write_bytes(damaged)
        assert load(here) == (True, images)
        assert load(here) == (False, images)

    Image.fromarray(pixels(99)).save(root / "ant" / "0.png")
    changed = load(path())
    assert changed[0]
    assert changed[1] != images
    (root / "bee" / "3.png").unlink()
    fewer = load(path())
    assert fewer[0]
    assert len(fewer[1]) == len(images) - 1
    os.utime(root / "bee" / "2.png", ns=(1, 1))  # other content of the same size would show in the time alone
    here = path()
    assert load(here) == (True, fewer[1])
    assert load(here) == (False, fewer[1])
    assert len(list(cache.iterdir())) == 3  # one for each of the three settings: stale ones were replaced


def test_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "pets", NAMES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("UNMOVED_CACHE", raising=False)
    folder(root)
    assert len(list((tmp_path / "xdg" / "unmoved").glob("pets-*.npz"))) == 1
    monkeypatch.setenv("UNMOVED_CACHE", str(tmp_path / "own"))
    folder(root)
    assert len(list((tmp_path / "own").glob("pets-*.npz"))) == 1
    (tmp_path / "file").write_text("in the way of a cache folder")
    monkeypatch.setenv("UNMOVED_CACHE", str(tmp_path / "file"))
    assert len(folder(root).train) > 0


def test_progress_ends_at_the_total_and_an_error_in_it_is_the_callers(tmp_path: Path) -> None:
    root = write(tmp_path, NAMES)
    calls: list[tuple[int, int]] = []
    folder(root, cache=False, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12)
    threads = threading.active_count()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder(root, cache=False, progress=interrupt)
    assert threading.active_count() == threads
