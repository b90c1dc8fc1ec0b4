"""Retraining of the classifiers: stage two alone."""
from typing import Any, Dict, Optional, Sequence, Tuple

from ..options import check_values, complete, options, read_command_line
from ..training.config import RetrainConfig, RunConfig
from ..training.resume import read_stage_one, saved_args
from ..training.runs import retrain
from .script import run_script


def parse_retrain_args(argv: Optional[Sequence[str]] = None) -> Tuple[RetrainConfig, Dict[str, Any]]:
    """Arguments of retrain_classifier.py and the checkpoint that they name; those it was trained with are the defaults.

    Raises:
        InputError: If an argument, the checkpoint, or a line of the hparams file is wrong.
    """
    given = read_command_line(
        RetrainConfig, 'Retrain the classifiers of a stage-one checkpoint: stage two alone.', argv)
    checkpoint = read_stage_one(given['checkpoint'])
    before, own = saved_args(checkpoint), set(options(RunConfig)) - {'output', 'experiment', 'hparams', 'device'}
    if 'num_classes' in given:  # of other data, which stage one's split says nothing of
        own -= {
            'num_classes', 'holdout', 'val_per_class', 'class_map', 'class_depth', 'class_stats', 'train_list',
            'val_list', 'input_key', 'target_key', 'group_key', 'train_num_samples', 'val_num_samples'}
    if 'dataset' in given and given['dataset'] != before.get('dataset'):
        own -= {'imb_factor', 'imb_type', 'imb_seed', 'train_split', 'val_split'}
    saved = {key: value for key, value in before.items() if key in own}
    if saved.get('crt_epochs') == 0:
        del saved['crt_epochs']  # the run had no stage two, which is what is asked for now
    saved = check_values(RunConfig, saved, f"checkpoint '{given['checkpoint']}'")
    return complete(RetrainConfig, given, saved=saved), checkpoint


CONFIG = RetrainConfig


def main() -> int:
    return run_script(lambda: retrain(*parse_retrain_args()))
