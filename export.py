#!/usr/bin/env python3
"""Export a SHIKE model to ONNX, TorchScript or torch.export."""
import sys

from shike_timm.commands.cli import run_script
from shike_timm.commands.export import export
from shike_timm.options import parse_export_args

if __name__ == '__main__':
    sys.exit(run_script(lambda: export(parse_export_args())))
