"""Export of a trained model to a file that runs without this package."""
import importlib.util
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
from ..publishing.export import FILES, find_place, save_exported
from .script import command

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportConfig(TrainedModelConfig, HparamsConfig):
    """Export."""

    format: str = option('onnx', 'file format', choices=tuple(FILES))
    opset: Optional[int] = option(None, "version of ONNX's operators. By default torch chooses")
    img_size: Optional[int] = option(None, "side of the images. By default the model's own", low=1)
    output: Optional[str] = option(
        None, 'folder to write. By default exported/NAME-FORMAT, where NAME is the name of the run', 'DIR')


def _name(config: ExportConfig, architecture: str) -> str:
    """The name of the run or the model folder, or else of the architecture."""
    path = Path((config.checkpoint or config.model or '').removeprefix('local-dir:')).absolute()
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / 'args.yaml').is_file()), None)
    folder = run or (path if path.is_dir() and not is_registered(config.model or '') else None)
    return folder.name if folder else architecture


def export(config: ExportConfig) -> Path:
    """Export a trained model. Returns the folder that was written."""
    if config.format == 'onnx':
        for name in ('onnx', 'onnxruntime', 'onnxscript'):
            if importlib.util.find_spec(name) is None:
                raise InputError(
                    f'--format onnx needs {name}, which is not installed: pip install "shike-timm[export]", '
                    'or choose another format.')
    elif config.opset is not None:
        raise InputError(f'--opset {config.opset} goes with --format onnx, not {config.format}: leave it out.')
    if config.output:
        find_place(Path(config.output))
    trained = load_trained_model(config.model, config.checkpoint, config.pretrained, config.experts)
    set_target_prior(trained, config.target_prior)
    model, options = trained.model, trained.options
    if config.model and is_registered(config.model) and not config.pretrained:
        _logger.warning(f"'{config.model}' without --pretrained is exported with random weights.")
    if config.img_size:
        options = dict(options, img_size=config.img_size, input_size=None)
    try:
        data_config = resolve_input_data_config(model, args=options)
    except ValueError as error:
        raise InputError(f'--img-size {config.img_size}: {error}') from error
    name = _name(config, model.pretrained_cfg['architecture'])
    folder = Path(config.output or f'exported/{name}-{config.format}')
    difference = save_exported(
        model, folder, config.format, data_config, config.opset, class_names=trained.class_names,
        class_counts=trained.class_counts, shot_counts=trained.shot_counts, reject_threshold=trained.reject_threshold,
        exif=options.get('exif'), pixel_range=options.get('pixel_range'))
    _logger.info(f'Largest difference from torch: {difference:.1e} of the largest logit.')
    print(folder / FILES[config.format])
    return folder


CONFIG = ExportConfig
parse_export_args = partial(parse, CONFIG, 'Export a model to a file that runs without this package.')
main = command(export, parse_export_args)
