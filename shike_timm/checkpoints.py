"""Checkpoints. Only a complete file replaces an older checkpoint, and reading never runs pickled code."""
import argparse
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Union

import safetensors.torch
import torch
from timm.models import clean_state_dict
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from .errors import DamagedError, InputError, one_line

WEIGHTS_FILE, CONFIG_FILE = 'model.safetensors', 'config.json'  # Files of a model folder in timm's local-dir format.

_AUTHORS_LAYOUT = re.compile(r'(module\.)?(layer3s|shallow_exps|rt_classifiers|classifiers)\.')


class StageSaver(CheckpointSaver):
    """timm's saver for one stage. It keeps the newest checkpoints, and replaces `last` in one step.

    If `last` was saved in the middle of an epoch, its entry ['saver']['done'] records the batches that are done.
    """

    def __init__(self, folder: Union[str, Path], **kwargs: Any):
        super().__init__(checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)
        self.done: Dict[str, Any] = {}

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm removes dst first, so for a moment there would be no `last`.

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:  # On a full disk torch raises a RuntimeError.
            Path(save_path).unlink(missing_ok=True)
            advice = 'free some space' if os.path.isdir(self.checkpoint_dir) else 'its folder is gone, start again'
            raise OSError(f"checkpoint '{save_path}' cannot be written ({one_line(error)}): {advice}.") from error

    def state_dict(self, epoch: Optional[int] = None, metric: Optional[float] = None) -> Dict[str, Any]:
        return dict(super().state_dict(epoch, metric), done=self.done)

    def save_epoch(self, epoch: int, value: Optional[float] = None) -> None:
        """Save a whole epoch, also as `model_best` if its value of the metric is the best so far."""
        if value is not None and (self.best_metric is None or self.cmp(value, self.best_metric)):
            self.best_epoch, self.best_metric = epoch, value
            # `model_best` is saved before `last`. If the run ends between the two, a resumed run repeats the epoch and
            # saves both.
            self._save_as('model_best', epoch)
        self.save_checkpoint(epoch)

    def save_last(self, epoch: int, done: Optional[Dict[str, Any]] = None) -> None:
        """Save only `last`. `epoch` is the last whole epoch (-1 before the first), `done` what is done since."""
        self.done = done or {}
        self._save_as('last', epoch)
        self.done = {}

    def _save_as(self, name: str, epoch: int) -> None:
        temporary, kept = (os.path.join(self.checkpoint_dir, f'{one}{self.extension}') for one in ('tmp', name))
        self._save(temporary, epoch)
        self._replace(temporary, kept)


def load_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a file of torch.save, or of safetensors under `state_dict`, to the CPU: tensors and plain values only."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' does not exist.")
    try:
        if path.suffix == '.safetensors':
            return {'state_dict': safetensors.torch.load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns of some files that are refused below.
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # A damaged file can make the unpickler raise nearly any error.
        with path.open('rb') as file:
            bare_pickle = file.read(1) == pickle.PROTO
        if isinstance(error, pickle.UnpicklingError) and (bare_pickle or 'GLOBAL' in str(error)):
            raise InputError(
                f"checkpoint '{path}' holds a pickled object other than tensors and plain values. It could run any "
                'code and is not loaded: save its state_dict alone.') from error
        raise DamagedError(f"checkpoint '{path}' is truncated or not a checkpoint: use another one.") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint '{path}' holds a {type(checkpoint).__name__}, expected a dictionary of weights.")
    return checkpoint


def model_weights(checkpoint: Dict[str, Any], path: Union[str, Path]) -> Dict[str, Tensor]:
    """The model's weights in a checkpoint that was read from a path. Like timm, prefer their moving average."""
    keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
    weights = next((checkpoint[key] for key in keys if checkpoint.get(key) is not None), checkpoint)
    if not weights or not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise InputError(
            f"checkpoint '{path}' holds no state dict of names and tensors: use a checkpoint of shike train.")
    if any(map(_AUTHORS_LAYOUT.match, weights)):
        raise InputError(
            f"checkpoint '{path}' is in the layout of the authors' code: convert it with tools/convert_authors.py.")
    return _merge_lora(clean_state_dict(weights))


def _merge_lora(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Add the low-rank updates of `--lora` to the weights of their layers, as in a model without LoRA."""
    merged = {name.replace('.base_layer.', '.'): value for name, value in weights.items() if '.lora_' not in name}
    for name, value in weights.items():
        if name.endswith('.lora_A.default.weight'):
            layer = name.removesuffix('.lora_A.default.weight')
            merged[f'{layer}.weight'] = merged[f'{layer}.weight'] + weights[f'{layer}.lora_B.default.weight'] @ value
    return merged


def saved_args(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """The option values that a checkpoint was trained with, empty if the checkpoint does not hold them."""
    saved = checkpoint.get('args')
    return vars(saved) if isinstance(saved, argparse.Namespace) else {}


def load_weights(model: nn.Module, weights: Dict[str, Tensor], path: Union[str, Path]) -> None:
    """Load weights that were read from a path. If they do not fit exactly, raise an InputError and change nothing."""
    own = model.state_dict()
    wrong = [name for name in own if name not in weights] + [name for name in weights if name not in own]
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        shapes = [str(tuple(state[wrong[0]].shape)) if wrong[0] in state else 'nothing' for state in (weights, own)]
        raise InputError(
            f"checkpoint '{path}' is of another architecture: at '{wrong[0]}' it holds {shapes[0]}, "
            f'this model expects {shapes[1]}. Choose the model and options that it was trained with.')
    model.load_state_dict(weights)
