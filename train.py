#!/usr/bin/env python3
"""Train SHIKE: stage one, then classifier retraining."""
import sys

from shike_timm.commands.cli import run_script
from shike_timm.options import parse_train_args
from shike_timm.runs import train

if __name__ == '__main__':
    sys.exit(run_script(lambda: train(parse_train_args())))
