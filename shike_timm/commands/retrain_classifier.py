"""Retraining of the classifiers: stage two alone."""
import argparse
from typing import Any, Dict, Optional, Sequence, Tuple

from ..options import TRAINING, Group, Option, check_values, complete, defaults, read_command_line
from ..resuming import load_stage_one, saved_args
from ..runs import retrain
from .cli import run_script

__all__ = ['OPTIONS', 'main', 'parse_retrain_args']

OPTIONS = (
    Group('Stage one', Option(
        'checkpoint', str, None, 'run folder of train.py, or a checkpoint of its stage one', 'RUN', required=True)),
    *TRAINING,
)


def parse_retrain_args(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """Arguments of retrain_classifier.py and the checkpoint that they name; those it was trained with are the defaults.

    Raises:
        InputError: If an argument, the checkpoint, or a line of the hparams file is wrong.
    """
    given = read_command_line('Retrain the classifiers of a stage-one checkpoint: stage two alone.', OPTIONS, argv)
    checkpoint = load_stage_one(given['checkpoint'])
    before, own = saved_args(checkpoint), set(defaults(TRAINING)) - {'output', 'experiment', 'hparams', 'device'}
    if 'num_classes' in given:  # of other data, which stage one's split says nothing of
        own -= {
            'num_classes', 'holdout', 'val_per_class', 'class_map', 'class_depth', 'class_stats', 'train_list',
            'val_list', 'input_key', 'target_key', 'group_key', 'train_num_samples', 'val_num_samples'}
    if 'dataset' in given and given['dataset'] != before.get('dataset'):
        own -= {'imb_factor', 'imb_type', 'imb_seed', 'train_split', 'val_split'}
    saved = {key: value for key, value in before.items() if key in own}
    if saved.get('crt_epochs') == 0:
        del saved['crt_epochs']  # the run had no stage two, which is what is asked for now
    saved = check_values(TRAINING, saved, f"checkpoint '{given['checkpoint']}'")
    return complete(OPTIONS, given, saved=saved), checkpoint


def main() -> int:
    return run_script(lambda: retrain(*parse_retrain_args()))
