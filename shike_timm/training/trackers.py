"""Experiment trackers, which log the rows of `summary.csv`."""
import importlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

from ..distributed import rank
from ..errors import InputError, one_line
from .config import OutputConfig
from .progress import read_summary

Tracker = Callable[[Dict[str, float]], Any]
# The module for each option that chooses a tracker. The last part of the module's name is the package to install.
TRACKERS = {'log_wandb': 'wandb', 'log_trackio': 'trackio', 'log_tensorboard': 'torch.utils.tensorboard'}


def check_trackers(config: OutputConfig) -> None:
    """Raise an InputError if a chosen tracker is not installed."""
    for name, module in TRACKERS.items():
        if getattr(config, name):
            try:
                importlib.import_module(module)
            except ImportError as error:
                flag, package = name.replace('_', '-'), module.split('.')[-1]
                raise InputError(f'--{flag} needs {package}: pip install {package}, or leave it out.') from error


def _start(name: str, config: OutputConfig, folder: Path, stack: ExitStack) -> Tracker:
    """Start a tracker, which ends with `stack`, and return a function that logs values to the tracker."""
    module = importlib.import_module(TRACKERS[name])
    if name == 'log_tensorboard':
        writer = stack.enter_context(module.SummaryWriter(folder))
        return lambda values: [writer.add_scalar(key, value, int(values['epoch'])) for key, value in values.items()]
    options: Dict[str, Any] = dict(project=getattr(config, f'{TRACKERS[name]}_project'))
    if name == 'log_trackio':  # A retraining has no option to resume.
        options['resume'] = 'never' if getattr(config, 'resume', None) is None else 'allow'
    module.init(name=config.experiment, config=vars(config), **options)
    stack.callback(module.finish)
    return lambda values: module.log(values, step=int(values['epoch']))


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
        for name in TRACKERS:
            if getattr(config, name) and not rank():
                try:
                    trackers.append(_start(name, config, folder, stack))
                except Exception as error:  # A service that refuses may raise any error, and so may a full disk.
                    flag = name.replace('_', '-')
                    raise InputError(
                        f'--{flag} could not start ({one_line(error)}): correct that, or leave it out.') from error
        yield track
