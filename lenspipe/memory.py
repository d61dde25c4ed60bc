"""Memory: the allocator under PyTorch's tensors on the CPU, what is free, and errors that say there is too little."""

from __future__ import annotations

import ctypes
import gc

import psutil
import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MOST = 2**31 - 1  # bytes
TOO_LITTLE = (  # what PyTorch, the C library, Python, cuBLAS and CUDA say
    "can't allocate memory",
    "cannot allocate memory",
    "can't start new thread",
    "cublas_status_alloc_failed",
    "cuda error: out of memory",
)


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones.

    glibc hands large blocks back to the kernel, which must map and clear them again for every temporary tensor: half
    of the time of a fit. Threads but the first have arenas that cannot keep such blocks, unless MALLOC_ARENA_MAX was 1
    when the process began, as it is in workers. Other C libraries have no `mallopt` and are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(MMAP_THRESHOLD, MOST // 2)
    mallopt(TRIM_THRESHOLD, MOST)


def free_memory() -> int:
    """Bytes that are free on this process's GPU or, where it has none, on the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory was too small, of a GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in TOO_LITTLE)


def device_failed(error: BaseException) -> bool:
    """Whether the error says that a GPU has failed; all that its process asks of it later then fails too."""
    return isinstance(error, torch.AcceleratorError) or "cuda error" in str(error).lower()


def give_back_memory() -> None:
    """Hand all freed memory back, of the GPU and of this process: what `keep_freed_memory` keeps too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library
