"""Experiment trackers. Each gets the rows of `summary.csv`."""
import importlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

from ..distributed import rank
from ..errors import InputError, one_line
from .config import OutputConfig
from .progress import read_summary

Tracker = Callable[[Dict[str, float]], Any]

def _start_wandb(config: OutputConfig, folder: Path, stack: ExitStack) -> Tracker:
    """Start Weights & Biases; timm's `update_summary` logs to it."""
    import wandb  # pyright: ignore[reportMissingImports]
    wandb.init(project=config.wandb_project, name=config.experiment, config=vars(config))
    stack.callback(wandb.finish)
    return lambda values: None


def _start_trackio(config: OutputConfig, folder: Path, stack: ExitStack) -> Tracker:
    import trackio  # pyright: ignore[reportMissingImports]
    resume = 'never' if getattr(config, 'resume', None) is None else 'allow'  # A retraining has no such option.
    trackio.init(project=config.trackio_project, name=config.experiment, config=vars(config), resume=resume)
    stack.callback(trackio.finish)
    return lambda values: trackio.log(values, step=int(values['epoch']))


def _start_tensorboard(config: OutputConfig, folder: Path, stack: ExitStack) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter
    writer = stack.enter_context(SummaryWriter(folder))

    def write(values: Dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, int(values['epoch']))

    return write


# The tracker of each option: the module that it needs, its package, and how it starts.
_TRACKERS = {
    'log_wandb': ('wandb', 'wandb', _start_wandb),
    'log_trackio': ('trackio', 'trackio', _start_trackio),
    'log_tensorboard': ('torch.utils.tensorboard', 'tensorboard', _start_tensorboard),
}


def check_trackers(config: OutputConfig) -> None:
    """Refuse a tracker that is not installed."""
    for name, (module, package, _) in _TRACKERS.items():
        if getattr(config, name):
            try:
                importlib.import_module(module)
            except ImportError as error:
                flag = name.replace('_', '-')
                raise InputError(f'--{flag} needs {package}: pip install {package}, or leave it out.') from error


@contextmanager
def tracking(config: OutputConfig, folder: Path) -> Iterator[Callable[[Path], None]]:
    """Start the chosen trackers in the first process, and yield a function that logs the last row of a summary."""
    trackers: List[Tracker] = []

    def track(summary: Path) -> None:
        if trackers:
            values = {key: float(value) for key, value in read_summary(summary)[-1].items() if value}
            for tracker in trackers:
                tracker(values)

    with ExitStack() as stack:
        for name, (*_, start) in _TRACKERS.items():
            if getattr(config, name) and not rank():
                try:
                    trackers.append(start(config, folder, stack))
                except Exception as error:  # A service that refuses may raise anything, and so may a full disk.
                    flag = name.replace('_', '-')
                    raise InputError(
                        f'--{flag} could not start ({one_line(error)}): mend that, or leave it out.') from error
        yield track
