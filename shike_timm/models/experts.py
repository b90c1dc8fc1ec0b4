"""Experts, and the aligners that bring a shared stage's feature map to the shape of an expert's own output."""
from functools import partial
from typing import Any, List, Optional

import torch
from torch import Tensor, nn


def _conv_norm(
        in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, groups: int = 1, **dd: Any) -> List[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False, **dd)
    return [conv, nn.BatchNorm2d(out_chs, **dd)]


def conv_aligner(in_chs: int, out_chs: int, num_halvings: int, **dd: Any) -> nn.Sequential:
    """The paper's aligner: strided 3x3 convolutions that double the channels, each with BatchNorm and ReLU."""
    layers = []
    num_links = max(num_halvings, 1)  # If the resolution is not halved, one convolution keeps it.
    for k in range(num_links):
        width = out_chs if k == num_links - 1 else in_chs * 2
        layers += _conv_norm(in_chs, width, 3, stride=2 if num_halvings else 1, **dd)
        if k != 1:  # The authors' code does the same.
            layers.append(nn.ReLU(inplace=True))
        in_chs = width
    return nn.Sequential(*layers)


def bottleneck_aligner(
        in_chs: int, out_chs: int, num_halvings: int, depthwise: bool = False, **dd: Any) -> nn.Sequential:
    """A 1x1 convolution to 256 channels, strided 3x3 convolutions (depthwise on request), and a 1x1 convolution."""
    width, stride = 256, 2 if num_halvings else 1
    groups = width if depthwise else 1
    layers = _conv_norm(in_chs, width, 1, **dd) + [nn.ReLU(inplace=True)]
    for _ in range(max(num_halvings, 1)):
        layers += _conv_norm(width, width, 3, stride=stride, groups=groups, **dd) + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *_conv_norm(width, out_chs, 1, **dd))


ALIGNERS = {
    'conv': conv_aligner,
    'bottleneck': bottleneck_aligner,
    'separable': partial(bottleneck_aligner, depthwise=True),
}


def init_convolutions(module: nn.Module) -> None:
    """Initial values of all convolutions and BatchNorms in a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


class Expert(nn.Module):
    """The private stages of an expert, and the aligner for the shared stage that it fuses (Eq. 3)."""

    def __init__(self, stage: nn.Module, depth: int, aligner: Optional[nn.Module] = None, residual: bool = False):
        super().__init__()
        self.stage = stage
        self.depth = depth
        self.aligner = aligner
        self.residual = residual

    def forward(self, shared: List[Tensor]) -> Tensor:
        """Fused features [B, D, h, w] from those of the stem and the shared stages."""
        x = self.stage(shared[-1])
        if self.aligner is not None:
            aligned = self.aligner(shared[self.depth])
            # Aligners round odd sizes up. Some backbones round them down: drop the last row and column for those.
            aligned = aligned[:, :, :x.shape[2], :x.shape[3]]
            x = torch.addcmul(x, x, aligned) if self.residual else x * aligned
        return x
