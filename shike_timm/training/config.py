"""Options of training, and the configuration of a whole run."""
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

from ..data.augment import AugmentationConfig
from ..data.config import LoaderConfig, SourceConfig
from ..devices import DeviceConfig
from ..metrics import ShotConfig
from ..models.config import ModelConfig
from ..options import HparamsConfig, option, options


@dataclass(frozen=True)
class MethodConfig:
    """Method and loss."""

    method: str = option('shike', 'method of stage one. An unknown name prints all names', card='changed')
    tau: float = option(1., 'strength of the adjustment in --method logit_adjusted', 'T', card='changed')
    focal_gamma: float = option(2., 'exponent of the focal loss', 'G', low=0, card='changed')
    alpha: float = option(
        0.1, 'weight of dynamic knowledge transfer (DKT), which is summed over classes and averaged over the batch')
    beta: float = option(0.01, 'weight of mutual distillation, summed over classes and averaged over the batch')
    smoothing: float = option(
        0., 'label smoothing of the cross-entropy in both stages of training', 'S', low=0, below=1, card='changed')
    trunk_grad: str = option(
        'sum', 'whether the gradient of the shared stages is the sum or the mean of the gradients from the experts',
        choices=['sum', 'mean'], card='changed')
    detach_teacher: bool = option(False, 'stop gradients through the teacher of dynamic knowledge transfer')
    head_init: str = option(
        'random', 'initial class weights of stage one: random, or the class means of the features that the pretrained '
        'network computes. Classifiers that --initial-checkpoint brings are kept',
        choices=('random', 'means'), card='changed')
    crt_init: str = option(
        'random', 'initial class weights of stage two: random, or the class means of the features',
        choices=('random', 'means'), card='changed')
    cache_features: Optional[int] = option(
        None, 'with --freeze-trunk and --private-stages 0: compute features of this many views of each image once, and '
        'train on the features. Views are the image, its mirror image, then augmented images', 'VIEWS', low=1)
    search: bool = option(
        False, 'with --cache-features: choose --levels and --lr by balanced accuracy on held-out training images, '
        'over three folds that each hold out a fifth of every class')
    crt_cosine_scale: Optional[float] = option(
        None, '--cosine-scale of the retrained classifiers. By default the scale of the model', 'S', low=0.01,
        card='changed')


@dataclass(frozen=True)
class TeacherConfig:
    """Teacher."""

    kd_model_name: Optional[str] = option(
        None, 'teacher of all experts, a trained model of the same classes: a registered name, local-dir:RUN/model or '
        'hf-hub:USER/NAME')
    distill_loss_weight: float = option(1., 'weight of the distillation from --kd-model-name', 'W', low=0)
    kd_temperature: float = option(4., 'temperature of the distillation from --kd-model-name', 'T', low=0.01)


@dataclass(frozen=True)
class TaskConfig(MethodConfig, TeacherConfig):
    """The options that a training task reads."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer."""

    opt: str = option('momentum', "timm's name of the optimizer")
    momentum: float = option(0.9, 'momentum', 'M')
    weight_decay: float = option(5e-4, 'weight decay', 'W', low=0)
    opt_eps: Optional[float] = option(None, 'epsilon of the optimizer', 'EPS', card='changed')
    opt_betas: Optional[List[float]] = option(None, 'betas of the optimizer', 'BETA', nargs='+', card='changed')
    opt_kwargs: Dict[str, Any] = option({}, 'further arguments of timm.optim.create_optimizer_v2')
    layer_decay: Optional[float] = option(None, 'factor of the learning rate for each layer further down', 'D', low=0)
    clip_grad: Optional[float] = option(None, 'limit of the gradients, as --clip-mode applies it', low=0)
    clip_mode: str = option('norm', 'how to clip gradients', choices=('norm', 'value', 'agc'), card='changed')


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule."""

    sched: str = option('cosine', 'schedule after the warm-up', choices=('cosine', 'tanh', 'step', 'poly'))
    epochs: int = option(180, 'epochs of stage one, warm-up included', low=1)
    lr: float = option(0.1, 'peak learning rate of stage one', 'LR', low=0)
    lr_base: Optional[float] = option(
        None, 'learning rate for --lr-base-size images a step. It sets --lr, scaled by the actual number of images '
        '(for Adam-like optimizers by its square root). An explicit --lr wins.', 'LR', low=0)
    lr_base_size: int = option(256, 'images a step that --lr-base is meant for', low=1, card='changed')
    warmup_epochs: int = option(5, 'linear warm-up at the start of stage one, in epochs', low=0)
    warmup_lr: float = option(1e-5, 'learning rate at the start of the warm-up', 'LR', low=0)
    min_lr: float = option(0., 'learning rate at the end of the schedule', 'LR', low=0)
    decay_epochs: float = option(90., 'epochs between the steps of a step schedule', low=1, card='changed')
    decay_rate: float = option(0.1, 'factor of each step, or exponent of --sched poly', 'RATE', card='changed')
    crt_epochs: Optional[int] = option(
        None, 'epochs of stage two, classifier retraining, warm-up included. 0 leaves stage two out. By default 20 '
        'for --method shike, 0 for others', low=0, may_change=True)
    crt_lr: float = option(0.1, 'peak learning rate of stage two', 'LR', low=0)
    crt_lr_base: Optional[float] = option(None, '--lr-base of stage two', 'LR', low=0)
    crt_warmup_epochs: int = option(0, 'linear warm-up at the start of stage two, in epochs', low=0)
    crt_warmup_lr: float = option(1e-5, '--warmup-lr of stage two', 'LR', low=0)


@dataclass(frozen=True)
class LoopConfig:
    """Training loop."""

    seed: int = option(42, 'random seed', low=0)
    amp: bool = option(False, 'mixed precision')
    amp_dtype: Optional[str] = option(
        None, 'data type of --amp (default: float16 on CUDA, bfloat16 on a CPU that has instructions for it, else '
        'float32)', choices=('float16', 'bfloat16'), card='changed')
    channels_last: bool = option(False, 'channels_last memory layout', card='never')
    torchcompile: Optional[str] = option(
        None, 'compile the forward and backward pass of stage one, with inductor or the named backend', 'BACKEND',
        const='inductor', may_change=True, card='never')
    torchcompile_mode: Optional[str] = option(
        None, 'mode of torch.compile, such as reduce-overhead (CUDA graphs) or max-autotune', 'MODE', may_change=True,
        card='never')
    sync_bn: bool = option(False, 'compute BatchNorm over the batches of all processes together', card='changed')
    dist_bn: str = option(
        'reduce', 'BatchNorm statistics after an epoch: the mean over processes, or those of the first process',
        choices=('reduce', 'broadcast'), card='never')
    model_ema: bool = option(False, 'average the weights over the updates, and keep the average as the model')
    model_ema_decay: float = option(
        0.9998, 'decay of the averaged weights: the share that an update leaves of them', 'D', card='changed')
    model_ema_warmup: bool = option(
        True, 'let the decay of the averaged weights rise from 0 to its value (default: on)', card='changed')
    log_interval: Optional[int] = option(
        None, 'steps between log lines. By default one line an epoch, and a progress bar on a terminal', low=1,
        may_change=True, card='never')
    val_interval: int = option(1, 'epochs between evaluations', low=1, may_change=True, card='never')
    eval_metric: Optional[str] = option(
        None, 'also keep the checkpoint with the best value of this metric, as model_best.pth.tar. Caution: this '
        'selects on the evaluation set.', choices=('loss', 'top1', 'top5', 'balanced', 'many', 'medium', 'few', 'ece'),
        may_change=True, card='never')
    calibrate: bool = option(
        False, 'after the last epoch of each stage of training, fit a temperature on the evaluation images. The model '
        'then divides its logits by it, so that probabilities match accuracies', card='changed')
    checkpoint_hist: int = option(
        2, 'checkpoints to keep of each stage of training', low=1, may_change=True, card='never')
    recovery_interval: Optional[int] = option(
        None, 'also save a checkpoint every N updates within an epoch', low=1, card='never')


@dataclass(frozen=True)
class StepConfig(LoaderConfig, OptimizerConfig, LoopConfig):
    """The options that a training step reads."""


@dataclass(frozen=True)
class OutputConfig:
    """Output."""

    output: str = option('output/train', 'folder for run folders', 'DIR', may_change=True, card='never')
    experiment: str = option('', 'name of the run folder (default: time and model)', may_change=True, card='never')
    log_wandb: bool = option(False, 'log to Weights & Biases', may_change=True, card='never')
    wandb_project: Optional[str] = option(None, 'project at Weights & Biases', may_change=True, card='never')
    log_trackio: bool = option(False, 'log to Trackio', may_change=True, card='never')
    trackio_project: str = option('shike-timm', 'project at Trackio', may_change=True, card='never')
    log_tensorboard: bool = option(
        False, 'log to TensorBoard, in the run folder', may_change=True, card='never')


@dataclass(frozen=True)
class RunConfig(
        SourceConfig, ShotConfig, ModelConfig, TaskConfig, ScheduleConfig, AugmentationConfig, StepConfig, OutputConfig,
        DeviceConfig, HparamsConfig,
):
    """All options of a run."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Resuming."""

    resume: Optional[str] = option(
        None, 'resume a run, given by its folder or one of its checkpoints. Without a value, resume the run of '
        '--experiment, or begin it.', 'RUN', const='', may_change=True, card='never')


@dataclass(frozen=True)
class RetrainConfig(RunConfig):
    """Stage one."""

    checkpoint: str = option(
        None, 'run folder of shike train, or a checkpoint of its stage one. For a plain network of timm (--backbone): '
        'a checkpoint, local-dir:FOLDER or hf-hub:USER/NAME', 'RUN|FILE|NAME', required=True)


def card_options(values: Mapping[str, Any]) -> Dict[str, Any]:
    """The options of a run that a model card shows, with their values."""
    return {
        name: values[name] for name, one in options(TrainConfig).items()
        if values.get(name) not in (None, {})
        and (one.card == 'always' or one.card == 'changed' and values[name] != one.default)
    }
