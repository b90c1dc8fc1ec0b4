"""Reports: their numbers, their figures and the page."""
import csv
import json
import re
import shutil
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import TINY
from scipy import stats

import shike_timm
from shike_timm.cli.eval import parse_eval_args
from shike_timm.errors import InputError
from shike_timm.metrics import METRICS, SHOTS, shot_numbers, shown_metrics
from shike_timm.pretrained.folder import export_model
from shike_timm.report.logits import SavedLogits, load_logits, save_logits

pytest.importorskip('matplotlib')
from shike_timm.report import analysis, figures, page  # noqa: E402

HOSTILE = [
    '<script>alert(1)</script>', '"quoted", \'twice\' & $x_1$', 'long ' * 60, 'שלום عربي', '🐙 octopus', 'a,b;c',
    'line\nbreak', '</script><img src=x onerror=alert(2)>', '\x1b[31mred\u202e', '#1f2329 {{ 7 * 7 }}',
]


def make_logits(counts, num_images=600, num_experts=3, names=None, seed=0, missing=(), **fields):
    """Logits that are right more often the more training images a class has."""
    rng = np.random.default_rng(seed)
    num_classes = len(counts)
    targets = np.setdiff1d(np.arange(num_classes), missing)[np.arange(num_images) % (num_classes - len(missing))]
    logits = rng.normal(size=(num_images, num_experts, num_classes)).astype(np.float32)
    logits[np.arange(num_images), :, targets] += np.log10(np.asarray(counts))[targets][:, None]
    names = names or [f'class {c}' for c in range(num_classes)]
    paths = [str(i) for i in range(num_images)]
    return SavedLogits(logits, targets, paths, names, counts, shot_numbers(counts), **fields)


COUNTS = [500, 300, 150, 90, 60, 30, 15, 10, 6, 3]


@pytest.fixture(scope='module')
def analyzed():
    return analysis.Analysis(make_logits(COUNTS))


def test_equal_logits_are_one_answer_everywhere():
    saved = make_logits(COUNTS)
    saved.logits[:] = 0.
    found = analysis.Analysis(saved)
    assert found.metrics['top1'] == 100 * found.right[:, 0].mean() == pytest.approx(10, abs=1)
    assert found.metrics['top5'] >= found.metrics['top1']


def read_page(folder):
    text = (folder / 'report.html').read_text(encoding='utf-8')
    table = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    return text, json.loads(table)


def plain_metrics(logits, targets, counts):
    """The metrics of one output by plain NumPy, in float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    right = logits.argmax(1) == targets
    confidence = probabilities.max(1)
    ece = sum(
        abs((confidence[inside] - right[inside]).sum())
        for low in np.arange(15) / 15 if (inside := (confidence >= low) & (confidence < low + 1 / 15)).any())
    by_class = {c: 100 * right[targets == c].mean() for c in np.unique(targets)}
    groups = dict(
        balanced=counts >= 0, many=counts > 100, medium=(counts >= 20) & (counts <= 100), few=counts < 20)
    return dict(
        loss=-np.log(probabilities[np.arange(len(targets)), targets]).mean(),
        top1=100 * right.mean(),
        top5=100 * (np.argsort(-logits, 1)[:, :5] == targets[:, None]).any(1).mean(),
        ece=100 * ece / len(targets),
        **{name: np.mean([by_class[c] for c in by_class if mask[c]]) for name, mask in groups.items()})


def test_evaluation_saves_what_a_report_is_made_of(tiny_run, tmp_path, run_script):
    """The page, the CSV and the JSON hold the same numbers. NumPy computes them from the saved logits too."""
    status, out, err = run_script(
        'eval', '--checkpoint', tiny_run / 'stage_two' / 'last.pth.tar', '--dataset', 'digits_lt', '--workers', '0',
        '--device', 'cpu', '--results-file', tmp_path / 'results.json', '--save-logits', tmp_path / 'logits.npz',
        '--report', tmp_path / 'report')
    assert status == 0 and 'report.html' in out, err
    results = json.loads((tmp_path / 'results.json').read_text())
    saved = load_logits(tmp_path / 'logits.npz')
    assert saved.class_names == results['per_class']['names'] and saved.paths[-1] == '499'
    costs = {tuple(one['experts']): one['gmacs'] for one in saved.costs}
    assert len(costs) == 7 and costs[0, 1, 2] == max(costs.values()) < 3 * min(costs.values())
    assert saved.class_counts.tolist() == results['per_class']['class_counts']
    outputs = [saved.logits.mean(1), *saved.logits.transpose(1, 0, 2)]
    for reported, output in zip((results, *results['experts']), outputs):
        for key, value in plain_metrics(output, saved.targets, saved.class_counts).items():
            assert reported[key] == pytest.approx(value, abs=0.0051 if key != 'ece' else 0.1), key
    analyzed = analysis.Analysis(saved).metrics
    assert analyzed.items() <= {**results, 'per_class': analyzed['per_class']}.items()

    text, table = read_page(tmp_path / 'report')
    cells = re.findall(r'<td>([^<]*)</td>', re.search(r'<table id="metrics">.*?</table>', text, re.S)[0])
    expected = [f'{one[key]:.2f}' for one in (*results['experts'], results) for key in shown_metrics([results])]
    assert [cell for cell in cells if re.fullmatch(r'[\d.]+', cell)] == expected
    with (tmp_path / 'report' / 'classes.csv').open(newline='', encoding='utf-8') as file:
        header, *rows = csv.reader(file)
    assert header == table['header']
    assert rows == [['' if cell is None else str(cell) for cell in row] for row in table['rows']]
    per_class = results['per_class']
    for row in table['rows']:
        c = per_class['names'].index(row[0])
        assert row[2:4] == [per_class['class_counts'][c], per_class['total'][c]]
        assert [row[4], row[7], row[10], row[13], *row[16:18]] == [
            per_class['top1'][c], *(expert[c] for expert in per_class['experts']), per_class['precision'][c],
            per_class['f1'][c]]
        interval = stats.binomtest(round(row[4] * row[3] / 100), row[3]).proportion_ci(method='wilson')
        assert row[5:7] == pytest.approx([100 * interval.low, 100 * interval.high], abs=0.0051)
    for name in figures.DRAWINGS:
        assert (tmp_path / 'report' / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
        assert (tmp_path / 'report' / f'{name}.svg').read_text(encoding='utf-8').startswith('<?xml')
    assert 'class="missing"' not in text and text.count('src="data:image/png;base64') >= 4 and 'mathdefault' not in text
    assert not re.search(r'(src|href)="http', text.replace('xmlns', ''))


def test_a_run_is_reported_with_its_first_stage(tiny_run, tmp_path, run_script):
    shutil.copytree(tiny_run, tmp_path / 'other')
    status, out, err = run_script(
        'report', tiny_run, tmp_path / 'other', '--output', tmp_path / 'report', '--workers', '0',
        '--device', 'cpu')
    assert status == 0, err
    text, _ = read_page(tmp_path / 'report')
    assert 'run, stage one' in text and 'run</td>' in text and 'other</td>' in text
    assert 'of one recipe' not in text  # a copy is no second seed
    # A report of one run lies in the run, and keeps nothing of a comparison.
    (tmp_path / 'report').rename(tmp_path / 'other' / 'report')
    assert list((tmp_path / 'other' / 'report').glob('comparison.*'))
    status, out, err = run_script('report', tmp_path / 'other', '--workers', '0', '--device', 'cpu')
    assert status == 0 and str(tmp_path / 'other' / 'report' / 'report.html') in out, err
    assert not list((tmp_path / 'other' / 'report').glob('comparison.*'))
    metrics = json.loads((tiny_run / 'metrics.json').read_text())['stage_two']
    assert f"<b>{metrics['top1']:.2f}</b>" in text and f"{metrics['few']:.2f}<br>" in text


def make_run(folder, seed, num_images=600, lr=0.1):
    """The analysis of a run with a seed. Its logits come from another seed."""
    folder.mkdir()
    (folder / 'args.yaml').write_text(f'seed: {seed}\nlr: {lr}\nexperiment: {folder.name}\n')
    made_by = sum(map(ord, folder.name))
    return analysis.Analysis(make_logits(COUNTS, num_images, seed=made_by, name=folder.name, run=folder))


def test_seeds_of_one_recipe(tmp_path, monkeypatch):
    """Mean and deviation are of runs that differ only in their seed and saw the same images."""
    monkeypatch.setattr(page, 'DRAWINGS', {})  # they take seconds
    runs = [make_run(tmp_path / f'run{seed}', seed) for seed in range(3)]
    ((group, values),) = page.seed_groups([*runs, make_run(tmp_path / 'faster', 3, lr=0.2)])
    assert group == runs and set(values) == {*METRICS, 'macro_f1'}
    few = [run.metrics['few'] for run in runs]
    assert len(set(few)) == 3 and values['few'] == pytest.approx((np.mean(few), np.std(few, ddof=1)))
    page.write_report(tmp_path / 'report', runs)
    text, _ = read_page(tmp_path / 'report')
    mean, deviation = values['few']
    assert '3 seeds of one recipe: run0, run1, run2' in text and f'{mean:.2f} ± {deviation:.2f}' in text

    assert not page.seed_groups([*runs, make_run(tmp_path / 'again', 2)])
    assert not page.seed_groups([*runs, make_run(tmp_path / 'elsewhere', 3, num_images=500)])
    flipped = analysis.Analysis(make_logits(COUNTS, seed=9, name='flipped', run=runs[0].saved.run))
    assert not page.seed_groups([runs[0], flipped]) and not page.seed_groups(runs[:1])


def test_a_run_is_evaluated_on_the_images_that_it_set_aside(tmp_path, run_script):
    command = [*TINY, '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '0', '--val-per-class', '20']
    assert run_script('train', *command, '--output', tmp_path)[0] == 0
    status, _, err = run_script(
        'report', tmp_path / 'run', '--output', tmp_path / 'report', '--workers', '0', '--device',
        'cpu')
    assert status == 0, err
    top1 = json.loads((tmp_path / 'run' / 'metrics.json').read_text())['stage_one']['top1']
    text, _ = read_page(tmp_path / 'report')
    assert f'<b>{top1:.2f}</b>' in text and '200 test images' in text


def test_intervals_are_those_of_scipy(analyzed):
    other = analysis.Analysis(make_logits(COUNTS, seed=1))
    by_class = [analyzed.right[analyzed.saved.targets == c, 0].astype(float) for c in range(10)]
    few = by_class[6:]

    def mean_over_classes(*samples, axis):
        return np.mean([sample.mean(axis) for sample in samples], axis=0)

    result = stats.bootstrap(few, mean_over_classes, method='percentile', n_resamples=4000, random_state=0)
    assert analyzed.intervals['few'] == pytest.approx(100 * np.array(result.confidence_interval), abs=0.6)
    gain = [
        (other.right[:, 0].astype(float) - analyzed.right[:, 0])[analyzed.saved.targets == c] for c in range(6, 10)]
    result = stats.bootstrap(gain, mean_over_classes, method='percentile', n_resamples=4000, random_state=0)
    tests = analysis.paired_test(analyzed, other)
    assert tests['few'].interval == pytest.approx(100 * np.array(result.confidence_interval), abs=0.8)
    assert tests['few'].difference == pytest.approx(other.metrics['few'] - analyzed.metrics['few'], abs=0.011)
    assert sum(tests['top1'].classes) == 10 and tests['top1'].classes[0] == sum(
        np.greater(other.right_by_class[:, 0], analyzed.right_by_class[:, 0]))
    assert all(
        interval[0] <= analyzed.metrics[name] <= interval[1] for name, interval in analyzed.intervals.items())
    only = [int((a.right[:, 0] & ~b.right[:, 0]).sum()) for a, b in ((other, analyzed), (analyzed, other))]
    assert tests['top1'].p_value == stats.binomtest(only[0], sum(only)).pvalue


def intervals_of(right, total, *sizes):
    """Intervals of right answers of classes, the first `sizes[0]` of them of many images, and so on."""
    shots = np.repeat(np.arange(3), sizes)
    return analysis.mean_intervals(
        np.stack([right, total - right], axis=1), (1, 0), {shot: shots == k for k, shot in enumerate(SHOTS)})


def test_intervals_of_classes_of_one_image():
    """Forty classes of one image have the interval of one class of forty images. It is never empty."""
    one, right = np.ones(40, dtype=int), np.arange(40) % 2
    intervals = intervals_of(right, one, 0, 0, 40)
    expected = 100 * stats.beta(20.5, 20.5).ppf([0.025, 0.975])
    assert intervals['few'] == pytest.approx(expected, abs=0.5) and intervals['many'] is None
    assert intervals['few'] == intervals['balanced'] == intervals['top1']
    low, high = intervals_of(one, one, 0, 0, 40)['few']
    assert low == pytest.approx(100 * stats.beta(40.5, 0.5).ppf(0.025), abs=0.5) and high == pytest.approx(100)
    low, high = intervals_of(0 * one, one, 20, 0, 20)['balanced']
    assert low == 0 and 5 < high < 15
    never = np.stack([0 * one, 0 * one, one], axis=1)  # two models that are always right together
    low, high = analysis.mean_intervals(never, (1, -1, 0), {'few': one > 0})['few']
    assert -9 < low < -3 and 3 < high < 9


@pytest.mark.parametrize('num_classes, num_images, shares', [(40, 1, (0.5, 0.5)), (100, 100, (0, 1))])
def test_intervals_cover_what_is_true(num_classes, num_images, shares):
    """Of 200 draws of test images, about 95 % of the intervals cover the truth. Half of the classes are few-shot."""
    rng, covered = np.random.default_rng(0), []
    sizes, total = (num_classes // 2, 0, num_classes // 2), np.full(num_classes, num_images)
    for _ in range(200):
        truth = rng.uniform(*shares, num_classes)
        intervals = intervals_of(rng.binomial(total, truth), total, *sizes)
        means = dict(balanced=truth.mean(), few=truth[num_classes // 2:].mean())
        covered.append([intervals[name][0] <= 100 * mean <= intervals[name][1] for name, mean in means.items()])
    assert np.all((np.mean(covered, axis=0) > 0.9) & (np.mean(covered, axis=0) < 0.985)), np.mean(covered, axis=0)


def test_numbers_counted_by_hand():
    """One of four images of class 0 is taken for class 1. Both images of class 1 are taken for class 0."""
    saved = make_logits([200, 5], 6, 1)
    saved.targets = np.array([0, 0, 0, 0, 1, 1])
    saved.logits = 2 * np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 0, 0]][:, None]
    analyzed = analysis.Analysis(saved)
    assert analyzed.most_confused == [(1, 1), (0, 2)]
    assert analyzed.metrics['macro_f1'] == analyzed.metrics['experts'][0]['macro_f1'] == 33.33  # F1 of 2/3 and of 0
    (confusion,) = analysis.costly_confusions(analyzed)
    assert confusion == analysis.Confusion(1, 0, 2, 100., [4, 5])
    sure = 1 / (1 + np.exp(-2))
    assert analyzed.hardest_negative == pytest.approx([1 - sure] * 3 + [sure] * 3)
    count, right, confidence = analyzed.reliability()
    assert count.sum() == 6 and right[int(sure * 15)] == 3 and confidence[int(sure * 15)] == pytest.approx(sure)
    assert analyzed.coverage()[1] == pytest.approx([1, 1, 1, 3 / 4, 3 / 5, 3 / 6])
    plain, reported = analyzed.prior_shift()
    assert plain[[0, -1]] == pytest.approx([0.375, 0.75 * 200 / 205])
    assert reported[-1] == pytest.approx(200 / 205)  # log 40 beats a margin of 2


def test_shares_of_best_experts():
    """Expert 1 alone is right on class 0; both always are on class 1, which they share."""
    saved = make_logits([200, 200], 200, 2)
    saved.logits[:] = 5 * np.eye(2, dtype=np.float32)[saved.targets][:, None]
    saved.logits[saved.targets == 0, 0] *= -1
    shares, chance = analysis.best_expert_shares(analysis.Analysis(saved))
    assert shares['many'].tolist() == [0.25, 0.75] and list(shares) == ['many']
    assert chance['many'] == (0.25, 0.75)  # expert 1 has each class alone or shares it


@pytest.mark.parametrize('saved, sentences', [
    (dict(counts=COUNTS, num_experts=1, missing=[0, 9]), ['one expert', 'no run folder']),
    (dict(counts=[300, 3], num_experts=5), ['no run folder']),
    (dict(counts=[300, 200, 150]), ['no run folder']),
    (dict(counts=[200] + [5] * 9, num_images=1, seed=1), ['is taken for', 'no run folder']),
])
def test_what_is_missing_is_said(tmp_path, saved, sentences):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        one = analysis.Analysis(make_logits(**saved))
        page.write_report(tmp_path, [one])
    text, table = read_page(tmp_path)
    found = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert len(found) == len(sentences) and all(want in reported for want, reported in zip(sentences, found))
    for row in table['rows']:
        assert (row[4] is None) == (row[3] == 0)
    assert len(list(tmp_path.glob('*.svg'))) == len(list(tmp_path.glob('*.png'))) == 10
    # Divisions without classes, or one that holds all of them, are no tiles and no columns.
    divisions = [shot for shot in SHOTS if one.shots[shot].any()]
    tiles = re.findall(r'<div class="card">([\w-]+)<b>', text)
    assert tiles == ['top-1', 'balanced', 'macro-F1', *(divisions if len(divisions) > 1 else [])]
    assert 'id="mistakes"' in text or 'is taken for' in found[0]
    assert 'class 0' in (tmp_path / 'class_accuracy.svg').read_text() + (tmp_path / 'confusion_matrix.svg').read_text()


def test_hostile_names_are_text(tmp_path):
    names = HOSTILE[:]
    models = [analysis.Analysis(make_logits(COUNTS, names=names, seed=seed, name=name))
              for seed, name in enumerate(['<b>one', 'two'])]
    page.write_report(tmp_path, models)
    text, table = read_page(tmp_path)
    assert [row[0] for row in table['rows']] == names
    with (tmp_path / 'classes.csv').open(newline='', encoding='utf-8') as file:
        assert [row[0] for row in csv.reader(file)][1:] == names
    assert text.count('<script') == 2 and '<img src=x' not in text and '<b>one' not in text and '&lt;b&gt;one' in text
    drawn = (tmp_path / 'confusions.svg').read_text(encoding='utf-8')
    assert 'octopus' not in drawn or '🐙' in drawn
    assert '<script' not in drawn and '\x1b' not in drawn


@pytest.fixture(scope='module', params=[500, pytest.param(8142, marks=pytest.mark.slow)])
def large_page(request, tmp_path_factory):
    """A report on many classes, once as many as in iNaturalist 2018: its folder, class counts and CPU seconds."""
    counts = np.geomspace(1000, 2, request.param).astype(int)
    saved = make_logits(
        counts, len(counts), 2, HOSTILE + [f'class {c}' for c in range(len(counts) - len(HOSTILE))])
    folder, start = tmp_path_factory.mktemp('large'), time.process_time()
    page.write_report(folder, [analysis.Analysis(saved)])
    return folder, counts, time.process_time() - start


def test_many_classes(large_page):
    folder, _, seconds = large_page
    assert seconds < 60 and (folder / 'report.html').stat().st_size < 10e6


def test_other_images_are_not_paired(tmp_path, analyzed):
    page.write_report(tmp_path, [analyzed, analysis.Analysis(make_logits(COUNTS, 500))])
    assert 'They did not see the same images' in (tmp_path / 'report.html').read_text()


def test_images_of_a_folder(image_folder, tmp_path, run_script, monkeypatch):
    model = timm.create_model('resnet32_shike', num_classes=3)
    config = timm.data.resolve_model_data_config(model)
    export_model(model, tmp_path / 'model', dict(config, input_size=(3, 16, 16)), ['ant', 'bee', 'cat'], [24, 12, 6])
    monkeypatch.setattr('shike_timm.data.dataset.MAX_UNREADABLE', 0.5)
    (image_folder / 'validation' / 'ant' / '00.png').write_bytes(b'')  # so it has no logits and no path
    status, _, err = run_script(
        'eval', '--model', f'local-dir:{tmp_path}/model', '--data-dir', image_folder, '--workers', '0',
        '--no-check-images', '--device', 'cpu', '--many-shot', '20', '--few-shot', '10', '--save-logits',
        tmp_path / 'logits.npz', '--results-file', tmp_path / 'results.json')
    assert status == 0, err
    saved = load_logits(tmp_path / 'logits.npz')
    reported, analyzed = json.loads((tmp_path / 'results.json').read_text()), analysis.Analysis(saved)
    assert [SHOTS[shot] for shot in saved.shots] == ['many', 'medium', 'few']  # of 24, 12 and 6 images
    assert all(analyzed.metrics[key] == reported[key] for key in METRICS)
    folders = [path.split('/')[-2] for path in saved.paths]
    assert [['ant', 'bee', 'cat'][target] for target in saved.targets] == folders
    assert saved.paths[0].endswith('ant/0.png') and saved.image(0).size == (10, 12)
    saved.paths[0] = '/nowhere.png'
    assert saved.image(0) is None


def test_maps_are_those_of_a_linear_classifier():
    """With a linear classifier on pooled features, the map of a class is their sum with its weights."""
    pytest.importorskip('pytorch_grad_cam')
    from shike_timm.report.cam import expert_maps
    torch.manual_seed(0)
    model = timm.create_model('resnet32_shike', num_classes=3, classifier='linear').eval()
    images = torch.randn(2, 3, 31, 21)
    maps = expert_maps(model, images, [2, 0])
    with torch.no_grad():
        features = model.forward_features(images).unflatten(1, (3, -1))
    weights = model.classifier.weight[:, [2, 0]].transpose(0, 1)
    expected = torch.einsum('bmdhw,bmd->bmhw', features, weights).clamp(min=0).detach()
    for _ in range(2):  # a map that is negative everywhere becomes 0
        low, high = expected.amin((2, 3), keepdim=True), expected.amax((2, 3), keepdim=True)
        expected = torch.nn.functional.interpolate((expected - low) / (high - low + 1e-7), (31, 21), mode='bilinear')
    assert maps.shape == expected.shape == (2, 3, 31, 21) and maps == pytest.approx(expected.numpy(), abs=2e-3)
    assert all(one.grad is None for one in model.parameters())


def test_where_experts_look(image_folder, tmp_path, run_script, monkeypatch):
    pytest.importorskip('pytorch_grad_cam')
    monkeypatch.setattr(page, 'DRAWINGS', {})  # they take seconds
    model = timm.create_model('resnet32_shike', num_classes=3, in_chans=1)
    config = dict(timm.data.resolve_model_data_config(model), input_size=(1, 31, 21), mean=(0.5,), std=(0.5,))
    export_model(model, tmp_path / 'model', config, ['ant', '<b>bee', 'cat'], [24, 12, 6])
    (image_folder / 'train' / 'bee').rename(image_folder / 'train' / '<b>bee')
    (image_folder / 'validation' / 'bee').rename(image_folder / 'validation' / '<b>bee')
    command = [
        'eval', '--model', f'local-dir:{tmp_path}/model', '--data-dir', image_folder, '--workers', '0', '--device',
        'cpu', '--report', tmp_path / 'report', '--cam', image_folder / 'validation' / 'ant']
    status, _, err = run_script(*command)
    assert status == 0, err
    text, _ = read_page(tmp_path / 'report')
    table = re.search(r'<table id="cams">.*?</table>', text, re.S)[0]
    assert table.count('<tr>') == 1 + 4 and table.count('<img') == 4 * (1 + 3) and '<b>' not in table
    predicted = shike_timm.predict(
        [str(image_folder / 'validation' / 'ant')], model=f'local-dir:{tmp_path}/model', device='cpu', per_expert=True,
        topk=0, workers=0)
    for row, reported in zip(table.split('<tr>')[2:], predicted):
        at = [one['prob'][one['label'].index(reported['label'][0])] for one in (reported, *reported['experts'])]
        assert [float(one) for one in re.findall(r'([\d.]+)&nbsp;%', row)] == pytest.approx(
            [100 * one for one in at], abs=0.06)
    (image_folder / 'text.png').write_text('no')
    status, _, err = run_script(*command, image_folder / 'text.png')
    assert status == 2 and "text.png' cannot be read" in err and len(err.splitlines()) == 1


def test_maps_that_cannot_be_had(tmp_path, run_script, monkeypatch):
    status, _, err = run_script('eval', '--model', 'resnet32_shike', '--dataset', 'digits_lt', '--cam', 'x.png')
    assert status == 2 and 'add --report DIR' in err
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', SimpleNamespace())
    save_logits(tmp_path / 'logits.npz', make_logits(COUNTS))
    command = ['report', tmp_path / 'logits.npz', '--cam', 'x.png', '--output', tmp_path / 'new']
    status, _, err = run_script(*command)
    assert status == 2 and '--cam needs a model' in err
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', None)
    status, _, err = run_script(*command)
    assert status == 2 and 'needs pytorch_grad_cam: pip install' in err and len(err.splitlines()) == 1
    assert not (tmp_path / 'new').exists()


def test_bad_files(tmp_path, run_script):
    (tmp_path / 'text.npz').write_text('no')
    saved = make_logits(COUNTS)
    saved.targets = saved.targets + 9
    save_logits(tmp_path / 'targets.npz', saved)
    saved.targets = saved.targets[1:]
    save_logits(tmp_path / 'lengths.npz', saved)
    np.savez(tmp_path / 'other.npz', a=1)
    for name, message in (
            ('text', 'is damaged or not a file of'), ('targets', '10 classes cannot have'), ('lengths', 'expected'),
            ('other', 'is damaged or not a file of'), ('nowhere', 'does not exist')):
        with pytest.raises(InputError, match=message):
            load_logits(tmp_path / f'{name}.npz')
    (tmp_path / 'empty').mkdir()
    status, _, err = run_script('report', tmp_path / 'empty', '--output', tmp_path / 'report')
    assert status == 2 and 'holds no checkpoint' in err and not (tmp_path / 'report').exists()
    status, _, err = run_script('report', tmp_path / 'empty', '--output', tmp_path / 'text.npz')
    assert status == 2 and 'is a file' in err


def test_a_missing_package_is_one_sentence(monkeypatch, run_script, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    status, _, err = run_script(
        'eval', '--model', 'resnet32_shike', '--report', tmp_path / 'report', '--dataset', 'digits_lt')
    assert status == 2 and "pip install 'shike-timm[report]'" in err and len(err.splitlines()) == 1
    assert parse_eval_args([]).report is None


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.skipif(not CHROMIUM, reason='needs Chromium: apt-get install chromium')
def test_the_page_in_a_browser(large_page):
    """Offline from disk: no error on the console, no hostile name runs, the table sorts, filters and downloads."""
    playwright = pytest.importorskip('playwright.sync_api')
    (folder, counts, _), names = large_page, HOSTILE
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        tab = browser.new_context(offline=True, accept_downloads=True).new_page()
        said = []
        for event in ('console', 'pageerror', 'dialog', 'request'):
            tab.on(event, lambda one, event=event: said.append((event, str(one))))
        tab.goto(f'file://{folder}/report.html')
        assert [event for event, _ in said] == ['request']  # for the page itself
        first = tab.locator('#classes tbody tr:first-child td:first-child')
        assert first.text_content() == names[0]
        took = tab.evaluate('''() => {
            const button = [...document.querySelectorAll('#classes th button')].find(
                one => one.textContent === 'training images');
            return [1, 2, 3, 4].map(() => {
                const start = performance.now();
                button.click();
                document.body.offsetHeight;
                return performance.now() - start;
            });
        }''')
        assert min(took) < 1000  # the machine may be busy
        shown = tab.locator('#classes tbody tr:first-child td')
        assert shown.nth(2).text_content() == '2' and shown.nth(1).text_content() == 'few'
        tab.fill('#search', 'OCTOPUS')
        assert first.text_content() == names[4] and tab.locator('#classes tbody tr').count() == 1
        tab.fill('#search', '')
        tab.select_option('#shot', 'many')
        many = int((counts > 100).sum())
        assert tab.locator('#shown').text_content().startswith(f'{many} of {len(counts)} classes')
        with tab.expect_download() as download:
            tab.click('#download')
        with open(download.value.path(), newline='', encoding='utf-8') as file:
            rows = list(csv.reader(file))
        assert len(rows) == many + 1 and {row[1] for row in rows[1:]} == {'many'}
        assert {row[0] for row in rows[1:]} >= set(HOSTILE)
        for width in (1440, 390):
            tab.set_viewport_size(dict(width=width, height=800))
            assert tab.evaluate('document.documentElement.scrollWidth') <= width
        assert [event for event, _ in said if event != 'request'] == []
        browser.close()
