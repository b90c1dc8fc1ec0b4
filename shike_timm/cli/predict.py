"""Prediction for image files: for each file the most likely classes, with their probabilities."""
import csv
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import timm.data
import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import CONFIG_FILE
from ..data.config import PreprocessingConfig
from ..data.image_files import create_file_loader, find_images, normalize
from ..devices import DeviceConfig, resolve_device
from ..errors import InputError, one_line
from ..files import check_results_file, read_json, spreadsheet_cell, write_whole
from ..models.create import resolve_data_config
from ..options import HparamsConfig, option, parse
from ..pretrained.folder import check_classes, check_config
from ..pretrained.load import TrainedModelConfig, load_trained_model, set_target_prior, with_trained_options
from ..publishing.export import FILES, load_exported, read_metadata
from .script import command

_logger = logging.getLogger(__name__)

UNKNOWN = 'unknown'  # Written in place of the class of a rejected image.
DECODING = ('pixel_range', 'exif')  # Options of `create_file_loader` that a saved model keeps.


@dataclass(frozen=True)
class PredictionConfig:
    """Prediction."""

    inputs: List[str] = option(
        None, "image files, folders, patterns such as 'x/**/*.png', or - for a list of them on standard input",
        'INPUT', nargs='+', positional=True, required=True)
    topk: int = option(1, 'number of classes to write for each image. 0 writes all', low=0)
    output_type: str = option(
        'prob', 'what to write for each class: its probability or its logit', choices=('prob', 'logit'))
    include_index: bool = option(False, 'also write the indices of the classes')
    reject: bool = option(
        False, "write 'unknown' in place of a class whose probability is below the model's threshold, which training "
        'chose so that 95 of 100 right answers stay')
    reject_below: Optional[float] = option(None, 'the same with a threshold of your own', 'PROB', low=0)
    per_expert: bool = option(False, 'also write the prediction of each expert')
    batch_size: int = option(256, 'images in a batch', low=1, flags=('-b',))


@dataclass(frozen=True)
class RowsConfig(TrainedModelConfig, PredictionConfig, PreprocessingConfig, DeviceConfig, HparamsConfig):
    """Options of a prediction without its output."""


@dataclass(frozen=True)
class PredictConfig(RowsConfig):
    """Output."""

    results_file: Optional[str] = option(None, 'file to write. By default standard output', 'FILE')
    results_format: str = option(
        'csv', 'csv; spreadsheet, which is csv with an apostrophe before names that begin with = + - @, so that they '
        'are not run as formulas; or jsonl with a JSON object on each line', choices=('csv', 'spreadsheet', 'jsonl'))


@dataclass
class _Predictor:
    """`run` takes images [B, C, H, W] and returns expert logits [B, M, classes]. The other fields are its settings."""

    run: Callable[[Tensor], Tensor]
    device: torch.device
    data_config: Dict[str, Any]
    num_experts: int
    num_classes: int
    class_names: Optional[Sequence[str]]
    decoding: Dict[str, Any]  # The values of the `DECODING` options.
    reject_threshold: Optional[float] = None  # Probability below which the class of an image is unknown.


def _onnx_predictor(config: RowsConfig, path: Path) -> _Predictor:
    for name in ('checkpoint', 'experts', 'target_prior', 'img_size'):
        if getattr(config, name) is not None:
            flag = name.replace('_', '-')
            raise InputError(f"--{flag} does not go with '{path}', whose graph is fixed: give it to shike export.")
    if config.per_expert or config.device not in (None, 'cpu'):
        wrong = '--per-expert' if config.per_expert else f'--device {config.device}'
        raise InputError(f"{wrong} does not go with '{path}', which gives averages on the CPU: leave it out.")
    try:
        beside = path.with_name(CONFIG_FILE)
        saved = (not beside.is_file() and read_metadata(path)) or read_json(beside)
        check_config(saved, f"'{beside}'")
        run = load_exported(path, 'onnx')
        data_config = timm.data.resolve_data_config(vars(config), pretrained_cfg=saved['pretrained_cfg'])
        num_classes = run(torch.zeros(1, *data_config['input_size'])).shape[-1]
        check_classes(f"'{path}'", num_classes, saved.get('label_names'))
    except ImportError as error:
        raise InputError(f"'{path}' needs onnxruntime: pip install \"shike-timm[export]\".") from error
    except Exception as error:  # A damaged file can make onnxruntime raise any error.
        raise InputError(
            f"'{path}' and the {CONFIG_FILE} beside it cannot be used ({one_line(error)}): export the model "
            'again.') from error
    options = {name: saved.get(name) for name in DECODING}
    options.update({name: getattr(config, name) for name in DECODING if getattr(config, name) is not None})
    return _Predictor(
        lambda images: run(images)[:, None], torch.device('cpu'), data_config, 1, num_classes,
        saved.get('label_names'), options, saved.get('reject_threshold'))


def _make_predictor(config: RowsConfig) -> _Predictor:
    for path in (Path(config.model), Path(config.model, FILES['onnx'])) if config.model else ():
        if path.suffix == '.onnx' and path.is_file():
            return _onnx_predictor(config, path)
    device = resolve_device(config.device)
    trained = load_trained_model(config.model, config.checkpoint, True, config.experts)
    set_target_prior(trained, config.target_prior)
    model = trained.model.to(device).eval()
    config = with_trained_options(config, trained)
    return _Predictor(
        model.forward_experts, device, resolve_data_config(config, model), model.num_experts, model.num_classes,
        trained.class_names, {name: getattr(config, name) for name in DECODING}, trained.reject_threshold)


def _printable(name: object) -> str:
    """The name of a file or class as printable text, since its bytes need not be valid text."""
    return str(name).encode('utf-8', 'backslashreplace').decode()


def _top_classes(
        logits: Tensor, predictor: _Predictor, config: RowsConfig, threshold: float = 0.) -> Iterator[Dict[str, Any]]:
    """The most likely classes of each image, from logits [B, classes]. Below the threshold the first is `UNKNOWN`."""
    probabilities = logits.softmax(-1)
    values = probabilities if config.output_type == 'prob' else logits
    top = values.topk(min(config.topk or predictor.num_classes, predictor.num_classes))
    names = predictor.class_names or range(predictor.num_classes)
    unknown = probabilities.amax(-1).double() < threshold
    for indices, best, is_unknown in zip(top.indices.tolist(), top.values.tolist(), unknown.tolist()):
        labels = [_printable(names[index]) for index in indices]
        if is_unknown:
            labels[0], indices[0] = UNKNOWN if UNKNOWN not in names else f'({UNKNOWN})', None
        yield {**(dict(index=indices) if config.include_index else {}), 'label': labels, config.output_type: best}


def _predictions(logits: Tensor, predictor: _Predictor, config: RowsConfig) -> Iterator[Dict[str, Any]]:
    """The prediction for each image from expert logits [B, M, classes]."""
    finite = logits.isfinite().flatten(1).all(1).tolist()
    threshold = (predictor.reject_threshold or 0.) if config.reject else 0.
    found = _top_classes(logits.mean(1), predictor, config, threshold)
    if config.per_expert:
        experts = zip(*(_top_classes(one, predictor, config) for one in logits.unbind(1)))
        found = (dict(one, experts=list(each)) for one, each in zip(found, experts))
    return (one if good else dict(error='the logits are not finite') for one, good in zip(found, finite))


@torch.inference_mode()
def _predict_files(
        predictor: _Predictor, loader: Iterable[Any], paths: List[str], config: RowsConfig) -> Iterator[Dict[str, Any]]:
    remaining = iter(paths)
    found: Iterator[Dict[str, Any]] = iter(())
    for images, errors in loader:
        if images is not None:
            images = normalize(images, predictor.data_config, predictor.device)
            logits = predictor.run(images.contiguous(memory_format=torch.channels_last)).float().cpu()
            found = _predictions(logits, predictor, config)
        for error, path in zip(errors, remaining):
            yield {'filename': _printable(path), 'error': None, **(dict(error=error) if error else next(found))}


def _prepare(config: RowsConfig) -> Tuple[_Predictor, Iterator[Dict[str, Any]]]:
    paths = find_images(config.inputs)
    predictor = _make_predictor(config)
    if config.reject_below is not None:
        predictor.reject_threshold = config.reject_below
        config = replace(config, reject=True)
    if config.reject and predictor.reject_threshold is None:
        raise InputError(
            '--reject: the model keeps no threshold of its training with these experts and this prior: give '
            '--reject-below and a probability.')
    loader = create_file_loader(
        paths, predictor.data_config, config.batch_size, min(config.workers, len(paths)),
        pin_memory=predictor.device.type == 'cuda', **predictor.decoding)
    bar = tqdm(loader, unit='batch', disable=not sys.stderr.isatty(), dynamic_ncols=True)
    return predictor, _predict_files(predictor, bar, paths, config)


def predict_rows(config: RowsConfig) -> Iterator[Dict[str, Any]]:
    """Predict the classes of image files.

    Returns:
        An iterator of dictionaries, one for each file: `filename`; `label` and `prob` or `logit`, lists with the best
        class first; `index` and `experts` (the same for each expert) if the options ask for them; and `error`, the
        fault of the file or None. If the file has a fault, there are only `filename` and `error`.
    """
    return _prepare(config)[1]


def _flat(prediction: Dict[str, Any], prefix: str = '') -> Dict[str, Any]:
    """A prediction as columns of a table, named `label_0`, `label_1`, ... as in timm, or `label` for one class."""
    flat: Dict[str, Any] = {}
    for key, value in prediction.items():
        if key == 'experts':
            for m, expert in enumerate(value):
                flat.update(_flat(expert, f'expert_{m}_'))
        elif isinstance(value, list):
            flat.update({f'{prefix}{key}_{k}' if len(value) > 1 else f'{prefix}{key}': x for k, x in enumerate(value)})
        else:
            flat[prefix + key] = value
    return flat


def predict(config: PredictConfig) -> None:
    """Write the predictions for image files."""
    check_results_file(config.results_file)
    predictor, rows = _prepare(config)
    plain = not (config.results_file or config.per_expert or config.include_index) and config.results_format == 'csv'
    if plain and sys.stdout.isatty() and len(config.inputs) == 1 and os.path.isfile(config.inputs[0]):
        (row,) = rows
        found = row['error'] or ', '.join(f'{name} {x:.4g}' for name, x in zip(row['label'], row[config.output_type]))
        print(f"{row['filename']}: {found}")  # A line for a reader.
        return
    num_files = num_errors = 0
    start = time.perf_counter()
    with write_whole(config.results_file or '-') as file:
        example = next(_predictions(torch.zeros(1, predictor.num_experts, predictor.num_classes), predictor, config))
        table = csv.DictWriter(file, ['filename', *_flat(example), 'error'], lineterminator='\n')
        if config.results_format != 'jsonl':
            table.writeheader()
        for row in rows:
            num_files += 1
            num_errors += row['error'] is not None
            flat = _flat(row)
            if config.results_format == 'jsonl':
                file.write(json.dumps(row) + '\n')
            elif config.results_format == 'csv':
                table.writerow(flat)
            else:
                table.writerow({key: spreadsheet_cell(value) for key, value in flat.items()})
    rate, files = num_files / (time.perf_counter() - start), 'file' if num_files == 1 else 'files'
    _logger.info(f'{num_files} {files}, {rate:.1f} a second; {num_errors} could not be predicted.')


CONFIG = PredictConfig
parse_predict_args = partial(parse, CONFIG, 'Predict the classes of image files.')
main = command(predict, parse_predict_args)
