"""Save and load weights as safetensors and nothing else, so that loading a file never runs code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from unmoved.core.errors import UnmovedError, is_want_of_memory, several
from unmoved.core.files import write_atomic
from unmoved.core.untrusted import brief, readable, regular

_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".tar"}
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80")  # torch.save since 1.6 writes a zip; before it, and pickle itself, protocol 2+

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # all call what they hold "module"
_COUNTED = "n_averaged"  # AveragedModel's count of updates, a buffer
_COMPILED = "_orig_mod"  # what torch.compile puts into names
CHECKSUM = "sha256"  # of names, types, shapes and values, in the file's own metadata
MOST_UNSEEN = 2**30  # bytes of a file that is read before its names are looked at


class DamagedFile(UnmovedError):
    """Report a weights file that is not what was saved: cut short, or with bits flipped."""


def save_weights(model: nn.Module, path: str | os.PathLike[str], state: Mapping[str, object] | None = None) -> None:
    """Write parameters and buffers to a safetensors file; equal weights give equal files, byte for byte.

    Tensors are stored under all their names, contiguous, whatever their memory format; beside them only a checksum.
    What wraps a model (``torch.compile``, DataParallel, DDP, ``AveragedModel``) leaves no trace in the names.

    Args:
        state: what the model's ``state_dict`` returned at another time, in place of what it returns now.

    Raises:
        UnmovedError: another ending than .safetensors, a state that is not of dense tensors, an unwritable folder.
    """
    state = model.state_dict() if state is None else state
    save_tensors({bare: state[own] for bare, own in _bare_names(model, state).items()}, path)


def require_savable(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Return what ``state_dict`` of a model returned; raise `UnmovedError` where that is not dense tensors alone."""
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            kind = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise UnmovedError(f"weights {name!r}: expected a dense tensor with data, came {kind}; it cannot be saved")
        tensors[name] = value
    return tensors


def save_tensors(state: Mapping[str, object], path: str | os.PathLike[str]) -> None:
    """Write what a model's ``state_dict`` returned, as `save_weights` does."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UnmovedError(f"{path}: expected a file name that ends in .safetensors")
    tensors, memory = require_savable(state), set[int]()
    for name, value in tensors.items():
        value = value.detach().cpu()
        # Tied and channels_last tensors: safetensors refuses shared memory and gaps, so these get their own copy.
        place = value.untyped_storage().data_ptr()
        if place in memory or not value.is_contiguous():
            value = value.clone(memory_format=torch.contiguous_format)
        memory.add(place)
        tensors[name] = value
    write_atomic(path, save(tensors, metadata={CHECKSUM: checksum(tensors)}))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy the weights of a safetensors file into ``model``, all or none.

    Floating tensors are converted to the model's type and device. A prefix that all names in the file share, such as
    ``module.`` or ``_orig_mod.``, is left out where the rest are the model's names.

    Raises:
        UnmovedError: no such file, a pickle, or names, shapes or types that do not fit.
        DamagedFile: a file that is not whole, or that changed since it was saved.
    """
    path, state = Path(path), model.state_dict()
    names = _bare_names(model, state)
    own = {bare: state[name] for bare, name in names.items()}

    def fits(announced: dict[str, Tensor]) -> None:
        """Check names and shapes alone: the file of another model may be larger than the memory."""
        found = _without_prefix(announced, own)
        if missing := [name for name in own if name not in found]:
            raise UnmovedError(f"{path}: {several(missing)} missing: {_another(own, found)}")
        if unexpected := [name for name in found if name not in own]:
            raise UnmovedError(f"{path}: {several(unexpected)} unexpected: {_another(own, found)}")
        for name, value in found.items():
            if value.shape != own[name].shape:
                raise UnmovedError(
                    f"{path}: {name!r}: expected shape {tuple(own[name].shape)}, came {tuple(value.shape)}; "
                    "build the model with the settings it was saved with"
                )

    try:
        read = read_tensors(path, fits)  # what is damaged is told so first: names may be, too
    except FileNotFoundError as error:
        raise UnmovedError(f"{path}: expected a safetensors file: {error.strerror}") from error
    fits(read)
    tensors = _without_prefix(read, own)
    for name, value in tensors.items():
        if value.dtype != own[name].dtype and not (value.is_floating_point() and own[name].is_floating_point()):
            raise UnmovedError(f"{path}: {name!r}: expected {own[name].dtype}, came {value.dtype}")
    model.load_state_dict(state | {names[bare]: value for bare, value in tensors.items()})


def _bare_names(model: nn.Module, state: Iterable[str]) -> dict[str, str]:
    """Map names without what wrappers add to them, inside the model too, to the names in its ``state_dict``."""
    names = {}
    for name in state:
        module: nn.Module | None = model
        kept, is_weight = [], True
        for part in name.split("."):
            if isinstance(module, _WRAPPERS):
                is_weight &= part == "module"
            elif part != _COMPILED:
                kept.append(part)
            inner = {} if module is None else module._modules
            module = inner[part] if part in inner else None  # noqa: SIM401 - a scripted module's has no .get
        if is_weight:
            names[".".join(kept)] = name
    return names


def _without_prefix(tensors: dict[str, Tensor], own: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename tensors to the model's names if the file has a wrapper's; leave them if that does not fit."""
    for dropped in ({_COMPILED}, {_COMPILED, "module"}):
        kept = {name: v for name, v in tensors.items() if name in own or name != _COUNTED or "module" not in dropped}
        found = {".".join(part for part in name.split(".") if part not in dropped): v for name, v in kept.items()}
        while found.keys() != own.keys() and len(firsts := {name.split(".")[0] for name in found}) == 1:
            prefix = f"{firsts.pop()}."
            found = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
        if found.keys() == own.keys() and len(found) == len(kept):
            return found
    return tensors


def _another(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Say what is wrong with a file of other names: it may be of a whole that this model is in, or of a part."""

    def holds(whole: Mapping[str, Tensor], prefix: str, part: Mapping[str, Tensor]) -> bool:
        return all(prefix + name in whole and whole[prefix + name].shape == part[name].shape for name in part)

    for prefix in sorted({name[: k + 1] for name in tensors for k, sign in enumerate(name) if sign == "."}):
        if holds(tensors, prefix, own):
            return f"all names stand in it under {prefix!r}, beside others; save the weights of that part alone"
    for prefix in sorted({name[: k + 1] for name in own for k, sign in enumerate(name) if sign == "."}):
        if tensors and holds(own, prefix, tensors):
            part = prefix.removesuffix(".")
            return f"these are the weights of its part {part!r}; load them into model.get_submodule({part!r})"
    return "these are the weights of another model"


def is_whole(path: Path) -> bool:
    """Return whether there is a weights file and it is what was saved.

    Raises:
        UnmovedError: it cannot be read at the moment, which says nothing about what is in it.
    """
    try:
        read_tensors(path)
    except (DamagedFile, FileNotFoundError):
        return False
    except UnmovedError as error:
        if error.__cause__ is not None:
            raise
        return False  # a pickle in its place, or no regular file
    return True


def require_header(path: Path) -> None:
    """Raise `UnmovedError` unless the file's header says what all of it is; of the tensors nothing is read.

    Raises:
        FileNotFoundError: there is nothing of this name.
    """
    with regular(path), _explained(path), _named(path) as place, safe_open(place, framework="pt"):
        pass


def read_tensors(path: Path, fits: Callable[[dict[str, Tensor]], None] | None = None) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, and compare them with its checksum where it has one.

    Args:
        fits: called with tensors that have names and shapes alone, before a large file is read; raises what it will.

    Raises:
        FileNotFoundError: there is nothing of this name.
        UnmovedError: a pickle, no regular file, or one that cannot be read at the moment.
        DamagedFile: a file that is not whole, or that changed since it was saved.
    """
    with regular(path) as file:
        start = file.read(9)
    # Eight bytes of length come first in safetensors, and may look like the magic; then the header, which is JSON.
    if start[8:] != b"{" and (path.suffix.lower() in _PICKLES or start.startswith(_PICKLE_MAGIC)):
        raise UnmovedError(
            f"{path}: expected a safetensors file, came a pickle, which can run code when it is loaded; if you trust "
            "it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    with _explained(path), _named(path) as place, safe_open(place, framework="pt") as opened:
        names = opened.keys()
        if fits is not None and path.stat().st_size > MOST_UNSEEN:
            fits({name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names})
        expected = (opened.metadata() or {}).get(CHECKSUM)  # files from elsewhere have none
        tensors = {name: opened.get_tensor(name) for name in names}
        is_same = expected is None or expected == checksum(tensors)
    if not is_same:
        raise DamagedFile(f"{path}: changed since it was saved (its checksum differs); copy or save it again")
    return tensors


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnmovedError:
        raise
    except Exception as error:  # a header may claim what torch then refuses: sizes beyond 64 bits, types without views
        if is_want_of_memory(error) or isinstance(error, OSError):
            raise UnmovedError(f"{path}: cannot be read at the moment ({error or 'out of memory'})") from error
        raise DamagedFile(f"{path}: not a whole safetensors file ({brief(error)}); copy or save it again") from error


@contextmanager
def _named(path: Path) -> Iterator[str]:
    """Yield the path, or another name of the same file if it is no UTF-8, which safetensors refuses."""
    if not str(path).isascii() and str(path) != readable(str(path)):
        with regular(path) as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Compute the sha256 of names, types, shapes and values, in the order of names."""
    told = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        told.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        told.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()
