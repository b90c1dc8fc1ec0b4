"""The progress of a run: the bar on a terminal, and the summary of its epochs."""
import csv
import logging
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Dict, Iterator, List

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..distributed import rank

_logger = logging.getLogger(__name__)

BAR = '{l_bar}{bar}| {remaining} left{postfix}'


class Progress:
    """Counts the finished steps of all phases, and shows them every `interval` seconds in a bar or in the log."""

    def __init__(self, num_steps: int, bar: tqdm, interval: float):
        self.num_steps, self.bar, self.interval = num_steps, bar, interval
        self.begin(0)

    def begin(self, step: int) -> None:
        """Measure the speed from now on, when `step` steps are done."""
        self.first = self.step = self.bar.n = self.bar.initial = step
        self.bar.start_t = time.time()
        self.start = self.shown = time.perf_counter()
        self.images, self.losses = 0, []

    def left(self) -> timedelta:
        """The time until the end of the run, at the mean speed so far."""
        seconds = (time.perf_counter() - self.start) / max(self.step - self.first, 1)
        return timedelta(seconds=round(seconds * (self.num_steps - self.step)))

    def update(self, where: str, loss: Tensor, images: int) -> None:
        """Count a step. The display shows the loss of the step before, so that nothing waits for the device."""
        self.step += 1
        self.images += images
        self.losses = [*self.losses[-1:], loss]
        self.bar.set_description_str(where, refresh=False)
        self.bar.update()
        seconds = time.perf_counter() - self.shown
        if seconds >= self.interval:
            status = f'loss {float(self.losses[0]):#.3g}, {self.images / seconds:.0f} images/s'
            if self.bar.disable:
                _logger.info(f'Train: {where}, {status}, {self.left()} left')
            else:
                self.bar.set_postfix_str(status)
            self.shown, self.images = self.shown + seconds, 0


@contextmanager
def show_progress(num_steps: int, every_minute: bool) -> Iterator[Progress]:
    """Show the progress of a run: on a terminal in a bar below the log lines, else if `every_minute` in a log line."""
    shown = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(total=num_steps, smoothing=0, dynamic_ncols=True, disable=not shown, bar_format=BAR)
    with bar, logging_redirect_tqdm() if shown else nullcontext():
        yield Progress(num_steps, bar, 1 if shown else 60 if every_minute and rank() == 0 else float('inf'))


def read_summary(summary: Path) -> List[Dict[str, str]]:
    """The rows of a summary file, [] if there is no file."""
    if not summary.exists():
        return []
    with summary.open(newline='') as file:
        return list(csv.DictReader(file))
