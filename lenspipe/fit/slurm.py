"""Workers that are jobs of SLURM, submitted as they are needed."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import dask_jobqueue  # with its defaults, which the site's settings go over
import yaml
from dask.distributed import Client
from dask.utils import parse_bytes
from dask_jobqueue.slurm import SLURMJob
from distributed.deploy.spec import ProcessInterface

from lenspipe.config import Cluster, expand_path
from lenspipe.errors import ClusterError, ConfigError
from lenspipe.fit.cluster import Queue, say

POLL = 1.0  # seconds between looks at jobs that have not begun
BUSY = re.compile("timed out|unable to contact|temporarily", re.IGNORECASE)  # what says nothing of the job itself
WAITS = (1, 4, 15, 60, 60, 60)  # seconds after which a job that was not taken is submitted again, the last for ever


@contextmanager
def workers(where: Cluster) -> Iterator[Client]:
    """A client whose scheduler is in this process; there is one worker when it is given, and Dask asks for more."""
    with dask.config.set(site_settings(where)), slurm_cluster(where) as cluster, Client(cluster) as client:
        say(f"dashboard: {client.dashboard_link}")
        first_worker(client, cluster, where)
        cluster.adapt(minimum_jobs=where.jobs_min, maximum_jobs=where.jobs_max)
        yield client


def site_settings(where: Cluster) -> dict[str, Any]:
    """What the site's file says, over Dask's own settings: SLURM's partition, memory, time of a worker's job."""
    path = expand_path(where.site)
    shipped = Path(__file__).parents[2] / where.site
    if not path.is_file() and shipped.is_file():
        path = shipped
    if not path.is_file():
        raise ConfigError(
            f"cluster.site: {path.resolve()}: no such file; it says what a SLURM job of a worker asks for"
        )
    try:
        site = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"cluster.site: {path}: not YAML: {error}") from None
    queues = site.get("jobqueue") if isinstance(site, dict) else None
    if not isinstance(queues, dict) or not isinstance(queues.get("slurm"), dict):
        raise ConfigError(f"cluster.site: {path}: expected the section jobqueue.slurm, found {str(site)[:80]}")
    settings = {key: dask.config.merge(dask.config.get(key, {}), value) for key, value in site.items()}
    job = settings["jobqueue"]["slurm"]
    memory, cores, processes = (job.get(key) for key in ("memory", "cores", "processes"))
    job["processes"] = processes or cores
    if processes and cores != processes:
        raise ConfigError(
            f"cluster.site: {path}: jobqueue.slurm has {cores} cores for {processes} processes; each process fits one "
            "batch at a time on one core, so give both the same number"
        )
    try:
        parse_bytes(memory)
    except (ValueError, AttributeError):
        raise ConfigError(
            f"cluster.site: {path}: jobqueue.slurm.memory: expected what a job may use, such as 4GB, found {memory}"
        ) from None
    return settings


class Job(SLURMJob):
    """A job that is submitted until SLURM takes it, as it may not where its controller is busy, or until it is closed.

    Nothing waits for that: Dask counts it as a worker that is coming, as it does one that is in SLURM's queue.
    """

    refusal = ""  # what SLURM said last, where it has taken none for long
    submission: asyncio.Future[None] | None = None

    async def start(self) -> None:
        self.submission = asyncio.ensure_future(self._submit())
        await ProcessInterface.start(self)

    async def _submit(self) -> None:
        for attempt in itertools.count():
            try:
                await super().start()
            except ValueError as error:  # taken, but SLURM's answer has no number of the job
                self.refusal = str(error)
                return
            except RuntimeError as error:
                self.refusal = str(error) if attempt >= len(WAITS) else ""
            else:
                self.refusal = ""
                return
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self.finished(), WAITS[min(attempt, len(WAITS) - 1)])

    async def close(self) -> None:
        self._event_finished.set()
        if self.submission:
            await self.submission
        await super().close()
        await ProcessInterface.close(self)


class SlurmCluster(dask_jobqueue.SLURMCluster):
    """Dask's, with such jobs."""

    job_cls = Job


def slurm_cluster(where: Cluster) -> SlurmCluster:
    """A scheduler in this process, whose workers are jobs of SLURM; asks sbatch whether it would take such a job."""
    if not shutil.which("sbatch"):
        raise ClusterError("cluster.kind is slurm, but there is no sbatch here; run where jobs can be submitted from")
    cluster = SlurmCluster(scheduler_cls=Queue, silence_logs=logging.ERROR)
    asked = subprocess.run(
        ["sbatch", "--test-only"], input=cluster.job_script(), capture_output=True, text=True, check=False
    )
    if asked.returncode and not BUSY.search(asked.stderr):
        cluster.close()
        raise refused(asked.stderr, where)
    return cluster


def refused(said: str, where: Cluster) -> ClusterError:
    """What to say where SLURM does not take a job."""
    return ClusterError(f"SLURM refuses a worker's job: {' '.join(said.split())}; mend {where.site}")


def first_worker(client: Client, cluster: SlurmCluster, where: Cluster) -> None:
    """Wait for the first worker, however long SLURM's queue is.

    Gives up where SLURM takes no job for some minutes, or where its jobs end without having become one. Later jobs are
    asked for by Dask as needed, again and again: a mistake in the site's file has to be found before.
    """
    cluster.scale(jobs=max(1, where.jobs_min))
    say("waiting for the first worker from SLURM")
    submitted: set[str] = set()
    while not client.nthreads():
        time.sleep(POLL)
        jobs = list(cluster.workers.values())
        if refusals := [job.refusal for job in jobs if job.refusal]:
            raise refused(refusals[0], where)
        submitted |= {job.job_id for job in jobs if job.job_id}
        if submitted and not in_queue(submitted) and not client.nthreads():
            folder = dask.config.get("jobqueue.slurm.log-directory", None)
            raise ClusterError(
                f"the SLURM jobs {', '.join(sorted(submitted))} ended without becoming workers; see their output in "
                f"{folder or os.getcwd()}, and mend {where.site}"
            )


def in_queue(jobs: set[str]) -> bool:
    """Whether SLURM still has one of the jobs, waiting or running."""
    states = "--states=PENDING,CONFIGURING,RUNNING,COMPLETING,SUSPENDED"
    command = ["squeue", "--noheader", "--format=%A", states]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.returncode != 0 or bool(jobs & set(asked.stdout.split()))
