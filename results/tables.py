#!/usr/bin/env python3
"""Make the tables of README.md and docs/tables.md from runs.csv and shike eval's results on the package's weights."""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from run import RESULTS, read_rows

FILES = [RESULTS.parent / 'README.md', RESULTS.parent / 'docs' / 'tables.md']

Rows = List[Tuple[str, List[str], Optional[str]]]

ABLATION: Rows = [
    ('one plain network', ['one_network'], '50.04'),
    ('three experts', ['three_experts'], '54.23'),
    ('+ DKF', ['dkf'], '55.26'),
    ('+ DKF + L_mu', ['dkf_mu'], '55.59'),
    ('+ DKF + L_nt', ['dkf_nt'], '55.79'),
    ('+ L_mu + L_nt', ['mu_nt'], '54.82'),
]
EXPERTS: Rows = [
    ('1', ['experts_1'], None),
    ('2', ['experts_2'], None),
    ('1 2', ['experts_12'], None),
    ('1 2 2', ['experts_122'], None),
    ('1 2 1 2', ['experts_1212'], None),
]


FROZEN = (('lite0', 'EfficientNet-Lite0'), ('mobilenetv2', 'MobileNetV2'), ('vit', 'ViT-S/14'))
READS = (
    ('last', 'the last level'),
    ('single', 'the best single level'),
    ('joined', 'four late levels, one classifier'),
    ('experts', 'the same, three experts'),
    ('search', 'what `--search` chose'),
)


def _short(rows: Rows) -> Rows:
    """The same rows with the runs of the short recipe."""
    return [(what, [f'{name}_short' for name in names], paper) for what, names, paper in rows]


def _rates(what: str, run: str, rates: Sequence[str]) -> Rows:
    """A run at several learning rates. A rate is given by its decimals, with which the run's name ends."""
    return [(f'{what} at {float(f"0.{rate}"):g}', [f'{run}_lr{rate}'], None) for rate in rates]


# The title and rows of each table: name of a row, its runs in runs.csv, and the paper's top-1.
TABLES: Dict[str, Tuple[str, Rows]] = {
    'recipes': ('', [
        ('CIFAR-100-LT (100), 180 + 20 epochs', ['if100_seed0', 'if100_seed1', 'if100_seed2'], '56.3'),
        ('the same, taught by that network', ['if100_distilled_seed0'], None),
        ('CIFAR-100-LT (50), 180 + 20 epochs', ['if50_seed0'], '59.8'),
        ('the same, taught by that network', ['if50_distilled_seed0'], None),
        ('CIFAR-10-LT (100), 180 + 20 epochs', ['cifar10_if100_seed0'], None),
    ]),
    'short_recipes': ('Short recipes, 40 + 10 epochs of CIFAR-100-LT and the quickstart:', [
        ('CIFAR-100-LT (100), 40 + 10 epochs', ['short_seed0', 'short_seed1', 'short_seed2'], None),
        ('digits (60), `quickstart.yaml`', ['quickstart_seed0', 'quickstart_seed1', 'quickstart_seed2'], None),
    ]),
    'ablation': ('The ablation, CIFAR-100-LT (100), 180 + 20 epochs:', [
        *ABLATION,
        ('all of SHIKE', ['if100_seed0'], '56.34'),
    ]),
    'fusion': ('Fusion, trunk gradient and weight decay, on 50 training images a class set aside, 180 + 20 epochs:', [
        ('product, sum', ['val_product'], None),
        ('residual, sum', ['val_residual'], None),
        ('residual, mean', ['val_residual_mean'], None),
        ('product, sum, weight decay of 1e-3', ['val_decay_1e-3'], None),
    ]),
    'beyond': ("Beyond the paper's recipe, on the test split, 180 + 20 epochs:", [
        ("the paper's", ['if100_seed0'], '56.34'),
        ("the paper's, classifiers at a scale of 20", ['if100_scale_seed0'], None),
        ('taught by its network', ['if100_distilled_seed0'], None),
        ('taught, classifiers at a scale of 20', ['if100_distilled_scale_seed0'], None),
        ('taught, residual fusion', ['if100_residual_distilled_seed0'], None),
        ('taught, residual fusion, classifiers at a scale of 20', ['if100_residual_distilled_scale_seed0'], None),
        ('imbalance 50', ['if50_seed0'], '59.80'),
        ('imbalance 50, classifiers at a scale of 20', ['if50_scale_seed0'], None),
        ('imbalance 50, taught by its network', ['if50_distilled_seed0'], None),
        ('imbalance 50, taught, classifiers at a scale of 20', ['if50_distilled_scale_seed0'], None),
    ]),
    'distillation': ('By the weights of L_nt and L_mu, on 50 training images a class set aside, 20 + 5 epochs:', [
        (f'alpha {alpha}, beta {beta}', [f'val_alpha_{alpha}_beta_{beta}'], None)
        for alpha in ('0', '0.1', '1') for beta in ('0', '0.01', '0.1', '0.6')
    ]),
    'scale': ('The scale of the cosines in stage two, on 50 training images a class set aside:', [
        ('residual, sum: 30', ['val_residual'], None),
        ('residual, sum: 20', ['val_residual_scale'], None),
        ('residual, mean: 30', ['val_residual_mean'], None),
        ('residual, mean: 20', ['val_residual_mean_scale'], None),
        ('EfficientNet-Lite0, one plain network, 10 + 3: 30', ['lite0_val_plain_02_long'], None),
        ('EfficientNet-Lite0, one plain network, 10 + 3: 20', ['lite0_val_plain_02_long_scale'], None),
        ('EfficientNet-Lite0, SHIKE, 10 + 3: 30', ['lite0_val_shike_05_long'], None),
        ('EfficientNet-Lite0, SHIKE, 10 + 3: 20', ['lite0_val_shike_05_long_scale'], None),
    ]),
    'crt_init': ('Stage two of one network of stage one again, on the test split:', [
        ('random, 20 epochs', ['if100_seed1'], None),
        ('class means, 20 epochs', ['if100_crt20_means_seed1'], None),
        ('random, 3 epochs', ['if100_crt3_random_seed1'], None),
        ('class means, 3 epochs', ['if100_crt3_means_seed1'], None),
    ]),
    'crt': ('Stage two by its beginning, scale and epochs, on 50 training images a class set aside:', [
        (f'{what}: {init}, scale {scale}, {epochs} epoch{"s" * (epochs > 1)}',
         [f'crt_{net}_{init}_{scale}_{epochs:02}'], None)
        for net, what in (('cifar', 'ResNet-32'), ('lite0', 'EfficientNet-Lite0'), ('vit', 'ViT-S/14'))
        for init in ('random', 'means') for scale in (20, 30) for epochs in ((1, 3) if net == 'vit' else (1, 3, 20))
    ]),
    'frozen': ('Frozen backbones, CIFAR-100-LT (100), on 50 training images a class set aside, three draws:', [
        (f'{what}: {reads}', [f'frozen_{net}_{run}_seed{seed}' for seed in range(3)], None)
        for net, what in FROZEN for run, reads in READS
    ]),
    'plankton_frozen': ('Frozen backbones, a fifth of plankton held out:', [
        (f'{what}: {reads}', [f'plankton_frozen_{net}_{run}'], None) for net, what in FROZEN for run, reads in READS
    ]),
    'finetune_more': ('Two other backbones, on 50 training images a class set aside, about the same operations:', [
        ('MobileNetV2: one network, 4 + 1', ['mobilenetv2_val_plain'], None),
        ('MobileNetV2: three experts, frozen trunk, 5 + 1', ['mobilenetv2_val_three'], None),
        ('MobileNetV2: SHIKE, frozen trunk, 5 + 1', ['mobilenetv2_val_shike'], None),
        ('ViT-S/14: one network, AdamW, 3 + 1', ['vit_val_plain'], None),
        ('ViT-S/14: SHIKE, AdamW, 3 + 1', ['vit_val_shike_full_3'], None),
        ('ViT-S/14: SHIKE, AdamW, 2 + 1', ['vit_val_shike_full'], None),
        ('ViT-S/14: three experts, frozen trunk, AdamW, 4 + 1', ['vit_val_three'], None),
        ('ViT-S/14: SHIKE, frozen trunk, AdamW, 4 + 1', ['vit_val_shike'], None),
        ('ViT-S/14: SHIKE, frozen trunk, SGD, 4 + 1', ['vit_val_shike_sgd'], None),
    ]),
    'methods_short': ('Methods on one network with a cosine classifier, CIFAR-100-LT (100), 40 epochs:', [
        ('`ce`', ['ce_short'], None),
        ('`focal`', ['focal_short'], None),
        ('`ldam_drw`', ['ldam_drw_short'], None),
        ('`balanced_softmax`', ['balanced_softmax_short'], None),
        ('`logit_adjusted`', ['logit_adjusted_short'], None),
        ('`ce`, classifier retrained in 10 more', ['ce_retrained_short'], None),
    ]),
    'ablation_short': ("The ablation in 40 + 10 epochs, beside the paper's figures after 180 + 20:", [
        *_short(ABLATION),
        ('all of SHIKE', ['short_seed0'], '56.34'),
    ]),
    'experts': ('Experts by the shared stages they fuse, CIFAR-100-LT (100), 180 + 20 epochs:', [
        *EXPERTS[:3],
        ('1 2 1', ['if100_seed0'], None),
        *EXPERTS[3:],
    ]),
    'experts_short': ('Experts by the shared stages they fuse, CIFAR-100-LT (100), 40 + 10 epochs:', [
        *_short(EXPERTS[:3]),
        ('1 2 1', ['short_seed0'], None),
        *_short(EXPERTS[3:]),
    ]),
    'finetune_lr': ('By learning rate and epochs, on 50 training images a class set aside:', [
        ('one plain network, 0.05, 5 + 2', ['lite0_val_plain_05'], None),
        ('one plain network, 0.02, 5 + 2', ['lite0_val_plain_02'], None),
        ('one plain network, 0.01, 5 + 2', ['lite0_val_plain_01'], None),
        ('three experts, 0.05, 5 + 2', ['lite0_val_three_05'], None),
        ('SHIKE, 0.05, 5 + 2', ['lite0_val_separable_05'], None),
        ('SHIKE, 0.02, 5 + 2', ['lite0_val_separable_02'], None),
        ('one plain network, 0.02, 10 + 3', ['lite0_val_plain_02_long'], None),
        ('SHIKE, 0.05, 10 + 3', ['lite0_val_shike_05_long'], None),
    ]),
    'finetune': ('On the test split, and on a fifth of plankton held out:', [
        ('CIFAR-100-LT (100): one plain network, 5 + 2', ['lite0_plain'], None),
        ('CIFAR-100-LT (100): three experts, 5 + 2', ['lite0_three'], None),
        ('CIFAR-100-LT (100): SHIKE, 5 + 2', ['lite0_shike'], None),
        ('CIFAR-100-LT (100): one plain network, 10 + 3', ['lite0_plain_long'], None),
        ('CIFAR-100-LT (100): SHIKE, 10 + 3', ['lite0_shike_long'], None),
        ('plankton: one plain network, 3 + 1', ['plankton_plain'], None),
        ('plankton: three experts, 3 + 1', ['plankton_three'], None),
        ('plankton: SHIKE, 3 + 1', ['plankton_shike'], None),
        ('plankton: one plain network, 7 + 2', ['plankton_plain_long'], None),
        ('plankton: SHIKE, 7 + 2', ['plankton_shike_long'], None),
    ]),
    'plankton_part': ('A third of plankton, ViT-S/14 at 70 px and MobileNetV2 at 64 px:', [
        ('ViT-S/14, its last level, frozen', ['plankton_part_vit_last'], None),
        ('ViT-S/14, one network, 3 epochs', ['plankton_part_vit_plain'], None),
        ('ViT-S/14, one network, one phase, 3 epochs', ['plankton_part_vit_balanced'], None),
        ('ViT-S/14, SHIKE, 2 epochs', ['plankton_part_vit_shike_full'], None),
        ('ViT-S/14, SHIKE, frozen trunk, 4 epochs', ['plankton_part_vit_shike'], None),
        ('ViT-S/14, three experts, frozen trunk, 4 epochs', ['plankton_part_vit_three'], None),
        ('MobileNetV2, its last level, frozen', ['plankton_part_mobilenetv2_last'], None),
        ('MobileNetV2, one network, 4 epochs', ['plankton_part_mobilenetv2_plain'], None),
        ('MobileNetV2, one network, one phase, 4 epochs', ['plankton_part_mobilenetv2_plain_balanced'], None),
        ('MobileNetV2, SHIKE, frozen trunk, one phase, 5 epochs', ['plankton_part_mobilenetv2_shike_balanced'], None),
        ('MobileNetV2, SHIKE, frozen trunk, 5 epochs', ['plankton_part_mobilenetv2_shike'], None),
        ('MobileNetV2, three experts, frozen trunk, 5 epochs', ['plankton_part_mobilenetv2_three'], None),
        ('MobileNetV2, three experts on the frozen network', ['plankton_part_mobilenetv2_heads'], None),
        ('MobileNetV2, fine-tuned from them, 4 epochs', ['plankton_part_mobilenetv2_tuned'], None),
        ('the same at a learning rate of 0.01', ['plankton_part_mobilenetv2_tuned_lr01'], None),
    ]),
    'from_heads': ('EfficientNet-Lite0 at 64 px, CIFAR-100-LT (100), on 50 training images a class set aside:', [
        ('one network, two phases, 10 + 3 epochs', ['ops_plain_10'], None),
        ('SHIKE, two phases, 5 + 3 epochs', ['ops_shike_05'], None),
        ('SHIKE, one phase, 5 epochs at 0.05', ['ops_shike_balanced_05'], None),
        *_rates('one network, one phase, 1 epoch', 'ops_plain_balanced_01', ('01', '02', '05', '10')),
        ('one network, one phase, 5 epochs at 0.02', ['ops_plain_balanced_05'], None),
        ('one network, one phase, 10 epochs at 0.02', ['ops_plain_balanced_10', 'ops_plain_balanced_10_seed1'], None),
        ('one network, one phase, 10 epochs at 0.05', ['ops_plain_balanced_10_lr05'], None),
        ('the last level of the frozen network', ['ops_frozen_last'], None),
        ('three experts on the frozen network', ['ops_frozen_heads', 'ops_frozen_heads_seed1'], None),
        ('fine-tuned from them, 4 epochs at 0.02', ['ops_frozen_tuned_04'], None),
        ('fine-tuned from them, 10 epochs at 0.02', ['ops_frozen_tuned_10', 'ops_frozen_tuned_10_seed1'], None),
        ('fine-tuned from them, 10 epochs at 0.05', ['ops_frozen_tuned_10_lr05'], None),
    ]),
    'from_heads_test': ('The same on the test split:', [
        ('one network, two phases, 10 + 3 epochs', ['lite0_plain_long'], None),
        ('SHIKE, two phases, 10 + 3 epochs: twice the operations', ['lite0_shike_long'], None),
        ('one network, one phase, 10 epochs', ['lite0_balanced_long'], None),
        ('three experts on the frozen network', ['lite0_heads'], None),
        ('fine-tuned from them, 10 epochs', ['lite0_tuned_long'], None),
    ]),
    'plankton_from_heads': ('EfficientNet-Lite0 at 64 px, a third of plankton:', [
        ('one network, two phases, 5 + 1 epochs', ['plankton_part_lite0_plain'], None),
        ('SHIKE, two phases, 3 + 1 epochs', ['plankton_part_lite0_shike'], None),
        ('SHIKE, one phase, 3 epochs at 0.05', ['plankton_part_lite0_shike_balanced'], None),
        *_rates('one network, one phase, 1 epoch', 'plankton_part_lite0_balanced_one', ('01', '02', '05', '10')),
        *_rates('one network, one phase, 3 epochs', 'plankton_part_lite0_balanced_short', ('02', '05')),
        ('one network, one phase, 5 epochs at 0.01', ['plankton_part_lite0_balanced_lr01'], None),
        ('one network, one phase, 5 epochs at 0.02', ['plankton_part_lite0_balanced'], None),
        ('one network, one phase, 5 epochs at 0.05', ['plankton_part_lite0_balanced_lr05'], None),
        ('the last level of the frozen network', ['plankton_part_lite0_last'], None),
        ('fine-tuned from it, 5 epochs at 0.02', ['plankton_part_lite0_last_tuned'], None),
        ('three experts on the frozen network', ['plankton_part_lite0_heads'], None),
        *_rates('fine-tuned from them, 2 epochs', 'plankton_part_lite0_tuned_short', ('01', '02', '05', '10')),
        ('fine-tuned from them, 5 epochs at 0.01', ['plankton_part_lite0_tuned_lr01'], None),
        ('fine-tuned from them, 5 epochs at 0.02', ['plankton_part_lite0_tuned'], None),
        ('fine-tuned from them, 5 epochs at 0.05', ['plankton_part_lite0_tuned_lr05'], None),
    ]),
    'backbone': ('EfficientNet-Lite0 as backbone, CIFAR-100-LT (100) at 64 px, 5 + 2 epochs:', [
        ('from ImageNet weights', ['lite0_pretrained'], None),
        ('from none', ['lite0_scratch'], None),
    ]),
}
COLUMNS = {
    'stage_one_top1': 'stage one', 'stage_one_balanced': 'balanced', 'top1': 'stage two', 'balanced': 'balanced',
    'many': 'many', 'medium': 'medium', 'few': 'few', 'ece': 'ECE',
}


def _cell(rows: Sequence[Dict[str, str]], key: str) -> str:
    """Mean and standard deviation over seeds. Empty if a value is missing."""
    values = [float(row[key]) for row in rows if row[key]]
    if len(values) < len(rows):
        return ''
    mean = f'{statistics.mean(values):.2f}'
    return mean if len(values) < 2 else f'{mean} ± {statistics.stdev(values):.2f}'


def _markdown(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or '' without rows."""
    if not rows:
        return ''
    lines = ['| ' + ' | '.join(cells) + ' |' for cells in (header, *rows)]
    return '\n'.join([*([caption, ''] if caption else []), lines[0], '|' + '---|' * len(header), *lines[1:]])


def make_runs_table(name: str, results: Path) -> str:
    """The table of the recorded runs. Comparisons need two rows."""
    recorded = {row['name']: row for row in read_rows(results)}
    caption, table_rows = TABLES[name]
    balanced = name in ('finetune', 'plankton_frozen', 'plankton_part', 'plankton_from_heads')
    left_out = set() if balanced else {'stage_one_balanced', 'balanced'}
    columns = [key for key in COLUMNS if key not in left_out]
    rows = []
    for what, names, paper in table_rows:
        known = [recorded[run] for run in names if run in recorded]
        if known:
            seeds = ', '.join(row['seed'] for row in known)
            rows.append([what, paper or '', seeds, *(_cell(known, key) for key in columns)])
    if name != 'recipes' and len(rows) < 2:
        return ''
    first = 'fused stages' if name.startswith('experts') else ''
    return _markdown(caption, [first, 'paper', 'seeds', *(COLUMNS[key] for key in columns)], rows)


def make_weights_table(results: Path) -> str:
    """The table of the package's weights, with and without flips. Every subset of the experts has a row."""
    paths = [results / f'{name}.json' for name in ('pretrained', 'pretrained_flip')]
    if not all(path.exists() for path in paths):
        return ''
    plain, flipped = (
        {' '.join(map(str, one['experts'])): one for one in json.loads(path.read_text())['subsets']} for path in paths)
    rows = []
    for experts, one in plain.items():
        flip = flipped[experts]
        figures = [one[key] for key in ('top1', 'many', 'medium', 'few', 'ece')] + [flip['top1'], flip['ece']]
        cost = [f"{one['parameters'] / 1e6:.2f}", f"{one['gmacs']:.3f}"]
        cells = ['-' if figure is None else f'{figure:.2f}' for figure in figures]
        rows.append([experts, *cells, *cost])
    header = ['experts', 'top-1', 'many', 'medium', 'few', 'ECE', 'top-1, flips', 'ECE, flips', 'params M', 'GMACs']
    return _markdown(
        'The weights of the package by experts kept, alone and with mirrored images at twice the GMACs:',
        header, rows)


def fill(text: str, results: Path) -> str:
    """The text with new tables between `<!-- results NAME -->` and `<!-- end -->`."""
    def table(match: re.Match) -> str:
        made = make_weights_table(results) if match[2] == 'weights' else make_runs_table(match[2], results)
        return f'{match[1]}\n{made}\n{match[3]}'

    return re.sub(r'(<!-- results (\w+) -->)\n.*?(<!-- end -->)', table, text, flags=re.DOTALL)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='change nothing, and fail if a file differs')
    parser.add_argument('--files', type=Path, nargs='+', default=FILES, metavar='FILE', help='files to fill')
    parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR', help='folder of the records')
    args = parser.parse_args(argv)
    status = 0
    for path in args.files:
        old = path.read_text()
        new = fill(old, args.results)
        if args.check and new != old:
            print(f'{path.name} differs from the records: run python results/tables.py', file=sys.stderr)
            status = 1
        elif new != old:
            path.write_text(new)
    return status


if __name__ == '__main__':
    sys.exit(main())
