"""Perturb a model's weights within a ball, and restore weights, modes and buffers after corruptions and attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmoved.core.errors import UnmovedError, require_choice, require_number, require_whole

Tensors = TypeVar("Tensors", Tensor, list[Tensor])


def trainable(model: nn.Module, optimizer: Optimizer | None = None) -> list[nn.Parameter]:
    """Return the parameters that a corruption may touch: those that require a gradient and that ``optimizer`` steps."""
    owned = None if optimizer is None else _owned(optimizer)
    return [p for p in model.parameters() if p.requires_grad and (owned is None or id(p) in owned)]


def _owned(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Compute the l2 norm of several tensors taken together as one vector; 0 of none."""
    lengths = [torch.linalg.vector_norm(t) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(lengths)) if lengths else torch.zeros(())


def steepest(g: Tensors, eps: float, p: float = 2, n: int | None = None) -> Tensors:
    """Return the corruption of at most ``n`` weights in the lp ball of radius ``eps`` that raises a linear loss most.

    ``a = eps sign(h) |h|^(1/(p-1)) / || |h|^(1/(p-1)) ||_p`` with h the n entries of g of largest size; the gain is
    ``eps ||h||_q``, 1/p + 1/q = 1. Sun et al. 2021 (AAAI) and the notes in docs/methods/apd.md.

    Args:
        g: a gradient: one tensor, or several taken together as one vector.
        eps: radius.
        p: in (1, inf].
        n: at most this many entries differ from zero; None for all.

    Returns:
        The same form as ``g``; zeros where g is zero.

    Raises:
        UnmovedError: a negative eps, p outside (1, inf], or n outside 1..number of weights.
    """
    eps = require_number("steepest: eps", eps, at_least=0)
    if not p > 1:
        raise UnmovedError(f"steepest: expected p in (1, inf], came {p!r}")
    return _as_one_vector(g, lambda v: _steepest(_largest(v, n), eps, p))


def project(a: Tensors, eps: float, p: float = 2, n: int | None = None) -> Tensors:
    """Return the nearest corruption (in l2) with at most ``n`` entries and ``||a||_p <= eps``.

    Keeps the n largest entries, then shrinks them. Exact for p = 2 and p = inf. Arguments and form as `steepest`.

    Raises:
        UnmovedError: as `steepest`, and p other than 2 or inf.
    """
    eps = require_number("project: eps", eps, at_least=0)
    if p not in (2, math.inf):
        raise UnmovedError(f"project: the nearest point is known for p = 2 and p = inf, came {p!r}")

    def nearest(v: Tensor) -> Tensor:
        v = _largest(v, n)
        if p == math.inf:
            return v.clamp(-eps, eps)
        length = torch.linalg.vector_norm(v)
        return torch.where(length > eps, v * (eps / length.clamp_min(1e-30)), v)

    return _as_one_vector(a, nearest)


def _steepest(h: Tensor, eps: float, p: float) -> Tensor:
    top = h.abs().amax() if h.numel() else h.sum()
    if p == math.inf:
        return eps * h.sign()
    # Scaled by the largest entry first, so that powers neither overflow nor vanish.
    power = (h / torch.where(top > 0, top, 1.0)).abs() ** (1 / (p - 1)) * h.sign()
    length = torch.linalg.vector_norm(power, ord=p)
    return torch.where(length > 0, eps * power / torch.where(length > 0, length, 1.0), 0.0)


def _largest(v: Tensor, n: int | None) -> Tensor:
    """Keep the n entries of largest size and set the rest to zero."""
    if n is None:
        return v
    n = require_whole("n", n, at_least=1, at_most=v.numel(), advice="it counts corrupted weights")
    kept = v.abs().topk(int(n)).indices
    return torch.zeros_like(v).index_copy(0, kept, v[kept])


def _as_one_vector(tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    if isinstance(tensors, Tensor):
        return function(tensors.flatten()).reshape(tensors.shape)
    if not tensors:
        return tensors
    vector = function(torch.cat([t.flatten() for t in tensors]))
    parts = vector.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


@contextmanager
def perturbed(parameters: Sequence[Tensor], corruption: Sequence[Tensor]) -> Iterator[None]:
    """Move parameters by ``corruption`` inside the block and restore them bit for bit after it, on exceptions too."""
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, v in zip(parameters, corruption, strict=True):
                p.add_(v)
            torch.clear_autocast_cache()  # a caller's own autocast would go on with the weights it cast before
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.copy_(old)
            torch.clear_autocast_cache()


@contextmanager
def constant_beside(optimizer: Optimizer, *modules: nn.Module) -> Iterator[None]:
    """Keep what ``optimizer`` does not step constant inside the block: it requires no gradient and has none.

    Otherwise its gradient, which is never zeroed, would grow from step to step and affect whatever reads it. After the
    block each parameter of ``modules`` requires a gradient as before, and its ``.grad`` is what the caller left there.
    """
    owned = _owned(optimizer)
    others = [
        (p, p.requires_grad, p.grad)
        for module in modules
        for p in module.parameters()
        if (p.requires_grad or p.grad is not None) and id(p) not in owned
    ]
    try:
        for p, _, _ in others:
            p.requires_grad, p.grad = False, None
        yield
    finally:
        for p, required, gradient in others:
            p.requires_grad, p.grad = required, gradient


@contextmanager
def evaluating(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Put the model in the mode an attack wants; restore every submodule's mode and every buffer after it.

    Args:
        mode: ``"eval"``; or ``"train"``: batch statistics and dropout in the submodules that are training already,
            with the random state restored too.
    """
    require_choice("mode", mode, ("eval", "train"))
    if mode == "train":
        with frozen_buffers(model), torch.random.fork_rng(_cuda_devices(model)):
            yield
        return
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]  # a frozen script has no modes
    try:
        with frozen_buffers(model):
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_training(model: nn.Module) -> Iterator[tuple[Callable[[], None], list[str]]]:
    """For a training: what puts the model in training mode but for what the caller froze, and the names of that.

    Submodules that came in evaluation mode, such as a BatchNorm whose statistics are to stay, stay in it. A model that
    is in evaluation mode as a whole, as loading and evaluating leave it, trains as a whole. All modes are restored.
    """
    modes = [(name, module, module.training) for name, module in model.named_modules()]
    frozen = [(name, module) for name, module, training in modes if not training]
    is_frozen = len(frozen) == len(modes)
    frozen = [] if is_frozen else frozen

    def train() -> None:
        try:
            model.train()  # and not the flags alone: a model may have a `train` of its own
        except NotImplementedError as error:
            raise UnmovedError(
                f"model {type(model).__name__}: expected one that has a training mode, but {error}; train the module "
                "that it was exported from"
            ) from error
        for _, module in frozen:
            module.training = False

    try:
        yield train, [name or "the model itself" for name, _ in frozen]
    finally:
        if is_frozen:
            with suppress(NotImplementedError):
                model.eval()
        for _, module, training in modes:
            module.training = training


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own tensors beside its parameters, by name: all buffers, and plain attributes.

    Attributes that carry a graph, such as a weight that is computed in each pass, are left out.
    """
    # The exact type: to ask torch whether something is one of its tensors costs five times as much.
    plain = {name: value for name, value in module.__dict__.items() if type(value) is Tensor}
    return {**module._buffers, **{name: value for name, value in plain.items() if not value.requires_grad}}


def assign(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Set a buffer or a plain attribute of a module to this tensor."""
    (module._buffers if name in module._buffers else module.__dict__)[name] = value


@torch.no_grad()
def write(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, in place, so that objects that share it see the numbers.

    Autograd does not count it as a change: graphs that need the same numbers go on. A tensor of another shape takes
    the second's memory.
    """
    for tensor, value in pairs:
        if tensor.shape != value.shape:
            tensor.data = value
    if pairs:
        torch._foreach_copy_([tensor.data for tensor, _ in pairs], [value for _, value in pairs])


def is_writable(tensor: Tensor) -> bool:
    """Return whether torch can write into it: a dense tensor whose entries share no memory, unlike ``expand``'s."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    steps = tensor.stride()
    return 0 not in steps or all(n <= 1 or step for n, step in zip(tensor.shape, steps, strict=True))


def holders(model: nn.Module, parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Return the modules whose buffers depend on these weights, such as their largest singular vectors.

    They are the modules that hold one of the weights, and children of such a module that have no parameters.
    """
    wanted, found = {id(p) for p in parameters}, list[nn.Module]()
    for module in model.modules():
        if any(id(p) in wanted for p in module._parameters.values()):
            plain = [child for child in module.children() if next(child.parameters(), None) is None]
            found += [module, *(part for child in plain for part in child.modules())]
    return found


@contextmanager
def frozen_buffers(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Restore the model's buffers (and tensors that are plain attributes) after the passes inside.

    With ``modules``, in the buffers of these of its modules alone. What a pass changes is seen by looking, whatever
    layer does it: running statistics, the vectors of spectral norm, a counter, a tensor replaced by another. Only one
    of another shape stays: a cache that has grown.
    """
    modules = model.modules() if modules is None else modules
    held = [(module, name, value) for module in modules for name, value in buffers(module).items()]
    tensors = list({id(v): v for _, _, v in held if v is not None and is_writable(v)}.values())
    with torch.no_grad():
        copies = [torch.empty_like(value) for value in tensors]
        if copies:
            torch._foreach_copy_(copies, tensors)
    try:
        yield
    finally:
        for module, name, value in held:
            now = module._buffers[name] if name in module._buffers else module.__dict__.get(name)
            if now is not value and (now is None or value is None or now.shape == value.shape):
                assign(module, name, value)
        write(list(zip(tensors, copies, strict=True)))


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
