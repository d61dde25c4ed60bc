"""Work for tests of the fan-out, in a module that is quick to load: workers load it again after every death."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import dask

from lenspipe.errors import DeviceError, InputError


@dataclass(frozen=True)
class Batch:
    names: tuple[str, ...]


def halves(batch: Batch) -> list[Batch]:
    middle = len(batch.names) // 2
    return [replace(batch, names=batch.names[:middle]), replace(batch, names=batch.names[middle:])]


def fitted(batch: Batch) -> str:
    return "fitted"


def deadly(batch: Batch) -> str:
    """Work that kills its process where a lens is called X."""
    if "X" in batch.names:
        os.kill(os.getpid(), signal.SIGKILL)
    return "fitted"


def dies_once(batch: Batch, traces: Path) -> str:
    """Work that kills its process the first time that a batch is tried."""
    trace = traces / "".join(batch.names)
    if not trace.exists():
        trace.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "fitted"


def loses_its_gpu_once(batch: Batch, traces: Path) -> str:
    """Work whose GPU fails the first time that a batch is tried."""
    trace = traces / "".join(batch.names)
    if not trace.exists():
        trace.touch()
        raise DeviceError("the GPU has failed")
    return "fitted"


def refuses(batch: Batch) -> str:
    """Work whose inputs are not there."""
    raise InputError("catalogue.zarr: no such file")


def stumbles(batch: Batch, traces: Path, times: int) -> str:
    """Work on a file system that fails the first times that a batch is tried."""
    with (traces / "".join(batch.names)).open("a+") as trace:
        trace.seek(0)
        if len(trace.read()) < times:
            trace.write("x")
            raise OSError("Stale file handle")
    return "fitted"


def device(batch: Batch) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def arenas(batch: Batch) -> str:
    """How many arenas glibc may have in a worker."""
    return os.environ["MALLOC_ARENA_MAX"]


def reads_through_dask(batch: Batch) -> str:
    """Work that waits for a computation of Dask's; says whether its worker did anything else meanwhile."""
    global busy
    alone, busy = not busy, True
    own = dask.delayed(threading.get_ident)().compute() == threading.get_ident()
    time.sleep(0.3)
    busy = False
    return "fitted alone" if alone and own else f"alone: {alone}, in its own thread: {own}"


busy = False


def slurm_job(batch: Batch) -> str:
    """Work of a second that says which job of SLURM did it."""
    time.sleep(1)
    return os.environ["SLURM_JOB_ID"]


def kill_and_wait(batch: Batch, pid: int) -> str:
    """Work that kills another process and then goes on for a minute."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(60)
    return "fitted"
