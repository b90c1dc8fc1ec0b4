#!/usr/bin/env python3
"""Export a model to ONNX, TorchScript or torch.export."""
import sys

from shike_timm.cli.export import main

if __name__ == '__main__':
    sys.exit(main())
