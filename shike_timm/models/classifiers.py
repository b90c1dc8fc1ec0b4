"""Classifiers of all experts in one module, which takes features [B, M, D] and returns logits [B, M, C]."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COSINE_SCALE = 30.


def _normalize(x: Tensor) -> Tensor:
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        x = x.float()  # In float16 a norm above 65,504 is infinite, and 1e-12 is 0.
    # An exported F.normalize has an Expand node, which breaks ONNX's shape inference.
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():  # onnxruntime cannot prepare ReduceL2 for quantization.
            return x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


@torch.fx.wrap  # Its branches depend on data types, which a tracer does not know.
def cosines(x: Tensor, weight: Tensor) -> Tensor:
    """Cosines [B, M, C] between features [B, M, D] and class weights [M, C, D], expert by expert."""
    dtype = weight.dtype
    x, weight = _normalize(x), _normalize(weight)
    # A conversion would tie an exported program to this device, so an unnecessary conversion is left out.
    if x.dtype != dtype:
        x = x.to(dtype)
    if weight.dtype != dtype:
        weight = weight.to(dtype)
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

    @torch.no_grad()
    def set_class_means(self, means: Tensor, has_images: Tensor, norms: Tensor) -> None:
        """Set the weights from class means `mu` [M, C, D] of unit length: `w = s mu` and `b = 0`.

        `s` is 30 over the expert's mean feature norm, one of `norms` [M]. So the logits are about as large as those of
        a cosine classifier, and the nearest mean has the largest. Classes outside `has_images` [C] keep their weights.
        """
        means = means * (COSINE_SCALE / norms)[:, None, None]
        self.weight[:, has_images] = means[:, has_images].to(self.weight)
        self.bias[:, has_images] = 0.

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('bmd,mcd->bmc', x, self.weight) + self.bias


class CosineClassifier(nn.Module):
    """A cosine classifier for each expert: logits are `scale` times the cosine of features and class weights."""

    def __init__(self, num_experts: int, in_features: int, num_classes: int, scale: float = COSINE_SCALE, **dd: Any):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.randn(num_experts, num_classes, in_features, **dd), dim=-1))

    @torch.no_grad()
    def set_class_means(self, means: Tensor, has_images: Tensor, norms: Tensor) -> None:
        """Use the class means as class weights. The arguments are those of `LinearClassifier.set_class_means`."""
        self.weight[:, has_images] = means[:, has_images].to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * cosines(x, self.weight)


CLASSIFIERS = {'cosine': CosineClassifier, 'linear': LinearClassifier}
