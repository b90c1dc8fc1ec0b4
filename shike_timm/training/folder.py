"""The run folder, its files, and its lock: one process at a time owns the folder."""
import os
import socket
from pathlib import Path
from typing import Any, Dict

import yaml
from filelock import FileLock, Timeout

from ..errors import InputError
from ..files import read_json, write_text
from ..metrics import METRICS
from ..options import check_saved
from ..recipes import read_yaml
from .config import RunConfig, TrainConfig

LOCK = '.lock'
NOT_SAVED = ('hparams', 'resume', 'checkpoint')  # These options concern a single start of a run.


def read_args(folder: Path) -> Dict[str, Any]:
    """The options in the `args.yaml` of a run folder, {} without the file. Files of older versions may have others."""
    path = folder / 'args.yaml'
    values = read_yaml(str(path)) if os.path.isfile(path) else {}
    return check_saved(TrainConfig, values, f"'{path}'")


def read_metrics(folder: Path) -> Dict[str, Any]:
    """The metrics by phase in the `metrics.json` of a run folder, {} without the file."""
    path = folder / 'metrics.json'
    metrics = read_json(path) if os.path.isfile(path) else {}
    for phase, result in metrics.items():
        experts = result.get('experts') if _are_metrics(result) else None
        if not isinstance(experts, list) or not all(map(_are_metrics, experts)):
            raise InputError(
                f"'{path}' is damaged: '{phase}' does not hold the metrics of a model and its experts. Restore it, or "
                'remove it.')
    return metrics


def _are_metrics(values: Any) -> bool:
    """Whether these are names and values, with a number or None for each metric."""
    names = (*METRICS, 'macro_f1', 'balanced_classes')
    return isinstance(values, dict) and all(isinstance(values.get(name), (int, float, type(None))) for name in names)


def check_folder(folder: Path, resumed: bool) -> None:
    """Raise an InputError if a folder holds a run that is not to be resumed."""
    if not resumed and os.path.isdir(folder) and any(path.name != LOCK for path in folder.iterdir()):
        raise _taken(folder)


def _taken(folder: Path) -> InputError:
    return InputError(
        f"output folder '{folder}' already holds a run: add --resume to go on, or choose another --experiment.")


def save_args(folder: Path, config: RunConfig) -> None:
    """Write the options of a run to its `args.yaml`."""
    values = {key: value for key, value in vars(config).items() if key not in NOT_SAVED}
    write_text(folder / 'args.yaml', yaml.safe_dump(values))


def claim_folder(folder: Path, config: RunConfig, resumed: bool) -> FileLock:
    """Create a run folder with its `args.yaml`, and lock it until this process ends.

    On Linux the lock is a flock, which NFS passes on to its server, so that it also holds between machines.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
        if not resumed and (folder / 'args.yaml').exists():  # Another process may have begun a run meanwhile.
            raise _taken(folder)
        (folder / LOCK).write_text(f'process {os.getpid()} on {socket.gethostname()}')
        save_args(folder, config)
    except Timeout as error:
        raise InputError(
            f"run folder '{folder}' is in use by {(folder / LOCK).read_text() or 'another process'}: wait for its end, "
            'or choose another --experiment.') from error
    except OSError as error:
        raise InputError(
            f"output folder '{folder}' cannot be written ({error.strerror}): choose another --output.") from error
    return lock
