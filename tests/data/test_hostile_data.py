"""Data files made to harm: each is refused in words, and costs neither memory nor time nor a line of foreign code."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.data import arrays, cifar10, cifar10_data, cifar10_pickle, decode_all, folder, folder_sources, hf
from unmoved.data import arrays_npz as npz_reader
from unmoved.data.decode import CorruptImage, Pixels, decode, known_formats, pillow_warnings
from unmoved.data.mnist_idx import read_idx

X = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
Y = np.arange(6) % 3


# --- images


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes = b"", between: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + between + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 16}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + struct.pack("<H", len(tags)) + entries + bytes(4)


def encoded(form: str, place: Callable[[bytes], int], size: bytes) -> bytes:
    """A small image whose header is given another size."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, form, **({"lossless": True} if form == "WEBP" else {}))
    raw = bytearray(stream.getvalue())
    at = place(raw)
    raw[at : at + len(size)] = size
    return bytes(raw)


def read(raw: bytes) -> np.ndarray:
    with pillow_warnings():
        return decode(raw, Pixels(), known_formats())


HUGE = {
    "png": png(2**31 - 1, 2**31 - 1),
    "png wide": png(2**31 - 1, 1),
    "png of 2^32": png(2**32 - 1, 2**32 - 1),
    "gif": gif(65535, 65535, (1, 1)),
    "gif frame": gif(1, 1, (65535, 65535)),
    "tiff": tiff(2**31, 2**31),
    "webp": encoded("WEBP", lambda raw: raw.index(b"VP8L") + 9, struct.pack("<I", 16383 | 16383 << 14)),
    "bmp": encoded("BMP", lambda raw: 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
    "jpeg": encoded("JPEG", lambda raw: raw.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500)),
    "ppm": b"P6 4000000000 4000000000 255\n",
}


@pytest.mark.parametrize("name", HUGE)
def test_an_image_that_claims_to_be_huge_is_taken_for_a_bomb(name: str) -> None:
    with pytest.raises(UnmovedError, match="decompression bomb"):
        read(HUGE[name])


def test_bombs_in_the_metadata_of_an_image_do_not_go_off() -> None:
    packed = zlib.compress(bytes(10**7))
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0")):
        with pytest.raises(CorruptImage, match="too large"):
            read(png(1, 1, zlib.compress(bytes(4)), chunk(kind, head + packed)))
    assert read(png(1, 1, packed)).shape == (3, 1, 1)  # what is more than the header says is not unpacked


def shelves(root: Path, raw: bytes, count: int = 2) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k}.png").write_bytes(raw)
    return root


def test_many_images_that_fill_the_memory_together_are_refused_before_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shelves(tmp_path / "pets", png(64, 64, zlib.compress(bytes(64 * (1 + 3 * 64)))))
    monkeypatch.setattr(decode_all, "_memory", lambda: 4 * 64 * 64 * 3 - 1)
    with pytest.raises(UnmovedError, match=r"expected images that fit the memory, came 4 of 64 x 64 .*smaller size"):
        folder(root, cache=False)
    monkeypatch.setattr(decode_all, "_memory", lambda: 4 * 64 * 64 * 3)
    assert len(folder(root, cache=False, test=2).train) == 2


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmoved.data import decode as module

    inside, most = [0], [0]
    real = Pixels.__call__

    def slow(self: Pixels, image: Image.Image) -> np.ndarray:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1
        return real(self, image)

    monkeypatch.setattr(Pixels, "__call__", slow)
    monkeypatch.setattr(module, "MANY_PIXELS", 63)
    monkeypatch.setattr(decode_all, "_workers", lambda: 4)
    monkeypatch.setattr(decode_all, "CHUNK", 1)
    root = shelves(tmp_path / "pets", png(8, 8, zlib.compress(bytes(8 * 25))), count=20)
    assert len(folder(root, cache=False, test=2).train) == 38
    assert most == [1]


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    root = shelves(tmp_path / "pets", png(8, 8, zlib.compress(bytes(8 * 25))))
    with (root / "a" / "0.png").open("wb") as file:
        file.truncate(40 * 2**30)  # a sparse file: it takes no room
    with pytest.raises(UnmovedError, match=r"a/0.png: expected at most 536870912 bytes, came 42949672960"):
        folder(root, cache=False, skip_corrupt=True)


def test_nothing_but_corrupt_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnmovedError, match="only corrupt ones in 'a'"):
        folder(shelves(tmp_path / "pets", b"no image"), cache=False, skip_corrupt=True)


def test_links_that_lead_back_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shelves(tmp_path / "pets", b"")
    for k in range(8):
        (root / "a" / f"link{k}").symlink_to(root)
    monkeypatch.setattr(folder_sources, "MOST_FOLDERS", 50)
    with pytest.raises(UnmovedError, match=r"expected at most 50 folders, came more; does a link in .* lead back"):
        folder(root, cache=False)


# --- archives


def tarred(path: Path, members: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    """A header block that may lie about its size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0 or size >= 8**11:
        block[124:136] = ((size % 2**96) if size < 0 else size + 2**95).to_bytes(12, "big")
    else:
        block[124:136] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def write_tar(path: Path, *blocks: bytes) -> Path:
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("size", [2**16 + 1, 2**40, -512, -1])
def test_a_header_about_a_header_is_small(tmp_path: Path, kind: bytes, size: int) -> None:
    for before in ((), (header("a/1.png"),)):
        path = write_tar(tmp_path / "x.tar", *before, header("it", kind, size), bytes(1024))
        with pytest.raises(UnmovedError, match=f"a header of {size} bytes"):
            folder(path, cache=False)


@pytest.mark.parametrize("size", [-512, -1, -1024])
def test_a_member_of_less_than_nothing_leads_nowhere(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "x.tar", header("a/1.png"), header("a/2.png", size=size))
    with pytest.raises(UnmovedError, match=f"a header of {size} bytes"):
        folder(path, cache=False)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_members_in_disguise_are_refused_in_every_kind_of_archive(tmp_path: Path, suffix: str) -> None:
    mode = f"w:{suffix.partition('.')[2]}"

    def refused(words: str, *members: tarfile.TarInfo) -> None:
        path = tarred(tmp_path / f"x.{suffix}", list(members), mode)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UnmovedError, match=words):
            folder(path, cache=False)
        assert sorted(tmp_path.iterdir()) == before

    def of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.pax_headers = kind, link, pax
        return info

    refused("climbs out", of("a/1.png"), of("../../evil.png"))
    refused("climbs out", of("a/1.png"), of("/etc/evil.png"))
    refused("climbs out", of("innocent", path="a/../../evil"))  # a name in an extended header counts
    refused("link or device", of("a/1.png", tarfile.SYMTYPE, "/etc/passwd"))
    refused("link or device", of("a/1.png", tarfile.LNKTYPE, "a/2.png"))
    refused("link or device", of("a/1.png", tarfile.BLKTYPE))
    refused("link or device", of("a/1.png", b"Z"))
    refused("each file once, came '(./)?a/1.png' twice", of("a/1.png"), of("./a/1.png"))
    refused("at most 4096 characters and 64 folders", of("x/" * 65 + "1.png"))
    refused("at most 4096 characters and 64 folders", of("x" * 5000))
    sparse = {"GNU.sparse.size": str(2**29), "GNU.sparse.map": "0,0", "GNU.sparse.name": "a/1.png"}
    info = of("a/1.png")
    info.pax_headers = sparse
    refused("sparse file 'a/1.png'", info)  # a few bytes that would be read as half a gigabyte


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmoved.data import tar_archive as archive

    monkeypatch.setattr(archive, "MOST_MEMBERS", 3)
    path = tarred(tmp_path / "x.tar", [tarfile.TarInfo(f"a/{k}.png") for k in range(4)])
    with pytest.raises(UnmovedError, match="expected at most 3 members, came more"):
        folder(path, cache=False)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_archives_that_unpack_a_thousandfold_are_bombs_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(untrusted, "ROOM", 2**20)
    suffix = "tar.gz" if pack is gzip.compress else "tar.xz"
    path, size = tmp_path / f"x.{suffix}", 2**22
    member = header("a/1.png", size=size) + bytes(size)
    behind = header("a/1.png", size=8) + bytes(512)
    for raw in (member + bytes(1024), behind + bytes(size), member + member + bytes(1024)):
        path.write_bytes(pack(raw))
        assert path.stat().st_size < 2**20 / 100
        with pytest.raises(UnmovedError, match="more than 1048576 bytes, which may be a decompression bomb"):
            folder(path, cache=False)


def test_an_archive_in_an_archive_stays_closed(tmp_path: Path) -> None:
    inner = gzip.compress(bytes(2**20))
    members: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]] = [
        (tarfile.TarInfo(f"{name}/x.tar.gz"), inner) for name in ("a", "b")
    ]
    with pytest.raises(UnmovedError, match=r"a/x.tar.gz: expected a readable image"):
        folder(tarred(tmp_path / "x.tar", members), cache=False)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_nobody_waits_at_a_pipe(tmp_path: Path) -> None:
    for name, source in (("x.tar", folder), ("x.npz", arrays), ("y.tar.gz", cifar10)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UnmovedError, match="expected a regular file"):
            source(tmp_path / name)  # type: ignore[operator]


# --- IDX


def test_idx_headers_that_lie_and_gzip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    for shape in ((2**32 - 1, 28, 28), (2**32 - 1,) * 3, (2**32 - 1, 1, 1)):
        path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, *shape)))
        with pytest.raises(UnmovedError, match="expected a size between 1 and 1073741824 bytes"):
            read_idx(path, 3)
    monkeypatch.setattr(untrusted, "ROOM", 2**20)
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 2**21, 1, 1) + bytes(2**21)))
    with pytest.raises(UnmovedError, match=r"expected a size between 1 and 1048576 bytes, came the shape \(2097152"):
        read_idx(path, 3)
    path.write_bytes(struct.pack(">IIII", 0x803, 2**21, 1, 1) + bytes(2**21))  # as it is, it is no bomb
    assert read_idx(path, 3).shape == (2**21, 1, 1)


# --- .npz


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_header(words: str, content: bytes = b"") -> bytes:
    head = words.encode() + b" " * ((-len(words) - 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + content


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def described(shape: object, kind: str = "|u1") -> str:
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}}}"


@pytest.mark.parametrize(
    "member",
    [
        npy_header(described((2**40,))),
        npy_header(described((-4, 1, 2, 2)), bytes(16)),
        npy_header(described((1,) * 70), b"1"),
        npy_header("(" * 3000 + ")" * 3000),
        npy_header("9" * 4400),
        npy_header(described((1,), '__import__("os")')),
        npy_header(described((4,), "V1000000000"), b"1234"),
        b"\x93NUMPY\x03\0" + struct.pack("<I", 2**31) + b"{",
        b"cos\nsystem\n(S'true'\ntR.",
        pickle.dumps(X),
        b"",
    ],
)
def test_members_that_lie_are_refused(tmp_path: Path, member: bytes) -> None:
    with pytest.raises(UnmovedError) as caught:
        arrays(npz(tmp_path / "x.npz", x=member, y=npy(Y)))
    assert len(str(caught.value)) < 600  # the header of a stranger is not printed whole


def test_an_npz_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "ROOM", 2**20)
    path = npz(tmp_path / "x.npz", x=npy(np.zeros((2**15, 1, 8, 8), np.uint8)), y=npy(np.arange(2**15) % 3))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UnmovedError, match="it may be a decompression bomb"):
        arrays(path)


def test_a_label_of_two_to_the_fortieth_does_not_make_as_many_names(tmp_path: Path) -> None:
    far = Y.copy()
    far[0] = 2**40
    for members in (
        {"x": npy(X), "y": npy(far)},
        {"x_train": npy(X), "y_train": npy(far), "x_test": npy(X), "y_test": npy(Y)},
    ):
        with pytest.raises(UnmovedError, match="expected labels below 1000000, came 1099511627776"):
            arrays(npz(tmp_path / "x.npz", **members))


def test_class_names_that_are_no_text_or_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = npy(np.array(["a", "b", "c"])).replace(b"c\0\0\0", b"\xff\xff\xff\xff")
    with pytest.raises(UnmovedError, match="class names in 'classes', came something else"):
        arrays(npz(tmp_path / "x.npz", x=npy(X), y=npy(Y), classes=names))
    monkeypatch.setattr(npz_reader, "MOST_CLASSES", 2)
    with pytest.raises(UnmovedError, match="at most 2 class names in 'classes', came 3 names"):
        arrays(npz(tmp_path / "x.npz", x=npy(X), y=npy(Y), classes=npy(np.array(["a", "b", "c"]))))


def test_nor_do_those_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        column_names, features = ("image", "label"), {"label": None}

        def __len__(self) -> int:
            return 2

        def __getitem__(self, key: object) -> object:
            image = Image.new("RGB", (8, 8))
            return [0, 2**40] if key == "label" else {"image": image, "label": 0}

    library = SimpleNamespace(load_dataset=lambda name, split: Table())
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    with pytest.raises(UnmovedError, match="expected labels below 1000000"):
        hf("it")


def test_a_member_twice_is_read_once(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", x=npy(X), y=npy(Y))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("x.npy", pickle.dumps(os.system))
    with pytest.raises(UnmovedError, match="'x': expected an array, came something else"):
        arrays(path)


# --- pickles of CIFAR


def nested_key(depth: int) -> bytes:
    return b"})" + b"\x85" * depth + b"K\x01s."


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (nested_key(25_001), "too long"),
        (b"}" + b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(60)) + b"K\x01s.", "repeats a tuple"),
        (b"})\x85Nbq\x00h\x00\x86.", "repeats a tuple"),  # BUILD with nothing leaves the tuple on top
        (b"})\x85(eq\x00h\x00\x86.", "repeats a tuple"),  # so does APPENDS of nothing
        (b"})\x85\x94h\x00\x86.", "repeats a tuple"),
        (b"X\x01\x02\x00\x00" + b"a" * 513 + b"q\x00h\x00\x86.", "a long text"),
        (b"]" * 30_001 + b".", "too long"),
        (b"c" + b"a" * 10**6 + b"\nb\n.", "it asks for aaaa"),
    ],
    ids=["deep key", "key of 2^60", "build", "appends", "memoize", "long text", "lists", "long name"],
)
def test_pickles_that_describe_more_than_they_are_long(raw: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_pickle, "MOST_OPCODES", 30_000)
    with pytest.raises(UnmovedError, match=words) as caught:
        cifar10_pickle.loads(raw, "it")
    assert len(str(caught.value)) < 600


def test_the_deepest_key_that_passes_does_not_end_the_process() -> None:
    value = cifar10_pickle.loads(nested_key(cifar10_pickle.MOST_TUPLES), "it")
    assert list(value.values()) == [1]


def test_texts_as_bytes_of_all_images_pass() -> None:
    """What Python 3 writes of byte strings in an old protocol: a tuple and a call for each."""
    content = {b"filenames": [b"%d.png" % k for k in range(10_000)], b"labels": [1] * 10_000, "a": (1, 2)}
    assert cifar10_pickle.loads(pickle.dumps(content, protocol=2), "it") == content


def test_no_batch_is_larger_than_a_batch(tmp_path: Path) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for name in names:
        with (root / name).open("wb") as file:
            file.truncate(4 * 2**30)
    with pytest.raises(UnmovedError, match=r"data_batch_1: expected at most \d+ bytes, came 4294967296"):
        cifar10(root)
    info = tarfile.TarInfo("x/data_batch_1")
    info.size = 2**28
    path = tmp_path / "c.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        for name in names:
            file.write(header(f"x/{name}", size=2**27 if name == "test_batch" else 0))
        file.write(bytes(2**27 + 1024))
    with pytest.raises(UnmovedError, match=r"test_batch: expected at most \d+ bytes, came 134217728"):
        cifar10(path)


def test_a_batch_without_labels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_data, "RECORDS", 2)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (root / name).write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": []}, protocol=2))
    with pytest.raises(UnmovedError, match=r"expected 2 labels 0..9, came 0"):
        cifar10(root)
