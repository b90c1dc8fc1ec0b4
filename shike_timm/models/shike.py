"""SHIKE: experts that share a trunk and each fuse features of another depth.

Paper: `Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation`,
Jin et al., CVPR 2023.
"""
import copy
import math
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, register_notrace_function
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .backbones import BackboneFn, cifar_resnet, timm_resnet

__all__ = ['Shike', 'CosineClassifier', 'LinearClassifier', 'conv_aligner', 'bottleneck_aligner']

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def _conv_norm(in_chs: int, out_chs: int, kernel_size: int, stride: int = 1) -> List[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_chs)]


def conv_aligner(in_chs: int, out_chs: int, num_halvings: int) -> nn.Sequential:
    """The authors' aligner: a chain of strided 3x3 convolutions, each doubling the channels.

    Args:
        in_chs: Channels of the shared stage.
        out_chs: Channels of the expert's own output, reached by the last convolution.
        num_halvings: How often the resolution is halved; where it is 0, one convolution keeps it.

    Returns:
        Convolution and BatchNorm per link, ReLU after each link except the one at index 1.
    """
    layers = []
    num_links = max(num_halvings, 1)
    for k in range(num_links):
        width = out_chs if k == num_links - 1 else in_chs * 2
        layers += _conv_norm(in_chs, width, 3, stride=2 if num_halvings else 1)
        if k != 1:
            layers.append(nn.ReLU(inplace=True))
        in_chs = width
    return nn.Sequential(*layers)


def bottleneck_aligner(in_chs: int, out_chs: int, num_halvings: int, width: int = 256) -> nn.Sequential:
    """An aligner of a bottleneck's shape: 1x1 convolution to `width`, strided 3x3 at that width, 1x1 out.

    A three-expert ResNet-50 has half the parameters with it that it has with `conv_aligner`.

    Args:
        in_chs: Channels of the shared stage.
        out_chs: Channels of the expert's own output.
        num_halvings: How often the resolution is halved; where it is 0, one 3x3 convolution keeps it.
        width: Channels inside.
    """
    layers = _conv_norm(in_chs, width, 1) + [nn.ReLU(inplace=True)]
    for _ in range(max(num_halvings, 1)):
        layers += _conv_norm(width, width, 3, stride=2 if num_halvings else 1) + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *_conv_norm(width, out_chs, 1))


ALIGNERS = {'conv': conv_aligner, 'bottleneck': bottleneck_aligner}


class Expert(nn.Module):
    """The last stage, and the aligner that brings a shared stage's features to its shape (Eq. 3)."""

    def __init__(self, stage: nn.Module, aligner: Optional[nn.Module] = None):
        super().__init__()
        self.stage = stage
        self.aligner = aligner

    def forward(self, x: Tensor, shallow: Tensor) -> Tensor:
        """Fused features [B, D, h, w] from the last and the chosen shared stage's features."""
        x = self.stage(x)
        if self.aligner is not None:
            x = x * self.aligner(shallow)
        return x


@register_notrace_function
def product_without_autocast(x: Tensor, weight: Tensor) -> Tensor:
    """Products of features [B, M, D] with class weights [M, C, D], one expert at a time: [B, M, C]."""
    if torch.jit.is_scripting():
        return torch.einsum('bmd,mcd->bmc', x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum('bmd,mcd->bmc', x, weight)


class LinearClassifier(nn.Module):
    """One linear classifier per expert, stacked: [B, M, D] features to [B, M, C] logits."""

    def __init__(self, num_experts: int, in_features: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, num_classes))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('bmd,mcd->bmc', x, self.weight) + self.bias


class CosineClassifier(nn.Module):
    """One cosine classifier per expert, stacked: [B, M, D] features to [B, M, C] logits.

    Logits are `scale` times the cosine between features and class weights, without bias. They are computed in
    float32 also under autocast: at a scale of 30, bfloat16 would round them to steps of 1/8.
    """

    def __init__(self, num_experts: int, in_features: int, num_classes: int, scale: float = 30.):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.randn(num_experts, num_classes, in_features), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x.to(self.weight.dtype), dim=-1)
        return self.scale * product_without_autocast(x, F.normalize(self.weight, dim=-1))


CLASSIFIERS = {'cosine': CosineClassifier, 'linear': LinearClassifier}


class Shike(nn.Module):
    """SHIKE network: a trunk of shared stages and, per expert, the last stage, an aligner and a classifier.

    Args:
        backbone: Builds the network to split; called with `in_chans`.
        num_classes: Classes; 0 leaves the classifiers out.
        in_chans: Channels of the input images.
        num_experts: Experts M.
        depths: Shared stage that each expert fuses, counted from 1 at the shallowest. By default experts take
            stages 1, 2, ... in order and start over at the deepest.
        fusion: Fuse at all (DKF); off gives a plain mixture of experts, and with `num_experts=1` the plain network.
        classifier: 'cosine' or 'linear'.
        aligner: 'conv' (the authors') or 'bottleneck' (far smaller on wide backbones).
        global_pool: 'avg', 'max', 'avgmax', or '' for unpooled features, which needs `num_classes=0`.
        drop_rate: Dropout on the pooled features.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
            self,
            backbone: BackboneFn,
            num_classes: int = 1000,
            in_chans: int = 3,
            num_experts: int = 3,
            depths: Optional[Sequence[int]] = None,
            fusion: bool = True,
            classifier: str = 'cosine',
            aligner: str = 'bottleneck',
            global_pool: str = 'avg',
            drop_rate: float = 0.,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f'num_experts must be at least 1, got {num_experts}.')
        if classifier not in CLASSIFIERS:
            raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, got '{classifier}'.")
        if aligner not in ALIGNERS:
            raise ValueError(f"aligner must be one of {', '.join(ALIGNERS)}, got '{aligner}'.")
        net = backbone(in_chans=in_chans)
        *shared, last = net.stages
        self.depths = self._resolve_depths(depths, num_experts, len(shared))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_experts = num_experts
        self.classifier_type = classifier
        self.drop_rate = drop_rate
        self.feature_info = [
            dict(num_chs=chs, reduction=reduction, module=module) for chs, reduction, module in
            zip(net.channels, net.reductions, ['stem'] + [f'stages.{i}' for i in range(len(shared))])
        ]

        self.stem = net.stem
        self.stages = nn.ModuleList(shared)
        out_chs, out_reduction = net.channels[-1], net.reductions[-1]
        self.experts = nn.ModuleList()
        for depth in self.depths:
            num_halvings = round(math.log2(out_reduction / net.reductions[depth]))
            align = ALIGNERS[aligner](net.channels[depth], out_chs, num_halvings) if fusion else None
            self.experts.append(Expert(copy.deepcopy(last), align))
        self.num_features = num_experts * out_chs
        self.feature_info.append(dict(num_chs=self.num_features, reduction=out_reduction, module='experts'))
        self.init_weights()
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def _resolve_depths(depths: Optional[Sequence[int]], num_experts: int, num_shared: int) -> Tuple[int, ...]:
        if depths is None:
            return tuple(m % num_shared + 1 for m in range(num_experts))
        depths = tuple(depths)
        if len(depths) != num_experts:
            raise ValueError(f'depths must name one shared stage for each of {num_experts} experts, got {depths}.')
        if not all(1 <= depth <= num_shared for depth in depths):
            raise ValueError(f'depths must lie between 1 and {num_shared}, the stages of the trunk, got {depths}.')
        return depths

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Kaiming normal values for every convolution; BatchNorm starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The module that holds the classifiers of all experts."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give every expert a new classifier with fresh initial values.

        Args:
            num_classes: Classes; 0 leaves the classifiers out.
            global_pool: Pooling type; the present one is kept where None.
        """
        if global_pool is not None:
            if global_pool not in ('', 'avg', 'max', 'avgmax'):
                raise ValueError(f"global_pool must be 'avg', 'max', 'avgmax' or '', got '{global_pool}'.")
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if num_classes and not self.global_pool.pool_type:
            raise ValueError(f"global_pool '' goes with num_classes=0, got {num_classes}: classifiers need pooling.")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features
        if num_classes:
            parameter = next(self.parameters())
            classifier = CLASSIFIERS[self.classifier_type](
                self.num_experts, self.num_features // self.num_experts, num_classes)
            self.classifier = classifier.to(parameter.device, parameter.dtype).train(self.training)
        else:
            self.classifier = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps of all experts, [B, num_features, h, w], expert after expert along the channels."""
        x = self.stem(x)
        shared = []
        for stage in self.stages:
            x = stage(x)
            shared.append(x)
        return torch.cat([expert(x, shared[depth - 1]) for expert, depth in zip(self.experts, self.depths)], dim=1)

    def forward_expert_head(self, x: Tensor) -> Tensor:
        """Logits of each expert, [B, M, num_classes], from the feature maps of `forward_features`."""
        return self.classifier(self.forward_head(x, pre_logits=True).unflatten(1, (self.num_experts, -1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features [B, num_features] where pre_logits or without classifiers, else averaged logits."""
        if pre_logits or self.num_classes == 0:
            x = self.global_pool(x)
            return F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return self.forward_expert_head(x).mean(1)

    def forward_experts(self, x: Tensor) -> Tensor:
        """Logits of each expert, [B, M, num_classes], from images [B, in_chans, H, W]."""
        return self.forward_expert_head(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits averaged over experts, [B, num_classes], from images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


def _create_shike(variant: str, backbone: BackboneFn, pretrained: bool = False, **kwargs) -> Shike:
    return build_model_with_cfg(Shike, variant, pretrained, backbone=backbone, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0', 'classifier': 'classifier',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'resnet32_shike': _cfg(
        num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR_MEAN, std=CIFAR_STD),
    'resnet50_shike': _cfg(),
    'resnext50_shike': _cfg(),
    'resnet152_shike': _cfg(),
})


@register_model
def resnet32_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on the CIFAR ResNet-32, 32x32 images, with the authors' aligner."""
    model_args = dict(backbone=partial(cifar_resnet, 5), aligner='conv')
    return _create_shike('resnet32_shike', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNet-50."""
    return _create_shike('resnet50_shike', partial(timm_resnet, 'resnet50'), pretrained=pretrained, **kwargs)


@register_model
def resnext50_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNeXt-50 32x4d."""
    return _create_shike('resnext50_shike', partial(timm_resnet, 'resnext50_32x4d'), pretrained=pretrained, **kwargs)


@register_model
def resnet152_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNet-152."""
    return _create_shike('resnet152_shike', partial(timm_resnet, 'resnet152'), pretrained=pretrained, **kwargs)
