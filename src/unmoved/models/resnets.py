"""Make residual networks with pre-activation, PreActResNet-18 and WideResNet, from one block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from unmoved.core.errors import UnmovedError, require_flag, require_number, require_whole
from unmoved.models.input_layers import entrance, require_sizes


class PreActBlock(nn.Module):
    """BN-ReLU-conv, BN-ReLU-(dropout)-conv, plus a shortcut: (B, before, H, W) to (B, after, H/stride, W/stride).

    Where the size or the number of channels changes, the shortcut is a 1x1 convolution of the activated input, as in
    the robustness papers' code (He et al. 2016 project the input itself).
    """

    def __init__(self, before: int, after: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        side = x if self.shortcut is None else self.shortcut(out)
        change: Tensor = self.conv2(self.drop(self.relu(self.bn2(self.conv1(out)))))
        return change + side


class GlobalMean(nn.Module):
    """Average over height and width, (B, C, H, W) to (B, C).

    Not AdaptiveAvgPool2d, whose gradient on CUDA is not deterministic.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def _stages(stem: int, widths: Iterable[int], blocks: int, dropout: float = 0.0) -> dict[str, nn.Module]:
    """Make ``stage1``, ``stage2``, ... of ``blocks`` blocks each; each but the first halves height and width."""
    stages: dict[str, nn.Module] = {}
    before = stem
    for k, width in enumerate(widths, start=1):
        layers = [PreActBlock(before, width, 1 if k == 1 else 2, dropout)]
        layers += [PreActBlock(width, width, 1, dropout) for _ in range(blocks - 1)]
        stages[f"stage{k}"] = nn.Sequential(*layers)
        before = width
    return stages


def preact_resnet18(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int = 64,
    final_bn: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Make a pre-activation ResNet-18 with a 3x3 stem, for small images of any size: (B, C, H, W) to (B, K).

    He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016), in the form of the robust-overfitting and
    AWP papers: four stages of two blocks with w, 2w, 4w, 8w channels and strides 1, 2, 2, 2, then a last BN and ReLU.

    Args:
        width: channels of the first stage, 64 in the papers.
        final_bn: BN and ReLU before the pooling. With it 11,172,170 parameters for 10 classes on colour images;
            without it 11,171,146, the variant of pytorch-cifar, whose last stage ends in a bare sum.

    Raises:
        UnmovedError: a width below 1; otherwise as `entrance`.
    """
    shape, num_classes = require_sizes(shape, num_classes)
    layers = entrance(shape, num_classes, mean, std)
    width = require_whole("width", width, at_least=1)
    layers["conv"] = nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
    layers |= _stages(width, (width, 2 * width, 4 * width, 8 * width), blocks=2)
    if require_flag("final_bn", final_bn):
        layers |= {"bn": nn.BatchNorm2d(8 * width), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, pool=GlobalMean(), linear=nn.Linear(8 * width, num_classes)))


def wide_resnet(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: int = 34,
    width: int = 10,
    dropout: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Make a WideResNet-depth-width, by default WRN-34-10: (B, C, H, W) to (B, K).

    Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016), with the initialisation of the TRADES code (He
    normal by fan-out, zero bias in the last layer) and 46,160,474 parameters for 10 classes on colour images.

    Deviations: no ``sub_block1``, which the TRADES code builds and never calls; it still takes part in their counts
    of parameters and in weight decay.

    Args:
        depth: 6n + 4 for n blocks in each of the three stages.
        width: factor on the 16, 32, 64 channels of the stages.
        dropout: share dropped between the two convolutions of each block.

    Raises:
        UnmovedError: a depth that is not 6n + 4, or a setting out of its bounds; otherwise as `entrance`.
    """
    shape, num_classes = require_sizes(shape, num_classes)
    layers = entrance(shape, num_classes, mean, std)
    depth = require_whole("depth", depth, at_least=10)
    width = require_whole("width", width, at_least=1)
    dropout = require_number("dropout", dropout, at_least=0, at_most=1)
    blocks, rest = divmod(depth - 4, 6)
    if rest:
        raise UnmovedError(f"depth: expected 6n + 4, came {depth}; use {depth - rest} or {depth - rest + 6}")
    layers["conv"] = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
    layers |= _stages(16, (16 * width, 32 * width, 64 * width), blocks, dropout)
    layers |= {"bn": nn.BatchNorm2d(64 * width), "relu": nn.ReLU(), "pool": GlobalMean()}
    net = nn.Sequential(OrderedDict(layers, linear=nn.Linear(64 * width, num_classes)))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return net
