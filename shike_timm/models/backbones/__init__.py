"""Backbones as SHIKE sees them: a stem, the shared stages, and last stages, one for every expert."""
import copy
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import load_state_dict
from timm.models.resnet import BasicBlock, make_blocks
from torch import Tensor, nn

__all__ = ['Backbone', 'BackboneFn', 'cifar_resnet', 'tagged_name', 'timm_backbone']

_MIN_REDUCTION = 4  # what comes before, at a higher resolution, is the stem


@dataclass
class Backbone:
    """A convolutional network cut into stages.

    Attributes:
        stem: Everything before the first shared stage.
        stages: The shared stages in order.
        last_stages: The last stage, once per expert.
        feature_info: Channels `num_chs` and `reduction` (input resolution over the activation's) of the stem, if that
            is one of the network's feature levels, of each shared stage and of the last stage.
        first_conv: The convolutions that see the images.
        initialised: Whether the parameters have the values to start from, or any will do.
    """

    stem: nn.Module
    stages: List[nn.Module]
    last_stages: List[nn.Module]
    feature_info: List[Dict[str, int]]
    first_conv: List[nn.Module]
    initialised: bool


BackboneFn = Callable[..., Backbone]


def cifar_resnet(
        blocks_per_stage: int,
        num_experts: int,
        in_chans: int = 3,
        drop_path_rate: Optional[float] = None,
        output_stride: int = 32,
        pretrained: Union[bool, str] = False,
        **dd: Any,
) -> Backbone:
    """The CIFAR ResNet of depth 6 n + 2: a 3x3 stem and three stages of n basic blocks with 16, 32 and 64 channels.

    Args:
        blocks_per_stage: Blocks n of each stage.
        num_experts: Last stages to make.
        in_chans: Channels of the input images.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0. None is 0.
        output_stride: Only 32, which leaves the strides as they are.
        pretrained: Only False, since timm has no such network.
        **dd: Device and data type of the parameters.

    Raises:
        ValueError: If pretrained weights or another output stride are asked for.
    """
    if pretrained:
        raise ValueError('pretrained_backbone: there are no weights of the CIFAR ResNet, leave it out.')
    if output_stride != 32:
        raise ValueError(f'output_stride of the CIFAR ResNet cannot be changed, got {output_stride}: leave it out.')
    channels = (16, 32, 64)
    conv = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
    stages, _ = make_blocks(
        (BasicBlock,) * 3, channels, (blocks_per_stage,) * 3, inplanes=16, drop_path_rate=drop_path_rate or 0., **dd)
    *shared, last = [stage for _, stage in stages]
    return Backbone(
        stem=nn.Sequential(conv, nn.BatchNorm2d(16, **dd), nn.ReLU(inplace=True)),
        stages=shared,
        last_stages=[last] + [copy.deepcopy(last) for _ in range(num_experts - 1)],
        feature_info=[dict(num_chs=chs, reduction=red) for chs, red in zip((16, *channels), (1, 1, 2, 4))],
        first_conv=[conv],
        initialised=False,
    )


def _pieces(net: nn.Module, levels: Sequence[str], prefix: str = ''):
    """Modules of a network, by name, opened up only where a feature level lies inside."""
    for name, child in net.named_children():
        path = prefix + name
        if any(level.startswith(path + '.') for level in levels):
            yield from _pieces(child, levels, path + '.')
        else:
            yield path, child


class _Call:
    """A module's call: what it took and gave, and how often either had been written to by then."""

    def __init__(self, path: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]):
        self.path = path
        self.inputs = (*args, *kwargs.values())
        self.version_before = getattr(self.inputs[0], '_version', None)

    def finish(self, output: Any) -> None:
        self.output = output
        self.output_version = getattr(output, '_version', None)

    def takes(self, value: Any) -> bool:
        return len(self.inputs) == 1 and self.inputs[0] is value


@torch.inference_mode(False)  # where tensors do not count how often they are written to
@torch.no_grad()
def _chain(net: nn.Module, name: str, in_chans: int) -> List[str]:
    """Names of the modules that make up `net.forward_features`, each called on what the one before returned.

    Args:
        net: A timm model on the meta device.
        name: Its name, for messages.
        in_chans: Channels of its input.

    Raises:
        ValueError: If the model is anything but such a chain of convolutional feature maps; one sentence says why.
    """
    levels = [info['module'] for info in getattr(net, 'feature_info', None) or []]
    if not hasattr(net, 'forward_features') or len(levels) < 2:
        raise ValueError(f"backbone '{name}' cannot be split: timm knows no feature levels of it, choose another.")
    if getattr(net, 'output_fmt', 'NCHW') != 'NCHW':
        raise ValueError(
            f"backbone '{name}' cannot be split: its feature maps are {net.output_fmt} and experts fuse NCHW ones, "
            'choose a convolutional network.')
    calls: List[_Call] = []
    for path, module in _pieces(net, levels):
        module.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: calls.append(_Call(path, args, kwargs)), with_kwargs=True)
        module.register_forward_hook(lambda _, args, output: calls[-1].finish(output))
    value = torch.empty(1, in_chans, *net.default_cfg['input_size'][1:], device='meta', dtype=torch.float32)
    output = net.eval().forward_features(value)
    outputs: Dict[str, _Call] = {}
    version = value._version
    for call in calls:
        if not call.takes(value) or call.version_before != version or call.path in outputs:
            raise ValueError(
                f"backbone '{name}' cannot be split: more than a chain of modules happens before '{call.path}', "
                'choose a convolutional network.')
        outputs[call.path] = call
        value, version = call.output, call.output_version
    missing = [level for level in levels if level not in outputs]
    if missing or output is not value:
        raise ValueError(
            f"backbone '{name}' cannot be split: its features are not the output of a chain of modules "
            f"('{missing[0] if missing else levels[-1]}' is left out), choose a convolutional network.")
    for level in levels[:-1]:
        if not isinstance(outputs[level].output, Tensor) or outputs[level].output.ndim != 4:
            raise ValueError(
                f"backbone '{name}' cannot be split: '{level}' gives no feature map [B, C, h, w], "
                'choose a convolutional network.')
        if outputs[level].output._version != outputs[level].output_version:
            raise ValueError(
                f"backbone '{name}' cannot be split: a later module overwrites the features of '{level}', which "
                'experts share, choose another.')
    if value.ndim != 4 or value.shape[1] != net.num_features:
        raise ValueError(
            f"backbone '{name}' cannot be split: its last stage gives no feature map [B, {net.num_features}, h, w], "
            'choose a convolutional network.')
    return list(outputs)


def _sequence(net: nn.Module, paths: Sequence[str]) -> nn.Sequential:
    modules = []
    for path in paths:
        module = net.get_submodule(path)
        modules += list(module) if type(module) is nn.Sequential else [module]
    return nn.Sequential(*modules)


def _is_file(source: str) -> bool:
    return os.path.isfile(source) or os.sep in source or '.' in source


def tagged_name(name: str, source: Union[None, bool, str]) -> str:
    """Name of the timm model whose weights a pretrained source stands for: with its tag, if it is one."""
    return f"{name.split('.')[0]}.{source}" if isinstance(source, str) and not _is_file(source) else name


def _read_weights(name: str, source: str) -> Dict[str, Tensor]:
    try:
        weights = load_state_dict(source)
        keys = [key for key, value in weights.items() if isinstance(value, Tensor)]
    except FileNotFoundError:
        raise ValueError(f"pretrained_backbone '{source}' is neither a file nor a tag of '{name}'.") from None
    except Exception as error:  # a damaged file can make torch or safetensors raise nearly anything
        raise ValueError(
            f"pretrained_backbone '{source}' cannot be read: expected a state dict of timm's '{name}', saved by "
            'torch or safetensors with nothing but tensors and plain values in it.') from error
    # timm would load what fits and stay silent about the rest, since the classifier is left out.
    own = timm.create_model(name, num_classes=0, device='meta').state_dict()
    missing = [key for key in own if key not in keys and not key.endswith('num_batches_tracked')]
    if missing:
        raise ValueError(
            f"pretrained_backbone '{source}' has no '{missing[0]}': expected a state dict of timm's '{name}'.")
    return weights


def _create_pretrained(name: str, source: Union[bool, str], **kwargs: Any) -> nn.Module:
    if source is True or not _is_file(source):
        return timm.create_model(tagged_name(name, source), pretrained=True, **kwargs)
    overlay = dict(state_dict=_read_weights(name, source))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def _create_skeleton(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, **kwargs, device='meta')
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).split('__init__() ')[-1].rstrip('.')
        given = ', '.join(
            f'{key}={value}' for key, value in kwargs.items() if value is not None and key != 'num_classes')
        raise ValueError(f"backbone '{name}' cannot be made with {given}{reason and f': {reason}'}.") from error


def timm_backbone(
        name: str,
        num_experts: int,
        in_chans: int = 3,
        drop_path_rate: Optional[float] = None,
        output_stride: int = 32,
        pretrained: Union[bool, str] = False,
        cache_dir: Optional[str] = None,
        **dd: Any,
) -> Backbone:
    """A convolutional network of timm, cut where its own feature information says that the last stage begins.

    Args:
        name: Name of timm's model, tag included if need be.
        num_experts: Last stages to make: copies of the pretrained one, or each with initial values of its own.
        in_chans: Channels of the input images.
        drop_path_rate: Stochastic depth rate, for networks that have one; None leaves them theirs.
        output_stride: Input over output resolution, for networks that can be dilated.
        pretrained: False for timm's initial values, True for timm's default weights, the tag of others, or the path of
            a state dict in timm's layout.
        cache_dir: Folder that downloaded weights are kept in.
        **dd: Device and data type of the parameters.

    Raises:
        ValueError: If there is no such network, it cannot be split, or it lacks an option; the message says which.
    """
    if not timm.is_model(name.split('.')[0]):
        raise ValueError(f"backbone '{name}' is not a model of timm: see timm.list_models().")
    kwargs = dict(num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate)  # timm leaves out what is None
    kwargs.update(output_stride=output_stride if output_stride != 32 else None)
    try:
        skeleton = _create_skeleton(name, **kwargs)
    except ValueError:
        if drop_path_rate != 0:
            raise
        kwargs.update(drop_path_rate=None)  # a network without stochastic depth has a rate of 0
        skeleton = _create_skeleton(name, **kwargs)
    chain = _chain(skeleton, name, in_chans)
    *levels, last = skeleton.feature_info
    shared = [level for level in levels if level['reduction'] >= _MIN_REDUCTION]
    if not shared:
        raise ValueError(f"backbone '{name}' cannot be split: no stage comes before its last one, choose another.")
    stem = [level for level in levels if level['reduction'] < _MIN_REDUCTION][-1:]
    first_conv = skeleton.default_cfg['first_conv']
    first_conv = [first_conv] if isinstance(first_conv, str) else first_conv
    if not first_conv:
        raise ValueError(
            f"backbone '{name}' cannot be split: timm does not say which convolution sees the images, choose another.")
    ends = [chain.index(level['module']) + 1 for level in shared]
    # A network without a level of high resolution has its stem end where its first stage begins.
    start = chain.index(stem[0]['module']) + 1 if stem else ends[0] - 1

    if pretrained:
        nets = [_create_pretrained(name, pretrained, cache_dir=cache_dir, **kwargs, **dd)]
    else:
        nets = [timm.create_model(name, **kwargs, **dd) for _ in range(num_experts)]
    last_stages = [_sequence(net, chain[ends[-1]:]) for net in nets]
    last_stages += [copy.deepcopy(last_stages[0]) for _ in range(num_experts - len(nets))]
    trunk = nets[0]
    return Backbone(
        stem=_sequence(trunk, chain[:start]),
        stages=[_sequence(trunk, chain[a:b]) for a, b in zip([start, *ends], ends)],
        last_stages=last_stages,
        feature_info=[
            *(dict(num_chs=level['num_chs'], reduction=level['reduction']) for level in [*stem, *shared]),
            dict(num_chs=trunk.num_features, reduction=last['reduction']),
        ],
        first_conv=[trunk.get_submodule(path) for path in first_conv],
        initialised=True,
    )
