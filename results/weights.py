#!/usr/bin/env python3
"""Copy the model and card of a finished run into the package, as the weights of a registered name."""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch

from shike_timm.checkpoints import load_weights
from shike_timm.cli.script import run_script
from shike_timm.errors import InputError
from shike_timm.models.registry import PACKAGED_WEIGHTS, default_cfgs
from shike_timm.pretrained.folder import find_model
from shike_timm.pretrained.load import load_trained_model
from shike_timm.publishing.card import model_card
from shike_timm.publishing.hub import read_run


def place(run: str, name: str, weights: Path) -> None:
    """Copy the model of a run into `weights/NAME.TAG`, if that name makes the same network."""
    registered, _, tag = name.partition('.')
    if registered not in default_cfgs or tag not in default_cfgs[registered].cfgs:
        raise InputError(f"'{name}' is not a registered name and tag.")
    source = find_model(run)
    trained = load_trained_model(f'local-dir:{source}').model.eval()
    metrics, args = read_run(source)
    config = json.loads((source / 'config.json').read_text())
    if config['architecture'] != registered:
        raise InputError(f"'{source}' is a model of {config['architecture']}, expected {registered}.")
    for key in ('label_names', 'class_counts'):
        if len(config.get(key) or ()) != config['num_classes']:
            raise InputError(f"'{source}' does not have the {key} of its {config['num_classes']} classes.")
    model = timm.create_model(name).eval()
    load_weights(model, trained.state_dict(), source)
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.inference_mode():
        if not torch.equal(model(images), trained(images)):
            raise InputError(f"'{source}' was made with other options than '{name}' has.")
    # JSON turns tuples into lists.
    own, given = (json.loads(json.dumps(timm.data.resolve_model_data_config(one))) for one in (model, trained))
    for key in own:
        if own[key] != given[key]:
            raise InputError(f"'{source}' has {key} {given[key]}, but '{name}' stands for {own[key]}.")
    card = model_card(name, trained, config, metrics, args, license='apache-2.0', load_as=name)
    folder = weights / name
    weights.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=weights) as temporary:
        inside = Path(temporary, name)
        inside.mkdir()
        for file in ('config.json', 'model.safetensors'):
            shutil.copyfile(source / file, inside / file)
        (inside / 'README.md').write_text(str(card))
        shutil.rmtree(folder, ignore_errors=True)
        inside.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='run folder of shike train')
    parser.add_argument('name', metavar='NAME.TAG', help='registered name and tag')
    parser.add_argument('--weights', type=Path, default=PACKAGED_WEIGHTS, metavar='DIR', help='folder of the package')
    args = parser.parse_args()
    place(args.run, args.name, args.weights)


if __name__ == '__main__':
    sys.exit(run_script(main))
