"""Runs: data, model, both stages and the run folder, put together from parsed arguments."""
import argparse
import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import yaml
from timm.models import safe_model_name

from .build import create_optimizer, create_schedule
from .checkpoints import StageSaver, export_model, load_checkpoint, load_weights, model_weights, write_text
from .engine import Interrupted, StopFlag, fit, stop_signals
from .errors import InputError
from .metrics import format_table
from .options import changed_option, run_folder
from .stages import STAGES, Run, compile_task, create_loss_scaler, create_task, loop_config, prepare

__all__ = ['retrain', 'saved_args', 'train']

_logger = logging.getLogger(__name__)


def _create_run_folder(args: argparse.Namespace, resumed: bool) -> Path:
    folder = Path(args.output, args.experiment)
    try:
        if not resumed and folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"output folder '{folder}' already holds a run: add --resume to go on, or choose another --experiment.")
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in vars(args).items() if key not in ('hparams', 'resume', 'checkpoint')}
        write_text(folder / 'args.yaml', yaml.safe_dump(values))
    except OSError as error:
        raise InputError(
            f"output folder '{folder}' cannot be written ({error.strerror}): choose another --output.") from error
    return folder


def _default_experiment(args: argparse.Namespace) -> str:
    dataset = (args.dataset or 'folder').replace('/', '_')
    return '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), dataset])


def _run_stage(
        run: Run,
        stage: int,
        folder: Path,
        stop: StopFlag,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Run a stage from its start, or from a checkpoint of it, and give its metrics; the run's model is left trained."""
    args, model, name = run.args, run.model, STAGES[stage - 1]
    task = create_task(run, stage)
    optimizer = create_optimizer(args, stage, model)
    loss_scaler = create_loss_scaler(run)
    start_epoch = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint['state_dict'])
        if args.model_ema:
            task.get_eval_model(ema=True).load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
        optimizer.load_state_dict(checkpoint['optimizer'])
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
        start_epoch = checkpoint['epoch'] + 1
        _logger.info(f'Resuming {name} at epoch {start_epoch}.')
    compile_task(task, args, stage)

    (folder / name).mkdir(exist_ok=True)
    saver = StageSaver(
        folder / name,
        model=model,
        optimizer=optimizer,
        args=argparse.Namespace(
            **vars(args), class_counts=run.data.class_counts, class_names=run.data.class_names),
        amp_scaler=loss_scaler,
        task=task,
        max_history=args.checkpoint_hist,
    )
    if checkpoint is None:
        saver.save_initial()
    else:
        saver.load_state_dict(checkpoint['saver'])
    metrics = fit(
        task,
        run.train_loader,
        optimizer,
        create_schedule(optimizer, args, stage),
        saver,
        run.evaluate,
        folder / 'summary.csv',
        loop_config(run, stage),
        start_epoch,
        loss_scaler,
        stop,
    )
    if args.model_ema:
        model.load_state_dict(task.get_eval_model(ema=True).state_dict())
    return metrics


def _run_stages(
        run: Run,
        stages: Sequence[int],
        folder: Path,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Run stages in order, the first from a checkpoint if one is given; write metrics and the final model."""
    path = folder / 'metrics.json'
    metrics = json.loads(path.read_text()) if path.exists() else {}
    with stop_signals() as stop:
        try:
            for stage in stages:
                metrics[STAGES[stage - 1]] = _run_stage(run, stage, folder, stop, checkpoint)
                checkpoint = None
                write_text(path, json.dumps(metrics, indent=2) + '\n')
        except RuntimeError as error:
            _logger.error(f'The last checkpoint is kept; go on with train.py --resume {folder}')
            if stop.signum and not isinstance(error, Interrupted):
                raise Interrupted(stop.signum) from error  # a loader whose workers got the signal too
            raise
    export_model(run.model, folder / 'model', run.data_config, run.data.class_names, run.data.class_counts)
    print(format_table(metrics))
    _logger.info(f'Run folder: {folder}')
    return metrics


def _resume_point(args: argparse.Namespace) -> Tuple[int, Optional[Path]]:
    """Stage and checkpoint to go on from; stage one and no checkpoint where nothing was saved yet."""
    folder = Path(run_folder(args))
    first, second = (folder / name / 'last.pth.tar' for name in STAGES)
    if args.resume and os.path.isfile(args.resume):
        path = Path(args.resume)
        if path.parent.name not in STAGES:
            raise InputError(f"checkpoint '{path}' is not in the {' or '.join(STAGES)} of a run: give the run folder.")
        stage = STAGES.index(path.parent.name) + 1
        if stage == 1 and second.exists():
            raise InputError(f"'{path}' is of stage one, but stage two has begun: resume the run folder '{folder}'.")
        return stage, path
    if second.exists():
        return 2, second
    if first.exists():
        return 1, first
    if args.resume and not (folder / 'args.yaml').exists():
        raise InputError(f"'{args.resume}' holds no run to resume: give the folder of a run or a checkpoint in it.")
    return 1, None


def _load_to_resume(path: Path, args: argparse.Namespace) -> Dict[str, Any]:
    checkpoint = load_checkpoint(path)
    wanted = {'state_dict', 'optimizer', 'epoch', 'saver'}
    if not wanted <= set(checkpoint) or not isinstance(checkpoint.get('args'), argparse.Namespace):
        raise InputError(f"checkpoint '{path}' holds no state to resume from: use one that train.py wrote.")
    before = vars(checkpoint['args'])
    option = changed_option(args, before)
    if option is not None:
        raise InputError(
            f"{option.flag} {getattr(args, option.name)} differs from the resumed run's "
            f'{before.get(option.name, option.default)}: leave it out.')
    return checkpoint


def train(args: argparse.Namespace) -> Dict[str, Any]:
    """Run stage one and, unless `crt_epochs` is 0, stage two.

    Args:
        args: What `shike_timm.commands.train.parse_train_args` gives.

    Returns:
        What is written to `metrics.json`: metrics and seconds of `stage_one` and `stage_two`.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    stages = [1, 2] if args.crt_epochs else [1]
    resumed = args.resume is not None
    checkpoint = None
    if resumed:
        folder = Path(run_folder(args))
        args.output, args.experiment = str(folder.parent), folder.name
        stage, path = _resume_point(args)
        if stage not in stages:
            raise InputError(f"Stage two of '{folder}' has begun, which --crt-epochs 0 leaves out: drop it.")
        stages = stages[stage - 1:]
        checkpoint = _load_to_resume(path, args) if path else None
    else:
        args.experiment = args.experiment or _default_experiment(args)
    run = prepare(args, stages, fresh=checkpoint is None)
    if checkpoint is not None:
        load_weights(run.model, checkpoint['state_dict'], path)
    return _run_stages(run, stages, _create_run_folder(args, resumed), checkpoint)


def _stage_one_checkpoint(path: str) -> Path:
    return Path(path, STAGES[0], 'last.pth.tar') if os.path.isdir(path) else Path(path)


def saved_args(path: str) -> Dict[str, Any]:
    """Arguments that a checkpoint, or the stage one of a run folder, was trained with; empty if it has none."""
    saved = load_checkpoint(_stage_one_checkpoint(path)).get('args')
    return vars(saved) if isinstance(saved, argparse.Namespace) else {}


def retrain(args: argparse.Namespace) -> Dict[str, Any]:
    """Run stage two alone, on the trunk and experts of a stage-one checkpoint, into a run folder of its own.

    Args:
        args: What `shike_timm.commands.retrain_classifier.parse_retrain_args` gives.

    Returns:
        What is written to `metrics.json`: metrics and seconds of `stage_two`.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    if not args.crt_epochs:
        raise InputError('--crt-epochs 0 leaves nothing to do: give at least 1.')
    saved = saved_args(args.checkpoint)
    for key in ('holdout', 'dataset', 'imb_factor', 'imb_type') if args.holdout else ():
        if getattr(args, key) != saved.get(key):
            raise InputError(
                f"--holdout {args.holdout:g} would evaluate on images that stage one was trained on, since its "
                f"--{key.replace('_', '-')} was {saved.get(key)}, not {getattr(args, key)}: leave it out.")
    path = _stage_one_checkpoint(args.checkpoint)
    weights = model_weights(load_checkpoint(path), path)
    args.experiment = args.experiment or _default_experiment(args) + '-crt'
    run = prepare(args, [2], fresh=False)
    load_weights(run.model, weights, path)
    return _run_stages(run, [2], _create_run_folder(args, resumed=False))
