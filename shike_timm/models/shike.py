"""SHIKE: experts that share a trunk and each fuse features of another depth (Jin et al., CVPR 2023)."""
import math
from numbers import Integral
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint
from torch import Tensor, nn

from .aligners import ALIGNERS
from .authors import CLASSIFIER_SETS, is_authors_layout, translate_authors_weights
from .backbones import BackboneFn, Source, preprocessing, pretrained_parts
from .classifiers import CLASSIFIERS, COSINE_SCALE
from .prior import Prior, check_frequencies, prior_offset

__all__ = ['Shike']

FUSIONS = ('product', 'residual', 'none')


class Expert(nn.Module):
    """The private stages, and the aligner that brings a shared stage's features to its shape (Eq. 3)."""

    def __init__(
            self,
            stage: nn.Module,
            depth: int,
            aligner: Optional[nn.Module] = None,
            residual: bool = False,
    ):
        super().__init__()
        self.stage = stage
        self.depth = depth
        self.aligner = aligner
        self.residual = residual

    def forward(self, shared: List[Tensor]) -> Tensor:
        """Fused features [B, D, h, w] from those of the stem and the shared stages."""
        x = self.stage(shared[-1])
        if self.aligner is not None:
            aligned = self.aligner(shared[self.depth])
            # Aligners round odd sizes up; a backbone that rounds them down drops the last row and column.
            aligned = aligned[:, :, :x.shape[2], :x.shape[3]]
            x = torch.addcmul(x, x, aligned) if self.residual else x * aligned
        return x


def _init_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def _plain(value: Any) -> Any:
    """NumPy's integers, alone or in a list, as Python's, which JSON takes."""
    if isinstance(value, (list, tuple)) or hasattr(value, 'tolist'):
        return [_plain(item) for item in value] if getattr(value, 'ndim', 1) else value.item()
    return value


class Shike(nn.Module):
    """SHIKE network: a trunk of shared stages and, per expert, private stages, an aligner and a classifier.

    It also loads state dicts in the layout of the authors' code, wherever weights are loaded.

    Args:
        backbone: Builds the network to split; called with `num_experts` and the arguments it shares with this class.
        num_classes: Classes; 0 leaves the classifiers out.
        in_chans: Channels of the input images.
        num_experts: Experts M.
        private_stages: How many of the last stages each expert has for itself, 1 in the paper; the others are shared.
        depths: Shared stage that each expert fuses, counted from 1 at the shallowest. By default experts take
            stages 1, 2, ... in order and start over at the deepest.
        fusion: How experts fuse (DKF): 'product' of an expert's own and the aligned features (the paper's, Eq. 3), or
            'residual', `own * (1 + aligned)` with `aligned` zero at first, so that a fresh expert is its backbone.
            False gives a plain mixture of experts, and with `num_experts=1` the plain network. True is 'product'.
        classifier: 'cosine' or 'linear'.
        aligner: 'conv' (the authors'), 'bottleneck' (far smaller on wide backbones), or 'separable' (a bottleneck of
            depthwise convolutions, for backbones of few operations).
        global_pool: 'avg', 'max', 'avgmax', or '' for unpooled features, which needs `num_classes=0`.
        drop_rate: Dropout on the pooled features.
        drop_path_rate: Stochastic depth in the backbone, where it has one; None leaves the backbone its own rate.
        output_stride: 8 or 16 to dilate the backbone, where it can be.
        cosine_scale: What cosines are multiplied with to be logits, 30 where None; for the cosine classifier alone.
        authors_classifiers: Which classifiers to take from a checkpoint in the authors' layout, which holds two sets:
            'rt_classifiers', the retrained ones, or 'classifiers', those of stage one.
        class_counts: As for `set_training_prior`; left out where they are not of as many classes.
        classifier_prior: Likewise.
        target_prior: As for `set_target_prior`; left out with the counts.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If an argument is out of range or the backbone cannot be split; the message names it.
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
            authors_classifiers: str = 'rt_classifiers',
            class_counts: Optional[Sequence[int]] = None,
            classifier_prior: Optional[str] = None,
            target_prior: Prior = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        for name, value in dict(num_experts=num_experts, private_stages=private_stages).items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f'{name} must be a whole number of at least 1, got {value}.')
        num_experts, private_stages = int(num_experts), int(private_stages)
        fusion = 'product' if fusion is True else fusion or 'none'
        given = dict(fusion=fusion, classifier=classifier, aligner=aligner, authors_classifiers=authors_classifiers)
        for (name, value), known in zip(given.items(), (FUSIONS, CLASSIFIERS, ALIGNERS, CLASSIFIER_SETS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'.")
        dd = dict(device=device, dtype=dtype)
        shared = dict(in_chans=in_chans, drop_path_rate=drop_path_rate, output_stride=output_stride)
        net = backbone(num_experts=num_experts, private_stages=private_stages, **shared, **dd)
        self.depths = self._resolve_depths(depths, num_experts, len(net.stages))
        self.in_chans = in_chans
        self.num_experts = num_experts
        self.private_stages = private_stages
        self.fusion = fusion
        self.classifier_type = classifier
        self.cosine_scale = COSINE_SCALE
        self.authors_classifiers = authors_classifiers
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.trunk_frozen = False
        self.backbone_name = net.name
        self.pretrained_cfg = dict[str, Any]()  # timm puts its own in place of it

        self.stem = net.stem
        self.stages = nn.ModuleList(net.stages)
        # Not every network has its stem among the feature levels; the stages follow.
        *levels, last = net.feature_info
        self.num_stem_levels = len(levels) - len(net.stages)
        self.experts, aligners = nn.ModuleList(), []
        for stage, depth in zip(net.last_stages, self.depths):
            align = None
            if fusion != 'none':
                shallow = levels[self.num_stem_levels + depth - 1]
                num_halvings = round(math.log2(last['reduction'] / shallow['reduction']))
                align = ALIGNERS[aligner](shallow['num_chs'], last['num_chs'], num_halvings, **dd)
                if fusion == 'residual' and isinstance(align[-1], nn.ReLU):
                    del align[-1]  # which at zero, where residual fusion starts, lets no gradient through
                aligners.append(align)
                if net.initialised:
                    _init_convolutions(align)
            self.experts.append(Expert(stage, depth, align, residual=fusion == 'residual'))
        if not net.initialised:
            _init_convolutions(self)
        if fusion == 'residual':
            for align in aligners:
                nn.init.zeros_([module for module in align if isinstance(module, nn.BatchNorm2d)][-1].weight)
        modules = ['stem'] * self.num_stem_levels + [f'stages.{i}' for i in range(len(self.stages))]
        self.feature_info: List[Dict[str, Any]] = [dict(info, module=module) for info, module in zip(levels, modules)]
        self.feature_info.append(dict(last, num_chs=num_experts * last['num_chs'], module='experts'))
        self.num_features = self.feature_info[-1]['num_chs']
        first_conv = [name for name, module in self.named_modules() if module in net.first_conv]
        # Where timm looks for the convolutions to adapt to other image channels.
        self._traits = dict(first_conv=tuple(first_conv) if len(first_conv) > 1 else first_conv[0])
        self.register_buffer('prior_offset', None, persistent=False)
        self.reset_classifier(num_classes, global_pool, cosine_scale)
        if class_counts is None or len(class_counts) == self.num_classes:
            self.set_training_prior(class_counts, classifier_prior)
            self.set_target_prior(target_prior)
        self.register_load_state_dict_pre_hook(_translate_on_load)

    @staticmethod
    def _resolve_depths(depths: Optional[Sequence[int]], num_experts: int, num_shared: int) -> Tuple[int, ...]:
        if depths is None:
            return tuple(m % num_shared + 1 for m in range(num_experts))
        depths = tuple(_plain(depth) for depth in depths)
        if len(depths) != num_experts:
            raise ValueError(f'depths must name one shared stage for each of {num_experts} experts, got {depths}.')
        if not all(1 <= depth <= num_shared for depth in depths):
            raise ValueError(f'depths must lie between 1 and {num_shared}, the stages of the trunk, got {depths}.')
        return depths

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise learning rates: stem, shared stages, experts."""
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
                (r'^experts', (9999,)),  # the fresh aligners, as near to the classifier as anything
            ],
        )

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore()
    def load_backbone(self, source: Source = True, cache_dir: Union[None, str, Path] = None) -> None:
        """Load pretrained weights of the backbone, into the private stages of each expert the same.

        Aligners and classifiers stay as they are; the preprocessing is that of the weights from then on.

        Args:
            source: True for timm's default weights, the tag of others, or a file of a state dict in timm's layout.
            cache_dir: Folder that downloaded weights are kept in.

        Raises:
            ValueError: If there are no weights of the backbone, or the file is missing, damaged or of another network.
            RuntimeError: If timm knows no such tag, or a weight in the file has another shape.
        """
        *trunk, last = pretrained_parts(
            self.backbone_name, source, self.in_chans, cache_dir, self.private_stages)
        for own, loaded in [*zip([self.stem, *self.stages], trunk), *((expert.stage, last) for expert in self.experts)]:
            own.load_state_dict(loaded.state_dict())
        self.set_preprocessing(source)

    @torch.jit.ignore()
    def set_preprocessing(self, source: Source = True) -> None:
        """Configure the preprocessing that weights of the backbone expect, as `load_backbone` does, without them."""
        config = preprocessing(self.backbone_name, source)
        self.pretrained_cfg.pop('license', None)  # of other weights
        self.pretrained_cfg.update(config)

    @torch.jit.ignore()
    def freeze_trunk(self) -> None:
        """Keep the shared part, stem and stages, as it is: no gradients, BatchNorm always in eval mode."""
        self.trunk_frozen = True
        self.stem.requires_grad_(False)
        self.stages.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> 'Shike':
        """Set training or eval mode; a frozen trunk stays in eval mode."""
        super().train(mode)
        if self.trunk_frozen:
            self.stem.eval()
            self.stages.eval()
        return self

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The module that holds the classifiers of all experts."""
        return self.classifier

    @torch.jit.ignore()
    def reset_classifier(
            self,
            num_classes: int,
            global_pool: Optional[str] = None,
            cosine_scale: Optional[float] = None,
    ) -> None:
        """Give every expert a new classifier with fresh initial values, which knows of no prior.

        Args:
            num_classes: Classes; 0 leaves the classifiers out.
            global_pool: Pooling type; where None the present one is kept, or 'avg' if classifiers come back to
                unpooled features.
            cosine_scale: What their cosines are multiplied with to be logits; where None it stays as it is.

        Raises:
            ValueError: If there is no such pooling, or '' is to go with classifiers; if the scale is not above 0, or
                classifiers are linear and have none.
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
            self.global_pool.train(self.training)
        self.num_classes = int(num_classes)
        self.head_hidden_size = self.num_features
        self.class_counts: Optional[List[int]] = None
        self.classifier_prior: Optional[str] = None
        self.target_prior: Prior = None
        self.prior_offset = None
        if num_classes:
            parameter = next(self.parameters())
            options = dict(scale=self.cosine_scale) if self.classifier_type == 'cosine' else {}
            classifier = CLASSIFIERS[self.classifier_type](
                self.num_experts, self.num_features // self.num_experts, self.num_classes, **options)
            self.classifier = classifier.to(parameter.device, parameter.dtype).train(self.training)
        else:
            self.classifier = nn.Identity().train(self.training)

    @torch.jit.ignore()
    def set_training_prior(self, class_counts: Optional[Sequence[int]], classifier_prior: Optional[str] = None) -> None:
        """Say what the classifiers were trained on, which `set_target_prior` starts from and a saved model keeps.

        Args:
            class_counts: Training images of each class; None where they are not known.
            classifier_prior: The world that the logits answer for: 'train', where classes are as frequent as in
                training, as after plain cross-entropy; 'uniform', where all are equally frequent, as after balanced
                softmax; None where it is not known.

        Raises:
            ValueError: If there are not as many counts as classes, one is not positive, or there is no such prior.
        """
        if class_counts is not None:
            class_counts = [int(count) for count in class_counts]
            check_frequencies(class_counts, self.num_classes, 'class_counts')
        if classifier_prior not in (None, 'uniform', 'train'):
            raise ValueError(f"classifier_prior must be 'uniform', 'train' or None, got {classifier_prior!r}.")
        self.set_target_prior(None)
        self.class_counts, self.classifier_prior = class_counts, classifier_prior

    @torch.jit.ignore()
    def set_target_prior(self, prior: Prior) -> None:
        """Answer for a world in which classes have these frequencies, from now on and also when saved or exported.

        In eval mode the logits of each expert are those as trained, plus the logarithm of this prior, less that of
        the prior they were trained to answer for. In training mode they stay as they are.

        Args:
            prior: 'uniform', 'train' (the frequencies of the training set), positive numbers in proportion to the
                frequencies of the classes [num_classes], or None for the logits as trained.

        Raises:
            ValueError: If a prior that this needs is not known, or there are not as many numbers as classes or one is
                not positive.
        """
        if prior is not None and not isinstance(prior, str):
            prior = [float(value) for value in prior]
        offset = prior_offset(prior, self.classifier_prior, self.class_counts, self.num_classes)
        if offset is not None:
            parameter = next(self.parameters())
            offset = offset.to(parameter.device, parameter.dtype)
        self.target_prior, self.prior_offset = prior, offset

    @property
    def _model_args(self) -> Dict[str, Any]:
        """What timm writes into the configuration of a saved model: what it was made with, and what was set since."""
        made_with = {name: _plain(value) for name, value in self.__dict__.get('_made_with', {}).items()}
        now: Dict[str, Any] = dict(
            class_counts=self.class_counts, classifier_prior=self.classifier_prior, target_prior=self.target_prior)
        scale = getattr(self.classifier, 'scale', self.cosine_scale)
        if scale != COSINE_SCALE or 'cosine_scale' in made_with:
            now['cosine_scale'] = scale
        for name in now:
            made_with.pop(name, None)
        return {**made_with, **{name: value for name, value in now.items() if value is not None}}

    @_model_args.setter
    def _model_args(self, made_with: Dict[str, Any]) -> None:
        # The backbone's weights are of no use any more, and perhaps in somebody's path.
        self._made_with = {name: value for name, value in made_with.items() if name != 'pretrained_backbone'}

    @torch.jit.ignore()
    def set_experts(self, experts: Sequence[int]) -> None:
        """Keep some of the experts and drop the others for good, which trades accuracy for speed.

        Args:
            experts: Indices of the experts to keep, in the order they are to have.

        Raises:
            ValueError: If an index is out of range or comes twice, or none is given.
        """
        experts = list(experts)
        known = range(len(self.experts))
        whole = all(isinstance(m, Integral) and not isinstance(m, bool) for m in experts)
        if not experts or len(set(experts)) < len(experts) or not whole or not set(experts) <= set(known):
            raise ValueError(
                f'experts must be different numbers from 0 to {len(known) - 1}, the experts of the model, '
                f'got {experts}.')
        experts = [int(m) for m in experts]
        self.num_features = self.num_features // self.num_experts * len(experts)
        self.experts = nn.ModuleList([self.experts[m] for m in experts])
        self.depths = tuple(self.depths[m] for m in experts)
        self.num_experts = len(experts)
        self.head_hidden_size = self.num_features
        self.feature_info[-1] = dict(self.feature_info[-1], num_chs=self.num_features)
        if self.num_classes:
            self.classifier.keep_experts(experts)
        self._model_args = dict(self._model_args, num_experts=len(experts), depths=list(self.depths))

    def _levels(self, indices: Union[None, int, Sequence[int]]) -> List[int]:
        """Feature levels as indices from 0, of indices that may count from the end, or of how many of the last."""
        num_levels = len(self.feature_info)
        if indices is None or isinstance(indices, (int, Integral)):
            indices = range(-(num_levels if indices is None else indices), 0)
        if not indices or not all(-num_levels <= i < num_levels for i in indices):
            raise ValueError(f'indices must be of the {num_levels} feature levels of the model, got {list(indices)}.')
        return [i % num_levels for i in indices]

    @torch.jit.ignore()
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop what the chosen feature levels do not need.

        Args:
            indices: Levels to keep, or how many of the last.
            prune_norm: Without effect, as there is no norm after the last level.
            prune_head: Drop the classifiers too.

        Returns:
            The levels kept, as indices from 0.
        """
        levels = self._levels(indices)
        num_left = max(levels) + 1
        if num_left < len(self.feature_info):
            self.feature_info = self.feature_info[:num_left]
            self.stages = self.stages[:num_left - self.num_stem_levels]
            self.experts, self.depths = nn.ModuleList(), ()
            self.num_experts = 1  # the classifier's view of plain features
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
        """Feature maps of all experts, [B, num_features, h, w], expert after expert along the channels."""
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
        """Feature maps of chosen levels, those of `feature_info`.

        Args:
            x: Images [B, in_chans, H, W].
            indices: Levels to give; how many of the last, or all where None.
            norm: Without effect, as there is no norm after the last level.
            stop_early: Leave the experts out where no chosen level needs them.
            output_fmt: Only 'NCHW'.
            intermediates_only: Give the intermediate features alone.

        Returns:
            The final features and a list of the intermediate ones, or that list alone.
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
        """Logits of each expert, [B, M, num_classes], from the feature maps of `forward_features`."""
        logits = self.classifier(self.forward_head(x, pre_logits=True).unflatten(1, (self.num_experts, -1)))
        return logits if self.training or self.prior_offset is None else logits + self.prior_offset

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features [B, num_features] where pre_logits or without classifiers, else averaged logits."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or self.num_classes == 0:
            return x
        logits = self.classifier(x.unflatten(1, (self.num_experts, -1))).mean(1)
        return logits if self.training or self.prior_offset is None else logits + self.prior_offset

    def forward_experts(self, x: Tensor) -> Tensor:
        """Logits of each expert, [B, M, num_classes], from images [B, in_chans, H, W]."""
        return self.forward_expert_head(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits averaged over experts, [B, num_classes], from images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))


def _translate_on_load(model: Shike, state_dict: Dict[str, Tensor], prefix: str, *_: Any) -> None:
    own = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if is_authors_layout(own):
        translated = translate_authors_weights(own, model.state_dict(), model.authors_classifiers)
        for name in own:
            del state_dict[prefix + name]
        state_dict.update({prefix + name: value for name, value in translated.items()})
