#!/usr/bin/env python3
"""Convert a checkpoint of the authors' CIFAR code to a model folder, which loads as local-dir:OUTPUT.

Their checkpoints hold two sets of classifiers: the retrained ones (rt_classifiers), and those of stage one
(classifiers).
"""
import argparse
import re
import sys
from pathlib import Path
from typing import Dict, List, cast

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor

from shike_timm.checkpoints import load_checkpoint, load_weights
from shike_timm.cli.script import run_script
from shike_timm.errors import InputError
from shike_timm.models import Shike
from shike_timm.pretrained.folder import export_model

PRIORS = {'rt_classifiers': 'uniform', 'classifiers': 'train'}  # class frequencies that each set was trained for

HEAD = re.compile(r'(rt_classifiers|classifiers)\.(\d+)\.weight')
LINK = re.compile(r'shallow_exps\.(\d+)\.convs\.StridedConv(\d+)\.conv\.([01])\.(\w+)')
STEM = re.compile(r'(conv1|bn1)\.(\w+)')
BLOCK = re.compile(r'(?:layer([12])|layer3s\.(\d+))\.(\d+)\.(conv1|bn1|conv2|bn2|shortcut\.[01])\.(\w+)')


def translate_name(name: str, chains: Dict[str, List[int]]) -> str:
    """Our name of a parameter outside the classifiers. `chains` has the links of each expert's aligner in order."""
    if match := STEM.fullmatch(name):
        return f"stem.{'0' if match[1] == 'conv1' else '1'}.{match[2]}"
    if match := BLOCK.fullmatch(name):
        owner = f'stages.{int(match[1]) - 1}' if match[1] else f'experts.{match[2]}.stage'
        return '.'.join([owner, match[3], match[4].replace('shortcut', 'downsample'), match[5]])
    match = LINK.fullmatch(name)
    if match and int(match[2]) in chains.get(match[1], ()):
        # Convolution, BatchNorm and ReLU for each link. The link at index 1 has no ReLU.
        place = chains[match[1]].index(int(match[2]))
        return f'experts.{match[1]}.aligner.{3 * place - (place > 1) + int(match[3])}.{match[4]}'
    raise InputError(f"The checkpoint holds '{name}', which the authors' code does not have: use it unchanged.")


def stack_classifiers(weights: Dict[str, Tensor], classifiers: str) -> Tensor:
    """One set of classifiers [M, C, features], from M tensors [features, C]."""
    heads = {name: HEAD.fullmatch(name) for name in weights}
    found = {int(match[2]): weights[name] for name, match in heads.items() if match and match[1] == classifiers}
    experts = [int(match[1]) for name in weights if (match := re.match(r'layer3s\.(\d+)', name))]
    num_experts = max([*found, *experts], default=0) + 1
    missing = [m for m in range(num_experts) if m not in found]
    if missing:
        raise InputError(
            f"The checkpoint has no '{classifiers}.{missing[0]}.weight': use a complete one, or choose the other set "
            'with --classifiers.')
    shapes = sorted({tuple(head.shape) for head in found.values()})
    if len(shapes) > 1 or len(shapes[0]) != 2:
        raise InputError(f"The checkpoint has '{classifiers}' of the shapes {shapes}, expected (features, classes).")
    stacked = torch.stack([found[m].t() for m in range(num_experts)])
    # The authors' code starts with columns of length 1. Training changes that.
    if classifiers == 'rt_classifiers' and ((stacked.norm(dim=-1) - 1).abs() < 1e-4).all():
        raise InputError(
            'The checkpoint is of stage one: its rt_classifiers are untrained. Add --classifiers classifiers.')
    return stacked


def translate(weights: Dict[str, Tensor], classifiers: str = 'rt_classifiers') -> Dict[str, Tensor]:
    """Translate a state dict of the authors' code to the names and shapes of resnet32_shike."""
    wrong = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"The checkpoint holds a {type(weights[wrong[0]]).__name__} as '{wrong[0]}', not a tensor.")
    chains: Dict[str, List[int]] = {}
    for name in weights:
        if (match := LINK.fullmatch(name)) and name.endswith('conv.0.weight'):
            chains[match[1]] = sorted([*chains.get(match[1], ()), int(match[2])])
    translated = {
        translate_name(name, chains): value for name, value in weights.items() if not HEAD.fullmatch(name)}
    return dict(translated, **{'classifier.weight': stack_classifiers(weights, classifiers)})


def convert(checkpoint: str, output: str, classifiers: str = 'rt_classifiers') -> None:
    """Write a model folder from a checkpoint of the authors' code."""
    if Path(output).exists():
        raise InputError(f"'{output}' exists already: choose another folder, or remove it.")
    content = load_checkpoint(checkpoint)
    weights = translate(clean_state_dict(content.get('state_dict', content)), classifiers)
    num_experts, num_classes, _ = weights['classifier.weight'].shape
    model = cast(Shike, timm.create_model('resnet32_shike', num_classes=num_classes, num_experts=num_experts))
    load_weights(model, weights, checkpoint)
    model.set_training_prior(None, PRIORS[classifiers])
    Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
    export_model(model, output, timm.data.resolve_model_data_config(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help="checkpoint of the authors' code")
    parser.add_argument('output', metavar='OUTPUT', help='model folder to write')
    parser.add_argument(
        '--classifiers', choices=tuple(PRIORS), default='rt_classifiers',
        help='set of classifiers to take (default: %(default)s)')
    args = parser.parse_args()
    convert(args.checkpoint, args.output, args.classifiers)


if __name__ == '__main__':
    sys.exit(run_script(main))
