"""The progress of a run: the bar on a terminal, and the summary of its epochs."""
import csv
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Dict, Iterator, List

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


def read_summary(summary: Path) -> List[Dict[str, str]]:
    """The rows of a summary, none where there is no file."""
    with summary.open(newline='') if summary.exists() else nullcontext(()) as file:
        return list(csv.DictReader(file))
