"""Where a run goes on from: its newest whole checkpoint, and what may be another than when it began."""
import argparse
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..checkpoints import load_checkpoint
from ..data import TrainingData
from ..distributed import world_size
from ..errors import DamagedError, InputError
from .config import TrainConfig, changed_option, run_folder
from .methods import STAGES

__all__ = ['load_newest', 'load_stage_one', 'saved_args', 'warn_of_changes']

_logger = logging.getLogger(__name__)


def load_stage_one(path: str) -> Dict[str, Any]:
    """The checkpoint of stage one that a path names: the last one of a run folder, or the file itself.

    Raises:
        InputError: If it cannot be read.
    """
    return load_checkpoint(Path(path, STAGES[0], 'last.pth.tar') if os.path.isdir(path) else path)


def saved_args(checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments that a checkpoint was trained with; empty if it has none."""
    saved = checkpoint.get('args')
    return vars(saved) if isinstance(saved, argparse.Namespace) else {}


def _resume_points(args: TrainConfig) -> List[Tuple[int, Path]]:
    """Stages and their checkpoints to go on from, the newest first; none where nothing was saved yet."""
    folder = Path(run_folder(args) or '')
    points = []
    for stage, name in reversed(list(enumerate(STAGES, 1))):
        saved = sorted(
            (folder / name).glob('checkpoint-*.pth.tar'), key=lambda path: -int(path.name.split('-')[1].split('.')[0]))
        points += [(stage, path) for path in (folder / name / 'last.pth.tar', *saved) if path.exists()]
    if args.resume and os.path.isfile(args.resume):
        path = Path(args.resume)
        if path.parent.name not in STAGES:
            raise InputError(f"checkpoint '{path}' is not in the {' or '.join(STAGES)} of a run: give the run folder.")
        stage = STAGES.index(path.parent.name) + 1
        if any(number > stage for number, _ in points):
            raise InputError(f"'{path}' is of stage one, but stage two has begun: resume the run folder '{folder}'.")
        return [(stage, path)]
    if args.resume and not points and not (folder / 'args.yaml').exists():
        raise InputError(f"'{args.resume}' holds no run to resume: give the folder of a run or a checkpoint in it.")
    return points


def load_newest(args: TrainConfig) -> Tuple[int, Optional[Path], Optional[Dict[str, Any]]]:
    """Stage, path and content of the newest checkpoint that is whole; 1 and None where nothing was saved yet.

    Raises:
        InputError: If there is no run, none of its checkpoints is whole or may go on as asked, or it is a retraining
            that has saved nothing.
    """
    points = _resume_points(args)
    for stage, path in points:
        try:
            return stage, path, _load_to_resume(path, args)
        except DamagedError as error:
            if path == points[-1][1]:
                raise
            _logger.warning(f'{error} The one before is used.')
    folder = Path(run_folder(args) or '')
    if (folder / STAGES[1]).exists():
        raise InputError(f"'{folder}' is of a retraining that has saved nothing yet: remove it and retrain again.")
    return 1, None, None


def _load_to_resume(path: Path, args: TrainConfig) -> Dict[str, Any]:
    checkpoint = load_checkpoint(path)
    wanted = {'state_dict', 'optimizer', 'epoch', 'saver'}
    if not wanted <= set(checkpoint) or not isinstance(checkpoint.get('args'), argparse.Namespace):
        raise InputError(f"checkpoint '{path}' holds no state to resume from: use one that train.py wrote.")
    before = vars(checkpoint['args'])
    option = changed_option(args, before)
    if option is not None:
        another = f', or begin another run from its weights with --initial-checkpoint {run_folder(args)}'
        raise InputError(
            f"{option.flag} {getattr(args, option.name)} differs from the resumed run's "
            f"{before.get(option.name, option.default)}: leave it out{another if option.name == 'epochs' else ''}.")
    if before.get('world_size', 1) != world_size():
        raise InputError(
            f"'{path}' is of a run of {before.get('world_size', 1)} processes, and these are {world_size()}: start as "
            'many, so that batches stay what they were.')
    return checkpoint


def warn_of_changes(data: TrainingData, before: Optional[Sequence[int]]) -> None:
    """Warn where classes have other numbers of training images than when the run began."""
    changed = [c for c, pair in enumerate(zip(before or (), data.class_counts)) if pair[0] != pair[1]]
    if before and changed:
        c = changed[0]
        _logger.warning(
            f'{len(changed)} classes have other numbers of training images than when the run began, the first is '
            f"'{data.class_names[c]}' with {data.class_counts[c]} after {before[c]}.")
