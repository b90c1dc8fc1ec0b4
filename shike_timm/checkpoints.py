"""Checkpoints: saved whole or not at all, loaded without unpickling, exported in timm's local-dir format."""
import argparse
import copy
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import safetensors.torch
import torch
from timm.models import clean_state_dict, save_for_hf
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from .errors import DamagedError, InputError, one_line
from .models import Shike

__all__ = [
    'StageSaver', 'check_results_file', 'export_model', 'load_checkpoint', 'load_weights', 'model_weights',
    'write_text',
]


class StageSaver(CheckpointSaver):
    """timm's saver for one stage: checkpoints are kept by recency alone, and `last` is replaced in one step.

    `last` may be of the middle of an epoch; its entry `saver` then says under `done` what of it is over.

    Args:
        folder: Folder of the stage's checkpoints.
        **kwargs: Arguments of `timm.utils.CheckpointSaver`.
    """

    def __init__(self, folder: Union[str, Path], **kwargs: Any):
        super().__init__(checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)
        self.done: Dict[str, Any] = {}

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)  # timm removes dst first, which leaves a moment without any `last`

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:  # torch gives the latter on a full disk
            Path(save_path).unlink(missing_ok=True)
            raise OSError(
                f"checkpoint '{save_path}' cannot be written ({one_line(error)}): free some space.") from error

    def state_dict(self, epoch: Optional[int] = None, metric: Optional[float] = None) -> Dict[str, Any]:
        return dict(super().state_dict(epoch, metric), done=self.done)

    def save_epoch(self, epoch: int, value: Optional[float] = None) -> None:
        """Save a whole epoch, as `model_best` too where its value of the metric is the best so far."""
        if value is not None and (self.best_metric is None or self.cmp(value, self.best_metric)):
            self.best_epoch, self.best_metric = epoch, value
            # Before `last`, which knows of it: an end in between is made good when the epoch is done again.
            self._save_as('model_best', epoch)
        self.save_checkpoint(epoch)

    def save_last(self, epoch: int, done: Optional[Dict[str, Any]] = None) -> None:
        """Save the state as `last` and as nothing else.

        Args:
            epoch: The last whole epoch; -1 before the first, so that there is always something to resume from.
            done: What is over of the next epoch.
        """
        self.done = done or {}
        self._save_as('last', epoch)
        self.done = {}

    def _save_as(self, name: str, epoch: int) -> None:
        temporary, kept = (os.path.join(self.checkpoint_dir, f'{one}{self.extension}') for one in ('tmp', name))
        self._save(temporary, epoch)
        self._replace(temporary, kept)


def check_results_file(path: Optional[str], option: str = 'results-file') -> None:
    """Check that a file of results can be written, before the work whose results it is to hold.

    Raises:
        InputError: If it is a folder, or in a folder that does not exist.
    """
    if path and Path(path).is_dir():
        raise InputError(f"{option} '{path}' is a folder: give the name of a file.")
    if path and not Path(path).absolute().parent.is_dir():
        raise InputError(f"{option} '{path}' is in a folder that does not exist: make it first.")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)


def load_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Load a checkpoint file to the CPU, tensors and plain values only.

    Args:
        path: A file of torch.save or safetensors.

    Returns:
        The checkpoint; what safetensors holds comes under `state_dict`.

    Raises:
        InputError: If the file is missing, truncated, or would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' does not exist.")
    try:
        if path.suffix == '.safetensors':
            return {'state_dict': safetensors.torch.load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch doubts what is about to be refused
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise nearly anything
        with path.open('rb') as file:
            bare_pickle = file.read(1) == pickle.PROTO
        if isinstance(error, pickle.UnpicklingError) and (bare_pickle or 'GLOBAL' in str(error)):
            raise InputError(
                f"checkpoint '{path}' holds a pickled object other than tensors and plain values, "
                'which could run any code and is not loaded: save its state_dict alone.') from error
        raise DamagedError(f"checkpoint '{path}' is truncated or not a checkpoint: use another one.") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint '{path}' holds a {type(checkpoint).__name__}, expected a dictionary of weights.")
    return checkpoint


def model_weights(checkpoint: Dict[str, Any], path: Union[str, Path]) -> Dict[str, Tensor]:
    """The model's weights in a checkpoint, its moving average where there is one, as timm chooses.

    Args:
        checkpoint: What `load_checkpoint` gives.
        path: Where it comes from, for the message.

    Raises:
        InputError: If it holds no weights.
    """
    keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
    weights = next((checkpoint[key] for key in keys if checkpoint.get(key) is not None), checkpoint)
    if not weights or not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise InputError(
            f"checkpoint '{path}' holds no state dict of names and tensors: use one of train.py or of the authors' "
            'CIFAR code.')
    return clean_state_dict(weights)


def load_weights(model: nn.Module, weights: Dict[str, Tensor], path: Union[str, Path]) -> None:
    """Load weights that must fit the model exactly.

    Args:
        model: Model to load into.
        weights: State dict.
        path: Where the weights come from, for the message.

    Raises:
        InputError: If a name or a shape differs; the model is left as it was.
    """
    own = model.state_dict()
    wrong = [name for name in own if name not in weights] + [name for name in weights if name not in own]
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        shapes = [str(tuple(state[wrong[0]].shape)) if wrong[0] in state else 'nothing' for state in (weights, own)]
        raise InputError(
            f"checkpoint '{path}' is of another architecture: at '{wrong[0]}' it holds {shapes[0]}, "
            f'this model expects {shapes[1]}; choose the model and options it was trained with.')
    model.load_state_dict(weights)


def export_model(
        model: nn.Module,
        folder: Union[str, Path],
        data_config: Dict[str, Any],
        class_names: Optional[Sequence[str]] = None,
        class_counts: Optional[Sequence[int]] = None,
        **known: Any,
) -> None:
    """Write `config.json` and `model.safetensors`, which timm loads as `local-dir:FOLDER`.

    Args:
        model: Model made by `timm.create_model`.
        folder: Folder to write, replaced as a whole if it exists.
        data_config: Preprocessing, what `timm.data.resolve_data_config` gives.
        class_names: Names of the classes in label order, where they are known.
        class_counts: Training images of each class, kept in the configuration.
        **known: What else of the data is kept in it, where it is anything.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)
    if class_counts and isinstance(model, Shike) and model.class_counts is None:
        model.set_training_prior(class_counts)
    model.pretrained_cfg.pop('label_names', None)  # of the weights that come with the name, not of these
    model_config: Dict[str, Any] = {'pretrained_cfg': {'tag': ''}}  # not the weights of the name's default tag
    for key, values in dict(label_names=class_names, class_counts=class_counts, **known).items():
        if values:
            model_config[key] = values
    save_for_hf(model, str(temporary), model_config, safe_serialization=True, data_config=data_config)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
