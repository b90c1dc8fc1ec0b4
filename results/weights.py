#!/usr/bin/env python3
"""Put a finished run's model and card into the package, as the weights of one of its names."""
import argparse
import json
import shutil
import sys
from pathlib import Path

import timm
import yaml

from shike_timm.model_card import model_card
from shike_timm.models.shike import WEIGHTS, default_cfgs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path, metavar='RUN', help='run folder of train.py')
    parser.add_argument('name', metavar='NAME.TAG', help='registered name and tag')
    parser.add_argument('--weights', type=Path, default=WEIGHTS, metavar='DIR', help='folder of the package')
    args = parser.parse_args()
    name, _, tag = args.name.partition('.')
    if name not in default_cfgs or tag not in default_cfgs[name].cfgs:
        parser.error(f"'{args.name}' is not a registered name and tag.")
    source, folder = args.run / 'model', args.weights / args.name
    config = json.loads((source / 'config.json').read_text())
    if config['architecture'] != name:
        parser.error(f"'{args.run}' is a run of {config['architecture']}, not of {name}.")
    card = model_card(
        args.name,
        timm.create_model(f'local-dir:{source}', pretrained=True),
        config,
        json.loads((args.run / 'metrics.json').read_text()),
        yaml.safe_load((args.run / 'args.yaml').read_text()),
        license='apache-2.0',
        load_as=args.name,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file in ('config.json', 'model.safetensors'):
        shutil.copyfile(source / file, folder / file)
    (folder / 'README.md').write_text(str(card))
    return 0


if __name__ == '__main__':
    sys.exit(main())
