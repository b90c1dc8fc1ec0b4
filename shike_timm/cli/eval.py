"""The command `shike eval`."""
from typing import Optional, Sequence

from ..options import read_command_line
from ..report.evaluate import EvalConfig, complete_eval_args, evaluate_model
from .script import command

CONFIG = EvalConfig


def parse_eval_args(argv: Optional[Sequence[str]] = None) -> EvalConfig:
    """The configuration that a command line gives."""
    return complete_eval_args(
        read_command_line(EvalConfig, 'Evaluate a model on many-, medium- and few-shot classes.', argv))


main = command(evaluate_model, parse_eval_args)
