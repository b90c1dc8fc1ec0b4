#!/usr/bin/env python3
"""Timm networks as SHIKE backbones: parameters, multiply-adds and the loss of one training step, or why not.

`--all` splits every architecture that has pretrained weights, without weights and without memory for them, and writes
the table of docs/backbones.md. It goes on where an earlier call stopped.
"""
import argparse
import csv
from collections import Counter
from pathlib import Path

import timm
import torch

import shike_timm
from shike_timm.costs import count_flops
from shike_timm.losses import representation_loss
from shike_timm.models.backbones import timm_backbone

NAMES = [
    'resnet18', 'resnet34d', 'seresnet50', 'wide_resnet50_2', 'resnetv2_50', 'regnetx_008', 'regnety_016',
    'convnext_tiny', 'convnextv2_nano', 'efficientnet_b0', 'mobilenetv3_large_100', 'repvgg_a2', 'hgnetv2_b0',
    'densenet121', 'swin_tiny_patch4_window7_224', 'vit_tiny_patch16_224', 'eva02_tiny_patch14_224',
]
TABLE = Path(__file__).parents[1] / 'docs' / 'backbones.md'
BEGIN, END = '<!-- begin: benchmarks/backbones.py --all -->\n', '<!-- end -->\n'


def train_step(name, num_classes, batch_size):
    """A line of the table of small networks: parameters, multiply-adds and the loss of one training step."""
    torch.manual_seed(0)
    try:
        model = shike_timm.shike(name, num_classes=num_classes)
    except ValueError as error:
        return str(error)
    size = model.default_cfg['input_size']
    with torch.inference_mode():
        gmacs = count_flops(lambda: model.eval()(torch.randn(1, *size))) / 2e9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = torch.randint(num_classes, (batch_size,))
    loss = representation_loss(model.train().forward_experts(torch.randn(batch_size, *size)), target).total
    loss.backward()
    optimizer.step()
    num_parameters = sum(p.numel() for p in model.parameters())
    return f'{num_parameters / 1e6:10.2f}{gmacs:10.2f}{float(loss.detach()):10.2f}'


def family(name):
    """The module of timm that has an architecture."""
    return timm.models.model_entrypoint(name).__module__.rpartition('.')[2]


def split(name):
    """Why an architecture cannot be split, '' if it can."""
    try:
        net = timm_backbone(name, num_experts=1, device='meta')
    except ValueError as error:
        return str(error).partition(': ')[2].removesuffix(', choose another network.')
    parts = [net.stem, *net.stages, *net.last_stages, *(net.heads or [])]
    parameters = [id(parameter) for part in parts for parameter in part.parameters()]
    return '' if len(set(parameters)) == len(parameters) else 'its parts share parameters'


def split_all(path):
    """Split every architecture, each once, and give (family, name, reason) of all."""
    for draw in ('uniform_', 'normal_', 'erfinv_'):  # initial values of parameters without memory
        setattr(torch.Tensor, draw, lambda self, *args, **kwargs: self)
    names = sorted({name.split('.')[0] for name in timm.list_models(pretrained=True)})
    names = [name for name in names if family(name) != 'registry']
    rows = {row[1]: tuple(row) for row in csv.reader(path.open())} if path.exists() else {}
    with path.open('a', newline='') as file:
        for name in names:
            if name not in rows:
                rows[name] = (family(name), name, split(name))
                csv.writer(file).writerow(rows[name])
                file.flush()
    return [rows[name] for name in names]


def write_table(rows):
    """Put a line for each family into docs/backbones.md."""
    done = sum(not reason for _, _, reason in rows)
    lines = [f'{done} of {len(rows)} architectures ({done / len(rows):.1%}) in timm {timm.__version__}.', '',
             '| family | split | of | reason for the others |', '|---|---|---|---|']
    for one in sorted({row[0] for row in rows}):
        reasons = Counter(reason for other, _, reason in rows if other == one)
        split, why = reasons.pop('', 0), '; '.join(f'{reason} ({n})' for reason, n in reasons.items())
        lines.append(f'| {one} | {split} | {split + sum(reasons.values())} | {why} |')
    text = TABLE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    TABLE.write_text(before + BEGIN + '\n'.join(lines) + '\n' + END + after)
    print(lines[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('names', nargs='*', default=NAMES, metavar='NAME', help="timm's networks")
    parser.add_argument('--num-classes', type=int, default=1000, help='classes')
    parser.add_argument('--batch-size', type=int, default=4, help='images of the training step')
    parser.add_argument('--all', action='store_true', help='split every architecture with pretrained weights')
    parser.add_argument('--rows', type=Path, default=Path('backbones.csv'), help='where --all keeps what it found')
    args = parser.parse_args()

    if args.all:
        return write_table(split_all(args.rows))
    print(f"{'backbone':32}{'params M':>10}{'GMACs':>10}{'loss':>10}")
    for name in args.names:
        print(f'{name:32}', train_step(name, args.num_classes, args.batch_size), flush=True)
    return None


if __name__ == '__main__':
    main()
