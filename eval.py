#!/usr/bin/env python3
"""Evaluate a model on many-, medium- and few-shot classes."""
import sys

from shike_timm.cli.eval import main

if __name__ == '__main__':
    sys.exit(main())
