"""Make models: ``nn.Module`` from images in [0, 1], (B, C, H, W), to logits (B, K), normalisation inside.

``__all__`` are the factories, which are the names that a recipe may use: ``name(shape, num_classes, **settings)``.
"""

from unmoved.models.checkpoints import Loaded as Loaded
from unmoved.models.checkpoints import load_checkpoint as load_checkpoint
from unmoved.models.checkpoints import require_checkpoint as require_checkpoint
from unmoved.models.input_layers import Normalize as Normalize
from unmoved.models.input_layers import normalized as normalized
from unmoved.models.linear_and_mlp import linear, mlp
from unmoved.models.resnets import preact_resnet18, wide_resnet
from unmoved.models.timm_models import timm
from unmoved.models.trades_cnn import small_cnn
from unmoved.models.weights_file import DamagedFile as DamagedFile
from unmoved.models.weights_file import checksum as checksum
from unmoved.models.weights_file import is_whole as is_whole
from unmoved.models.weights_file import load_weights as load_weights
from unmoved.models.weights_file import require_header as require_header
from unmoved.models.weights_file import require_savable as require_savable
from unmoved.models.weights_file import save_tensors as save_tensors
from unmoved.models.weights_file import save_weights as save_weights

__all__ = ["linear", "mlp", "preact_resnet18", "small_cnn", "timm", "wide_resnet"]
