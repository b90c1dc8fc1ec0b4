"""Model folders in timm's local-dir format: a configuration and the weights."""
import copy
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

import torch
from huggingface_hub import hf_hub_download
from timm.models import parse_model_name, save_for_hf
from torch import nn

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ..errors import InputError
from ..models import Shike


def find_model(path: str) -> Path:
    """The model folder of a run folder, or the model folder itself."""
    for folder in (Path(path), Path(path, 'model')):
        if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder
    raise InputError(
        f"'{path}' holds no model, {CONFIG_FILE} and {WEIGHTS_FILE}: give the run folder of a finished training, or "
        'the model folder in it.')


def read_config(name: str, weights: Optional[str] = None) -> Dict[str, Any]:
    """The configuration of `local-dir:FOLDER` or `hf-hub:USER/NAME`, or else the one beside a file of weights."""
    source, model_id = parse_model_name(name)
    if source == 'local-dir':
        path = Path(model_id, CONFIG_FILE)
    elif source == 'hf-hub':
        repo_id, _, revision = model_id.partition('@')
        path = Path(hf_hub_download(repo_id, CONFIG_FILE, revision=revision or None))
    else:
        path = Path(weights or '').with_name(CONFIG_FILE)
    return json.loads(path.read_text(encoding='utf-8'))


def export_model(
        model: nn.Module,
        folder: Union[str, Path],
        data_config: Dict[str, Any],
        class_names: Optional[Sequence[str]] = None,
        class_counts: Optional[Sequence[int]] = None,
        **facts: Any,
) -> None:
    """Write a folder that timm loads as `local-dir:FOLDER`. An existing one is replaced as a whole.

    The model was made by `timm.create_model`, the preprocessing by `timm.data.resolve_data_config`. The facts go into
    `config.json`, unless they are empty.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)
    if class_counts and isinstance(model, Shike) and model.class_counts is None:
        model.set_training_prior(class_counts)
    model.pretrained_cfg.pop('label_names', None)  # These names belong to the weights in the package.
    config: Dict[str, Any] = {'pretrained_cfg': {'tag': ''}}  # These weights are not those of the default tag.
    facts = dict(label_names=class_names, class_counts=class_counts, **facts)
    config.update({key: value for key, value in facts.items() if value})
    save_for_hf(model, str(temporary), config, safe_serialization=True, data_config=data_config)
    config = read_config(f'local-dir:{temporary}')
    # transformers takes the number at the top level and refuses a second one.
    config['model_args'].pop('num_classes', None)
    (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
