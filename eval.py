#!/usr/bin/env python3
"""Evaluate a SHIKE model on many-, medium- and few-shot classes."""
import sys

from shike_timm.commands.cli import run_script
from shike_timm.commands.eval import evaluate_model
from shike_timm.options import parse_eval_args

if __name__ == '__main__':
    sys.exit(run_script(lambda: evaluate_model(parse_eval_args())))
