"""Models: ``nn.Module`` from images in [0, 1], (B, C, H, W), to logits (B, K), normalisation inside.

``__all__`` are the factories, which are the names that a recipe may use: ``name(shape, num_classes, **settings)``.
"""

from unmoved.models.cnn import small_cnn
from unmoved.models.entrance import Normalize as Normalize
from unmoved.models.entrance import normalized as normalized
from unmoved.models.files import DamagedFile as DamagedFile
from unmoved.models.files import is_whole as is_whole
from unmoved.models.files import load_weights as load_weights
from unmoved.models.files import require_savable as require_savable
from unmoved.models.files import save_tensors as save_tensors
from unmoved.models.files import save_weights as save_weights
from unmoved.models.outside import timm
from unmoved.models.plain import linear, mlp
from unmoved.models.resnets import preact_resnet18, wide_resnet

__all__ = ["linear", "mlp", "preact_resnet18", "small_cnn", "timm", "wide_resnet"]
