"""What every script does around its work: logging, one-sentence errors, exit status."""
import logging
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from timm.utils import setup_default_logging

from ..distributed import rank
from ..errors import InputError
from ..training.signals import Interrupted
from ..training.trainer import NonFiniteError

__all__ = ['run_script']


def run_script(main: Callable[[], Any]) -> int:
    """Run a script's work and give its exit status.

    Returns:
        0 when done, 1 when training stopped being finite, memory ran out or the system failed, 2 for bad input, 128
        plus the signal when stopped by one.
    """
    setup_default_logging()
    for name in ('timm', 'httpx', 'httpx2'):  # the last two tell of every request to the Hub
        logging.getLogger(name).setLevel(logging.WARNING)
    name = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        time.sleep(10 if rank() else 0)  # torchrun ends this process meanwhile if the first one says the same
        print(f'{name}: error: {error}', file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f'{name}: {error}', file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(
            f'{name}: error: The memory of the device is too small: choose a smaller --batch-size, in training with as '
            'many --grad-accum-steps more, --amp or --grad-checkpointing.', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Interrupted as stop:
        print(f'{name}: stopped by signal {stop.signum}', file=sys.stderr)
        return 128 + stop.signum
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        print(
            f'{name}: error: A process that loads images is gone, perhaps for want of memory: choose fewer --workers.',
            file=sys.stderr)
        return 1
    except OSError as error:
        print(f'{name}: error: {error}', file=sys.stderr)
        return 1
    return 0
