#!/usr/bin/env python3
"""Make the README's tables of results from runs.csv."""
import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from run import RESULTS, read_rows

README = RESULTS.parent / 'README.md'

# What each table is and, for its rows, what they are, their runs in runs.csv, and the paper's top-1.
TABLES = {
    'recipes': ('', [
        ('CIFAR-100-LT (100), 180 + 20 epochs', ['if100_seed0', 'if100_seed1', 'if100_seed2'], '56.3'),
        ('CIFAR-100-LT (50), 180 + 20 epochs', ['if50_seed0'], '59.8'),
        ('CIFAR-10-LT (100), 180 + 20 epochs', ['cifar10_if100_seed0'], None),
        ('CIFAR-100-LT (100), 40 + 10 epochs', ['short_seed0', 'short_seed1', 'short_seed2'], None),
        ('digits (60), `quickstart.yaml`', ['quickstart_seed0', 'quickstart_seed1', 'quickstart_seed2'], None),
    ]),
    'ablation': ('The ablation, CIFAR-100-LT (100), 180 + 20 epochs:', [
        ('one plain network', ['one_network'], '50.04'),
        ('three experts', ['three_experts'], '54.23'),
        ('+ DKF', ['dkf'], '55.26'),
        ('+ DKF + L_mu', ['dkf_mu'], '55.59'),
        ('+ DKF + L_nt', ['dkf_nt'], '55.79'),
        ('+ L_mu + L_nt', ['mu_nt'], '54.82'),
        ('all of SHIKE', ['if100_seed0'], '56.34'),
    ]),
    'experts': ('Experts by the shared stages they fuse, CIFAR-100-LT (100), 180 + 20 epochs:', [
        ('1', ['experts_1'], None),
        ('2', ['experts_2'], None),
        ('1 2', ['experts_12'], None),
        ('1 2 1', ['if100_seed0'], None),
        ('1 2 2', ['experts_122'], None),
        ('1 2 1 2', ['experts_1212'], None),
    ]),
}
COLUMNS = {
    'stage_one_top1': 'stage one', 'top1': 'stage two', 'many': 'many', 'medium': 'medium', 'few': 'few', 'ece': 'ECE',
    'minutes': 'minutes',
}


def _cell(rows: Sequence[Dict[str, str]], key: str) -> str:
    """Mean and standard deviation over seeds; nothing where a figure of one is missing."""
    values = [float(row[key]) for row in rows if row[key]]
    if len(values) < len(rows):
        return ''
    digits = 1 if key == 'minutes' else 2
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) < 2 or key == 'minutes' else f'{mean} ± {statistics.stdev(values):.2f}'


def make_table(name: str, rows: Dict[str, Dict[str, str]]) -> str:
    """A Markdown table of those runs that are recorded, '' where none is."""
    lines: List[str] = []
    caption, table_rows = TABLES[name]
    for what, names, paper in table_rows:
        known = [rows[run] for run in names if run in rows]
        if known:
            seeds = ', '.join(row['seed'] for row in known)
            cells = [what, paper or '', seeds, *(_cell(known, key) for key in COLUMNS)]
            lines.append('| ' + ' | '.join(cells) + ' |')
    if not lines:
        return ''
    first = 'fused stages' if name == 'experts' else ''
    header = [first, 'paper', 'seeds', *COLUMNS.values()]
    caption = [caption, ''] if caption else []
    return '\n'.join([*caption, '| ' + ' | '.join(header) + ' |', '|' + '---|' * len(header), *lines])


def fill(text: str, rows: Dict[str, Dict[str, str]]) -> str:
    """Text with the tables between `<!-- results NAME -->` and `<!-- end -->` made anew."""
    def table(match: re.Match) -> str:
        return f'{match[1]}\n{make_table(match[2], rows)}\n{match[3]}'

    return re.sub(r'(<!-- results (\w+) -->)\n.*?(<!-- end -->)', table, text, flags=re.DOTALL)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='change nothing, and fail where the README differs')
    parser.add_argument('--readme', type=Path, default=README, metavar='FILE', help='file to fill')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='folder of runs.csv')
    args = parser.parse_args(argv)
    old = args.readme.read_text()
    new = fill(old, {row['name']: row for row in read_rows(args.results)})
    if args.check and new != old:
        print(f'{args.readme.name} differs from runs.csv: run python results/tables.py', file=sys.stderr)
        return 1
    if not args.check:
        args.readme.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main())
