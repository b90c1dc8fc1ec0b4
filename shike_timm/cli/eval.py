"""Evaluation of a trained model, put together from parsed arguments."""
import copy
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from ..checkpoints import check_results_file, write_text
from ..data import SourceConfig, create_eval_loader, load_eval_data, load_training_data
from ..data.config import CheckConfig, EvalDataConfig, PreprocessingConfig
from ..devices import DeviceConfig, tune_device
from ..distributed import join_processes, rank, world_size
from ..errors import InputError
from ..measure import inference_costs
from ..metrics import ShotConfig, all_subsets, balanced_over, evaluate, format_subsets, format_table, shot_numbers
from ..models import Shike
from ..options import HparamsConfig, checked, option, parse
from ..pretrained.load import TrainedModelConfig, load_trained_model, set_target_prior, with_data_args
from ..report.logits import save_logits
from ..training.build import resolve_data_config
from .report import CamConfig, check_report, collect, count_costs
from .script import run_script

_logger = logging.getLogger(__name__)

@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation."""

    expert_subsets: bool = option(False, 'also tell accuracy and cost of every choice of experts')
    flip: bool = option(False, 'average the logits with those of the mirrored images, at twice the cost')
    batch_size: int = option(256, 'images a batch', low=1, flags=('-b',))
    results_file: Optional[str] = option(None, 'JSON file to write the metrics to', 'FILE')
    save_logits: Optional[str] = option(
        None, 'npz file to write the logits of each expert to, with targets, paths and classes', 'FILE')
    report: Optional[str] = option(None, 'folder to write a report with figures to, report.html and more', 'DIR')


@dataclass(frozen=True)
class EvalConfig(
        TrainedModelConfig, EvaluationConfig, CamConfig, EvalDataConfig, CheckConfig, PreprocessingConfig, ShotConfig,
        DeviceConfig, HparamsConfig,
):
    """All options of shike eval."""


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


def _name(args: EvalConfig) -> str:
    return Path(args.checkpoint).stem if args.checkpoint else str(args.model)


def evaluate_model(args: EvalConfig) -> Dict[str, Any]:
    """Evaluate a trained model, in float32; of several processes each has its share, and the first prints and writes.

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
    if args.cam and not args.report:
        raise InputError('--cam shows where experts look in a report: add --report DIR.')
    if args.report:
        check_report(args.report, args.cam)
    if args.experts and args.expert_subsets:
        raise InputError('--expert-subsets tells of every choice of experts, --experts of one: leave one of them out.')
    device = join_processes(args.device)
    if world_size() > 1 and (args.save_logits or args.report):
        raise InputError('--save-logits and --report take all images in one process: leave torchrun out.')
    tune_device(device)
    trained = load_trained_model(
        args.model, args.checkpoint, True, args.experts, args.authors_classifiers)  # as timm's validate.py
    args = with_data_args(args, trained)
    model, counts, names = trained.model, trained.class_counts, trained.class_names
    shot_counts, origin = trained.shot_counts, 'the model'
    source = checked(SourceConfig, vars(args))
    if counts is None:
        data, origin = load_training_data(source, workers=args.workers, batch_size=args.batch_size), 'this data'
        dataset, counts, names, shot_counts = data.test, data.class_counts, data.class_names, data.shot_counts
    else:
        dataset = load_eval_data(
            source, names, model.in_chans, trained.run_folder, args.workers, args.batch_size)
    assert shot_counts is not None  # known where `counts` are
    num_classes = len(dataset.class_names or counts)
    if len({num_classes, len(counts), model.num_classes}) > 1:
        raise InputError(f'The model has {model.num_classes} classes, but the data {num_classes}: choose other data.')
    if model.class_counts is None:
        model.set_training_prior(counts, model.classifier_prior)
    set_target_prior(trained, args.target_prior)
    data_config = resolve_data_config(args, model)
    model.to(device)
    looks = []
    if args.cam:
        from ..report.cam import look_at
        looks = look_at(model, args.cam, data_config, names, exif=args.exif, pixel_range=args.pixel_range)
    loader = create_eval_loader(dataset, data_config, args.batch_size, device, args.workers)
    subsets = all_subsets(model.num_experts) if args.expert_subsets else ()
    left_out = f" Left out: {'; '.join(dataset.notes)}." if dataset.notes else ''
    origin_words = dataset.origin or 'a split of its own'
    _logger.info(
        f'Evaluation: {len(dataset)} images, {origin_words}.{left_out} Many, medium and few are told by the '
        f'{max(shot_counts)} to {min(shot_counts)} training images a class of {origin}.')
    kept = [] if args.save_logits or args.report else None
    metrics = evaluate(
        model, loader, shot_counts, device, subsets, args.flip, per_class=True, shots=args, kept=kept)
    metrics.update(per_class=dict(names=names, class_counts=counts, **metrics['per_class']))
    if rank():
        return metrics
    print(format_table({'': metrics}), flush=True)
    _logger.info(balanced_over(metrics, len(counts)))
    sizes = [size for size in metrics['per_class']['total'] if size]
    if max(sizes) > 2 * min(sizes):
        _logger.info(
            f'The evaluation set is itself long-tailed, with {min(sizes)} to {max(sizes)} images a class: top1 counts '
            'images, for which --target-prior train is right if they are as frequent as in training, and else a FILE '
            'of the frequencies they have; balanced counts classes, for which --target-prior uniform is right.')
    _write_results(args.results_file, metrics)
    if subsets:
        images, _ = next(iter(loader))
        _add_costs(metrics['subsets'], model, images.contiguous(memory_format=torch.channels_last), args.flip)
        print(f"\n{format_subsets(metrics['subsets'])}")
        _write_results(args.results_file, metrics)
    if kept:
        trained.class_counts, trained.class_names = counts, names
        run = Path(trained.run_folder) if trained.run_folder else None
        run = run if run and (run / 'summary.csv').exists() else None  # a model folder may lie anywhere
        costs = metrics.get('subsets') or count_costs(model, next(iter(loader))[0][:1], 2 if args.flip else 1)
        saved = collect(
            trained, dataset, kept, shot_numbers(shot_counts, args), costs=costs, run=run,
            name=run.name if run else _name(args))
        if args.save_logits:
            save_logits(args.save_logits, saved)
        if args.report:
            from ..report.analysis import judge
            from ..report.page import write_report
            print(f'Report: {write_report(Path(args.report), [judge(saved)], looks=looks)}')
    return metrics


parse_eval_args = partial(parse, EvalConfig, 'Evaluate a model on many-, medium- and few-shot classes.')


CONFIG = EvalConfig


def main() -> int:
    return run_script(lambda: evaluate_model(parse_eval_args()))
