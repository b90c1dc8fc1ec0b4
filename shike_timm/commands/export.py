"""Export of a trained model to a file that runs without this package, compared with the model before it is kept."""
import argparse
import importlib.util
import logging
import os
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Union

import torch
from timm.data import resolve_input_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..errors import InputError
from ..loading import load_trained_model
from ..options import HPARAMS, TRAINED_MODEL, Group, Option, complete, read_command_line
from .cli import run_script

__all__ = ['OPTIONS', 'FILES', 'export', 'load_exported', 'main', 'parse_export_args', 'save_exported']

FILES = {'onnx': 'model.onnx', 'torchscript': 'model.torchscript.pt', 'torch-export': 'model.pt2'}

_TRACED_BATCH = 2  # of one image, torch.export would take the batch size for a constant
_CHECKED_BATCHES = (1, 5)
_TOLERANCE = 1e-4  # of the largest logit

_logger = logging.getLogger(__name__)


def _check_packages() -> None:
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f'--format onnx needs {missing[0]}, which is not installed: pip install "shike-timm[export]", '
            'or choose another format.')


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"output '{folder}' exists already: choose another folder, or remove it.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"output '{folder}' cannot be made in '{above}': choose another folder.")


@contextmanager
def _new_parents(folder: Path) -> Iterator[None]:
    """Make the folders above one, and remove those that were made if what happens inside fails."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise InputError(f"output '{folder}' cannot be written ({reason}): choose another.") from error
        raise


def _export_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)  # paths and source lines of this machine
    return program


def _write_onnx(model: nn.Module, images: Tensor, path: Path, opset: Optional[int]) -> None:
    import onnx

    for name in ('onnx_ir', 'onnxscript', 'torch.onnx'):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of every rewriting
    program = torch.onnx.export(
        _export_program(model, images),
        dynamo=True,
        dynamic_shapes=({0: 'batch'},),  # the name that the axis gets in the file
        input_names=['images'],
        output_names=['logits'],
        opset_version=opset,
        verbose=False,
    )
    written = program.model.opset_imports['']
    if opset is not None and written != opset:  # the exporter warns and keeps its own
        raise InputError(f'--opset {opset} cannot be written, torch gives {written}: leave it out.')
    for node in program.model.graph:
        node.metadata_props.clear()  # as above
    program.save(str(path))  # in one file, unless that would exceed the 2 GB of a protobuf
    onnx.checker.check_model(str(path), full_check=True)


def _write_torchscript(model: nn.Module, images: Tensor, path: Path) -> None:
    # Traced, since scripting depends on the backbone. Not frozen: that saves 0 to 7 percent of the time on a CPU, and
    # the weights could not be moved to another device.
    traced = torch.jit.trace(model, images, check_trace=False)
    whole = path.with_suffix('.tmp')
    torch.jit.save(traced, str(whole))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, 'w') as target:
        for item in source.infolist():
            if not item.filename.endswith('.debug_pkl'):  # paths and source lines of this machine
                target.writestr(item, source.read(item))
    whole.unlink()


def _write(model: nn.Module, images: Tensor, path: Path, format: str, opset: Optional[int]) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit is deprecated, which a user of the format knows
        if format == 'onnx':
            _write_onnx(model, images, path, opset)
        elif format == 'torchscript':
            _write_torchscript(model, images, path)
        else:
            torch.export.save(_export_program(model, images), path)


def load_exported(path: Union[str, Path], format: str) -> Callable[[Tensor], Tensor]:
    """Load an exported model on the CPU.

    Args:
        path: The file.
        format: A key of `FILES`.

    Returns:
        A function from images [B, C, H, W] to logits [B, num_classes]; onnxruntime's uses as many threads as torch.
    """
    if format == 'onnx':
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    if format == 'torchscript':
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)
            return torch.jit.load(str(path), map_location='cpu')
    return torch.export.load(path).module()


@torch.inference_mode()
def _compare(model: nn.Module, exported: Callable[[Tensor], Tensor], input_size: Sequence[int]) -> float:
    """Largest difference between a model and its export on noise, relative to the largest logit."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch_size in _CHECKED_BATCHES:
        images = torch.randn(batch_size, *input_size, generator=generator)
        expected, logits = model(images), exported(images)
        if logits.shape != expected.shape:
            raise InputError(
                f'The exported model gives logits of shape {tuple(logits.shape)}, expected {tuple(expected.shape)}: '
                'choose another --format.')
        differences.append(float((logits - expected).abs().max() / expected.abs().max()))
    return max(differences)


def save_exported(
        model: nn.Module,
        folder: Union[str, Path],
        format: str,
        data_config: Dict[str, Any],
        class_names: Optional[Sequence[str]] = None,
        class_counts: Optional[List[int]] = None,
        opset: Optional[int] = None,
) -> float:
    """Write a folder with the exported model and `config.json`, its preprocessing and classes in timm's format.

    The exported model takes any batch size. It is loaded and compared with the model first; the folder appears whole
    or not at all.

    Args:
        model: Model made by `timm.create_model`, on the CPU; it is put in evaluation mode.
        folder: Folder to write, which must not exist or be empty.
        format: A key of `FILES`.
        data_config: Preprocessing, what `timm.data.resolve_data_config` gives; its `input_size` is exported.
        class_names: Names of the classes in label order.
        class_counts: Training images of each class.
        opset: Version of ONNX's operators, torch's choice by default.

    Returns:
        The largest difference found, relative to the largest logit.

    Raises:
        InputError: If the folder holds something, a package is missing, or the export fails or differs.
    """
    folder = Path(folder).absolute()
    _check_folder(folder)
    if format == 'onnx':
        _check_packages()
    known = dict(label_names=class_names and list(class_names), class_counts=class_counts and list(class_counts))
    with _new_parents(folder), tempfile.TemporaryDirectory(
            prefix=f'.{folder.name}.', dir=folder.parent) as temporary:
        inside = Path(temporary, folder.name)  # which, unlike the temporary folder, others may read
        inside.mkdir()
        path = inside / FILES[format]
        images = torch.randn(_TRACED_BATCH, *data_config['input_size'])
        try:
            _write(model.eval(), images, path, format, opset)
            difference = _compare(model, load_exported(path, format), images.shape[1:])
        except (InputError, OSError):
            raise
        except Exception as error:  # whatever a network that cannot be exported makes torch or onnxruntime raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
            raise InputError(f'The model cannot be exported: {reason}; choose another --format.') from error
        if not difference <= _TOLERANCE:
            raise InputError(
                f'The exported model differs from the original by {difference:.1e} of the largest logit, expected at '
                f'most {_TOLERANCE:.0e}: choose another --format.')
        save_config_for_hf(
            model,
            inside / 'config.json',
            # The tag and the labels of the name are those of its own weights, which these need not be.
            model_config=dict(
                {key: value for key, value in known.items() if value}, pretrained_cfg=dict(tag='', label_names=None)),
            data_config=data_config,
        )
        inside.rename(folder)
    return difference


def export(args: argparse.Namespace) -> Path:
    """Export a trained model.

    Args:
        args: What `parse_export_args` gives.

    Returns:
        The folder written.

    Raises:
        InputError: If anything given cannot work.
    """
    if args.format == 'onnx':
        _check_packages()
    elif args.opset is not None:
        raise InputError(f'--opset {args.opset} goes with --format onnx, not {args.format}: leave it out.')
    if args.output:
        _check_folder(Path(args.output))
    trained = load_trained_model(args.model, args.checkpoint, args.pretrained, args.experts, args.authors_classifiers)
    model = trained.model
    if args.model and ':' not in args.model and not args.pretrained:
        _logger.warning(f"'{args.model}' without --pretrained is exported with random weights.")
    data_args = dict(trained.data_args, **({'img_size': args.img_size} if args.img_size else {}))
    try:
        data_config = resolve_input_data_config(model, args=data_args)
    except ValueError as error:
        raise InputError(f'--img-size {args.img_size}: {error}') from error
    folder = Path(args.output or f"exported/{model.pretrained_cfg['architecture']}-{args.format}")
    difference = save_exported(
        model, folder, args.format, data_config, trained.class_names, trained.class_counts, args.opset)
    _logger.info(f'Largest difference from torch: {difference:.1e} of the largest logit.')
    print(folder / FILES[args.format])
    return folder


OPTIONS = (
    TRAINED_MODEL,
    Group(
        'Export',
        Option('format', str, 'onnx', 'format to write', choices=tuple(FILES)),
        Option('opset', int, None, "version of ONNX's operators, torch's choice by default"),
        Option('img_size', int, None, "side of the images, the model's own by default", low=1),
        Option('output', str, None, 'folder to write, exported/NAME-FORMAT by default', 'DIR'),
    ),
    HPARAMS,
)


def parse_export_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of export.py.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    return complete(
        OPTIONS, read_command_line('Export a model to a file that runs without this package.', OPTIONS, argv))


def main() -> int:
    return run_script(lambda: export(parse_export_args()))
