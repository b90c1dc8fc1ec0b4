"""Retraining of the classifiers: stage two alone."""
from typing import Any, Dict, Optional, Sequence, Tuple

from ..options import check_file_values, complete, options, read_command_line
from ..training.config import RetrainConfig, RunConfig
from ..training.resume import read_stage_one, saved_args
from ..training.runs import retrain
from .script import run_script

CONFIG = RetrainConfig

# Options that describe the data of stage one. They do not apply to other data.
OF_ITS_DATA = {
    'num_classes', 'holdout', 'val_per_class', 'class_map', 'class_depth', 'class_stats', 'train_list', 'val_list',
    'input_key', 'target_key', 'group_key', 'train_num_samples', 'val_num_samples',
}
OF_ITS_DATASET = {'imb_factor', 'imb_type', 'imb_seed', 'train_split', 'val_split'}


def parse_retrain_args(argv: Optional[Sequence[str]] = None) -> Tuple[RetrainConfig, Dict[str, Any]]:
    """The configuration that a command line gives over that of its checkpoint, and the checkpoint."""
    given = read_command_line(
        RetrainConfig, 'Retrain the classifiers of a stage-one checkpoint: stage two alone.', argv)
    checkpoint = read_stage_one(given['checkpoint'])
    before, own = saved_args(checkpoint), set(options(RunConfig)) - {'output', 'experiment', 'hparams', 'device'}
    if 'num_classes' in given:
        own -= OF_ITS_DATA
    if 'dataset' in given and given['dataset'] != before.get('dataset'):
        own -= OF_ITS_DATASET
    saved = {key: value for key, value in before.items() if key in own}
    if saved.get('crt_epochs') == 0:
        del saved['crt_epochs']  # Stage one may have run with --crt-epochs 0. Now a stage two is asked for.
    saved = check_file_values(RunConfig, saved, f"checkpoint '{given['checkpoint']}'", given)
    return complete(RetrainConfig, given, saved=saved), checkpoint


def main() -> int:
    return run_script(lambda: retrain(*parse_retrain_args()))
