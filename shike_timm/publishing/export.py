"""Export of a trained model to a file that runs without this package, compared with the model before it is kept."""
import importlib.util
import io
import logging
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from ..errors import InputError, one_line
from ..pretrained.folder import export_model

__all__ = ['FILES', 'check_packages', 'find_place', 'load_exported', 'save_exported']

FILES = {'onnx': 'model.onnx', 'torchscript': 'model.torchscript.pt', 'torch-export': 'model.pt2'}

_TRACED_BATCH = 2  # of one image, torch.export would take the batch size for a constant
_CHECKED_BATCHES = (1, 5)
_TOLERANCE = 1e-4  # of the largest logit


def check_packages() -> None:
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f'--format onnx needs {missing[0]}, which is not installed: pip install "shike-timm[export]", '
            'or choose another format.')


def find_place(folder: Path) -> Path:
    """The nearest existing folder above one that can be made, to write in."""
    if folder.is_symlink() or folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output '{folder}' exists already: choose another folder, or remove it.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"output '{folder}' cannot be made in '{above}': choose another folder.")
    return above


def _known_to_shape_inference(node: Any) -> List[Any]:
    """An ONNX node, or others in its place, since onnxruntime's preprocessing for quantization knows no ReduceL2."""
    from onnx.helper import make_node

    if node.op_type != 'ReduceL2' or len(node.input) < 2:
        return [node]
    (x, axes), (norm,) = node.input, node.output
    total = make_node('ReduceSum', [f'{norm}_squares', axes], [f'{norm}_total'], name=f'{norm}_total')
    total.attribute.extend(node.attribute)
    return [
        make_node('Mul', [x, x], [f'{norm}_squares'], name=f'{norm}_squares'),
        total,
        make_node('Sqrt', [f'{norm}_total'], [norm], name=node.name),
    ]


def _write_onnx(model: nn.Module, images: Tensor, path: Path, opset: Optional[int]) -> None:
    import onnx
    from timm.utils.onnx import onnx_export

    for name in ('onnx_ir', 'onnxscript', 'torch.onnx'):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of every rewriting
    onnx_export(
        model, str(path), images, opset=opset, use_dynamo=True, input_names=['images'], output_names=['logits'])
    program = onnx.load(path, load_external_data=False)
    written = program.opset_import[0].version
    if opset is not None and written != opset:  # the exporter warns and keeps its own
        raise InputError(f'--opset {opset} cannot be written, torch gives {written}: leave it out.')
    nodes = [part for node in program.graph.node for part in _known_to_shape_inference(node)]
    for node in nodes:
        del node.metadata_props[:]  # paths and source lines of this machine
    del program.graph.node[:]
    program.graph.node.extend(nodes)
    onnx.save(program, path)


def _write_torchscript(model: nn.Module, images: Tensor, path: Path) -> None:
    # Traced, since scripting depends on the backbone. Not frozen: that saves 0 to 7 percent of the time on a CPU, and
    # the weights could not be moved to another device.
    whole = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, images, check_trace=False), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, 'w') as target:
        for item in source.infolist():
            if not item.filename.endswith('.debug_pkl'):  # as above
                target.writestr(item, source.read(item))


def _write_program(model: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch', max=2 ** 31 - 1)},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)  # as above
    torch.export.save(program, path)


def _write(model: nn.Module, images: Tensor, path: Path, format: str, opset: Optional[int]) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit is deprecated, which a user of the format knows
        if format == 'onnx':
            _write_onnx(model, images, path, opset)
        elif format == 'torchscript':
            _write_torchscript(model, images, path)
        else:
            _write_program(model, images, path)


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
        class_counts: Optional[Sequence[int]] = None,
        opset: Optional[int] = None,
        **known: Any,
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
        **known: What else `export_model` is to keep in `config.json`.

    Returns:
        The largest difference found, relative to the largest logit.

    Raises:
        InputError: If the folder holds something or cannot be made, or the export fails or differs.
    """
    folder = Path(folder).absolute()
    with tempfile.TemporaryDirectory(dir=find_place(folder)) as temporary:
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
            raise InputError(f'The model cannot be exported: {one_line(error)}; choose another --format.') from error
        if not difference <= _TOLERANCE:
            raise InputError(
                f'The exported model differs from the original by {difference:.1e} of the largest logit, expected at '
                f'most {_TOLERANCE:.0e}: choose another --format.')
        saved = Path(temporary, 'saved')
        export_model(model, saved, data_config, class_names, class_counts, **known)
        (saved / 'config.json').rename(inside / 'config.json')
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside.rename(folder)
    return difference
