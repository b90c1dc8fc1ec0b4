"""benchmarks/benchmark.py: it counts known work, and its times add up."""
import json
import sys
import time

import pytest
import timm
import torch
import torch._inductor.config
from conftest import ROOT
from torch import nn

from shike_timm.training.config import StepConfig
from shike_timm.training.optimizer import resolve_autocast
from shike_timm.training.step import train_step
from shike_timm.training.tasks import ExpertTask

sys.path.insert(0, str(ROOT / 'benchmarks'))
from benchmark import _plain, _shike, benchmark, format_report, parse_benchmark_args  # noqa: E402
from measure import count_training_flops, measure_ceilings, peak_memory, time_parts  # noqa: E402

QUICK = ['--device', 'cpu', '--num-warm-iter', '1', '--num-bench-iter', '1', '--num-rounds', '3', '--batch-size', '4']
CPU = torch.device('cpu')


@pytest.fixture(scope='module', autouse=True)
def known_ceilings():
    """Ceilings that take no time to measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('benchmark.measure_ceilings', lambda *_: dict(matmul_gflops=100., copy_gb=10.))
        yield


@pytest.fixture(scope='module')
def report():
    return benchmark(parse_benchmark_args([*QUICK, '--model', 'resnet32_shike', '--compare', 'resnet18']))


def test_report(report):
    assert [(r['model'], r['bench']) for r in report['results']] == [
        ('resnet32_shike', 'train, stage 1'), ('resnet18', 'train'),
        ('resnet32_shike', 'inference'), ('resnet18', 'inference'),
    ]
    for r in report['results']:
        assert len(r['rounds']) == 3 and r['images_per_second'] == sorted(r['rounds'])[1] > 0
        assert r['achieved_gflops'] == pytest.approx(r['images_per_second'] * r['gflops'], rel=0.01, abs=0.1)
        assert r['share_of_matmul'] == pytest.approx(
            r['achieved_gflops'] / report['ceilings']['matmul_gflops'], abs=2e-3)
        assert ('part_ms' in r) == r['bench'].startswith('train')
    assert report['data'] == 'noise' and report['dtype'] == 'float32'


def test_counted_work_is_known(report):
    train, plain_train, inference, plain = report['results']
    # ResNet-18 on 32x32 images: 37.2 MMACs by timm's own table, 1.8 GMACs at 224 px.
    assert plain['gflops'] == pytest.approx(2 * 0.0372, rel=0.02)
    assert plain['parameters'] == sum(p.numel() for p in timm.create_model('resnet18', num_classes=100).parameters())
    assert inference['parameters'] == train['parameters'] == 1_257_808
    # A step is a forward and twice as much backward, the gradient of the images apart.
    assert 2.9 < train['gflops'] / inference['gflops'] <= 3
    assert 2.5 < plain_train['gflops'] / plain['gflops'] <= 3


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_grouped_convolutions_count_as_what_they_do(kind):
    """16 channels in 4 groups, 3x3 on 8x8: 4 inputs an output; backwards twice that, once where an input has no use."""
    forward = 2 * 2 * 16 * 4 * 9 * 64
    convolution = kind(16, 16, 3, padding=1, groups=4)
    images = torch.randn(2, 16, 8, 8)
    assert count_training_flops(lambda: convolution(images).sum().backward()) == 2 * forward
    images.requires_grad_()
    assert count_training_flops(lambda: convolution(images).sum().backward()) == 3 * forward


def test_memory_of_a_step_that_is_not_run(report):
    counted, = benchmark(parse_benchmark_args([*QUICK, '--model', 'resnet32_shike', '--bench', 'memory']))['results']
    measured = report['results'][0]
    # A batch more, of 48 KiB, is made while the step is measured.
    assert counted.pop('peak_memory_mb') == pytest.approx(measured['peak_memory_mb'], rel=0.01)
    assert counted == {key: measured[key] for key in counted} and counted['bench'] == 'train, stage 1'


@pytest.mark.parametrize('options, size', [
    (['--img-size', '16'], (3, 16, 16)),
    (['--input-size', '1', '16', '24'], (1, 16, 24)),
    (['--in-chans', '1'], (1, 32, 32)),
])
def test_noise_has_the_size_that_is_asked_for(options, size):
    args = parse_benchmark_args([*QUICK, '--model', 'resnet32_shike', *options])
    run = _shike(args)
    for one in (run, _plain(args, 'resnet18', run)):
        images, _ = next(iter(one.train_loader))
        assert images.shape == (4, *size) and one.model(images).shape == (4, 100)


def test_a_transformer_takes_the_size_too():
    run = _shike(parse_benchmark_args([*QUICK, '--model', 'shike', '--backbone', 'test_vit', '--img-size', '64']))
    images, _ = next(iter(run.train_loader))
    assert images.shape == (4, 3, 64, 64) and run.model(images).shape[0] == 4


def test_a_published_set_without_its_images_is_noise_with_its_classes():
    run = _shike(parse_benchmark_args(['--hparams', 'inat2018_resnet50', '--img-size', '64', '--device', 'cpu']))
    assert run.data_config['input_size'] == (3, 64, 64) and run.model.num_classes == 8142
    assert next(iter(run.train_loader))[0].shape == (64, 3, 64, 64)


def test_table(report):
    lines = format_report(report).splitlines()
    assert lines[1].split()[0] == 'model' and lines[2].startswith('resnet32_shike')
    assert sum('resnet32_shike over resnet18' in line for line in lines) == 2
    ratio = report['results'][2]['images_per_second'] / report['results'][3]['images_per_second']
    assert f'{ratio:.3f} of its images a second' in lines[-1]


def test_real_data_and_stage_two(tmp_path, cifar_root):
    path = tmp_path / 'figures.json'
    report = benchmark(parse_benchmark_args([
        *QUICK, '--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100_short.yaml'), '--data-dir', str(cifar_root),
        '--torchcompile', 'eager', '--bench', 'train', '--stage', '2', '--amp-dtype', 'bfloat16',
        '--results-file', str(path)]))
    assert json.loads(path.read_text()) == report
    assert report['data'] == 'cifar100_lt' and report['dtype'] == 'bfloat16'
    assert [(r['bench'], r['compiled']) for r in report['results']] == [('train, stage 2', False)]


def test_peak_memory_of_a_known_step():
    def step():
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        return second + 1

    assert peak_memory(step, CPU) == 4 * 4000
    layer = torch.nn.Linear(100, 50)
    weights, images, output = 100 * 50 + 50, 10 * 100, 10 * 50
    peak = peak_memory(lambda: layer(torch.zeros(10, 100)), CPU, layer.parameters())
    assert peak == 4 * (weights + images + output)


def test_parts_add_up_to_the_step():
    model = timm.create_model('resnet32_shike')
    task = ExpertTask(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images, target = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    config = StepConfig()
    start = time.perf_counter()
    with time_parts(task, optimizer, CPU) as seconds:
        for _ in range(3):
            train_step(task, images, target, optimizer, config)
    elapsed = time.perf_counter() - start
    assert set(seconds) == {'data', 'forward', 'losses', 'backward', 'optimizer'}
    assert all(value > 0 for value in seconds.values())
    assert 0.5 * elapsed < sum(seconds.values()) <= elapsed
    before = dict(seconds)
    train_step(task, images, target, optimizer, config)
    assert seconds == before  # nothing is timed outside


def test_ceilings_are_work_over_time(monkeypatch):
    monkeypatch.setattr('measure.seconds_per_call', lambda *_: 0.25)
    assert measure_ceilings(CPU, torch.float32) == dict(
        matmul_gflops=round(2 * 512 ** 3 / 0.25e9, 1), copy_gb=round(2 * 4 * 2 ** 26 / 0.25e9, 1))


@pytest.mark.parametrize('options, message', [
    (['--model', 'resnet32_shik'], "'resnet32_shik' is not a SHIKE model, the nearest valid one is 'resnet32_shike'"),
    (['--model', 'resnet32_shike', '--compare', 'resnet999'], "model 'resnet999' cannot be made"),
    (['--num-rounds', '0'], '--num-rounds 0 is out of range'),
    (['--torchcompile', 'nonsense'], "--torchcompile 'nonsense' does not work here"),
    (['--torchcompile', '--torchcompile-mode', 'fastest'], "with --torchcompile-mode 'fastest' does not work here"),
    (['--torchcompile-mode', 'max-autotune'], '--torchcompile-mode max-autotune goes with --torchcompile'),
    (['--results-file', 'nowhere/figures.json'], "results-file 'nowhere/figures.json' is in a folder"),
    (['--kd-model-name', 'resnet32_shike'], "--kd-model-name 'resnet32_shike' teaches the classes of a data set"),
    (['--stage', '3'], '--stage is '),
])
def test_bad_input(run_script, options, message):
    status, _, err = run_script('benchmarks/benchmark.py', *QUICK, *options)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_compiling_needs_a_compiler(run_script, monkeypatch, tmp_path):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    with torch._inductor.config.patch({'cpp.cxx': (None, 'no-such-compiler')}):
        status, _, err = run_script('benchmarks/benchmark.py', *QUICK, '--torchcompile')
    assert status == 2 and 'no-such-compiler' in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_classes_are_those_of_the_data_and_stage_one_is_compiled():
    report = benchmark(parse_benchmark_args([
        *QUICK, '--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--compare', 'resnet18', '--bench', 'train',
        '--torchcompile', 'eager']))
    plain = sum(p.numel() for p in timm.create_model('resnet18', num_classes=10).parameters())
    assert [(r['model'], r['parameters'], r['compiled']) for r in report['results']] == [
        ('resnet32_shike', 1_257_808 - 3 * 64 * 90, True), ('resnet18', plain, True)]


@pytest.mark.parametrize('public', [True, False])
@pytest.mark.parametrize('known', ['avx512_bf16', 'amx_tile', 'avx2'])
def test_bfloat16_is_the_default_only_where_the_cpu_computes_it(monkeypatch, public, known):
    """torch tells of instructions by `get_capabilities`; older releases have two private functions alone."""
    if public:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {known: True}, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
        for name in ('avx512_bf16', 'amx_tile'):
            monkeypatch.setattr(torch.cpu, f'_is_{name}_supported', lambda name=name: name == known)
    assert resolve_autocast(parse_benchmark_args(['--amp']), CPU) == (None if known == 'avx2' else torch.bfloat16)
    assert resolve_autocast(parse_benchmark_args(['--amp', '--amp-dtype', 'bfloat16']), CPU) == torch.bfloat16
    assert resolve_autocast(parse_benchmark_args(['--no-amp']), CPU) is None


@pytest.mark.parametrize('native', [True, False])
def test_a_gpu_that_emulates_bfloat16_is_told_of(monkeypatch, caplog, native):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: including_emulation or native)
    device = torch.device('cuda')
    assert resolve_autocast(parse_benchmark_args(['--amp']), device) == torch.float16 and not caplog.text
    args = parse_benchmark_args(['--amp', '--amp-dtype', 'bfloat16'])
    assert resolve_autocast(args, device) == torch.bfloat16 and ('no known instructions' in caplog.text) != native


def test_processes_are_refused(run_script, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    status, _, err = run_script('benchmarks/benchmark.py', *QUICK)
    assert status == 2 and 'WORLD_SIZE is 4, but a benchmark is of one process' in err
