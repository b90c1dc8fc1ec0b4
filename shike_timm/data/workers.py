"""Worker processes that load images. If one fails or hangs, the training process gets an error."""
import re
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from ..errors import one_line

LONGEST_WAIT = 600  # Seconds without a batch from any process. A slow disk takes far less.


@dataclass
class _InSharedMemory:
    """A collation whose tensors lie in shared memory.

    torch moves tensors to shared memory too, but in a thread that would only print an error. Here the training process
    gets the error.
    """

    collate: Callable[[List[Any]], Any]

    def __call__(self, items: List[Any]) -> Any:
        batch = self.collate(items)
        for part in batch if get_worker_info() else ():
            if isinstance(part, Tensor):
                part.share_memory_()
        return batch


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        try:
            return super().__iter__()
        except OSError as error:  # The queues of the workers need a little shared memory too.
            raise RuntimeError(f'DataLoader worker cannot start: {one_line(error)}') from error


def create_loader(
        data: Any, batch_size: int, num_workers: int, collate: Callable[[List[Any]], Any], **options: Any,
) -> DataLoader:
    """torch's loader. It raises a RuntimeError if a process fails, or if no batch comes for `LONGEST_WAIT` seconds."""
    return _Loader(
        data, batch_size, num_workers=num_workers, collate_fn=_InSharedMemory(collate),
        timeout=LONGEST_WAIT if num_workers else 0,
        generator=torch.Generator(),  # Without it the start of workers would draw from torch's generator.
        **options)


def explain_failure(error: Exception) -> Optional[Tuple[int, str]]:
    """Exit status and message for an error of the system or of a worker process. None for other errors."""
    text = str(error)
    from_worker = re.match(r'Caught \w+ in DataLoader worker.*\n[\w.]+: (.*)$', text, re.DOTALL)
    text = from_worker[1] if from_worker else text
    # Older releases of torch report the bus error. A full disk is an OSError, not a RuntimeError.
    if '(shm)' in text or 'Bus error' in text or isinstance(error, RuntimeError) and 'No space left' in text:
        return 2, (
            'error: /dev/shm, the memory that processes share, is too small for the images that --workers load: start '
            'the container with more, as `docker run --shm-size=2g` does, or choose fewer --workers, such as 0.')
    if 'DataLoader timed out' in text:
        return 1, (
            f'error: The processes that load images gave none for {LONGEST_WAIT // 60} minutes: check that the '
            'disk of the images responds, and try --workers 0.')
    if 'Too many open files' in text:
        return 1, 'error: Too many files are open: allow more with `ulimit -n 65536`, or choose fewer --workers.'
    if 'DataLoader worker' in text:
        return 1, 'error: A process that loads images is gone, perhaps for lack of memory: choose fewer --workers.'
    return (1, f'error: {text}') if isinstance(error, OSError) else None
