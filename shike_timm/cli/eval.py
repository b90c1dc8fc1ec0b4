"""The command `shike eval`."""
from functools import partial

from ..options import parse
from ..report.evaluate import EvalConfig, evaluate_model
from .script import run_script

CONFIG = EvalConfig

parse_eval_args = partial(parse, EvalConfig, 'Evaluate a model on many-, medium- and few-shot classes.')


def main() -> int:
    return run_script(lambda: evaluate_model(parse_eval_args()))
