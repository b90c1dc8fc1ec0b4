#!/usr/bin/env python3
"""Train a model: stage one, then classifier retraining."""
import sys

from shike_timm.cli.train import main

if __name__ == '__main__':
    sys.exit(main())
