"""SHIKE: experts share a trunk, and each expert fuses features of a different depth.

Paper: `Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation`, CVPR 2023,
    https://arxiv.org/abs/2304.01279
"""
import math
from numbers import Integral
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint
from torch import Tensor, nn

from .backbones import Backbone, BackboneFn, Source, preprocessing, pretrained_options, timm_backbone
from .classifiers import CLASSIFIERS, COSINE_SCALE
from .experts import ALIGNERS, Expert, init_convolutions
from .prior import Frequencies, check_frequencies, prior_offset

FUSIONS = ('product', 'residual', 'none')
# Arguments in old model folders. The first may name a file in a user's private folder.
OLD_ARGUMENTS = ('pretrained_backbone', 'authors_classifiers')


def _without_numpy(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's numbers and lists, for JSON."""
    if isinstance(value, (list, tuple)) or hasattr(value, 'tolist'):
        return [_without_numpy(item) for item in value] if getattr(value, 'ndim', 1) else value.item()
    return value


class Shike(nn.Module):
    """SHIKE network: a trunk of shared stages and, for each expert, private stages, an aligner and a classifier.

    Args:
        backbone: Builds the network to split. It is called with `num_experts` and the arguments below that it shares.
        num_classes: Classes; 0 for no classifiers.
        in_chans: Channels of the images.
        num_experts: Experts M.
        private_stages: How many of the last stages each expert has for itself, 1 in the paper. The others are shared.
        depths: Shared stage that each expert fuses, counted from 1 at the shallowest. By default experts take stages
            1, 2, ... and start again at 1 after the deepest.
        fusion: How an expert fuses its own features with the aligned ones. 'product' (the paper, Eq. 3) multiplies
            them. 'residual' gives `own * (1 + aligned)`; `aligned` starts at zero, so a fresh expert is its backbone.
            False is a plain mixture of experts, or with `num_experts=1` the plain network. True is 'product'.
        classifier: 'cosine' or 'linear'.
        aligner: 'conv' (the paper's), 'bottleneck' (far smaller on wide backbones) or 'separable' (a bottleneck of
            depthwise convolutions, for backbones with few operations).
        global_pool: 'avg', 'max', 'avgmax', or '' for unpooled features, which needs `num_classes=0`.
        drop_rate: Dropout on the pooled features.
        drop_path_rate: Stochastic depth in the backbone, None for the backbone's own rate.
        output_stride: 8 or 16 to dilate the backbone, if it can be.
        cosine_scale: Factor from cosines to logits, 30 if None. Only for the cosine classifier.
        class_counts: As in `set_training_prior`. Ignored if `num_classes` differs.
        classifier_prior: As in `set_training_prior`. Ignored with the counts.
        target_prior: As in `set_target_prior`. Ignored with the counts.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If an argument is out of range, or the backbone cannot be split. The message names it.
    """

    __jit_unused_properties__ = ['_model_args']

    def __init__(
            self,
            backbone: BackboneFn,
            num_classes: int = 1000,
            in_chans: int = 3,
            num_experts: int = 3,
            private_stages: int = 1,
            depths: Optional[Sequence[int]] = None,
            fusion: Union[bool, str] = 'product',
            classifier: str = 'cosine',
            aligner: str = 'bottleneck',
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: Optional[float] = None,
            output_stride: int = 32,
            cosine_scale: Optional[float] = None,
            class_counts: Optional[Sequence[int]] = None,
            classifier_prior: Optional[str] = None,
            target_prior: Frequencies = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        for name, value in dict(num_experts=num_experts, private_stages=private_stages).items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f'{name} must be a whole number of at least 1, got {value}.')
        num_experts, private_stages = int(num_experts), int(private_stages)
        fusion = 'product' if fusion is True else fusion or 'none'
        given = dict(fusion=fusion, classifier=classifier, aligner=aligner)
        for (name, value), known in zip(given.items(), (FUSIONS, CLASSIFIERS, ALIGNERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'.")
        dd = dict(device=device, dtype=dtype)
        shared = dict(in_chans=in_chans, drop_path_rate=drop_path_rate, output_stride=output_stride)
        net = backbone(num_experts=num_experts, private_stages=private_stages, **shared, **dd)
        num_shared = len(net.stages)
        if depths is None:
            depths = [m % num_shared + 1 for m in range(num_experts)]
        self.depths = tuple(_without_numpy(depth) for depth in depths)
        if len(self.depths) != num_experts or not all(1 <= depth <= num_shared for depth in self.depths):
            raise ValueError(
                f'depths must name one shared stage for each of {num_experts} experts, numbers between 1 and '
                f'{num_shared}, the stages of the trunk, got {self.depths}.')
        self.in_chans = in_chans
        self.num_experts = num_experts
        self.private_stages = private_stages
        self.fusion = fusion
        self.classifier_type = classifier
        self.cosine_scale = COSINE_SCALE
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.trunk_frozen = False
        self.backbone_name = net.name
        self.pretrained_cfg = dict[str, Any]()  # timm replaces it.
        self.register_buffer('prior_offset', None, persistent=False)

        self.stem = net.stem
        self.stages = nn.ModuleList(net.stages)
        # The stem is one of the feature levels in some networks only. The shared stages follow.
        *levels, last = net.feature_info
        self.num_stem_levels = len(levels) - num_shared
        self.experts = self._make_experts(net, aligner, **dd)
        modules = ['stem'] * self.num_stem_levels + [f'stages.{i}' for i in range(len(self.stages))]
        self.feature_info: List[Dict[str, Any]] = [dict(info, module=module) for info, module in zip(levels, modules)]
        self.feature_info.append(dict(last, num_chs=num_experts * last['num_chs'], module='experts'))
        self.num_features = self.feature_info[-1]['num_chs']
        first_conv = [name for name, module in self.named_modules() if module in net.first_conv]
        # timm adapts these convolutions to other image channels.
        self._traits = dict(first_conv=tuple(first_conv) if len(first_conv) > 1 else first_conv[0])
        self.reset_classifier(num_classes, global_pool, cosine_scale)
        if class_counts is None or len(class_counts) == self.num_classes:
            self.set_training_prior(class_counts, classifier_prior)
            self.set_target_prior(target_prior)

    def _make_experts(self, net: Backbone, aligner: str, **dd: Any) -> nn.ModuleList:
        *levels, last = net.feature_info
        residual, experts = self.fusion == 'residual', nn.ModuleList()
        for stage, depth in zip(net.last_stages, self.depths):
            align = None
            if self.fusion != 'none':
                shallow = levels[self.num_stem_levels + depth - 1]
                num_halvings = round(math.log2(last['reduction'] / shallow['reduction']))
                align = ALIGNERS[aligner](shallow['num_chs'], last['num_chs'], num_halvings, **dd)
                if residual and isinstance(align[-1], nn.ReLU):
                    del align[-1]  # Residual fusion starts at zero, where a ReLU lets no gradient through.
                if net.initialised:
                    init_convolutions(align)
            experts.append(Expert(stage, depth, align, residual))
        if not net.initialised:
            for part in (self.stem, self.stages, experts):
                init_convolutions(part)
        for expert in experts if residual else ():
            nn.init.zeros_(expert.aligner[-1].weight)  # This layer is a BatchNorm.
        return experts

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that sort parameters by depth for layer-wise learning rates: stem, shared stages, experts."""
        if coarse:
            return dict(stem=r'^stem', blocks=r'^stages\.(\d+)', experts=r'^experts')
        # A stage is a sequence of blocks, or of a module that holds them under one of timm's usual names.
        block = r'(?:\.[a-z_]+)*\.(\d+)'
        inner = block + r'\.(?:blocks\.|layers\.|b|denselayer)(\d+)'
        return dict(
            stem=r'^stem',
            blocks=[(r'^stages\.(\d+)' + part, None) for part in (inner, block, '')],
            experts=[
                (r'^experts\.\d+\.stage' + inner, None),
                (r'^experts\.\d+\.stage' + block, None),
                (r'^experts', (9999,)),  # Fresh aligners learn as fast as the layers beside the classifiers.
            ],
        )

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def load_backbone(self, source: Source = True, cache_dir: Union[None, str, Path] = None) -> None:
        """Load pretrained weights of the backbone: into the trunk, and into the private stages of every expert.

        Aligners and classifiers stay as they are. The model takes over the preprocessing of the weights.

        Args:
            source: True for timm's default weights, the tag of others, or a file with a state dict in timm's layout.
            cache_dir: Folder for downloaded weights.

        Raises:
            ValueError: If there are no weights of the backbone, or the file is missing, damaged or does not fit.
            RuntimeError: If timm knows no such tag, or a weight in the file has another shape.
        """
        net = timm_backbone(
            **pretrained_options(self.backbone_name, source), num_experts=1, in_chans=self.in_chans,
            private_stages=self.private_stages, cache_dir=cache_dir)
        for own, loaded in zip([self.stem, *self.stages], [net.stem, *net.stages]):
            own.load_state_dict(loaded.state_dict())
        for expert in self.experts:
            expert.stage.load_state_dict(net.last_stages[0].state_dict())
        self.set_preprocessing(source)

    def set_preprocessing(self, source: Source = True) -> None:
        """Configure the preprocessing of pretrained weights of the backbone, without loading them."""
        config = preprocessing(self.backbone_name, source)
        self.pretrained_cfg.pop('license', None)  # The licence is that of other weights.
        self.pretrained_cfg.update(config)

    def freeze_trunk(self) -> None:
        """Keep the stem and the shared stages as they are: no gradients, BatchNorm always in eval mode."""
        self.trunk_frozen = True
        self.stem.requires_grad_(False)
        self.stages.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> 'Shike':
        """Set training or eval mode. A frozen trunk stays in eval mode."""
        super().train(mode)
        if self.trunk_frozen:
            self.stem.eval()
            self.stages.eval()
        return self

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The module that holds the classifiers of all experts."""
        return self.classifier

    def reset_classifier(
            self, num_classes: int, global_pool: Optional[str] = None, cosine_scale: Optional[float] = None) -> None:
        """Give every expert a new classifier with fresh weights and an unknown prior.

        Args:
            num_classes: Classes; 0 for no classifiers.
            global_pool: Pooling type. By default it stays, or becomes 'avg' if classifiers come back to unpooled
                features.
            cosine_scale: Factor from cosines to logits. By default it stays.

        Raises:
            ValueError: If there is no such pooling, '' is given with classifiers, or the scale is not above 0 or is
                given for linear classifiers.
        """
        if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 0:
            raise ValueError(f'num_classes must be a whole number of at least 0, got {num_classes!r}.')
        if global_pool is None and num_classes and not self.global_pool.pool_type:
            global_pool = 'avg'
        if cosine_scale is not None:
            if self.classifier_type != 'cosine' or not cosine_scale > 0:
                raise ValueError(
                    'cosine_scale must be above 0 and goes with cosine classifiers, '
                    f'got {cosine_scale} with {self.classifier_type} ones.')
            self.cosine_scale = float(cosine_scale)
        if global_pool is not None:
            if global_pool not in ('', 'avg', 'max', 'avgmax'):
                raise ValueError(f"global_pool must be 'avg', 'max', 'avgmax' or '', got '{global_pool}'.")
            if num_classes and not global_pool:
                raise ValueError(f"global_pool '' goes with num_classes=0, got {num_classes}: classifiers need it.")
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.num_classes = int(num_classes)
        self.head_hidden_size = self.num_features
        self.classifier = nn.Identity()
        self.set_training_prior(None)
        if num_classes:
            parameter = next(self.parameters())
            options = dict(scale=self.cosine_scale) if self.classifier_type == 'cosine' else {}
            classifier = CLASSIFIERS[self.classifier_type](
                self.num_experts, self.num_features // self.num_experts, self.num_classes, **options)
            self.classifier = classifier.to(parameter.device, parameter.dtype)
        for module in (self.global_pool, self.classifier):
            module.train(self.training)

    def set_training_prior(self, class_counts: Optional[Sequence[int]], classifier_prior: Optional[str] = None) -> None:
        """Say what the classifiers were trained on. `set_target_prior` needs it, and a saved model keeps it.

        Args:
            class_counts: Training images of each class [num_classes], None if unknown.
            classifier_prior: Class frequencies that the logits stand for: 'train' for those of the training set, as
                after plain cross-entropy; 'uniform' for equal ones, as after balanced softmax; None if unknown.

        Raises:
            ValueError: If the counts are not one positive number for each class, or there is no such prior.
        """
        if class_counts is not None:
            class_counts = [int(count) for count in class_counts]
            check_frequencies(class_counts, self.num_classes, 'class_counts')
        if classifier_prior not in (None, 'uniform', 'train'):
            raise ValueError(f"classifier_prior must be 'uniform', 'train' or None, got {classifier_prior!r}.")
        self.class_counts, self.classifier_prior = class_counts, classifier_prior
        self.target_prior: Frequencies = None
        self.prior_offset: Optional[Tensor] = None

    def set_target_prior(self, prior: Frequencies) -> None:
        """Make the logits stand for other class frequencies, also in a saved or exported model.

        In eval mode every expert's logits become `logits + log(target prior) - log(classifier prior)`. In training
        mode they stay as they are.

        Args:
            prior: 'uniform', 'train' (the frequencies of the training set), positive numbers [num_classes] in
                proportion to the frequencies, or None for the logits as trained.

        Raises:
            ValueError: If a prior that this needs is unknown, or the numbers are not one positive number for each
                class.
        """
        if prior is not None and not isinstance(prior, str):
            prior = [float(value) for value in prior]
        offset = prior_offset(prior, self.classifier_prior, self.class_counts, self.num_classes)
        parameter = next(self.parameters())
        self.target_prior = prior
        self.prior_offset = None if offset is None else offset.to(parameter.device, parameter.dtype)

    def _add_offset(self, logits: Tensor) -> Tensor:
        return logits if self.training or self.prior_offset is None else logits + self.prior_offset

    @property
    def _model_args(self) -> Dict[str, Any]:
        """Arguments that timm writes into the configuration of a saved model: as created, and as set since."""
        args = {name: _without_numpy(value) for name, value in self.__dict__.get('_made_with', {}).items()}
        now: Dict[str, Any] = dict(
            class_counts=self.class_counts, classifier_prior=self.classifier_prior, target_prior=self.target_prior)
        scale = getattr(self.classifier, 'scale', self.cosine_scale)
        if scale != COSINE_SCALE or 'cosine_scale' in args:
            now['cosine_scale'] = scale
        return {
            **{name: value for name, value in args.items() if name not in now},
            **{name: value for name, value in now.items() if value is not None}}

    @_model_args.setter
    def _model_args(self, made_with: Dict[str, Any]) -> None:
        self._made_with = {name: value for name, value in made_with.items() if name not in OLD_ARGUMENTS}

    def set_experts(self, experts: Sequence[int]) -> None:
        """Keep some of the experts and drop the rest for good. This trades accuracy for speed.

        Args:
            experts: Indices of the experts to keep, in the order that they are to have.

        Raises:
            ValueError: If an index is out of range or given twice, or there is none.
        """
        experts = list(experts)
        valid = (isinstance(m, Integral) and not isinstance(m, bool) and 0 <= m < len(self.experts) for m in experts)
        if not experts or len(set(experts)) < len(experts) or not all(valid):
            raise ValueError(
                f'experts must be different numbers from 0 to {len(self.experts) - 1}, the experts of the model, '
                f'got {experts}.')
        experts = [int(m) for m in experts]
        self.num_features = self.num_features // self.num_experts * len(experts)
        self.experts = nn.ModuleList([self.experts[m] for m in experts])
        self.depths = tuple(self.depths[m] for m in experts)
        self.num_experts = len(experts)
        self.head_hidden_size = self.num_features
        self.feature_info[-1] = dict(self.feature_info[-1], num_chs=self.num_features)
        for name, weights in list(self.classifier.named_parameters()):
            setattr(self.classifier, name, nn.Parameter(weights.detach()[experts].clone(), weights.requires_grad))
        self._model_args = dict(self._model_args, num_experts=len(experts), depths=list(self.depths))

    def _levels(self, indices: Union[None, int, Sequence[int]]) -> List[int]:
        """Feature levels counted from 0. `indices` may count from the end, or be how many of the last levels."""
        num_levels = len(self.feature_info)
        if indices is None or isinstance(indices, (int, Integral)):
            indices = range(-(num_levels if indices is None else indices), 0)
        if not indices or not all(-num_levels <= i < num_levels for i in indices):
            raise ValueError(f'indices must be of the {num_levels} feature levels of the model, got {list(indices)}.')
        return [i % num_levels for i in indices]

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop what the chosen feature levels do not need, and give these levels, counted from 0.

        Arguments are those of timm's models. There is no norm to prune.
        """
        levels = self._levels(indices)
        num_left = max(levels) + 1
        if num_left < len(self.feature_info):
            self.feature_info = self.feature_info[:num_left]
            self.stages = self.stages[:num_left - self.num_stem_levels]
            self.experts, self.depths = nn.ModuleList(), ()
            self.num_experts = 1  # the classifier sees plain features as those of one expert
            self.num_features = self.feature_info[-1]['num_chs']
            prune_head = True
        if prune_head:
            self.reset_classifier(0, '')
        return levels

    def _forward_trunk(self, x: Tensor) -> List[Tensor]:
        """Feature maps of the stem and of each shared stage."""
        x = self.stem(x)
        shared = [x]
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            shared.append(x)
        return shared

    def _forward_fused(self, shared: List[Tensor]) -> Tensor:
        """Feature maps of all experts from those of the trunk."""
        fused = []
        for expert in self.experts:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                fused.append(checkpoint(expert, shared))
            else:
                fused.append(expert(shared))
        return torch.cat(fused, dim=1) if len(fused) else shared[-1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps of all experts, one after the other along the channels: [B, num_features, h, w]."""
        return self._forward_fused(self._forward_trunk(x))

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Feature maps of chosen levels of `feature_info` from images [B, in_chans, H, W].

        Arguments are those of timm's models. There is no norm after the last level. With `stop_early`, experts that no
        chosen level needs are left out.

        Returns:
            The final features and the list of intermediate ones, or that list alone.
        """
        assert output_fmt == 'NCHW', 'Output format must be NCHW.'
        levels = self._levels(indices)
        shared = self._forward_trunk(x)
        features = shared[1 - self.num_stem_levels:]
        if len(self.experts) and not (stop_early and max(levels) < len(features)):
            features.append(self._forward_fused(shared))
        intermediates = [features[i] for i in levels]
        if intermediates_only:
            return intermediates
        return features[-1], intermediates

    def forward_expert_head(self, x: Tensor) -> Tensor:
        """Logits of each expert [B, M, num_classes] from the feature maps of `forward_features`."""
        x = self.forward_head(x, pre_logits=True)
        return self._add_offset(self.classifier(x.unflatten(1, (self.num_experts, -1))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Averaged logits [B, num_classes], or pooled features [B, num_features] if pre_logits or no classifiers."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or self.num_classes == 0:
            return x
        return self._add_offset(self.classifier(x.unflatten(1, (self.num_experts, -1))).mean(1))

    def forward_experts(self, x: Tensor) -> Tensor:
        """Logits of each expert [B, M, num_classes] from images [B, in_chans, H, W]."""
        return self.forward_expert_head(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits averaged over experts [B, num_classes] from images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))
