"""Export of a model to a file that runs without this package. The file is kept only if it computes the same logits."""
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from ..checkpoints import CONFIG_FILE
from ..errors import InputError, one_line
from ..files import read_json
from ..pretrained.folder import export_model

FILES = {'onnx': 'model.onnx', 'torchscript': 'model.torchscript.pt', 'torch-export': 'model.pt2'}

_TRACED_BATCH = 2  # torch.export would take a batch size of 1 for a constant.
_CHECKED_BATCHES = (1, 5)
_TOLERANCE = 1e-4  # Largest accepted difference, as a share of the largest logit.


def find_place(folder: Path) -> Path:
    """The nearest existing folder above a new folder. Raises an InputError if the new folder cannot be made."""
    if folder.is_symlink() or folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output '{folder}' exists already: choose another folder, or remove it.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"output '{folder}' cannot be made in '{above}': choose another folder.")
    return above


def _write_onnx(model: nn.Module, images: Tensor, path: Path, opset: Optional[int]) -> None:
    import onnx
    from timm.utils.onnx import onnx_export

    for name in ('onnx_ir', 'onnxscript', 'torch.onnx'):
        logging.getLogger(name).setLevel(logging.ERROR)  # These loggers log every rewriting.
    onnx_export(
        model, str(path), images, opset=opset, use_dynamo=True, input_names=['images'], output_names=['logits'])
    program = onnx.load(path, load_external_data=False)
    written = program.opset_import[0].version
    if opset is not None and written != opset:  # The exporter only warns.
        raise InputError(f'--opset {opset} cannot be written, torch gives {written}: leave it out.')
    for node in program.graph.node:
        del node.metadata_props[:]  # This removes paths and source lines of this machine.
    onnx.save(program, path)


def _write_metadata(path: Path, config: Dict[str, Any]) -> None:
    """Write class names and configuration into an ONNX file, so that the file needs no others."""
    import onnx

    program = onnx.load(path, load_external_data=False)
    facts = dict(class_names=config.get('label_names'), config=config)
    onnx.helper.set_model_props(program, {name: json.dumps(fact) for name, fact in facts.items() if fact})
    onnx.save(program, path)


def read_metadata(path: Union[str, Path]) -> Dict[str, Any]:
    """Read the content of `config.json` from an ONNX file. Files of earlier versions hold none: the result is {}."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return json.loads(session.get_modelmeta().custom_metadata_map.get('config', '{}'))


def _write(model: nn.Module, images: Tensor, path: Path, format: str, opset: Optional[int]) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit is deprecated, but the user asks for it.
        if format == 'onnx':
            _write_onnx(model, images, path, opset)
        elif format == 'torchscript':  # The model is traced, since some backbones cannot be scripted.
            torch.jit.save(torch.jit.trace(model, images, check_trace=False), path)
        else:
            batch = torch.export.Dim('batch', max=2 ** 31 - 1)
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
            for module in program.graph_module.modules():
                for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                    node.meta.pop('stack_trace', None)  # This removes paths and source lines of this machine.
            torch.export.save(program, path)


def load_exported(path: Union[str, Path], format: str) -> Callable[[Tensor], Tensor]:
    """Load an exported file as a function on the CPU, which maps images [B, C, H, W] to logits [B, num_classes].

    onnxruntime uses as many threads as torch.
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
    """Largest difference between the logits of a model and its export, relative to the largest logit."""
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
    difference = max(differences)
    if not difference <= _TOLERANCE:
        raise InputError(
            f'The exported model differs from the original by {difference:.1e} of the largest logit, expected at '
            f'most {_TOLERANCE:.0e}: choose another --format.')
    return difference


def save_exported(
        model: nn.Module, folder: Union[str, Path], format: str, data_config: Dict[str, Any],
        opset: Optional[int] = None, **facts: Any,
) -> float:
    """Write a folder with the model exported for any batch size, and return its difference from the model.

    The difference is the largest difference of logits found, relative to the largest logit. The folder must be new or
    empty. It is written completely or not at all. The `facts` are those of `export_model`.
    """
    folder = Path(folder).absolute()
    with tempfile.TemporaryDirectory(dir=find_place(folder)) as temporary:
        inside = Path(temporary, folder.name)  # Others may read this folder, but not the temporary one.
        inside.mkdir()
        path = inside / FILES[format]
        images = torch.randn(_TRACED_BATCH, *data_config['input_size'])
        try:
            _write(model.eval(), images, path, format, opset)
            difference = _compare(model, load_exported(path, format), images.shape[1:])
        except (InputError, OSError):
            raise
        except Exception as error:  # torch and onnxruntime can raise any error.
            raise InputError(f'The model cannot be exported: {one_line(error)}; choose another --format.') from error
        saved = Path(temporary, 'saved')
        export_model(model, saved, data_config, **facts)
        (saved / CONFIG_FILE).rename(inside / CONFIG_FILE)
        if format == 'onnx':
            _write_metadata(path, read_json(inside / CONFIG_FILE))
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside.rename(folder)
    return difference
