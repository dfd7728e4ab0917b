"""Weights of other programs: every form that they come in loads bit for bit, and what does not fit is said in words."""

from __future__ import annotations

import argparse
import datetime
import io
import pickle
import re
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unmoved import models
from unmoved.core.errors import UnmovedError
from unmoved.models import load_checkpoint
from unmoved.models.checkpoints import KEYS


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3)))


class Renamed(nn.Module):
    """The same network, its parts called otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)


def made(kind: Callable[[], nn.Module] = Net, seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
        for value in model.state_dict().values():
            value.copy_(torch.rand_like(value, dtype=torch.float32) * 9)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def state() -> dict[str, Tensor]:
    return dict(made().state_dict())


FORMS: dict[str, Callable[[], Any]] = {
    "alone": state,
    **{f"under {key}": lambda key=key: {"epoch": 3, key: state(), "optimizer": {"lr": 0.1}} for key in KEYS},
    "under another key": lambda: {"epoch": 3, "weights of it": state()},
    "DataParallel": lambda: {f"module.{name}": value for name, value in state().items()},
    "compiled in DDP": lambda: {"state_dict": {f"module._orig_mod.{name}": v for name, v in state().items()}},
    "before torch 0.4.1": lambda: {name: v for name, v in state().items() if "num_batches" not in name},
    "double": lambda: {name: v.double() if v.is_floating_point() else v for name, v in state().items()},
    "beside None": lambda: state() | {"conv.extra": None},
    "parameters": lambda: OrderedDict((name, nn.Parameter(v, requires_grad=False)) for name, v in state().items()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "before 1.6"])
def test_every_form_of_a_state_dict_is_read(tmp_path: Path, form: str, is_old: bool) -> None:
    path = tmp_path / "net.pt"
    torch.save(FORMS[form](), path, _use_new_zipfile_serialization=not is_old)
    model, expected = made(seed=2), made()
    if form == "before torch 0.4.1":
        expected.norm.num_batches_tracked.copy_(model.norm.num_batches_tracked)
    loaded = load_checkpoint(model, path)
    assert same(model, expected)
    assert loaded.key == (form.removeprefix("under ") if form.removeprefix("under ") in KEYS else loaded.key)


def test_safetensors_of_anybody_are_read(tmp_path: Path) -> None:
    save_file({f"module.{name}": value for name, value in state().items()}, tmp_path / "net.safetensors")
    model = made(seed=2)
    load_checkpoint(model, tmp_path / "net.safetensors")
    assert same(model, made())


def test_of_several_the_likeliest_is_read_and_a_key_chooses_another(tmp_path: Path) -> None:
    other = dict(made(seed=3).state_dict())
    torch.save({"ema": other, "model": state()}, tmp_path / "net.pt")
    model = made(seed=2)
    assert load_checkpoint(model, tmp_path / "net.pt").key == "model"
    assert same(model, made())
    assert load_checkpoint(model, tmp_path / "net.pt", key="ema").key == "ema"
    assert same(model, made(seed=3))
    with pytest.raises(UnmovedError, match="expected tensors under 'emma', came them under 'model', 'ema'"):
        load_checkpoint(model, tmp_path / "net.pt", key="emma")


def test_other_names_are_matched_by_order_once_that_is_said(tmp_path: Path) -> None:
    torch.save(made(Renamed).state_dict(), tmp_path / "net.pt")
    model = made(seed=2)
    words = r"(?s)8 missing: 'conv.weight' \(3, 1, 3, 3\) \(nearest in the file: 'first.w.*one in order.*--match order$"
    with pytest.raises(UnmovedError, match=words):
        load_checkpoint(model, tmp_path / "net.pt")
    assert same(model, made(seed=2))
    assert load_checkpoint(model, tmp_path / "net.pt", match="order").by_order
    assert same(model, made(Renamed))


def test_order_is_refused_where_shapes_differ_and_nothing_is_changed(tmp_path: Path) -> None:
    other = dict(reversed(list(made(Renamed).state_dict().items())))
    torch.save(other, tmp_path / "net.pt")
    model = made(seed=2)
    words = r"model's 'conv.weight' is \(3, 1, 3, 3\), at its place stands 'third.bias' \(2,\)"
    with pytest.raises(UnmovedError, match=words):
        load_checkpoint(model, tmp_path / "net.pt", match="order")
    assert same(model, made(seed=2))


def test_what_the_model_has_no_place_for_is_named_and_left_out_when_asked(tmp_path: Path) -> None:
    extra = {f"layers.{k}.bound": torch.rand(4) for k in range(2)}
    torch.save(state() | extra, tmp_path / "net.pt")
    model = made(seed=2)
    with pytest.raises(UnmovedError, match=r"no place for 'layers.0.bound', 'layers.1.bound'; .*--ignore '\*bound'"):
        load_checkpoint(model, tmp_path / "net.pt")
    assert load_checkpoint(model, tmp_path / "net.pt", ignore=["*bound"]).ignored == tuple(extra)
    assert same(model, made())
    with pytest.raises(UnmovedError, match=r"ignore '\*.bond': no name in the file matches it; the nearest is 'layers"):
        load_checkpoint(model, tmp_path / "net.pt", ignore=["*.bond"])


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": [state()], "err": 0.1}, "state_dict.0"),
        ({"model": {"state_dict": state(), "width": 3}, "epoch": 3}, "model.state_dict"),
        ([state()], "0"),
        ({"net": state(), "args": argparse.Namespace(lr=0.1), "acc": np.float64(0.5), "at": Path("a")}, "net"),
        ({"net": {**state(), "steps": np.int64(4)}, "made": datetime.date(2020, 1, 1)}, "net"),
    ],
    ids=["list of one", "one step deeper", "list", "settings and metrics", "metrics among the tensors"],
)
def test_weights_are_found_beside_objects_that_are_not_made(tmp_path: Path, content: object, key: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    model = made(seed=2)
    assert load_checkpoint(model, tmp_path / "net.pt").key == key
    assert same(model, made())


def archive(path: Path) -> None:
    """A zip as `torch.save` writes it, but compressed: what unpacks to any size."""
    torch.save(state(), path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as read, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as write:
        for member in read.infolist():
            write.writestr(member.filename, read.read(member))


def cut(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-400])


def old_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def arrays_of(tensors: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: value.numpy() for name, value in tensors.items()})
    return file.getvalue()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: None, "came none of this name"),
    "empty": (lambda path: path.touch(), "came an empty file"),
    "a folder": (lambda path: path.mkdir(), "expected a regular file, came a folder"),
    "web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"), "came a web page"),
    "LFS pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "module": (
        lambda path: torch.save(made(), path),
        r"came a pickle of more \([\w.]*Net\).*torch.save\(model.state_dict",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(print)),
        r"came a pickle of more|as weights alone|a whole file",
    ),
    "TorchScript": (
        lambda path: torch.jit.script(nn.Linear(2, 2)).save(str(path)),
        r"came a TorchScript archive.*torch.jit.load",
    ),
    "numpy": (
        lambda path: path.write_bytes(arrays_of(state())),
        r"came numpy arrays; torch.save\(\{name: torch.from_numpy",
    ),
    "pickled": (lambda path: path.write_bytes(pickle.dumps(state(), protocol=4)), "as weights alone; where you trust"),
    "optimizer": (
        lambda path: torch.save(torch.optim.Adam(made().parameters()).state_dict(), path),
        "came that of an optimizer; save model",
    ),
    "list": (lambda path: torch.save([torch.ones(2)], path), "expected tensors by name, came a list"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "expected tensors by name, came a Tensor"),
    "numbers": (lambda path: torch.save({"epoch": 1, "lr": 0.1}, path), "dictionary of 'epoch', 'lr', none of which"),
    "two unknown": (
        lambda path: torch.save({"a": state(), "b": state()}, path),
        "not said which are the weights: choose with --key one of 'a', 'b'",
    ),
    "two in a list": (
        lambda path: torch.save({"state_dict": [state(), state()]}, path),
        "choose with --key one of 'state_dict.0', 'state_dict.1'",
    ),
    "compressed": (archive, "came a compressed one"),
    "broken directory": (lambda path: broken_directory(path), "not a whole file|expected a whole file"),
    "sparse": (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "'w': expected a dense tensor"),
    "cut short": (cut, "expected a whole file of weights"),
    "tar of 2016": (old_tar, "expected"),
    "text": (lambda path: path.write_text("hello"), "expected"),
    "another network": (
        lambda path: torch.save(nn.Sequential(nn.Linear(2, 5)).state_dict(), path),
        r"(?s)8 missing.*2 unexpected: '0.weight' \(5, 2\).*another architecture",
    ),
    "another width": (
        lambda path: torch.save(made(lambda: Net(4)).state_dict(), path),
        r"shapes differ: 'conv.weight' expected \(3, 1, 3, 3\), came \(4, 1, 3, 3\)",
    ),
    "whole numbers": (
        lambda path: torch.save(state() | {"out.bias": torch.ones(2, dtype=torch.long)}, path),
        "'out.bias': expected torch.float32, came torch.int64",
    ),
}


# What torch says, by version, of its own jit and of reading any sparse tensor.
@pytest.mark.filterwarnings(r"ignore:.*torch\.jit", "ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("case", BAD)
def test_what_holds_no_fitting_weights_is_refused_in_one_sentence_and_nothing_is_changed(
    tmp_path: Path, case: str
) -> None:
    path = tmp_path / "net.pt"
    write, words = BAD[case]
    write(path)
    model = made(seed=2)
    with pytest.raises(UnmovedError, match=words) as found:
        load_checkpoint(model, path)
    assert str(path) in str(found.value)
    assert same(model, made(seed=2))


def test_a_weight_never_takes_the_place_of_a_running_mean(tmp_path: Path) -> None:
    """All shapes agree in order, but what they hold does not."""
    names = ["first.weight", "first.bias", "second.running_mean", "second.running_var", "second.weight", "second.bias"]
    saved = {name: made(Renamed).state_dict()[name] for name in [*names, "third.weight", "third.bias"]}
    torch.save(saved, tmp_path / "net.pt")
    model = made(seed=2)
    for match in ("names", "order"):
        with pytest.raises(UnmovedError) as caught:
            load_checkpoint(model, tmp_path / "net.pt", match=match)
        assert "--match order" not in str(caught.value)
        assert same(model, made(seed=2))


TRAINERS: dict[str, dict[str, Tensor]] = {
    "a buffer of the loss": {"loss.weight": torch.ones(2)},
    "a number": {"temperature": torch.ones(())},
    "another network": {f"teacher.{name}": value + 1 for name, value in state().items()},
    "a head beside it": {"net.head.weight": torch.ones(3)},
    "nothing": {},
}


@pytest.mark.parametrize("beside", TRAINERS)
@pytest.mark.parametrize("prefix", ["net.", "a.model.", "net.net."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_network_in_a_trainers_module_is_taken_by_its_names(
    tmp_path: Path, beside: str, prefix: str, kind: str
) -> None:
    path, model, extra = tmp_path / f"net.{kind}", made(seed=2), TRAINERS[beside]
    mixed = dict(sorted((extra | {prefix + name: value for name, value in state().items()}).items(), reverse=True))
    save_file(mixed, path) if kind == "safetensors" else torch.save({"state_dict": mixed}, path)
    patterns = []
    if extra:
        with pytest.raises(UnmovedError, match=r"to take these, pass --ignore|leave them out: --ignore") as caught:
            load_checkpoint(model, path)
        lines = str(caught.value).splitlines()  # a line for each network that the file holds
        advice = next((line for line in lines if f"under {prefix!r}" in line), lines[-1])
        patterns = re.findall(r"--ignore '([^']+)'", advice)
    loaded = load_checkpoint(model, path, ignore=patterns)
    assert same(model, made())
    assert (len(loaded.ignored), loaded.by_order) == (len(extra), False)


def test_safetensors_have_no_order(tmp_path: Path) -> None:
    """They are sorted by name, so that layer 10 comes before layer 2."""
    deep = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(11)))
    save_file({f"layer.{name}": value for name, value in deep.state_dict().items()}, tmp_path / "net.safetensors")
    other = nn.ModuleList(nn.Sequential(nn.Linear(2, 2, bias=False)) for _ in range(11))
    for match in ("names", "order"):
        with pytest.raises(UnmovedError) as caught:
            load_checkpoint(other, tmp_path / "net.safetensors", match=match)
        assert ("keeps names and no order" in str(caught.value)) == (match == "order")
        assert "--match order" not in str(caught.value)


def test_order_follows_the_names_where_they_are_the_models(tmp_path: Path) -> None:
    torch.save(dict(reversed(list(state().items()))), tmp_path / "net.pt")
    model = made(seed=2)
    assert not load_checkpoint(model, tmp_path / "net.pt", match="order").by_order
    assert same(model, made())


@pytest.mark.parametrize("extra", [{"aux.weight": torch.ones(2), "aux.bias": torch.ones(1)}, {"bound": torch.ones(1)}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_advice_to_ignore_works(tmp_path: Path, extra: dict[str, Tensor], prefix: str) -> None:
    torch.save({prefix + name: value for name, value in (state() | extra).items()}, tmp_path / "net.pt")
    model = made(seed=2)
    with pytest.raises(UnmovedError, match="leave them out") as caught:
        load_checkpoint(model, tmp_path / "net.pt")
    patterns = re.findall(r"--ignore '([^']+)'", str(caught.value))
    assert {*load_checkpoint(model, tmp_path / "net.pt", ignore=patterns).ignored} == {*extra}
    assert same(model, made())


def test_numbers_beside_the_tensors_are_passed_over_and_lazy_layers_are_named(tmp_path: Path) -> None:
    torch.save(state() | {"epoch": 3}, tmp_path / "net.pt")
    model = made(seed=2)
    load_checkpoint(model, tmp_path / "net.pt")
    assert same(model, made())
    with pytest.raises(UnmovedError, match="lazy layers"):
        load_checkpoint(nn.LazyLinear(3), tmp_path / "net.pt")


def broken_directory(path: Path) -> None:
    torch.save(state(), path)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at : at + 4] = b"XXXX"
    path.write_bytes(data)


def test_reading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    class Remover:
        def __reduce__(self) -> tuple[Any, ...]:
            return shutil.rmtree, (tmp_path / "kept",)

    (tmp_path / "kept").mkdir()
    for old in (True, False):
        torch.save({"net": state(), "beside": Remover()}, tmp_path / "net.pt", _use_new_zipfile_serialization=not old)
        load_checkpoint(made(), tmp_path / "net.pt")
        assert (tmp_path / "kept").exists()
        torch.save({"state_dict": {"w": Bomb()}}, tmp_path / "net.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(UnmovedError, match=r"runs code when it is loaded|as weights alone"):
            load_checkpoint(made(), tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


def test_a_normalised_model_takes_the_weights_of_the_model_inside(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "net.pt")
    model = models.normalized(made(seed=2), (0.5,), (0.25,))
    load_checkpoint(model.get_submodule("model"), tmp_path / "net.pt")
    assert same(model.get_submodule("model"), made())


LENET = {"conv1": nn.Conv2d(1, 32, 3, padding=1), "conv2": nn.Conv2d(32, 64, 3, padding=1)}
STRANGERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "wong_kolter_mnist.pth": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
        ),
        {},
    ),
    "advertorch_lenet5_adv.pt": (
        lambda: nn.ModuleDict(LENET | {"linear1": nn.Linear(3136, 200), "linear2": nn.Linear(200, 10)}),
        {},
    ),
    "colt_mnist.pt": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(3136, 100), nn.ReLU(), nn.Linear(100, 10)),
        ),
        {"match": "order", "ignore": ["*deepz_lambda"]},
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_published_checkpoints_load(shared_data: Path, name: str) -> None:
    make, how = STRANGERS[name]
    path = shared_data / "checkpoints" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    model = make()
    load_checkpoint(model, path, **how)
    expected = [v for k, v in torch.load(path, weights_only=True, map_location="cpu").items() if "lambda" not in k]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected, strict=True))
