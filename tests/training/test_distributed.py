"""What the engine does on GPUs, told by stubs of them: BatchNorm over all processes, data that stays on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from unmoved import UnmovedError
from unmoved.data import ArraySplit
from unmoved.training import distributed

GPU = torch.device("cuda", 1)


def fabric(device: str, world_size: int = 2) -> Any:
    return SimpleNamespace(world_size=world_size, device=torch.device(device))


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)))


def test_batchnorm_becomes_that_of_all_processes() -> None:
    model = normalised()
    before, state = dict(model.named_parameters()), {name: v.clone() for name, v in model.state_dict().items()}
    made = distributed.synchronized(model, fabric("cuda"))
    assert [type(module) for module in made.modules() if hasattr(module, "running_mean")] == [nn.SyncBatchNorm] * 2
    after = dict(made.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before), "what the caller holds is what is trained"
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_batchnorm_of_several_processes_is_refused_on_a_cpu_before_anything_is_changed() -> None:
    model = normalised()
    with pytest.raises(UnmovedError, match="torch synchronises BatchNorm on GPUs only; leave it out, or use a GPU"):
        distributed.synchronized(model, fabric("cpu"))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_process_has_all_samples_already(device: str) -> None:
    model = normalised()
    assert distributed.synchronized(model, fabric(device, world_size=1)) is model
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


class Moving(ArraySplit):
    """Goes to torch's device without storage, which every machine has, where a GPU is asked for."""

    def to(self, device: torch.device | str) -> ArraySplit:
        assert device == GPU
        return super().to("meta")


IMAGES = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
FLOATS = torch.rand(10, 3, 4, 4)


def moving(images: torch.Tensor) -> Moving:
    return Moving(images, torch.zeros(10, dtype=torch.int64), torch.arange(10), ("a", "b"))


@pytest.mark.parametrize(("images", "size"), [(IMAGES, 480), (FLOATS, 4 * 480)], ids=["bytes", "floats"])
def test_data_stays_on_a_gpu_where_a_quarter_of_its_free_memory_holds_it(
    images: torch.Tensor, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes as bytes: as floats they would need four times the memory that they are weighed with."""
    split = moving(images)

    def memory(free: int) -> None:
        # What the card has in all is no measure: others work on it too.
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {GPU: (free, 100 * free)}[device])

    memory(4 * size)
    there: Any = distributed.resident(split, GPU)
    assert {values.device.type for values in (there.images, there.labels, there.index)} == {"meta"}
    assert there.images.dtype == images.dtype
    assert there.images.nbytes == size
    memory(4 * size - 1)
    assert distributed.resident(split, GPU) is split


def test_data_stays_where_it_is_without_a_gpu_or_a_way_to_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("nobody needs to know"))
    split = moving(IMAGES)
    assert distributed.resident(split, torch.device("cpu")) is split
    strangers: Any = SimpleNamespace(batches=split.batches)
    assert distributed.resident(strangers, GPU) is strangers
