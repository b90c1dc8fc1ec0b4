#!/usr/bin/env python3
"""Images a second of a model on the CPU: torch without compiling, and onnxruntime on its export, round by round.

Both have the same threads. The export takes a minute for a large model and is not timed.
"""
import argparse
import copy
import statistics
import tempfile
from pathlib import Path

import timm
import torch

import shike_timm  # noqa: F401
from shike_timm.costs import seconds_per_call
from shike_timm.publishing.export import FILES, load_exported, save_exported


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='registered names, or local-dir:RUN/model')
    parser.add_argument('--batch-size', type=int, default=16, help='images a call')
    parser.add_argument('--img-size', type=int, help="side of the images. By default the model's own")
    parser.add_argument('--threads', type=int, help="threads of either side. By default torch's choice")
    parser.add_argument('--rounds', type=int, default=5, help='rounds. The median counts')
    parser.add_argument('--calls', type=int, default=5, help='calls of each side in a round')
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    print(f'{torch.get_num_threads()} threads, batches of {args.batch_size}, medians of {args.rounds} rounds')
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=':' in name)
        data_config = timm.data.resolve_input_data_config(model, args={'img_size': args.img_size})
        with tempfile.TemporaryDirectory() as folder:
            save_exported(model, folder, 'onnx', data_config)
            exported = load_exported(Path(folder, FILES['onnx']), 'onnx')
        images = torch.randn(args.batch_size, *data_config['input_size'])
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        images_last = images.contiguous(memory_format=torch.channels_last)
        sides = {
            'torch': lambda: model(images),  # noqa: B023
            'torch, channels_last': lambda: channels_last(images_last),  # noqa: B023
            'onnxruntime': lambda: exported(images),  # noqa: B023
        }
        rates = {side: [] for side in sides}
        with torch.inference_mode():
            for i in range(1 + args.rounds):
                for side, call in sides.items():
                    seconds = seconds_per_call(call, torch.device('cpu'), args.calls)
                    if i:  # the first round warms up
                        rates[side].append(args.batch_size / seconds)
        for side, values in rates.items():
            median = statistics.median(values)
            ratio = median / statistics.median(rates['torch'])
            spread = f'{min(values):.1f} to {max(values):.1f}'
            print(f'{name:24} {side:22} {median:8.1f} images/s, {ratio:.2f} times torch; {spread}', flush=True)


if __name__ == '__main__':
    main()
