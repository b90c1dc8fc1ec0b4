"""The private names of other libraries that the package cannot do without: in one file each, and what breaks."""
import ast

import pytest
import timm
import torch
from conftest import ROOT
from datasets import Dataset
from timm.utils import CheckpointSaver
from torchvision.transforms import AutoAugment

PACKAGE = ROOT / 'shike_timm'
FOREIGN = [
    (AutoAugment, '_augmentation_space', 'data/augment/batch.py', 'AutoAugment in batches'),
    (torch.cpu, '_is_amx_tile_supported', 'devices.py', 'the data type of --amp on older releases of torch'),
    (torch.cpu, '_is_avx512_bf16_supported', 'devices.py', 'the same'),
    (CheckpointSaver, '_replace', 'checkpoints.py', 'that there is a `last` checkpoint at every moment'),
    (CheckpointSaver, '_save', 'checkpoints.py', 'the checkpoint before the first epoch'),
    (torch.Tensor, '_version', 'models/backbones/trace.py', 'the refusal of backbones that overwrite what is shared'),
    (torch, '_assert', 'models/backbones/trace.py', 'that the checks of a backbone are left out of its parts'),
    (Dataset.from_dict({}), '_fingerprint', 'data/sources/huggingface.py',
     'that images of a changed data set are checked anew'),
    (timm.create_model('test_resnet'), '_model_args', 'models/shike.py', 'that fewer experts are saved as such'),
]


def test_private_names_of_others_are_used_in_one_file_each():
    known = {name: {file} for _, name, file, _ in FOREIGN}
    found, own = {}, {'_asdict', '_fields', '_typeshed'}  # of named tuples; for the type checker alone
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names = [node.attr]
            elif isinstance(node, ast.Constant) and node.value in known:
                names = [node.value]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [*(node.module or '').split('.'), *(alias.name for alias in node.names)]
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Attribute)):
                own.add(getattr(node, 'attr', getattr(node, 'name', '')))
            for name in names:
                if name.startswith('_') and not name.startswith('__'):
                    found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    assert {name: files for name, files in found.items() if name in known or name not in own} == known


@pytest.mark.parametrize('owner, name, file, breaks', FOREIGN)
def test_private_names_of_others_are_there(owner, name, file, breaks):
    assert hasattr(owner, name) or hasattr(owner, 'get_capabilities'), f'What breaks: {breaks}.'
