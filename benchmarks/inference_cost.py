#!/usr/bin/env python3
"""Inference of SHIKE with 1, 2 and 3 experts beside the plain backbone and three of them, turn by turn on the CPU."""
import argparse

import timm
import torch
from torch import nn

import shike_timm
from shike_timm.costs import inference_costs

FAMILIES = {
    # The SHIKE model and its plain network. That of ResNet-32 is the trunk with one expert, without fusion.
    'resnet32': ('resnet32_shike', lambda: timm.create_model(
        'resnet32_shike', num_experts=1, fusion=False, classifier='linear')),
    'resnet50': ('resnet50_shike', lambda: timm.create_model('resnet50')),
    'resnext50': ('resnext50_shike', lambda: timm.create_model('resnext50_32x4d')),
}


class Ensemble(nn.Module):
    """The logits of several networks, averaged."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return torch.stack([network(x) for network in self.networks]).mean(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('families', nargs='*', default=list(FAMILIES), metavar='NAME', help=', '.join(FAMILIES))
    parser.add_argument('--batch-size', type=int, default=16, help='images a batch')
    parser.add_argument('--seconds', type=float, default=2., help='approximate seconds of a turn')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each model. The median counts')
    args = parser.parse_args()

    print(f'shike-timm {shike_timm.__version__}, {torch.get_num_threads()} threads, float32, channels_last')
    print(f"{'model':36}{'params M':>10}{'GMACs':>10}{'img/s':>10}{'of plain':>10}")
    for family in args.families:
        name, create_plain = FAMILIES[family]
        size = timm.get_pretrained_cfg_value(name, 'input_size')
        models = {f'plain {family}': create_plain(), f'three of plain {family}': Ensemble(
            [create_plain() for _ in range(3)])}
        for num_experts in (1, 2, 3):
            model = timm.create_model(name)
            model.set_experts(range(num_experts))
            models[f"{name}, {num_experts} expert{'s' if num_experts > 1 else ''}"] = model
        models = {key: model.eval().to(memory_format=torch.channels_last) for key, model in models.items()}
        images = torch.randn(args.batch_size, *size).contiguous(memory_format=torch.channels_last)
        costs = inference_costs(models, images, args.rounds, args.seconds)
        plain = next(iter(costs.values()))['images_per_second']
        for key, cost in costs.items():
            print(
                f"{key:36}{cost['parameters'] / 1e6:10.2f}{cost['gmacs']:10.3f}{cost['images_per_second']:10.1f}"
                f"{cost['images_per_second'] / plain:10.2f}", flush=True)


if __name__ == '__main__':
    main()
