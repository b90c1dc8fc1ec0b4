"""Classifiers of all experts, stacked in one parameter: [B, M, D] features to [B, M, C] logits."""
import math
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

__all__ = ['CLASSIFIERS', 'CosineClassifier', 'LinearClassifier']


@register_notrace_function
def product_without_autocast(x: Tensor, weight: Tensor) -> Tensor:
    """Products of features [B, M, D] with class weights [M, C, D], one expert at a time: [B, M, C]."""
    if torch.jit.is_scripting():
        return torch.einsum('bmd,mcd->bmc', x, weight)
    if not torch.amp.is_autocast_available(x.device.type):  # the meta device
        return torch.einsum('bmd,mcd->bmc', x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum('bmd,mcd->bmc', x, weight)


class _StackedClassifier(nn.Module):
    @torch.jit.ignore()
    def keep_experts(self, experts: Sequence[int]) -> None:
        """Keep the classifiers of these experts alone, in this order."""
        for name, parameter in list(self.named_parameters()):
            kept = nn.Parameter(parameter.detach()[list(experts)].clone(), parameter.requires_grad)
            setattr(self, name, kept)


class LinearClassifier(_StackedClassifier):
    """One linear classifier per expert, stacked: [B, M, D] features to [B, M, C] logits."""

    def __init__(self, num_experts: int, in_features: int, num_classes: int, **dd: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_classes, in_features, **dd))
        self.bias = nn.Parameter(torch.empty(num_experts, num_classes, **dd))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('bmd,mcd->bmc', x, self.weight) + self.bias


class CosineClassifier(_StackedClassifier):
    """One cosine classifier per expert, stacked: [B, M, D] features to [B, M, C] logits.

    Logits are `scale` times the cosine between features and class weights, without bias. They are computed in
    float32 also under autocast: at a scale of 30, bfloat16 would round them to steps of 1/8.
    """

    def __init__(self, num_experts: int, in_features: int, num_classes: int, scale: float = 30., **dd: Any):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.randn(num_experts, num_classes, in_features, **dd), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x.to(self.weight.dtype), dim=-1)
        return self.scale * product_without_autocast(x, F.normalize(self.weight, dim=-1))


CLASSIFIERS = {'cosine': CosineClassifier, 'linear': LinearClassifier}
