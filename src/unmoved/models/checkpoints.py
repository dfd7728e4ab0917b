"""Load weights that another program saved: safetensors, or what ``torch.save`` wrote, of any age; no code is run."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unmoved.core.errors import UnmovedError, is_want_of_memory, require_choice
from unmoved.core.untrusted import brief, digest, regular
from unmoved.models import weights_file
from unmoved.models.matching import by_name, by_order, without_ignored, without_prefixes

logger = logging.getLogger("unmoved")

# Keys under which training programs keep the weights in a larger dictionary, the likeliest first.
KEYS = ("state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "model_ema", "net", "module", "params")
MATCHES = ("names", "order")
_MOST_CLASSES = 100  # classes in a pickle that are replaced by stand-ins
_SHOWN = 8  # names in a message
_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml|head|body)", re.IGNORECASE)


class _StandIn:
    """Replace an object of any class but tensors and plain containers; it holds nothing."""

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


_PLAIN = (Tensor, type(None), bool, int, float, str, _StandIn)  # what a state_dict may hold


class Loaded(NamedTuple):
    """Describe what was read from a checkpoint.

    Attributes:
        sha256: the file's.
        key: the key of the weights in the file; "" if the file holds nothing else.
        ignored: names in the file that were left out, as requested.
        by_order: whether the tensors were matched by their order, since names differ.
    """

    sha256: str
    key: str
    ignored: tuple[str, ...]
    by_order: bool


def load_checkpoint(
    model: nn.Module, path: Path | str, *, match: str = "names", ignore: Sequence[str] = (), key: str | None = None
) -> Loaded:
    """Copy the weights of a checkpoint into ``model``, all or none; every tensor of the model gets a value.

    The prefixes ``module.`` and ``_orig_mod.`` are removed, and any other, such as a trainer's ``model.``, that
    leaves the names of the model. Floating tensors are converted to the model's type.

    Args:
        path: a .safetensors file, or what ``torch.save`` wrote: a dictionary of tensors by name, alone, under one of
            `KEYS` or one step deeper. It is read with ``weights_only=True`` onto the CPU, wherever it was saved;
            objects of other classes beside the tensors (settings, metrics) are not created.
        match: ``"names"``, or ``"order"``: the k-th tensor of the file is the k-th of the model; shapes and kinds
            (weight, bias, running mean, ...) must agree. If all names are the model's, they are used.
        ignore: patterns (as of file names, with ``*`` and ``?``) of names in the file that the model has no place for.
        key: under which key of the file the weights stand, ``"a.b"`` for b in a; by default the first of `KEYS`.

    Raises:
        UnmovedError: no such file; a file that holds no tensors by name (a pickled module, a TorchScript archive, a web
            page, ...); tensors that do not fit, both sides named with their shapes.
    """
    path = Path(path)
    require_choice("match", match, MATCHES)
    state = model.state_dict()
    if any(nn.parameter.is_lazy(value) for value in state.values()):
        raise UnmovedError(f"{path}: the model has lazy layers without a shape yet; pass one batch through it first")
    tensors, found_key = read_checkpoint(path, key)
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    tensors, ignored = without_ignored(path, without_prefixes(tensors, own), ignore)
    tensors = without_prefixes(tensors, own)
    is_by_order, has_order = match == "order" and {*own} != {*tensors}, not _is_safetensors(require_checkpoint(path))
    if is_by_order and not has_order:
        raise UnmovedError(
            f"{path}: match order: expected what torch.save wrote, came safetensors, which keeps names and no order; "
            "give its tensors the model's names"
        )
    pairs = by_order(path, own, tensors) if is_by_order else by_name(path, own, tensors, has_order=has_order)
    for name, theirs in pairs.items():
        value = tensors[theirs]
        if value.dtype != own[name].dtype and not (value.is_floating_point() and own[name].is_floating_point()):
            raise UnmovedError(f"{path}: {theirs!r}: expected {own[name].dtype}, came {value.dtype}")
    model.load_state_dict({name: tensors[theirs] for name, theirs in pairs.items()}, strict=False)
    return Loaded(digest(path), found_key, ignored, is_by_order)


def require_checkpoint(path: Path | str) -> bytes:
    """Return the first bytes of a file of weights.

    Raises:
        UnmovedError: no such file, an empty one, a web page, or a pointer to the file.
    """
    path = Path(path)
    try:
        with regular(path) as file:
            start = file.read(512)
    except FileNotFoundError:
        raise UnmovedError(f"{path}: expected a file of weights, came none of this name") from None
    if not start:
        raise UnmovedError(f"{path}: expected a file of weights, came an empty file; download or save it again")
    if _PAGE.match(start):
        raise UnmovedError(
            f"{path}: expected a file of weights, came a web page: the address leads to a page about the file; "
            "download the file itself"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UnmovedError(f"{path}: expected a file of weights, came a Git LFS pointer to one; run `git lfs pull`")
    return start


def read_checkpoint(path: Path | str, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a checkpoint by name, and their key in the file ("" if there is none).

    Raises:
        UnmovedError: as `load_checkpoint`.
    """
    path, start = Path(path), require_checkpoint(path)
    if _is_safetensors(start):
        return weights_file.read_tensors(path), ""
    return _unwrapped(path, *_unpickled(path), key)


def _is_safetensors(start: bytes) -> bool:
    """Return whether a file begins as safetensors do: eight bytes of length, and then a header that is JSON."""
    return start[8:9] == b"{"


def _unpickled(path: Path) -> tuple[object, list[str]]:
    """Read what ``torch.save`` wrote, as tensors and plain containers; name the classes that `_StandIn` stands for."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UnmovedError(
                f"{path}: expected a whole file of weights, came: {brief(error)}; save it again"
            ) from error
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise UnmovedError(
                f"{path}: expected weights, came a TorchScript archive, which is a program; where you trust it: "
                "torch.save(torch.jit.load(file).state_dict(), 'weights.pt')"
            )
        if any(member.filename.endswith(".npy") for member in members):
            raise UnmovedError(
                f"{path}: expected weights that torch.save wrote, came numpy arrays; torch.save({{name: "
                "torch.from_numpy(array) for name, array in numpy.load(file).items()}, 'weights.pt')"
            )
        if any(
            member.compress_type != zipfile.ZIP_STORED for member in members
        ):  # compressed members may unpack to any size
            raise UnmovedError(f"{path}: expected an archive as torch.save writes it, came a compressed one; unpack it")
    left_out: list[str] = []
    while True:
        try:
            known = torch.serialization.safe_globals([(_StandIn, name) for name in left_out])
            with regular(path) as file, known, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what fails is said below
                return torch.load(file, map_location="cpu", weights_only=True), left_out
        except pickle.UnpicklingError as error:
            named = re.findall(r"GLOBAL ([\w.]+)", str(error))
            if not named or named[0] in left_out or len(left_out) == _MOST_CLASSES:
                raise UnmovedError(_refused(path, named or left_out)) from error
            left_out.append(named[0])
        except Exception as error:  # torch's readers may raise anything for a damaged file
            if is_want_of_memory(error) or isinstance(error, OSError):
                raise UnmovedError(f"{path}: cannot be read at the moment ({error or 'out of memory'})") from error
            raise UnmovedError(
                f"{path}: expected a whole file of weights, came: {brief(error)}; save it again"
            ) from error


def _refused(path: Path, classes: Sequence[str]) -> str:
    """Explain why torch does not read a pickle with ``weights_only=True``."""
    if not classes:
        return (
            f"{path}: expected weights, came a file that torch does not read as weights alone; where you trust it, "
            "load it in the program that saved it and torch.save(model.state_dict(), 'weights.pt')"
        )
    return (
        f"{path}: expected tensors by name, came a pickle of more ({classes[0]}), which runs code when it is loaded; "
        "in the program that saved it: torch.save(model.state_dict(), 'weights.pt')"
    )


def _unwrapped(path: Path, content: object, left_out: Sequence[str], key: str | None) -> tuple[dict[str, Tensor], str]:
    """Return the dictionary of tensors in what was read, and its key."""
    if isinstance(content, Mapping) and key is None and (tensors := _tensors(content)):
        return _dense(path, tensors), ""
    members = _members(content)
    if {"state", "param_groups"} == members.keys():
        raise UnmovedError(f"{path}: expected a model's state_dict, came that of an optimizer; save model.state_dict()")
    found = {name: tensors for name, value in members.items() if (tensors := _tensors(value))}
    if not found or key not in (None, *found):
        deeper = {f"{name}.{inner}": v for name, value in members.items() for inner, v in _members(value).items()}
        found |= {name: tensors for name, value in deeper.items() if (tensors := _tensors(value))}
    known = sorted(found, key=_place)
    if key is not None:
        if key not in found:
            raise UnmovedError(
                f"{path}: expected tensors under {key!r}, came them under {', '.join(map(repr, known)) or 'no key'}"
            )
        return _dense(path, found[key]), key
    if not known and left_out:
        raise UnmovedError(_refused(path, left_out))
    if not known and not isinstance(content, Mapping):
        raise UnmovedError(
            f"{path}: expected tensors by name, came a {type(content).__name__}; save model.state_dict()"
        )
    if not known:
        held = ", ".join(map(repr, list(members)[:_SHOWN]))
        raise UnmovedError(
            f"{path}: expected a model's state_dict, came a dictionary of {held}, none of which holds tensors by name"
        )
    if len(known) > 1 and _place(known[0]) == _place(known[1]):
        raise UnmovedError(
            f"{path}: expected a model's state_dict, came several, and it is not said which are the weights: choose "
            f"with --key one of {', '.join(map(repr, known[:_SHOWN]))}"
        )
    if len(known) > 1:
        logger.info("%s: the weights under %r were read, not those under %s", path, known[0], ", ".join(known[1:]))
    return _dense(path, found[known[0]]), known[0]


def _place(key: str) -> int:
    """Return the place in `KEYS` of a key, or of the likeliest step that leads to it."""
    return min(KEYS.index(step) if step in KEYS else len(KEYS) for step in key.split("."))


def _members(value: object) -> dict[str, object]:
    """Return what a dictionary or a list holds, by name or place."""
    if isinstance(value, Mapping):
        return {str(name): member for name, member in value.items()}
    return {str(place): member for place, member in enumerate(value)} if isinstance(value, list | tuple) else {}


def _tensors(value: object) -> dict[str, Tensor]:
    """Return the tensors of a dictionary by name, without plain values beside them; empty if it holds anything else."""
    if not isinstance(value, Mapping) or any(not isinstance(v, _PLAIN) for v in value.values()):
        return {}
    return {str(name): tensor.detach() for name, tensor in value.items() if isinstance(tensor, Tensor)}


def _dense(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Raise `UnmovedError` unless all tensors are dense and hold numbers."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
            raise UnmovedError(f"{path}: {name!r}: expected a dense tensor with data, came one that is {kind}")
    return tensors
