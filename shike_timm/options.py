"""Options of the commands: each fact of one stands here, or beside the one command that has it."""
import argparse
import ast
import copy
import os
from dataclasses import dataclass
from typing import Any, Dict, NoReturn, Optional, Sequence, Tuple

from .config import read_hparams
from .errors import InputError, nearest

__all__ = [
    'Group', 'Option', 'card_options', 'changed_option', 'check_values', 'complete', 'defaults', 'parse_args',
    'read_command_line', 'run_folder',
]

_KINDS = {int: 'a whole number', float: 'a number', str: 'text', bool: 'true or false', dict: 'names with values'}


def _plain(value: Any) -> Any:
    """A value as a file has it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: Its name in hparams files, in `args.yaml` and in Python; its flag has hyphens.
        kind: Type of the value, or of each item of a list: int, float, str, dict (KEY=VALUE KEY=VALUE), or bool,
            whose flag has a twin that begins with `--no-`.
        default: Its value where none is given. Where that is None, it may be set to None.
        help: What it is, on a line.
        metavar: What stands for the value in the help, where the kind does not say enough.
        choices: All values there are.
        nargs: Length of a list, '+' for any but none.
        const: Value of the flag alone; its twin with `--no-` gives None.
        low: Least value.
        below: What the value must be less than.
        flags: Further flags.
        required: Whether it must be given.
        positional: Whether it is given without a flag.
        may_change: Whether a resumed run may have another value than it began with.
        card: Whether a model's card tells it: 'always', where it was 'changed' from its default, or 'never'.
    """

    name: str
    kind: Any
    default: Any
    help: str
    metavar: Optional[str] = None
    choices: Optional[Sequence[Any]] = None
    nargs: Any = None
    const: Optional[str] = None
    low: Optional[float] = None
    below: Optional[float] = None
    flags: Sequence[str] = ()
    required: bool = False
    positional: bool = False
    may_change: bool = False
    card: str = 'always'

    @property
    def flag(self) -> str:
        return '--' + self.name.replace('_', '-')

    @property
    def placeholder(self) -> str:
        """What stands for the value, such as `N` or `{exp,step}`."""
        if self.choices:
            return '{' + ','.join(map(str, self.choices)) + '}'
        return self.metavar or {int: 'N', float: 'X', str: 'NAME', dict: 'KEY=VALUE'}[self.kind]

    @property
    def shown_default(self) -> str:
        """The default as on the command line, empty where it says nothing."""
        if self.kind in (bool, dict) or self.default is None:
            return ''
        return ' '.join(f'{item:g}' if self.kind is float else str(item) for item in _items(self.default))

    def check(self, value: Any, where: str) -> Any:
        """The value in its type, from the command line, a file or Python; `where` begins the message.

        Raises:
            InputError: If it has another type, or is not one of the choices.
        """
        if value is None and self.default is None and not self.required:
            return None
        if value is None:
            raise InputError(f'{where} is empty, expected a value.')
        if value is True and self.const is not None:
            return self.const  # in a file or in Python, the flag alone
        if self.kind in (bool, dict):
            if not isinstance(value, self.kind):
                raise InputError(f'{where} is {value!r}, expected {_KINDS[self.kind]}.')
            return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
        if self.nargs is None:
            return self._check_item(value, where)
        if not isinstance(value, (list, tuple)) or not value or self.nargs not in ('+', len(value)):
            length = '' if self.nargs == '+' else f' of {self.nargs}'
            raise InputError(f'{where} is {value!r}, expected a list{length}.')
        return [self._check_item(item, where) for item in value]

    def _check_item(self, value: Any, where: str) -> Any:
        try:
            converted = self.kind(value)  # also of text, since YAML reads 5e-4 as such
        except (ValueError, TypeError, OverflowError):
            converted = None
        whole = self.kind is not int or not isinstance(value, float)
        if converted is None or value is None or isinstance(value, (bool, list, dict)) or not whole:
            raise InputError(f'{where} is {value!r}, expected {_KINDS[self.kind]}.')
        if self.choices and converted not in self.choices:
            raise InputError(f"{where} is {value!r}, expected one of {', '.join(map(str, self.choices))}.")
        return converted

    def check_range(self, value: Any) -> None:
        """Check that a value is not too small or too large.

        Raises:
            InputError: If it is.
        """
        for item in () if value is None else _items(value):
            if self.low is not None and not item >= self.low:
                raise InputError(f'{self.flag} {item} is out of range: give at least {self.low:g}.')
            if self.below is not None and not item < self.below:
                raise InputError(f'{self.flag} {item} is out of range: give less than {self.below:g}.')


class Group:
    """Options that belong together, under a title."""

    def __init__(self, title: str, *options: Option):
        self.title, self.options = title, options


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _by_name(groups: Sequence[Group]) -> Dict[str, Option]:
    return {option.name: option for group in groups for option in group.options}


HPARAMS = Group('Configuration', Option(
    'hparams', str, None, "YAML file of values for these options, over those of the file it names as 'base'; or the "
    "name of one of the package's recipes, such as quickstart", 'FILE', flags=('-c', '--config'), may_change=True,
    card='never'))

RESUME = Group('Resuming', Option(
    'resume', str, None, 'go on with a run: its folder, a checkpoint in it, or alone with --experiment, '
    'which begins the run where there is none', 'RUN',
    const='', may_change=True, card='never'))

DATA = Group(
    'Data',
    Option('data_dir', str, None, 'folder of the data, or a tar archive', 'DIR', may_change=True, card='never'),
    Option(
        'dataset', str, '', "cifar10_lt, cifar100_lt, digits_lt, imagenet_lt, inat2018, places_lt, a name of timm's, "
        'or none for a folder or archive of images and for lists'),
    Option('val_split', str, 'validation', 'split to evaluate on; the default stands for val and test too'),
    Option(
        'val_list', str, None, 'list of the images to evaluate on, with paths below --data-dir: lines of a path and a '
        "label, .csv or .tsv with a header, or COCO's .json", 'FILE', card='changed'),
    Option(
        'input_key', str, None, "column of the images in tables, and in timm's data sets; path, image, filename, "
        'file_name or file by default', 'COLUMN', card='changed'),
    Option(
        'target_key', str, None, 'column of the labels likewise; label, target, class or category by default',
        'COLUMN', card='changed'),
    Option(
        'class_map', str, None, 'names of the classes in label order, one a line; others are left out', 'FILE',
        card='changed'),
    Option(
        'class_depth', int, None, 'folders below the split whose names make the class; by default what is evident',
        low=1, card='changed'),
    Option(
        'class_stats', str, None, "class counts of a training stream, in timm's format; its class_names, where there "
        'are any, name the labels of streams', 'FILE', card='never'),
    Option('val_num_samples', int, None, 'images of an evaluation stream', low=1, card='never'),
    Option(
        'check_images', bool, None, 'read all images once before anything else and leave out what cannot be read; by '
        'default of up to 100,000 images', may_change=True, card='never'),
    Option(
        'dataset_download', bool, False, 'download the data where possible', may_change=True, card='never'),
    Option('imb_factor', float, 100., 'imbalance factor of the *_lt data sets, largest over smallest class'),
    Option('imb_type', str, 'exp', 'profile of the *_lt data sets', choices=('exp', 'step')),
    Option(
        'imb_seed', int, None, 'seed of the images that a *_lt set keeps, drawn as LDAM-DRW and its successors draw '
        'them; by default the first of each class', low=0, card='changed'),
)

SHOT_DIVISIONS = Group(
    'Shot divisions',
    Option('many_shot', int, 100, 'a class with more training images is one of many', low=0, card='changed'),
    Option('few_shot', int, 20, 'a class with fewer training images is one of few', low=0, card='changed'),
)

# What a model trained with other images than its configuration says was trained with.
PREPROCESSING = Group(
    'Preprocessing',
    Option('img_size', int, None, "side of the images, the model's own by default", low=1),
    Option('input_size', int, None, 'channels, height and width of the images', nargs=3, low=1, card='changed'),
    Option('in_chans', int, None, 'channels of the images, 1 or 3', low=1, card='changed'),
    Option('exif', bool, None, 'turn images as their EXIF orientation says', card='changed'),
    Option(
        'pixel_range', float, None, 'values of images of more than 8 bits that become black and white, in place of '
        'the range of their type', 'X', nargs=2, card='changed'),
    Option('crop_pct', float, None, 'centre crop at evaluation', low=0.01, card='changed'),
    Option('mean', float, None, 'channel means, of images in 0..1', nargs='+', card='changed'),
    Option('std', float, None, 'channel standard deviations', nargs='+', card='changed'),
    Option(
        'interpolation', str, None, 'interpolation at evaluation',
        choices=('nearest', 'bilinear', 'bicubic', 'lanczos'), card='changed'),
)

DEVICE = Group(
    'Device',
    Option('device', str, None, 'cuda where there is one, else cpu', may_change=True, card='never'),
    Option('workers', int, 4, 'data loading processes', low=0, flags=('-j',), may_change=True, card='never'),
)

TRAINING_DATA = Group(
    'Training data',
    Option('train_split', str, 'train', 'split to train on'),
    Option(
        'train_list', str, None, 'list of the images to train on, as --val-list', 'FILE', card='changed'),
    Option('train_num_samples', int, None, 'images of a training stream', low=1, card='never'),
    Option(
        'holdout', float, 0., 'keep this share of each class of the training set out of training and evaluate on it; '
        '0.2 where there is nothing else to evaluate on', 'SHARE', low=0, below=1, card='changed'),
    Option(
        'group_key', str, None, 'column, or regular expression to find in paths, that names the group of an image; '
        '--holdout keeps groups together', 'REGEX|COLUMN', card='changed'),
    Option(
        'val_per_class', int, 0, 'set the last N training images of each class of a *_lt set aside before its '
        'long-tailed subset is cut, and evaluate on them', low=0, card='changed'),
    Option('batch_size', int, 128, 'images a training batch of each process', low=1, flags=('-b',)),
    Option(
        'grad_accum_steps', int, 1, 'batches of an update, whose gradients are added up', low=1, card='changed'),
    Option(
        'validation_batch_size', int, None, 'images an evaluation batch, as many as a training batch by default',
        low=1, flags=('-vb',), may_change=True, card='never'),
    Option(
        'device_data', bool, None, 'keep the data on the device and augment it there in large batches rather than in '
        'worker processes; by default where the data set (*_lt, torch/cifar*) and the augmentation allow it',
        card='changed'),
)

MODEL = Group(
    'Model',
    Option('model', str, 'resnet50_shike', 'registered SHIKE model'),
    Option('backbone', str, None, "timm's network to split, for --model shike"),
    Option(
        'pretrained_backbone', str, None, "start trunk and experts from timm's weights: its default ones, those of a "
        'tag, or a file', 'TAG|FILE', const='default'),
    Option(
        'initial_checkpoint', str, None, 'start from a SHIKE model of any classes: a run folder, a checkpoint, '
        'local-dir:RUN/model or hf-hub:USER/NAME; classifiers of other classes are left out', 'FILE|NAME'),
    Option('pretrained', bool, False, "start from the model's published weights, likewise"),
    Option('freeze_trunk', bool, False, 'keep the shared stages as they are, BatchNorm in eval mode'),
    Option('num_classes', int, None, 'classes, those of the data by default', low=1, card='changed'),
    Option('num_experts', int, None, 'experts, 3 by default'),
    Option(
        'private_stages', int, None, 'how many of the last stages each expert has for itself, 1 by default', low=1,
        card='changed'),
    Option(
        'depths', int, None, 'shared stage each expert fuses, from 1 at the shallowest; by default 1, 2, ... and again '
        'from 1', nargs='+'),
    Option('fusion', bool, None, 'fuse shared features, on by default; off is a mixture of experts'),
    Option(
        'fusion_type', str, None,
        'product (the paper), or residual, which starts as the backbone and is the default with --pretrained-backbone',
        choices=['product', 'residual']),
    Option('classifier', str, None, 'kind of classifier, cosine by default', choices=('cosine', 'linear')),
    Option(
        'cosine_scale', float, None, 'what cosines are multiplied with to be logits, 30 by default', 'S', low=0.01,
        card='changed'),
    Option(
        'aligner', str, None, 'kind of aligner, by default conv for resnet32_shike and bottleneck for the others',
        choices=('conv', 'bottleneck', 'separable')),
    Option('drop', float, None, 'dropout rate', 'RATE', low=0, below=1),
    Option('drop_path', float, None, 'stochastic depth rate', 'RATE', low=0, below=1),
    Option(
        'grad_checkpointing', bool, False, 'recompute activations to save memory; BatchNorm sees each batch twice',
        card='changed'),
)

METHOD = Group(
    'Method and loss of stage one',
    Option(
        'method', str, 'shike', 'what stage one trains with; an unknown name lists all', card='changed'),
    Option('tau', float, 1., 'strength of logit_adjusted', 'T', card='changed'),
    Option('focal_gamma', float, 2., 'exponent of focal', 'G', low=0, card='changed'),
    Option('alpha', float, 0.1, 'weight of dynamic knowledge transfer, a loss per image that sums over classes'),
    Option('beta', float, 0.01, 'weight of mutual distillation, likewise'),
    Option('smoothing', float, 0., 'label smoothing, in stage two too', 'S', low=0, below=1, card='changed'),
    Option(
        'trunk_grad', str, 'sum', 'gradient of the shared stages: the sum of what experts send, or their mean',
        choices=['sum', 'mean'], card='changed'),
    Option('detach_teacher', bool, False, 'stop gradients through the teacher of dynamic knowledge transfer'),
)

TEACHER = Group(
    'Teacher',
    Option(
        'kd_model_name', str, None, 'trained model of the same classes whose logits every expert learns as well: a '
        'registered name, local-dir:RUN/model or hf-hub:USER/NAME'),
    Option('distill_loss_weight', float, 1., 'weight of what --kd-model-name teaches', 'W', low=0),
    Option('kd_temperature', float, 4., 'temperature of what --kd-model-name teaches', 'T', low=0.01),
)

OPTIMIZER = Group(
    'Optimizer',
    Option('opt', str, 'momentum', "timm's optimizer name"),
    Option('momentum', float, 0.9, 'momentum', 'M'),
    Option('weight_decay', float, 5e-4, 'weight decay', 'W', low=0),
    Option('opt_eps', float, None, "the optimizer's epsilon", 'EPS', card='changed'),
    Option('opt_betas', float, None, "the optimizer's betas", 'BETA', nargs='+', card='changed'),
    Option('opt_kwargs', dict, {}, 'further arguments of timm.optim.create_optimizer_v2'),
    Option('layer_decay', float, None, 'factor of the learning rate from layer to layer', 'D', low=0),
    Option('clip_grad', float, None, 'clip gradients', low=0),
    Option('clip_mode', str, 'norm', 'how to clip', choices=('norm', 'value', 'agc'), card='changed'),
)

SCHEDULE = Group(
    'Schedule',
    Option('sched', str, 'cosine', 'schedule after the warm-up', choices=('cosine', 'tanh', 'step', 'poly')),
    Option('epochs', int, 180, 'epochs of stage one, warm-up included', low=1),
    Option('lr', float, 0.1, 'peak learning rate of stage one', 'LR', low=0),
    Option(
        'lr_base', float, None, 'in place of --lr, where that is not given later: that of --lr-base-size images an '
        'update, from which it follows in proportion, or to their root for Adam and the like', 'LR', low=0),
    Option('lr_base_size', int, 256, 'images an update that --lr-base is meant for', low=1, card='changed'),
    Option('warmup_epochs', int, 5, 'linear warm-up of stage one', low=0),
    Option('warmup_lr', float, 1e-5, 'learning rate at the start', 'LR', low=0),
    Option('min_lr', float, 0., 'learning rate the schedule ends at', 'LR', low=0),
    Option('decay_epochs', float, 90., 'epochs between steps', low=1, card='changed'),
    Option('decay_rate', float, 0.1, 'factor of a step, power of poly', 'RATE', card='changed'),
    Option(
        'crt_epochs', int, None, 'epochs of stage two, classifier retraining, warm-up included; 0 for none; by default '
        "the method's own, 20 for shike, 0 for the others", low=0, may_change=True),
    Option('crt_lr', float, 0.1, 'peak learning rate of stage two', 'LR', low=0),
    Option('crt_lr_base', float, None, 'as --lr-base, for stage two', 'LR', low=0),
    Option('crt_warmup_epochs', int, 0, 'linear warm-up of stage two', low=0),
    Option('crt_warmup_lr', float, 1e-5, 'as --warmup-lr, for stage two', 'LR', low=0),
    Option(
        'crt_cosine_scale', float, None, 'what cosines of the retrained classifiers are multiplied with to be logits, '
        "the model's by default", 'S', low=0.01, card='changed'),
)

AUGMENTATION = Group(
    'Augmentation',
    Option('no_aug', bool, False, 'no augmentation at all'),
    Option(
        'train_crop_mode', str, None, "timm's crop modes, or pad: a random crop after padding by 1/8 of the side",
        choices=('rrc', 'rkrc', 'rkrr', 'pad')),
    Option('scale', float, [0.08, 1.], 'area of rrc', 'PCT', nargs=2, card='changed'),
    Option('ratio', float, [3 / 4, 4 / 3], 'aspect of rrc', 'R', nargs=2, card='changed'),
    Option('hflip', float, 0.5, 'horizontal flip probability', 'P'),
    Option('vflip', float, 0., 'vertical flip probability', 'P'),
    Option('color_jitter', float, 0.4, 'colour jitter, off with --aa'),
    Option('force_color_jitter', bool, False, 'colour jitter before --aa too', card='changed'),
    Option(
        'color_jitter_prob', float, None, 'probability of colour jitter, 1 by default', 'P', low=0, card='changed'),
    Option('grayscale_prob', float, 0., 'probability of taking the colours out', 'P', low=0, card='changed'),
    Option('gaussian_blur_prob', float, 0., 'probability of blur', 'P', low=0, card='changed'),
    Option('aa', str, None, "cifar10 (torchvision's AutoAugment policy), or timm's: original, rand-m9-mstd0.5"),
    Option('cutout', int, 0, 'side of a square to blacken', low=0),
    Option('reprob', float, 0., 'random erasing probability', 'P'),
    Option('remode', str, 'pixel', 'random erasing fill', choices=('const', 'rand', 'pixel'), card='changed'),
    Option('recount', int, 1, 'random erasing regions', card='changed'),
    Option('mixup', float, 0., 'Mixup alpha; with --method shike needs --alpha 0, not with ldam_drw', 'A'),
    Option('cutmix', float, 0., 'CutMix alpha, likewise', 'A'),
    Option('mixup_prob', float, 1., 'probability of Mixup or CutMix', 'P', card='changed'),
    Option('mixup_switch_prob', float, 0.5, 'probability of CutMix where both are on', 'P', card='changed'),
    Option(
        'mixup_off_epoch', int, 0, 'epoch from which on nothing is mixed, counted on into stage two; 0 for never', 'N',
        low=0, card='changed'),
    Option('mixup_mode', str, 'batch', 'how to mix', choices=('batch', 'pair', 'elem'), card='changed'),
    Option(
        'train_interpolation', str, 'random', 'interpolation in training', choices=('random', 'bilinear', 'bicubic'),
        card='changed'),
)

RUN = Group(
    'Run',
    Option('seed', int, 42, 'random seed', low=0),
    Option('amp', bool, False, 'mixed precision'),
    Option(
        'amp_dtype', str, None, 'by default float16 on CUDA, and bfloat16 on a CPU that has instructions for it, else '
        'float32', choices=('float16', 'bfloat16'), card='changed'),
    Option('channels_last', bool, False, 'channels_last memory layout', card='never'),
    Option(
        'torchcompile', str, None, 'compile the forward and backward of stage one, with inductor or the named backend',
        'BACKEND', const='inductor', may_change=True, card='never'),
    Option(
        'torchcompile_mode', str, None, 'mode of torch.compile: reduce-overhead (CUDA graphs), max-autotune, ...',
        'MODE', may_change=True, card='never'),
    Option('sync_bn', bool, False, 'BatchNorm over the batches of all processes together', card='changed'),
    Option(
        'dist_bn', str, 'reduce', 'statistics of BatchNorm after an epoch of several processes: their mean, or those '
        'of the first', choices=('reduce', 'broadcast'), card='never'),
    Option('model_ema', bool, False, 'keep and evaluate an average of the weights'),
    Option('model_ema_decay', float, 0.9998, 'decay of the average, which it rises to', 'D', card='changed'),
    Option('model_ema_warmup', bool, True, 'begin with a small decay, on by default', card='changed'),
    Option(
        'log_interval', int, None, 'steps between log lines within an epoch; by default there is one line an epoch, '
        'and on a terminal a bar of the whole run', low=1, may_change=True, card='never'),
    Option(
        'log_wandb', bool, False, 'tell Weights & Biases what summary.csv holds', may_change=True, card='never'),
    Option('wandb_project', str, None, 'project there', may_change=True, card='never'),
    Option('log_trackio', bool, False, 'tell Trackio the same', may_change=True, card='never'),
    Option('trackio_project', str, 'shike-timm', 'project there', may_change=True, card='never'),
    Option(
        'log_tensorboard', bool, False, 'write what summary.csv holds for TensorBoard, into the run folder',
        may_change=True, card='never'),
    Option('val_interval', int, 1, 'epochs between evaluations', low=1, may_change=True, card='never'),
    Option(
        'eval_metric', str, None, 'also keep the checkpoint with the best of this metric, as model_best.pth.tar of its '
        'stage; note that the evaluation set then chooses',
        choices=('loss', 'top1', 'top5', 'balanced', 'many', 'medium', 'few', 'ece'), may_change=True, card='never'),
    Option('checkpoint_hist', int, 2, 'checkpoints kept of each stage', low=1, may_change=True, card='never'),
    Option(
        'recovery_interval', int, None, 'updates after which the middle of an epoch is saved, to go on from there',
        low=1, card='never'),
    Option('output', str, 'output/train', 'folder of run folders', 'DIR', may_change=True, card='never'),
    Option(
        'experiment', str, '', 'name of the run folder; time and model by default', may_change=True, card='never'),
)

# What both stages of a run are made from, and what is timed.
TRAINING = (
    DATA, PREPROCESSING, SHOT_DIVISIONS, TRAINING_DATA, MODEL, METHOD, TEACHER, OPTIMIZER, SCHEDULE, AUGMENTATION, RUN,
    DEVICE, HPARAMS)
TRAIN = (*TRAINING, RESUME)

TRAINED_MODEL = Group(
    'Trained model',
    Option(
        'model', str, None, 'run folder, model folder, hf-hub:USER/NAME, or a registered name; for predict also an '
        'exported ONNX file'),
    Option('pretrained', bool, False, "load a registered name's published weights, as eval and predict always do"),
    Option('checkpoint', str, None, "checkpoint of train.py, or of the authors' CIFAR code", 'FILE'),
    Option(
        'authors_classifiers', str, 'rt_classifiers', "which of the two sets in a checkpoint of the authors' code: the "
        'retrained ones or those of stage one', choices=('rt_classifiers', 'classifiers')),
    Option('experts', int, None, 'experts to keep, counted from 0', nargs='+'),
    Option(
        'target_prior', str, None, 'frequencies of the classes to answer for: uniform, train (those of the training '
        "set), or a JSON file of them; the model's own choice by default", 'uniform|train|FILE'),
)


class _Parser(argparse.ArgumentParser):
    """Reports bad input as an InputError of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message[0].upper()}{message[1:]}: see --help.')


def _pair(text: str) -> Tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _add(section: Any, option: Option) -> None:
    flags, dest = (*option.flags, option.flag), option.name
    text = option.help + (f' (default: {option.shown_default})' if option.shown_default else '')
    if option.positional:
        section.add_argument(dest, nargs=option.nargs, metavar=option.placeholder, help=text)
    elif option.kind is bool:
        action: Any = 'store_true' if dest.startswith('no_') else argparse.BooleanOptionalAction
        section.add_argument(*flags, dest=dest, action=action, help=text, default=argparse.SUPPRESS)
    else:
        nargs = '*' if option.kind is dict else option.nargs if option.const is None else '?'
        section.add_argument(
            *flags, dest=dest, nargs=nargs, const=option.const, type=_pair if option.kind is dict else str,
            required=option.required, metavar=option.placeholder, help=text)
    if option.const is not None:
        section.add_argument(
            f'--no-{option.flag[2:]}', dest=dest, action='store_const', const=None, help=f'leave out {option.flag}')


def read_command_line(
        description: str,
        groups: Sequence[Group],
        argv: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """Values that a command line gives, that of the process by default, checked but for their ranges.

    Raises:
        InputError: If it has an unknown argument or a wrong value.
    """
    options = _by_name(groups)
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for group in groups:
        section = parser.add_argument_group(group.title)
        for option in group.options:
            _add(section, option)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for option in options.values() for flag in (option.flag, *option.flags)]
        raise InputError(f"Unknown argument '{unknown[0]}'{nearest(unknown[0].split('=')[0], flags)}: see --help.")
    return {
        name: options[name].check(dict(value) if options[name].kind is dict else value, options[name].flag)
        for name, value in vars(given).items()
    }


def check_values(groups: Sequence[Group], values: Dict[Any, Any], source: str) -> Dict[str, Any]:
    """Values by name from a file or from Python, checked but for their ranges.

    Raises:
        InputError: If one names no option or has another type; the message begins with `source`.
    """
    options, checked = _by_name(groups), {}
    for key, value in values.items():
        name = str(key).replace('-', '_')
        if name not in options:
            raise InputError(f"{source} has an unknown key '{key}'{nearest(name, options)}.")
        checked[name] = options[name].check(value, f"{source}: '{key}'")
    return checked


def defaults(groups: Sequence[Group]) -> Dict[str, Any]:
    """The default of each option."""
    return {name: copy.copy(option.default) for name, option in _by_name(groups).items()}


def _lay_over(args: argparse.Namespace, values: Dict[str, Any]) -> None:
    """Values over those before them; a learning rate alone also takes the place of an earlier `lr_base`."""
    for name in ('lr', 'crt_lr'):
        if name in values:
            values = {f'{name}_base': None, **values}
    vars(args).update(values)


def complete(
        groups: Sequence[Group],
        given: Dict[str, Any],
        saved: Optional[Dict[str, Any]] = None,
) -> argparse.Namespace:
    """Values of all options: what is given, over the hparams file, over what was saved, over the defaults.

    Args:
        groups: The options.
        given: Checked values of the command line or from Python.
        saved: Checked values of an earlier run.

    Raises:
        InputError: If the hparams file is wrong, or a value is out of its range.
    """
    args = argparse.Namespace(**{**defaults(groups), **(saved or {})})
    in_files = [group for group in groups if group is not HPARAMS]
    hparams = given.get('hparams')
    for path, values in read_hparams(hparams).items() if hparams else ():
        _lay_over(args, check_values(in_files, values, f"hparams file '{path}'"))
    _lay_over(args, given)
    for name, option in _by_name(groups).items():
        option.check_range(getattr(args, name))
    return args


def parse_args(description: str, groups: Sequence[Group], argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Values of all options, from a command line: `complete` over `read_command_line`, which say what is raised."""
    return complete(groups, read_command_line(description, groups, argv))


def changed_option(args: argparse.Namespace, before: Dict[str, Any]) -> Optional[Option]:
    """The first option of train.py that a resumed run has otherwise than before, though it may not change.

    Args:
        args: Arguments of the resumed run.
        before: Arguments it began with; what they do not name had its default.
    """
    before = {**defaults(TRAIN), **before}
    for name, option in _by_name(TRAIN).items():
        if not option.may_change and getattr(args, name) != before[name]:
            return option
    return None


def card_options(args: Dict[str, Any]) -> Dict[str, Any]:
    """Of a run's arguments, those that a model's card tells: what makes the model what it is."""
    return {
        name: args[name] for name, option in _by_name(TRAIN).items()
        if args.get(name) not in (None, {})
        and (option.card == 'always' or option.card == 'changed' and args[name] != option.default)
    }


def run_folder(args: argparse.Namespace) -> Optional[str]:
    """The run folder to resume: the folder of `--resume PATH`, or of `--experiment` where no path was given.

    Raises:
        InputError: If no folder was named.
    """
    if args.resume is None:
        return None
    if args.resume:
        path = os.path.abspath(args.resume)
        # RUN, or RUN/stage_one/last.pth.tar
        return os.path.dirname(os.path.dirname(path)) if os.path.isfile(path) else path
    if not args.experiment:
        raise InputError('--resume without a path needs --experiment NAME, the run folder to go on with.')
    return os.path.join(args.output, args.experiment)
