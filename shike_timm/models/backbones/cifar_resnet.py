"""The ResNet for 32x32 images. timm has only its blocks."""
import copy
from typing import Any, Optional

from timm.models.resnet import BasicBlock, make_blocks
from torch import nn

from .backbone import Backbone


def cifar_resnet(
        blocks_per_stage: int, num_experts: int, in_chans: int = 3, drop_path_rate: Optional[float] = None,
        output_stride: int = 32, private_stages: int = 1, private_blocks: Optional[int] = None,
        global_pool: Optional[str] = None, img_size: Optional[int] = None, **dd: Any,
) -> Backbone:
    """The CIFAR ResNet of depth 6 n + 2: a 3x3 stem, and three stages of n basic blocks with 16, 32 and 64 channels."""
    if private_blocks is not None:
        raise ValueError('The CIFAR ResNet is made of stages: give private_stages in place of private_blocks.')
    if output_stride != 32:
        raise ValueError(f'output_stride of the CIFAR ResNet cannot be changed, got {output_stride}: leave it out.')
    channels = (16, 32, 64)
    if not 0 < private_stages < len(channels):
        raise ValueError(f'private_stages of the CIFAR ResNet must be 1 or 2, got {private_stages}.')
    conv = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
    stages, _ = make_blocks(
        (BasicBlock,) * 3, channels, (blocks_per_stage,) * 3, inplanes=16, drop_path_rate=drop_path_rate or 0., **dd)
    num_shared = len(stages) - private_stages
    last = nn.Sequential(*(block for _, stage in stages[num_shared:] for block in stage.children()))
    levels = [
        dict(num_chs=chs, reduction=red, output_fmt='NCHW', num_prefix_tokens=0)
        for chs, red in zip((16, *channels), (1, 1, 2, 4))]
    return Backbone(
        stem=nn.Sequential(conv, nn.BatchNorm2d(16, **dd), nn.ReLU(inplace=True)),
        stages=[stage for _, stage in stages[:num_shared]],
        last_stages=[last] + [copy.deepcopy(last) for _ in range(num_experts - 1)],
        feature_info=[*levels[:num_shared + 1], levels[-1]], first_conv=[conv], initialised=False)
