"""Runs every command: logging, errors as one sentence, exit status."""
import io
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from timm.utils import setup_default_logging

from ..data.workers import explain_failure
from ..distributed import LONGEST_WAIT, rank, world_size
from ..errors import InputError
from ..training.signals import Interrupted
from ..training.step import NonFiniteError


def command(run: Callable[[Any], Any], parse: Callable[[], Any]) -> Callable[[], int]:
    """Make the `main` of a command, which parses the command line and runs with that configuration."""
    return lambda: run_script(lambda: run(parse()))


def run_script(main: Callable[[], Any]) -> int:
    """Run a command. Its exit status is 0, 1 after a failure, 2 for bad input, or 128 plus a signal."""
    for number in range(3):  # If 0, 1 or 2 is closed, the next opened file would take its number.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Names of files and classes may not be printable.
            stream.reconfigure(errors='backslashreplace')
    setup_default_logging()
    for name in ('timm', 'httpx', 'httpx2'):  # httpx and httpx2 log every request to the Hub.
        logging.getLogger(name).setLevel(logging.WARNING)
    name = Path(sys.argv[0]).name

    def fail(status: int, message: object) -> int:
        print(f'{name}: {message}', file=sys.stderr)
        return status

    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        # The other processes wait, so that torchrun ends them if the first process reports the same error.
        time.sleep(10 if rank() else 0)
        return fail(2, f'error: {error}')
    except NonFiniteError as error:
        return fail(1, error)
    except torch.OutOfMemoryError:
        return fail(
            1, 'error: The memory of the device is too small: choose a smaller --batch-size. In training, also choose '
            'more --grad-accum-steps, --amp or --grad-checkpointing.')
    except KeyboardInterrupt:
        return 130
    except Interrupted as stop:
        return fail(128 + stop.signum, f'stopped by signal {stop.signum}')
    except BrokenPipeError:  # The reader of the output, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # 128 plus SIGPIPE
    except (RuntimeError, OSError) as error:
        if world_size() > 1 and ('gloo' in str(error) or isinstance(error, dist.DistError)):
            return fail(
                1, f'error: Another process of the run is gone, or has not answered for {LONGEST_WAIT}: see its own '
                'message.')
        known = explain_failure(error)
        if known is None:
            raise
        return fail(*known)
    return 0
