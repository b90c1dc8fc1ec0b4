"""Experiment trackers, each of which gets what `summary.csv` holds."""
import csv
import importlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

from ..distributed import rank
from ..errors import InputError, one_line
from .config import RunConfig

__all__ = ['check_trackers', 'tracking']

Row = Dict[str, float]

_NEEDS = {
    'log_wandb': ('wandb', 'wandb'),
    'log_trackio': ('trackio', 'trackio'),
    'log_tensorboard': ('torch.utils.tensorboard', 'tensorboard'),
}


def check_trackers(args: RunConfig) -> None:
    """Check that what the arguments ask for is installed.

    Raises:
        InputError: If a package is missing.
    """
    for option, (module, package) in _NEEDS.items():
        if getattr(args, option):
            try:
                importlib.import_module(module)
            except ImportError as error:
                flag = option.replace('_', '-')
                raise InputError(f'--{flag} needs {package}: pip install {package}, or leave it out.') from error


def _start_wandb(args: RunConfig, folder: Path, stack: ExitStack) -> Callable[[Row], Any]:
    import wandb  # pyright: ignore[reportMissingImports]  # an extra that we do not name
    wandb.init(project=args.wandb_project, name=args.experiment, config=vars(args))
    stack.callback(wandb.finish)
    return wandb.log


def _start_trackio(args: RunConfig, folder: Path, stack: ExitStack) -> Callable[[Row], Any]:
    import trackio  # pyright: ignore[reportMissingImports]  # as above
    resume = 'never' if getattr(args, 'resume', None) is None else 'allow'  # retrain_classifier.py has no such option
    trackio.init(project=args.trackio_project, name=args.experiment, config=vars(args), resume=resume)
    stack.callback(trackio.finish)
    return lambda values: trackio.log(values, step=int(values['epoch']))


def _start_tensorboard(args: RunConfig, folder: Path, stack: ExitStack) -> Callable[[Row], Any]:
    from torch.utils.tensorboard import SummaryWriter
    writer = stack.enter_context(SummaryWriter(folder))

    def write(values: Row) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, int(values['epoch']))

    return write


_STARTS = dict(log_wandb=_start_wandb, log_trackio=_start_trackio, log_tensorboard=_start_tensorboard)


@contextmanager
def tracking(args: RunConfig, folder: Path) -> Iterator[Callable[[Path], None]]:
    """Start the trackers that the arguments ask for, in the first process.

    Args:
        args: Arguments of train.py.
        folder: The run folder, which may not be there yet.

    Yields:
        A function that tells them the last row of a summary.

    Raises:
        InputError: If one cannot start.
    """
    trackers: List[Callable[[Row], Any]] = []

    def track(summary: Path) -> None:
        if trackers:
            with summary.open(newline='') as file:
                *_, row = csv.DictReader(file)
            values = {key: float(value) for key, value in row.items() if value}
            for tracker in trackers:
                tracker(values)

    with ExitStack() as stack:
        for option, start in _STARTS.items():
            if getattr(args, option) and not rank():
                try:
                    trackers.append(start(args, folder, stack))
                except Exception as error:  # whatever a service that refuses, or a full disk, makes it raise
                    flag = option.replace('_', '-')
                    raise InputError(
                        f'--{flag} could not start ({one_line(error)}): mend that, or leave it out.') from error
        yield track
