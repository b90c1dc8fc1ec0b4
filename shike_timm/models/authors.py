"""Checkpoints of the authors' CIFAR code, translated to the names and shapes of a SHIKE model on ResNet-32."""
import re
from typing import Dict, List, Tuple

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ['CLASSIFIER_SETS', 'is_authors_layout', 'num_classes_and_experts', 'translate_authors_weights']

CLASSIFIER_SETS = ('rt_classifiers', 'classifiers')

_BLOCK = r'\.(\d+)\.(conv1|bn1|conv2|bn2|shortcut\.[01])\.(\w+)$'
_LINK = r'shallow_exps\.(\d+)\.convs\.StridedConv(\d+)\.conv\.'
_WHERE = "The checkpoint in the authors' layout"
_SHORTCUT = {'shortcut.0': 'downsample.0', 'shortcut.1': 'downsample.1'}


def is_authors_layout(weights: Dict[str, Tensor]) -> bool:
    """Whether a state dict has the names of the authors' code."""
    prefixes = ('layer3s.', 'shallow_exps.', *(f'{key}.' for key in CLASSIFIER_SETS))
    return any(name.startswith(prefixes) for name in weights)


def num_classes_and_experts(weights: Dict[str, Tensor]) -> Tuple[int, int]:
    """Classes and experts of a state dict in the authors' layout.

    Raises:
        InputError: If it holds no classifier.
    """
    pattern = re.compile(rf"(?:{'|'.join(CLASSIFIER_SETS)})\.(\d+)\.weight$")
    found = {int(match[1]): weights[name] for name in weights if (match := pattern.match(name))}
    if not found:
        raise InputError("The checkpoint in the authors' layout holds no classifier: use a complete one.")
    return next(iter(found.values())).shape[-1], max(found) + 1


def _translate_name(name: str, links: Dict[int, List[int]]) -> str:
    """Our name of a parameter of trunk or experts, '' for none."""
    if match := re.match(r'(conv1|bn1)\.(\w+)$', name):
        return f"stem.{'0' if match[1] == 'conv1' else '1'}.{match[2]}"
    for pattern, ours in ((r'layer([12])', 'stages.{}'), (r'layer3s\.(\d+)', 'experts.{}.stage')):
        if match := re.match(pattern + _BLOCK, name):
            owner = int(match[1]) - (1 if ours.startswith('stages') else 0)
            return '.'.join([ours.format(owner), match[2], _SHORTCUT.get(match[3], match[3]), match[4]])
    if match := re.match(_LINK + r'([01])\.(\w+)$', name):
        expert, link = int(match[1]), int(match[2])
        if link not in links.get(expert, []):
            return ''
        # Convolution, BatchNorm and ReLU per link, the ReLU missing at index 1 of the chain.
        position = sum(2 if k == 1 else 3 for k in range(links[expert].index(link)))
        return f'experts.{expert}.aligner.{position + int(match[3])}.{match[4]}'
    return ''


def _stack_classifiers(weights: Dict[str, Tensor], like: Tensor, classifiers: str) -> Tensor:
    """One set of classifiers, stacked to the shape [M, C, features] of `like`."""
    heads = {int(name.split('.')[1]): value for name, value in weights.items() if name.startswith(f'{classifiers}.')}
    held = {int(match[1]) for name in weights if (match := re.match(r'layer3s\.(\d+)\.', name))} | set(heads)
    missing = [m for m in sorted(held) if m not in heads]
    if missing or not heads:
        raise InputError(
            f"{_WHERE} has no '{classifiers}.{min(missing, default=0)}.weight': choose the other set of classifiers.")
    num_experts, num_classes, _ = like.shape
    if len(heads) != num_experts or heads[0].shape[-1] != num_classes:
        raise InputError(
            f'{_WHERE} has {len(heads)} experts and {heads[0].shape[-1]} classes, the model {num_experts} and '
            f'{num_classes}: create it with num_experts={len(heads)}, num_classes={heads[0].shape[-1]}.')
    shapes = {tuple(head.shape) for head in heads.values()}
    if len(shapes) > 1:
        raise InputError(f"{_WHERE} has '{classifiers}' of different shapes, {sorted(shapes)}: use a whole file.")
    return torch.stack([heads[m].t() for m in range(num_experts)])


def _check_fit(translated: Dict[str, Tensor], own: Dict[str, Tensor], theirs: Dict[str, str]) -> None:
    for name, value in own.items():
        if name not in translated:
            raise InputError(
                f"{_WHERE} has nothing for '{name}' of the model: it is incomplete, or of another network than "
                'resnet32_shike.')
        if translated[name].shape != value.shape:
            raise InputError(
                f"{_WHERE} holds '{theirs[name]}' with the shape {tuple(translated[name].shape)}, expected "
                f'{tuple(value.shape)}: it is of another network than resnet32_shike.')
    unknown = next((name for name in translated if name not in own), None)
    if unknown:
        raise InputError(
            f"{_WHERE} holds '{theirs[unknown]}', for which the model has no place: it is of another network or has "
            'more experts.')


def translate_authors_weights(
        weights: Dict[str, Tensor],
        own: Dict[str, Tensor],
        classifiers: str = 'rt_classifiers',
) -> Dict[str, Tensor]:
    """Translate a state dict of the authors' code.

    Args:
        weights: Their state dict, without the prefix of parallel training.
        own: State dict of the model it is meant for, for names and shapes.
        classifiers: Which of their two sets of classifiers [features, C] to take.

    Returns:
        State dict with the names and shapes of `own`.

    Raises:
        InputError: If a parameter is missing, is not known, or has another shape.
    """
    links: Dict[int, List[int]] = {}
    for name in weights:
        if match := re.match(_LINK + r'0\.weight$', name):
            links.setdefault(int(match[1]), []).append(int(match[2]))
    links = {expert: sorted(chain) for expert, chain in links.items()}
    translated, theirs = {}, {}
    for name, value in weights.items():
        if name.split('.')[0] in CLASSIFIER_SETS:
            continue
        ours = _translate_name(name, links)
        if not ours:
            raise InputError(f"{_WHERE} holds '{name}', which that code does not have: use its checkpoint unchanged.")
        translated[ours], theirs[ours] = value, name
    if 'classifier.weight' in own:
        theirs['classifier.weight'] = f'{classifiers}.0.weight'
        translated['classifier.weight'] = _stack_classifiers(weights, own['classifier.weight'], classifiers)
    _check_fit(translated, own, theirs)
    return translated
