"""Weights on disk: what is saved comes back bit for bit, equal weights are equal files, and no pickle is ever read."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unmoved import models
from unmoved.core.errors import UnmovedError
from unmoved.core.files import write_atomic


def small(seed: int = 0) -> nn.Module:
    """A network with BatchNorm buffers, none of them at its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = models.wide_resnet((3, 8, 8), 4, depth=10, width=1, mean=(0.5,), std=(0.25,))
        net(torch.rand(8, 3, 8, 8))
    return net


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    models.save_weights(small(), path)
    return path


class Tied(nn.Module):
    """Two names for one parameter, a transposed one and a buffer that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.c = nn.Parameter(torch.rand(2, 5).T)
        whole = torch.rand(6)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[2:4])


# --- there and back


def test_every_bit_comes_back(file: Path) -> None:
    net, other = small(), small(1)
    assert not equal(net, other)
    models.load_weights(other, file)
    assert equal(net, other)
    assert other.bn.num_batches_tracked == 1  # integer buffers too


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    models.save_weights(small(), path)
    models.load_weights(small(1), path)


def test_tied_and_strided_tensors_come_back_and_stay_tied(tmp_path: Path) -> None:
    net, other = Tied(), Tied()
    models.save_weights(net, tmp_path / "w.safetensors")
    models.load_weights(other, tmp_path / "w.safetensors")
    assert equal(net, other)
    assert other.a.weight is other.b.weight
    assert set(load_file(tmp_path / "w.safetensors")) == set(net.state_dict())


def test_the_memory_format_is_the_models_and_not_the_files(file: Path, tmp_path: Path) -> None:
    last = small().to(memory_format=torch.channels_last)
    models.save_weights(last, tmp_path / "last.safetensors")
    assert (tmp_path / "last.safetensors").read_bytes() == file.read_bytes()
    other = small(1).to(memory_format=torch.channels_last)
    models.load_weights(other, file)
    assert equal(last, other)
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_equal_weights_are_equal_files_and_carry_no_trace_of_the_run(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "elsewhere" / "again.safetensors"
    again.parent.mkdir()
    models.save_weights(small().eval().requires_grad_(False), again)
    assert again.read_bytes() == file.read_bytes()
    models.save_weights(small(1), again)
    assert again.read_bytes() != file.read_bytes()
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert set(header.pop("__metadata__")) == {"sha256"}  # of the weights alone
    assert set(header) == set(small().state_dict())


def test_the_order_of_names_does_not_reach_the_file(tmp_path: Path) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(3, 3)
    models.save_weights(nn.ModuleDict({"a": a, "b": b}), tmp_path / "ab.safetensors")
    models.save_weights(nn.ModuleDict({"b": b, "a": a}), tmp_path / "ba.safetensors")
    assert (tmp_path / "ab.safetensors").read_bytes() == (tmp_path / "ba.safetensors").read_bytes()


def test_floating_weights_take_the_type_of_the_model(tmp_path: Path) -> None:
    half = nn.Linear(3, 2).half()
    models.save_weights(half, tmp_path / "half.safetensors")
    net = nn.Linear(3, 2)
    models.load_weights(net, tmp_path / "half.safetensors")
    assert net.weight.dtype == torch.float32
    assert torch.equal(net.weight, half.weight.float())


@pytest.mark.parametrize("length", range(1, 65))
def test_no_length_of_a_header_is_mistaken_for_a_pickle(length: int, tmp_path: Path) -> None:
    # The first byte of a file is the length of its header modulo 256; a pickle's is 0x80.
    net = nn.ParameterDict({"w" * (length * 8): nn.Parameter(torch.ones(1))})
    models.save_weights(net, tmp_path / "w.safetensors")
    models.load_weights(net, tmp_path / "w.safetensors")


# --- wrappers and their prefixes


def inner_compiled() -> nn.Module:
    net = small()
    net.linear = torch.compile(net.linear, backend="eager")
    return net


def inner_parallel() -> nn.Module:
    net = small()
    net.linear = nn.DataParallel(net.linear)
    return net


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(small(), backend="eager"),
    "parallel": lambda: nn.DataParallel(small()),
    "average": lambda: AveragedModel(small()),
    "parallel inside compiled": lambda: torch.compile(nn.DataParallel(small()), backend="eager"),
    "compiled inside parallel": lambda: nn.DataParallel(torch.compile(small(), backend="eager")),
    "average of a compiled one": lambda: AveragedModel(torch.compile(small(), backend="eager")),
    "a compiled part": inner_compiled,
    "a parallel part": inner_parallel,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wraps_a_model_leaves_no_trace_in_the_file(file: Path, tmp_path: Path, name: str) -> None:
    wrapped = WRAPPED[name]()
    models.save_weights(wrapped, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == file.read_bytes()
    with torch.no_grad():
        for weight in wrapped.parameters():
            weight.zero_()
    models.load_weights(wrapped, file)
    models.save_weights(wrapped, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", [*WRAPPED, "module.", "module.module.", "_orig_mod.module.", "net."])
def test_a_file_under_a_prefix_from_elsewhere_is_loaded(tmp_path: Path, name: str) -> None:
    state = WRAPPED[name]().state_dict() if name in WRAPPED else {name + k: v for k, v in small().state_dict().items()}
    assert state.keys() != small().state_dict().keys()
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "w.safetensors")
    other = small(1)
    models.load_weights(other, tmp_path / "w.safetensors")
    assert equal(other, small())


def test_a_part_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    net, other = Holder(), Holder()
    models.save_weights(net, tmp_path / "w.safetensors")
    assert set(load_file(tmp_path / "w.safetensors")) == {"module.weight", "module.bias"}
    models.load_weights(other, tmp_path / "w.safetensors")
    assert equal(other, net)


def test_weights_of_a_whole_and_of_a_part_are_told_apart(tmp_path: Path) -> None:
    part, path = nn.Linear(2, 2), tmp_path / "w.safetensors"
    whole = nn.ModuleDict({"model": part, "loss": nn.Linear(1, 1)})
    models.save_weights(whole, path)
    with pytest.raises(UnmovedError, match=r"stand in it under 'model\.', beside others; save"):
        models.load_weights(nn.Linear(2, 2), path)
    models.save_weights(part, path)
    with pytest.raises(UnmovedError, match=r"of its part 'model'; load them into model\.get_submodule\('model'\)"):
        models.load_weights(whole, path)


# --- writing is all or nothing


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    before = file.read_bytes()

    def fail(*args: Any) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((UnmovedError, KeyboardInterrupt), match=r"the disk is full|^$"):
        models.save_weights(small(1), file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_new_file_is_on_disk_before_it_takes_the_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (order.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(str(Path(a).parent)), replace(a, b)))
    models.save_weights(small(1), file)
    assert order == ["fsync", str(file.parent)]  # and the temporary one was in the same folder


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
def test_a_weights_file_has_the_permissions_of_any_other(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.parametrize("name", ["w.pt", "w", "safetensors"])
def test_another_ending_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnmovedError, match=r"expected a file name that ends in \.safetensors"):
        models.save_weights(small(), tmp_path / name)


def test_a_folder_that_cannot_take_the_file_is_named(file: Path) -> None:
    models.save_weights(small(), file.parent / "nowhere" / "w.safetensors")  # a missing folder is made
    with pytest.raises(UnmovedError, match=r"could not write .*w.safetensors: (Not a directory|File exists)"):
        write_atomic(file / "w.safetensors", b"")


def test_what_is_not_a_dense_tensor_is_not_saved(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(UnmovedError, match=r"weights '_extra_state': expected a dense tensor with data, came dict"):
        models.save_weights(Extra(2, 2), tmp_path / "w.safetensors")
    with pytest.raises(UnmovedError, match=r"weights 'weight': .* came torch.strided on meta"):
        models.save_weights(nn.Linear(2, 2, device="meta"), tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


# --- reading refuses, and changes nothing


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.pth.tar", "w.safetensors", "w"])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str, how: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(Bomb(mark), path, _use_new_zipfile_serialization=how == "zip")
    net = small()
    with pytest.raises(UnmovedError, match=r"expected a safetensors file, came a pickle.*convert it"):
        models.load_weights(net, path)
    assert not mark.exists()
    assert equal(net, small())


def test_every_torn_file_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    whole = save({"weight": torch.rand(2, 3), "bias": torch.rand(2)})
    path = tmp_path / "torn.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UnmovedError, match=r"torn\.safetensors: not a whole safetensors file"):
            models.load_weights(net, path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UnmovedError, match="not a whole safetensors file"):
        models.load_weights(net, path)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 1_000, 0])
def test_a_header_of_the_wrong_size_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"weight":{}}')
    with pytest.raises(UnmovedError, match="not a whole safetensors file"):
        models.load_weights(nn.Linear(3, 2), path)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_header_is_loaded_or_refused_in_words(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}))
    (length,) = struct.unpack("<Q", whole[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path = tmp_path / "w.safetensors"
    path.write_bytes(whole)
    net = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        models.load_weights(net, path)
    except UnmovedError:
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def changed(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors = {name: value.clone() for name, value in small(1).state_dict().items()}
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("linear.bias"), "'linear.bias' missing: these are the weights of another model"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("bn.")],
            "'bn.weight', 'bn.bias', 'bn.running_mean' and 2 more missing",
        ),
        (lambda t: t.update(extra=torch.ones(1)), "'extra' unexpected: these are the weights of another model"),
        (
            lambda t: t.update({"linear.weight": torch.ones(5, 64)}),
            "'linear.weight': expected shape (4, 64), came (5, 64)",
        ),
        (lambda t: t.update({"linear.bias": torch.ones(1)}), "'linear.bias': expected shape (4,), came (1,)"),
        (
            lambda t: t.update({"bn.num_batches_tracked": torch.tensor(1.0)}),
            "'bn.num_batches_tracked': expected torch.int64, came torch.float32",
        ),
        (
            lambda t: t.update({"linear.bias": torch.ones(4, dtype=torch.int64)}),
            "'linear.bias': expected torch.float32, came torch.int64",
        ),
    ],
)
def test_other_weights_are_refused_and_none_is_loaded(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    path, net = tmp_path / "w.safetensors", small()
    save_file(changed(change), path)
    with pytest.raises(UnmovedError) as error:
        models.load_weights(net, path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert equal(net, small())


def test_weights_with_normalisation_do_not_load_into_a_model_without(file: Path) -> None:  # T17
    with pytest.raises(UnmovedError, match=r"'normalize.mean', 'normalize.std' unexpected"):
        models.load_weights(models.wide_resnet((3, 8, 8), 4, depth=10, width=1), file)


def test_no_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnmovedError, match=r"absent\.safetensors: expected a safetensors file: No such file"):
        models.load_weights(small(), tmp_path / "absent.safetensors")
    with pytest.raises(UnmovedError, match="expected a regular file, came a folder"):
        models.load_weights(small(), tmp_path)
