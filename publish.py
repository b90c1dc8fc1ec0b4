#!/usr/bin/env python3
"""Publish a trained model to the Hugging Face Hub."""
import sys

from shike_timm.cli.publish import main

if __name__ == '__main__':
    sys.exit(main())
