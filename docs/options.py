#!/usr/bin/env python3
"""Write options.md from the declarations of the options."""
import importlib
from pathlib import Path
from typing import Any, Dict, List, Type

from shike_timm.cli.train import EXAMPLES
from shike_timm.options import Option, groups, options, title
from shike_timm_cli import COMMANDS

PAGE = Path(__file__).with_suffix('.md')
RESUMABLE = 'train'  # its runs can be resumed and its models have cards


def _value(option: Option) -> str:
    if option.kind is bool:
        text = 'on or off'
    elif option.choices:
        text = ', '.join(map(str, option.choices))
    else:
        text = {int: 'whole number', float: 'number', str: 'text', dict: 'KEY=VALUE ...'}[option.kind]
        text += {None: '', '+': ', one or more'}.get(option.nargs, f', {option.nargs} of them')
    low = '' if option.low is None else f', at least {option.low:g}'
    below = '' if option.below is None else f', less than {option.below:g}'
    return text + low + below


def _row(option: Option, training: bool) -> str:
    name = option.placeholder if option.positional else ' '.join(f'`{flag}`' for flag in (*option.flags, option.flag))
    cells = [name, _value(option), option.shown_default, option.help.replace('*', '\\*')]
    if training:
        cells += ['yes' if option.may_change else '', '' if option.card == 'never' else option.card]
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def _link(group: Type[Any]) -> str:
    name = title(group)
    return f"[{name}](#{name.lower().replace(' ', '-')})"


def _config(command: str) -> Type[Any]:
    """The configuration class of a command."""
    module = importlib.import_module(f"shike_timm.cli.{command.replace('-', '_')}")
    return module.CONFIG


def page() -> str:
    """The page: the commands, then each group of options once."""
    found: Dict[Type[Any], List[Option]] = {}
    commands = []
    for name, what in COMMANDS.items():
        own = groups(_config(name))
        for group, members in own.items():
            found.setdefault(group, members)
        commands.append(f"| `shike {name}` | {what} | {', '.join(_link(group) for group in own)} |")
    training = groups(_config(RESUMABLE))
    by_flag = {option.flag: option for option in options(_config(RESUMABLE)).values()}
    first = [by_flag[word] for word in dict.fromkeys(' '.join(EXAMPLES).split()) if word in by_flag]
    lines = [
        '# Options', '',
        'Three ways to train:', '', '```bash', *EXAMPLES, '```', '', 'Most runs need only these options of them:', '',
        '| option | default | meaning |', '|---|---|---|',
        *(f'| `{one.flag}` | {one.shown_default} | {one.help} |' for one in first), '',
        'In hparams files and in Python, names have underscores and no `--`. An option that is on or off',
        'also has a flag with `--no-`, and is off unless the text says otherwise. The card of a published',
        'model shows an option always, if changed, or (blank) never. `python docs/options.py` makes this',
        'page.', '',
        '## Commands', '',
        '| command | what it does | options |', '|---|---|---|', *commands,
    ]
    for group, members in found.items():
        resumable = group in training
        header = ['option', 'value', 'default', 'meaning']
        header += ['may change on resume', 'on the card'] if resumable else []
        lines += ['', f'## {title(group)}', '', '| ' + ' | '.join(header) + ' |', '|---' * len(header) + '|']
        lines += [_row(option, resumable) for option in members]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
