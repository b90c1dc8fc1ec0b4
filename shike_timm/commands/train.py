"""Training: both stages of a run."""
import argparse
import os
from typing import Any, Dict, Optional, Sequence

from ..config import read_hparams
from ..options import TRAIN, check_values, complete, defaults, read_command_line, run_folder
from ..runs import train
from .cli import run_script

__all__ = ['OPTIONS', 'complete_train_args', 'main', 'parse_train_args']

OPTIONS = TRAIN


def complete_train_args(given: Dict[str, Any]) -> argparse.Namespace:
    """All arguments of train.py, from those given; a resumed run has those of its `args.yaml` as defaults.

    Raises:
        InputError: If a value is out of its range, or a line of the hparams file is wrong.
    """
    folder = run_folder(argparse.Namespace(**{**defaults(OPTIONS), **given}))
    path, saved = os.path.join(folder or '', 'args.yaml'), {}
    if folder and os.path.isfile(path):
        for file, values in read_hparams(path).items():
            saved.update(check_values(OPTIONS, values, f"hparams file '{file}'"))
    return complete(OPTIONS, given, saved=saved)


def parse_train_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of train.py.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    return complete_train_args(
        read_command_line('Train a model: stage one, then classifier retraining.', OPTIONS, argv))


def main() -> int:
    return run_script(lambda: train(parse_train_args()))
