"""Check images, labels, losses, models and data before anything is computed with them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol, Self, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from unmoved.core.errors import UnmovedError

# Share of the box's width that a pixel may lie outside it, because of rounding such as that of a resized image.
TOLERANCE = 1e-6


class _Labelled(Protocol):
    @property
    def y(self) -> Tensor: ...

    @property
    def share(self) -> Tensor | None: ...

    def unmixed(self) -> tuple[Self, Self]: ...


Labelled = TypeVar("Labelled", bound=_Labelled)
_without_waiting: ContextVar[bool] = ContextVar("without_waiting", default=False)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Skip the checks of images and labels inside the block: reading values from a GPU means waiting for it."""
    token = _without_waiting.set(True)
    try:
        yield
    finally:
        _without_waiting.reset(token)


def _may_look(values: Tensor) -> bool:
    return values.numel() > 0 and not _without_waiting.get()


def require_images(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0), where: str = "images") -> None:
    """Raise `UnmovedError` unless every pixel is a number within ``bounds``.

    Args:
        x: images of a floating type. The check takes about a microsecond per thousand pixels.
        bounds: smallest and largest valid pixel value; `TOLERANCE` of the width is allowed on both sides.
        where: what the message calls the images.
    """
    if not _may_look(x):
        return
    (low, high), (least, most) = bounds, (value.item() for value in torch.aminmax(x.detach()))
    slack = TOLERANCE * (high - low)
    if least >= low - slack and most <= high + slack:
        return
    raise UnmovedError(
        f"{where}: expected pixels in [{low:g}, {high:g}], came {least:g} to {most:g}; " + _cause(x, low, high)
    )


def _cause(x: Tensor, low: float, high: float) -> str:
    """Guess what happened to images outside [low, high], and say what to do."""
    finite = x.detach()[torch.isfinite(x)]
    if len(finite) < x.numel():
        return (
            f"{x.numel() - len(finite)} of {x.numel()} are NaN or infinite: look for a division by zero where the "
            "images are made"
        )
    least, most, width = finite.min().item(), finite.max().item(), high - low
    if least > low - 0.02 * width and most < high + width:
        return f"they leave it a little, as after a resize or an augmentation: use images.clamp({low:g}, {high:g})"
    if least >= 0 and high <= 1:
        return f"they look like images of {_levels(most)}"
    return (
        "they look normalised: hand over the images as they were before, and put the normalisation inside the model, "
        "as models.normalized(model, mean, std) does; eps is then in units of pixels"
    )


def _levels(most: float) -> str:
    """Guess how many levels images have whose largest pixel is ``most``, and say what to do."""
    if most > 255:
        return "16 bits: divide by 65535"
    return "0..255: divide by 255" if most > 32 else f"0..{most:g}: divide by the largest value that a pixel may have"


def require_labels(y: Tensor, num_classes: int | None = None, where: str = "labels") -> None:
    """Raise `UnmovedError` unless every label is in 0..num_classes - 1 (is not negative, where that is not known).

    Args:
        y: (B,) labels of an integer type.
        num_classes: how many logits there are.
        where: what the message calls the labels.
    """
    if not _may_look(y):
        return
    least, most = (int(value) for value in torch.aminmax(y.detach()))
    if least < 0:
        expected = "0..K-1" if num_classes is None else f"0..{num_classes - 1}"
        raise UnmovedError(
            f"{where}: expected {expected}, came {least}; number the classes from 0 and leave out samples without one"
        )
    if num_classes is not None and most >= num_classes:
        raise UnmovedError(
            f"{where}: expected 0..{num_classes - 1} for {num_classes} logits, came {most}; give the model a logit for "
            "each class, or number the classes from 0"
        )


def require_per_sample(values: object, size: int, name: str) -> Tensor:
    """Return ``values``; raise `UnmovedError` unless they are floats of shape (size,), one for each sample.

    Args:
        values: what a term returned.
        size: number of samples.
        name: what the message calls the term.
    """
    if _is_per_sample(values, size):
        return values
    came = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    advice = "return a tensor with the value of each sample"
    if isinstance(values, Tensor) and values.is_floating_point():
        if values.ndim == 0:
            advice = 'that looks like a mean over the batch: leave the mean out, as reduction="none" does in torch'
        elif values.numel() == size:
            advice = "use values.squeeze() or values.flatten()"
        elif math.prod(values.shape[:1]) == size:
            advice = "sum over the classes, as values.sum(dim=1) does"
    raise UnmovedError(f"{name}: expected a loss of each sample, floats of shape ({size},), came {came}; {advice}")


def _is_per_sample(values: object, size: int) -> TypeGuard[Tensor]:
    return isinstance(values, Tensor) and values.shape == (size,) and values.is_floating_point()


def require_callable(name: str, value: object, arguments: str, order: str = "") -> None:
    """Raise `UnmovedError` unless ``value`` can be called with ``arguments``, words such as ``"model, batch"``.

    A signature that Python cannot read is accepted.

    Args:
        order: advice for the message, such as the order of the arguments.
    """
    words = f"{name}: expected something that is called with ({arguments}), came "
    advice = f"; {order}" if order else ""
    if isinstance(value, type) or _is_factory(value):
        own = getattr(value, "__name__", "")
        raise UnmovedError(f"{words}the {'class' if isinstance(value, type) else 'function'} {own}; use {own}(...)")
    if not callable(value):
        raise UnmovedError(f"{words}{_kind(value)}{advice}")
    signature = _signature_of(value)
    if signature is not None:
        try:
            signature.bind(*arguments.split(", "))
        except TypeError:
            raise UnmovedError(f"{words}{_kind(value)}, which takes {signature}{advice}") from None


_TERM = (
    'a term is called with the views of a batch and returns (B,): terms.CE("adv"), or a function of views.adv and '
    "views.y"
)


def require_term(name: str, value: object) -> None:
    """Apply `require_callable` to a term, which is called with views."""
    require_callable(name, value, "views", _TERM)


def require_loss(name: str, value: object) -> None:
    """Raise `UnmovedError` unless ``value`` may be an attack's loss; its arguments are checked when it is called."""
    if not callable(value) or isinstance(value, type) or _is_factory(value):
        require_term(name, value)


def values_of(term: Callable[[Labelled], object], views: Labelled, what: str) -> Tensor:
    """Compute ``term(views)``, (B,), and check it; messages begin with ``what``, such as ``"term"``, and its repr.

    For images mixed from two it is ``share term(y) + (1 - share) term(other)``.

    Raises:
        UnmovedError: the term takes other arguments, as the losses of torch do, or returns something else.
    """
    if views.share is not None:
        first, second = (values_of(term, each, what) for each in views.unmixed())
        return views.share * first + (1 - views.share) * second
    try:
        values = term(views)
    except TypeError:
        require_term(f"{what} {term!r:.80}", term)
        raise
    if _is_per_sample(values, len(views.y)):  # asked first: a repr takes longer than all this
        return values
    return require_per_sample(values, len(views.y), f"{what} {term!r:.80}")


def require_attack(name: str, value: object) -> None:
    """Apply `require_callable` to an attack."""
    require_callable(name, value, "model, batch", "an attack is one of unmoved.attacks, such as PGD(threat)")


def _is_factory(value: object) -> bool:
    """Return whether this is a function of this package that makes a term or an attack, and is not one itself."""
    return inspect.isfunction(value) and value.__module__.startswith(("unmoved.attacks.", "unmoved.terms."))


def _signature_of(value: Callable[..., object]) -> inspect.Signature | None:
    """Return the signature of a function or callable object; for a module, that of its ``forward``."""
    with suppress(ValueError):
        if isinstance(value, nn.Module):
            return inspect.signature(value.forward)
        if inspect.isroutine(value) or isinstance(value, functools.partial):
            return inspect.signature(value)
        return _signature_of_kind(type(value))  # type: ignore[arg-type]
    return None


@functools.cache  # frozen values are made anew at each step of a ramp
def _signature_of_kind(kind: type) -> inspect.Signature:
    signature = inspect.signature(kind.__call__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _kind(value: object) -> str:
    """Name the kind of an object in a word or two."""
    return "None" if value is None else str(getattr(value, "__name__", type(value).__name__))


def require_model(model: object, order: str) -> None:
    """Raise `UnmovedError` unless ``model`` is a module with weights in memory.

    Args:
        model: what was given as the model.
        order: the call with its arguments in order, which the message shows.
    """
    if isinstance(model, type):
        raise UnmovedError(f"model: expected an nn.Module, came the class {model.__name__}; use {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        advice = f"the order is {order}"
        if callable(getattr(model, "module", None)):
            advice = "of an exported program, hand over program.module()"
        elif callable(model):
            advice = "call the function in the forward of an nn.Module, whose parameters and mode are then known"
        raise UnmovedError(f"model: expected an nn.Module, came {_kind(model)}; {advice}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UnmovedError(
                f"model {type(model).__name__}: expected weights, but {name!r} is lazy and has no shape yet; call the "
                "model once on images of your data, such as model(images[:2])"
            )
        if tensor.is_meta:
            raise UnmovedError(
                f"model {type(model).__name__}: expected weights, but {name!r} is on the meta device and has no "
                'values; use model.to_empty(device="cpu") and load its weights'
            )


def require_split(split: object, order: str) -> None:
    """Raise `UnmovedError` unless ``split`` has a length of at least one and yields batches; ``order`` as above."""
    yields = callable(getattr(split, "batches", None)) and not isinstance(split, type)
    if not yields or not hasattr(split, "__len__"):
        raise UnmovedError(
            f"split: expected a data split with a length and batches(size), such as data.ArraySplit, came "
            f"{_kind(split)}; " + _advice_for_data(split, yields, order)
        )
    if len(split) == 0:
        raise UnmovedError("split: expected at least one sample, came none")


def _advice_for_data(data: object, yields: bool, order: str) -> str:
    """Advise how to make a split of what was given in its place."""
    if isinstance(data, torch.utils.data.DataLoader | torch.utils.data.Dataset):
        items = "loader.dataset" if isinstance(data, torch.utils.data.DataLoader) else "dataset"
        return (
            "make one of images in [0, 1], before augmentation and normalisation: "
            f"x, y = zip(*{items}); data.ArraySplit.of(torch.stack(x), torch.tensor(y))"
        )
    if isinstance(data, tuple | list | dict | Tensor) or type(data).__module__ == "numpy":
        return "make one of images and labels: data.ArraySplit.of(images, labels)"
    if yields:
        return f"give {type(data).__name__} a __len__, the number of its samples"
    if hasattr(data, "train") and hasattr(data, "test") and not isinstance(data, nn.Module):
        return "that is a data set of two: hand over its .train or its .test"
    return f"the order is {order}"
