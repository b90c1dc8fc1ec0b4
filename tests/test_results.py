"""Recorded runs: what a row holds, and README tables that cannot drift from it."""
import csv
import gzip
import importlib
import json
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, TINY
from PIL import Image

from shike_timm.checkpoints import export_model
from shike_timm.data import load_training_data
from shike_timm.errors import InputError
from shike_timm.loading import load_teacher
from shike_timm.models import Shike
from shike_timm.models.registry import WEIGHTS
from shike_timm.options import parse_train_args

RESULTS = ROOT / 'results'
# The package's weights by tag, and the run each is from.
RUN_OF = {'cifar100_lt_if100': 'if100_distilled_seed0', 'paper_cifar100_lt_if100': 'if100_seed0'}


def recorded(name):
    with (RESULTS / 'runs.csv').open(newline='') as file:
        row, = (row for row in csv.DictReader(file) if row['name'] == name)
    return row


def start(script, *argv):
    return subprocess.run(
        [sys.executable, RESULTS / script, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)


def test_a_run_is_recorded_with_its_log(tmp_path):
    options = [option for option in TINY if option not in ('--experiment', 'run')]
    (tmp_path / 'runs.yaml').write_text(yaml.safe_dump({'tiny': ' '.join(options), 'broken': '--epochs 0'}))
    command = ['run.py', 'tiny', 'broken', '--output', tmp_path / 'out', '--results', tmp_path]

    def recorded(commit):
        result = start(*command, '--commit', commit, '--options', '--seed', '3')
        assert result.returncode == 1 and 'broken: failed with status 2' in result.stderr
        with (tmp_path / 'runs.csv').open(newline='') as file:
            row, = csv.DictReader(file)
        return row, gzip.decompress((tmp_path / row['log']).read_bytes()).decode()

    row, log = recorded('abc')
    metrics = json.loads((tmp_path / 'out' / 'tiny' / 'metrics.json').read_text())
    one, two = metrics['stage_one'], metrics['stage_two']
    assert (row['name'], row['seed'], row['commit']) == ('tiny', '3', 'abc') and row['options'].endswith('--seed 3')
    assert float(row['top1']) == two['top1'] and float(row['stage_one_few']) == one['few']
    assert [float(value) for value in row['experts'].split(' / ')] == [e['top1'] for e in two['experts']]
    assert log.startswith('$ ') and '--seed 3' in log.splitlines()[0] and 'ensemble' in log and 'OUTPUT/tiny' in log
    assert str(tmp_path) not in log and str(ROOT) not in log

    assert recorded('def') == (row, log)  # a finished run stays what it was
    (tmp_path / 'out' / 'tiny' / 'metrics.json').write_text(json.dumps(dict(stage_one=one)))
    resumed, log = recorded('def')
    assert resumed == dict(row, commit='abc, def') and log.count('$ ') == 2 and '--resume' in log
    result = start('run.py', 'other', '--results', tmp_path)
    assert result.returncode == 2 and "run 'other' is not in runs.yaml" in result.stderr


def test_runs_are_options_of_train_py():
    for options in yaml.safe_load((RESULTS / 'runs.yaml').read_text()).values():
        parse_train_args(options.replace('hparams/', f'{ROOT}/hparams/').split())


def test_every_table_is_in_the_readme_and_every_row_a_run(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    names = yaml.safe_load((RESULTS / 'runs.yaml').read_text())
    tables = importlib.import_module('tables').TABLES
    assert {run for _, rows in tables.values() for _, runs, _ in rows for run in runs} <= set(names)
    assert re.findall(r'<!-- results (\w+) -->', (ROOT / 'README.md').read_text()) == [*tables, 'weights']


def test_the_readme_says_what_was_recorded():
    result = start('tables.py', '--check')
    assert result.returncode == 0, result.stderr


def test_tables_are_made_from_the_rows(tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text(
        '<!-- results ablation_short -->\n<!-- end -->\n<!-- results recipes -->\nold\n<!-- end -->\nafter\n')
    with (tmp_path / 'runs.csv').open('w') as file:
        file.write('name,seed,stage_one_top1,top1,many,medium,few,ece,minutes\n')
        file.write('short_seed0,0,30,40,50,9,20,5,60\nshort_seed1,1,32,44,50,,20,5,70\nunknown,0,1,1,1,1,1,1,1\n')
    options = ['--readme', readme, '--results', tmp_path]
    assert start('tables.py', '--check', *options).returncode == 1 and 'old' in readme.read_text()
    assert start('tables.py', *options).returncode == 0
    lines = readme.read_text().splitlines()
    assert lines[:2] == ['<!-- results ablation_short -->', '']  # with one row there is nothing to compare
    assert lines[-2:] == ['<!-- end -->', 'after'] and len(lines) == 9
    assert lines[6] == (
        '| CIFAR-100-LT (100), 40 + 10 epochs |  | 0, 1 | 31.00 ± 1.41 | 42.00 ± 2.83 | 50.00 ± 0.00 |  | 20.00 ± 0.00 '
        '| 5.00 ± 0.00 | 65.0 |')
    assert start('tables.py', '--check', *options).returncode == 0


def test_the_table_of_the_weights_is_made_from_two_evaluations(tmp_path):
    one = dict(
        top1=50., many=60., medium=40., few=30., ece=7.125, parameters=1.26e6, gmacs=0.12, images_per_second=3.)
    for name, top1 in (('pretrained', 50.), ('pretrained_flip', 51.5)):
        subsets = [dict(one, experts=[0], top1=top1), dict(one, experts=[0, 2], few=None, top1=top1 + 1)]
        (tmp_path / f'{name}.json').write_text(json.dumps(dict(subsets=subsets)))
    readme = tmp_path / 'README.md'
    readme.write_text('<!-- results weights -->\n<!-- end -->\n')
    assert start('tables.py', '--readme', readme, '--results', tmp_path).returncode == 0
    lines = readme.read_text().splitlines()
    assert lines[-3:-1] == [
        '| 0 | 50.00 | 60.00 | 40.00 | 30.00 | 7.12 | 51.50 | 7.12 | 1.26 | 0.120 |',
        '| 0 2 | 51.00 | 60.00 | 40.00 | - | 7.12 | 52.50 | 7.12 | 1.26 | 0.120 |',
    ]


def test_a_model_becomes_the_weights_of_a_name(tmp_path, tiny_run, monkeypatch):
    name, weights = 'resnet32_shike.cifar100_lt_if100', tmp_path / 'weights'
    model = timm.create_model('resnet32_shike')
    config = timm.data.resolve_model_data_config(model)
    labels = [f'class {c}' for c in range(100)]
    export_model(model, tmp_path / 'fits' / 'model', config, labels, [5] * 100)
    export_model(model, tmp_path / 'cropped', dict(config, crop_pct=0.9), labels, [5] * 100)
    export_model(model, tmp_path / 'unlabelled', config, [], [5] * 100)
    export_model(timm.create_model('resnet32_shike', global_pool='max'), tmp_path / 'max', config, labels, [5] * 100)

    monkeypatch.syspath_prepend(RESULTS)
    place = importlib.import_module('weights').place

    def refused(message, *argv):
        with pytest.raises(InputError, match=message) as raised:
            place(*map(str, argv), weights)
        assert '\n' not in str(raised.value) and not weights.exists()

    refused('is of another architecture', tiny_run, name)
    refused('has crop_pct 0.9, but', tmp_path / 'cropped', name)
    refused('does not tell the label_names of its 100 classes', tmp_path / 'unlabelled', name)
    refused('was made with other options', tmp_path / 'max', name)
    refused('is of resnet32_shike, not of resnet50_shike', tmp_path / 'fits', 'resnet50_shike.untrained')
    refused("'resnet32_shike.other' is not a registered name", tmp_path / 'fits', 'resnet32_shike.other')
    refused('is not a folder', tmp_path / 'none', name)
    result = start('weights.py', tmp_path / 'none', name)
    assert result.returncode == 2 and result.stderr.startswith('weights.py: error: ') and result.stderr.count('\n') == 1
    for _ in range(2):  # a second model takes the place of the first
        place(str(tmp_path / 'fits'), name, weights)
    folder = weights / name
    assert [path.name for path in weights.iterdir()] == [name]
    for file in ('config.json', 'model.safetensors'):
        assert (folder / file).read_bytes() == (tmp_path / 'fits' / 'model' / file).read_bytes()
    card = (folder / 'README.md').read_text()
    assert f"timm.create_model('{name}', pretrained=True)" in card and 'license: apache-2.0' in card


def test_the_distilled_recipe_finds_a_teacher_of_its_classes(cifar_root):
    args = parse_train_args(['--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100_distilled.yaml')])
    data = load_training_data(args.dataset, str(cifar_root), imb_factor=args.imb_factor)
    teacher = load_teacher(args.kd_model_name, data, (3, 32, 32), torch.device('cpu'))
    assert isinstance(teacher.model, Shike) and not teacher.model.training


def test_all_files_of_the_weights_come_with_an_installation():
    files = {path for path in WEIGHTS.rglob('*') if path.is_file()}
    assert files == set(WEIGHTS.glob('*/*'))
    assert {path.name for path in WEIGHTS.iterdir()} == {f'resnet32_shike.{tag}' for tag in RUN_OF}
    assert 'shike_timm = ["py.typed", "weights/*/*"]' in (ROOT / 'pyproject.toml').read_text()


@pytest.mark.parametrize('tag', RUN_OF)
def test_the_card_of_the_packages_weights_runs_and_tells_of_the_recorded_run(tmp_path, monkeypatch, tag):
    folder = WEIGHTS / f'resnet32_shike.{tag}'
    card = (folder / 'README.md').read_text()
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32), 128, dtype=np.uint8)).save('image.png')
    names = {}
    exec(card.split('```python\n')[1].split('```')[0], names)
    labels = json.loads((folder / 'config.json').read_text())['label_names']
    assert names['logits'].shape == (1, 100) and names['label'] in labels
    assert f"value: {float(recorded(RUN_OF[tag])['top1'])}\n" in card and f"'resnet32_shike.{tag}'" in card


@pytest.mark.parametrize('tag', RUN_OF)
def test_the_weights_of_the_package_give_the_figures_of_their_run(tmp_path, run_script, cifar_root, monkeypatch, tag):
    monkeypatch.setattr(socket.socket, 'connect', None)  # no network
    status, out, _ = run_script(
        'eval.py', '--model', f'resnet32_shike.{tag}', '--pretrained', '--dataset', 'cifar100_lt', '--data-dir',
        cifar_root, '--workers', '0', '--device', 'cpu', '--results-file', tmp_path / 'results.json')
    assert status == 0 and 'ensemble' in out
    metrics = json.loads((tmp_path / 'results.json').read_text())
    row = recorded(RUN_OF[tag])
    for key in ('top1', 'many', 'medium', 'few'):  # another machine may turn an image or two
        assert metrics[key] == pytest.approx(float(row[key]), abs=0.1)
    for expert, top1 in zip(metrics['experts'], row['experts'].split(' / ')):
        assert expert['top1'] == pytest.approx(float(top1), abs=0.1)


def test_the_default_weights_are_those_of_the_readme():
    tag = timm.get_pretrained_cfg('resnet32_shike').tag
    *_, told = json.loads((RESULTS / 'pretrained.json').read_text())['subsets']  # all experts
    assert told['top1'] == pytest.approx(float(recorded(RUN_OF[tag])['top1']), abs=0.1)
