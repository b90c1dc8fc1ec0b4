"""hparams files: values of options in YAML. A file may name another one as `base`."""
import os
from pathlib import Path
from typing import Any, Dict

import yaml

from .errors import InputError, nearest

_INSTALLED = Path(__file__).with_name('hparams')
RECIPES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / 'hparams'  # else those of a clone


def _find(name: str, folder: str = '') -> str:
    """The path of an hparams file: the file in the folder, or else the recipe of that name."""
    path, recipe = os.path.join(folder, name), RECIPES / f'{name}.yaml'
    return str(recipe) if recipe.is_file() and not os.path.isfile(path) else path


def _read(path: str) -> Dict[Any, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        recipes = [recipe.relative_to(RECIPES).with_suffix('').as_posix() for recipe in RECIPES.rglob('*.yaml')]
        raise InputError(f"hparams file '{path}' does not exist{nearest(path, recipes)}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hparams file '{path}' cannot be read: {error}.") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, 'problem_mark', None)
        line = f' at line {mark.line + 1}' if mark else ''
        problem = ' '.join(str(getattr(error, 'problem', error)).split())
        raise InputError(f"hparams file '{path}' is not valid YAML{line}: {problem}.") from error
    if not isinstance(values or {}, dict):
        raise InputError(f"hparams file '{path}' holds a {type(values).__name__}, expected lines of 'name: value'.")
    return values or {}


def read_hparams(name: str) -> Dict[str, Dict[Any, Any]]:
    """Read an hparams file and its bases.

    Args:
        name: Its path, or the name of a packaged recipe such as 'quickstart'.

    Returns:
        Values by path, those of the base first. Later ones override earlier ones.
    """
    path = _find(name)
    chain: Dict[str, Dict[Any, Any]] = {}
    while path:
        if os.path.normpath(path) in map(os.path.normpath, chain):
            raise InputError(f"hparams file '{path}' has itself among its bases: name another as 'base'.")
        values = chain[path] = _read(path)
        base = values.pop('base', None)
        if base is not None and not (isinstance(base, str) and base):
            raise InputError(f"hparams file '{path}': 'base' is {base!r}, expected the path of another hparams file.")
        path = _find(base, os.path.dirname(path)) if base else ''
    return dict(reversed(chain.items()))
