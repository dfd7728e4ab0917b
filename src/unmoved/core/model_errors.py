"""Turn errors that torch raises in a model's passes into messages that name the likely cause and the remedy."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from unmoved.core.errors import UnmovedError, several

_SIZES = ("shapes cannot be multiplied", "channels", "size of tensor", "Kernel size", "input size", "shape '", "dims")


def explained(error: Exception, model: nn.Module, x: Tensor) -> UnmovedError | None:
    """Return a message that explains why ``model`` raised ``error`` on images ``x``; None if the cause is unknown.

    Errors from mistakes inside the model are not explained, only those of images that do not fit the model.
    """
    words = None if isinstance(error, UnmovedError) else _cause(error, model, x) or cause_in_graph(error)
    return None if words is None else UnmovedError(f"model {type(model).__name__}: {words}")


def require_finite(logits: Tensor, model: nn.Module) -> None:
    """Raise `UnmovedError` where logits are NaN or infinite, and say what they come from, as far as weights tell."""
    if logits.isfinite().all():
        return
    spoilt = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.isnan().any()]
    advice = (
        f"{several(spoilt)} among its weights hold NaN, as where training diverged: take those of an earlier epoch"
        if spoilt
        else "look for an operation in its forward that overflows, a root or logarithm of 0, a division by a norm"
    )
    raise UnmovedError(
        f"model {type(model).__name__}: expected finite logits, came NaN or infinity; a verdict would mean nothing; "
        + advice
    )


def cause_in_graph(error: Exception) -> str | None:
    """Return cause and remedy if the gradient with respect to the images failed, or None."""
    said = str(error)
    if "use_reentrant" in said:
        return (
            "its checkpoints are of the reentrant kind, which refuse the gradient over the images that an attack "
            "needs; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    if "numpy() on Tensor that requires grad" in said:
        return (
            "its forward leaves the autograd graph by .numpy(), so that it has no gradient over the images; compute "
            "with torch alone, or use attacks without gradients, such as SPSA or Square"
        )
    if "Inference tensors cannot be saved" in said:
        return (
            "tensors made in torch.inference_mode, its weights or some of its forward's, have no gradient; make or "
            "load the model outside of it, and use torch.no_grad() in its place"
        )
    return None


def _cause(error: Exception, model: nn.Module, x: Tensor) -> str | None:
    """Return cause and remedy of an error in the forward pass, or None."""
    said, first = str(error), str(error).partition("\n")[0]
    if isinstance(error, TypeError):
        return None if _takes_one(model) else f"expected a forward that takes the images alone, but {first}; {_WRAP}"
    if isinstance(error, NotImplementedError) and 'missing the required "forward"' in said:
        return "it has no forward; hand over the module whose forward takes images and returns logits"
    if isinstance(error, AssertionError) and said.startswith("Guard failed"):
        return f"it was exported for batches of another size ({first}); export it with a dynamic batch dimension"
    if not isinstance(error, RuntimeError | ValueError):
        return None
    if "more than 1 value per channel" in said:
        return (
            f"a batch of {len(x)} leaves its BatchNorm one value a channel, of which there are no statistics; take a "
            "batch size that leaves more samples in the last batch of an epoch (in each process), or another "
            "normalisation"
        )
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() or t.is_complex()]
    devices = sorted({str(t.device) for t in tensors if t.device != x.device})
    if devices and "device" in said:
        return f"expected all of it on {x.device}, as the images are, came {', '.join(devices)}; use model.to(...)"
    types = sorted({_name(t) for t in tensors if t.dtype != x.dtype})
    if types and ("type" in said or "dtype" in said):
        return (
            f"expected weights and images of one type, came weights of {', '.join(types)} and images of {_name(x)}; "
            'use model.float() and images.float(), and precision="bf16" where passes should be faster'
        )
    if "scalar type" in said and not types:
        return f"it does not take images, which are numbers of {_name(x)} ({first}); begin it with a layer that does"
    if "channels" in said and x.ndim == 4 and x.shape[1] in (1, 3):
        other = "x.expand(-1, 3, -1, -1)" if x.shape[1] == 1 else "x.mean(1, keepdim=True)"
        return (
            f"it cannot take images of shape {tuple(x.shape[1:])} ({first}); make it for them, or convert them in a "
            f"module around it: {other}"
        )
    if any(sign in said for sign in _SIZES):
        return f"it cannot take images of shape {tuple(x.shape[1:])} ({first}); make it for them, or resize the images"
    return None


_WRAP = "wrap the model in a module whose forward does"


def _takes_one(model: nn.Module) -> bool:
    try:
        inspect.signature(model.forward).bind("images")
    except TypeError:
        return False
    except ValueError:  # no signature that Python can read
        pass
    return True


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
