#!/usr/bin/env python3
"""Predict the classes of image files."""
import sys

from shike_timm.cli.predict import main

if __name__ == '__main__':
    sys.exit(main())
