#!/usr/bin/env python3
"""Run experiments of runs.yaml, or resume them, and record each in runs.csv with its log."""
import argparse
import csv
import gzip
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
import yaml

RESULTS = Path(__file__).resolve().parent
SHARES = ('top1', 'balanced', 'many', 'medium', 'few', 'ece')
COLUMNS = (
    'name', 'options', 'seed', 'commit', 'device', 'minutes', *(f'stage_one_{key}' for key in SHARES), *SHARES,
    'experts', 'log',
)


def device_name() -> str:
    """The name of the GPU, or the CPU's instructions and threads as torch sees them."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def commit() -> str:
    """The commit that is checked out. A + says that the code differs from it."""
    git = ['git', '-C', str(RESULTS.parent)]
    name = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True).stdout
    apart = (':!results', ':!docs', ':!*.md')
    changed = subprocess.run(
        [*git, 'status', '--porcelain', '--', '.', *apart], capture_output=True, check=True).stdout
    return name.strip() + ('+' if changed else '')


def note_start(folder: Path, revision: str) -> Dict[str, Any]:
    """The device of a run, and the commits that started or resumed it. Kept in a file beside the run folder."""
    path = Path(f'{folder}.json')
    started = json.loads(path.read_text()) if path.exists() else dict(device=device_name(), commits=[])
    if revision not in started['commits']:
        started['commits'].append(revision)
        path.write_text(json.dumps(started))
    return started


def is_finished(folder: Path) -> bool:
    """Whether a run has the metrics of its last stage."""
    path = folder / 'metrics.json'
    if not path.exists():
        return False
    retrained = yaml.safe_load((folder / 'args.yaml').read_text())['crt_epochs']
    return ('stage_two' if retrained else 'stage_one') in json.loads(path.read_text())


def to_row(name: str, options: str, folder: Path, started: Dict[str, Any]) -> Dict[str, Any]:
    """A finished run as a row of runs.csv: metrics after the last epoch of each stage, and minutes of training."""
    metrics = json.loads((folder / 'metrics.json').read_text())
    *before, last = metrics.values()
    one = before[0] if before else {}
    return dict(
        name=name,
        options=options,
        seed=yaml.safe_load((folder / 'args.yaml').read_text())['seed'],
        commit=', '.join(started['commits']),
        device=started['device'],
        minutes=round(sum(stage.get('seconds', 0) for stage in metrics.values()) / 60, 1),
        **{f'stage_one_{key}': one.get(key) for key in SHARES},
        **{key: last[key] for key in SHARES},
        experts=' / '.join(f"{expert['top1']:.2f}" for expert in last['experts']),
        log=f'logs/{name}.log.gz',
    )


def record(row: Dict[str, Any], log: str, results: Path) -> None:
    """Write a row into runs.csv and copy its log. An older row of that name is replaced."""
    rows = [old for old in read_rows(results) if old['name'] != row['name']] + [row]
    (results / 'logs').mkdir(exist_ok=True)
    (results / row['log']).write_bytes(gzip.compress(log.encode(), mtime=0))
    with (results / 'runs.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def read_rows(results: Path = RESULTS) -> List[Dict[str, str]]:
    """The rows of runs.csv. None if there is no such file."""
    if not (results / 'runs.csv').exists():
        return []
    with (results / 'runs.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def read_log(path: Path, args: argparse.Namespace) -> str:
    """The log of a run. Short names replace the folders of this machine."""
    log = path.read_text()
    folders = {args.output: 'OUTPUT', args.data_dir: 'DATA', str(RESULTS.parent): '.', sys.prefix: 'PYTHON'}
    for folder, name in folders.items():
        log = log.replace(folder, name) if folder else log
    return log


def run(name: str, options: str, args: argparse.Namespace) -> int:
    """Start or resume a run that is not finished, with its output in NAME.log. Returns the exit status.

    Options with a checkpoint are for retrain_classifier.py, whose runs train.py resumes. All others are for train.py.
    """
    folder = Path(args.output, name)
    if is_finished(folder):
        return 0
    begun = (folder / 'args.yaml').exists()
    given = [*shlex.split(options), *args.options]
    script = 'retrain_classifier.py' if '--checkpoint' in given else 'train.py'
    if begun:
        given = ['--resume'] if script == 'retrain_classifier.py' else [*given, '--resume']
        script = 'train.py'
    command = [sys.executable, script, *given, '--output', args.output, '--experiment', name]
    command += ['--data-dir', args.data_dir] if args.data_dir else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    note_start(folder, args.commit or commit())
    with open(f'{folder}.log', 'a') as file:
        print('$', shlex.join(command), file=file, flush=True)
        status = subprocess.run(command, cwd=RESULTS.parent, stdout=file, stderr=subprocess.STDOUT).returncode
    return status or (0 if is_finished(folder) else 1)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='+', metavar='NAME', help='runs of runs.yaml')
    parser.add_argument('--data-dir', metavar='DIR', help='folder of the data')
    parser.add_argument('--output', default='output/results', metavar='DIR', help='folder of run folders and logs')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time. They share the device')
    parser.add_argument('--commit', help='commit to record instead of the one that is checked out')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='folder of runs.yaml and runs.csv')
    parser.add_argument(
        '--options', nargs=argparse.REMAINDER, default=[], metavar='OPTION',
        help='further options of the script. They are recorded too, and must come last')
    args = parser.parse_args(argv)
    args.output = str(Path(args.output).absolute())
    args.data_dir = args.data_dir and str(Path(args.data_dir).absolute())
    runs = yaml.safe_load((args.results / 'runs.yaml').read_text())
    unknown = [name for name in args.names if name not in runs]
    if unknown:
        parser.error(f"run '{unknown[0]}' is not in runs.yaml: choose among {', '.join(runs)}.")
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        statuses = [pool.submit(run, name, runs[name], args) for name in args.names]
        for name, status in zip(args.names, statuses):
            if status.result():
                failed += 1
                print(f'{name}: failed with status {status.result()}, see {args.output}/{name}.log', file=sys.stderr)
                continue
            folder = Path(args.output, name)
            options = shlex.join([*shlex.split(runs[name]), *args.options])
            started = json.loads(Path(f'{folder}.json').read_text())
            row = to_row(name, options, folder, started)
            record(row, read_log(Path(f'{folder}.log'), args), args.results)
            print(f"{name}: top-1 {row['stage_one_top1']} -> {row['top1']}, {row['minutes']} minutes", flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
