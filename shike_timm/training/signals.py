"""Orderly stops: signals become a flag that the training loop reads between steps."""
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator

from ..distributed import world_size


class Interrupted(RuntimeError):
    """A signal asked the run to stop. `signum` is its number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@dataclass
class StopFlag:
    """Number of the signal that asked for a stop, 0 for none."""

    signum: int = 0

    def check(self) -> None:
        """Raise `Interrupted` if a signal asked for a stop."""
        if self.signum:
            raise Interrupted(self.signum)


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Set a flag on SIGINT or SIGTERM, in the main thread. In a run of one process, a second signal acts at once.

    In a run of several processes, torchrun may send a process the signal twice, so the handler stays installed.
    """
    flag = StopFlag()
    previous = {}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: Any) -> None:
        flag.signum = signum
        if world_size() == 1:
            restore()

    main = threading.current_thread() is threading.main_thread()
    for signum in (signal.SIGINT, signal.SIGTERM) if main else ():
        previous[signum] = signal.signal(signum, handle)
    try:
        yield flag
    finally:
        restore()
