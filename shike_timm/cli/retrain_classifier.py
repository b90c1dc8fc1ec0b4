"""Retraining of the classifiers: stage two alone."""
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from ..checkpoints import saved_args
from ..data.config import DataConfig
from ..errors import InputError
from ..options import check_file_values, complete, options, read_command_line
from ..pretrained.plain import PlainModel, load_plain, plain_from_checkpoint
from ..training.config import RetrainConfig, RunConfig
from ..training.resume import read_stage_one
from ..training.runs import rebalance, retrain
from .script import run_script

CONFIG = RetrainConfig

# Options that describe the data of stage one. They do not apply to other data.
OF_ITS_DATASET = {'imb_factor', 'imb_type', 'imb_seed', 'train_split', 'val_split'}
OF_ITS_DATA = {'num_classes', *options(DataConfig)} - OF_ITS_DATASET - {'data_dir', 'dataset', 'dataset_download'}


def parse_retrain_args(
        argv: Optional[Sequence[str]] = None) -> Tuple[RetrainConfig, Union[Dict[str, Any], PlainModel]]:
    """The configuration and the checkpoint. Values of the command line override those of the checkpoint."""
    given = read_command_line(
        RetrainConfig, 'Retrain the classifiers of a stage-one checkpoint: stage two alone.', argv)
    name, backbone = given['checkpoint'], given.get('backbone')
    if name.startswith(('local-dir:', 'hf-hub:')):
        return _plain_config(given, load_plain(name, backbone))
    checkpoint = read_stage_one(name)
    plain = plain_from_checkpoint(checkpoint, name, backbone)
    if plain is not None:
        return _plain_config(given, plain)
    before, own = saved_args(checkpoint), set(options(RunConfig)) - {'output', 'experiment', 'hparams', 'device'}
    if 'num_classes' in given:
        own -= OF_ITS_DATA
    if 'dataset' in given and given['dataset'] != before.get('dataset'):
        own -= OF_ITS_DATASET
    saved = {key: value for key, value in before.items() if key in own}
    if saved.get('crt_epochs') == 0:
        del saved['crt_epochs']  # Stage one may have run with --crt-epochs 0, but this is stage two.
    saved = check_file_values(RunConfig, saved, f"checkpoint '{given['checkpoint']}'", given)
    return complete(RetrainConfig, given, saved=saved), checkpoint


def _plain_config(given: Dict[str, Any], plain: PlainModel) -> Tuple[RetrainConfig, PlainModel]:
    """The configuration of one expert on a plain network. The recipe `rebalance` is the default."""
    sizes = {'img_size', 'input_size'}
    own = {key: value for key, value in plain.options.items() if not (key in sizes and sizes & set(given))}
    saved = check_file_values(RunConfig, own, f"checkpoint '{plain.name}'", given)
    model = dict(model='shike', num_experts=1, fusion=False)
    for key, value in model.items():
        if given.get(key, value) != value:
            raise InputError(
                f"--{key.replace('_', '-')} {given[key]} does not go with '{plain.name}', a plain network: leave it "
                'out.')
    model.update(backbone=plain.backbone)
    return complete(RetrainConfig, {'hparams': 'rebalance', **given, **model}, saved=saved), plain


def main() -> int:
    def run() -> None:
        config, checkpoint = parse_retrain_args()
        if isinstance(checkpoint, PlainModel):
            rebalance(config, checkpoint)
        else:
            retrain(config, checkpoint)

    return run_script(run)
