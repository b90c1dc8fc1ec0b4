#!/usr/bin/env python3
"""Retrain the classifiers of a stage-one checkpoint: stage two alone."""
import sys

from shike_timm.commands.cli import run_script
from shike_timm.commands.retrain_classifier import retrain_classifier

if __name__ == '__main__':
    sys.exit(run_script(retrain_classifier))
