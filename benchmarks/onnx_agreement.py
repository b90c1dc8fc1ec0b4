#!/usr/bin/env python3
"""Compare onnxruntime with torch on CIFAR-100's test images, by top-1 class and by logits."""
import argparse
import tempfile
from pathlib import Path

import timm
import torch
from torchvision.datasets import CIFAR100

import shike_timm  # noqa: F401
from shike_timm.publishing.export import FILES, load_exported, save_exported


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('data_dir', metavar='DATA', help='folder of CIFAR-100')
    parser.add_argument(
        '--model', default='resnet32_shike', help='local-dir:RUN/model, or a registered name for random weights')
    parser.add_argument('--num-images', type=int, default=1000, help='number of images, from the first on')
    parser.add_argument('--batch-size', type=int, default=100, help='images a call')
    parser.add_argument('--seed', type=int, default=0, help='seed of random weights')
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, pretrained=':' in args.model).eval()
    data_config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data_config, is_training=False)
    dataset = CIFAR100(args.data_dir, train=False, transform=transform)
    images = torch.stack([dataset[i][0] for i in range(min(args.num_images, len(dataset)))])
    with tempfile.TemporaryDirectory() as folder:
        save_exported(model, folder, 'onnx', data_config)
        exported = load_exported(Path(folder, FILES['onnx']), 'onnx')
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in images.split(args.batch_size)])
        logits = torch.cat([exported(batch) for batch in images.split(args.batch_size)])
    same = int((logits.argmax(1) == expected.argmax(1)).sum())
    highest = expected.topk(2, dim=1)[0]
    print(f'same top-1 class: {same} of {len(images)}')
    print(f'largest difference of logits: {float((logits - expected).abs().max()):.2e}')
    print(f'largest logit: {float(expected.abs().max()):.2f}')
    print(f'smallest lead of a top-1 class: {float((highest[:, 0] - highest[:, 1]).min()):.2e}')


if __name__ == '__main__':
    main()
