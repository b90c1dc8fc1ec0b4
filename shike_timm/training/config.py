"""Options of training, and the configuration of a whole run."""
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional

from ..data.augment import AugmentationConfig
from ..data.config import LoaderConfig, SourceConfig
from ..devices import DeviceConfig
from ..errors import InputError
from ..metrics import ShotConfig
from ..models.config import ModelConfig
from ..options import HparamsConfig, Option, option, options


@dataclass(frozen=True)
class MethodConfig:
    """Method and loss of stage one."""

    method: str = option('shike', 'what stage one trains with; an unknown name lists all', card='changed')
    tau: float = option(1., 'strength of logit_adjusted', 'T', card='changed')
    focal_gamma: float = option(2., 'exponent of focal', 'G', low=0, card='changed')
    alpha: float = option(0.1, 'weight of dynamic knowledge transfer, a loss per image that sums over classes')
    beta: float = option(0.01, 'weight of mutual distillation, likewise')
    smoothing: float = option(0., 'label smoothing, in stage two too', 'S', low=0, below=1, card='changed')
    trunk_grad: str = option(
        'sum', 'gradient of the shared stages: the sum of what experts send, or their mean', choices=['sum', 'mean'],
        card='changed')
    detach_teacher: bool = option(False, 'stop gradients through the teacher of dynamic knowledge transfer')


@dataclass(frozen=True)
class TeacherConfig:
    """Teacher."""

    kd_model_name: Optional[str] = option(
        None, 'trained model of the same classes whose logits every expert learns as well: a registered name, local-'
        'dir:RUN/model or hf-hub:USER/NAME')
    distill_loss_weight: float = option(1., 'weight of what --kd-model-name teaches', 'W', low=0)
    kd_temperature: float = option(4., 'temperature of what --kd-model-name teaches', 'T', low=0.01)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer."""

    opt: str = option('momentum', "timm's optimizer name")
    momentum: float = option(0.9, 'momentum', 'M')
    weight_decay: float = option(5e-4, 'weight decay', 'W', low=0)
    opt_eps: Optional[float] = option(None, "the optimizer's epsilon", 'EPS', card='changed')
    opt_betas: Optional[List[float]] = option(None, "the optimizer's betas", 'BETA', nargs='+', card='changed')
    opt_kwargs: Dict[str, Any] = option({}, 'further arguments of timm.optim.create_optimizer_v2')
    layer_decay: Optional[float] = option(None, 'factor of the learning rate from layer to layer', 'D', low=0)
    clip_grad: Optional[float] = option(None, 'clip gradients', low=0)
    clip_mode: str = option('norm', 'how to clip', choices=('norm', 'value', 'agc'), card='changed')


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule."""

    sched: str = option('cosine', 'schedule after the warm-up', choices=('cosine', 'tanh', 'step', 'poly'))
    epochs: int = option(180, 'epochs of stage one, warm-up included', low=1)
    lr: float = option(0.1, 'peak learning rate of stage one', 'LR', low=0)
    lr_base: Optional[float] = option(
        None, 'in place of --lr, where that is not given later: that of --lr-base-size images an update, from which it '
        'follows in proportion, or to their root for Adam and the like', 'LR', low=0)
    lr_base_size: int = option(256, 'images an update that --lr-base is meant for', low=1, card='changed')
    warmup_epochs: int = option(5, 'linear warm-up of stage one', low=0)
    warmup_lr: float = option(1e-5, 'learning rate at the start', 'LR', low=0)
    min_lr: float = option(0., 'learning rate the schedule ends at', 'LR', low=0)
    decay_epochs: float = option(90., 'epochs between steps', low=1, card='changed')
    decay_rate: float = option(0.1, 'factor of a step, power of poly', 'RATE', card='changed')
    crt_epochs: Optional[int] = option(
        None, "epochs of stage two, classifier retraining, warm-up included; 0 for none; by default the method's own, "
        '20 for shike, 0 for the others', low=0, may_change=True)
    crt_lr: float = option(0.1, 'peak learning rate of stage two', 'LR', low=0)
    crt_lr_base: Optional[float] = option(None, 'as --lr-base, for stage two', 'LR', low=0)
    crt_warmup_epochs: int = option(0, 'linear warm-up of stage two', low=0)
    crt_warmup_lr: float = option(1e-5, 'as --warmup-lr, for stage two', 'LR', low=0)
    crt_cosine_scale: Optional[float] = option(
        None, "what cosines of the retrained classifiers are multiplied with to be logits, the model's by default",
        'S', low=0.01, card='changed')


@dataclass(frozen=True)
class LoopConfig:
    """Training loop."""

    seed: int = option(42, 'random seed', low=0)
    amp: bool = option(False, 'mixed precision')
    amp_dtype: Optional[str] = option(
        None, 'by default float16 on CUDA, and bfloat16 on a CPU that has instructions for it, else float32',
        choices=('float16', 'bfloat16'), card='changed')
    channels_last: bool = option(False, 'channels_last memory layout', card='never')
    torchcompile: Optional[str] = option(
        None, 'compile the forward and backward of stage one, with inductor or the named backend', 'BACKEND',
        const='inductor', may_change=True, card='never')
    torchcompile_mode: Optional[str] = option(
        None, 'mode of torch.compile: reduce-overhead (CUDA graphs), max-autotune, ...', 'MODE', may_change=True,
        card='never')
    sync_bn: bool = option(False, 'BatchNorm over the batches of all processes together', card='changed')
    dist_bn: str = option(
        'reduce', 'statistics of BatchNorm after an epoch of several processes: their mean, or those of the first',
        choices=('reduce', 'broadcast'), card='never')
    model_ema: bool = option(False, 'keep and evaluate an average of the weights')
    model_ema_decay: float = option(0.9998, 'decay of the average, which it rises to', 'D', card='changed')
    model_ema_warmup: bool = option(True, 'begin with a small decay, on by default', card='changed')
    log_interval: Optional[int] = option(
        None, 'steps between log lines within an epoch; by default there is one line an epoch, and on a terminal a bar '
        'of the whole run', low=1, may_change=True, card='never')
    val_interval: int = option(1, 'epochs between evaluations', low=1, may_change=True, card='never')
    eval_metric: Optional[str] = option(
        None, 'also keep the checkpoint with the best of this metric, as model_best.pth.tar of its stage; note that the'
        ' evaluation set then chooses', choices=('loss', 'top1', 'top5', 'balanced', 'many', 'medium', 'few', 'ece'),
        may_change=True, card='never')
    checkpoint_hist: int = option(2, 'checkpoints kept of each stage', low=1, may_change=True, card='never')
    recovery_interval: Optional[int] = option(
        None, 'updates after which the middle of an epoch is saved, to go on from there', low=1, card='never')


@dataclass(frozen=True)
class OutputConfig:
    """Output."""

    output: str = option('output/train', 'folder of run folders', 'DIR', may_change=True, card='never')
    experiment: str = option('', 'name of the run folder; time and model by default', may_change=True, card='never')
    log_wandb: bool = option(False, 'tell Weights & Biases what summary.csv holds', may_change=True, card='never')
    wandb_project: Optional[str] = option(None, 'project there', may_change=True, card='never')
    log_trackio: bool = option(False, 'tell Trackio the same', may_change=True, card='never')
    trackio_project: str = option('shike-timm', 'project there', may_change=True, card='never')
    log_tensorboard: bool = option(
        False, 'write what summary.csv holds for TensorBoard, into the run folder', may_change=True, card='never')


@dataclass(frozen=True)
class RunConfig(
        SourceConfig, ShotConfig, LoaderConfig, ModelConfig, MethodConfig,
        TeacherConfig, OptimizerConfig, ScheduleConfig, AugmentationConfig, LoopConfig, OutputConfig, DeviceConfig,
        HparamsConfig,
):
    """All options of a run."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Resuming."""

    resume: Optional[str] = option(
        None, 'go on with a run: its folder, a checkpoint in it, or alone with --experiment, which begins the run where'
        ' there is none', 'RUN', const='', may_change=True, card='never')


@dataclass(frozen=True)
class RetrainConfig(RunConfig):
    """Stage one."""

    checkpoint: str = option(
        None, 'run folder of shike train, or a checkpoint of its stage one', 'RUN', required=True)


def run_folder(config: TrainConfig) -> Optional[str]:
    """The run folder to resume: the folder of `--resume PATH`, or of `--experiment` where no path was given."""
    if config.resume is None:
        return None
    if config.resume:
        path = os.path.abspath(config.resume)
        # RUN, or RUN/stage_one/last.pth.tar
        return os.path.dirname(os.path.dirname(path)) if os.path.isfile(path) else path
    if not config.experiment:
        raise InputError('--resume without a path needs --experiment NAME, the run folder to go on with.')
    return os.path.join(config.output, config.experiment)


def changed_option(config: TrainConfig, before: Mapping[str, Any]) -> Optional[Option]:
    """The first option that a resumed run has otherwise than before, though it may not change.

    Args:
        config: Configuration of the resumed run.
        before: Values it began with. What they do not name had its default.
    """
    for name, one in options(TrainConfig).items():
        if not one.may_change and getattr(config, name) != before.get(name, one.default):
            return one
    return None


def card_options(values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values of a run that a model card shows."""
    return {
        name: values[name] for name, one in options(TrainConfig).items()
        if values.get(name) not in (None, {})
        and (one.card == 'always' or one.card == 'changed' and values[name] != one.default)
    }
