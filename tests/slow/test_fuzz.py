"""More than 100,000 hostile files: each is read or refused in words, and nothing is run or written outside.

An input is one file, or one set of files, handed to a reader. Most are valid ones with a few mutations, so that deep
code is reached; the same inputs come every time. ``UNMOVED_FUZZ=10`` makes ten times as many.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from helpers.cli import EVERYTHING
from helpers.mutations import EDITS, ROOT, TABLE_EDITS, mutated, mutated_tables, watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn

from unmoved import data, models
from unmoved.analyses.studies.table_cache import TableCache
from unmoved.core import untrusted
from unmoved.core.errors import UnmovedError
from unmoved.data import cifar10_data, cifar10_pickle
from unmoved.data.decode import CorruptImage, Pixels, decode, known_formats, pillow_warnings
from unmoved.data.mnist_idx import read_idx
from unmoved.evaluation import outcomes
from unmoved.evaluation.journal import Journal
from unmoved.runs import recipe as config
from unmoved.runs.assembly import Assembly

resource = pytest.importorskip("resource")  # POSIX: what takes memory without end must fail, not end the machine
pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("UNMOVED_FUZZ", "1"))
READ, REFUSED = Counter[str](), Counter[str]()
N = 4  # records in a CIFAR file here


def inputs(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here has to survive a power cut


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(target: str, folder: Path, read: Callable[[], object]) -> None:
    """Read once; anything but success or an `UnmovedError` of a length to read fails."""
    with watched(folder):
        try:
            read()
        except UnmovedError as error:
            REFUSED[target] += 1
            words = str(error)
        else:
            READ[target] += 1
            words = "read"
    assert words.strip()


# --- recipes

RECIPES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "src" / "unmoved" / "recipes").glob("*/*.toml"))]
TEXTS = [*RECIPES, EVERYTHING]
TABLES = [tomllib.loads(text) for text in TEXTS]


def read_recipe(path: Path) -> None:
    recipe = config.read(path)
    printed = tomli_w.dumps(recipe.tables())
    path.write_text(printed, encoding="utf-8", newline="")
    assert tomli_w.dumps(config.read(path).tables()) == printed  # what is shown can be read again, and is the same


@inputs(6000)
@given(whole=st.sampled_from(TABLES), edits=TABLE_EDITS)
def test_recipes_with_other_values(tmp_path_factory: pytest.TempPathFactory, whole: Any, edits: Any) -> None:
    folder = one_folder(tmp_path_factory)
    tables = mutated_tables(whole, edits)
    try:
        text = tomli_w.dumps(tables)
        text.encode()
    except (TypeError, ValueError, RecursionError):  # None, surrogates and huge numbers cannot be written as TOML
        attempt("recipe tables", folder, lambda: config.parse(tables).tables())
        return
    (folder / "r.toml").write_text(text, encoding="utf-8", newline="")
    attempt("recipe tables", folder, lambda: read_recipe(folder / "r.toml"))


@inputs(10000)
@given(whole=st.sampled_from([text.encode() for text in TEXTS] + [b""]), edits=EDITS)
def test_recipes_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, whole: bytes, edits: Any) -> None:
    folder = one_folder(tmp_path_factory)
    (folder / "r.toml").write_bytes(mutated(whole, edits))
    attempt("recipe bytes", folder, lambda: read_recipe(folder / "r.toml"))


PIECES = st.sampled_from(
    [
        "[",
        "]",
        "{",
        "}",
        "=",
        ".",
        ",",
        '"',
        "'",
        '"""',
        "\n",
        "#",
        "[[",
        "]]",
        "a",
        "use",
        "data",
        "attack",
        "objective",
        "phases",
        "inf",
        "nan",
        "1e",
        "0x",
        "-",
        "1979-05-27",
        "T",
        ":",
        "\\u",
        "\\",
        "true",
        "9" * 30,
        " ",
        "\u2028",
        "\ufeff",
    ]
)


@inputs(6000)
@given(text=st.lists(PIECES, max_size=60).map("".join) | st.text(max_size=60))
def test_texts_that_are_no_recipe(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = one_folder(tmp_path_factory)
    (folder / "r.toml").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    attempt("recipe noise", folder, lambda: read_recipe(folder / "r.toml"))


@inputs(3000)
@given(
    key=st.sampled_from(["name", "threat.eps", "training.epochs", "optimizer.lr", "evaluation.n"])
    | st.lists(
        st.sampled_from([".", "a", "attack", "eps", "phases", "0", "\u00b2", "use", "data", " ", ""]), max_size=6
    ).map("".join),
    value=st.text(max_size=6) | st.lists(PIECES, max_size=6).map("".join) | st.integers(0, 99).map(str),
)
def test_overrides(tmp_path_factory: pytest.TempPathFactory, key: str, value: str) -> None:
    folder = one_folder(tmp_path_factory)
    (folder / "r.toml").write_text(EVERYTHING)
    attempt("overrides", folder, lambda: config.read(folder / "r.toml", [f"{key}={value}"]))


@inputs(5000)
@given(whole=st.sampled_from(TABLES), edits=TABLE_EDITS)
def test_whatever_parses_is_built_or_refused(tmp_path_factory: pytest.TempPathFactory, whole: Any, edits: Any) -> None:
    folder = one_folder(tmp_path_factory)
    tables = mutated_tables(
        whole | {"data": {"use": "arrays", "path": str(folder / "built.npz")}, "model": {"use": "linear"}}, edits
    )
    if not (folder / "built.npz").exists():
        np.savez(folder / "built.npz", x=np.zeros((12, 1, 8, 8), np.uint8), y=np.arange(12) % 3)
    attempt("built", folder, lambda: Assembly(config.parse(tables)))


# --- data

_folders: dict[str, Path] = {}


def one_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all inputs of a run: a new one for each would fill the disk."""
    if "it" not in _folders:
        _folders["it"] = factory.mktemp("fuzz")
    return _folders["it"]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


X = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
Y = np.arange(6) % 3
IDX3 = struct.pack(">IIII", 0x803, 6, 8, 8) + X[:, 0].tobytes()
IDX1 = struct.pack(">II", 0x801, 6) + bytes(range(6))


@inputs(12000)
@given(whole=st.sampled_from([IDX3, IDX1]), edits=EDITS, packed=st.sampled_from(["no", "before", "after"]))
def test_idx(tmp_path_factory: pytest.TempPathFactory, whole: bytes, edits: Any, packed: str) -> None:
    import gzip

    folder = one_folder(tmp_path_factory)
    raw = mutated(gzip.compress(whole, mtime=0) if packed == "after" else whole, edits)
    (folder / "idx").write_bytes(gzip.compress(raw, 1) if packed == "before" else raw)
    attempt("idx", folder, lambda: read_idx(folder / "idx", 3 if whole is IDX3 else 1))


PIXELS = np.random.default_rng(1).integers(0, 256, (N, 3072), dtype=np.uint8)
CONTENT = {"data": PIXELS, "labels": [0, 1, 2, 9], "filenames": ["a", "b"], "batch_label": "x"}
PICKLES = [pickle.dumps(CONTENT, protocol=p) for p in range(2, 6)]
# Without its pixels nearly every mutation hits an opcode.
SHORT = [pickle.dumps({"data": PIXELS[:1, :4], "labels": [1], b"k": (1, 2.5)}, protocol=p) for p in range(2, 6)]
OPCODES = st.lists(
    st.sampled_from(
        [bytes([code]) for code in range(256)]
        + [
            b"q\0",
            b"h\0",
            b"\x94",
            b"K\1",
            b"X\1\0\0\0a",
            b"(",
            b"cnumpy\ndtype\n",
            b"cos\nsystem\n",
            b"\x8c\2os\x8c\6system\x93",
        ]
    ),
    max_size=20,
).map(b"".join)


@inputs(20000)
@given(
    raw=st.tuples(st.sampled_from(SHORT + PICKLES), EDITS).map(lambda a: mutated(*a))
    | OPCODES.map(lambda raw: raw + b".")
)
def test_pickles(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    attempt("pickles", one_folder(tmp_path_factory), lambda: cifar10_pickle.loads(raw, "it"))


@inputs(5000)
@given(which=st.sampled_from(["bin", "py"]), edits=EDITS, size=st.sampled_from([True, False]))
def test_cifar(tmp_path_factory: pytest.TempPathFactory, which: str, edits: Any, size: bool) -> None:
    folder = one_folder(tmp_path_factory) / f"cifar-10-batches-{which}"
    whole = (
        np.concatenate([np.array([[0], [1], [2], [9]], np.uint8), PIXELS], 1).tobytes()
        if which == "bin"
        else PICKLES[0]
    )
    folder.mkdir(exist_ok=True)
    raw = mutated(whole, edits)
    raw = raw[: len(whole)].ljust(len(whole), b"\0") if which == "bin" and size else raw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10_data, "RECORDS", N)
        for k in range(6):
            name = ("test_batch" if k == 5 else f"data_batch_{k + 1}") + (".bin" if which == "bin" else "")
            (folder / name).write_bytes(raw if k == 2 else whole)
        attempt(f"cifar {which}", folder, lambda: data.cifar10(folder))


MEMBERS = {"x.npy": npy(X), "y.npy": npy(Y), "classes.npy": npy(np.array(["a", "b", "c"]))}
SPLIT = {"x_train.npy": npy(X / 255), "y_train.npy": npy(Y), "x_test.npy": npy(X[:3] / 255), "y_test.npy": npy(Y[:3])}


def zipped(members: dict[str, bytes], how: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@inputs(17000)
@given(
    members=st.sampled_from([MEMBERS, SPLIT]),
    which=st.integers(0, 10),
    edits=EDITS,
    how=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
    head=st.booleans(),
)
def test_npz(
    tmp_path_factory: pytest.TempPathFactory, members: Any, which: int, edits: Any, how: int, head: bool
) -> None:
    folder = one_folder(tmp_path_factory)
    names = list(members)
    if which < len(names):  # in a member, rather its header; otherwise in the archive around them
        whole = members[names[which]]
        end = 128 if head else len(whole)
        raw = zipped(members | {names[which]: mutated(whole[:end], edits) + whole[end:]}, how)
    else:
        raw = mutated(zipped(members, how), edits)
    (folder / "a.npz").write_bytes(raw)
    attempt("npz", folder, lambda: data.arrays(folder / "a.npz", test=2))


def images() -> list[bytes]:
    found = []
    picture = Image.fromarray(X[0].transpose(1, 2, 0))
    for form in ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "TGA", "ICO", "SGI", "PCX", "DDS", "JPEG2000"):
        stream = io.BytesIO()
        picture.save(stream, form)
        found.append(stream.getvalue())
    return found


IMAGES = images()


@inputs(10000)
@given(whole=st.sampled_from(IMAGES), edits=EDITS)
def test_images(tmp_path_factory: pytest.TempPathFactory, whole: bytes, edits: Any) -> None:
    raw = mutated(whole, edits)

    def read() -> None:
        with pillow_warnings():
            try:
                decode(raw, Pixels(), known_formats())
            except CorruptImage as error:
                raise UnmovedError(f"corrupt: {error}") from error

    attempt("images", one_folder(tmp_path_factory), read)


def tarred(suffix: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{suffix}", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/" + "long" * 30 + ".png", "b/\u00e9.png"):
            member = tarfile.TarInfo(name)
            member.size = len(IMAGES[0])
            tar.addfile(member, io.BytesIO(IMAGES[0]))
    return stream.getvalue()


TARS = {"tar": tarred(""), "tar.gz": tarred("gz"), "tar.xz": tarred("xz"), "tar.bz2": tarred("bz2")}


def resealed(raw: bytes) -> bytes:
    """Each block that looks like a header with a right checksum, so that its other fields are believed."""
    blocks = [bytearray(raw[at : at + 512]) for at in range(0, len(raw), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


@inputs(5000)
@given(suffix=st.sampled_from(["tar", "tar", "tar", "tar.gz", "tar.xz", "tar.bz2"]), edits=EDITS, seal=st.booleans())
def test_archives(tmp_path_factory: pytest.TempPathFactory, suffix: str, edits: Any, seal: bool) -> None:
    folder = one_folder(tmp_path_factory)
    raw = mutated(TARS[suffix], edits)
    (folder / f"pets.{suffix}").write_bytes(resealed(raw) if seal and suffix == "tar" else raw)
    attempt("archives", folder, lambda: data.folder(folder / f"pets.{suffix}", cache=False, test=2))


# --- weights

TENSORS = {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
PLAIN = save(TENSORS)
(LENGTH,) = struct.unpack("<Q", PLAIN[:8])
HEADER, BODY = json.loads(PLAIN[8 : 8 + LENGTH]), PLAIN[8 + LENGTH :]


@inputs(8000)
@given(edits=EDITS, in_header=st.booleans())
def test_weights_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, edits: Any, in_header: bool) -> None:
    folder = one_folder(tmp_path_factory)
    if in_header:
        header = mutated(PLAIN[8 : 8 + LENGTH], edits)
        raw = struct.pack("<Q", len(header)) + header + BODY
    else:
        raw = mutated(PLAIN, edits)
    (folder / "w.safetensors").write_bytes(raw)
    attempt("weights bytes", folder, lambda: models.load_weights(nn.Linear(3, 2), folder / "w.safetensors"))


@inputs(6000)
@given(edits=TABLE_EDITS, checksum=st.booleans())
def test_weights_with_other_headers(tmp_path_factory: pytest.TempPathFactory, edits: Any, checksum: bool) -> None:
    folder = one_folder(tmp_path_factory)
    tables = mutated_tables(HEADER | ({"__metadata__": {"sha256": "0" * 64}} if checksum else {}), edits)
    header = json.dumps(tables).encode()
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + BODY)
    attempt("weights headers", folder, lambda: models.load_weights(nn.Linear(3, 2), folder / "w.safetensors"))


# --- what lies in a run folder

OUTCOMES = (
    ",".join(outcomes.COLUMNS)
    + "\n100,0,pgd,0.3,linf,0,1,0.15,True,pgd\n101,1,pgd,0.3,linf,1,1,0.15,False,none\n"
    + "100,0,square,0.3,linf,0,0,0.1,False,none\n101,1,square,0.3,linf,1,1,0.0,False,none\n"
)
CELLS = st.sampled_from(
    [
        "",
        "nan",
        "inf",
        "-1",
        "1e999",
        "99999999999999999999",
        "1e300",
        "True",
        "none",
        "x,y",
        '"',
        '"a\nb"',
        "0x1",
        "\0",
        "9" * 400,
    ]
)


@inputs(9000)
@given(edits=EDITS)
def test_outcomes_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, edits: Any) -> None:
    folder = one_folder(tmp_path_factory)
    (folder / "o.csv").write_bytes(mutated(OUTCOMES.encode(), edits) + b"\n" * (len(edits) % 2))
    attempt("outcomes bytes", folder, lambda: outcomes.summary(outcomes.read(folder / "o.csv")))


@inputs(9000)
@given(cells=st.lists(st.tuples(st.integers(0, 49), CELLS | st.text(max_size=4)), min_size=1, max_size=2))
def test_outcomes_with_other_cells(tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[int, str]]) -> None:
    folder = one_folder(tmp_path_factory)
    rows = [line.split(",") for line in OUTCOMES.splitlines()]
    for place, text in cells:
        rows[place // 10][place % 10] = text
    text = "".join(",".join(row) + "\n" for row in rows)
    (folder / "o.csv").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    attempt("outcomes cells", folder, lambda: outcomes.summary(outcomes.read(folder / "o.csv")))


QUESTION = {"weights": "abc", "attacks": {"a": "A()"}}
ENTRY = {"attack": "a", "part": "p", "position": [0, 1], "prediction": [1, 2], "distance": [0.1, 0.2]}


def journal_bytes(entries: list[Any]) -> bytes:
    head = json.dumps({"question": QUESTION}, sort_keys=True)
    return "".join(line + "\n" for line in [head, *(json.dumps(entry) for entry in entries)]).encode()


def read_journal(path: Path) -> None:
    position, prediction, distance = Journal(path, QUESTION).read("a", "p")
    assert position.dtype == prediction.dtype == np.int64
    assert len(position) == len(prediction) == len(distance)
    assert (position >= 0).all()
    assert np.isfinite(distance).all()


@inputs(5000)
@given(edits=EDITS)
def test_journals_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, edits: Any) -> None:
    folder = one_folder(tmp_path_factory)
    (folder / "j.jsonl").write_bytes(mutated(journal_bytes([ENTRY, ENTRY]), edits))
    attempt("journal bytes", folder, lambda: read_journal(folder / "j.jsonl"))


@inputs(5000)
@given(edits=TABLE_EDITS)
def test_journals_with_other_values(tmp_path_factory: pytest.TempPathFactory, edits: Any) -> None:
    folder = one_folder(tmp_path_factory)
    (folder / "j.jsonl").write_bytes(journal_bytes([mutated_tables(ENTRY, edits), ENTRY]))
    attempt("journal values", folder, lambda: read_journal(folder / "j.jsonl"))


@inputs(4000)
@given(edits=st.one_of(EDITS, TABLE_EDITS), sealed=st.booleans())
def test_shelves(tmp_path_factory: pytest.TempPathFactory, edits: Any, sealed: bool) -> None:
    """Torn, or forged with a right digest: the table is made again, or is a table."""
    import hashlib

    import pandas as pd

    folder = one_folder(tmp_path_factory) / "shelf"
    table = pd.DataFrame({"x": [0.5, 1.5], "name": ["a", "b"]})
    TableCache(folder).table("t", {"n": 1}, lambda: table)
    (path,) = folder.iterdir()
    body = path.read_bytes().split(b"\n")[0]
    if isinstance(edits[0][2], bytes):
        body = mutated(body, edits)
    else:
        body = json.dumps(mutated_tables(json.loads(body), edits)).encode()
    digest = hashlib.sha256(body).hexdigest() if sealed else "0" * 64
    path.write_bytes(body + f"\n{digest}\n".encode())
    attempt("shelf", folder, lambda: TableCache(folder).table("t", {"n": 1}, lambda: table))
    path.unlink()


FACTS = {"n": 2, "split": "s", "weights": "best", "attacks": {"pgd": "PGD()"}, "notes": ["a"], "threat": {"eps": 0.1}}


@inputs(5000)
@given(edits=EDITS, lines=st.booleans())
def test_json(tmp_path_factory: pytest.TempPathFactory, edits: Any, lines: bool) -> None:
    raw = mutated((json.dumps(FACTS) + "\n").encode() * (1 + lines), edits).decode(errors="replace")
    read = untrusted.json_lines if lines else untrusted.json_object
    attempt("json", one_folder(tmp_path_factory), lambda: read(raw, "it"))


# Made of pieces they are never recipes; what is wrong in these two is asked or made again.
ONE_SIDED = {"recipe noise", "journal values", "shelf"}
TARGETS = 20
# The readers of recipes, IDX, CIFAR (pickles are its), npz and outcomes: they alone get 100,000.
NAMED = [f"recipe {kind}" for kind in ("tables", "bytes", "noise")] + ["overrides", "built", "idx", "pickles", "npz"]
NAMED += ["cifar bin", "cifar py", "outcomes bytes", "outcomes cells"]


def test_the_count() -> None:
    """After all others: how many, and that every target was both read and refused, so that deep code was reached."""
    for target in sorted(READ | REFUSED):
        print(f"{target:16} {READ[target]:7} read {REFUSED[target]:7} refused")
    total = READ.total() + REFUSED.total()
    print(f"{'in all':16} {total:7}")
    if len(READ | REFUSED) < TARGETS:
        pytest.skip("only a part of the targets was run")
    named = sum((READ + REFUSED)[target] for target in NAMED)
    print(f"{'named':16} {named:7}")
    assert named >= 100_000 * TIMES
    assert set(READ) - ONE_SIDED == set(REFUSED) - ONE_SIDED
