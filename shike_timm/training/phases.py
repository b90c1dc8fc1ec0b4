"""The phases of a run: stage one, then classifier retraining."""
from dataclasses import dataclass
from typing import List, Optional

from ..distributed import world_size
from ..errors import InputError
from .config import RunConfig
from .methods import RETRAINING_EPOCHS, get_method

PHASES = ('stage_one', 'stage_two')  # The names of the phases in files, in order.


@dataclass(frozen=True)
class Phase:
    """A part of training that has its own optimizer, schedule and checkpoints."""

    number: int  # 1: stage one. 2: classifier retraining, stage two.
    epochs: int  # The warm-up is included.
    lr: float  # The peak learning rate.
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    first_row: int = 0  # Row of the summary for the first epoch.
    indices_only: Optional[str] = None  # The result of `Method.indices_only`.
    prior: Optional[str] = None  # Class prior that the logits follow, for `Shike.set_training_prior`.
    class_means: bool = False  # The classifiers begin at the class means of the features.

    @property
    def name(self) -> str:
        """The name of the phase in files."""
        return PHASES[self.number - 1]

    @property
    def title(self) -> str:
        """The name of the phase in logs."""
        return self.name.replace('_', ' ')

    @property
    def is_retraining(self) -> bool:
        return self.number == 2


def _peak_lr(config: RunConfig, prefix: str = '') -> float:
    """The peak learning rate of a phase. If `lr_base` is given, timm's rule scales it by the batch size."""
    base = getattr(config, f'{prefix}lr_base')
    if base is None:
        return getattr(config, f'{prefix}lr')
    ratio = config.batch_size * world_size() * config.grad_accum_steps / config.lr_base_size
    return base * (ratio ** 0.5 if any(name in config.opt.lower() for name in ('ada', 'lamb')) else ratio)


def plan_phases(config: RunConfig, retraining: bool = False) -> List[Phase]:
    """The phases of a run: stage one and, if its number of epochs is not 0, classifier retraining.

    With `retraining`, classifier retraining has `RETRAINING_EPOCHS` by default, whatever the method is.
    """
    lr, crt_lr = _peak_lr(config), _peak_lr(config, 'crt_')
    method, crt_epochs = get_method(config.method), config.crt_epochs
    if crt_epochs is None:
        crt_epochs = RETRAINING_EPOCHS if retraining else method.crt_epochs
    if retraining and not crt_epochs:
        raise InputError('--crt-epochs 0 leaves nothing to do: give at least 1, or leave it out.')
    if crt_epochs and config.crt_cosine_scale is not None and config.classifier == 'linear':
        raise InputError(
            f'--crt-cosine-scale {config.crt_cosine_scale:g} does not go with --classifier linear: drop one of them.')
    if config.head_init == 'means' and not config.begins_trained:
        raise InputError(
            '--head-init means would average features of random weights: add --pretrained-backbone or '
            '--initial-checkpoint.')
    if config.cache_features and (config.private_stages != 0 or not config.freeze_trunk):
        raise InputError('--cache-features goes with --private-stages 0 and --freeze-trunk: add both.')
    if config.cache_features and (config.mixup or config.cutmix or config.kd_model_name or world_size() > 1):
        raise InputError('--cache-features does not go with --mixup, --cutmix, --kd-model-name or several processes.')
    begins_fresh = not (retraining or config.initial_checkpoint or config.pretrained)
    has_levels = 0 in (config.private_stages, config.private_blocks)
    if config.freeze_trunk and has_levels and begins_fresh and not config.cache_features:
        raise InputError(
            'Experts without private stages on a frozen trunk need the mean and deviation of its features: give '
            '--private-stages 0 and --cache-features 2.')
    if config.search and not config.pretrained_backbone:
        raise InputError('--search makes new experts on a backbone: give --pretrained-backbone or --no-search.')
    chosen = next((key for key in ('levels', 'num_experts') if getattr(config, key)), None)
    if config.search and (chosen or not config.cache_features):
        raise InputError(
            f"--search chooses --{chosen.replace('_', '-')}: drop one of them, or give --no-search." if chosen else
            '--search goes with --cache-features: add it.')
    if config.search and (config.method != 'balanced_softmax' or config.opt not in ('sgd', 'momentum')):
        raise InputError('--search tries balanced softmax and SGD alone: leave out --method and --opt, or --no-search.')
    if config.cache_features and config.cache_features > 1 and (config.no_aug or not config.hflip):
        raise InputError(
            f'--cache-features {config.cache_features} keeps mirror images, which --hflip 0 and --no-aug forbid: give '
            '--cache-features 1, or leave them out.')
    taught = config.kd_model_name and config.distill_loss_weight  # With a teacher the logits follow neither prior.
    phases = [Phase(
        1, config.epochs, lr, config.warmup_epochs, config.warmup_lr,
        indices_only=method.indices_only(config), prior=None if taught else method.prior(config),
        class_means=config.head_init == 'means')]
    if crt_epochs:
        phases.append(Phase(
            2, crt_epochs, crt_lr, config.crt_warmup_epochs, config.crt_warmup_lr,
            first_row=config.epochs, prior='uniform', class_means=config.crt_init == 'means'))
    for phase, prefix in zip(phases, ('', 'crt-')):
        if phase.warmup_epochs >= phase.epochs:
            raise InputError(
                f'--{prefix}warmup-epochs {phase.warmup_epochs} leaves nothing of --{prefix}epochs {phase.epochs}, '
                'which include the warm-up: choose fewer.')
    return phases
