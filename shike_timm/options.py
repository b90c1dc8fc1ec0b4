"""Options, as fields of dataclasses. The parser, its help, hparams files and docs/options.md use the same fields."""
import argparse
import ast
import copy
import re
import typing
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple, Type, TypeVar

from .errors import InputError, nearest
from .recipes import read_hparams

_OPENS = re.compile(r'pipe:|\w://')  # WebDataset runs what follows `pipe:` as a command.
_KINDS = {int: 'a whole number', float: 'a number', str: 'text', bool: 'true or false', dict: 'names with values'}

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar('Config', bound='DataclassInstance')


@dataclass(frozen=True)
class Option:
    """The facts of one option."""

    default: Any  # The value if the user gives none. An option whose default is None may be set to None.
    help: str
    metavar: Optional[str] = None  # Placeholder for the value in the help.
    choices: Optional[Sequence[Any]] = None  # All valid values.
    nargs: Any = None  # Length of a list. '+' stands for any length above 0.
    const: Optional[str] = None  # The value if the flag stands alone. The flag with `--no-` sets None.
    low: Optional[float] = None  # Smallest valid value.
    below: Optional[float] = None  # Bound that the value must be less than.
    flags: Sequence[str] = ()  # Other flags of the option, such as -b.
    required: bool = False
    positional: bool = False  # Whether it is given without a flag.
    may_change: bool = False  # Whether a resumed run may change the value.
    card: str = 'always'  # When a model card shows it: 'always', if it was 'changed' from its default, or 'never'.
    name: str = ''  # Name in files and in Python. The flag has hyphens instead of underscores.
    kind: Any = str  # Type of the value or of each item: int, float, str, dict (KEY=VALUE KEY=VALUE) or bool.

    @property
    def flag(self) -> str:
        return '--' + self.name.replace('_', '-')

    @property
    def placeholder(self) -> str:
        """Placeholder for the value, such as `N` or `{exp,step}`."""
        if self.choices:
            return '{' + ','.join(map(str, self.choices)) + '}'
        return self.metavar or {int: 'N', float: 'X', str: 'NAME', dict: 'KEY=VALUE'}[self.kind]

    @property
    def shown_default(self) -> str:
        """The default as on the command line, empty for switches and for None."""
        if self.kind in (bool, dict) or self.default is None:
            return ''
        return ' '.join(f'{item:g}' if self.kind is float else str(item) for item in _items(self.default))

    def check(self, value: Any, where: str) -> Any:
        """Convert a value to its type. `where` begins the message of an InputError."""
        if value is None and self.default is None and not self.required:
            return None
        if value is None:
            raise InputError(f'{where} is empty, expected a value.')
        if value is True and self.const is not None:
            return self.const  # True in a file or in Python means the flag alone.
        if self.kind in (bool, dict):
            if not isinstance(value, self.kind):
                raise InputError(f'{where} is {value!r}, expected {_KINDS[self.kind]}.')
            return {
                key: list(item) if isinstance(item, tuple) else item for key, item in value.items()
            } if self.kind is dict else value
        if self.nargs is None:
            return self._check_item(value, where)
        if not isinstance(value, (list, tuple)) or not value or self.nargs not in ('+', len(value)):
            length = '' if self.nargs == '+' else f' of {self.nargs}'
            raise InputError(f'{where} is {value!r}, expected a list{length}.')
        return [self._check_item(item, where) for item in value]

    def _check_item(self, value: Any, where: str) -> Any:
        try:
            converted = self.kind(value)  # also from text, since YAML reads 5e-4 as text
        except (ValueError, TypeError, OverflowError):
            converted = None
        whole = self.kind is not int or not isinstance(value, float)
        if converted is None or value is None or isinstance(value, (bool, list, dict)) or not whole:
            raise InputError(f'{where} is {value!r}, expected {_KINDS[self.kind]}.')
        if self.choices and converted not in self.choices:
            raise InputError(f"{where} is {value!r}, expected one of {', '.join(map(str, self.choices))}.")
        return converted

    def check_range(self, value: Any) -> None:
        """Raise an InputError if a value is too small or too large."""
        for item in () if value is None else _items(value):
            if self.low is not None and not item >= self.low:
                raise InputError(f'{self.flag} {item} is out of range: give at least {self.low:g}.')
            if self.below is not None and not item < self.below:
                raise InputError(f'{self.flag} {item} is out of range: give less than {self.below:g}.')


def option(default: Any, help: str, metavar: Optional[str] = None, **facts: Any) -> Any:
    """A dataclass field that is an option. Arguments are those of `Option`, but name and type are the field's."""
    return field(
        default_factory=lambda: copy.copy(default), metadata=dict(option=Option(default, help, metavar, **facts)))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _kind(annotation: Any) -> Any:
    """The type of an option's value or of its items. For Optional[List[float]] it is float."""
    if typing.get_origin(annotation) is typing.Union:
        annotation = next(one for one in typing.get_args(annotation) if one is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0]
    return typing.get_origin(annotation) or annotation


@cache
def options(config: Type[Any]) -> Dict[str, Option]:
    """The options of a dataclass, by name."""
    hints = typing.get_type_hints(config)
    return {
        one.name: replace(one.metadata['option'], name=one.name, kind=_kind(hints[one.name]))
        for one in fields(config)}


def groups(config: Type[Any]) -> Dict[Type[Any], List[Option]]:
    """The options of a dataclass by the class that declares them, whose docstring is the title of the group."""
    known = dict(options(config))
    found = {
        base: [known.pop(name) for name in vars(base).get('__annotations__', ()) if name in known]
        for base in config.__mro__}
    return {base: members for base, members in found.items() if members}


def title(group: Type[Any]) -> str:
    """The title of a group of options: the first line of its docstring."""
    return (group.__doc__ or '').splitlines()[0].rstrip('.')


@dataclass(frozen=True)
class HparamsConfig:
    """Configuration."""

    hparams: Optional[str] = option(
        None, 'YAML file of values for these options, or the name of a packaged recipe such as quickstart. A file may '
        "name another as 'base', whose values it overrides", 'FILE', flags=('-c', '--config'), may_change=True,
        card='never')


class _Parser(argparse.ArgumentParser):
    """A parser that raises an InputError of one sentence for bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message[0].upper()}{message[1:]}: see --help.')


def _pair(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _add(section: Any, option: Option) -> None:
    flags, dest = (*option.flags, option.flag), option.name
    text = option.help + (f' (default: {option.shown_default})' if option.shown_default else '')
    if option.positional:
        section.add_argument(dest, nargs=option.nargs, metavar=option.placeholder, help=text)
    elif option.kind is bool:
        action: Any = 'store_true' if dest.startswith('no_') else argparse.BooleanOptionalAction
        section.add_argument(*flags, dest=dest, action=action, help=text, default=argparse.SUPPRESS)
    else:
        nargs = '*' if option.kind is dict else option.nargs if option.const is None else '?'
        section.add_argument(
            *flags, dest=dest, nargs=nargs, const=option.const, type=_pair if option.kind is dict else str,
            required=option.required, metavar=option.placeholder, help=text)
    if option.const is not None:
        section.add_argument(
            f'--no-{option.flag[2:]}', dest=dest, action='store_const', const=None, help=f'leave out {option.flag}')


def read_command_line(
        config: Type[Any], description: str, argv: Optional[Sequence[str]] = None, examples: Sequence[str] = (),
) -> Dict[str, Any]:
    """Read the values of a command line and convert them to their types. Their ranges are not checked yet.

    The help begins with the examples and the options that they name.
    """
    known = options(config)
    parser = _Parser(
        usage='%(prog)s [options]' if examples else None, description='\n  '.join([description, *examples]),
        allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_flag = {one.flag: one for one in known.values()}
    first = [by_flag[word] for word in dict.fromkeys(' '.join(examples).split()) if word in by_flag]
    for name, members in [('The options above', first), *((title(one), of) for one, of in groups(config).items())]:
        section = parser.add_argument_group(name)
        for one in members:
            if members is first or one not in first:
                _add(section, one)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for one in known.values() for flag in (one.flag, *one.flags)]
        raise InputError(f"Unknown argument '{unknown[0]}'{nearest(unknown[0].split('=')[0], flags)}: see --help.")
    return {
        name: known[name].check(dict(value) if known[name].kind is dict else value, known[name].flag)
        for name, value in vars(given).items()}


def check_values(config: Type[Any], values: Mapping[Any, Any], source: str) -> Dict[str, Any]:
    """Convert values by name from a file or from Python to their types. `source` begins an InputError's message."""
    known, checked = options(config), {}
    for key, value in values.items():
        name = str(key).replace('-', '_')
        if name not in known:
            raise InputError(f"{source} has an unknown key '{key}'{nearest(name, known)}.")
        checked[name] = known[name].check(value, f"{source}: '{key}'")
    return checked


def check_saved(config: Type[Any], values: Mapping[Any, Any], source: str) -> Dict[str, Any]:
    """As `check_values`, for values that another version may have saved. Unknown names are ignored."""
    return check_values(config, {name: value for name, value in values.items() if name in options(config)}, source)


def check_file_values(
        config: Type[Any], values: Mapping[Any, Any], source: str, given: Mapping[str, Any],
) -> Dict[str, Any]:
    """As `check_values`, for an untrusted file. Pipes and addresses in it are refused unless the option is `given`."""
    result = check_values(config, values, source)
    for name, value in result.items():
        for item in _items(value):
            if isinstance(item, str) and _OPENS.search(item) and name not in given:
                raise InputError(
                    f"{source}: '{name}' is '{item}', but a file may not start a process or open an address: give "
                    f'{options(config)[name].flag} on the command line.')
    return result


def _override(values: Dict[str, Any], later: Dict[str, Any]) -> None:
    """Update values. A later learning rate also clears the earlier `lr_base` or `crt_lr_base`."""
    for name in ('lr', 'crt_lr'):
        if name in later:
            values[f'{name}_base'] = None
    values.update(later)


def complete(config: Type[Config], given: Dict[str, Any], saved: Optional[Dict[str, Any]] = None) -> Config:
    """The configuration from these values: defaults, values `saved` by an earlier run, the hparams file, given values.

    A later source overrides an earlier one. Given and saved values must be checked already.
    """
    values = dict(saved or {})
    for path, read in read_hparams(given['hparams']).items() if given.get('hparams') else ():
        source = f"hparams file '{path}'"
        if 'hparams' in read:
            raise InputError(f"{source} has an unknown key 'hparams'.")
        _override(values, check_file_values(config, read, source, given))
    _override(values, given)
    return checked(config, values)


def checked(config: Type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration of these values and defaults for the rest. Checks the ranges, and ignores unknown names."""
    known = options(config)
    result = config(**{name: value for name, value in values.items() if name in known})
    for name, one in known.items():
        one.check_range(getattr(result, name))
    return result


def parse(config: Type[Config], description: str, argv: Optional[Sequence[str]] = None) -> Config:
    """The configuration that a command line gives."""
    return complete(config, read_command_line(config, description, argv))
