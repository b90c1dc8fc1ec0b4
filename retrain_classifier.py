#!/usr/bin/env python3
"""Retrain the classifiers of a stage-one checkpoint: stage two alone."""
import sys

from shike_timm.commands.cli import run_script
from shike_timm.options import parse_retrain_args
from shike_timm.runs import retrain, saved_args

if __name__ == '__main__':
    sys.exit(run_script(lambda: retrain(parse_retrain_args(saved_args=saved_args))))
