#!/usr/bin/env python3
"""Publish a trained model to the Hugging Face Hub."""
import sys

from shike_timm.commands.cli import run_script
from shike_timm.commands.publish import publish
from shike_timm.options import parse_publish_args

if __name__ == '__main__':
    sys.exit(run_script(lambda: publish(parse_publish_args())))
