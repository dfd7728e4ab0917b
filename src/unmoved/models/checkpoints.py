"""Load weights that another program saved: safetensors, or what ``torch.save`` wrote, of any age; no code is run."""

from __future__ import annotations

import difflib
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unmoved.core.errors import UnmovedError, is_want_of_memory, require_choice, several
from unmoved.core.untrusted import brief, digest, regular
from unmoved.models import weights_file

logger = logging.getLogger("unmoved")

# Keys under which training programs keep the weights in a larger dictionary, the likeliest first.
KEYS = ("state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "model_ema", "net", "module", "params")
PREFIXES = ("module.", "_orig_mod.")  # prefixes that DataParallel, DDP and torch.compile add to names
MATCHES = ("names", "order")
_COUNT = "num_batches_tracked"  # BatchNorm counts batches since torch 0.4.1; files from before lack it
_MOST_CLASSES = 100  # classes in a pickle that are replaced by stand-ins
# The kinds of tensors that most modules have, by the last part of their names.
_KINDS = frozenset({"weight", "bias", "running_mean", "running_var", _COUNT})
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

    The prefixes ``module.`` and ``_orig_mod.`` are removed. Floating tensors are converted to the model's type.

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
    tensors, ignored = _without_ignored(path, _without_prefixes(tensors, own), ignore)
    tensors = _without_prefixes(tensors, own)
    is_by_order = match == "order" and {*own} != {*tensors}
    pairs = _by_order(path, own, tensors) if is_by_order else _by_name(path, own, tensors)
    for name, theirs in pairs.items():
        value = tensors[theirs]
        if value.dtype != own[name].dtype and not (value.is_floating_point() and own[name].is_floating_point()):
            raise UnmovedError(f"{path}: {theirs!r}: expected {own[name].dtype}, came {value.dtype}")
    model.load_state_dict({name: tensors[theirs] for name, theirs in pairs.items()}, strict=False)
    return Loaded(digest(path), found_key, ignored, is_by_order)


def read_checkpoint(path: Path | str, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a checkpoint by name, and their key in the file ("" if there is none).

    Raises:
        UnmovedError: as `load_checkpoint`.
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
    if start[8:9] == b"{":
        return weights_file.read_tensors(path), ""
    return _unwrapped(path, *_unpickled(path), key)


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
        if any(
            member.compress_type != zipfile.ZIP_STORED for member in members
        ):  # compressed members may unpack to any size
            raise UnmovedError(f"{path}: expected an archive as torch.save writes it, came a compressed one; unpack it")
    left_out: list[str] = []
    while True:
        try:
            with regular(path) as file, torch.serialization.safe_globals([(_StandIn, name) for name in left_out]):
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


def _without_ignored(
    path: Path, tensors: dict[str, Tensor], patterns: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            near = difflib.get_close_matches(pattern, tensors, n=1, cutoff=0.3)
            raise UnmovedError(
                f"{path}: ignore {pattern!r}: no name in the file matches it"
                + (f"; the nearest is {near[0]!r}" if near else "")
            )
    ignored = tuple(name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns))
    return {name: value for name, value in tensors.items() if name not in ignored}, ignored


def _without_prefixes(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that wrappers add to all names, unless the model's own names have them."""
    while True:
        prefix = next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None or any(name.startswith(prefix) for name in own):
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}


def _by_name(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the model's names to those of the file, which are the same."""
    missing = [name for name in own if name not in tensors and not name.endswith(_COUNT)]
    extra = [name for name in tensors if name not in own]
    others = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if not missing and not others and not extra:
        return {name: name for name in own if name in tensors}
    if not missing and not others:
        raise UnmovedError(
            f"{path}: the model has no place for {several(extra)}; if they are not needed, leave them out: "
            + _ignoring(extra, own)
        )
    if others and not missing and not extra:
        raise UnmovedError(
            f"{path}: shapes differ: {_list(_difference(own[n], tensors[n], n) for n in others)}; build the model with "
            "the settings that it was saved with"
        )
    raise UnmovedError("\n".join([f"{path}: the names do not fit the model", *_unfit(own, tensors, missing, extra)]))


def _unfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], missing: list[str], extra: list[str]) -> list[str]:
    """List the names that differ, with the nearest name and both shapes, and what to do."""
    lines = (
        [f"  {len(missing)} missing: {_list(_near(name, own, extra, tensors) for name in missing)}"] if missing else []
    )
    if extra:
        lines.append(f"  {len(extra)} unexpected: {_list(f'{name!r} {tuple(tensors[name].shape)}' for name in extra)}")
    kinds = {name.rpartition(".")[2] for name in own}
    strange = [name for name in extra if name.rpartition(".")[2] not in kinds]
    kept = {name: value for name, value in tensors.items() if name not in strange}
    if _agree(own, kept):
        also = f" {_ignoring(strange, own)}" if strange else ""
        lines.append(f"  the shapes agree one to one in order: if it is the same network, pass --match order{also}")
    elif extra and missing:
        lines.append("  these are the weights of another architecture, or of other settings of it")
    return lines


def _by_order(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the model's names to the names at the same places of the file."""
    counted = [name for name in own if len(own) == len(tensors) or not name.endswith(_COUNT)]
    for name, theirs in zip(counted, tensors, strict=False):
        if own[name].shape != tensors[theirs].shape or _are_other_kinds(name, theirs):
            raise UnmovedError(
                f"{path}: match order: the model's {name!r} is {tuple(own[name].shape)}, at its place stands "
                f"{theirs!r} {tuple(tensors[theirs].shape)}; the order differs, or it is another network"
            )
    if len(counted) != len(tensors):
        more = counted[len(tensors) :] or list(tensors)[len(counted) :]
        where = "the file" if len(tensors) > len(counted) else "the model"
        raise UnmovedError(
            f"{path}: match order: expected {len(counted)} tensors, came {len(tensors)}: {where} alone has "
            f"{several(more)}" + (f"; leave them out: {_ignoring(more, own)}" if where == "the file" else "")
        )
    return dict(zip(counted, tensors, strict=True))


def _agree(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether shapes and kinds agree one to one in order, BatchNorm's counts apart."""
    ours, theirs = ([name for name in side if not name.endswith(_COUNT)] for side in (own, tensors))
    return len(ours) == len(theirs) and all(
        own[a].shape == tensors[b].shape and not _are_other_kinds(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _are_other_kinds(ours: str, theirs: str) -> bool:
    """Return whether two names say that one is a weight, say, and the other a running mean."""
    kinds = {ours.rpartition(".")[2], theirs.rpartition(".")[2]}
    return len(kinds) == 2 and kinds <= _KINDS


def _near(name: str, own: Mapping[str, Tensor], extra: list[str], tensors: Mapping[str, Tensor]) -> str:
    alike = [other for other in extra if tensors[other].shape == own[name].shape]
    near = difflib.get_close_matches(name, alike or extra, n=1, cutoff=0.0 if alike else 0.4)
    other = f" (nearest in the file: {near[0]!r} {tuple(tensors[near[0]].shape)})" if near else ""
    return f"{name!r} {tuple(own[name].shape)}{other}"


def _difference(ours: Tensor, theirs: Tensor, name: str) -> str:
    return f"{name!r} expected {tuple(ours.shape)}, came {tuple(theirs.shape)}"


def _ignoring(names: Sequence[str], own: Iterable[str]) -> str:
    """Return the options that leave out these names, by their last part if no name of the model has it."""
    patterns = []
    for name in names:
        short = f"*{name.rpartition('.')[2]}"
        patterns.append(short if "." in name and not any(fnmatchcase(kept, short) for kept in own) else name)
    return " ".join(f"--ignore {pattern!r}" for pattern in list(dict.fromkeys(patterns))[:_SHOWN])


def _list(items: Iterable[str]) -> str:
    words = list(items)
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")
