"""Batches of lenses on many workers: processes of this machine, an existing Dask scheduler, or jobs of SLURM.

`run` knows nothing of lenses but their names. It hands tasks out, tries again what its worker did not survive, and
halves a batch that keeps killing its workers until the guilty lens is alone. Every batch has a log file of its own.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import dask
from dask.distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from dask.utils import parse_bytes
from distributed.comm import CommClosedError
from distributed.security import Security
from distributed.worker import get_worker

from lenspipe.config import Cluster, expand_path
from lenspipe.errors import ClusterError, DeviceError

log = logging.getLogger("lenspipe")

IN_FLIGHT = 256  # tasks that the scheduler has at a time, or four for each worker where that is more
SCHEDULER_SECONDS = 60.0  # that the file of a scheduler which has just been started may take to appear


class Batch(Protocol):
    """What is fitted in one task: at least the names of its lenses."""

    @property
    def names(self) -> tuple[str, ...]: ...


Task = TypeVar("Task", bound=Batch)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Attempt(Generic[Task]):
    """A task on its way: its number, with a letter for every halving, and how often it failed for want of a file."""

    task: Task
    number: str
    failures: int = 0


def run(
    tasks: Sequence[Task],
    work: Callable[[Task], Result],
    where: Cluster,
    split: Callable[[Task], Sequence[Task]],
    workers: int = 1,
    logs: Path | None = None,
) -> Iterator[tuple[Task, Result | None, str]]:
    """(task, result, "") of every task as it is done, or (task, None, reason) for a lens that no worker survives.

    split: parts of a task of several lenses; workers: how many tasks run side by side, from `side_by_side`, one of them
    on one processor being this process itself; logs: folder that gets a log file for every batch. An error that `work`
    raises ends the run, an OSError after `where.retries` repetitions. Raises ClusterError where the scheduler is lost.
    """
    attempts = [Attempt(task, f"{number:04d}") for number, task in enumerate(tasks)]
    if where.kind == "local" and workers == 1 and len(gpus()) < 2:
        for attempt in attempts:
            yield attempt.task, _repeated(attempt, work, logs, where.retries), ""
    elif attempts:
        with connected(where, min(workers, len(attempts))) as client:
            yield from _fan_out(client, attempts, work, where, split, max(IN_FLIGHT, 4 * workers), logs)


def _repeated(attempt: Attempt[Task], work: Callable[[Task], Result], logs: Path | None, retries: int) -> Result:
    """The result, by this process; repeated where a file could not be read."""
    for _ in range(retries):
        with suppress(OSError):
            return logged(attempt, work, logs)
    return logged(attempt, work, logs)


def _fan_out(
    client: Client,
    attempts: list[Attempt[Task]],
    work: Callable[[Task], Result],
    where: Cluster,
    split: Callable[[Task], Sequence[Task]],
    in_flight: int,
    logs: Path | None,
) -> Iterator[tuple[Task, Result | None, str]]:
    """Hand out a few tasks at a time, so that a scheduler never holds a whole catalogue; drop each when it is done."""
    waiting, prefix, sent = attempts[::-1], f"fit-{uuid.uuid4().hex}", 0
    flying: dict[Future, Attempt[Task]] = {}
    done = as_completed(loop=client.loop)

    def send() -> None:
        nonlocal sent
        now = [waiting.pop() for _ in range(min(len(waiting), in_flight - len(flying)))]
        keys = [f"{prefix}-{number}" for number in range(sent, sent + len(now))]
        sent += len(now)
        if now:
            futures = client.map(logged, now, key=keys, work=work, logs=logs, pure=False)
            flying.update(zip(futures, now, strict=True))
            done.update(futures)

    send()
    for future in done:
        attempt = flying.pop(future)
        task = attempt.task
        try:
            result = future.result()
        except KilledWorker:
            if len(task.names) == 1:
                note(attempt, logs, f"{deaths(where)}; given up")
                yield task, None, f"{deaths(where)}; it may need more memory than there is"
            else:
                parts = [Attempt(part, f"{attempt.number}{'ab'[i % 2]}") for i, part in enumerate(split(task))]
                note(attempt, logs, f"{deaths(where)}; goes on as {' and '.join(part.number for part in parts)}")
                waiting.extend(reversed(parts))
        except (CancelledError, CommClosedError) as error:
            raise lost(client, error) from None
        except OSError as error:
            if future.status != "error":
                raise lost(client, error) from None
            if attempt.failures == where.retries:
                raise
            waiting.append(replace(attempt, failures=attempt.failures + 1))
        else:
            yield task, result, ""
            del result
        future.release()
        send()


def deaths(where: Cluster) -> str:
    return f"every worker that fitted it died, {where.retries + 1} in a row"


def lost(client: Client, error: BaseException) -> ClusterError:
    """What to say when the scheduler is gone."""
    address = client.scheduler.address if client.scheduler else "of this run"
    return ClusterError(
        f"lost the Dask scheduler {address} ({type(error).__name__}): it has ended, or cannot be reached; see its log, "
        "start it again and repeat the run, which goes on from what is done"
    )


# What a worker does


def logged(attempt: Attempt[Task], work: Callable[[Task], Result], logs: Path | None) -> Result:
    """Do the work, with everything that `lenspipe` logs in the batch's own file: where, when, how long, what failed.

    Where its GPU fails a worker ends, since it can use it no more; its nanny starts another.

    Arrays that the work reads through Dask are read by itself. Else Dask would send pieces of them around as tasks, and
    let the worker begin another batch beside the one that waits for them.
    """
    try:
        with dask.config.set(scheduler="synchronous"):
            return work(attempt.task) if logs is None else _logged(attempt, work, logs)
    except DeviceError:
        with suppress(ValueError):  # not a worker
            get_worker()
            os._exit(1)
        raise


def _logged(attempt: Attempt[Task], work: Callable[[Task], Result], logs: Path) -> Result:
    began = time.perf_counter()
    with to_file(logs / f"{attempt.number}.log"):
        names = attempt.task.names
        log.info("begins on %s", place())
        log.info("%d lenses: %s", len(names), " ".join(names))
        try:
            result = work(attempt.task)
        except BaseException:
            log.exception("failed after %.1f s", time.perf_counter() - began)
            raise
        log.info("done in %.1f s", time.perf_counter() - began)
    return result


def place() -> str:
    """This process: its machine and number, and what SLURM and CUDA call what it has."""
    named = {"SLURM job": "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES": "CUDA_VISIBLE_DEVICES"}
    given = [f"{name} {os.environ[key]}" for name, key in named.items() if os.environ.get(key)]
    return ", ".join([socket.gethostname(), f"process {os.getpid()}", *given])


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Append what this thread logs under the name `lenspipe` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    thread = get_ident()
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(lambda record: record.thread == thread)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def note(attempt: Attempt[Task], logs: Path | None, text: str) -> None:
    """A line in the log of a batch by the process that handed it out."""
    if logs is not None:
        with to_file(logs / f"{attempt.number}.log"):
            log.info(text)


# Where the workers are


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: what SLURM gave it, or all there are."""
    import torch  # here, since workers load this module too, and some of them for work without it

    return named_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def named_gpus(visible: str | None, count: int) -> list[str]:
    """Names of `count` GPUs: the first of CUDA_VISIBLE_DEVICES, which may be numbers or UUIDs, or their numbers."""
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    return names[:count]


def processors() -> int:
    """Processors that this process may use: of its SLURM job, or of the machine."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    return min(int(given), len(os.sched_getaffinity(0))) if given else len(os.sched_getaffinity(0))


def side_by_side(where: Cluster, workers: int | None = None) -> int:
    """How many batches are fitted at a time; `workers` bounds the processes on this machine.

    On this machine one for each GPU or, where there is none, each processor; with SLURM as many as there may be jobs.
    """
    if where.kind == "slurm":
        return where.jobs_max
    if where.kind == "address":
        with connected(where, 1) as client:
            return max(1, sum(client.nthreads().values()))
    found = len(gpus())
    return min(found, workers or found) if found else workers or processors()


def worker_memory(where: Cluster, workers: int) -> float:
    """Bytes that one of the workers may use: of its GPU, its share of the machine or SLURM job, its own SLURM job."""
    if where.kind == "slurm":
        job = slurm_jobs().site_settings(where)["jobqueue"]["slurm"]
        return parse_bytes(job["memory"]) / (job["processes"] or 1)
    if where.kind == "address":
        with connected(where, 1) as client:
            found = client.scheduler_info(n_workers=-1)["workers"].values()
        return min(((worker["memory_limit"] or math.inf) / worker["nthreads"] for worker in found), default=math.inf)
    from lenspipe import memory  # here, as it loads PyTorch

    if gpus():
        return memory.free_memory()
    return min(memory.free_memory(), memory_of_job()) / workers


def memory_of_job() -> float:
    """Bytes that the SLURM job of this process has been given, by the job or by the processor; inf where none is."""
    if given := os.environ.get("SLURM_MEM_PER_NODE"):  # MiB
        return int(given) * 2**20
    if given := os.environ.get("SLURM_MEM_PER_CPU"):
        return int(given) * 2**20 * processors()
    return math.inf


@contextmanager
def connected(where: Cluster, workers: int) -> Iterator[Client]:
    """A client of the cluster that the settings ask for; what was started for it ends with it."""
    if where.kind == "address":
        with _client_of(where) as client:
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": where.retries,
        "distributed.scheduler.worker-saturation": 1.0,  # no second batch waits at a worker while another has none
        # a thread of glibc's own arenas gives all large tensors back: see `keep_freed_memory`
        "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": 1,
    }
    if where.kind == "slurm":
        with dask.config.set(settings), slurm_jobs().workers(where) as client:
            yield client
        return
    with dask.config.set(settings), local_cluster(workers) as cluster, Client(cluster) as client:
        say(f"dashboard: {client.dashboard_link}")
        client.wait_for_workers(workers)
        yield client


def slurm_jobs() -> ModuleType:
    """The module of workers that are jobs of SLURM. Raises ClusterError where what it needs is not installed."""
    try:
        from lenspipe.fit import slurm
    except ImportError:
        raise ClusterError("cluster.kind slurm needs dask-jobqueue; pip install 'lenspipe[cluster]'") from None
    return slurm


def _client_of(where: Cluster) -> Client:
    """A client of a scheduler that runs already, by its address or by the file that it wrote."""
    assert where.address is not None  # the settings see to it
    file = None if "://" in where.address else expand_path(where.address)
    given_up = time.monotonic() + SCHEDULER_SECONDS
    while file and not file.is_file():
        if time.monotonic() > given_up:  # Dask would wait for ever
            raise ClusterError(f"cluster.address: {file}: no such file of a scheduler; start `dask scheduler` with it")
        time.sleep(0.1)
    try:
        client = Client(scheduler_file=str(file)) if file else Client(where.address)
    except OSError as error:
        raise ClusterError(
            f"cluster.address: no Dask scheduler answers at {where.address} ({error}); start one with `dask scheduler`"
        ) from None
    say(f"dashboard: {client.dashboard_link}")
    return client


class Queue(Scheduler):
    """A scheduler that keeps a task until a worker is free for it, also where tasks are few.

    Dask would let tasks wait at busy workers, and count the death of such a worker against all of them.
    """

    def is_rootish(self, ts: Any) -> bool:
        return True


def local_cluster(workers: int) -> SpecCluster:
    """Processes of this machine, each watched by a nanny that starts it again when it dies."""
    here = {"host": "127.0.0.1", "security": Security()}
    scheduler = {"cls": Queue, "options": {**here, "dashboard_address": ":0"}}
    return SpecCluster(workers=nannies(gpus(), workers), scheduler=scheduler, silence_logs=logging.ERROR)


def nannies(devices: Sequence[str], workers: int) -> dict[int, dict[str, Any]]:
    """What SpecCluster makes workers from: one thread each, and its own GPU, seen as the only one, where there are."""
    # workers are silent: an error of the work is raised by `run`, and is in the log of its batch with its traceback
    options: dict[str, Any] = {"host": "127.0.0.1", "nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    if not devices:
        return {number: {"cls": Nanny, "options": options} for number in range(workers)}
    return {
        number: {
            "cls": Nanny,
            "options": {**options, "env": {"CUDA_VISIBLE_DEVICES": name}, "resources": {"GPU": 1}},
        }
        for number, name in enumerate(devices[:workers])
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
