"""The progress of a run: the bar on a terminal, and the summary of its epochs."""
import csv
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Iterator, Set

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..distributed import rank


@contextmanager
def progress_bar(num_steps: int) -> Iterator[tqdm]:
    """A bar of the whole run with the time that is left, below the log lines. Only a terminal shows it."""
    shown = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(total=num_steps, unit='step', smoothing=0, dynamic_ncols=True, disable=not shown)
    with bar, logging_redirect_tqdm() if shown else nullcontext():
        yield bar


def read_columns(summary: Path) -> Set[str]:
    """Names of the columns of a summary, empty where there is none."""
    with summary.open(newline='') if summary.exists() else nullcontext(()) as file:
        return set(next(csv.reader(file), ()))


def read_seconds(summary: Path, first_row: int) -> float:
    """Training seconds of the rows of a summary from one on."""
    if not summary.exists():
        return 0.
    with summary.open(newline='') as file:
        return sum(float(row['train_seconds']) for row in csv.DictReader(file) if int(row['epoch']) >= first_row)
