"""Training: both stages of a run."""
import logging
import os
from dataclasses import replace
from typing import Any, Dict, Optional, Sequence

import torch

from ..models.create import with_backbone_weights
from ..options import check_file_values, checked, complete, read_command_line
from ..recipes import read_yaml
from ..training.config import TrainConfig
from ..training.resume import run_folder
from ..training.runs import train
from ..training.search import CHOSEN
from .script import command

_logger = logging.getLogger(__name__)

CONFIG = TrainConfig
EXAMPLES = (
    'shike train --data-dir photos',
    'shike train --data-dir photos --hparams finetune_plain --backbone convnext_tiny --img-size 224 '
    '\\\n    --epochs 10 --batch-size 64 --lr 0.02 --amp',
    'shike train --data-dir photos --train-list train.csv --val-list val.csv --experiment first --resume',
)
CPU_RECIPE = dict(hparams='frozen', backbone='tf_efficientnet_lite0', img_size=160)
GPU_RECIPE = dict(hparams='finetune_plain', backbone='convnext_tiny', img_size=224)


def _recommended(given: Dict[str, Any]) -> Dict[str, Any]:
    """Add the recommended recipe for a user's own images, if the user chose no recipe, model or weights."""
    chosen = {'hparams', 'dataset', 'model', 'backbone', 'pretrained', 'initial_checkpoint', 'resume', 'method'}
    if chosen & set(given) or not {'data_dir', 'train_list'} & set(given):
        return given
    on_gpu = torch.cuda.is_available() and given.get('device') != 'cpu'
    recipe = dict(GPU_RECIPE if on_gpu else CPU_RECIPE)
    _logger.info(
        f"No recipe is chosen. On this {'GPU' if on_gpu else 'CPU'} it is --hparams {recipe['hparams']} --backbone "
        f"{recipe['backbone']} --img-size {given.get('img_size', recipe['img_size'])}. Other options choose another.")
    return {**recipe, **given}


def complete_train_args(given: Dict[str, Any]) -> TrainConfig:
    """The configuration of given values. For a resumed run the values of its `args.yaml` are the defaults."""
    given = _recommended(given)
    folder = run_folder(checked(TrainConfig, given))
    path, saved = os.path.join(folder or '', 'args.yaml'), {}
    if folder and os.path.isfile(path):
        saved = check_file_values(TrainConfig, read_yaml(path), f"hparams file '{path}'", given)
    config = complete(TrainConfig, given, saved=saved)
    if config.search and saved.get('levels'):  # The search of the resumed run is done.
        config = replace(config, **{name: saved[name] for name in CHOSEN})
    return with_backbone_weights(config)


def parse_train_args(argv: Optional[Sequence[str]] = None) -> TrainConfig:
    """The configuration that a command line gives."""
    return complete_train_args(
        read_command_line(TrainConfig, 'Train a model: stage one, then classifier retraining.', argv, EXAMPLES))


main = command(train, parse_train_args)
