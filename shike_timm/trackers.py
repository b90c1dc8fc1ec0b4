"""Experiment trackers, each of which gets what `summary.csv` holds."""
import argparse
import csv
import importlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

from .distributed import rank
from .errors import InputError

__all__ = ['check_trackers', 'tracking']

_NEEDS = {
    'log_wandb': ('wandb', 'wandb'),
    'log_tensorboard': ('torch.utils.tensorboard', 'tensorboard'),
    'plot_curves': ('matplotlib', 'matplotlib'),
}


def check_trackers(args: argparse.Namespace) -> None:
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


@contextmanager
def tracking(args: argparse.Namespace, folder: Path) -> Iterator[Callable[[Path], None]]:
    """Start the trackers that the arguments ask for, in the first process.

    Args:
        args: Arguments of train.py.
        folder: The run folder.

    Yields:
        A function that tells them the last row of a summary.
    """
    trackers: List[Callable[[Dict[str, float]], Any]] = []

    def track(summary: Path) -> None:
        if trackers:
            with summary.open(newline='') as file:
                *_, row = csv.DictReader(file)
            values = {key: float(value) for key, value in row.items() if value}
            for tracker in trackers:
                tracker(values)

    with ExitStack() as stack:
        if args.log_wandb and not rank():
            import wandb  # pyright: ignore[reportMissingImports]  # an extra that we do not name
            wandb.init(project=args.wandb_project, name=args.experiment, config=vars(args), dir=folder)
            stack.callback(wandb.finish)
            trackers.append(wandb.log)
        if args.log_tensorboard and not rank():
            from torch.utils.tensorboard import SummaryWriter
            writer = stack.enter_context(SummaryWriter(folder))

            def write(values: Dict[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, int(values['epoch']))

            trackers.append(write)
        yield track
