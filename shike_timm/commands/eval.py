"""Evaluation of a trained model, put together from parsed arguments."""
import argparse
import copy
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor

from ..build import resolve_data_config
from ..checkpoints import check_results_file, write_text
from ..data import create_eval_dataset, create_eval_loader, load_training_data
from ..devices import resolve_device, tune_device
from ..errors import InputError
from ..loading import load_trained_model
from ..measure import inference_costs
from ..metrics import all_subsets, evaluate, format_subsets, format_table
from ..models import Shike
from ..options import DATA, DEVICE, HPARAMS, PREPROCESSING, TRAINED_MODEL, Group, Option, complete, read_command_line
from ..report.logits import save_logits
from .cli import run_script
from .report import check_report, collect, count_costs, find_run

__all__ = ['OPTIONS', 'evaluate_model', 'main', 'parse_eval_args']

OPTIONS = (
    TRAINED_MODEL,
    Group(
        'Evaluation',
        Option('expert_subsets', bool, False, 'also tell accuracy and cost of every choice of experts'),
        Option('flip', bool, False, 'average the logits with those of the mirrored images, at twice the cost'),
        Option('batch_size', int, 256, 'images a batch', low=1, flags=('-b',)),
        Option('results_file', str, None, 'JSON file to write the metrics to', 'FILE'),
        Option(
            'save_logits', str, None, 'npz file to write the logits of each expert to, with targets, paths and classes',
            'FILE'),
        Option('report', str, None, 'folder to write a report with figures to, report.html and more', 'DIR'),
    ),
    DATA, PREPROCESSING, DEVICE, HPARAMS,
)


def _add_costs(subsets: List[Dict[str, Any]], model: Shike, images: Tensor, flip: bool) -> None:
    """Time each subset, on a small batch on a CPU, where a large one is no faster but takes minutes."""
    images = images[:16] if images.device.type == 'cpu' else images
    models = {}
    for one in subsets:
        reduced = models[str(one['experts'])] = copy.deepcopy(model).eval()
        reduced.set_experts(one['experts'])
    for one, cost in zip(subsets, inference_costs(models, images).values()):
        passes = 2 if flip else 1
        one.update(cost, gmacs=passes * cost['gmacs'], images_per_second=cost['images_per_second'] / passes)


def _write_results(path: Optional[str], metrics: Dict[str, Any]) -> None:
    if path:
        write_text(Path(path), json.dumps(metrics, indent=2) + '\n')


def _name(args: argparse.Namespace) -> str:
    return Path(args.checkpoint).stem if args.checkpoint else args.model


def evaluate_model(args: argparse.Namespace) -> Dict[str, Any]:
    """Evaluate a trained model, in float32.

    Args:
        args: What `parse_eval_args` gives.

    Returns:
        The metrics of `shike_timm.metrics.evaluate`, `per_class` with the `names` of the classes, None where they are
        unknown, and the training images of each, `class_counts`; with `--expert-subsets` their costs too.

    Raises:
        InputError: If anything given cannot work.
    """
    check_results_file(args.results_file)
    check_results_file(args.save_logits, 'save-logits')
    if args.report:
        check_report(args.report)
    if args.experts and args.expert_subsets:
        raise InputError('--expert-subsets tells of every choice of experts, --experts of one: leave one of them out.')
    device = resolve_device(args.device)
    tune_device(device)
    trained = load_trained_model(
        args.model, args.checkpoint, args.pretrained, args.experts, args.authors_classifiers)
    args = copy.copy(args)
    for key, value in trained.data_args.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    model, counts, names = trained.model, trained.class_counts, trained.class_names
    if counts is None:
        data = load_training_data(
            args.dataset, args.data_dir, val_split=args.val_split, imb_factor=args.imb_factor, imb_type=args.imb_type,
            download=args.dataset_download)
        dataset, counts, names = data.test, data.class_counts, data.class_names
    else:
        dataset = create_eval_dataset(
            args.dataset, args.data_dir, args.val_split, args.dataset_download, trained.class_names)
    num_classes = len(dataset.class_names or counts)
    if len({num_classes, len(counts), model.num_classes}) > 1:
        raise InputError(f'The model has {model.num_classes} classes, but the data {num_classes}: choose other data.')
    data_config = resolve_data_config(args, model)
    loader = create_eval_loader(dataset, data_config, args.batch_size, device, args.workers)
    subsets = all_subsets(model.num_experts) if args.expert_subsets else ()
    kept = [] if args.save_logits or args.report else None
    metrics = evaluate(model.to(device), loader, counts, device, subsets, args.flip, per_class=True, kept=kept)
    metrics['per_class'] = dict(names=names, class_counts=counts, **metrics['per_class'])
    print(format_table({'': metrics}), flush=True)
    _write_results(args.results_file, metrics)
    if subsets:
        images, _ = next(iter(loader))
        _add_costs(metrics['subsets'], model, images.contiguous(memory_format=torch.channels_last), args.flip)
        print(f"\n{format_subsets(metrics['subsets'])}")
        _write_results(args.results_file, metrics)
    if kept:
        trained.class_counts, trained.class_names = counts, names
        run = find_run(args.model, args.checkpoint)
        costs = metrics.get('subsets') or count_costs(model, next(iter(loader))[0][:1])
        saved = collect(trained, dataset, kept, costs=costs, run=run, name=run.name if run else _name(args))
        if args.save_logits:
            save_logits(args.save_logits, saved)
        if args.report:
            from ..report.data import judge
            from ..report.page import write_report
            print(f'Report: {write_report(Path(args.report), [judge(saved)])}')
    return metrics


def parse_eval_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of eval.py.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    return complete(
        OPTIONS, read_command_line('Evaluate a model on many-, medium- and few-shot classes.', OPTIONS, argv))


def main() -> int:
    return run_script(lambda: evaluate_model(parse_eval_args()))
