"""Experts, and the aligners that bring a shared stage's feature map to the shape of an expert's own output."""
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

BOTTLENECK = 256  # channels inside an aligner

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
    width, stride = BOTTLENECK, 2 if num_halvings else 1
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


class VectorAligner(nn.Module):
    """Brings features of any format to one vector, which fits the channels of all places of an expert's own features.

    It takes the first token, if there are class or register tokens, and the mean over the places of the image:
    LayerNorm, a linear layer to 256 channels, GELU and another linear layer, which starts at zero.
    """

    def __init__(self, shallow: Dict[str, Any], own: Dict[str, Any], **dd: Any):
        super().__init__()
        self.num_prefix_tokens = shallow['num_prefix_tokens']
        self.places = {'NCHW': (2, 3), 'NHWC': (1, 2), 'NLC': (1,)}[shallow['output_fmt']]
        self.shape = {'NCHW': (-1, 1, 1), 'NHWC': (1, 1, -1), 'NLC': (1, -1)}[own['output_fmt']]
        width = shallow['num_chs'] * (2 if self.num_prefix_tokens else 1)
        self.norm = nn.LayerNorm(width, **dd)
        self.down = nn.Linear(width, BOTTLENECK, **dd)
        self.act = nn.GELU()
        self.up = nn.Linear(BOTTLENECK, own['num_chs'], **dd)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [B, 1, D], [B, 1, 1, D] or [B, D, 1, 1] from features."""
        if self.num_prefix_tokens:
            x = torch.cat([x[:, 0], x[:, self.num_prefix_tokens:].mean(1)], dim=-1)
        else:
            x = x.mean(self.places)
        return self.up(self.act(self.down(self.norm(x)))).unflatten(1, self.shape)


def init_convolutions(module: nn.Module) -> None:
    """Initial values of all convolutions and BatchNorms in a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


class Expert(nn.Module):
    """The private stages of an expert, the aligner for the shared stage that it fuses (Eq. 3), and a head of its own.

    The head, if it is not plain pooling, makes vectors of the fused features, as timm's head does before its classifier.
    """

    def __init__(
            self,
            stage: nn.Module,
            depth: int,
            aligner: Optional[nn.Module] = None,
            residual: bool = False,
            head: Optional[nn.Module] = None,
            shared_fmt: str = 'NCHW',
            output_fmt: str = 'NCHW',
    ):
        super().__init__()
        self.stage = stage
        self.depth = depth
        self.aligner = aligner
        self.residual = residual
        self.head = nn.Identity() if head is None else head
        self.has_maps = not isinstance(aligner, VectorAligner)
        self.from_nhwc = self.has_maps and shared_fmt == 'NHWC'
        self.to_nhwc = self.has_maps and output_fmt == 'NHWC'

    def forward(self, x: Tensor, shared: Dict[int, Tensor]) -> Tensor:
        """Fused features from what the last shared stage gives, and the features of shared stages by their number."""
        x = self.stage(x)
        if self.aligner is not None:
            aligned = shared[self.depth]
            if self.from_nhwc:
                aligned = aligned.permute(0, 3, 1, 2)
            aligned = self.aligner(aligned)
            if self.to_nhwc:
                aligned = aligned.permute(0, 2, 3, 1)
            if self.has_maps:
                # Aligners round odd sizes up. Some backbones round them down: drop the last row and column for those.
                aligned = aligned[:, :x.shape[1], :x.shape[2], :x.shape[3]]
            x = torch.addcmul(x, x, aligned) if self.residual else x * aligned
        return x
