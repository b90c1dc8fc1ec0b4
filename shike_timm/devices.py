"""Choice of the device, its abilities, and the settings of the process that make it fast."""
import ctypes
import os
import sys
from dataclasses import dataclass
from typing import Optional

import torch

from .errors import InputError, one_line
from .options import option

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # These are constants of glibc's malloc.h.
LARGEST_KEPT = (2 ** 30, 2 ** 25)  # Bytes. Older releases of glibc take at most the second value.


@dataclass(frozen=True)
class DeviceConfig:
    """Device."""

    device: Optional[str] = option(
        None, 'device, such as cuda or cpu (default: cuda if there is one)', 'DEVICE', may_change=True, card='never')
    workers: int = option(
        4, 'processes that load images, at most one for each CPU', low=0, flags=('-j',), may_change=True, card='never')


def resolve_device(name: Optional[str]) -> torch.device:
    """Return the named device, by default the GPU if there is one, else the CPU, and set the process up for it."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add_(1).item()  # This fails on a GPU that is too old for this build of torch.
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{name}' cannot be used here: {one_line(error)}.") from error
    if device.type == 'cpu':
        keep_freed_memory()
    elif device.type == 'cuda':
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True  # timm does the same. Convolutions use TF32 by default.
    return device


def limit_workers(number: int) -> int:
    """Limit the number of processes that load images to the number of CPUs that this process may use."""
    return min(number, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device computes bfloat16 natively. Of CPUs, those with AVX-512 BF16 or AMX do."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != 'cpu':
        return True
    if hasattr(torch.cpu, 'get_capabilities'):
        capabilities = torch.cpu.get_capabilities()
        return capabilities.get('avx512_bf16', False) or capabilities.get('amx_tile', False)
    # Older releases of torch have no public function for this.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors. Returns whether glibc does so.

    By default the kernel maps and clears every large tensor anew, which takes up to a fifth of a step on two CPU cores.
    """
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    return bool(
        mallopt and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
        and mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1))
