"""Methods by name: what the stages of a run train with. A method is an entry of `METHODS`, a few lines over a loss."""
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional

import torch
from timm.loss import compute_class_weights

from ..distributed import world_size
from ..errors import InputError, nearest
from ..losses import balanced_softmax, expert_cross_entropy, focal, ldam, logit_adjusted
from ..models.classifiers import CosineClassifier
from .config import RunConfig
from .tasks import ClassifierRetrainingTask, ExpertTask, RepresentationTask

if TYPE_CHECKING:
    from .runs import Run

__all__ = ['METHODS', 'STAGES', 'Method', 'Stage', 'get_method', 'plan_stages']

STAGES = ('stage_one', 'stage_two')  # names in files, in their order
RETRAINING_EPOCHS = 20


@dataclass(frozen=True)
class Stage:
    """A part of training with an optimizer, a schedule and checkpoints of its own.

    Attributes:
        name: Name in files; in logs with a blank.
        number: Counted from 1; keeps the random streams of stages apart.
        epochs: Epochs, warm-up included.
        lr: Peak learning rate.
        make_task: Gives the training task from what the run is made of.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate that the warm-up starts from.
        first_row: Row of the summary where the first epoch stands.
        compiled: Whether compiling pays.
        indices_only: Why targets must be class indices and what to do about it, None where they need not be.
        prior: As `classifier_prior` of `Shike.set_training_prior`.
    """

    name: str
    number: int
    epochs: int
    lr: float
    make_task: Callable[['Run'], ExpertTask]
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    first_row: int = 0
    compiled: bool = False
    indices_only: Optional[str] = None
    prior: Optional[str] = None


@dataclass(frozen=True)
class Method:
    """What stage one trains with; classifier retraining can follow any of them.

    Attributes:
        make_task: Gives stage one's task.
        crt_epochs: Epochs of classifier retraining unless `--crt-epochs` says otherwise.
        indices_only: From arguments to `Stage.indices_only`.
        prior: From arguments to `Stage.prior`, without a teacher.
    """

    make_task: Callable[['Run'], ExpertTask]
    crt_epochs: int = 0
    indices_only: Callable[[RunConfig], Optional[str]] = lambda args: None
    prior: Callable[[RunConfig], Optional[str]] = lambda args: None


def _teaching(run: 'Run') -> Dict[str, Any]:
    return dict(
        trunk_grad=run.args.trunk_grad,
        teacher_model=run.teacher,
        distill_loss_weight=run.args.distill_loss_weight,
        temperature=run.args.kd_temperature,
        mean=run.data_config['mean'],
        std=run.data_config['std'],
        device=run.device,
    )


def _class_counts(run: 'Run') -> torch.Tensor:
    return torch.tensor(run.data.class_counts, device=run.device)


def _shike(run: 'Run') -> ExpertTask:
    args = run.args
    return RepresentationTask(
        run.model, args.alpha, args.beta, args.detach_teacher, args.smoothing, **_teaching(run))


def _ldam_drw(run: 'Run') -> ExpertTask:
    classifier = run.model.get_classifier()
    if not isinstance(classifier, CosineClassifier):
        raise InputError("--method ldam_drw sets margins between cosines: leave out --classifier linear.")
    if run.args.smoothing:
        raise InputError('--smoothing does not go with the margins of --method ldam_drw: leave it out.')
    loss = partial(ldam, class_counts=_class_counts(run), scale=classifier.scale)
    counts = run.data.class_counts
    _, weights = compute_class_weights(counts, sum(counts), 'effective_num', beta=0.9999)
    return ExpertTask(
        run.model, loss, late_loss=partial(loss, class_weights=weights.to(run.device)), **_teaching(run))


def _by_loss(make_loss: Callable[['Run'], Callable]) -> Callable[['Run'], ExpertTask]:
    return lambda run: ExpertTask(
        run.model, partial(make_loss(run), smoothing=run.args.smoothing), **_teaching(run))


METHODS: Dict[str, Method] = {
    # Jin et al., CVPR 2023: Eq. 10, then new classifiers.
    'shike': Method(
        _shike,
        crt_epochs=RETRAINING_EPOCHS,
        indices_only=lambda args:
            'dynamic knowledge transfer leaves one class out: drop it, or add --alpha 0' if args.alpha else None,
        prior=lambda args: 'train',
    ),
    'ce': Method(_by_loss(lambda run: expert_cross_entropy), prior=lambda args: 'train'),
    # BALMS, Ren et al., NeurIPS 2020.
    'balanced_softmax': Method(
        _by_loss(lambda run: partial(balanced_softmax, class_counts=_class_counts(run))), prior=lambda args: 'uniform'),
    # Menon et al., ICLR 2021.
    'logit_adjusted': Method(
        _by_loss(lambda run: partial(logit_adjusted, class_counts=_class_counts(run), tau=run.args.tau)),
        prior=lambda args: {0.: 'train', 1.: 'uniform'}.get(args.tau)),
    # Lin et al., ICCV 2017; this loss and the next are least at logits of no known prior.
    'focal': Method(_by_loss(lambda run: partial(focal, gamma=run.args.focal_gamma))),
    # Cao et al., NeurIPS 2019: classes weighted by their effective number in the last fifth of the epochs.
    'ldam_drw': Method(
        _ldam_drw, indices_only=lambda args: 'LDAM takes a margin off one class: drop it, or choose another --method'),
}


def get_method(name: str) -> Method:
    """A method by name.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in METHODS:
        raise InputError(f"--method '{name}' is unknown{nearest(name, METHODS)}: choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def _peak_lr(args: RunConfig, prefix: str = '') -> float:
    """The stage's learning rate, by timm's rule from that of `lr_base_size` images where it is given so."""
    base = getattr(args, f'{prefix}lr_base')
    if base is None:
        return getattr(args, f'{prefix}lr')
    ratio = args.batch_size * world_size() * args.grad_accum_steps / args.lr_base_size
    return base * (ratio ** 0.5 if any(name in args.opt.lower() for name in ('ada', 'lamb')) else ratio)


def plan_stages(args: RunConfig, retraining: bool = False) -> List[Stage]:
    """The stages that the arguments ask for: the method's own and, unless `crt_epochs` is 0, classifier retraining.

    Args:
        args: Arguments of train.py.
        retraining: Whether classifiers are to be retrained whatever the method, for `RETRAINING_EPOCHS` by default.

    Raises:
        InputError: If the method is unknown, a stage's warm-up fills it, or nothing is left of the retraining.
    """
    method = get_method(args.method)
    crt_epochs = args.crt_epochs
    if crt_epochs is None:
        crt_epochs = RETRAINING_EPOCHS if retraining else method.crt_epochs
    if retraining and not crt_epochs:
        raise InputError('--crt-epochs 0 leaves nothing to do: give at least 1, or leave it out.')
    if crt_epochs and args.crt_cosine_scale is not None and args.classifier == 'linear':
        raise InputError(
            f'--crt-cosine-scale {args.crt_cosine_scale:g} does not go with --classifier linear: drop one of them.')
    first = Stage(
        STAGES[0],
        1,
        args.epochs,
        _peak_lr(args),
        method.make_task,
        args.warmup_epochs,
        args.warmup_lr,
        compiled=True,
        indices_only=method.indices_only(args),
        prior=None if args.kd_model_name and args.distill_loss_weight else method.prior(args),  # or else partly its
    )
    second = Stage(
        STAGES[1],
        2,
        crt_epochs,
        _peak_lr(args, 'crt_'),
        lambda run: ClassifierRetrainingTask(
            run.model, run.data.class_counts, run.device, run.args.smoothing, run.args.crt_cosine_scale),
        args.crt_warmup_epochs,
        args.crt_warmup_lr,
        first_row=args.epochs,
        prior='uniform',
    )
    stages = [first, second] if crt_epochs else [first]
    for stage, prefix in zip(stages, ('', 'crt-')):
        if stage.warmup_epochs >= stage.epochs:
            raise InputError(
                f'--{prefix}warmup-epochs {stage.warmup_epochs} leaves nothing of --{prefix}epochs {stage.epochs}, '
                'which include the warm-up: choose fewer.')
    return stages
