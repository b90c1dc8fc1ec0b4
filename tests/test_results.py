"""Recorded runs: the contents of a row, and the tables in the documents, which must agree with the rows."""
import csv
import gzip
import importlib
import json
import re
import socket
import statistics

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT
from PIL import Image

from shike_timm.cli import retrain_classifier
from shike_timm.cli.train import parse_train_args
from shike_timm.data import SourceConfig, load_training_data
from shike_timm.errors import InputError
from shike_timm.models import Shike
from shike_timm.models.registry import PACKAGED_WEIGHTS
from shike_timm.options import read_command_line
from shike_timm.pretrained.folder import export_model
from shike_timm.pretrained.teacher import load_teacher

RESULTS = ROOT / 'results'
# The package's weights by tag, and the run each is from.
RUN_OF = {'cifar100_lt_if100': 'if100_distilled_seed0', 'paper_cifar100_lt_if100': 'if100_seed0'}


def named(beginning):
    with (RESULTS / 'runs.csv').open(newline='') as file:
        return [row for row in csv.DictReader(file) if row['name'].startswith(beginning)]


def recorded(name):
    row, = (row for row in named(name) if row['name'] == name)
    return row


@pytest.fixture
def script(monkeypatch):
    """A script of results/ as a module, by name."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module


# In place of train.py, which has tests of its own: its output is a copy of the tiny run.
TRAIN = """
import shutil, sys
folder = '/'.join(sys.argv[sys.argv.index(option) + 1] for option in ('--output', '--experiment'))
print('training into', folder)
if '--broken' in sys.argv:
    sys.exit(2)
shutil.copytree({tiny_run!r}, folder, dirs_exist_ok=True)
"""


def test_a_run_is_recorded_with_its_log(tmp_path, tiny_run, script, monkeypatch, capsys):
    run, output = script('run'), tmp_path / 'out'
    monkeypatch.setattr(run, 'RESULTS', tmp_path / 'clone' / 'results')
    (tmp_path / 'clone').mkdir()
    (tmp_path / 'clone' / 'train.py').write_text(TRAIN.format(tiny_run=str(tiny_run)))
    (tmp_path / 'runs.yaml').write_text('lr_0.1: --epochs 2\nlr_0.2: --broken\n')

    def recorded(commit, *names):
        places = ['--output', str(output), '--results', str(tmp_path)]
        status = run.main([*names, *places, '--commit', commit, '--options', '--lr', '0.1'])
        with (tmp_path / 'runs.csv').open(newline='') as file:
            row, = csv.DictReader(file)
        return status, row, gzip.decompress((tmp_path / row['log']).read_bytes()).decode()

    status, row, log = recorded('abc', 'lr_0.1', 'lr_0.2')
    assert status == 1 and 'lr_0.2: failed with status 2' in capsys.readouterr().err
    metrics = json.loads((tiny_run / 'metrics.json').read_text())
    one, two = metrics['stage_one'], metrics['stage_two']
    assert (row['name'], row['seed'], row['commit']) == ('lr_0.1', '42', 'abc')
    assert row['options'] == '--epochs 2 --lr 0.1'
    assert float(row['top1']) == two['top1'] and float(row['stage_one_few']) == one['few']
    assert [float(value) for value in row['experts'].split(' / ')] == [e['top1'] for e in two['experts']]
    first, *rest = log.splitlines()
    assert first.startswith('$ ') and '--lr 0.1' in first and rest == ['training into OUTPUT/lr_0.1']
    assert str(tmp_path) not in log

    assert recorded('def', 'lr_0.1') == (0, row, log)  # a finished run does not change
    (output / 'lr_0.1' / 'metrics.json').write_text(json.dumps(dict(stage_one=one)))
    status, resumed, log = recorded('def', 'lr_0.1')
    assert status == 0 and resumed == dict(row, commit='abc, def')
    assert log.count('$ ') == 2 and '--resume' in log
    with pytest.raises(SystemExit):
        run.main(['other', '--results', str(tmp_path)])
    assert "'other'" in capsys.readouterr().err


def test_a_retraining_of_another_run_is_resumed_by_train_py(tmp_path, tiny_run, script, monkeypatch):
    run = script('run')
    monkeypatch.setattr(run, 'RESULTS', tmp_path / 'results')
    (tmp_path / 'runs.yaml').write_text('again: --checkpoint RUN --crt-cosine-scale 20\n')
    for name in ('train', 'retrain_classifier'):
        (tmp_path / f'{name}.py').write_text(TRAIN.format(tiny_run=str(tiny_run)))
    output = tmp_path / 'out'
    for _ in range(2):
        run.main(['again', '--output', str(output), '--results', str(tmp_path), '--commit', 'abc'])
        (output / 'again' / 'metrics.json').write_text('{}')  # not finished
    commands = [line for line in (output / 'again.log').read_text().splitlines() if line.startswith('$ ')]
    assert 'retrain_classifier.py --checkpoint RUN --crt-cosine-scale 20' in commands[0]
    assert 'train.py --resume --output' in commands[1] and 'RUN' not in commands[1]


def test_runs_are_options_of_the_scripts():
    runs = yaml.safe_load((RESULTS / 'runs.yaml').read_text())
    for options in runs.values():
        argv = options.replace('hparams/', f'{ROOT}/hparams/').split()
        if '--checkpoint' not in argv:
            parse_train_args(argv)
            continue
        folders = read_command_line(retrain_classifier.CONFIG, '', argv)['checkpoint'].split('/')
        assert folders[2] in runs if folders[1] == 'results' else folders[1] == 'timm'


def test_every_table_is_in_a_document_and_every_row_a_run(script):
    tables = script('tables')
    names = yaml.safe_load((RESULTS / 'runs.yaml').read_text())
    assert {run for _, rows in tables.TABLES.values() for _, runs, _ in rows for run in runs} <= set(names)
    written = [name for path in tables.FILES for name in re.findall(r'<!-- results (\w+) -->', path.read_text())]
    assert set(written) == {*tables.TABLES, 'weights'}


def test_the_documents_say_what_was_recorded(script, capsys):
    assert script('tables').main(['--check']) == 0, capsys.readouterr().err


def test_the_advice_of_the_readme_has_the_figures_of_its_rows():
    advice = (ROOT / 'README.md').read_text().split('## SHIKE or one network?')[1].split('\n## ')[0]
    runs = (
        ('lite0_tuned_long', 'plankton_part_lite0_tuned_lr05'),
        ('lite0_balanced_long', 'plankton_part_lite0_balanced_lr05'),
        ('lite0_plain_long', 'plankton_part_lite0_plain'))
    leads = [
        float(recorded(frozen)[share]) - max(float(row[share]) for row in named(f'{one}_lr'))
        for frozen, one, share in (
            ('ops_frozen_heads', 'ops_plain_balanced_01', 'top1'),
            ('plankton_part_lite0_heads', 'plankton_part_lite0_balanced_one', 'balanced'))]
    told = re.findall(r'lead by (\S+) points on CIFAR-100-LT \(images set aside\)\s+and (\S+) on', advice)[0]
    assert [float(one) for one in told] == pytest.approx(leads, abs=0.051)
    timm = recorded('plankton_timm_rebalanced')
    assert [float(figure) for figure in re.findall(r'\d\d\.\d\d', advice)] == [float(figure) for figure in (
        *(figure for cifar, plankton in runs for figure in (recorded(cifar)['top1'], recorded(plankton)['balanced'])),
        timm['stage_one_balanced'], timm['balanced'], timm['stage_one_top1'], timm['top1'])]
    assert f"{float(timm['minutes']):.0f} minutes" in advice
    three, one = (float(recorded(name)['top1']) for name in ('three_experts', 'one_network'))
    assert float(re.findall(r'three experts (\d\.\d) points', advice)[0]) == pytest.approx(three - one, abs=0.051)
    gains = [
        statistics.mean(float(row['top1']) for row in named(f'frozen_{net}_joined_seed'))
        - statistics.mean(float(row['top1']) for row in named(f'frozen_{net}_last_seed'))
        for net in ('lite0', 'mobilenetv2', 'vit')]
    told = re.findall(r'several depths: (\S+) to (\S+) points', advice)[0]
    assert [float(one) for one in told] == pytest.approx([min(gains), max(gains)], abs=0.051)


def test_tables_are_made_from_the_rows(tmp_path, script, capsys):
    one, other = files = tmp_path / 'one.md', tmp_path / 'other.md'
    one.write_text('<!-- results ablation_short -->\n<!-- end -->\n')
    other.write_text('<!-- results recipes -->\nold\n<!-- end -->\nafter\n')
    with (tmp_path / 'runs.csv').open('w') as file:
        file.write('name,seed,stage_one_top1,top1,many,medium,few,ece,minutes\n')
        file.write('if100_seed0,0,30,40,50,9,20,5,60\nif100_seed1,1,32,44,50,,20,5,70\nunknown,0,1,1,1,1,1,1,1\n')
    fill, options = script('tables').main, ['--files', *map(str, files), '--results', str(tmp_path)]
    assert fill(['--check', *options]) == 1 and 'old' in other.read_text() and 'other.md' in capsys.readouterr().err
    assert fill(options) == 0
    assert one.read_text().splitlines()[1] == ''  # with one row there is nothing to compare
    lines = other.read_text().splitlines()
    assert lines[-2:] == ['<!-- end -->', 'after'] and len(lines) == 6
    assert lines[3] == (
        '| CIFAR-100-LT (100), 180 + 20 epochs | 56.3 | 0, 1 | 31.00 ± 1.41 | 42.00 ± 2.83 | 50.00 ± 0.00 |  '
        '| 20.00 ± 0.00 | 5.00 ± 0.00 |')
    assert fill(['--check', *options]) == 0


def test_the_table_of_the_weights_is_made_from_two_evaluations(tmp_path, script):
    one = dict(
        top1=50., many=60., medium=40., few=30., ece=7.125, parameters=1.26e6, gmacs=0.12, images_per_second=3.)
    for name, top1 in (('pretrained', 50.), ('pretrained_flip', 51.5)):
        subsets = [dict(one, experts=[0], top1=top1), dict(one, experts=[0, 2], few=None, top1=top1 + 1)]
        (tmp_path / f'{name}.json').write_text(json.dumps(dict(subsets=subsets)))
    readme = tmp_path / 'README.md'
    readme.write_text('<!-- results weights -->\n<!-- end -->\n')
    assert script('tables').main(['--files', str(readme), '--results', str(tmp_path)]) == 0
    lines = readme.read_text().splitlines()
    assert lines[-3:-1] == [
        '| 0 | 50.00 | 60.00 | 40.00 | 30.00 | 7.12 | 51.50 | 7.12 | 1.26 | 0.120 |',
        '| 0 2 | 51.00 | 60.00 | 40.00 | - | 7.12 | 52.50 | 7.12 | 1.26 | 0.120 |',
    ]


def test_a_model_becomes_the_weights_of_a_name(tmp_path, tiny_run, script, run_script):
    name, weights = 'resnet32_shike.cifar100_lt_if100', tmp_path / 'weights'
    model = timm.create_model('resnet32_shike')
    config = timm.data.resolve_model_data_config(model)
    labels = [f'class {c}' for c in range(100)]
    export_model(model, tmp_path / 'fits' / 'model', config, labels, [5] * 100)
    export_model(model, tmp_path / 'cropped', dict(config, crop_pct=0.9), labels, [5] * 100)
    export_model(model, tmp_path / 'unlabelled', config, [], [5] * 100)
    export_model(timm.create_model('resnet32_shike', global_pool='max'), tmp_path / 'max', config, labels, [5] * 100)

    place = script('weights').place

    def refused(value, *argv):
        with pytest.raises(InputError, match=value) as raised:
            place(*map(str, argv), weights)
        assert '\n' not in str(raised.value) and not weights.exists()

    refused('architecture', tiny_run, name)
    refused('crop_pct 0.9', tmp_path / 'cropped', name)
    refused('label_names', tmp_path / 'unlabelled', name)
    refused('options', tmp_path / 'max', name)
    refused('resnet50_shike', tmp_path / 'fits', 'resnet50_shike.untrained')
    refused("'resnet32_shike.other'", tmp_path / 'fits', 'resnet32_shike.other')
    refused('holds no model', tmp_path / 'none', name)
    status, _, error = run_script('results/weights.py', tmp_path / 'none', name)
    assert status == 2 and error.startswith('weights.py: error: ') and error.count('\n') == 1
    for _ in range(2):  # a second model replaces the first
        place(str(tmp_path / 'fits'), name, weights)
    folder = weights / name
    assert [path.name for path in weights.iterdir()] == [name]
    for file in ('config.json', 'model.safetensors'):
        assert (folder / file).read_bytes() == (tmp_path / 'fits' / 'model' / file).read_bytes()
    card = (folder / 'README.md').read_text()
    assert f"timm.create_model('{name}', pretrained=True)" in card and 'license: apache-2.0' in card


def test_the_distilled_recipe_finds_a_teacher_of_its_classes(cifar_root):
    args = parse_train_args(['--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100_distilled.yaml')])
    data = load_training_data(
        SourceConfig(dataset=args.dataset, data_dir=str(cifar_root), imb_factor=args.imb_factor))
    teacher = load_teacher(args.kd_model_name, data, (3, 32, 32), torch.device('cpu'))
    assert isinstance(teacher.model, Shike) and not teacher.model.training


def test_all_files_of_the_weights_come_with_an_installation():
    files = {path for path in PACKAGED_WEIGHTS.rglob('*') if path.is_file()}
    assert files == set(PACKAGED_WEIGHTS.glob('*/*'))
    assert {path.name for path in PACKAGED_WEIGHTS.iterdir()} == {f'resnet32_shike.{tag}' for tag in RUN_OF}
    packaged = 'shike_timm = ["py.typed", "weights/*/*", "report/*.html", "publishing/*.jinja", "cli/*.jinja"]'
    assert packaged in (ROOT / 'pyproject.toml').read_text()


@pytest.mark.parametrize('tag', RUN_OF)
def test_the_card_of_the_packages_weights_runs_and_tells_of_the_recorded_run(tmp_path, monkeypatch, tag):
    folder = PACKAGED_WEIGHTS / f'resnet32_shike.{tag}'
    card = (folder / 'README.md').read_text()
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32), 128, dtype=np.uint8)).save('image.png')
    names = {}
    exec(card.split('```python\n')[1].split('```')[0], names)
    labels = json.loads((folder / 'config.json').read_text())['label_names']
    assert names['logits'].shape == (1, 100) and names['label'] in labels
    assert f"value: {float(recorded(RUN_OF[tag])['top1'])}\n" in card and f"'resnet32_shike.{tag}'" in card


@pytest.mark.parametrize('tag', [
    tag if not number else pytest.param(tag, marks=pytest.mark.slow) for number, tag in enumerate(RUN_OF)])
def test_the_weights_of_the_package_give_the_figures_of_their_run(
        tmp_path, run_script, real_cifar_root, monkeypatch, tag):
    monkeypatch.setattr(socket.socket, 'connect', None)  # no network
    status, out, _ = run_script(
        'eval', '--model', f'resnet32_shike.{tag}', '--pretrained', '--dataset', 'cifar100_lt', '--data-dir',
        real_cifar_root, '--workers', '0', '--device', 'cpu', '--results-file', tmp_path / 'results.json')
    assert status == 0 and 'ensemble' in out
    metrics = json.loads((tmp_path / 'results.json').read_text())
    row = recorded(RUN_OF[tag])
    for key in ('top1', 'many', 'medium', 'few'):  # another machine may turn an image or two
        assert metrics[key] == pytest.approx(float(row[key]), abs=0.1)
    for expert, top1 in zip(metrics['experts'], row['experts'].split(' / ')):
        assert expert['top1'] == pytest.approx(float(top1), abs=0.1)


def test_the_default_weights_are_those_of_the_tables():
    tag = timm.get_pretrained_cfg('resnet32_shike').tag
    *_, told = json.loads((RESULTS / 'pretrained.json').read_text())['subsets']  # all experts
    assert told['top1'] == pytest.approx(float(recorded(RUN_OF[tag])['top1']), abs=0.1)
