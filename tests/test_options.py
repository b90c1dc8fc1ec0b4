"""Options, from the command line, hparams files and Python, and the published schedules."""
import importlib
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT, read_yaml

import shike_timm
from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.cli.train import parse_train_args
from shike_timm.data.loaders import mixup_options
from shike_timm.errors import InputError
from shike_timm.models.create import create_model
from shike_timm.options import check_values, complete, options, read_command_line
from shike_timm.training.config import TrainConfig, card_options
from shike_timm.training.optimizer import create_optimizer, create_schedule, resolve_autocast
from shike_timm.training.phases import plan_phases
from shike_timm.training.resume import changed_option
from shike_timm_cli import COMMANDS

RECIPES = sorted((ROOT / 'hparams').rglob('*.yaml'))


def write(tmp_path, text):
    path = tmp_path / 'hparams.yaml'
    path.write_text(text)
    return str(path)


def learning_rates(args, stage):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr if stage == 1 else args.crt_lr)
    schedule = create_schedule(optimizer, args, plan_phases(args)[stage - 1])
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


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
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


def test_a_learning_rate_replaces_an_earlier_base_rate(tmp_path):
    def rates(*argv):
        return [phase.lr for phase in plan_phases(parse_train_args(argv))]

    recipe = write(tmp_path, 'lr_base: 0.2\nlr: 5\ncrt_lr_base: 0.4\nbatch_size: 128\n')
    assert rates('--hparams', recipe) == [0.1, 0.2]  # a run's own arguments have both
    assert rates('--hparams', recipe, '--lr', '0.3') == [0.3, 0.2]
    assert rates('--hparams', recipe, '--lr', '0.3', '--crt-lr', '0.7') == [0.3, 0.7]
    assert rates('--hparams', recipe, '--lr-base', '0.3') == [0.15, 0.2]
    (tmp_path / 'own.yaml').write_text('base: hparams.yaml\nlr: 0.6\n')
    assert rates('--hparams', str(tmp_path / 'own.yaml')) == [0.6, 0.2]


def test_a_file_overrides_its_base(tmp_path):
    (tmp_path / 'a.yaml').write_text('epochs: 30\nlr: 0.3\nopt_kwargs: {nesterov: true}\n')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'b.yaml').write_text('base: ../a.yaml\nlr: 0.2\n')
    args = parse_train_args(['--hparams', write(tmp_path, 'base: sub/b.yaml\nbatch_size: 9'), '--seed', '3'])
    assert (args.epochs, args.lr, args.batch_size, args.seed) == (30, 0.2, 9, 3)
    assert args.opt_kwargs == {'nesterov': True}
    read = parse_train_args(['--opt-kwargs', 'betas=(0.9, 0.95)', 'kind=plain']).opt_kwargs
    assert read == dict(betas=[0.9, 0.95], kind='plain')
    own = complete(TrainConfig, check_values(TrainConfig, dict(opt_kwargs=dict(betas=(0.9, 0.95))), ''))
    assert changed_option(own, dict(opt_kwargs=dict(betas=[0.9, 0.95]))) is None


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
    ('learning_rate: 0.1', "unknown key 'learning_rate'."),
    ('hparams: a.yaml', "unknown key 'hparams'"),
    ('epoch: 3', "unknown key 'epoch', the nearest valid one is 'epochs'"),
    ('lr: fast', "'lr' is 'fast', expected a number"),
    ('epochs: 1.5', "'epochs' is 1.5, expected a whole number"),
    ('epochs: true', "'epochs' is True, expected a whole number"),
    ('amp: 1', "'amp' is 1, expected true or false"),
    ('depths: 1', "'depths' is 1, expected a list"),
    ('depths: [1, two]', "'depths' is 'two', expected a whole number"),
    ('depths: [1, null]', "'depths' is None, expected a whole number"),
    ('depths: []', "'depths' is [], expected a list"),
    ('scale: [0.5]', "'scale' is [0.5], expected a list of 2"),
    ('opt_kwargs: 3', "'opt_kwargs' is 3, expected names with values"),
    ('epochs:', "'epochs' is empty"),
    ('epochs: .inf', "'epochs' is inf, expected a whole number"),
    ('seed: 2024-01-01', 'expected a whole number'),
    ('sched: linear', "'sched' is 'linear', expected one of cosine, tanh, step, poly"),
    ('x: 2024-13-45', 'is not valid YAML'),
    ('lr: [0.1', 'is not valid YAML at line 1'),
    ('- lr', 'holds a list, expected lines'),
])
def test_bad_hparams(tmp_path, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_train_args(['--hparams', write(tmp_path, text)])


@pytest.mark.parametrize('argv, message', [
    (['--hparams', 'nowhere.yaml'], "hparams file 'nowhere.yaml' does not exist."),
    (['--hparams', 'quickstar'], "hparams file 'quickstar' does not exist, the nearest valid one is 'quickstart'"),
    (['--epoch', '3'], "'--epoch', the nearest valid one is '--epochs'"),
    (['--class-colour', 'x'], "Unknown argument '--class-colour': "),
    (['--epochs', 'ten'], "--epochs is 'ten', expected a whole number"),
    (['--epochs', '0'], '--epochs 0 is out of range: give at least 1'),
    (['--lr', 'nan'], '--lr nan is out of range'),
    (['--imb-factor', '0.5'], '--imb-factor 0.5 is out of range: give at least 1'),
    (['--drop', '1'], '--drop 1.0 is out of range: give less than 1'),
    (['--opt-kwargs', 'eps'], "'eps' is not of the form KEY=VALUE"),
    (['--scale', '1'], '--scale: expected 2 arguments'),
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
    args = parse_train_args(['--opt', 'adamw', '--opt-eps', '0.25', '--opt-betas', '0.8', '0.9'])
    made = create_optimizer(args, 0.1, model).defaults
    assert made['eps'] == 0.25 and tuple(made['betas']) == (0.8, 0.9)
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


def sample(option):
    """A valid value that is not the default, and the arguments that give it."""
    if option.kind is bool:
        return (True, [option.flag]) if not option.default else (False, [f'--no-{option.flag[2:]}'])
    if option.kind is dict:
        return {'eps': 0.5, 'name': 'x'}, [option.flag, 'eps=0.5', 'name=x']
    if option.choices:
        value = option.choices[-1] if option.choices[-1] != option.default else option.choices[0]
    else:
        value = option.kind(f'{(option.below or 20) - 0.5:g}' if option.kind is float else 31)
    value = value if option.nargs is None else [value] * (2 if option.nargs == '+' else option.nargs)
    return value, [option.flag, *map(str, value if isinstance(value, list) else [value])]


def test_every_option_by_command_line_file_and_keyword(tmp_path):
    """The three ways agree, and each option stands on the card as it is declared to."""
    for name, option in options(TrainConfig).items():
        if name == 'hparams':
            continue
        value, argv = sample(option)
        given = complete(TrainConfig, read_command_line(TrainConfig, '', argv))
        assert getattr(given, name) == value != option.default
        in_file = complete(TrainConfig, dict(hparams=write(tmp_path, yaml.safe_dump({name: value}))))
        assert complete(TrainConfig, check_values(TrainConfig, {name: value}, '')) == replace(in_file, hparams=None)
        assert given == replace(in_file, hparams=None)
        assert (name in card_options(vars(given))) == (option.card != 'never')
    told = card_options(vars(TrainConfig()))
    assert told['lr'] == 0.1 and not {'method', 'tau', 'focal_gamma', 'val_per_class', 'data_dir'} & set(told)


def test_what_a_file_sets_can_be_unset(tmp_path):
    path = write(tmp_path, 'torchcompile: inductor\namp: true\ncrt_epochs: 3\n')
    args = parse_train_args(['--hparams', path, '--no-torchcompile', '--no-amp'])
    assert (args.torchcompile, args.amp, args.crt_epochs) == (None, False, 3)
    assert parse_train_args(['--torchcompile']).torchcompile == 'inductor'
    assert complete(TrainConfig, dict(hparams=path, crt_epochs=None)).crt_epochs is None
    assert parse_train_args(['-c', write(tmp_path, 'pretrained_backbone: true')]).pretrained_backbone == 'default'


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_train_args(['--hparams', 'quickstart']).dataset == 'digits_lt'
    assert parse_train_args(['--hparams', write(tmp_path, 'base: ablation/3_dkf')]).dataset == 'cifar100_lt'
    (tmp_path / 'quickstart').write_text('epochs: 77')  # the working folder goes first
    assert parse_train_args(['--hparams', 'quickstart']).epochs == 77


def test_from_python(tmp_path, tiny_run):
    for given, message in (
            (dict(epoch=3), "train() has an unknown key 'epoch', the nearest valid one is 'epochs'."),
            (dict(class_colour=3), "train() has an unknown key 'class_colour'."),
            (dict(lr='fast'), "train(): 'lr' is 'fast', expected a number"),
            (dict(epochs=0), '--epochs 0 is out of range')):
        with pytest.raises(InputError, match=re.escape(message)):
            shike_timm.train(**given)
    metrics = shike_timm.train(
        hparams=str(tiny_run / 'args.yaml'), output=tmp_path, experiment='again', epochs=2, crt_epochs=0)
    before = yaml.safe_load((tiny_run / 'metrics.json').read_text())['stage_one']
    assert list(metrics) == ['stage_one'] and metrics['stage_one']['top1'] == before['top1']
    result = shike_timm.evaluate(
        model=f'local-dir:{tmp_path}/again/model', dataset='digits_lt', experts=[0, 1, 2], workers=0, device='cpu')
    assert result['top1'] == pytest.approx(before['top1'], abs=0.3)


def test_the_console_script(tmp_path):
    """It lists the commands without importing torch or the package, and runs one under its name."""

    def shike(*argv):
        code = 'import sys, shike_timm_cli as cli; status = cli.main(); print(*sys.modules); sys.exit(status)'
        result = subprocess.run(
            [sys.executable, '-c', code, *argv], cwd=tmp_path, capture_output=True, text=True,
            env=dict(os.environ, PYTHONPATH=str(ROOT)))
        return result.returncode, result.stdout, result.stderr

    status, out, _ = shike('--help')
    assert status == 0 and all(name in out for name in COMMANDS) and not {'torch', 'shike_timm'} & set(out.split())
    status, _, error = shike('tran')
    assert status == 2 and error.startswith("shike: error: 'tran' is not a command") and len(error.splitlines()) == 1
    assert "the nearest one is 'train'" in error
    status, bare, _ = shike()
    assert status == 2 and bare.splitlines()[:-1] == out.splitlines()[:-1]  # The last line lists modules.
    assert shike('--version')[1].startswith(f'shike-timm {shike_timm.__version__}\n')
    status, _, error = shike('eval', '--batchsize', '3')
    assert status == 2 and error.startswith('shike eval: error: ') and len(error.splitlines()) == 1


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command(name, capsys):
    module = importlib.import_module(f"shike_timm.cli.{name.replace('-', '_')}")
    with pytest.raises(SystemExit):
        getattr(module, f"parse_{name.split('-')[0]}_args")(['--help'])
    text = capsys.readouterr().out
    assert COMMANDS[name][1:] in ' '.join(text.split())
    assert all(option.flag in text or option.positional for option in options(module.CONFIG).values())


def test_the_page_of_options_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs')
    assert (ROOT / 'docs' / 'options.md').read_text() == importlib.import_module('options').page()


def test_every_package_is_in_the_wheel():
    tomllib = pytest.importorskip('tomllib')
    declared = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
    found = {'.'.join(path.parent.relative_to(ROOT).parts) for path in (ROOT / 'shike_timm').rglob('__init__.py')}
    assert set(declared) == found | {'shike_timm.hparams'}


def test_autocast_defaults(caplog):
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    assert resolve_autocast(parse_train_args([]), cpu) is None and not caplog.text
    assert resolve_autocast(parse_train_args(['--amp-dtype', 'bfloat16']), cpu) is None
    assert '--amp-dtype bfloat16 does nothing without --amp' in caplog.text
    assert resolve_autocast(parse_train_args(['--amp']), cuda) == torch.float16
    assert resolve_autocast(parse_train_args(['--amp', '--amp-dtype', 'bfloat16']), cuda) == torch.bfloat16
    with pytest.raises(InputError, match='--amp-dtype float16 needs loss scaling'):
        resolve_autocast(parse_train_args(['--amp', '--amp-dtype', 'float16']), cpu)


def test_mixup_needs_soft_targets():
    args = parse_train_args(['--cutmix', '1', '--mixup-mode', 'pair', '--alpha', '0'])
    assert mixup_options(args, args, 10, plan_phases(args)[0].indices_only)['cutmix_alpha'] == 1
    assert mixup_options(parse_train_args([]), parse_train_args([]), 10) is None
    args = parse_train_args(['--mixup', '0.2'])
    one, two = plan_phases(args)
    assert mixup_options(args, args, 10, two.indices_only)['num_classes'] == 10  # balanced softmax takes soft targets
    with pytest.raises(InputError, match='--mixup 0.2 mixes labels'):
        mixup_options(args, args, 10, one.indices_only)
    with pytest.raises(InputError, match='--batch-size 3 is odd'):
        odd = parse_train_args(['--mixup', '0.2', '--alpha', '0', '--batch-size', '3'])
        mixup_options(odd, odd, 10)


def test_retraining_on_other_data_takes_no_option_of_the_data_before(tmp_path, tiny_run):
    checkpoint = load_checkpoint(tiny_run / 'stage_one' / 'last.pth.tar')
    vars(checkpoint['args']).update(dataset='', target_key='species', val_split='other', crt_lr=0.3)
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    args, _ = parse_retrain_args(
        ['--checkpoint', str(tmp_path / 'last.pth.tar'), '--num-classes', '9', '--dataset', 'digits_lt'])
    assert (args.target_key, args.val_split, args.crt_lr) == (None, 'validation', 0.3)


def test_retraining_takes_the_arguments_of_the_checkpoint(tmp_path, tiny_run):
    args, checkpoint = parse_retrain_args(
        ['--checkpoint', str(tiny_run), '--crt-lr', '0.4', '--hparams', write(tmp_path, 'seed: 7')])
    assert (args.dataset, args.lr, args.crt_lr, args.seed) == ('digits_lt', 0.05, 0.4, 7)
    assert (args.experiment, args.device, args.output) == ('', None, 'output/train')
    assert checkpoint['args'].lr == 0.05


def test_saved_arguments_are_hparams(tiny_run):
    args = parse_train_args(['--hparams', str(tiny_run / 'args.yaml')])
    saved = yaml.safe_load((tiny_run / 'args.yaml').read_text())
    assert saved['dataset'] == 'digits_lt'
    assert {key: value for key, value in vars(args).items() if key not in ('hparams', 'resume')} == saved


@pytest.mark.parametrize('value', ['pipe:touch ran', 'a.tar::pipe:touch ran', 'http://127.0.0.1/{0..1}.tar', 's3://x/y'])
def test_a_file_starts_no_process_and_opens_no_address(tmp_path, tiny_run, value):
    """What a stranger hands over, an hparams file or a run, names no such split; the command line may."""
    path = write(tmp_path, yaml.safe_dump(dict(dataset='wds/x', val_split=value)))
    with pytest.raises(InputError, match=f"'val_split' is '{re.escape(value)}', but a file may not .*--val-split"):
        parse_train_args(['--hparams', path])
    for argv in (['--hparams', path, '--val-split', value], ['--val-split', value]):
        assert parse_train_args(argv).val_split == value
    checkpoint = load_checkpoint(tiny_run / 'stage_one' / 'last.pth.tar')
    vars(checkpoint['args']).update(dataset='wds/x', val_split=value)
    (tmp_path / 'run' / 'stage_one').mkdir(parents=True)
    torch.save(checkpoint, tmp_path / 'run' / 'stage_one' / 'last.pth.tar')
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(dict(dataset='wds/x', val_split=value)))
    for parse, argv in ((parse_retrain_args, ['--checkpoint', str(tmp_path / 'run')]),
                        (parse_train_args, ['--resume', str(tmp_path / 'run')])):
        with pytest.raises(InputError, match='but a file may not'):
            parse(argv)
