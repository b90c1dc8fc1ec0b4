"""Arguments of the scripts: timm's names, with defaults overridden by an hparams file and that by the command line."""
import argparse
import difflib
import os
from pathlib import Path
from typing import Any, Callable, Dict, NoReturn, Optional, Sequence, Set

import yaml
from timm.utils import ParseKwargs

from .errors import InputError

__all__ = [
    'parse_benchmark_args', 'parse_eval_args', 'parse_export_args', 'parse_publish_args', 'parse_retrain_args',
    'parse_train_args',
]


class _Parser(argparse.ArgumentParser):
    """Reports bad input as an InputError of one sentence."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.nullable: Optional[Set[str]] = None  # options that are unset by default

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message[0].upper()}{message[1:]}: see --help.')

    def parse(self, argv: Optional[Sequence[str]]) -> argparse.Namespace:
        try:
            args, unknown = self.parse_known_args(argv)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f'An argument is not of the form KEY=VALUE ({error}): see --help.') from error
        if unknown:
            nearest = _nearest(unknown[0].split('=')[0], self._option_string_actions)
            raise InputError(f"Unknown argument '{unknown[0]}'{nearest}: see --help.")
        return args

    def set_checked_defaults(self, values: Dict[Any, Any], source: str) -> None:
        """Override defaults with values from `source`, each of which must name an option and have its type."""
        actions = {action.dest: action for action in self._actions if action.dest not in ('help', 'hparams')}
        if self.nullable is None:
            self.nullable = {name for name, action in actions.items() if action.default is None}
        checked = {}
        for key, value in values.items():
            name = str(key).replace('-', '_')
            if name not in actions:
                raise InputError(f"{source} has an unknown key '{key}'{_nearest(name, actions)}.")
            where = f"{source}: '{key}'"
            if value is None and name not in self.nullable:
                raise InputError(f'{where} is empty, expected a value.')
            checked[name] = None if value is None else _check_value(actions[name], value, where)
        self.set_defaults(**checked)


def _nearest(name: str, valid) -> str:
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0)
    return f", the nearest valid one is '{matches[0]}'" if matches else ''


def _check_value(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(action, (argparse.BooleanOptionalAction, argparse._StoreTrueAction)):
        if not isinstance(value, bool):
            raise InputError(f'{where} is {value!r}, expected true or false.')
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise InputError(f'{where} is {value!r}, expected a mapping of names to values.')
        return value
    if action.nargs == '+' or isinstance(action.nargs, int):
        if not isinstance(value, list) or not value or action.nargs not in ('+', len(value)):
            length = '' if action.nargs == '+' else f' of {action.nargs}'
            raise InputError(f'{where} is {value!r}, expected a list{length}.')
        return [_check_scalar(action, item, where) for item in value]
    return _check_scalar(action, value, where)


def _check_scalar(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type or str
    expected = {int: 'a whole number', float: 'a number', str: 'text'}[kind]
    wrong = isinstance(value, (bool, list, dict)) or (kind is int and isinstance(value, float))
    try:
        # A YAML string is converted as a command line would, since YAML reads 5e-4 as text.
        converted = kind(value)
    except (ValueError, TypeError, OverflowError):
        wrong = True
    if wrong:
        raise InputError(f'{where} is {value!r}, expected {expected}.')
    if action.choices is not None and converted not in action.choices:
        raise InputError(f"{where} is {value!r}, expected one of {', '.join(map(str, action.choices))}.")
    return converted


def _read_hparams(path: str) -> Dict[Any, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise InputError(f"hparams file '{path}' does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"hparams file '{path}' cannot be read: {error}.") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, 'problem_mark', None)
        line = f' at line {mark.line + 1}' if mark else ''
        problem = ' '.join(str(getattr(error, 'problem', error)).split())
        raise InputError(f"hparams file '{path}' is not valid YAML{line}: {problem}.") from error
    if not isinstance(values or {}, dict):
        raise InputError(f"hparams file '{path}' holds a {type(values).__name__}, expected lines of 'name: value'.")
    return values or {}


def _read_hparams_chain(path: str) -> Dict[str, Dict[Any, Any]]:
    """Values by hparams file: those of the file that `base` names first, then the file's own, which override them."""
    chain: Dict[str, Dict[Any, Any]] = {}
    while path:
        if os.path.normpath(path) in map(os.path.normpath, chain):
            raise InputError(f"hparams file '{path}' has itself among its bases: name another as 'base'.")
        values = chain[path] = _read_hparams(path)
        base = values.pop('base', None)
        if base is not None and not (isinstance(base, str) and base):
            raise InputError(f"hparams file '{path}': 'base' is {base!r}, expected the path of another hparams file.")
        path = os.path.join(os.path.dirname(path), base) if base else ''
    return dict(reversed(chain.items()))


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Data')
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data')
    group.add_argument(
        '--dataset', default='', metavar='NAME',
        help="cifar10_lt, cifar100_lt, digits_lt, a name of timm's, or none for a folder of images")
    group.add_argument('--val-split', default='validation', metavar='NAME', help='split to evaluate on')
    group.add_argument('--dataset-download', action='store_true', help='download the data where possible')
    group.add_argument(
        '--imb-factor', type=float, default=100., metavar='N',
        help='imbalance factor of the *_lt data sets, largest over smallest class')
    group.add_argument(
        '--imb-type', default='exp', choices=['exp', 'step'], help='profile of the *_lt data sets')
    group.add_argument('--img-size', type=int, metavar='N', help="side of the images, the model's own by default")
    group.add_argument('--crop-pct', type=float, metavar='N', help='centre crop at evaluation')
    group.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='channel means, of images in 0..1')
    group.add_argument('--std', type=float, nargs='+', metavar='STD', help='channel standard deviations')
    group.add_argument(
        '--interpolation', choices=['nearest', 'bilinear', 'bicubic', 'lanczos'], help='interpolation at evaluation')


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument('--device', metavar='NAME', help='cuda where there is one, else cpu')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Training data')
    group.add_argument('--train-split', default='train', metavar='NAME', help='split to train on')
    group.add_argument(
        '--holdout', type=float, default=0., metavar='SHARE',
        help='keep this share of each class of a *_lt training set out of training and evaluate on it, to choose '
        'settings without looking at the test split')
    group.add_argument(
        '--val-per-class', type=int, default=0, metavar='N',
        help='set the last N training images of each class of a *_lt set aside before its long-tailed subset is cut, '
        'and evaluate on them')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='images a training batch')
    group.add_argument(
        '-vb', '--validation-batch-size', type=int, default=256, metavar='N', help='images an evaluation batch')
    group.add_argument(
        '--device-data', action=argparse.BooleanOptionalAction,
        help='keep the data on the device and augment it there in large batches rather than in worker processes; '
        'by default where the data set (*_lt, torch/cifar*) and the augmentation allow it')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='resnet50_shike', metavar='NAME', help='registered SHIKE model')
    group.add_argument('--backbone', metavar='NAME', help="timm's network to split, for --model shike")
    group.add_argument(
        '--pretrained-backbone', nargs='?', const='default', metavar='TAG|FILE',
        help="start trunk and experts from timm's weights: its default ones, those of a tag, or a file")
    group.add_argument(
        '--freeze-trunk', action='store_true', help='keep the shared stages as they are, BatchNorm in eval mode')
    group.add_argument('--num-classes', type=int, metavar='N', help='classes, those of the data by default')
    group.add_argument('--num-experts', type=int, metavar='N', help='experts')
    group.add_argument(
        '--depths', type=int, nargs='+', metavar='N', help='shared stage each expert fuses, from 1 at the shallowest')
    group.add_argument(
        '--fusion', action=argparse.BooleanOptionalAction, help='fuse shared features; off is a mixture of experts')
    group.add_argument(
        '--fusion-type', choices=['product', 'residual'],
        help='product (the paper), or residual, which starts as the backbone: the default with --pretrained-backbone')
    group.add_argument('--classifier', choices=['cosine', 'linear'], help='kind of classifier')
    group.add_argument('--aligner', choices=['conv', 'bottleneck'], help='kind of aligner')
    group.add_argument('--drop', type=float, metavar='RATE', help='dropout rate')
    group.add_argument('--drop-path', type=float, metavar='RATE', help='stochastic depth rate')
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute activations to save memory')

    group = parser.add_argument_group('Loss of stage one')
    group.add_argument(
        '--method', default='shike', metavar='NAME',
        help='shike, ce, balanced_softmax, logit_adjusted, focal or ldam_drw')
    group.add_argument(
        '--trunk-grad', choices=['sum', 'mean'], default='sum',
        help="the gradients that experts send into the shared stages: their sum, or their mean")
    group.add_argument('--tau', type=float, default=1., metavar='T', help='strength of logit_adjusted')
    group.add_argument('--focal-gamma', type=float, default=2., metavar='G', help='exponent of focal')
    group.add_argument('--alpha', type=float, default=0.1, help='weight of dynamic knowledge transfer')
    group.add_argument('--beta', type=float, default=0.01, help='weight of mutual distillation')
    group.add_argument(
        '--detach-teacher', action='store_true',
        help='stop gradients through the teacher of dynamic knowledge transfer')
    group.add_argument(
        '--kd-model-name', metavar='NAME',
        help='trained model of the same classes whose logits every expert learns as well: a registered name, '
        'local-dir:RUN/model or hf-hub:USER/NAME')
    group.add_argument(
        '--distill-loss-weight', type=float, default=1., metavar='W', help='weight of what --kd-model-name teaches')
    group.add_argument(
        '--kd-temperature', type=float, default=4., metavar='T', help='temperature of what --kd-model-name teaches')

    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='momentum', metavar='NAME', help="timm's optimizer name")
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    group.add_argument('--weight-decay', type=float, default=5e-4, metavar='W', help='weight decay')
    group.add_argument(
        '--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='further arguments of timm.optim.create_optimizer_v2')
    group.add_argument('--layer-decay', type=float, metavar='D', help='factor of the learning rate from layer to layer')
    group.add_argument('--clip-grad', type=float, metavar='N', help='clip gradients')
    group.add_argument('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='how to clip')

    group = parser.add_argument_group('Schedule')
    group.add_argument(
        '--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'], help='schedule after the warm-up')
    group.add_argument('--epochs', type=int, default=180, metavar='N', help='epochs of stage one, warm-up included')
    group.add_argument('--lr', type=float, default=0.1, metavar='LR', help='peak learning rate of stage one')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='linear warm-up of stage one')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate at the start')
    group.add_argument('--min-lr', type=float, default=0., metavar='LR', help='learning rate the schedule ends at')
    group.add_argument('--decay-epochs', type=float, default=90., metavar='N', help='epochs between steps')
    group.add_argument('--decay-rate', type=float, default=0.1, metavar='RATE', help='factor of a step, power of poly')
    group.add_argument(
        '--crt-epochs', type=int, metavar='N',
        help='epochs of stage two, classifier retraining, warm-up included; 0 for none, 20 by default for shike')
    group.add_argument('--crt-lr', type=float, default=0.1, metavar='LR', help='peak learning rate of stage two')
    group.add_argument('--crt-warmup-epochs', type=int, default=0, metavar='N', help='linear warm-up of stage two')
    group.add_argument('--crt-warmup-lr', type=float, default=1e-5, metavar='LR', help='as --warmup-lr, for stage two')

    group = parser.add_argument_group('Augmentation')
    group.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    group.add_argument(
        '--train-crop-mode', choices=['rrc', 'rkrc', 'rkrr', 'pad'],
        help="timm's crop modes, or pad: a random crop after padding by 1/8 of the side")
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.], metavar='PCT', help='area of rrc')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='R', help='aspect of rrc')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='horizontal flip probability')
    group.add_argument('--vflip', type=float, default=0., metavar='P', help='vertical flip probability')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='N', help='colour jitter, off with --aa')
    group.add_argument(
        '--aa', metavar='NAME', help="cifar10 (torchvision's AutoAugment policy), or timm's: original, rand-m9-mstd0.5")
    group.add_argument('--cutout', type=int, default=0, metavar='N', help='side of a square to blacken')
    group.add_argument('--reprob', type=float, default=0., metavar='P', help='random erasing probability')
    group.add_argument('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='random erasing fill')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='random erasing regions')
    group.add_argument('--mixup', type=float, default=0., metavar='A', help='Mixup alpha; needs --alpha 0')
    group.add_argument('--cutmix', type=float, default=0., metavar='A', help='CutMix alpha; needs --alpha 0')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='P', help='probability of Mixup or CutMix')
    group.add_argument(
        '--mixup-switch-prob', type=float, default=0.5, metavar='P', help='probability of CutMix where both are on')
    group.add_argument('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='how to mix')
    group.add_argument(
        '--train-interpolation', default='random', choices=['random', 'bilinear', 'bicubic'],
        help='interpolation in training')

    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='N', help='random seed')
    group.add_argument('--amp', action=argparse.BooleanOptionalAction, default=False, help='mixed precision')
    group.add_argument(
        '--amp-dtype', choices=['float16', 'bfloat16'],
        help='by default float16 on CUDA, and bfloat16 on a CPU that has instructions for it, else float32')
    group.add_argument(
        '--channels-last', action=argparse.BooleanOptionalAction, default=False, help='channels_last memory layout')
    group.add_argument(
        '--no-torchcompile', dest='torchcompile', action='store_const', const=None, help='do not compile')
    group.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the forward and backward of stage one, with inductor or the named backend')
    group.add_argument(
        '--torchcompile-mode', metavar='MODE',
        help='mode of torch.compile: reduce-overhead (CUDA graphs), max-autotune, ...')
    group.add_argument('--model-ema', action='store_true', help='keep and evaluate an average of the weights')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='decay of the average')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='steps between log lines')
    group.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between evaluations')
    group.add_argument('--checkpoint-hist', type=int, default=2, metavar='N', help='checkpoints kept of each stage')
    group.add_argument('--output', default='output/train', metavar='DIR', help='folder of run folders')
    group.add_argument(
        '--experiment', default='', metavar='NAME', help='name of the run folder; time and model by default')


def _add_checkpoint(parser: _Parser) -> None:
    parser.add_argument('--checkpoint', metavar='FILE', help="checkpoint of train.py, or of the authors' CIFAR code")
    parser.add_argument(
        '--authors-classifiers', default='rt_classifiers', choices=['rt_classifiers', 'classifiers'],
        help="which of the two sets in a checkpoint of the authors' code: the retrained ones or those of stage one")
    parser.add_argument('--experts', type=int, nargs='+', metavar='N', help='experts to keep, counted from 0')


def _parser(description: str) -> _Parser:
    parser = _Parser(description=description)
    parser.add_argument(
        '-c', '--config', '--hparams', dest='hparams', metavar='FILE',
        help="YAML file of defaults for these arguments, over those of the file it names as 'base'")
    return parser


def _check_ranges(args: argparse.Namespace) -> argparse.Namespace:
    at_least = dict(
        batch_size=1, validation_batch_size=1, epochs=1, crt_epochs=0, warmup_epochs=0, crt_warmup_epochs=0,
        num_warm_iter=1, num_bench_iter=1, num_rounds=1,
        log_interval=1, val_interval=1, checkpoint_hist=1, workers=0, seed=0, num_classes=1, img_size=1, cutout=0,
        val_per_class=0, focal_gamma=0,
        lr=0, crt_lr=0, warmup_lr=0, crt_warmup_lr=0, min_lr=0, weight_decay=0, drop=0, drop_path=0,
        layer_decay=0, decay_epochs=1, crop_pct=0.01, distill_loss_weight=0, kd_temperature=0.01)
    for name, low in at_least.items():
        value = getattr(args, name, None)
        if value is not None and not value >= low:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range: give at least {low}.")
    for name in ('drop', 'drop_path'):
        if getattr(args, name, None) and getattr(args, name) >= 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: give less than 1.")
    if not 0 <= getattr(args, 'holdout', 0) < 1:
        raise InputError(f'--holdout {args.holdout:g} is out of range: give a share from 0 to less than 1.')
    return args


def _parse(parser: _Parser, argv: Optional[Sequence[str]], hparams: Optional[str]) -> argparse.Namespace:
    for path, values in _read_hparams_chain(hparams).items() if hparams else ():
        parser.set_checked_defaults(values, f"hparams file '{path}'")
    return _check_ranges(parser.parse(argv))


def run_folder(args: argparse.Namespace) -> Optional[str]:
    """The run folder to resume: the folder of `--resume PATH`, or of `--experiment` where no path was given.

    Raises:
        InputError: If no folder was named.
    """
    if args.resume is None:
        return None
    if args.resume:
        path = os.path.normpath(args.resume)
        # RUN, or RUN/stage_one/last.pth.tar
        return os.path.dirname(os.path.dirname(path)) if os.path.isfile(path) else path
    if not args.experiment:
        raise InputError('--resume without a path needs --experiment NAME, the run folder to go on with.')
    return os.path.join(args.output, args.experiment)


def parse_train_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of train.py.

    A resumed run takes its own `args.yaml` as hparams file unless another is given.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    parser = _parser('Train SHIKE: stage one, then classifier retraining.')
    _add_data(parser)
    _add_training(parser)
    _add_device(parser)
    parser.add_argument(
        '--resume', nargs='?', const='', metavar='RUN',
        help='go on with a run: its folder, a checkpoint in it, or alone with --experiment')
    first = parser.parse(argv)
    hparams = first.hparams
    folder = run_folder(first)
    if folder and not hparams and os.path.isfile(os.path.join(folder, 'args.yaml')):
        hparams = os.path.join(folder, 'args.yaml')
    return _parse(parser, argv, hparams)


def parse_retrain_args(
        argv: Optional[Sequence[str]] = None,
        saved_args: Callable[[str], Dict[str, Any]] = lambda checkpoint: {},
) -> argparse.Namespace:
    """Arguments of retrain_classifier.py.

    Args:
        argv: Command line, that of the process by default.
        saved_args: From `--checkpoint` to the arguments it was trained with, which are the defaults of stage two.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    parser = _parser('Retrain the classifiers of a stage-one checkpoint: stage two alone.')
    parser.add_argument(
        '--checkpoint', required=True, metavar='RUN', help='run folder of train.py, or a checkpoint of its stage one')
    _add_data(parser)
    _add_training(parser)
    _add_device(parser)
    first = parser.parse(argv)
    own = {action.dest for action in parser._actions} - {'output', 'experiment', 'hparams', 'checkpoint', 'device'}
    saved = {key: value for key, value in saved_args(first.checkpoint).items() if key in own}
    parser.set_checked_defaults(saved, f"checkpoint '{first.checkpoint}'")
    return _parse(parser, argv, first.hparams)


def parse_eval_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of eval.py.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    parser = _parser('Evaluate a SHIKE model on many-, medium- and few-shot classes.')
    parser.add_argument(
        '--model', metavar='NAME', help='local-dir:RUN/model, hf-hub:USER/NAME, or a registered name')
    parser.add_argument('--pretrained', action='store_true', help="load a registered name's published weights")
    _add_checkpoint(parser)
    parser.add_argument(
        '--expert-subsets', action='store_true', help='also tell accuracy and cost of every choice of experts')
    parser.add_argument(
        '--flip', action='store_true', help='average the logits with those of the mirrored images, at twice the cost')
    parser.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='images a batch')
    parser.add_argument('--results-file', metavar='FILE', help='JSON file to write the metrics to')
    _add_data(parser)
    _add_device(parser)
    first = parser.parse(argv)
    return _parse(parser, argv, first.hparams)


def parse_benchmark_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of benchmark.py: those of train.py, which decide what is timed, and a few of its own.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    parser = _parser('Time training and inference; without a data set, on noise.')
    parser.add_argument(
        '--bench', default='both', choices=['both', 'train', 'inference'], help='what to time')
    parser.add_argument('--stage', type=int, default=1, choices=[1, 2], help='stage whose training step is timed')
    parser.add_argument(
        '--compare', nargs='+', default=[], metavar='NAME',
        help="timm's models to time beside it, turn by turn, on noise of the same size")
    parser.add_argument('--num-warm-iter', type=int, default=10, metavar='N', help='steps before timing')
    parser.add_argument(
        '--num-bench-iter', type=int, metavar='N', help='steps of a round; an epoch of data or 40 on noise by default')
    parser.add_argument('--num-rounds', type=int, default=5, metavar='N', help='rounds, of which the median counts')
    parser.add_argument('--results-file', metavar='FILE', help='JSON file to write the figures to')
    _add_data(parser)
    _add_training(parser)
    _add_device(parser)
    first = parser.parse(argv)
    return _parse(parser, argv, first.hparams)


def parse_publish_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of publish.py.

    Raises:
        InputError: If an argument is wrong.
    """
    parser = _Parser(description='Publish a trained model and its card to the Hugging Face Hub.')
    parser.add_argument('model', metavar='RUN', help='run folder of train.py, or a model folder such as RUN/model')
    parser.add_argument('--repo-id', required=True, metavar='USER/NAME', help='name on the Hub')
    parser.add_argument('--private', action='store_true', help='make the repository private')
    parser.add_argument('--update', action='store_true', help='replace what is already published there')
    parser.add_argument(
        '--license', metavar='ID', help="license on the card, such as mit; by default that of the backbone's weights")
    return parser.parse(argv)


def parse_export_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of export.py.

    Raises:
        InputError: If an argument or a line of the hparams file is wrong.
    """
    parser = _parser('Export a model to a file that runs without this package.')
    parser.add_argument(
        '--model', metavar='NAME', help='local-dir:RUN/model, hf-hub:USER/NAME, or a registered name')
    parser.add_argument('--pretrained', action='store_true', help="load a registered name's published weights")
    _add_checkpoint(parser)
    parser.add_argument(
        '--format', default='onnx', choices=['onnx', 'torchscript', 'torch-export'], help='format to write')
    parser.add_argument('--opset', type=int, metavar='N', help="version of ONNX's operators, torch's choice by default")
    parser.add_argument('--img-size', type=int, metavar='N', help="side of the images, the model's own by default")
    parser.add_argument('--output', metavar='DIR', help='folder to write, exported/NAME-FORMAT by default')
    first = parser.parse(argv)
    return _parse(parser, argv, first.hparams)
