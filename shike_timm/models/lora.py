"""Low-rank updates (LoRA, https://arxiv.org/abs/2106.09685) of pretrained linear layers, with the package peft."""
import logging
import re
from typing import Dict, Sequence

import torch
from torch import nn

from ..errors import InputError
from .shike import Shike

_logger = logging.getLogger(__name__)


def add_lora(model: Shike, rank: int, input_size: Sequence[int]) -> None:
    """Freeze trunk and experts, and add a trainable low-rank update to each of their linear layers that is called.

    A layer uses `W + B A` in place of `W`, where `B` starts at zero. A frozen trunk gets no updates. All weights of
    aligners and classifiers are trained. `input_size` is channels, height and width of an image.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError('--lora needs the package peft: pip install "shike-timm[lora]".') from error
    fresh = 'classifier.', *(f'{name}.' for name, _ in model.named_modules() if name.endswith('.aligner'))
    frozen = ('stem.', 'stages.') if model.trunk_frozen else ()
    linear: Dict[nn.Module, str] = {
        module: name for name, module in model.named_modules()
        if type(module) is nn.Linear and not name.startswith((*fresh, *frozen))}
    names = set()
    # Some networks read the weights of a layer without calling the layer. An update of it would change nothing.
    hooks = [one.register_forward_hook(lambda module, _, __: names.add(linear[module])) for one in linear]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    if not names:
        raise InputError('--lora updates linear layers, and this model has none to train: leave it out.')
    pattern = '|'.join(map(re.escape, sorted(names)))
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), model)
    for name, parameter in model.named_parameters():
        if name.startswith(fresh):
            parameter.requires_grad_(True)
    sizes = [(one.numel(), one.requires_grad) for one in model.parameters()]
    _logger.info(
        f'LoRA: rank {rank} in {len(names)} of {len(linear)} linear layers. '
        f'{sum(size for size, learns in sizes if learns) / 1e6:.2f} of {sum(size for size, _ in sizes) / 1e6:.2f} '
        'million parameters are trained.')


def merge_lora(model: Shike) -> None:
    """Add the low-rank updates to the weights, so that all layers are ordinary linear layers again."""
    from peft.tuners.lora import LoraLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
