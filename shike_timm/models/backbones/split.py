"""Any convolutional network of timm, cut into stem, shared and private stages. One forward pass shows where."""
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from torch import Tensor, nn

from .backbone import Backbone

_MIN_REDUCTION = 4  # of a stage; the modules at a higher resolution are the stem


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"backbone '{name}' cannot be split: {reason}, choose another convolutional network.")


def _pieces(net: nn.Module, levels: Sequence[str], prefix: str = ''):
    """Modules of a network by name. A module with a feature level inside comes as its parts."""
    for name, child in net.named_children():
        path = prefix + name
        if any(level.startswith(path + '.') for level in levels):
            yield from _pieces(child, levels, path + '.')
        else:
            yield path, child


@torch.inference_mode(False)  # inference mode does not count how often a tensor is written to
@torch.no_grad()
def find_chain(net: Any, name: str, in_chans: int) -> List[str]:
    """Names of the modules in `forward_features` of a timm model on the meta device, each called on the last output."""
    levels = [info['module'] for info in getattr(net, 'feature_info', None) or []]
    if not hasattr(net, 'forward_features') or len(levels) < 2:
        raise _refusal(name, 'timm knows no feature levels of it')
    if getattr(net, 'output_fmt', 'NCHW') != 'NCHW':
        raise _refusal(name, f'its feature maps are {net.output_fmt} and experts fuse NCHW ones')
    value = torch.empty(1, in_chans, *net.default_cfg['input_size'][1:], device='meta', dtype=torch.float32)
    version = value._version  # how often it has been written to
    outputs: Dict[str, Tuple[Any, Any]] = {}

    def before(path: str, inputs: Tuple[Any, ...]) -> None:
        if len(inputs) != 1 or inputs[0] is not value or path in outputs or (
                getattr(value, '_version', None) != version):
            raise _refusal(name, f"more than a chain of modules happens before '{path}'")

    def after(path: str, output: Any) -> None:
        nonlocal value, version
        value, version = output, getattr(output, '_version', None)
        outputs[path] = value, version

    for path, module in _pieces(net, levels):
        module.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: before(path, (*args, *kwargs.values())), with_kwargs=True)
        module.register_forward_hook(lambda _, args, output, path=path: after(path, output))
    output = net.eval().forward_features(value)
    missing = [level for level in levels if level not in outputs]
    if missing or output is not value:
        raise _refusal(
            name, 'its features are not the output of a chain of modules '
            f"('{missing[0] if missing else levels[-1]}' is left out)")
    for level in levels[:-1]:
        features, written = outputs[level]
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise _refusal(name, f"'{level}' gives no feature map [B, C, h, w]")
        if features._version != written:
            raise _refusal(name, f"a later module overwrites the features of '{level}', which experts share")
    if value.ndim != 4 or value.shape[1] != net.num_features:
        raise _refusal(name, f'its last stage gives no feature map [B, {net.num_features}, h, w]')
    return list(outputs)


def _find_parts(
        net: Any, name: str, in_chans: int, private_stages: int) -> Tuple[List[List[str]], List[Dict[str, Any]]]:
    """Names of the modules of stem, shared and private stages, and the feature levels at their ends."""
    chain = find_chain(net, name, in_chans)
    *levels, last = net.feature_info
    stem = [level for level in levels if level['reduction'] < _MIN_REDUCTION][-1:]
    shared = [level for level in levels if level['reduction'] >= _MIN_REDUCTION]
    if not shared:
        raise _refusal(name, 'no stage comes before its last one')
    if private_stages > len(shared):
        raise ValueError(f"private_stages of '{name}' must be 1 to {len(shared)}, got {private_stages}.")
    shared = shared[:len(shared) + 1 - private_stages]
    ends = [chain.index(level['module']) + 1 for level in shared]
    # If no level has a high resolution, the first stage is a single module, and the stem is all before it.
    start = chain.index(stem[0]['module']) + 1 if stem else ends[0] - 1
    bounds = [0, start, *ends, len(chain)]
    return [chain[a:b] for a, b in zip(bounds, bounds[1:])], [*stem, *shared, last]


def _take_part(net: nn.Module, paths: Sequence[str]) -> nn.Module:
    modules = []
    for module in map(net.get_submodule, paths):
        modules += list(module) if type(module) is nn.Sequential else [module]
    return nn.Sequential(*modules)


def _create_skeleton(name: str, **kwargs: Any) -> Any:
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
        private_stages: int = 1,
        **options: Any,
) -> Backbone:
    """A convolutional network of timm, made with options of `timm.create_model` and cut at timm's feature levels."""
    if not timm.is_model(name.split('.')[0]):
        raise ValueError(f"backbone '{name}' is not a model of timm: see timm.list_models().")
    kwargs = dict(  # timm ignores None
        num_classes=0, in_chans=in_chans, drop_path_rate=drop_path_rate,
        output_stride=output_stride if output_stride != 32 else None)
    try:
        skeleton = _create_skeleton(name, **kwargs)
    except ValueError:
        if drop_path_rate != 0:
            raise
        kwargs.update(drop_path_rate=None)  # a network without stochastic depth has a rate of 0
        skeleton = _create_skeleton(name, **kwargs)
    parts, levels = _find_parts(skeleton, name, in_chans, private_stages)
    first_conv = skeleton.default_cfg['first_conv']
    if not first_conv:
        raise _refusal(name, 'timm does not say which convolution sees the images')
    nets = [timm.create_model(name, **kwargs, **options) for _ in range(num_experts)]
    stem, *stages = (_take_part(nets[0], paths) for paths in parts[:-1])
    channels = [*(level['num_chs'] for level in levels[:-1]), skeleton.num_features]
    return Backbone(
        stem=stem,
        stages=stages,
        last_stages=[_take_part(net, parts[-1]) for net in nets],
        feature_info=[dict(num_chs=chs, reduction=level['reduction']) for chs, level in zip(channels, levels)],
        first_conv=[nets[0].get_submodule(c) for c in ([first_conv] if isinstance(first_conv, str) else first_conv)],
        initialised=True,
        name=name,
    )
