"""Options, hparams files, and the published schedules."""
import math
import re

import pytest
import torch
import yaml
from conftest import ROOT, read_yaml

from shike_timm.build import create_model, create_optimizer, create_schedule, mixup_options, resolve_autocast
from shike_timm.errors import InputError
from shike_timm.methods import plan_stages
from shike_timm.options import parse_eval_args, parse_retrain_args, parse_train_args

HPARAMS = sorted((ROOT / 'hparams').rglob('*.yaml'))


def write(tmp_path, text):
    path = tmp_path / 'hparams.yaml'
    path.write_text(text)
    return str(path)


def learning_rates(args, stage):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr if stage == 1 else args.crt_lr)
    schedule = create_schedule(optimizer, args, plan_stages(args)[stage - 1])
    rates = []
    for epoch in range(args.epochs if stage == 1 else args.crt_epochs):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def cosine(peak, start, end, epoch):
    return 0.5 * peak * (1 + math.cos(math.pi * (epoch - start) / (end - start)))


@pytest.mark.parametrize('name', ['cifar100_lt_if100', 'cifar100_lt_if50', 'cifar10_lt_if100'])
def test_full_recipe_learning_rates(name):
    args = parse_train_args(['--hparams', str(ROOT / 'hparams' / f'{name}.yaml')])
    one = [0.025, 0.05, 0.075, 0.1, 0.125] + [cosine(0.15, 5, 180, epoch) for epoch in range(5, 180)]
    two = [0.0375, 0.05, 0.0625, 0.075, 0.0875] + [cosine(0.1, 5, 20, epoch) for epoch in range(5, 20)]
    assert learning_rates(args, 1) == pytest.approx(one, abs=1e-9, rel=0)
    assert learning_rates(args, 2) == pytest.approx(two, abs=1e-9, rel=0)


def test_short_recipe_learning_rates():
    args = parse_train_args(['-c', str(ROOT / 'hparams' / 'cifar100_lt_if100_short.yaml')])
    one = [0.025, 0.05, 0.075, 0.1, 0.125] + [cosine(0.15, 5, 40, epoch) for epoch in range(5, 40)]
    assert learning_rates(args, 1) == pytest.approx(one, abs=1e-9, rel=0)
    two = learning_rates(args, 2)
    assert len(two) == 10 and two[2] == 0.1
    assert two[2:] == pytest.approx([cosine(0.1, 2, 10, epoch) for epoch in range(2, 10)], abs=1e-9, rel=0)


@pytest.mark.parametrize('path', HPARAMS, ids=lambda path: path.stem)
def test_published_hparams_parse(path):
    args = parse_train_args(['--hparams', str(path)])
    for key, value in read_yaml(path).items():
        assert key == 'base' or getattr(args, key) == value


def test_ablation_rows_differ_in_their_part_alone():
    base = vars(parse_train_args(['--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100.yaml')]))
    off = dict(fusion=False, alpha=0., beta=0.)
    differences = [
        {
            key: value
            for key, value in vars(parse_train_args(['--hparams', str(path)])).items()
            if value != base[key] and key != 'hparams'
        }
        for path in sorted((ROOT / 'hparams' / 'ablation').glob('*.yaml'))
    ]
    assert differences == [
        dict(off, num_experts=1), off, dict(alpha=0., beta=0.), dict(alpha=0.), dict(beta=0.), dict(fusion=False), {}]


def test_recipe_optimizer_decays_every_parameter_without_nesterov():
    args = parse_train_args(['--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100.yaml')])
    optimizer = create_optimizer(args, args.lr, create_model(args, 100))
    group, = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group['momentum'], group['weight_decay'], group['nesterov'], group['lr']) == (0.9, 5e-4, False, 0.15)


def test_precedence(tmp_path):
    path = write(tmp_path, 'lr: 0.3\nbatch-size: 7\namp: true\ndepths: [1, 2, 2]\nweight_decay: 5e-4\n')
    args = parse_train_args(['--hparams', path, '--batch-size', '9'])
    assert (args.lr, args.batch_size, args.amp, args.depths, args.epochs) == (0.3, 9, True, [1, 2, 2], 180)
    assert args.weight_decay == 5e-4


def test_a_file_overrides_its_base(tmp_path):
    (tmp_path / 'a.yaml').write_text('epochs: 30\nlr: 0.3\nopt_kwargs: {nesterov: true}\n')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'b.yaml').write_text('base: ../a.yaml\nlr: 0.2\n')
    args = parse_train_args(['--hparams', write(tmp_path, 'base: sub/b.yaml\nbatch_size: 9'), '--seed', '3'])
    assert (args.epochs, args.lr, args.batch_size, args.seed) == (30, 0.2, 9, 3)
    assert args.opt_kwargs == {'nesterov': True}


@pytest.mark.parametrize('text, message', [
    ('base: nowhere.yaml', "nowhere.yaml' does not exist"),
    ('base: hparams.yaml', "hparams.yaml' has itself among its bases"),
    ('base: [a.yaml]', "'base' is ['a.yaml'], expected the path of another hparams file"),
    ('base: sub.yaml', "sub.yaml' has an unknown key 'epoch', the nearest valid one is 'epochs'"),
])
def test_bad_bases(tmp_path, text, message):
    (tmp_path / 'sub.yaml').write_text('epoch: 3')
    with pytest.raises(InputError, match=re.escape(message)):
        parse_train_args(['--hparams', write(tmp_path, text)])


@pytest.mark.parametrize('text, message', [
    ('learning_rate: 0.1', "unknown key 'learning_rate', the nearest valid one is '"),
    ('epoch: 3', "unknown key 'epoch', the nearest valid one is 'epochs'"),
    ('lr: fast', "'lr' is 'fast', expected a number"),
    ('epochs: 1.5', "'epochs' is 1.5, expected a whole number"),
    ('epochs: true', "'epochs' is True, expected a whole number"),
    ('amp: 1', "'amp' is 1, expected true or false"),
    ('fusion: sometimes', "'fusion' is 'sometimes', expected true or false"),
    ('depths: 1', "'depths' is 1, expected a list"),
    ('depths: [1, two]', "'depths' is 'two', expected a whole number"),
    ('opt_kwargs: 3', "'opt_kwargs' is 3, expected a mapping"),
    ('epochs:', "'epochs' is empty, expected a value"),
    ('epochs: .inf', "'epochs' is inf, expected a whole number"),
    ('seed: 2024-01-01', 'expected a whole number'),
    ('x: 2024-13-45', 'is not valid YAML'),
    ('depths: [1, null]', "'depths' is None, expected a whole number"),
    ('depths: []', "'depths' is [], expected a list"),
    ('scale: []', "'scale' is [], expected a list of 2"),
    ('scale: [0.5]', "'scale' is [0.5], expected a list of 2"),
    ('sched: linear', "'sched' is 'linear', expected one of cosine, tanh, step, poly"),
    ('lr: [0.1', 'is not valid YAML at line 1'),
    ('- lr', 'holds a list, expected lines'),
])
def test_bad_hparams(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_train_args(['--hparams', write(tmp_path, text)])


@pytest.mark.parametrize('argv, message', [
    (['--hparams', 'nowhere.yaml'], "hparams file 'nowhere.yaml' does not exist"),
    (['--epoch', '3'], "Unknown argument '--epoch', the nearest valid one is '--epochs'"),
    (['--epochs', 'ten'], "invalid int value: 'ten'"),
    (['--epochs', '0'], '--epochs 0 is out of range: give at least 1'),
    (['--resume'], '--resume without a path needs --experiment'),
])
def test_bad_command_lines(argv, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_train_args(argv)


def test_other_schedules():
    rates = learning_rates(parse_train_args(
        ['--sched', 'step', '--epochs', '6', '--warmup-epochs', '2', '--warmup-lr', '0.05', '--lr', '0.1',
         '--decay-epochs', '2', '--decay-rate', '0.5']), 1)
    assert rates == pytest.approx([0.05, 0.075, 0.1, 0.1, 0.05, 0.05])
    for sched in ('tanh', 'poly', 'cosine'):
        rates = learning_rates(parse_train_args(
            ['--sched', sched, '--epochs', '20', '--warmup-epochs', '0', '--min-lr', '0.01', '--lr', '1.0',
             '--decay-rate', '1']), 1)
        assert rates == sorted(rates, reverse=True) and 0.01 <= rates[-1] < 0.1


def test_optimizer_options():
    args = parse_train_args(
        ['--opt', 'adamw', '--lr', '0.01', '--crt-lr', '0.02', '--weight-decay', '0.3', '--opt-kwargs', 'eps=0.5',
         '--model', 'resnet32_shike'])
    model = create_model(args, 10)
    optimizer = create_optimizer(args, args.crt_lr, model)
    assert type(optimizer).__name__ == 'AdamW' and optimizer.defaults['eps'] == 0.5
    assert optimizer.param_groups[-1]['lr'] == 0.02 and optimizer.param_groups[-1]['weight_decay'] == 0.3
    for extra in (['--opt', 'best'], ['--opt-kwargs', 'speed=3']):
        with pytest.raises(InputError, match='optimizer .* cannot be made'):
            create_optimizer(parse_train_args(extra), 0.1, model)


def test_model_options():
    args = parse_train_args(
        ['--model', 'resnet32_shike', '--num-experts', '2', '--depths', '2', '1', '--classifier', 'linear',
         '--aligner', 'bottleneck', '--drop', '0.25'])
    model = create_model(args, 4)
    assert (model.num_experts, model.depths, model.drop_rate) == (2, (2, 1), 0.25)
    assert model.classifier.bias.shape == (2, 4) and len(model.experts[0].aligner) == 8
    plain = create_model(parse_train_args(['--model', 'resnet32_shike', '--num-experts', '1', '--no-fusion']), 4)
    assert plain.experts[0].aligner is None


def test_compiling_can_be_switched_off_again(tmp_path):
    path = write(tmp_path, 'torchcompile: inductor\n')
    assert parse_train_args(['--hparams', str(path)]).torchcompile == 'inductor'
    assert parse_train_args(['--hparams', str(path), '--no-torchcompile']).torchcompile is None


def test_autocast_defaults():
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    assert resolve_autocast(parse_train_args([]), cpu) is None
    assert resolve_autocast(parse_train_args(['--amp']), cuda) == torch.float16
    assert resolve_autocast(parse_train_args(['--amp', '--amp-dtype', 'bfloat16']), cuda) == torch.bfloat16
    with pytest.raises(InputError, match='--amp-dtype float16 needs loss scaling'):
        resolve_autocast(parse_train_args(['--amp', '--amp-dtype', 'float16']), cpu)


def test_mixup_needs_soft_targets():
    args = parse_train_args(['--cutmix', '1', '--mixup-mode', 'pair', '--alpha', '0'])
    assert mixup_options(args, 10, plan_stages(args))['cutmix_alpha'] == 1
    assert mixup_options(parse_train_args([]), 10, []) is None
    args = parse_train_args(['--mixup', '0.2'])
    assert mixup_options(args, 10, plan_stages(args)[1:])['num_classes'] == 10  # balanced softmax takes soft targets
    with pytest.raises(InputError, match='--mixup 0.2 mixes labels'):
        mixup_options(args, 10, plan_stages(args))
    with pytest.raises(InputError, match='--batch-size 3 is odd'):
        mixup_options(parse_train_args(['--mixup', '0.2', '--alpha', '0', '--batch-size', '3']), 10, [])


def test_retraining_takes_the_arguments_of_the_checkpoint(tmp_path):
    saved = dict(dataset='digits_lt', crt_lr=0.3, output='elsewhere', experiment='old', resume=None, class_counts=[1])
    args = parse_retrain_args(
        ['--checkpoint', 'RUN', '--crt-lr', '0.4', '--hparams', write(tmp_path, 'seed: 7')], lambda path: saved)
    assert (args.dataset, args.crt_lr, args.seed, args.experiment) == ('digits_lt', 0.4, 7, '')


def test_eval_args():
    args = parse_eval_args(['--model', 'local-dir:x', '--dataset', 'digits_lt'])
    assert (args.model, args.batch_size, args.checkpoint) == ('local-dir:x', 256, None)


def test_saved_arguments_are_hparams(tiny_run):
    args = parse_train_args(['--hparams', str(tiny_run / 'args.yaml')])
    saved = yaml.safe_load((tiny_run / 'args.yaml').read_text())
    assert saved['dataset'] == 'digits_lt'
    assert {key: value for key, value in vars(args).items() if key not in ('hparams', 'resume')} == saved
