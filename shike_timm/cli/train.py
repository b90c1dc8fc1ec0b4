"""Training: both stages of a run."""
import os
from typing import Any, Dict, Optional, Sequence

from ..options import check_file_values, checked, complete, read_command_line
from ..recipes import read_hparams
from ..training.config import TrainConfig
from ..training.resume import run_folder
from ..training.runs import train
from .script import run_script

CONFIG = TrainConfig


def complete_train_args(given: Dict[str, Any]) -> TrainConfig:
    """The configuration of given values; a resumed run has those of its `args.yaml` as defaults."""
    folder = run_folder(checked(TrainConfig, given))
    path, saved = os.path.join(folder or '', 'args.yaml'), {}
    if folder and os.path.isfile(path):
        for file, values in read_hparams(path).items():
            saved.update(check_file_values(TrainConfig, values, f"hparams file '{file}'", given))
    return complete(TrainConfig, given, saved=saved)


def parse_train_args(argv: Optional[Sequence[str]] = None) -> TrainConfig:
    """The configuration that a command line gives."""
    return complete_train_args(
        read_command_line(TrainConfig, 'Train a model: stage one, then classifier retraining.', argv))


def main() -> int:
    return run_script(lambda: train(parse_train_args()))
