#!/usr/bin/env python3
"""Evaluate a SHIKE model on many-, medium- and few-shot classes."""
import sys

from shike_timm.cli import run_script
from shike_timm.hparams import parse_eval_args
from shike_timm.validation import evaluate_model

if __name__ == '__main__':
    sys.exit(run_script(lambda: evaluate_model(parse_eval_args())))
