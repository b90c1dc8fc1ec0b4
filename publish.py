#!/usr/bin/env python3
"""Publish a trained model to the Hugging Face Hub."""
import sys

from shike_timm.cli import run_script
from shike_timm.hparams import parse_publish_args
from shike_timm.publishing import publish

if __name__ == '__main__':
    sys.exit(run_script(lambda: publish(parse_publish_args())))
