"""Checkpoints of the authors' CIFAR code, translated to the names and shapes of a SHIKE model on ResNet-32."""
import re
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import InputError

__all__ = ['CLASSIFIER_SETS', 'is_authors_layout', 'num_classes_and_experts', 'translate_authors_weights']

CLASSIFIER_SETS = ('rt_classifiers', 'classifiers')

_BLOCK = r'\.(\d+)\.(conv1|bn1|conv2|bn2|shortcut\.[01])\.(\w+)$'
_HEAD = rf"({'|'.join(CLASSIFIER_SETS)})\.(\d+)\.weight$"
_LINK = r'shallow_exps\.(\d+)\.convs\.StridedConv(\d+)\.conv\.'
_WHERE = "The checkpoint in the authors' layout"
_SHORTCUT = {'shortcut.0': 'downsample.0', 'shortcut.1': 'downsample.1'}


def is_authors_layout(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict has the names of the authors' code, with or without the prefix of parallel training."""
    starts = '|'.join(('layer3s', 'shallow_exps', *CLASSIFIER_SETS))
    return any(re.match(rf'(module\.)?({starts})\.', name) for name in weights)


def num_classes_and_experts(weights: Dict[str, Tensor]) -> Tuple[int, int]:
    """Classes and experts of a state dict in the authors' layout.

    Raises:
        InputError: If it holds no classifier.
    """
    heads = [(int(match[2]), weights[name]) for name in weights if (match := re.match(_HEAD, name))]
    if not heads:
        raise InputError(f'{_WHERE} holds no classifier: use a complete one.')
    return heads[0][1].shape[-1], max(heads, key=lambda head: head[0])[0] + 1


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


def _stack_classifiers(weights: Dict[str, Tensor], classifiers: str) -> Tensor:
    """One set of classifiers, stacked: [M, C, features]."""
    found = {name: re.match(_HEAD, name) for name in weights if name.split('.')[0] in CLASSIFIER_SETS}
    wrong = [name for name, match in found.items() if not match or weights[name].ndim != 2]
    if wrong:
        raise InputError(
            f"{_WHERE} holds '{wrong[0]}' with the shape {tuple(weights[wrong[0]].shape)}, expected "
            "'classifiers.M.weight' of the shape (features, classes): use its checkpoint unchanged.")
    heads = {int(match[2]): weights[name] for name, match in found.items() if match and match[1] == classifiers}
    held = {int(match[1]) for name in weights if (match := re.match(r'layer3s\.(\d+)\.', name))} | set(heads)
    missing = [m for m in range(max(held, default=0) + 1) if m not in heads]
    if missing:
        raise InputError(
            f"{_WHERE} has no '{classifiers}.{missing[0]}.weight': use a whole file, or choose the other set of "
            'classifiers.')
    shapes = {tuple(head.shape) for head in heads.values()}
    if len(shapes) > 1:
        raise InputError(f"{_WHERE} has '{classifiers}' of different shapes, {sorted(shapes)}: use a whole file.")
    stacked = torch.stack([heads[m].t() for m in range(len(heads))])
    # Their code begins with columns of length 1, which training would change.
    if classifiers == CLASSIFIER_SETS[0] and ((stacked.norm(dim=-1) - 1).abs() < 1e-4).all():
        raise InputError(
            f"{_WHERE} is of stage one: its '{classifiers}' are untrained; choose the trained ones with "
            "authors_classifiers='classifiers', --authors-classifiers classifiers.")
    return stacked


def _check_fit(
        translated: Dict[str, Tensor],
        own: Dict[str, Tensor],
        theirs: Dict[str, str],
        flexible: Sequence[str],
) -> None:
    if 'classifier.weight' in own and 'classifier.weight' not in flexible:
        given, expected = (state['classifier.weight'].shape[:2] for state in (translated, own))
        if given != expected:
            raise InputError(
                f'{_WHERE} has {given[0]} experts and {given[1]} classes, the model {expected[0]} and {expected[1]}: '
                f'create it with num_experts={given[0]}, num_classes={given[1]}.')
    for name in [name for name in (*own, *translated) if name not in flexible]:
        shape, expected = (tuple(state[name].shape) if name in state else None for state in (translated, own))
        if shape != expected:
            problem = (
                f"has nothing for '{name}' of the model" if shape is None
                else f"holds '{theirs[name]}', for which the model has no place" if expected is None
                else f"holds '{theirs[name]}' with the shape {shape}, expected {expected}")
            raise InputError(f'{_WHERE} {problem}: it is incomplete, of another network or has more experts.')


def translate_authors_weights(
        weights: Dict[str, Tensor],
        own: Dict[str, Tensor],
        classifiers: str = 'rt_classifiers',
        flexible: Sequence[str] = (),
) -> Dict[str, Tensor]:
    """Translate a state dict of the authors' code.

    Args:
        weights: Their state dict.
        own: State dict of the model it is meant for, for names and shapes.
        classifiers: Which of their two sets of classifiers [features, C] to take.
        flexible: Names in `own` that may have another shape.

    Returns:
        State dict with the names of `own` and, but for the flexible ones, its shapes.

    Raises:
        InputError: If a parameter is missing, is not known, or has another shape.
    """
    weights = clean_state_dict(weights)
    wrong = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"{_WHERE} holds a {type(weights[wrong[0]]).__name__} as '{wrong[0]}', expected a tensor.")
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
    if 'classifier.weight' in own or 'classifier.weight' in flexible:
        theirs['classifier.weight'] = f'{classifiers}.0.weight'
        translated['classifier.weight'] = _stack_classifiers(weights, classifiers)
    _check_fit(translated, own, theirs, flexible)
    return translated
