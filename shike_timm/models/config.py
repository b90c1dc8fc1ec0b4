"""Options of the model."""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from ..options import option


@dataclass(frozen=True)
class ModelConfig:
    """Model."""

    model: str = option('resnet50_shike', 'registered SHIKE model')
    backbone: Optional[str] = option(None, 'with --model shike: name of the timm network to split')
    pretrained_backbone: Optional[str] = option(
        None, "start trunk and experts from weights of the backbone: timm's default weights, timm's weights of a tag, "
        'or a file', 'TAG|FILE', const='default')
    initial_checkpoint: Optional[str] = option(
        None, 'start from a trained SHIKE model: a run folder, a checkpoint, local-dir:RUN/model or hf-hub:USER/NAME. '
        'Its backbone, experts and fusion are taken over where they are not given. Its classifiers are not loaded if '
        "its classes differ from the data's", 'FILE|NAME')
    pretrained: bool = option(
        False, 'start from the published weights of --model. Weights of a SHIKE model load as with '
        '--initial-checkpoint, weights of a backbone alone as with --pretrained-backbone')
    freeze_trunk: bool = option(False, 'do not train stem and shared stages: they run without gradients, in eval mode')
    lora: Optional[int] = option(
        None, 'train only aligners, classifiers, and low-rank updates of this rank in the linear layers of trunk and '
        'experts. The updates are added to the weights at the end of stage one. Needs peft', 'RANK', low=1,
        card='changed')
    num_classes: Optional[int] = option(None, 'number of classes. By default as in the data', low=1, card='changed')
    num_experts: Optional[int] = option(None, 'number of experts. By default 3')
    private_stages: Optional[int] = option(
        None, 'number of last stages of which each expert has its own copy. By default 1. With 0, meant for a frozen '
        'trunk, experts read pooled features of shared stages', low=0, card='changed')
    private_blocks: Optional[int] = option(
        None, 'for a ViT, in place of --private-stages: number of last blocks that each expert has for itself. By '
        'default a sixth of them', low=0, card='changed')
    depths: Optional[List[int]] = option(
        None, 'shared stage that each expert fuses, counted from 1 at the shallowest. By default 1, 2, ... and again '
        'from 1 after the deepest; for ViT, blocks of the last third', nargs='+')
    levels: Optional[List[str]] = option(
        None, 'with --private-stages 0: shared stages that each expert reads, such as 4+7 5+7 6+7 for three experts. '
        'By default each of several experts reads the last stage and one before it', 'N+N', nargs='+', card='changed')
    fusion: Optional[bool] = option(
        None, 'fuse features of a shared stage into each expert. On by default; without it experts are a plain mixture')
    fusion_type: Optional[str] = option(
        None, 'kind of fusion: product (the paper), or residual, with which experts start as copies of the backbone. '
        'residual is the default with --pretrained-backbone', choices=['product', 'residual'])
    classifier: Optional[str] = option(None, 'kind of classifier. By default cosine', choices=('cosine', 'linear'))
    cosine_scale: Optional[float] = option(
        None, 'factor that turns cosines into logits. By default 30', 'S', low=0.01, card='changed')
    aligner: Optional[str] = option(
        None, 'kind of aligner, by default conv for resnet32_shike and bottleneck for the others',
        choices=('conv', 'bottleneck', 'separable'))
    drop: Optional[float] = option(None, 'dropout rate', 'RATE', low=0, below=1)
    drop_path: Optional[float] = option(None, 'stochastic depth rate', 'RATE', low=0, below=1)
    model_kwargs: Dict[str, Any] = option(
        {}, "further arguments of timm's network, such as pad_type=same", 'KEY=VALUE', card='changed')
    grad_checkpointing: bool = option(
        False, 'recompute activations to save memory. Caution: BatchNorm then counts each batch twice', card='changed')

    @property
    def begins_trained(self) -> bool:
        """Whether training starts from the weights of a backbone or of a trained model."""
        return bool(self.pretrained_backbone or self.initial_checkpoint or self.pretrained)
