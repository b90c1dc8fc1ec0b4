"""Export of a trained model to a file that runs without this package."""
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

from timm.data import resolve_input_data_config

from ..errors import InputError
from ..models.create import is_registered
from ..options import HparamsConfig, option, parse
from ..pretrained.load import TrainedModelConfig, load_trained_model, set_target_prior
from ..publishing.export import FILES, check_packages, find_place, save_exported
from .script import run_script

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportConfig(TrainedModelConfig, HparamsConfig):
    """Export."""

    format: str = option('onnx', 'format to write', choices=tuple(FILES))
    opset: Optional[int] = option(None, "version of ONNX's operators, torch's choice by default")
    img_size: Optional[int] = option(None, "side of the images, the model's own by default", low=1)
    output: Optional[str] = option(None, 'folder to write, exported/NAME-FORMAT by default', 'DIR')


def export(args: ExportConfig) -> Path:
    """Export a trained model.

    Args:
        args: What `parse_export_args` gives.

    Returns:
        The folder written.

    Raises:
        InputError: If anything given cannot work.
    """
    if args.format == 'onnx':
        check_packages()
    elif args.opset is not None:
        raise InputError(f'--opset {args.opset} goes with --format onnx, not {args.format}: leave it out.')
    if args.output:
        find_place(Path(args.output))
    trained = load_trained_model(args.model, args.checkpoint, args.pretrained, args.experts)
    set_target_prior(trained, args.target_prior)
    model = trained.model
    if args.model and is_registered(args.model) and not args.pretrained:
        _logger.warning(f"'{args.model}' without --pretrained is exported with random weights.")
    data_args = trained.options
    if args.img_size:
        data_args = dict(data_args, img_size=args.img_size, input_size=None)
    try:
        data_config = resolve_input_data_config(model, args=data_args)
    except ValueError as error:
        raise InputError(f'--img-size {args.img_size}: {error}') from error
    folder = Path(args.output or f"exported/{model.pretrained_cfg['architecture']}-{args.format}")
    difference = save_exported(
        model, folder, args.format, data_config, trained.class_names, trained.class_counts, args.opset,
        shot_counts=trained.shot_counts, **{key: data_args.get(key) for key in ('exif', 'pixel_range')})
    _logger.info(f'Largest difference from torch: {difference:.1e} of the largest logit.')
    print(folder / FILES[args.format])
    return folder


parse_export_args = partial(parse, ExportConfig, 'Export a model to a file that runs without this package.')


CONFIG = ExportConfig


def main() -> int:
    return run_script(lambda: export(parse_export_args()))
