"""Evaluation of a trained model, put together from parsed arguments."""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
from torch import nn

from .builders import create_model, resolve_data_config
from .checkpoints import load_checkpoint, load_weights, model_weights, write_text
from .data import create_eval_dataset, create_eval_loader, load_training_data
from .devices import resolve_device, tune_device
from .errors import InputError
from .evaluation import evaluate, format_table
from .models import Shike

__all__ = ['evaluate_model']


def _load_local_counts(name: str) -> Optional[List[int]]:
    config = Path(name.split(':', 1)[1], 'config.json')
    return json.loads(config.read_text()).get('class_counts')


def _load_eval_model(args: argparse.Namespace) -> Tuple[nn.Module, Optional[List[int]], Optional[List[str]]]:
    """Model to evaluate, the class counts and class names it was trained with if it says."""
    if args.checkpoint:
        checkpoint = load_checkpoint(args.checkpoint)
        saved = checkpoint.get('args')
        if not isinstance(saved, argparse.Namespace) or not hasattr(saved, 'class_counts'):
            raise InputError(f"checkpoint '{args.checkpoint}' does not say what model it is of: use one of train.py.")
        for key in ('img_size', 'mean', 'std', 'crop_pct', 'interpolation'):
            if getattr(args, key) is None:
                setattr(args, key, getattr(saved, key))
        model = create_model(saved, len(saved.class_counts))
        load_weights(model, model_weights(checkpoint), args.checkpoint)
        return model, saved.class_counts, saved.class_names
    local = args.model.startswith('local-dir:')
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained or ':' in args.model)
        counts = _load_local_counts(args.model) if local else None
    except Exception as error:  # whatever a damaged folder makes timm, torch or safetensors raise
        raise InputError(f"model '{args.model}' cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(model, Shike):
        raise InputError(f"model '{args.model}' is a {type(model).__name__}, expected a SHIKE model.")
    return model, counts, model.pretrained_cfg.get('label_names')


def evaluate_model(args: argparse.Namespace) -> Dict[str, Any]:
    """Evaluate a trained model, in float32.

    Args:
        args: What `shike_timm.hparams.parse_eval_args` gives.

    Returns:
        The metrics of `shike_timm.evaluation.evaluate`.

    Raises:
        InputError: If anything given cannot work.
    """
    if bool(args.model) == bool(args.checkpoint):
        raise InputError('Give the model to evaluate, either as --model or as --checkpoint.')
    if args.results_file and not Path(args.results_file).absolute().parent.is_dir():
        raise InputError(f"results-file '{args.results_file}' is in a folder that does not exist: make it first.")
    device = resolve_device(args.device)
    tune_device(device)
    model, counts, names = _load_eval_model(args)
    if counts is None:
        data = load_training_data(
            args.dataset, args.data_dir, val_split=args.val_split, imb_factor=args.imb_factor, imb_type=args.imb_type,
            download=args.dataset_download)
        dataset, counts = data.test, data.class_counts
    else:
        dataset = create_eval_dataset(args.dataset, args.data_dir, args.val_split, args.dataset_download, names)
    num_classes = len(getattr(dataset, 'classes', counts))
    if len({num_classes, len(counts), model.num_classes}) > 1:
        raise InputError(f'The model has {model.num_classes} classes, but the data {num_classes}: choose other data.')
    data_config = resolve_data_config(args, model)
    loader = create_eval_loader(dataset, data_config, args.batch_size, device, args.workers)
    metrics = evaluate(model.to(device), loader, counts, device)
    print(format_table({'': metrics}))
    if args.results_file:
        write_text(Path(args.results_file), json.dumps(metrics, indent=2) + '\n')
    return metrics
