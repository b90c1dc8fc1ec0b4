"""The classifiers of all experts, stacked in one parameter: from features [B, M, D] to logits [B, M, C]."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

COSINE_SCALE = 30.


def _normalize(x: Tensor) -> Tensor:
    # F.normalize exports an Expand, which stops ONNX's shape inference.
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():  # onnxruntime's preprocessing for quantization does not know ReduceL2.
            return x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


@register_notrace_function
def cosines(x: Tensor, weight: Tensor) -> Tensor:
    """Cosines [B, M, C] between features [B, M, D] and class weights [M, C, D], expert by expert."""
    if x.dtype != weight.dtype:
        # The conversion ties an exported program to this device, so it is left out if it changes nothing.
        x = x.to(weight.dtype)
    x, weight = _normalize(x), _normalize(weight)
    if torch.jit.is_scripting():
        return torch.einsum('bmd,mcd->bmc', x, weight)
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # At a scale of 30, bfloat16 rounds logits to steps of 1/8.
            return torch.einsum('bmd,mcd->bmc', x, weight)
    return torch.einsum('bmd,mcd->bmc', x, weight)


class LinearClassifier(nn.Module):
    """A linear classifier for each expert."""

    def __init__(self, num_experts: int, in_features: int, num_classes: int, **dd: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_classes, in_features, **dd))
        self.bias = nn.Parameter(torch.empty(num_experts, num_classes, **dd))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('bmd,mcd->bmc', x, self.weight) + self.bias


class CosineClassifier(nn.Module):
    """A cosine classifier for each expert: logits are `scale` times the cosine of features and class weights."""

    def __init__(self, num_experts: int, in_features: int, num_classes: int, scale: float = COSINE_SCALE, **dd: Any):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.randn(num_experts, num_classes, in_features, **dd), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * cosines(x, self.weight)


CLASSIFIERS = {'cosine': CosineClassifier, 'linear': LinearClassifier}
