"""Find the shortest step from a point of a box to a hyperplane, in linf, l2 or l1, exactly and for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from unmoved.core.batch import PerSample
from unmoved.core.errors import require_choice

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def to_hyperplane(
    z: Tensor, w: Tensor, excess: PerSample, norm: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Find the smallest step onto a hyperplane within a box: min ||s|| s.t. <w, z + s> = b, z + s in the box.

    Each entry goes towards the plane, by at most the room that the box leaves: by ``min(t, room_i)`` in linf and by
    ``min(t |w_i|, room_i)`` in l2, with t the root of ``sum_i |w_i| |s_i| = |<w, z> - b|``; l1 moves the entries of
    largest |w_i| first. Croce and Hein 2020, section 3.1, with neither sorting nor a tolerance: exact up to rounding.

    Args:
        z: (B, d), points in the box.
        w: (B, d), normals; an entry that is zero is not moved.
        excess: (B,), <w, z> - b, which is known more exactly than b near the plane.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: the box, the same in each entry.

    Returns:
        (B, d): the step; to the corner nearest to the plane if no point of the box lies on the plane.

    Raises:
        UnmovedError: an unknown norm.
    """
    require_choice("norm", norm, DUAL)
    low, high = bounds
    # On a CPU boolean masks and torch.where cost ten times as much as arithmetic, hence the signs and 0/1 numbers.
    sign = w.sign().mul_(-excess.sign()[:, None])
    room = (sign + 1).mul_((high - low) / 2)
    room = room.addcmul_(sign, z if low == 0 else z - low, value=-1).clamp_min_(0)
    size = w.abs()
    top = size.amax(dim=1)
    top = torch.where(top > 0, top, 1.0)
    size.div_(top[:, None])  # or the squares of a confident model's gradient vanish
    needed = excess.abs() / top
    if norm == "l1":
        step = _largest_first(size, room, needed)
    elif norm == "l2":
        t = _root(size * size, room / size.clamp_min(1e-30), needed)
        step = torch.minimum(size.mul_(t[:, None]), room, out=room)
    else:
        step = torch.minimum(room, _root(size, room, needed)[:, None], out=room)
    return step.mul_(sign)


def toward(
    z: Tensor, w: Tensor, excess: PerSample, norm: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, PerSample]:
    """Find the step of `to_hyperplane`, with the same arguments, and a length to compare planes by.

    Returns:
        (B, d): the step. (B,): its length; the largest finite number if it ends at a corner short of the plane, so that
        any plane that can be reached is nearer, and inf if w is 0 or not a number.
    """
    step = to_hyperplane(z, w, excess, norm, bounds)
    top = w.abs().amax(dim=1)
    top = torch.where(top > 0, top, 1.0)
    gain = (step * (w / top[:, None])).sum(dim=1).abs()
    is_reached = gain >= (1 - 1e-4) * excess.abs() / top
    far = torch.full_like(gain, torch.finfo(w.dtype).max)
    away = torch.where(is_reached, length(step, norm), far)
    return step, away.masked_fill(~(dual_length(w, norm) > 0), torch.inf)


def length(v: Tensor, norm: str) -> PerSample:
    """Compute ||v|| of each row, (B, d) -> (B,); in linf on a CPU ten times as fast as `torch.linalg.vector_norm`."""
    size = v.abs()
    if norm == "l1":
        return size.sum(dim=1)
    top = size.amax(dim=1)
    if norm == "linf":
        return top
    top = torch.where(top > 0, top, 1.0)
    norms: Tensor = torch.linalg.vector_norm(size.div_(top[:, None]), dim=1)
    return norms * top


def dual_length(w: Tensor, norm: str) -> PerSample:
    """Compute ||w|| of each row in the dual norm, (B, d) -> (B,): a plane at excess e is |e| / dual_length away."""
    return length(w, DUAL[norm])


def _root(slopes: Tensor, ends: Tensor, needed: PerSample) -> PerSample:
    """Find the smallest t with ``sum_i slopes_i min(t, ends_i) = needed``, beyond all ends where there is none.

    Newton's method from the left: the sum is concave and piecewise linear, so no step goes too far, each one leaves
    a piece for good, and the one in the root's piece is exact.
    """
    t, last = torch.zeros_like(needed), torch.full_like(needed, torch.inf)
    work = torch.empty_like(ends)
    while True:
        slope = torch.gt(ends, t[:, None], out=work).mul_(slopes).sum(dim=1)
        falls = slope < last  # not so for a row that is not a number
        if not falls.any():
            return t
        missing = needed - torch.minimum(ends, t[:, None], out=work).mul_(slopes).sum(dim=1)
        ahead = t + missing / slope.clamp_min(torch.finfo(t.dtype).tiny)
        t = torch.where(falls & (missing > 0), ahead, t).clamp_max(1e30)
        last = slope


def _largest_first(size: Tensor, room: Tensor, needed: PerSample) -> Tensor:
    """Find the a_i in [0, room_i] of smallest sum with ``sum_i size_i a_i = needed``: a fractional knapsack.

    A quickselect of all rows at once. The entries larger than ``high`` do not suffice, those larger than ``low`` do;
    the next threshold is the mean size of the entries between, weighted by room, until they are all of one size.
    """
    tiny = torch.finfo(size.dtype).tiny
    work = torch.empty_like(size)
    low, high = torch.full_like(needed, -1.0), torch.full_like(needed, torch.inf)
    few_room, few = torch.zeros_like(needed), torch.zeros_like(needed)
    many_room, many = room.sum(dim=1), torch.mul(size, room, out=work).sum(dim=1)
    searching = many > needed
    while searching.any():
        threshold = (many - few) / (many_room - few_room).clamp_min(tiny)
        mid_room = torch.gt(size, threshold[:, None], out=work).mul_(room).sum(dim=1)
        mid = work.mul_(size).sum(dim=1)
        # Both sums: next to large entries tiny ones change the room alone.
        searching = searching & ((mid > few) | (mid_room > few_room)) & ((mid < many) | (mid_room < many_room))
        up, down = searching & (mid < needed), searching & (mid >= needed)
        low, high = torch.where(down, threshold, low), torch.where(up, threshold, high)
        many, many_room = torch.where(down, mid, many), torch.where(down, mid_room, many_room)
        few, few_room = torch.where(up, mid, few), torch.where(up, mid_room, few_room)
    share = ((needed - few) / (many - few).clamp_min(tiny)).clamp(0, 1)
    amount = torch.gt(size, low[:, None]).to(size.dtype).sub_(torch.gt(size, high[:, None], out=work))
    return amount.mul_(share[:, None]).add_(work).mul_(room)
