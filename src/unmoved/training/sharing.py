"""Clean logits that the attack and the objective of one step have in common, computed once where that changes nothing.

An attack looks at the model in evaluation mode, the objective in training mode, where BatchNorm and dropout do
something else. Of a model made of layers that know no mode the two see the same logits.
"""

from __future__ import annotations

import torch
from torch import nn

from unmoved.core import precision as formats
from unmoved.core.batch import Batch, Image, Logits
from unmoved.core.views import Views
from unmoved.models.input_layers import Images, Normalize

# Exactly these: a class derived from them may do anything in its forward.
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Tanh)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MODELESS = {nn.Sequential, nn.Conv2d, nn.Linear, nn.Flatten, nn.Identity, Images, Normalize, *_ACTIVATIONS, *_POOLS}


def is_modeless(model: nn.Module) -> bool:
    """Whether training and evaluation mode are known to be one function; False for any module of a stranger's."""
    return all(
        (type(m) in MODELESS or (type(m) is nn.Dropout and m.p == 0))
        and not m._forward_hooks
        and not m._forward_pre_hooks
        for m in model.modules()
    )


class Clean:
    """The clean logits of a batch: computed when the attack first asks, with the graph that the objective needs.

    Args:
        model: what the objective runs, perhaps a wrapper.
        batch: the batch.
        precision: the objective's.
    """

    def __init__(self, model: nn.Module, batch: Batch, precision: str) -> None:
        self._views, self._precision = Views(model, batch), precision
        self._x, self._unchanged = batch.x, _version(batch.x)
        self._weights = list(model.parameters())
        self._versions: list[int] | None = None

    def constant(self, x: Image) -> Logits | None:
        """For the attack: (B, K) without a graph; None for other images, or where it asks for another precision.

        None too inside a mode that replaces functions, such as `smoothed`: the graph would be that of the replacements.
        """
        is_same = (x.data_ptr(), x.shape, _version(x)) == (self._x.data_ptr(), self._x.shape, self._unchanged)
        is_rough = torch.is_autocast_enabled(x.device.type)
        is_other = is_rough != (formats.resolve(self._precision, x.device) == "bf16")
        if not is_same or is_other or torch._C._is_torch_function_mode_enabled():
            return None
        self._versions = self._versions or [p._version for p in self._weights]
        with torch.enable_grad():
            return self._views.clean.detach()

    def graph(self) -> Logits | None:
        """For the objective, once: (B, K) with a graph; None where nobody asked, or images or weights moved since."""
        versions, self._versions = self._versions, None
        is_fresh = versions == [p._version for p in self._weights] and _version(self._x) == self._unchanged
        return self._views.clean if is_fresh else None


def _version(x: Image) -> int:
    """How often it was written to; -1 for a tensor of inference mode, which does not count."""
    return -1 if x.is_inference() else x._version
