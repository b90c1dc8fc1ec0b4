"""Prediction for image files: top-k classes and their probabilities, a row a file."""
import contextlib
import csv
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import timm.data
import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints import check_results_file
from ..data.config import PreprocessingConfig
from ..data.image_files import create_file_loader, find_images
from ..devices import DeviceConfig, resolve_device, tune_device
from ..errors import InputError, one_line
from ..options import HparamsConfig, option, parse
from ..pretrained.load import TrainedModelConfig, load_trained_model, set_target_prior, with_data_args
from ..publishing.export import FILES, load_exported
from ..training.build import resolve_data_config
from .script import run_script

Row = Dict[str, Any]

@dataclass(frozen=True)
class PredictionConfig:
    """Prediction."""

    inputs: List[str] = option(
        None, "image files, folders, patterns such as 'x/**/*.png', or - for a list of them on standard input",
        'INPUT', nargs='+', positional=True, required=True)
    topk: int = option(1, 'classes to tell of each image, 0 for all', low=0)
    output_type: str = option(
        'prob', 'what to tell of each class: its probability or its logit', choices=('prob', 'logit'))
    include_index: bool = option(False, 'also tell the indices of the classes')
    per_expert: bool = option(False, 'also tell what each expert says')
    batch_size: int = option(256, 'images a batch', low=1, flags=('-b',))


@dataclass(frozen=True)
class RowsConfig(TrainedModelConfig, PredictionConfig, PreprocessingConfig, DeviceConfig, HparamsConfig):
    """Options of the rows of a prediction."""


@dataclass(frozen=True)
class PredictConfig(RowsConfig):
    """Output."""

    results_file: Optional[str] = option(None, 'file to write, standard output by default', 'FILE')
    results_format: str = option('csv', 'csv, or a JSON object a line', choices=('csv', 'jsonl'))

_logger = logging.getLogger(__name__)


DECODING = ('pixel_range', 'exif')  # how images were decoded in training, which a saved model keeps


@dataclass
class _Predictor:
    """What gives logits: of images [B, C, H, W] those of M experts [B, M, classes]."""

    run: Callable[[Tensor], Tensor]
    device: torch.device
    data_config: Dict[str, Any]
    num_experts: int
    num_classes: int
    class_names: Optional[Sequence[str]] = None
    decoding: Dict[str, Any] = field(default_factory=dict)  # arguments of `create_file_loader`


def _onnx_file(args: RowsConfig) -> Optional[Path]:
    """The exported ONNX file that --model names, itself or by its folder."""
    files = (Path(args.model), Path(args.model, FILES['onnx'])) if args.model else ()
    return next((file for file in files if file.suffix == '.onnx' and file.is_file()), None)


def _load_onnx(args: RowsConfig, path: Path) -> _Predictor:
    for name in ('checkpoint', 'experts', 'target_prior', 'img_size'):
        if getattr(args, name) is not None:
            flag = name.replace('_', '-')
            raise InputError(f"--{flag} cannot be had with '{path}', whose graph is fixed: give it to export.py.")
    if args.per_expert or args.device not in (None, 'cpu'):
        wrong = '--per-expert' if args.per_expert else f'--device {args.device}'
        raise InputError(f"{wrong} cannot be had with '{path}', which gives averages on the CPU: leave it out.")
    try:
        config = json.loads(path.with_name('config.json').read_text(encoding='utf-8'))
        run = load_exported(path, 'onnx')
        cfg = config['pretrained_cfg']
        data_config = timm.data.resolve_data_config(vars(args), pretrained_cfg=cfg)
        num_classes = run(torch.zeros(1, *data_config['input_size'])).shape[-1]
    except ImportError as error:
        raise InputError(f"'{path}' needs onnxruntime: pip install \"shike-timm[export]\".") from error
    except Exception as error:  # whatever a damaged file makes onnxruntime raise
        raise InputError(
            f"'{path}' and the config.json beside it cannot be used ({one_line(error)}): export the model "
            'anew.') from error
    names = config.get('label_names')
    given = {name: getattr(args, name) for name in DECODING}
    decoding = {name: config.get(name) if value is None else value for name, value in given.items()}
    return _Predictor(
        lambda images: run(images)[:, None], torch.device('cpu'), data_config, 1, num_classes, names, decoding)


def _load(args: RowsConfig) -> _Predictor:
    onnx = _onnx_file(args)
    if onnx is not None:
        return _load_onnx(args, onnx)
    device = resolve_device(args.device)
    tune_device(device)
    trained = load_trained_model(args.model, args.checkpoint, True, args.experts, args.authors_classifiers)
    set_target_prior(trained, args.target_prior)
    model = trained.model.to(device).eval()
    args = with_data_args(args, trained)
    return _Predictor(
        model.forward_experts, device, resolve_data_config(args, model), model.num_experts, model.num_classes,
        trained.class_names, {name: getattr(args, name) for name in DECODING})


def _top(logits: Tensor, predictor: _Predictor, args: RowsConfig) -> Iterator[Row]:
    """What is told of logits [B, classes], an image at a time."""
    values = logits.softmax(-1) if args.output_type == 'prob' else logits
    top = values.topk(min(args.topk or predictor.num_classes, predictor.num_classes))
    for indices, shares in zip(top.indices.tolist(), top.values.tolist()):
        row: Row = dict(index=indices) if args.include_index else {}
        names = predictor.class_names
        row['label'] = [str(names[index]) if names else str(index) for index in indices]
        row[args.output_type] = shares
        yield row


def _told(logits: Tensor, predictor: _Predictor, args: RowsConfig) -> Iterator[Row]:
    """What is told of expert logits [B, M, classes]."""
    finite = logits.isfinite().flatten(1).all(1).tolist()
    told = _top(logits.mean(1), predictor, args)
    if args.per_expert:
        experts = zip(*(_top(one, predictor, args) for one in logits.unbind(1)))
        told = (dict(row, experts=list(each)) for row, each in zip(told, experts))
    return (row if good else dict(error='the logits are not finite') for row, good in zip(told, finite))


@torch.inference_mode()
def _rows(predictor: _Predictor, loader: Iterable[Any], paths: List[str], args: RowsConfig) -> Iterator[Row]:
    channels = predictor.data_config['input_size'][0]
    mean, std = (
        torch.tensor(predictor.data_config[key], device=predictor.device).expand(channels)[:, None, None] * 255
        for key in ('mean', 'std'))
    position = 0
    for images, errors in loader:
        told: Iterator[Row] = iter(())
        if images is not None:
            images = images.to(predictor.device, torch.float32).sub_(mean).div_(std)
            logits = predictor.run(images.contiguous(memory_format=torch.channels_last)).float().cpu()
            told = _told(logits, predictor, args)
        for path, error in zip(paths[position:], errors):
            row = dict(error=error) if error else next(told)
            name = path.encode('utf-8', 'backslashreplace').decode()  # of bytes that are no text
            yield {'filename': name, 'error': None, **row}
        position += len(errors)


def _start(args: RowsConfig) -> Tuple[_Predictor, Iterator[Row]]:
    paths = find_images(args.inputs)
    predictor = _load(args)
    loader = create_file_loader(
        paths, predictor.data_config, args.batch_size, min(args.workers, len(paths)),
        pin_memory=predictor.device.type == 'cuda', **predictor.decoding)
    bar = tqdm(loader, unit='batch', disable=not sys.stderr.isatty(), dynamic_ncols=True)
    return predictor, _rows(predictor, bar, paths, args)


def predict_rows(args: RowsConfig) -> Iterator[Row]:
    """Predict the classes of image files.

    Args:
        args: What `parse_predict_args` gives.

    Returns:
        An iterator of dictionaries, as the images are read: `filename`; the best classes first in `label` and `prob`,
        or `logit`, and `index` where asked for; `experts`, a list of the same of each expert; and `error`, None, or
        what is wrong with a file, of which nothing else is told.

    Raises:
        InputError: If anything given cannot work.
    """
    return _start(args)[1]


def _flat(row: Row, prefix: str = '') -> Dict[str, Any]:
    """A row as columns: `label_0`, `label_1`, ..., as timm's separate columns; without numbers where there is one."""
    flat: Dict[str, Any] = {}
    for key, value in row.items():
        if key == 'experts':
            for m, expert in enumerate(value):
                flat.update(_flat(expert, f'expert_{m}_'))
        elif isinstance(value, list):
            flat.update({f'{prefix}{key}_{k}' if len(value) > 1 else f'{prefix}{key}': x for k, x in enumerate(value)})
        else:
            flat[prefix + key] = value
    return flat


@contextlib.contextmanager
def _output(path: Optional[str]) -> Iterator[Any]:
    """Standard output, or a file that appears when it is whole."""
    if not path:
        yield sys.stdout
        return
    temporary = Path(f'{path}.tmp')
    try:
        with temporary.open('w', encoding='utf-8', newline='') as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def predict(args: RowsConfig) -> None:
    """Write a row of predictions for each image file.

    Args:
        args: What `parse_predict_args` gives.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
    """
    check_results_file(args.results_file)
    predictor, rows = _start(args)
    num_files = num_errors = 0
    start = time.perf_counter()
    with _output(args.results_file) as file:
        example = next(_told(torch.zeros(1, predictor.num_experts, predictor.num_classes), predictor, args))
        table = csv.DictWriter(file, ['filename', *_flat(example), 'error'], lineterminator='\n')
        if args.results_format == 'csv':
            table.writeheader()
        for row in rows:
            num_files += 1
            num_errors += row['error'] is not None
            if args.results_format == 'csv':
                table.writerow(_flat(row))
            else:
                file.write(json.dumps(row) + '\n')
    rate = num_files / (time.perf_counter() - start)
    _logger.info(f'{num_files} files, {rate:.1f} a second; {num_errors} could not be predicted.')


parse_predict_args = partial(parse, PredictConfig, 'Predict the classes of image files.')


CONFIG = PredictConfig


def main() -> int:
    return run_script(lambda: predict(parse_predict_args()))
