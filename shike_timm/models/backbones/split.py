"""Cutting of any timm network into stem, shared and private stages, at places found in a trace of its forward pass."""
import inspect
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, fx, nn

from ...errors import nearest, one_line
from .backbone import Backbone, is_column
from .trace import is_overwritten, make_part, trace

_MIN_REDUCTION = 4  # Least reduction of a stage. Modules at a higher resolution belong to the stem.
_PRIVATE_PART = 6  # By default one in so many blocks of a column is private.


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"backbone '{name}' cannot be split: {reason}, choose another network.")


@dataclass
class _Cut:
    """A place between two parts of a network."""

    end: int  # Number of nodes before the place.
    outputs: List[fx.Node]  # Nodes whose values are passed on: the features, then what later parts need.
    index: Optional[int] = None  # Index of the features in their node's value, if the value is a tuple.
    level: Dict[str, Any] = field(default_factory=dict)  # Description of the features as in `Backbone.feature_info`.


class Split:
    """Finds the parts of a timm model on the meta device, and takes them from other instances of the model."""

    def __init__(self, net: Any, name: str):
        infos, modules = [dict(info) for info in getattr(net, 'feature_info', None) or []], dict(net.named_modules())
        if not hasattr(net, 'forward_features') or len(infos) < 2:
            raise _refusal(name, 'timm knows no feature levels of it')
        for info in infos:  # timm names some modules relative to a part, or by an older name.
            own = info['module']
            names = (own, f'encoder.{own}', own.replace('block.', 'blocks.'), own.replace('block.', 'stages.'))
            info['module'] = next((one for one in names if one in modules), '')
        self.name, self.net, self.levels = name, net, [info['module'] for info in infos if info['module']]
        channels, *self.size = get_model_input_config(net)['input_size']
        images = torch.empty(2, channels, *self.size, device='meta', dtype=torch.float32)
        self.nodes = self._trace('forward_features', images)
        features = self.nodes[-1].meta['value']
        if isinstance(features, (tuple, list)):
            raise _refusal(name, f'its last stage gives {len(features)} features of which experts would fuse one')
        last = self._describe(dict(infos[-1], num_chs=net.num_features), features)
        if last is None:
            raise _refusal(name, f'its last stage gives no features of {net.num_features} channels')
        # timm's encoders, such as Qwen3VitEncoder, have no head.
        self.head = self._trace('forward_head', features) if hasattr(net, 'get_classifier') else []
        self.cuts = [self._cut_after(info) for info in infos[:-1] if self._places(info['module'])]
        if not self.cuts:
            raise _refusal(name, 'its forward pass calls none of the stages that timm names')
        # A small difference is normal, since convolutions without padding lose a row or two.
        if last['output_fmt'] == 'NCHW' and abs(features.shape[2] * last['reduction'] / self.size[0] - 1) > 0.25:
            raise _refusal(name, f'its last stage gives {features.shape[2]} rows of features whatever the image is')
        self.cuts.append(_Cut(len(self.nodes) - 1, self.nodes[-1].all_input_nodes, level=last))

    def _trace(self, method: str, value: Tensor) -> List[fx.Node]:
        try:
            return trace(self.net, self.levels, method, value)
        except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise _refusal(self.name, f'its {method} cannot be traced ({one_line(error)})') from error

    def _describe(self, info: Dict[str, Any], value: Any) -> Optional[Dict[str, Any]]:
        """The `feature_info` of features, None if they are neither a feature map nor tokens of `num_chs` channels."""
        shape, num_chs = tuple(getattr(value, 'shape', ())), info['num_chs']
        level = dict(module=info['module'], num_chs=num_chs, reduction=info['reduction'], num_prefix_tokens=0)
        if len(shape) == 3 and shape[2] == num_chs:
            height, width = (-(-side // level['reduction']) for side in self.size)
            prefix = shape[1] - height * width
            has_map = prefix >= 0 and not hasattr(self.net, 'reroll')  # Hiera's tokens are not in the image's order.
            return dict(level, output_fmt='NLC', num_prefix_tokens=max(prefix, 0), has_map=has_map)
        if len(shape) != 4 or num_chs not in (shape[1], shape[3]):
            return None
        nhwc = shape[3] == num_chs and (shape[1] != num_chs or getattr(self.net, 'output_fmt', '') == 'NHWC')
        return dict(level, output_fmt='NHWC' if nhwc else 'NCHW')

    def _places(self, name: str) -> List[int]:
        """Indices of the nodes that call a module or, if it is a list of modules, the modules in it."""
        return [i for i, node in enumerate(self.nodes) if name and node.op == 'call_module' and (
            node.target == name or str(node.target).startswith(name + '.'))]

    def _alive(self, end: int) -> List[fx.Node]:
        later = set(self.nodes[end:])
        return [node for node in self.nodes[:end] if later.intersection(node.users)]

    def _cut_after(self, info: Dict[str, Any]) -> _Cut:
        name = info['module']
        end = self._places(name)[-1] + 1
        node = self.nodes[end - 1]
        value = node.meta['value']
        candidates = list(enumerate(value)) if isinstance(value, (tuple, list)) else [(None, value)]
        found = [(i, level) for i, one in candidates if (level := self._describe(info, one))]
        if not found and isinstance(value, list):  # Maps of several resolutions, which get num_chs channels later.
            found = [
                (i, dict(level, output_fmt='NCHW')) for i, one in candidates if one.ndim == 4 and (
                    level := dict(info, num_chs=one.shape[1], num_prefix_tokens=0))
                and one.shape[2] * info['reduction'] == self.size[0]]
        if not found:
            raise _refusal(self.name, f"'{name}' gives no features of {info['num_chs']} channels")
        index, level = found[0]
        outputs = [node, *(one for one in self._alive(end) if one is not node or index is not None)]
        if any(map(is_overwritten, outputs)):
            raise _refusal(self.name, f"a later module overwrites the features of '{name}', which experts share")
        return _Cut(end, outputs, index, level)

    def all_levels(self, cuts: Sequence[_Cut]) -> List[_Cut]:
        """These cuts, and all places after the first where a block passes on one feature map and nothing else."""
        levels = {cut.end: cut for cut in cuts}
        if any(cut.level['output_fmt'] != 'NCHW' for cut in cuts):
            return list(cuts)
        for end in range(cuts[0].end + 1, self.cuts[-1].end):
            node = self.nodes[end - 1]
            value = node.meta['value']
            parts = list(self.net.get_submodule(str(node.target)).modules()) if node.op == 'call_module' else []
            is_block = len(parts) > 1 and any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in parts)
            if end in levels or not is_block or getattr(value, 'ndim', 0) != 4 or self._alive(end) != [node]:
                continue
            info = dict(module=node.target, num_chs=value.shape[1], reduction=round(self.size[0] / value.shape[2]))
            level = self._describe(info, value)
            if level and level['output_fmt'] == 'NCHW' and not is_overwritten(node):
                levels[end] = _Cut(end, [node], level=level)
        return [levels[end] for end in sorted(levels)]

    def cut_before(self, name: str) -> _Cut:
        """The cut before a module. The first argument of the module is the first output."""
        end = self._places(name)[0]
        return _Cut(end, sorted(self._alive(end), key=lambda node: node not in self.nodes[end].args[:1]))

    def parts(self, net: nn.Module, cuts: Sequence[_Cut]) -> List[nn.Module]:
        """The parts of an instance of the network, each of which ends at one of the cuts."""
        starts = [_Cut(1, self.nodes[:1]), *cuts]
        return [
            make_part(net, self.nodes[a.end:b.end], a.outputs, b.outputs, b.index) for a, b in zip(starts, cuts)]

    @property
    def has_own_head(self) -> bool:
        """Whether more than pooling of a map is done between features and classifier."""
        if self.cuts[-1].level['output_fmt'] == 'NLC':
            return bool(self.head)
        return any(
            node.op == 'get_attr' or node.op == 'call_module' and any(
                isinstance(part, nn.LayerNorm) or list(part.parameters())
                for part in self.net.get_submodule(str(node.target)).modules())
            for node in self.head)

    def make_head(self, net: nn.Module) -> nn.Module:
        """The module from features to vectors, taken from an instance of the network."""
        return make_part(net, self.head[1:-1], self.head[:1], self.head[-1].all_input_nodes)


def _create_skeleton(name: str, **kwargs: Any) -> Any:
    try:
        return timm.create_model(name, num_classes=0, **kwargs, device='meta')
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).split('__init__() ')[-1].rstrip('.')
        given = ', '.join(f'{key}={value}' for key, value in kwargs.items() if value is not None)
        raise ValueError(f"backbone '{name}' cannot be made with {given}{reason and f': {reason}'}.") from error


def _count_private(name: str, column: bool, num_levels: int, stages: Optional[int], blocks: Optional[int]) -> int:
    if 0 in (stages, blocks):
        return 0
    unit, other, given, wrong = ('blocks', 'stages', blocks, stages) if column else ('stages', 'blocks', stages, blocks)
    if wrong is not None:
        raise ValueError(f"'{name}' is made of {unit}: give private_{unit} in place of private_{other}.")
    number = given or (max(round(num_levels / _PRIVATE_PART), 1) if column else 1)
    if number >= num_levels:
        raise ValueError(f"private_{unit} of '{name}' must be 1 to {num_levels - 1}, got {number}.")
    return number


@torch.inference_mode(False)  # Inference mode does not count writes to a tensor, which `is_overwritten` needs.
def timm_backbone(
        name: str, num_experts: int, in_chans: int = 3, drop_path_rate: Optional[float] = None, output_stride: int = 32,
        private_stages: Optional[int] = None, private_blocks: Optional[int] = None, global_pool: Optional[str] = None,
        img_size: Union[None, int, Tuple[int, int]] = None, weights: Optional[Dict[str, Any]] = None,
        device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None, **options: Any,
) -> Backbone:
    """A network of timm, made with options of `timm.create_model` and cut at timm's feature levels.

    `private_blocks` is for columns of blocks (ViT), `private_stages` for the others. Networks that take images of any
    size ignore `img_size`. `weights` are the options of `pretrained_options` without the name.
    """
    if not timm.is_model(name.split('.')[0]):
        near = nearest(name, timm.list_models())
        raise ValueError(f"backbone '{name}' is not a model of timm{near}: see timm.list_models().")
    kwargs: Dict[str, Any] = dict(  # timm ignores None.
        in_chans=in_chans, drop_path_rate=drop_path_rate, output_stride=output_stride if output_stride != 32 else None,
        **options)
    try:
        net = _create_skeleton(name, **kwargs)
    except ValueError:
        if drop_path_rate != 0:
            raise
        kwargs.update(drop_path_rate=None)  # A network without this argument has no stochastic depth: rate 0.
        net = _create_skeleton(name, **kwargs)
    has_size = 'img_size' in inspect.signature(type(net)).parameters
    if has_size and img_size is not None:
        kwargs.update(img_size=img_size)
        net = _create_skeleton(name, **kwargs)
    split = Split(net, name)
    if split.has_own_head and global_pool and 0 not in (private_stages, private_blocks):
        kwargs.update(global_pool=global_pool)
        split = Split(net := _create_skeleton(name, **kwargs), name)
    *levels, last = split.cuts
    stem = [cut for cut in levels if cut.level['reduction'] < _MIN_REDUCTION][-1:]
    shared = [cut for cut in levels if cut.level['reduction'] >= _MIN_REDUCTION]
    if not shared:
        raise _refusal(name, 'no stage comes before its last one')
    column = is_column([cut.level for cut in split.cuts])
    private = _count_private(name, column, len(shared) + 1, private_stages, private_blocks)
    shared = shared[:len(shared) + 1 - private] if private else split.all_levels(shared) + [last]
    # If no level has a high resolution, the stem is everything before the module of the first stage.
    start = stem or [split.cut_before(shared[0].level['module'])]
    first_conv = net.default_cfg['first_conv'] or ()
    nets = [
        timm.create_model(name, num_classes=0, **kwargs, **(weights or {}), device=device, dtype=dtype)
        for _ in range(num_experts if private else 1)]
    parts = [split.parts(one, [*start, *shared, *([last] if private else [])]) for one in nets]
    input_config = get_model_input_config(net)
    return Backbone(
        stem=parts[0][0],
        stages=parts[0][1:-1] if private else parts[0][1:],
        last_stages=[of_net[-1] for of_net in parts] if private else [],
        feature_info=[cut.level for cut in (*stem, *shared, *([last] if private else []))],
        first_conv=[nets[0].get_submodule(c) for c in ([first_conv] if isinstance(first_conv, str) else first_conv)],
        initialised=True, name=name,
        heads=[split.make_head(one) for one in nets] if private and split.has_own_head else None,
        global_pool=global_pool or (
            net.global_pool if private and isinstance(getattr(net, 'global_pool', 0), str) else 'avg'),
        head_hidden_size=split.head[-1].meta['value'].shape[-1] if private and split.head else None,
        img_size=tuple(input_config['input_size'][1:]) if has_size else None,
        fixed_input_size=input_config['fixed_input_size'],
        no_weight_decay=net.no_weight_decay() if hasattr(net, 'no_weight_decay') else set(),
    )
