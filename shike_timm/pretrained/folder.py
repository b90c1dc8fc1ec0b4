"""Model folders in timm's local-dir format: a configuration and the weights."""
import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from timm.models import parse_model_name, save_for_hf
from torch import nn

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ..data.config import PreprocessingConfig
from ..errors import InputError, one_line
from ..files import read_json
from ..models import Shike
from ..options import check_saved, checked


def find_model(path: str) -> Path:
    """The model folder of a run folder, or the model folder itself."""
    for folder in (Path(path), Path(path, 'model')):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise InputError(
        f"'{path}' holds no model, {CONFIG_FILE} and {WEIGHTS_FILE}: give the run folder of a finished training, or "
        'the model folder in it.')


def read_config(name: str, weights: Optional[str] = None) -> Dict[str, Any]:
    """Read the configuration of `local-dir:FOLDER` or `hf-hub:USER/NAME`, or else the one beside the file `weights`.

    A configuration that contradicts itself or the weights beside it raises an InputError.
    """
    source, model_id = parse_model_name(name)
    if source == 'local-dir':
        path = Path(model_id, CONFIG_FILE)
    elif source == 'hf-hub':
        repo_id, _, revision = model_id.partition('@')
        path = Path(hf_hub_download(repo_id, CONFIG_FILE, revision=revision or None))
    else:
        path = Path(weights or '').with_name(CONFIG_FILE)
    config = read_json(path)
    check_config(config, f"'{path}'")
    if path.with_name(WEIGHTS_FILE).is_file() and str(config.get('architecture')).endswith('shike'):
        _check_weights(config, path)
    return config


def check_config(config: Dict[str, Any], source: str) -> None:
    """Raise an InputError if preprocessing is impossible or classes are contradictory. `source` begins the message."""
    cfg, args = config.get('pretrained_cfg', config), config.get('model_args') or {}
    if not isinstance(cfg, dict) or not isinstance(args, dict):
        raise InputError(f"{source} is damaged: 'pretrained_cfg' and 'model_args' must hold names and values.")
    try:
        found = check_saved(PreprocessingConfig, {**cfg, **config}, source)
        checked(PreprocessingConfig, found)
    except InputError as error:
        raise InputError(f'{source} is damaged: {error}') from error
    channels = args.get('in_chans') or (found.get('input_size') or [3])[0]
    for name in ('mean', 'std'):
        if len(found.get(name) or '1') not in (1, 3, channels):
            raise InputError(f"{source} is damaged: '{name}' has {len(found[name])} values, expected {channels}.")
    check_threshold(source, config.get('reject_threshold'))
    num_classes = config.get('num_classes', cfg.get('num_classes'))
    if num_classes is None:
        return
    if not isinstance(num_classes, int) or args.get('num_classes', num_classes) != num_classes:
        raise InputError(
            f"{source} contradicts itself: it is of {num_classes!r} classes and of {args.get('num_classes')!r}.")
    check_classes(
        source, num_classes, config.get('label_names'), config.get('class_counts'), config.get('shot_counts'))


def check_threshold(source: str, threshold: Any) -> None:
    """Raise an InputError if a threshold for unknown images is no probability. `source` begins the message."""
    if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
        raise InputError(f"{source} is damaged: its 'reject_threshold' is {threshold!r}, expected a probability.")


def check_classes(source: str, num_classes: int, names: Any, counts: Any = None, shot_counts: Any = None) -> None:
    """Raise an InputError if names or counts are not one for each class. `source` begins the message."""
    for what, values, kind in (
            ('class names', names, str), ('class counts', counts, int), ('counts for the shots', shot_counts, int)):
        if values is not None and (not isinstance(values, (list, tuple)) or len(values) != num_classes or not all(
                isinstance(one, kind) and (kind is str or 0 < one < 2 ** 53) for one in values)):
            raise InputError(f'{source} contradicts itself: its {what} are not one for each of {num_classes} classes.')
    if names is not None and len(set(names)) < num_classes:
        raise InputError(f'{source} contradicts itself: two of its classes have the same name.')


def _check_weights(config: Dict[str, Any], path: Path) -> None:
    """Raise an InputError if numbers of classes or experts differ from the weights, which timm may load in part."""
    with safe_open(path.with_name(WEIGHTS_FILE), 'pt') as file:
        names = list(file.keys())
        head = file.get_slice('classifier.weight').get_shape() if 'classifier.weight' in names else (0, 0)
    experts = {found[1] for found in map(re.compile(r'experts\.(\d+)\.').match, names) if found}
    told = config.get('num_classes', 0), config.get('model_args', {}).get('num_experts', 3)
    for what, said, found in zip(('classes', 'experts'), told, (head[1], len(experts))):
        if said != found:
            raise InputError(f"'{path}' is of {said} {what}, but the weights beside it are of {found}: restore both.")


def export_model(
        model: nn.Module, folder: Union[str, Path], data_config: Dict[str, Any],
        class_names: Optional[Sequence[str]] = None, class_counts: Optional[Sequence[int]] = None, **facts: Any,
) -> None:
    """Write a folder that timm loads as `local-dir:FOLDER`. An existing folder is replaced as a whole.

    The `facts` are further entries of `config.json`. Empty facts are left out.
    """
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)
    if class_counts and isinstance(model, Shike) and model.class_counts is None:
        model.set_training_prior(class_counts)
    model.pretrained_cfg.pop('label_names', None)  # These names belong to the weights in the package.
    config: Dict[str, Any] = {'pretrained_cfg': {'tag': ''}}  # These weights are not those of the default tag.
    facts = dict(label_names=class_names, class_counts=class_counts, **facts)
    config.update({key: value for key, value in facts.items() if value})
    try:
        save_for_hf(model, str(temporary), config, safe_serialization=True, data_config=data_config)
        config = read_json(temporary / CONFIG_FILE)
        # transformers takes num_classes from the top level, and refuses a second value.
        config['model_args'].pop('num_classes', None)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk.
        raise OSError(f"model folder '{folder}' cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
