#!/usr/bin/env python3
"""Timm networks as SHIKE backbones: parameters, multiply-adds and the loss of one training step, or why not."""
import argparse

import torch

import shike_timm
from shike_timm.costs import count_flops
from shike_timm.losses import representation_loss

NAMES = [
    'resnet18', 'resnet34d', 'seresnet50', 'wide_resnet50_2', 'resnetv2_50', 'regnetx_008', 'regnety_016',
    'convnext_tiny', 'convnextv2_nano', 'efficientnet_b0', 'mobilenetv3_large_100', 'repvgg_a2', 'hgnetv2_b0',
    'densenet121', 'swin_tiny_patch4_window7_224',
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('names', nargs='*', default=NAMES, metavar='NAME', help="timm's networks")
    parser.add_argument('--num-classes', type=int, default=1000, help='classes')
    parser.add_argument('--batch-size', type=int, default=4, help='images of the training step')
    args = parser.parse_args()

    print(f"{'backbone':32}{'params M':>10}{'GMACs':>10}{'loss':>10}")
    for name in args.names:
        torch.manual_seed(0)
        try:
            model = shike_timm.shike(name, num_classes=args.num_classes)
        except ValueError as error:
            print(f'{name:32}  {error}')
            continue
        size = model.default_cfg['input_size']
        with torch.inference_mode():
            gmacs = count_flops(lambda: model.eval()(torch.randn(1, *size))) / 2e9  # noqa: B023
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        target = torch.randint(args.num_classes, (args.batch_size,))
        loss = representation_loss(model.train().forward_experts(torch.randn(args.batch_size, *size)), target).total
        loss.backward()
        optimizer.step()
        num_parameters = sum(p.numel() for p in model.parameters())
        print(f'{name:32}{num_parameters / 1e6:10.2f}{gmacs:10.2f}{float(loss.detach()):10.2f}', flush=True)


if __name__ == '__main__':
    main()
