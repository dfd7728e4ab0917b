"""Match the tensors of a file with those of a model, by name or by order, and say what does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from unmoved.core.errors import UnmovedError, several

PREFIXES = ("module.", "_orig_mod.")  # prefixes that DataParallel, DDP and torch.compile add to names
_COUNT = "num_batches_tracked"  # BatchNorm counts batches since torch 0.4.1; files from before lack it
# The kinds of tensors that most modules have, by the last part of their names.
_KINDS = frozenset({"weight", "bias", "running_mean", "running_var", _COUNT})
_SHOWN = 8  # names in a message


def without_ignored(
    path: Path, tensors: dict[str, Tensor], patterns: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors whose names match none of the patterns, and the names of the others."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            near = difflib.get_close_matches(pattern, tensors, n=1, cutoff=0.3)
            raise UnmovedError(
                f"{path}: ignore {pattern!r}: no name in the file matches it"
                + (f"; the nearest is {near[0]!r}" if near else "")
            )
    ignored = tuple(name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns))
    return {name: value for name, value in tensors.items() if name not in ignored}, ignored


def without_prefixes(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers, and any other of all names that leaves the names of the model."""
    while True:
        usual = (p for p in PREFIXES if not any(name.startswith(p) for name in own))
        shared = (p for p in (*usual, *_parts(own, tensors)) if tensors and all(n.startswith(p) for n in tensors))
        prefix = next(shared, None)
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}


def by_name(
    path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, has_order: bool = True
) -> dict[str, str]:
    """Map the model's names to those of the file, which are the same.

    Args:
        has_order: whether the file keeps the order of the model that it is of, so that `by_order` may be advised.
    """
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
    raise UnmovedError(
        "\n".join([f"{path}: the names do not fit the model", *_unfit(own, tensors, missing, extra, has_order)])
    )


def _unfit(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], missing: list[str], extra: list[str], has_order: bool
) -> list[str]:
    """List the names that differ, with the nearest name and both shapes, and what to do."""
    lines = (
        [f"  {len(missing)} missing: {_list(_near(name, own, extra, tensors) for name in missing)}"] if missing else []
    )
    if extra:
        lines.append(f"  {len(extra)} unexpected: {_list(f'{name!r} {tuple(tensors[name].shape)}' for name in extra)}")
    if parts := _parts(own, tensors):
        lines += [f"  all stand under {part!r}: to take these, pass {_ignoring_beside(part, extra)}" for part in parts]
        return lines
    kinds = {name.rpartition(".")[2] for name in own}
    strange = [name for name in extra if name.rpartition(".")[2] not in kinds]
    kept = {name: value for name, value in tensors.items() if name not in strange}
    if not has_order and len(own) == len(kept):
        lines.append("  if it is the same network, give the tensors its names: safetensors keep no order to match by")
    elif _agree(own, kept):
        also = f" {_ignoring(strange, own)}" if strange else ""
        lines.append(f"  the shapes agree one to one in order: if it is the same network, pass --match order{also}")
    elif extra and missing:
        lines.append("  these are the weights of another architecture, or of other settings of it")
    return lines


def _parts(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """List the prefixes under which a file, such as that of a trainer's module, has all that the model has."""
    prefixes = {name[: k + 1] for name in tensors for k, sign in enumerate(name) if sign == "."}
    wanted = {name: value.shape for name, value in own.items() if not name.endswith(_COUNT)}
    return [
        prefix
        for prefix in sorted(prefixes)
        if all(prefix + name in tensors and tensors[prefix + name].shape == shape for name, shape in wanted.items())
    ]


def _ignoring_beside(part: str, names: Sequence[str]) -> str:
    """Write the options that leave out what does not stand under ``part``."""
    own = part.partition(".")[0]
    tops = {name: name.partition(".")[0] for name in names if not name.startswith(part)}
    patterns = [f"{top}.*" if top not in (own, name) else name for name, top in tops.items()]
    return " ".join(f"--ignore {pattern!r}" for pattern in list(dict.fromkeys(patterns))[:_SHOWN])


def by_order(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
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
