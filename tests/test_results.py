"""Recorded runs: what a row holds, and README tables that cannot drift from it."""
import csv
import gzip
import importlib
import json
import re
import subprocess
import sys

import yaml
from conftest import ROOT, TINY

from shike_timm.hparams import parse_train_args

RESULTS = ROOT / 'results'


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
    assert re.findall(r'<!-- results (\w+) -->', (ROOT / 'README.md').read_text()) == list(tables)


def test_the_readme_says_what_was_recorded():
    result = start('tables.py', '--check')
    assert result.returncode == 0, result.stderr


def test_tables_are_made_from_the_rows(tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text('before\n<!-- results recipes -->\nold\n<!-- end -->\nafter\n')
    with (tmp_path / 'runs.csv').open('w') as file:
        file.write('name,seed,stage_one_top1,top1,many,medium,few,ece,minutes\n')
        file.write('short_seed0,0,30,40,50,9,20,5,60\nshort_seed1,1,32,44,50,,20,5,70\nunknown,0,1,1,1,1,1,1,1\n')
    options = ['--readme', readme, '--results', tmp_path]
    assert start('tables.py', '--check', *options).returncode == 1 and 'old' in readme.read_text()
    assert start('tables.py', *options).returncode == 0
    lines = readme.read_text().splitlines()
    assert lines[0] == 'before' and lines[-2:] == ['<!-- end -->', 'after'] and len(lines) == 7
    assert lines[4] == (
        '| CIFAR-100-LT (100), 40 + 10 epochs |  | 0, 1 | 31.00 ± 1.41 | 42.00 ± 2.83 | 50.00 ± 0.00 |  | 20.00 ± 0.00 '
        '| 5.00 ± 0.00 | 65.0 |')
    assert start('tables.py', '--check', *options).returncode == 0

