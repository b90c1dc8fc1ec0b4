"""The private names of other libraries that the package cannot do without: in one file each, and what breaks."""
import ast
import importlib

import pytest
import timm
import torch
from conftest import ROOT
from timm.utils import CheckpointSaver
from torchvision.transforms import AutoAugment

PACKAGE = ROOT / 'shike_timm'
FOREIGN = {
    '_augmentation_space': ['data/augment/batch.py'],
    '_is_amx_tile_supported': ['devices.py'],  # tested where it is used: only older releases of torch need it
    '_is_avx512_bf16_supported': ['devices.py'],
    '_python_dispatch': ['measure.py'],
    '_replace': ['checkpoints.py'],
    '_save': ['checkpoints.py'],
    '_version': ['models/backbones/split.py'],
}


def test_private_names_of_others_are_used_in_one_file_each():
    found, own = {}, {'_asdict'}  # of named tuples
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.attr] if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [*(node.module or '').split('.'), *(alias.name for alias in node.names)]
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own |= {node.name} - set(FOREIGN)
            elif isinstance(node, ast.Attribute) and not names:
                own.add(node.attr)
            for name in names:
                if name.startswith('_') and not name.startswith('__'):
                    found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    assert {name: sorted(files) for name, files in found.items() if name not in own} == FOREIGN


@pytest.mark.parametrize('owner, name, breaks', [
    (AutoAugment, '_augmentation_space', 'AutoAugment in batches'),
    (importlib.import_module('torch.utils._python_dispatch'), 'TorchDispatchMode', 'peak memory on a CPU'),
    (CheckpointSaver, '_replace', 'that there is a `last` checkpoint at every moment'),
    (CheckpointSaver, '_save', 'the checkpoint before the first epoch'),
    (torch.Tensor, '_version', 'the refusal of backbones that overwrite the features they share'),
    (timm.create_model('test_resnet'), '_model_args', 'that a model saved with fewer experts is made again'),
])
def test_private_names_of_others_are_there(owner, name, breaks):
    assert hasattr(owner, name), f'What breaks: {breaks}.'
