"""Backbones as SHIKE sees them: a stem, the shared stages, and a last stage that every expert owns a copy of."""
from dataclasses import dataclass
from typing import Callable, List, Tuple

import timm
from timm.models.resnet import BasicBlock, make_blocks
from torch import nn


@dataclass
class Backbone:
    """A convolutional network cut into stages.

    Attributes:
        stem: Everything before the first stage.
        stages: All stages in order; the last one is what experts copy.
        channels: Output channels of the stem and of each stage.
        reductions: Input resolution over output resolution, of the stem's activation and of each stage.
    """

    stem: nn.Module
    stages: List[nn.Module]
    channels: Tuple[int, ...]
    reductions: Tuple[int, ...]


BackboneFn = Callable[..., Backbone]


def cifar_resnet(blocks_per_stage: int, in_chans: int = 3) -> Backbone:
    """The CIFAR ResNet of depth 6 n + 2: a 3x3 stem and three stages of n basic blocks with 16, 32 and 64 channels."""
    channels = (16, 32, 64)
    stem = nn.Sequential(nn.Conv2d(in_chans, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    stages, _ = make_blocks((BasicBlock,) * 3, channels, (blocks_per_stage,) * 3, inplanes=16)
    return Backbone(stem, [stage for _, stage in stages], (16, *channels), (1, 1, 2, 4))


def timm_resnet(name: str, in_chans: int = 3) -> Backbone:
    """A model of timm's ResNet family by name, without its head."""
    model = timm.create_model(name, num_classes=0, in_chans=in_chans)
    return Backbone(
        stem=nn.Sequential(model.conv1, model.bn1, model.act1),
        stages=[nn.Sequential(model.maxpool, *model.layer1), model.layer2, model.layer3, model.layer4],
        channels=tuple(info['num_chs'] for info in model.feature_info),
        reductions=tuple(info['reduction'] for info in model.feature_info),
    )
