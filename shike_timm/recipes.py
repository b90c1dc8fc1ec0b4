"""hparams files: values of options in YAML. A file may name another one as `base`."""
import os
from pathlib import Path
from typing import Any, Dict

import yaml

from .errors import InputError, nearest, one_line

_INSTALLED = Path(__file__).with_name('hparams')
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / 'hparams'  # In a clone
MOST_VALUES = 10_000  # Values in a file.


def _find(name: str, folder: str = '') -> str:
    """The path of an hparams file: the file in the folder, or else the recipe of that name."""
    path, recipe = os.path.join(folder, name), RECIPES / f'{name}.yaml'
    return str(recipe) if recipe.is_file() and not os.path.isfile(path) else path


def _is_vast(values: Any) -> bool:
    """Whether there are more than `MOST_VALUES` values, since a few lines of YAML can refer to themselves."""
    waiting, number = [values], 0
    while waiting and number < MOST_VALUES:
        one, number = waiting.pop(), number + 1
        waiting.extend(one.values() if isinstance(one, dict) else one if isinstance(one, (list, set)) else ())
    return bool(waiting)


def read_yaml(path: str) -> Dict[Any, Any]:
    """The names and values in a YAML file, without its bases. Whatever is wrong with the file is an InputError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        recipes = [recipe.relative_to(RECIPES).with_suffix('').as_posix() for recipe in RECIPES.rglob('*.yaml')]
        raise InputError(f"hparams file '{path}' does not exist{nearest(path, recipes)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hparams file '{path}' cannot be read: {error}.") from error
    except Exception as error:  # PyYAML also raises KeyError, IndexError, RecursionError and others.
        mark = getattr(error, 'problem_mark', None)
        line = f' at line {mark.line + 1}' if mark else ''
        problem = one_line(getattr(error, 'problem', None) or error)
        raise InputError(f"hparams file '{path}' is not valid YAML{line}: {problem}.") from error
    if not isinstance(values or {}, dict):
        raise InputError(f"hparams file '{path}' holds a {type(values).__name__}, expected lines of 'name: value'.")
    if _is_vast(values):
        raise InputError(f"hparams file '{path}' holds more than {MOST_VALUES} values, expected those of the options.")
    return values or {}


def read_hparams(name: str) -> Dict[str, Dict[Any, Any]]:
    """Read an hparams file and its bases. It is named by its path, or as a packaged recipe such as 'quickstart'.

    The result maps the path of each file to its values. Bases come first, and later files override earlier ones.
    """
    path = _find(name)
    chain: Dict[str, Dict[Any, Any]] = {}
    while path:
        if os.path.normpath(path) in map(os.path.normpath, chain):
            raise InputError(f"hparams file '{path}' has itself among its bases: name another as 'base'.")
        values = chain[path] = read_yaml(path)
        base = values.pop('base', None)
        if base is not None and not (isinstance(base, str) and base):
            raise InputError(f"hparams file '{path}': 'base' is {base!r}, expected the path of another hparams file.")
        path = _find(base, os.path.dirname(path)) if base else ''
        if os.path.exists(path) and not os.path.isfile(path):  # Only the file that the user names may be a pipe.
            raise InputError(f"hparams file '{path}' is not a file: name another as 'base'.")
    return dict(reversed(chain.items()))
