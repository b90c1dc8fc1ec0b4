"""export.py: what it writes gives the model's own logits, at any batch size and without this package."""
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.nn import functional
from torchvision.datasets import CIFAR100

import shike_timm  # noqa: F401
from shike_timm.cli.export import export, parse_export_args
from shike_timm.errors import InputError
from shike_timm.pretrained.folder import export_model
from shike_timm.publishing import export as exporting
from shike_timm.publishing.export import FILES, load_exported, save_exported

CLASS_NAMES = [f'class {i}' for i in range(100)]
CLASS_COUNTS = list(range(500, 0, -5))
WITHOUT_THIS_PACKAGE = """
import sys, numpy, onnxruntime, torch
onnx, torchscript, torch_export = sys.argv[1:]
images = numpy.zeros((3, 3, 32, 32), dtype=numpy.float32)
print(onnxruntime.InferenceSession(onnx).run(None, {'images': images})[0].shape)
print(tuple(torch.jit.load(torchscript)(torch.from_numpy(images)).shape))
print(tuple(torch.export.load(torch_export).module()(torch.from_numpy(images)).shape))
print('timm' in sys.modules)
"""


def largest_difference(model, exported, *shape):
    images = torch.randn(*shape)
    with torch.inference_mode():
        expected, logits = model(images), exported(images)
    assert logits.shape == expected.shape
    return float((logits - expected).abs().max())


def patterns(number):
    """Images of noise with detail of every size, as photographs have."""
    sizes = (1, 2, 4, 8, 16, 32)
    return sum(functional.interpolate(0.4 * torch.randn(number, 3, size, size), size=32) for size in sizes)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A model folder: random weights, but BatchNorm and classifiers fit the features, so that many classes occur."""
    torch.manual_seed(0)
    model = timm.create_model('resnet32_shike')
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    images = patterns(100)
    with torch.no_grad():
        model.train()(images)
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True).unflatten(1, (3, -1))
        model.classifier.weight.copy_((features - features.mean(0)).transpose(0, 1))
    folder = tmp_path_factory.mktemp('source') / 'model'
    data_config = dict(resolve_model_data_config(model), crop_pct=0.9)
    export_model(model, folder, data_config, CLASS_NAMES, CLASS_COUNTS)
    return folder


@pytest.fixture(scope='module')
def model(source):
    return timm.create_model(f'local-dir:{source}', pretrained=True).eval()


@pytest.fixture(scope='module')
def exported_to(source, tmp_path_factory):
    """Export to a format, once; gives the folder."""
    folders = {}

    def run(format):
        if format not in folders:
            folder = tmp_path_factory.mktemp(format)
            argv = ['--model', f'local-dir:{source}', '--format', format, '--output', str(folder)]
            folders[format] = export(parse_export_args(argv))
        return folders[format]

    return run


@pytest.mark.parametrize('format', FILES)
def test_logits_are_the_models_at_any_batch_size(format, exported_to, model):
    exported = load_exported(exported_to(format) / FILES[format], format)
    for batch_size in (1, 3, 8):
        assert largest_difference(model, exported, batch_size, 3, 32, 32) < 1e-4


@pytest.mark.parametrize('format', FILES)
def test_config_tells_preprocessing_and_classes(format, exported_to, model):
    folder = exported_to(format)
    assert {path.name for path in folder.iterdir()} == {FILES[format], 'config.json'}
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'resnet32_shike'
    assert config['label_names'] == CLASS_NAMES and config['class_counts'] == CLASS_COUNTS
    preprocessing = config['pretrained_cfg']
    assert preprocessing['mean'] == list(model.pretrained_cfg['mean'])
    assert preprocessing['input_size'] == [3, 32, 32] and preprocessing['crop_pct'] == 0.9


def test_an_onnx_file_serves_alone(exported_to, tmp_path):
    folder = exported_to('onnx')
    alone = shutil.copy(folder / 'model.onnx', tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / 'a.png')
    own, beside = (
        list(shike_timm.predict(tmp_path / 'a.png', model=str(one), workers=0)) for one in (alone, folder))
    assert own == beside
    facts = onnxruntime.InferenceSession(alone).get_modelmeta().custom_metadata_map
    assert json.loads(facts['class_names']) == json.loads((folder / 'config.json').read_text())['label_names']


def test_runs_without_this_package(exported_to):
    files = [exported_to(format) / file for format, file in FILES.items()]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_THIS_PACKAGE, *files],
        capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ['(3, 100)'] * 3 + ['False']


@pytest.mark.parametrize('format', ['onnx', 'torch-export'])
def test_file_names_no_path_of_this_machine(format, exported_to):
    path = exported_to(format) / FILES[format]
    contents = [path.read_bytes()]
    if format != 'onnx':
        with zipfile.ZipFile(path) as file:
            contents = [file.read(name) for name in file.namelist()]
    assert not any(str(place).encode() in content for place in (ROOT, sys.prefix) for content in contents)


def test_onnx_can_be_prepared_for_quantization(exported_to, tmp_path):
    subprocess.run(
        [sys.executable, '-m', 'onnxruntime.quantization.preprocess', '--input', exported_to('onnx') / 'model.onnx',
         '--output', tmp_path / 'prepared.onnx'], check=True, capture_output=True)
    assert onnx.load(tmp_path / 'prepared.onnx').graph.value_info


def test_a_program_is_tied_to_no_device(exported_to):
    graph = torch.export.load(exported_to('torch-export') / 'model.pt2').graph
    assert not [node for node in graph.nodes if 'cpu' in node.format_node()]


def test_the_batch_axis_has_a_name(exported_to):
    graph = onnx.load(exported_to('onnx') / 'model.onnx').graph
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {'batch'}


def test_real_images_have_the_same_top_1(exported_to, model, cifar_root):
    folder = exported_to('onnx')
    preprocessing = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    keys = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')
    dataset = CIFAR100(cifar_root, train=False, transform=create_transform(**{key: preprocessing[key] for key in keys}))
    images = torch.stack([dataset[i][0] for i in range(1000)])
    exported = load_exported(folder / 'model.onnx', 'onnx')
    with torch.inference_mode():
        expected, logits = (torch.cat([run(batch) for batch in images.split(50)]) for run in (model, exported))
    assert expected.argmax(1).unique().numel() >= 20
    assert float((logits - expected).abs().max()) < 1e-4
    first, second = expected.topk(2).values.unbind(1)
    clear = first - second > 2e-4  # others may turn within that tolerance
    assert clear.float().mean() > 0.99 and torch.equal(logits.argmax(1)[clear], expected.argmax(1)[clear])


@pytest.mark.slow
def test_other_backbones_export_to_onnx(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('shike', backbone='resnet10t', num_classes=10)
    data_config = dict(resolve_model_data_config(model), input_size=(3, 32, 32))
    save_exported(model, tmp_path, 'onnx', data_config, opset=18)
    assert onnx.load(tmp_path / 'model.onnx').opset_import[0].version == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.onnx']
    exported = load_exported(tmp_path / 'model.onnx', 'onnx')
    assert max(largest_difference(model, exported, batch_size, 3, 32, 32) for batch_size in (1, 3)) < 1e-4


def test_only_the_chosen_experts_are_exported(source, exported_to, tmp_path):
    folder = export(parse_export_args([
        '--model', f'local-dir:{source}', '--experts', '0', '2', '--format', 'torchscript', '--output',
        str(tmp_path / 'two')]))
    two, three = (load_exported(place / FILES['torchscript'], 'torchscript') for place in (
        folder, exported_to('torchscript')))
    model = timm.create_model(f'local-dir:{source}', pretrained=True).eval()
    model.set_experts([0, 2])
    count = sum(parameter.numel() for parameter in two.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert count < sum(parameter.numel() for parameter in three.parameters())
    assert largest_difference(model, two, 3, 3, 32, 32) < 1e-4


def test_checkpoint_brings_its_preprocessing(tiny_run, run_script, tmp_path):
    output = tmp_path / 'new' / 'folder'
    status, out, error = run_script(
        'export.py', '--checkpoint', tiny_run / 'stage_two' / 'last.pth.tar', '--format', 'torchscript', '--output',
        output)
    assert status == 0 and 'Largest difference' in error and 'random weights' not in error
    assert out.strip() == str(output / 'model.torchscript.pt')
    config = json.loads((output / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 8, 8]
    assert config['pretrained_cfg']['tag'] == ''  # these weights are not those of the name's default tag
    assert len(config['label_names']) == len(config['class_counts']) == config['num_classes'] == 10


def test_registered_name_is_exported_with_a_warning(run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = run_script(
        'export.py', '--model', 'resnet32_shike', '--format', 'torchscript', '--img-size', '16')
    assert status == 0 and 'random weights' in error
    folder = tmp_path / 'exported' / 'resnet32_shike-torchscript'
    assert (folder / 'model.torchscript.pt').is_file()
    config = json.loads((folder / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 16, 16]
    assert not config['pretrained_cfg'].get('label_names') and 'label_names' not in config
    assert 'exists already' in run_script('export.py', '--model', 'resnet32_shike', '--format', 'torchscript')[2]


@pytest.mark.parametrize('value, argv', [
    ('exists already', ['--model', 'resnet32_shike', '--format', 'torchscript', '--output', '{tmp}/taken']),
    ('exists already', ['--model', 'resnet32_shike', '--format', 'torchscript', '--output', '{tmp}/taken/file']),
    ('--opset 18', ['--model', 'resnet32_shike', '--format', 'torch-export', '--opset', '18']),
    ('--img-size 0', ['--model', 'resnet32_shike', '--img-size', '0']),
    ("'wasm'", ['--model', 'resnet32_shike', '--format', 'wasm']),
    ('--experts', ['--model', 'resnet32_shike', '--format', 'torchscript', '--experts', '3', '--output', '{tmp}/new']),
    ('either as --model', ['--format', 'torchscript', '--output', '{tmp}/new']),
])
def test_bad_input_is_one_sentence_and_touches_nothing(value, argv, run_script, tmp_path):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'file').write_text('mine')
    status, out, error = run_script('export.py', *(part.replace('{tmp}', str(tmp_path)) for part in argv))
    assert status == 2 and not out and value in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob('*')] == ['taken', 'file']
    assert (tmp_path / 'taken' / 'file').read_text() == 'mine'


def test_missing_package_is_named(run_script, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda *args: None if args == ('onnxscript',) else find_spec(*args))
    status, out, error = run_script('export.py', '--model', 'resnet32_shike', '--output', tmp_path / 'out')
    assert status == 2 and len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
    assert 'needs onnxscript,' in error and 'pip install "shike-timm[export]"' in error


@pytest.fixture
def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())


@pytest.mark.parametrize('place', ['file/new', 'link'])
def test_a_folder_that_cannot_be_made_is_refused_first(place, run_script, tmp_path):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path)
    status, out, error = run_script('export.py', '--model', 'local-dir:nowhere', '--output', tmp_path / place)
    assert status == 2 and not out and f"output '{tmp_path / place}'" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize('error, expected', [(RuntimeError('no'), InputError), (OSError(28, 'No space left'), OSError)])
def test_nothing_is_left_when_the_export_fails(error, expected, small_network, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(exporting, '_write', fail)
    with pytest.raises(expected, match='no; choose another|No space left'):
        save_exported(small_network, tmp_path / 'a' / 'b', 'torchscript', dict(input_size=(3, 8, 8)))
    assert not list(tmp_path.iterdir())


def test_unknown_opset_is_refused(small_network, tmp_path):
    with pytest.raises(InputError, match='--opset 99 cannot be written'):
        save_exported(small_network, tmp_path / 'out', 'onnx', dict(input_size=(3, 8, 8)), opset=99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('export_of, message', [
    (lambda exported: lambda images: 1.001 * exported(images), r'differs .* by 1\.0e-03 of the largest logit'),
    (lambda exported: lambda images: exported(images) * float('nan'), 'differs .* by nan'),
    (lambda exported: lambda images: exported(images)[:, :2], r'of shape \(1, 2\), expected \(1, 4\)'),
    (lambda exported: lambda images: exported(images[:1]).reshape(5, 4), 'cannot be exported: shape'),
])
def test_an_export_that_differs_is_not_kept(export_of, message, small_network, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'load_exported', lambda *args: export_of(load_exported(*args)))
    with pytest.raises(InputError, match=message):
        save_exported(small_network, tmp_path / 'out', 'torchscript', dict(input_size=(3, 8, 8)))
    assert not list(tmp_path.iterdir())


def test_an_export_is_named_by_its_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('one', 'two'):
        shutil.copytree(tiny_run, tmp_path / name)
    for model in ('one', 'local-dir:two/model', 'resnet32_shike'):
        export(parse_export_args(['--model', model, '--pretrained', '--format', 'torchscript']))
    assert {path.name for path in (tmp_path / 'exported').iterdir()} == {
        f'{name}-torchscript' for name in ('one', 'two', 'resnet32_shike')}
