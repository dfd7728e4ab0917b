"""Start and synchronise the processes that train one model on several devices, by lightning-fabric."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from unmoved.core.child_process import SAFE, end_with_parent, out_of_reach_of_interrupts
from unmoved.core.errors import UnmovedError, require_whole
from unmoved.core.phases import Phases
from unmoved.core.precision import require_device
from unmoved.core.protocols import Split, couples_samples, is_lockstep

if TYPE_CHECKING:
    import subprocess

    from lightning_fabric import Fabric

Precision = Literal["32-true", "64-true"]
Thing = TypeVar("Thing")
RESIDENT = 0.25  # the share of a device's free memory that training data may take


def prepare(device: str = "auto", devices: int = 1, nodes: int = 1, precision: Precision = "32-true") -> Fabric:
    """Make the engine for ``nodes`` machines with ``devices`` processes each, one a device; nothing is started yet.

    Under ``torchrun`` their number comes from torchrun. On a CPU each device is a process, and they share the cores.
    ``precision`` is fabric's name for the precision of the parameters.

    Raises:
        UnmovedError: a device that this machine lacks, fewer than one, or other numbers than torchrun's.
    """
    from lightning_fabric import Fabric  # seconds to import, and only training needs it
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    devices = require_whole("devices", devices, at_least=1)
    nodes = require_whole("nodes", nodes, at_least=1)
    require_device(device)
    if dist.is_torchelastic_launched():
        here, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        if (devices, nodes) not in ((1, 1), (here, world // here)):
            raise UnmovedError(
                f"torchrun started {world // here} node(s) of {here}, --devices {devices} --nodes {nodes} says "
                "otherwise; leave them out"
            )
        devices, nodes = here, world // here
    accelerator = "auto" if device == "auto" else device
    # Named explicitly, since fabric would take a batch job of Slurm for one of several processes.
    place = TorchElasticEnvironment() if dist.is_torchelastic_launched() else LightningEnvironment()
    if devices * nodes == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision, plugins=[place])
    available = torch.cuda.device_count()
    if device != "cpu" and torch.cuda.is_available() and devices > available:
        raise UnmovedError(f"--devices: expected at most {available}, as many as this machine has, came {devices}")
    # The training loop averages running statistics; DDP would overwrite them between two passes of one step.
    settings = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in settings else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    strategy = DDPStrategy(**options)
    return Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=precision,
        plugins=[place],
    )


def rank(devices: int = 1, nodes: int = 1) -> int:
    """Return the rank of this process from its environment, before anything is started."""
    if dist.is_torchelastic_launched():
        return int(os.environ["RANK"])
    if devices * nodes == 1:
        return 0
    return int(os.environ.get("NODE_RANK", 0)) * devices + int(os.environ.get("LOCAL_RANK", 0))


def started_by_others() -> bool:
    """Return whether this process was started as one of several, by torchrun or by the first of them."""
    return dist.is_torchelastic_launched() or "LOCAL_RANK" in os.environ


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Start all processes of the engine; if one fails, the others end too, with one message.

    Raises:
        UnmovedError: another process ended.
    """
    several, before = fabric.world_size > 1, dict(os.environ)
    if several and "LOCAL_RANK" in os.environ and not dist.is_torchelastic_launched():
        end_with_parent()
    try:
        if several:
            if sys.flags.safe_path:  # python -P: fabric repeats the command, but not the options of Python
                os.environ[SAFE] = "1"
            with out_of_reach_of_interrupts():
                fabric.launch()
        yield
    except RuntimeError as error:
        _end(fabric)
        if several and not isinstance(error, torch.OutOfMemoryError) and _is_lost(error):
            raise UnmovedError(
                "another process of this training ended (what it said stands above); what was saved stays: "
                "the same command with --resume goes on from there"
            ) from error
        raise
    except BaseException:
        _end(fabric)
        raise
    finally:
        if (
            several
        ):  # the variables set for the other processes would make a second training believe that it is one of them
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
    if several and dist.is_initialized():
        fabric.barrier()
        dist.destroy_process_group()


def _end(fabric: Fabric) -> None:
    """End the processes that this one started; they would wait for it until a timeout."""
    started: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    children = list(started)
    started.clear()  # lightning's observer shares this list, and would kill this process before it prints its message
    for process in children:
        process.kill()
        process.wait()


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in ("gloo", "connection", "nccl", "socket"))


def broadcast(fabric: Fabric, thing: Thing) -> Thing:
    """Broadcast an object from rank 0 to all processes."""
    return fabric.broadcast(thing) if fabric.world_size > 1 else thing


def summed(fabric: Fabric, numbers: Tensor) -> Tensor:
    """Sum numbers over all processes."""
    if fabric.world_size > 1:
        dist.all_reduce(numbers)
    return numbers


def synchronized(model: nn.Module, fabric: Fabric) -> nn.Module:
    """Return the model with BatchNorm over all processes' samples; unchanged if there is one process.

    Raises:
        UnmovedError: on a CPU, where torch has none.
    """
    if fabric.world_size == 1:
        return model
    if fabric.device.type == "cpu":
        raise UnmovedError("sync_batchnorm: torch synchronises BatchNorm on GPUs only; leave it out, or use a GPU")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def require_lockstep(phases: Phases, sync_batchnorm: bool) -> None:
    """Raise `UnmovedError` for attacks that need the other processes in each pass and vary their number of passes."""
    for _, method in phases.phases:
        attack = method.attack
        if attack is None or is_lockstep(attack):
            continue
        loss = getattr(attack, "loss", None)
        couples = loss is not None and couples_samples(loss)
        if couples or (sync_batchnorm and getattr(attack, "mode", "eval") == "train"):
            raise UnmovedError(
                f"{attack!r}: its samples are done at different steps in different processes, and its loss or "
                "its batch statistics need all of them at each step; train in one process"
            )


def resident(split: Split, device: torch.device) -> Split:
    """Move the split to the device if it takes at most a quarter of the free memory there: no copy per step."""
    images, move = getattr(split, "images", None), getattr(split, "to", None)
    if device.type != "cuda" or move is None or images is None:
        return split
    free, _ = torch.cuda.mem_get_info(device)
    return move(device) if images.nbytes <= RESIDENT * free else split
