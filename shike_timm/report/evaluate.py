"""Evaluates a trained model, prints tables, and writes files and a report. `shike eval` calls it."""
import csv
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from ..data import create_eval_loader, load_eval_data, load_training_data
from ..data.config import CheckConfig, EvalDataConfig, PreprocessingConfig, SourceConfig
from ..data.dataset import AnySet
from ..data.split_lists import EVAL_LIST, SplitLists
from ..devices import DeviceConfig
from ..distributed import join_processes, rank, world_size
from ..errors import InputError
from ..files import check_results_file, write_text, write_whole
from ..metrics import ShotConfig, all_subsets, evaluate, format_subsets, print_results
from ..models.create import resolve_data_config
from ..options import HparamsConfig, check_file_values, checked, complete, option, options
from ..pretrained.load import (
    TrainedModel,
    TrainedModelConfig,
    load_trained_model,
    set_target_prior,
    with_trained_options,
)
from ..training.folder import read_args
from .cam import CamConfig, draw_cams
from .logits import add_costs, check_report, collect, count_gmacs, save_logits

_logger = logging.getLogger(__name__)

OTHER_DATA = {'data_dir', 'dataset', 'val_split', 'val_list', 'hparams'}  # These options choose other data.


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation."""

    expert_subsets: bool = option(False, 'also measure accuracy and cost of every subset of the experts')
    flip: bool = option(False, 'average the logits with those of the mirrored images, at twice the cost')
    batch_size: int = option(256, 'images in a batch', low=1, flags=('-b',))
    results_file: Optional[str] = option(
        None, 'file to write the metrics to: if it ends in .csv, a table of precision, recall and F1 of the classes, '
        'else JSON', 'FILE')
    save_logits: Optional[str] = option(
        None, 'npz file to write the logits of each expert to, with targets, paths and classes', 'FILE')
    report: Optional[str] = option(
        None, 'folder to write a report to: report.html, its figures and a table of the classes', 'DIR')


@dataclass(frozen=True)
class EvalConfig(
        TrainedModelConfig, EvaluationConfig, CamConfig, EvalDataConfig, CheckConfig, PreprocessingConfig, ShotConfig,
        DeviceConfig, HparamsConfig,
):
    """All options of shike eval."""


def complete_eval_args(given: Dict[str, Any]) -> EvalConfig:
    """The configuration of given values. For a model in a run folder, data and shot divisions default to the run's."""
    model, saved = Path(str(given.get('checkpoint') or given.get('model') or '').removeprefix('local-dir:')), {}
    for run in (model, *model.parents[:2]):
        if all((run / name).is_file() for name in ('args.yaml', 'summary.csv')):
            saved = read_args(run)
            own = set(options(ShotConfig))
            if not OTHER_DATA & set(given):
                own |= set(options(EvalDataConfig))
                if saved.get('train_list') and not saved.get('val_list') and SplitLists.find(run):
                    saved.update(val_list=str(run / EVAL_LIST), input_key=None, target_key=None)
            saved = check_file_values(
                EvalConfig, {key: value for key, value in saved.items() if key in own}, f"'{run / 'args.yaml'}'", given)
            break
    return complete(EvalConfig, given, saved)


def _check(config: EvalConfig) -> None:
    check_results_file(config.results_file)
    check_results_file(config.save_logits, 'save-logits')
    if config.save_logits and config.results_file and (
            os.path.realpath(config.save_logits) == os.path.realpath(config.results_file)):
        raise InputError(f"--save-logits and --results-file are both '{config.results_file}': name two files.")
    if config.cam and not config.report:
        raise InputError('--cam draws into a report, but there is none: add --report DIR.')
    if config.report:
        check_report(config.report, config.cam)
    if config.experts and config.expert_subsets:
        raise InputError('--expert-subsets and --experts exclude each other: leave one of them out.')


def _load_split(config: EvalConfig, trained: TrainedModel) -> AnySet:
    """Load the evaluation split. A model without class counts takes those of the data."""
    counts, source = trained.class_counts, checked(SourceConfig, vars(config))
    if counts is None:
        data = load_training_data(source, workers=config.workers, batch_size=config.batch_size)
        split, counts = data.test, data.class_counts
        trained.class_names, trained.shot_counts = data.class_names, data.shot_counts
    else:
        split = load_eval_data(
            source, trained.class_names, trained.model.in_chans, trained.run_folder, config.workers, config.batch_size)
    num_classes = len(split.class_names or counts)
    if len({num_classes, len(counts), trained.model.num_classes}) > 1:
        raise InputError(
            f'The model has {trained.model.num_classes} classes, but the data {num_classes}: choose other data.')
    trained.class_counts = counts
    if trained.model.class_counts is None:
        trained.model.set_training_prior(counts, trained.model.classifier_prior)
    return split


def _write_results(path: str, metrics: Dict[str, Any]) -> None:
    """Write metrics as JSON, or as a CSV table with a row for all images, for class means and for each class."""
    if Path(path).suffix.lower() != '.csv':
        write_text(path, json.dumps(metrics, indent=2) + '\n')
        return
    classes = dict(metrics['per_class'])
    experts, counts = classes.pop('experts'), classes['class_counts']
    classes['names'] = classes['names'] or [str(c) for c in range(len(counts))]
    keys = 'names', 'class_counts', 'total', 'top1', 'precision', 'f1'
    columns = {'recall' if key == 'top1' else key.removesuffix('s'): classes[key] for key in keys}
    columns.update({f'expert_{m}': one for m, one in enumerate(experts)})
    sums = [sum(counts), sum(classes['total'])]
    # As in scikit-learn, the precision of a class that is never predicted counts as 0.
    mean = [one or 0. for one, total in zip(classes['precision'], classes['total']) if total]
    rows = [
        # Over all images precision, recall and F1 all equal the share of right answers.
        ['all images', *sums, *[metrics['top1']] * 3, *(one['top1'] for one in metrics['experts'])],
        ['mean of classes', *sums, metrics['balanced'], round(sum(mean) / len(mean), 2), metrics['macro_f1'],
         *(one['balanced'] for one in metrics['experts'])]]
    with write_whole(path) as file:
        csv.writer(file).writerows([columns, *rows, *zip(*columns.values())])


def _log_long_tail(metrics: Dict[str, Any]) -> None:
    """Suggest --target-prior if the evaluation set is long-tailed."""
    sizes = [size for size in metrics['per_class']['total'] if size]
    if max(sizes) > 2 * min(sizes):
        _logger.info(
            f'The evaluation set is itself long-tailed, with {min(sizes)} to {max(sizes)} images a class. top1 counts '
            'images: use --target-prior train if classes are as frequent as in training, or a FILE of their '
            'frequencies. balanced counts classes: use --target-prior uniform.')


def evaluate_model(config: EvalConfig) -> Dict[str, Any]:
    """Evaluate a trained model in float32. Several processes share the images. Only the first prints and writes.

    Returns the metrics of `shike_timm.metrics.evaluate`. `per_class` also has the `names` of the classes (None if they
    are unknown) and their training images `class_counts`. With `--expert-subsets` each subset has its costs.
    """
    _check(config)
    device = join_processes(config.device)
    if world_size() > 1 and (config.save_logits or config.report):
        raise InputError('--save-logits and --report need all images in one process: leave torchrun out.')
    # timm's validate.py loads the published weights too.
    trained = load_trained_model(config.model, config.checkpoint, True, config.experts)
    config = with_trained_options(config, trained)
    run = Path(trained.run_folder) if trained.run_folder else None
    run = run if run and (run / 'summary.csv').exists() else None  # A model folder may lie anywhere.
    if run and config.report:
        read_args(run)  # A damaged file raises its error before the work.
    origin = 'this data' if trained.class_counts is None else 'the model'
    model, split = trained.model, _load_split(config, trained)
    names, counts = trained.class_names, trained.class_counts
    assert counts is not None  # `_load_split` has set them.
    shot_counts = trained.shot_counts or counts
    set_target_prior(trained, config.target_prior)
    data_config = resolve_data_config(config, model)
    model.to(device)
    cams = [] if not config.cam else draw_cams(
        model, config.cam, data_config, names, exif=config.exif, pixel_range=config.pixel_range)
    loader = create_eval_loader(split, data_config, config.batch_size, device, config.workers)
    left_out = f" Left out: {'; '.join(split.notes)}." if split.notes else ''
    _logger.info(
        f"Evaluation: {len(split)} images, {split.origin or 'a split of its own'}.{left_out} Classes are "
        f'many-, medium- or few-shot by the {max(shot_counts)} to {min(shot_counts)} training images a class of '
        f'{origin}.')
    subsets = all_subsets(model.num_experts) if config.expert_subsets else ()
    kept = [] if config.save_logits or config.report else None
    metrics = evaluate(
        model, loader, shot_counts, device, subsets, config.flip, config, kept, trained.reject_threshold)
    metrics.update(per_class=dict(names=names, class_counts=counts, **metrics['per_class']))
    if rank():
        return metrics

    print_results({'': metrics}, metrics['per_class'], names, counts, known=trained.reject_threshold is not None)
    _log_long_tail(metrics)
    passes = 2 if config.flip else 1
    try:
        if subsets:
            images = next(iter(loader))[0].contiguous(memory_format=torch.channels_last)
            add_costs(metrics['subsets'], model, images, passes)
            print(f"\n{format_subsets(metrics['subsets'])}")
    finally:  # The metrics are kept if costs cannot be measured.
        if config.results_file:
            _write_results(config.results_file, metrics)
    if kept:
        name = run.name if run else Path(config.checkpoint).stem if config.checkpoint else str(config.model)
        costs = metrics.get('subsets') or count_gmacs(model, next(iter(loader))[0][:1], passes)
        saved = collect(trained, split, kept, config, costs=costs, name=name, run=run)
        if config.save_logits:
            save_logits(config.save_logits, saved)
        if config.report:
            from .analysis import Analysis
            from .page import write_report
            print(f'Report: {write_report(Path(config.report), [Analysis(saved)], cams=cams)}')
    return metrics
