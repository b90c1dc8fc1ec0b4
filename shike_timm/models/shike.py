"""SHIKE: experts share a trunk, and each expert fuses features of a different depth.

Paper: `Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation`, CVPR 2023,
    https://arxiv.org/abs/2304.01279
"""
from numbers import Integral
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint
from torch import Tensor, nn

from .backbones import BackboneFn, Source, fetching, preprocessing, pretrained_options, timm_backbone
from .classifiers import CLASSIFIERS, COSINE_SCALE
from .experts import ALIGNERS, LevelExpert, LevelPool, choose_depths, joined_level, list_stages, make_experts, to_map
from .prior import Frequencies, PriorModel

FUSIONS = ('product', 'residual', 'none')
# Arguments of older versions in saved model folders. The first may name a file in a user's private folder.
OLD_ARGUMENTS = ('pretrained_backbone', 'authors_classifiers')


def _whole_number(name: str, value: Any, least: int = 0) -> int:
    """Convert a whole number of at least `least` to an int, and raise a ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}.')
    return int(value)


def _without_numpy(value: Any) -> Any:
    """Convert NumPy's numbers and arrays to Python's numbers and lists, for JSON."""
    value = value.tolist() if hasattr(value, 'tolist') else value
    return [_without_numpy(item) for item in value] if isinstance(value, (list, tuple)) else value


class Shike(PriorModel):
    """SHIKE network: a trunk of shared stages and, for each expert, private stages, an aligner and a classifier.

    Args:
        backbone: Function that builds and splits a network, from `num_experts` and the arguments below that concern it.
        num_classes: Number of classes, 0 for no classifiers.
        in_chans: Channels of the images.
        num_experts: Number of experts M.
        private_stages: Number of last stages of which each expert has its own copy, by default 1 as in the paper. The
            other stages are shared. With 0, experts read pooled features of shared stages.
        private_blocks: The same for a backbone that is a column of equal blocks, such as ViT, where each block is a
            stage. By default a sixth of the blocks.
        depths: Shared stage that each expert fuses, counted from 1 at the shallowest. By default experts fuse stages
            1, 2, ... and again from 1 after the deepest. In a column, the default spreads them over the last third.
        fusion: How an expert fuses its own features with the aligned features. 'product' (the paper, Eq. 3) multiplies
            them. 'residual' computes `own * (1 + aligned)`. There `aligned` starts at zero, so that a new expert
            computes the same as its backbone, and for tokens it is one vector that is fused into all tokens. True, the
            default, is 'residual' if the backbone has tokens, else 'product'. False is no fusion: a plain mixture of
            experts, or with `num_experts=1` the plain network.
        classifier: 'cosine' or 'linear'.
        aligner: 'conv' (the paper's), 'bottleneck' (far smaller on wide backbones) or 'separable' (a bottleneck of
            depthwise convolutions, for backbones with few operations).
        global_pool: 'avg', 'max', 'avgmax', or '' for unpooled features, which needs `num_classes=0`; for tokens any
            pooling that timm's network supports. By default the pooling of the network.
        drop_rate: Rate of dropout on the pooled features.
        drop_path_rate: Rate of stochastic depth in the backbone, None for the backbone's own rate.
        output_stride: 8 or 16 to dilate the backbone, if timm can dilate it.
        img_size: Height and width of the images, for a backbone made for one size. Other backbones ignore it.
        cosine_scale: Factor that turns cosines into logits, 30 if None. Only for cosine classifiers.
        class_counts: As in `set_training_prior`. Ignored if there is not one count for each of `num_classes`.
        classifier_prior: As in `set_training_prior`. Ignored if the counts are.
        target_prior: As in `set_target_prior`. Ignored if the counts are.
        temperature: As in `set_temperature`. Ignored if the counts are.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        **kwargs: Arguments of timm's network, such as `patch_size`, `reg_tokens` and `dynamic_img_size` of ViT.

    Raises:
        ValueError: If an argument is out of range, or the backbone cannot be split. The message names either.
    """

    __jit_unused_properties__ = ['_model_args', 'level_widths']

    def __init__(
            self, backbone: BackboneFn, num_classes: int = 1000, in_chans: int = 3, num_experts: int = 3,
            private_stages: Optional[int] = None, private_blocks: Optional[int] = None,
            depths: Optional[Sequence[int]] = None, fusion: Union[bool, str] = True, classifier: str = 'cosine',
            aligner: str = 'bottleneck', global_pool: Optional[str] = None, drop_rate: float = 0.,
            drop_path_rate: Optional[float] = None, output_stride: int = 32,
            img_size: Union[None, int, Tuple[int, int]] = None, cosine_scale: Optional[float] = None,
            class_counts: Optional[Sequence[int]] = None, classifier_prior: Optional[str] = None,
            target_prior: Frequencies = None, temperature: float = 1., device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None, **kwargs: Any,
    ):
        super().__init__()
        num_experts = _whole_number('num_experts', num_experts, 1)
        given = dict(private_stages=private_stages, private_blocks=private_blocks)
        private = {name: _whole_number(name, value) for name, value in given.items() if value is not None}
        given = dict(fusion='product' if fusion is True else fusion or 'none', classifier=classifier, aligner=aligner)
        for (name, value), known in zip(given.items(), (FUSIONS, CLASSIFIERS, ALIGNERS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'.")
        dd = dict(device=device, dtype=dtype)
        net = backbone(
            num_experts=num_experts, drop_path_rate=drop_path_rate, output_stride=output_stride, img_size=img_size,
            in_chans=in_chans, global_pool=global_pool, **private, **kwargs, **dd)
        self.depths = choose_depths(net, num_experts, _without_numpy(depths))
        if not net.last_stages:
            if global_pool not in (None, '', 'avg'):
                raise ValueError(
                    f"global_pool '{global_pool}' needs private stages: experts without them read means of features.")
            fusion = False
            net.feature_info.append(joined_level(net.feature_info[-len(net.stages):], self.depths))
        *levels, last = net.feature_info
        self.output_fmt, self.num_prefix_tokens = last['output_fmt'], last['num_prefix_tokens']
        if self.output_fmt == 'NLC' and fusion == 'product':
            raise ValueError(
                f"fusion 'product' multiplies feature maps, and '{net.name}' gives tokens: use 'residual'.")
        if fusion is True:
            fusion = 'residual' if any(level['output_fmt'] == 'NLC' for level in net.feature_info) else 'product'
        self.in_chans = in_chans
        self.num_experts = num_experts
        self.fusion = fusion or 'none'
        self.classifier_type = classifier
        self.cosine_scale = COSINE_SCALE
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.trunk_frozen = False
        self.backbone_name = net.name
        self._backbone_args: Dict[str, Any] = dict(private, **kwargs, global_pool=global_pool, img_size=net.img_size)
        self.implied_args: Dict[str, Any] = {}  # Defaults that came from its registered name.
        self.pretrained_cfg = dict[str, Any]()  # timm replaces it.
        self.fused_stages = list_stages(self.depths)
        self.stem = net.stem
        self.stages = nn.ModuleList(net.stages)
        self.has_private_stages = bool(net.last_stages)
        if not self.has_private_stages:  # No expert needs the stages above those that are read.
            self.stages[max(self.fused_stages):].requires_grad_(False)
        # In some networks the stem is the first feature level. Each of the following levels is a shared stage.
        self.num_stem_levels = len(levels) - len(net.stages)
        self.experts = make_experts(net, ALIGNERS[aligner], self.fusion, self.depths, **dd)
        modules = ['stem'] * self.num_stem_levels + [f'stages.{i}' for i in range(len(self.stages))]
        self.feature_info: List[Dict[str, Any]] = [dict(info, module=module) for info, module in zip(levels, modules)]
        self.feature_info.append(dict(last, num_chs=num_experts * last['num_chs'], module='experts'))
        self.num_features = self.feature_info[-1]['num_chs']
        self.channel_dim = 1 if self.output_fmt == 'NCHW' else -1
        first_conv = [name for name, module in self.named_modules() if module in net.first_conv]
        # timm adapts these convolutions to other image channels.
        self._traits = dict(
            first_conv=first_conv[0] if len(first_conv) == 1 else tuple(first_conv) or None, img_size=net.img_size,
            fixed_input_size=net.fixed_input_size)
        self.has_own_heads = net.heads is not None
        self.has_fixed_pool = self.has_own_heads or self.output_fmt == 'NLC'
        self.pool_type = self.default_pool = net.global_pool
        self.head_width = net.head_hidden_size or last['num_chs']  # Width of an expert's vector.
        self._no_weight_decay = net.no_weight_decay
        self.reset_classifier(num_classes, global_pool, cosine_scale)
        if class_counts is None or len(class_counts) == self.num_classes:
            self.set_training_prior(class_counts, classifier_prior)
            self.set_target_prior(target_prior)
            self.set_temperature(temperature)

    @torch.jit.ignore()
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that the backbone excludes from weight decay, such as position embeddings."""
        return {
            name for name, _ in self.named_parameters()
            if any(f'.{name}'.endswith(f'.{one}') for one in self._no_weight_decay)}

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that sort parameters by depth for layer-wise learning rates: stem, shared stages, experts."""
        if coarse:
            return dict(stem=r'^stem', blocks=r'^stages\.(\d+)', experts=r'^experts')
        # A stage holds its blocks in a sequence, or in a module under one of timm's usual names.
        block = r'(?:\.[a-z_]+)*\.(\d+)'
        inner = block + r'\.(?:blocks\.|layers\.|b|denselayer)(\d+)'
        return dict(
            stem=r'^stem',
            blocks=[(r'^stages\.(\d+)' + part, None) for part in (inner, block, '')],
            # Fresh aligners learn at the rate of the last group of layers before the classifiers.
            experts=[*((r'^experts\.\d+\.stage' + part, None) for part in (inner, block)), (r'^experts', (9999,))])

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each stage in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def load_backbone(self, source: Source = True, cache_dir: Union[None, str, Path] = None) -> None:
        """Load pretrained weights of the backbone: into the trunk, and into the private stages of every expert.

        Aligners and classifiers stay as they are. The model takes over the preprocessing of the weights.

        Args:
            source: True for timm's default weights, the tag of other weights, a file with a state dict in timm's
                layout, or the state dict.
            cache_dir: Folder for downloaded weights.

        Raises:
            ValueError: If there are no weights of the backbone, or the file is missing, damaged or does not fit.
            RuntimeError: If timm knows no such tag, or a weight in the file has another shape.
        """
        options = pretrained_options(self.backbone_name, source)
        name = options.pop('name')
        with fetching(name, remote=options['pretrained_cfg_overlay'] is None):
            net = timm_backbone(
                name, num_experts=1, in_chans=self.in_chans, **self._backbone_args,
                weights=dict(options, cache_dir=cache_dir))
        own = dict(self.named_modules())
        for path, part in net.parts(self.num_experts).items():
            if path in own:  # A pruned model has fewer parts.
                own[path].load_state_dict(part.state_dict())
        self.set_preprocessing(source)

    def backbone_kwargs(self) -> Dict[str, Any]:
        """Arguments with which timm makes the whole backbone, without those that split it."""
        return {
            key: value for key, value in self._backbone_args.items()
            if value is not None and not key.startswith('private_')}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. If they have no expert heads, as in older versions, the model replaces its heads by pooling."""
        names = [name for name in self.state_dict() if '.head.' in name]
        has_experts = any(name.startswith('experts.') for name in state_dict)
        if has_experts and names and self.output_fmt == 'NCHW' and not any(name in state_dict for name in names):
            self._pool_plainly(self.num_features // self.num_experts)
            self.reset_classifier(self.num_classes)
        return super().load_state_dict(state_dict, strict, assign)

    def _pool_plainly(self, width: int) -> None:
        """Replace the heads of the experts by plain pooling, for expert features of `width` channels."""
        self.has_own_heads, self.has_fixed_pool = False, self.output_fmt == 'NLC'
        self.head_width, self.default_pool = width, 'avg'
        for expert in self.experts:
            expert.head = nn.Identity()

    def set_preprocessing(self, source: Source = True) -> None:
        """Use the preprocessing of pretrained weights of the backbone, without loading the weights."""
        self.pretrained_cfg.pop('license', None)  # The licence so far is that of other weights.
        self.pretrained_cfg.update(preprocessing(self.backbone_name, source))

    def freeze_trunk(self) -> None:
        """Do not train the stem and the shared stages: from now on they run under no_grad, in eval mode."""
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
            for expert in self.experts:
                if isinstance(expert, LevelExpert):  # Its BatchNorm has fixed statistics of the frozen features.
                    expert.eval()
        return self

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The module that holds the classifiers of all experts."""
        return self.classifier

    def reset_classifier(
            self, num_classes: int, global_pool: Optional[str] = None, cosine_scale: Optional[float] = None) -> None:
        """Give every expert a new classifier with fresh weights and an unknown prior.

        Args:
            num_classes: Number of classes, 0 for no classifiers.
            global_pool: Pooling type. By default it does not change, but with classifiers, '' becomes the model's
                default pooling.
            cosine_scale: Factor that turns cosines into logits. By default it does not change.

        Raises:
            ValueError: If the pooling type is unknown, or is '' with classifiers, or if the scale is not above 0 or is
                given for linear classifiers.
        """
        num_classes = _whole_number('num_classes', num_classes)
        if global_pool is None and num_classes and not self.pool_type:
            global_pool = self.default_pool
        if cosine_scale is not None:
            if self.classifier_type != 'cosine' or not cosine_scale > 0:
                raise ValueError(
                    'cosine_scale must be above 0 and goes with cosine classifiers, '
                    f'got {cosine_scale} with {self.classifier_type} ones.')
            self.cosine_scale = float(cosine_scale)
        if global_pool is not None:
            known = ('', self.default_pool) if self.has_fixed_pool else ('', 'avg', 'max', 'avgmax')
            if global_pool not in known:
                raise ValueError(f"global_pool must be {' or '.join(map(repr, known))}, got '{global_pool}'.")
            if num_classes and not global_pool:
                raise ValueError(f"global_pool '' goes with num_classes=0, got {num_classes}: classifiers need it.")
            self.pool_type = global_pool
        self.global_pool = nn.Identity() if self.has_fixed_pool else SelectAdaptivePool2d(
            pool_type=self.pool_type, flatten=bool(self.pool_type), input_fmt=self.output_fmt)
        self.num_classes = num_classes
        self.head_hidden_size = self.head_width * self.num_experts
        self.classifier = nn.Identity()
        self.set_training_prior(None)
        self.temperature = 1.
        if num_classes:
            parameter = next(self.parameters())
            options = dict(scale=self.cosine_scale) if self.classifier_type == 'cosine' else {}
            classifier = CLASSIFIERS[self.classifier_type](
                self.num_experts, self.head_width, self.num_classes, **options)
            self.classifier = classifier.to(parameter.device, parameter.dtype)
        for module in (self.global_pool, self.classifier):
            module.train(self.training)

    @property
    def _model_args(self) -> Dict[str, Any]:
        """Arguments that timm saves in the configuration of a model: those of its creation and all later settings."""
        made_with = {**self.implied_args, **self.__dict__.get('_made_with', {})}
        args = {name: _without_numpy(value) for name, value in made_with.items()}
        now: Dict[str, Any] = dict(
            class_counts=self.class_counts, classifier_prior=self.classifier_prior, target_prior=self.target_prior,
            temperature=None if self.temperature == 1. else self.temperature)
        scale = getattr(self.classifier, 'scale', self.cosine_scale)
        if scale != COSINE_SCALE or 'cosine_scale' in args:
            now['cosine_scale'] = scale
        return {
            **{name: value for name, value in args.items() if name not in now},
            **{name: value for name, value in now.items() if value is not None}}

    @_model_args.setter
    def _model_args(self, made_with: Dict[str, Any]) -> None:
        self._made_with = {
            name: value for name, value in made_with.items()
            if name not in OLD_ARGUMENTS and (name != 'img_size' or self._backbone_args['img_size'])}

    def set_experts(self, experts: Sequence[int]) -> None:
        """Keep some of the experts and drop the rest for good. This trades accuracy for speed.

        Args:
            experts: Indices of the experts to keep, in their new order.

        Raises:
            ValueError: If an index is out of range or given twice, or `experts` is empty.
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
        self.fused_stages = list_stages(self.depths)
        self.num_experts = len(experts)
        self.head_hidden_size = self.head_width * self.num_experts
        self.feature_info[-1] = dict(self.feature_info[-1], num_chs=self.num_features)
        for name, weights in list(self.classifier.named_parameters()):
            setattr(self.classifier, name, nn.Parameter(weights.detach()[experts].clone(), weights.requires_grad))
        self._model_args = dict(self._model_args, num_experts=len(experts), depths=list(self.depths))

    def _levels(self, indices: Union[None, int, Sequence[int]]) -> List[int]:
        """Resolve level indices (negative ones count from the end), a number of last levels, or None for all levels."""
        num_levels = len(self.feature_info)
        if indices is None or isinstance(indices, (int, Integral)):
            indices = range(-num_levels if indices is None else -indices, 0)
        if not indices or not all(-num_levels <= i < num_levels for i in indices):
            raise ValueError(f'indices must be of the {num_levels} feature levels of the model, got {list(indices)}.')
        return [i % num_levels for i in indices]

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop all parts that the chosen feature levels do not need, and return the levels as indices from 0.

        Arguments are those of timm's models. `prune_norm` does nothing: norms after the last stage belong to experts.
        """
        levels = self._levels(indices)
        num_left = max(levels) + 1
        if num_left < len(self.feature_info):
            self.feature_info = self.feature_info[:num_left]
            self.stages = self.stages[:num_left - self.num_stem_levels]
            self.experts, self.depths, self.fused_stages = nn.ModuleList(), (), [0]
            self.num_experts = 1  # For a classifier, the features are those of one expert.
            level = self.feature_info[-1]
            self.num_features = level['num_chs']
            self.channel_dim = 1 if level['output_fmt'] == 'NCHW' else -1
            self.output_fmt, self.num_prefix_tokens = level['output_fmt'], level['num_prefix_tokens']
            prune_head = True
        if prune_head:
            self._pool_plainly(self.num_features // self.num_experts)
            self.reset_classifier(0, '')
        return levels

    def _forward_trunk(self, x: Tensor, every: bool = False) -> Tuple[Tensor, Dict[int, Tensor]]:
        """The output of the last shared stage that is needed, and features of the fused stages by number.

        With `every`, features of all stages are returned, the stem as stage 0. A frozen trunk keeps no activations.
        """
        if self.trunk_frozen:
            with torch.no_grad():
                return self._run_trunk(x, every)
        return self._run_trunk(x, every)

    def _run_trunk(self, x: Tensor, every: bool) -> Tuple[Tensor, Dict[int, Tensor]]:
        x = self.stem(x)  # The output is a tuple if later stages need more than features.
        shared: Dict[int, Tensor] = {}
        if every:
            shared[0] = x[0] if isinstance(x, tuple) else x
        last = len(self.stages) if every or self.has_private_stages else max(self.fused_stages)
        for i, stage in enumerate(self.stages):
            if i >= last:
                pass  # TorchScript unrolls the loop, so it cannot break.
            elif self.grad_checkpointing and not self.trunk_frozen and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            if every or i + 1 in self.fused_stages:
                shared[i + 1] = x[0] if isinstance(x, tuple) else x
        return x, shared  # pyright: ignore[reportReturnType]

    def _forward_fused(self, x: Tensor, shared: Dict[int, Tensor]) -> Tensor:
        """Fused features of all experts, from the outputs of `_forward_trunk`."""
        fused = []
        for expert in self.experts:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                fused.append(checkpoint(expert, x, shared))
            else:
                fused.append(expert(x, shared))
        return torch.cat(fused, dim=self.channel_dim) if len(fused) else shared[len(self.stages)]

    def forward_features(self, x: Tensor) -> Tensor:
        """Fused features of all experts, concatenated along the channels, in the format of the backbone.

        Maps are [B, num_features, h, w], or [B, h, w, num_features] for an NHWC backbone. Tokens are
        [B, N, num_features], class and register tokens first. The backbone's own last norm comes before the fusion.
        """
        x, shared = self._forward_trunk(x, every=not len(self.experts))
        return self._forward_fused(x, shared)

    @property
    def level_widths(self) -> List[int]:
        """Number of channels of the pooled features of each shared stage."""
        return [LevelPool(info).width for info in self.feature_info[self.num_stem_levels:-1]]

    @torch.jit.ignore()
    def pool_levels(self, x: Tensor) -> Tensor:
        """Pooled features [B, sum(level_widths)] of all shared stages from images [B, in_chans, H, W]."""
        _, shared = self._forward_trunk(x, every=True)
        infos = self.feature_info[self.num_stem_levels:-1]
        return torch.cat([LevelPool(info)(shared[i]) for i, info in enumerate(infos, 1)], dim=1)

    @torch.jit.ignore()
    def forward_levels(self, x: Tensor) -> Tensor:
        """The result of `forward_features`, from pooled features. All experts must be without private stages."""
        pooled = x.split(self.level_widths, dim=1)
        experts: Any = self.experts
        return torch.cat([expert.join([pooled[i - 1] for i in expert.levels]) for expert in experts], dim=1)

    def forward_intermediates(
            self, x: Tensor, indices: Optional[Union[int, List[int]]] = None, norm: bool = False,
            stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Features of chosen levels of `feature_info` from images [B, in_chans, H, W].

        Arguments are those of timm's models. `norm` does nothing, since norms after the last stage belong to experts.
        With `stop_early`, experts do not run if no chosen level needs them. `output_fmt` is 'NCHW' or the backbone's
        own format. Only the own format includes class and register tokens.

        Returns:
            The final features in the backbone's own format and the list of features of the levels, or only the list.
        """
        if output_fmt not in ('NCHW', self.output_fmt):
            raise ValueError(f"output_fmt must be 'NCHW' or '{self.output_fmt}', got '{output_fmt}'.")
        levels, size = self._levels(indices), x.shape[2:]
        x, shared = self._forward_trunk(x, every=True)
        # The list starts at the stem (0) if the stem is a feature level, else at the first stage (1).
        features = [shared[i] for i in range(1 - self.num_stem_levels, len(self.stages) + 1)]
        if len(self.experts) and not (stop_early and max(levels) < len(features)):
            features.append(self._forward_fused(x, shared))
        intermediates = [
            to_map(features[i], self.feature_info[i], size) if output_fmt == 'NCHW' else features[i] for i in levels]
        if intermediates_only:
            return intermediates
        return features[-1], intermediates

    def forward_expert_head(self, x: Tensor) -> Tensor:
        """Logits of each expert [B, M, num_classes] from features of `forward_features`."""
        x = self.forward_head(x, pre_logits=True)
        return self.adjust(self.classifier(x.unflatten(1, (self.num_experts, -1))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Averaged logits [B, num_classes], or vectors [B, head_hidden_size] if `pre_logits` or without classifiers."""
        if self.has_own_heads:
            if self.pool_type:
                parts, vectors = x.chunk(self.num_experts, dim=self.channel_dim), []
                for m, expert in enumerate(self.experts):
                    vectors.append(expert.head(parts[m]))
                x = torch.cat(vectors, dim=1)
        elif self.output_fmt == 'NLC':
            x = x[:, self.num_prefix_tokens:].mean(1) if self.pool_type else x
        else:
            x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or self.num_classes == 0:
            return x
        return self.adjust(self.classifier(x.unflatten(1, (self.num_experts, -1))).mean(1))

    def forward_experts(self, x: Tensor) -> Tensor:
        """Logits of each expert [B, M, num_classes] from images [B, in_chans, H, W] or features of `pool_levels`."""
        return self.forward_expert_head(self.forward_levels(x) if x.ndim == 2 else self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits averaged over experts [B, num_classes] from images [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))
