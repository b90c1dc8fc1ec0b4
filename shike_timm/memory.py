"""The C library's memory, set up for steps that take and free the same large tensors again and again."""
import ctypes

__all__ = ['keep_freed_memory']

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**30  # bytes


def keep_freed_memory() -> bool:
    """Have glibc keep freed tensors for the next step rather than hand their pages back to the kernel.

    By default every tensor of more than a few hundred KiB is mapped afresh and cleared page by page: on two CPU cores
    a fifth of a training step. The process stays as large as its largest step.

    Returns:
        Whether the C library took the settings; another one than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
