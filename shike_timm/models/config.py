"""Options of the model."""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from ..options import option


@dataclass(frozen=True)
class ModelConfig:
    """Model."""

    model: str = option('resnet50_shike', 'registered SHIKE model')
    backbone: Optional[str] = option(None, "with --model shike: timm's network to split")
    pretrained_backbone: Optional[str] = option(
        None, "start trunk and experts from timm's weights of the backbone: the default ones, those of a tag, or a "
        'file', 'TAG|FILE', const='default')
    initial_checkpoint: Optional[str] = option(
        None, 'start from a trained SHIKE model: a run folder, a checkpoint, local-dir:RUN/model or hf-hub:USER/NAME. '
        'Its classifiers are left out if its classes differ', 'FILE|NAME')
    pretrained: bool = option(
        False, "start from the model's published weights, as with --initial-checkpoint. Where these are timm's of the "
        'backbone, as with --pretrained-backbone')
    freeze_trunk: bool = option(False, 'do not train the shared stages. They run without gradients, in eval mode')
    lora: Optional[int] = option(
        None, 'train low-rank updates of so many ranks in the linear layers of trunk and experts, beside aligners and '
        'classifiers, and nothing else. They are merged when the model is saved. Needs peft', 'RANK', low=1,
        card='changed')
    num_classes: Optional[int] = option(None, 'number of classes. By default that of the data', low=1, card='changed')
    num_experts: Optional[int] = option(None, 'number of experts. By default 3')
    private_stages: Optional[int] = option(
        None, 'number of last stages that each expert has for itself. By default 1. 0 is for a frozen trunk: '
        'experts then read pooled features of several stages', low=0, card='changed')
    private_blocks: Optional[int] = option(
        None, 'the same for a backbone of equal blocks (ViT). By default a sixth of them', low=0, card='changed')
    depths: Optional[List[int]] = option(
        None, 'shared stage that each expert fuses, counted from 1 at the shallowest; by default 1, 2, ..., and again '
        'from 1 after the deepest', nargs='+')
    levels: Optional[List[str]] = option(
        None, 'with --private-stages 0: shared stages that each expert reads, such as 4+7 5+7 6+7 for three experts. '
        'By default the last stage beside each of those before it', 'N+N', nargs='+', card='changed')
    fusion: Optional[bool] = option(
        None, 'fuse features of the shared stages into each expert, on by default; off is a mixture of experts')
    fusion_type: Optional[str] = option(
        None, 'product (the paper), or residual: it starts as the backbone, and is the default with '
        '--pretrained-backbone', choices=['product', 'residual'])
    classifier: Optional[str] = option(None, 'kind of classifier. By default cosine', choices=('cosine', 'linear'))
    cosine_scale: Optional[float] = option(
        None, 'factor from cosines to logits. By default 30', 'S', low=0.01, card='changed')
    aligner: Optional[str] = option(
        None, 'kind of aligner, by default conv for resnet32_shike and bottleneck for the others',
        choices=('conv', 'bottleneck', 'separable'))
    drop: Optional[float] = option(None, 'dropout rate', 'RATE', low=0, below=1)
    drop_path: Optional[float] = option(None, 'stochastic depth rate', 'RATE', low=0, below=1)
    model_kwargs: Dict[str, Any] = option(
        {}, "further arguments of timm's network, such as pad_type=same", 'KEY=VALUE', card='changed')
    grad_checkpointing: bool = option(
        False, 'recompute activations to save memory. BatchNorm then sees each batch twice', card='changed')

    @property
    def begins_trained(self) -> bool:
        """Whether the model begins with weights, of its backbone or of a trained model."""
        return bool(self.pretrained_backbone or self.initial_checkpoint or self.pretrained)
