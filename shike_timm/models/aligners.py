"""Aligners: what brings a shared stage's feature map to the shape of an expert's own output."""
from functools import partial
from typing import Any, List

from torch import nn

__all__ = ['ALIGNERS', 'bottleneck_aligner', 'conv_aligner']


def _conv_norm(
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        **dd: Any,
) -> List[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False, **dd)
    return [conv, nn.BatchNorm2d(out_chs, **dd)]


def conv_aligner(in_chs: int, out_chs: int, num_halvings: int, **dd: Any) -> nn.Sequential:
    """The authors' aligner: a chain of strided 3x3 convolutions, each doubling the channels.

    Args:
        in_chs: Channels of the shared stage.
        out_chs: Channels of the expert's own output, reached by the last convolution.
        num_halvings: How often the resolution is halved; where it is 0, one convolution keeps it.
        **dd: Device and data type of the parameters.

    Returns:
        Convolution and BatchNorm per link, ReLU after each link except the one at index 1.
    """
    layers = []
    num_links = max(num_halvings, 1)
    for k in range(num_links):
        width = out_chs if k == num_links - 1 else in_chs * 2
        layers += _conv_norm(in_chs, width, 3, stride=2 if num_halvings else 1, **dd)
        if k != 1:
            layers.append(nn.ReLU(inplace=True))
        in_chs = width
    return nn.Sequential(*layers)


def bottleneck_aligner(
        in_chs: int,
        out_chs: int,
        num_halvings: int,
        width: int = 256,
        depthwise: bool = False,
        **dd: Any,
) -> nn.Sequential:
    """An aligner of a bottleneck's shape: 1x1 convolution to `width`, strided 3x3 at that width, 1x1 out.

    A three-expert ResNet-50 has half the parameters with it that it has with `conv_aligner`.

    Args:
        in_chs: Channels of the shared stage.
        out_chs: Channels of the expert's own output.
        num_halvings: How often the resolution is halved; where it is 0, one 3x3 convolution keeps it.
        width: Channels inside.
        depthwise: The 3x3 convolutions work on each channel alone, as in networks for mobile phones, beside whose few
            operations full ones are most of the cost.
        **dd: Device and data type of the parameters.
    """
    stride, groups = 2 if num_halvings else 1, width if depthwise else 1
    layers = _conv_norm(in_chs, width, 1, **dd) + [nn.ReLU(inplace=True)]
    for _ in range(max(num_halvings, 1)):
        layers += _conv_norm(width, width, 3, stride=stride, groups=groups, **dd) + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *_conv_norm(width, out_chs, 1, **dd))


ALIGNERS = {
    'conv': conv_aligner,
    'bottleneck': bottleneck_aligner,
    'separable': partial(bottleneck_aligner, depthwise=True),
}
