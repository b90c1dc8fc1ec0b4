"""predict.py: the same answers from whatever names the files and the model, and bad files as rows."""
import csv
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import shike_timm
from shike_timm.cli.export import export, parse_export_args
from shike_timm.data.image_files import find_images

BAD = {'empty.png': b'', 'page.jpg': b'<html></html>', 'cut.png': None}


@pytest.fixture(scope='module')
def model():
    return timm.create_model('resnet32_shike', pretrained=True).eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of several sizes and modes below a folder, three bad ones among them, and what is no image."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('images')
    for i, channels in enumerate((3, 1, 4, 3, 3)):
        place = root / f'part {i % 2}'
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i, 36, channels), dtype=np.uint8).squeeze()
        Image.fromarray(pixels).save(place / f'{i},.png')
    for name, content in BAD.items():
        whole = (root / 'part 0' / '0,.png').read_bytes()
        (root / 'part 0' / name).write_bytes(whole[:len(whole) // 2] if content is None else content)
    for name in ('notes.txt', '.hidden.png'):
        (root / name).write_text('no image')
    (root / 'part 0' / '.ipynb_checkpoints').mkdir()
    (root / 'part 0' / '.ipynb_checkpoints' / '0.png').write_bytes(whole)
    return root


def good(folder):
    return [path for path in sorted(folder.glob('*/[!.]*.*')) if path.name not in BAD]


@torch.inference_mode()
def expected(model, paths):
    """Expert logits of files [N, M, C], by timm's own transform."""
    transform = create_transform(**resolve_model_data_config(model))
    return model.forward_experts(torch.stack([transform(Image.open(path).convert('RGB')) for path in paths]))


def test_rows_say_what_the_model_says(folder, model):
    rows = list(shike_timm.predict(
        folder, model='resnet32_shike', topk=3, per_expert=True, include_index=True, batch_size=3, workers=0,
        device='cpu'))
    assert [row['filename'] for row in rows] == [str(path) for path in sorted(folder.glob('*/[!.]*.*'))]
    bad = [row for row in rows if row['error']]
    assert sorted(os.path.basename(row['filename']) for row in bad) == sorted(BAD)
    assert all(set(row) == {'filename', 'error'} for row in bad) and 'cannot identify' in bad[1]['error']
    logits = expected(model, good(folder))
    for row, experts in zip([row for row in rows if not row['error']], logits):
        for told, one in zip((row, *row['experts']), (experts.mean(0), *experts)):
            top = one.softmax(-1).topk(3)
            assert told['index'] == top.indices.tolist()
            assert told['prob'] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert told['label'] == [model.pretrained_cfg['label_names'][c] for c in told['index']]


def test_a_checkpoint_is_what_predicts_beside_an_export(tiny_run, folder, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'model.onnx').write_bytes(b'')
    path = tiny_run / 'stage_two' / 'last.pth.tar'
    command = ['predict.py', '--checkpoint', path, '--workers', '0', '--device', 'cpu']
    status, out, error = run_script(*command, good(folder)[0])
    assert status == 0 and out.count('\n') == 2, error
    status, _, error = run_script(*command, '--model', 'model.onnx', good(folder)[0])
    assert status == 2 and "--checkpoint does not go with 'model.onnx'" in error


def test_a_folder_that_is_linked_into_itself_is_read_once(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'images')
    before = find_images([str(tmp_path / 'images')])
    (tmp_path / 'images' / 'latest').symlink_to('.')
    assert find_images([str(tmp_path / 'images')]) == before


def piped(monkeypatch, lines):
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(lines), encoding='utf-8'))


def test_names_on_standard_input_are_of_any_encoding(monkeypatch):
    piped(monkeypatch, b'caf\xe9.png\r\n')
    assert [os.fsencode(path) for path in find_images(['-'])] == [b'caf\xe9.png']


def test_every_way_to_name_files_and_both_formats(folder, model, run_script, tmp_path, monkeypatch):
    command = ['predict.py', '--model', 'resnet32_shike', '--workers', '0', '--device', 'cpu', '--topk', '2']
    status, table, error = run_script(*command, folder)
    assert status == 0 and '3 could not be predicted' in error
    rows = list(csv.DictReader(io.StringIO(table)))
    assert list(rows[0]) == ['filename', 'label_0', 'label_1', 'prob_0', 'prob_1', 'error'] and len(rows) == 8
    piped(monkeypatch, f'{folder}/part 0\n\n{folder}/part 1/*.png\n'.encode())
    assert run_script(*command, '-')[1] == run_script(*command, *sorted(folder.glob('*/[!.]*.*')))[1] == table
    assert run_script(*command, f'{folder}/**/*.[pj][np]g')[1] == table
    status, out, error = run_script(
        *command, folder, '--results-format', 'jsonl', '--results-file', tmp_path / 'out', '--output-type', 'logit')
    assert status == 0 and not out and [path.name for path in tmp_path.iterdir()] == ['out']
    lines = [json.loads(line) for line in (tmp_path / 'out').read_text().splitlines()]
    assert [(line['filename'], line['error'] or '') for line in lines] == [
        (row['filename'], row['error']) for row in rows]
    logits = expected(model, good(folder)).mean(1)
    for line, row, one in zip(*([row for row in told if not row['error']] for told in (lines, rows)), logits):
        assert line['logit'] == pytest.approx(one.topk(2).values.tolist(), abs=1e-3)
        assert line['label'] == [row['label_0'], row['label_1']]


def test_every_kind_of_model(tiny_run, image_folder, tmp_path):
    """Run folder, model folder, checkpoint and exported file, which holds its prior, say the same."""
    prior = ['--target-prior', 'train']
    export(parse_export_args(['--model', str(tiny_run), '--output', str(tmp_path / 'onnx'), *prior]))
    sources = [
        dict(model=str(tiny_run)), dict(model=str(tiny_run / 'model')), dict(model=f'local-dir:{tiny_run}/model'),
        dict(model=str(tiny_run / 'stage_two' / 'last.pth.tar')),
        dict(checkpoint=str(tiny_run / 'stage_two' / 'last.pth.tar'))]
    sources = [dict(source, target_prior='train') for source in sources]
    sources += [dict(model=str(tmp_path / 'onnx')), dict(model=str(tmp_path / 'onnx' / 'model.onnx'))]
    images = image_folder / 'train'
    told = [list(shike_timm.predict(images, **source, workers=0, device='cpu', topk=0)) for source in sources]
    for rows in told:
        assert [row['label'][0] for row in rows] == [row['label'][0] for row in told[0]] and len(rows) == 42
        assert [row['prob'][0] for row in rows] == pytest.approx([row['prob'][0] for row in told[0]], abs=1e-3)
        assert len(rows[0]['prob']) == 10 and sum(rows[0]['prob']) == pytest.approx(1)
    plain, adjusted = (
        next(iter(shike_timm.predict(images, **source, workers=0, device='cpu', topk=0, output_type='logit')))
        for source in (dict(model=str(tiny_run)), sources[-1]))
    plain, adjusted = (
        torch.tensor([logit for _, logit in sorted(zip(row['label'], row['logit']))]) for row in (plain, adjusted))
    counts = torch.tensor(json.loads((tiny_run / 'model' / 'config.json').read_text())['class_counts'])
    torch.testing.assert_close(adjusted - plain, (counts / counts.sum()).log(), atol=1e-4, rtol=0)
    for wrong, message in ((dict(experts=[0]), '--experts'), (dict(target_prior='train'), '--target-prior'),
                           (dict(per_expert=True), '--per-expert'), (dict(device='cuda'), '--device cuda')):
        with pytest.raises(ValueError, match=f'{message} does not go with'):
            shike_timm.predict(images, model=str(tmp_path / 'onnx'), **wrong)


def test_workers_keep_the_order(folder):
    options = dict(model='resnet32_shike', device='cpu', batch_size=1)
    one, two = (list(shike_timm.predict([folder], workers=workers, **options)) for workers in (0, 2))
    assert one == two


def test_damaged_weights_are_told(folder, model, tmp_path):
    damaged = timm.create_model('resnet32_shike', pretrained=True)
    with torch.no_grad():
        damaged.classifier.weight[0] = float('nan')
    timm.models.save_for_hf(damaged, tmp_path, safe_serialization=True)
    rows = list(shike_timm.predict(folder, model=str(tmp_path), workers=0, device='cpu'))
    assert {row['error'] for row in rows if row['filename'].endswith(',.png')} == {'the logits are not finite'}


@pytest.mark.parametrize('value, argv', [
    ('either as --model', ['{folder}']),
    ("pattern '/nowhere/*.png' matches no file", ['/nowhere/*.png', '--model', 'resnet32_shike']),
    ('holds no images', ['{tmp}', '--model', 'resnet32_shike']),
    ('holds no model', ['{folder}', '--model', '{folder}']),
    ("'{tmp}/model.onnx' and the config.json", ['{folder}', '--model', '{tmp}/model.onnx']),
    ('--topk -1', ['{folder}', '--model', 'resnet32_shike', '--topk', '-1']),
    ("results-file '/nowhere/x'", ['{folder}', '--model', 'resnet32_shike', '--results-file', '/nowhere/x']),
])
def test_bad_input(value, argv, folder, tmp_path, run_script):
    (tmp_path / 'model.onnx').write_text('no model')
    argv = [part.format(folder=folder, tmp=tmp_path) for part in argv]
    status, out, error = run_script('predict.py', *argv)
    assert status == 2 and not out and len(error.splitlines()) == 1
    assert value.format(tmp=tmp_path) in error and [path.name for path in tmp_path.iterdir()] == ['model.onnx']


def test_deep_and_turned_images_are_read_as_in_training(tmp_path, model):
    """By what a saved model keeps of its training, also through ONNX's config.json and on the command line."""
    values = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    Image.fromarray(values.astype(np.uint16) * 4).save(tmp_path / 'deep.png', exif=turned)
    Image.fromarray(np.rot90(values, -1)).save(tmp_path / 'plain.png')
    deep, plain = (
        next(iter(shike_timm.predict(
            tmp_path / name, model='resnet32_shike', topk=0, output_type='logit', workers=0, device='cpu', **options)))
        for name, options in (('deep.png', dict(pixel_range=[0, 1020], exif=True)), ('plain.png', {})))
    assert deep['error'] is None and deep['label'] == plain['label'] and deep['logit'] == plain['logit']


def test_names_that_spreadsheets_would_run(folder, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(good(folder)[0], '=1+1.png')
    command = ['predict', '=1+1.png', '--model', 'resnet32_shike', '--workers', '0', '--device', 'cpu']
    told = [run_script(*command, '--results-format', name)[1] for name in ('csv', 'spreadsheet', 'jsonl')]
    assert told[0].splitlines()[1].startswith('=1+1.png') and told[1] == told[0].replace('=1+1', "'=1+1")
    assert '"=1+1.png"' in told[2]


def test_one_image_on_a_terminal_is_one_line(tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    path = tmp_path / 'one.png'
    Image.new('RGB', (32, 32)).save(path)
    status, out, err = run_script('predict', path, '--model', 'resnet32_shike', '--device', 'cpu', '--topk', '2')
    assert status == 0 and re.fullmatch(rf'{path}: \w+ 0\.\d+, \w+ 0\.\d+\n', out), (out, err)
