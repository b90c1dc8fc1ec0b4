#!/usr/bin/env python3
"""Write api.md from the docstrings of what is used from Python."""
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, List

PAGE = Path(__file__).with_suffix('.md')
WHAT = {
    'shike_timm': ('shike', 'train', 'evaluate', 'predict', 'describe'),
    'shike_timm.models': ('Shike',),
    'shike_timm.losses': (
        'balanced_softmax', 'representation_loss', 'dynamic_knowledge_transfer', 'mutual_distillation',
        'knowledge_distillation', 'logit_adjusted', 'ldam', 'focal', 'expert_cross_entropy'),
    'shike_timm.metrics': ('evaluate',),
}
METHODS = (
    'forward', 'forward_experts', 'forward_features', 'forward_intermediates', 'set_experts', 'set_target_prior',
    'set_training_prior', 'load_backbone', 'freeze_trunk', 'reset_classifier')


def _signature(value: Any) -> str:
    """The arguments without their types, which the docstring tells in words."""
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in inspect.signature(
        value).parameters.values() if one.name != 'self']
    return str(inspect.Signature(parameters))


def _entry(name: str, value: Any, level: int) -> List[str]:
    text: List[str] = []  # A paragraph or an item of a list each.
    for line in inspect.cleandoc(value.__doc__ or '').splitlines():
        section = re.fullmatch(r'(Args|Returns|Raises):', line)
        item = re.fullmatch(r' {4}(\*{0,2}\w+): (.*)', line)
        if section:
            text += [f'**{section[1]}**', '']
        elif item:
            text.append(f'- `{item[1]}`: {item[2]}')
        elif line.strip() and text and text[-1] and not text[-1].startswith('**'):
            text[-1] += ' ' + line.strip()
        else:
            text.append(line.strip())
    text = [f'`{name.split(".")[-1]}{_signature(value)}`', '', *text]
    wrapped = [
        textwrap.fill(one, 100, subsequent_indent='  ' if one.startswith('- ') else '', break_long_words=False,
                      break_on_hyphens=False) for one in text]
    return [f"{'#' * level} `{name}`", '', *wrapped, '']


def page() -> str:
    """The page: a section for each module, and the methods of the model."""
    lines = ['# Python', '', '`python docs/api.py` makes this page from the docstrings.', '']
    for module, names in WHAT.items():
        lines += [f'## {module}', '']
        for name in names:
            value = getattr(importlib.import_module(module), name)
            lines += _entry(name, value, 3)
            if inspect.isclass(value):
                for method in METHODS:
                    lines += _entry(f'{name}.{method}', getattr(value, method), 4)
    return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
