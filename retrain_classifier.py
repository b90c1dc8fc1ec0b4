#!/usr/bin/env python3
"""Retrain the classifiers of a stage-one checkpoint: stage two alone."""
import sys

from shike_timm.cli.retrain_classifier import main

if __name__ == '__main__':
    sys.exit(main())
