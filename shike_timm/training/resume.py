"""Resuming: finding the newest undamaged checkpoint of a run, and checking which options changed."""
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..checkpoints import load_checkpoint, saved_args
from ..data import TrainingData
from ..distributed import world_size
from ..errors import DamagedError, InputError
from ..options import Option, check_file_values, checked, options
from .config import TrainConfig
from .phases import PHASES

_logger = logging.getLogger(__name__)


def run_folder(config: TrainConfig) -> Optional[str]:
    """The folder of the run to resume, None without `--resume`."""
    if config.resume is None:
        return None
    if config.resume:
        path = os.path.abspath(config.resume)
        # The path is RUN or RUN/stage_one/last.pth.tar.
        return os.path.dirname(os.path.dirname(path)) if os.path.isfile(path) else path
    if not config.experiment:
        raise InputError('--resume without a path needs --experiment NAME, the run folder to go on with.')
    return os.path.join(config.output, config.experiment)


def read_stage_one(path: str) -> Dict[str, Any]:
    """Read a checkpoint of stage one, from a checkpoint file or from a run folder, where it is the last checkpoint."""
    return load_checkpoint(Path(path, PHASES[0], 'last.pth.tar') if os.path.isdir(path) else path)


def saved_config(checkpoint: Dict[str, Any], path: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a checkpoint was trained with. Options that it lacks, as in old files, get defaults."""
    known = options(TrainConfig)
    values = {name: value for name, value in saved_args(checkpoint).items() if name in known}
    return checked(TrainConfig, check_file_values(TrainConfig, values, f"checkpoint '{path}'", given))


def _resume_points(config: TrainConfig, folder: Path) -> List[Tuple[int, Path]]:
    """Pairs of phase number and checkpoint to resume from, the newest first, or [] if nothing was saved yet."""
    points = []
    for number, name in reversed(list(enumerate(PHASES, 1))):
        saved = sorted(
            (folder / name).glob('checkpoint-*.pth.tar'), key=lambda path: -int(path.name.split('-')[1].split('.')[0]))
        points += [(number, path) for path in (folder / name / 'last.pth.tar', *saved) if path.exists()]
    if config.resume and os.path.isfile(config.resume):
        path = Path(config.resume)
        if path.parent.name not in PHASES:
            raise InputError(f"checkpoint '{path}' is not in the {' or '.join(PHASES)} of a run: give the run folder.")
        chosen = PHASES.index(path.parent.name) + 1
        if any(number > chosen for number, _ in points):
            raise InputError(f"'{path}' is of stage one, but stage two has begun: resume the run folder '{folder}'.")
        return [(chosen, path)]
    if config.resume and not points and not (folder / 'args.yaml').exists():
        raise InputError(f"'{config.resume}' holds no run to resume: give the folder of a run or a checkpoint in it.")
    return points


def read_newest(config: TrainConfig, folder: Path) -> Tuple[int, Optional[Dict[str, Any]]]:
    """Phase number and content of the newest undamaged checkpoint, or 1 and None if there is no checkpoint."""
    points = _resume_points(config, folder)
    for number, path in points:
        try:
            return number, _read_to_resume(path, config, folder)
        except DamagedError as error:
            if path == points[-1][1]:
                raise
            _logger.warning(f'{error} The one before is used.')
    if (folder / PHASES[1]).exists():
        raise InputError(f"'{folder}' is of a retraining that has saved nothing yet: remove it and retrain again.")
    return 1, None


def changed_option(config: TrainConfig, before: Mapping[str, Any]) -> Optional[Option]:
    """The first option of a resumed run that changed but must not, or None. Options not in `before` had defaults."""
    for name, one in options(TrainConfig).items():
        if not one.may_change and getattr(config, name) != before.get(name, one.default):
            return one
    return None


def _read_to_resume(path: Path, config: TrainConfig, folder: Path) -> Dict[str, Any]:
    checkpoint = load_checkpoint(path)
    wanted = {'state_dict', 'optimizer', 'epoch', 'saver'}
    before = saved_args(checkpoint)
    if not before or not wanted <= set(checkpoint):
        raise InputError(f"checkpoint '{path}' holds no state to resume from: use one that shike train wrote.")
    option = changed_option(config, before)
    if option is not None:
        another = f', or begin another run from its weights with --initial-checkpoint {folder}'
        raise InputError(
            f"{option.flag} {getattr(config, option.name)} differs from the resumed run's "
            f"{before.get(option.name, option.default)}: leave it out{another if option.name == 'epochs' else ''}.")
    if before.get('world_size', 1) != world_size():
        raise InputError(
            f"'{path}' is of a run of {before.get('world_size', 1)} processes, but this one has {world_size()}: start "
            'as many, so that the batches stay the same.')
    return checkpoint


def warn_of_changes(data: TrainingData, before: Sequence[int]) -> None:
    """Warn about classes whose number of training images changed since the run began."""
    changed = [c for c, pair in enumerate(zip(before, data.class_counts)) if pair[0] != pair[1]]
    if changed:
        c = changed[0]
        _logger.warning(
            f'{len(changed)} classes have another number of training images than when the run began. The first is '
            f"'{data.class_names[c]}' with {data.class_counts[c]} after {before[c]}.")
