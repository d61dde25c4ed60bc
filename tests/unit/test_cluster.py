"""The fan-out of batches: what becomes of workers that die, of errors, of GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path

import dask
import pytest
from dask.distributed import Client, SpecCluster
from rich.console import Console

from lenspipe import memory
from lenspipe.config import Cluster
from lenspipe.errors import ClusterError, DeviceError, InputError
from lenspipe.fit import cluster
from lenspipe.fit.batch import Task as FitTask
from lenspipe.fit.batch import fit_task
from lenspipe.fit.progress import Tally, progress
from lenspipe.results import Results
from tests.conftest import ROOT
from tests.fan_out_work import (
    Batch,
    arenas,
    deadly,
    device,
    dies_once,
    fitted,
    halves,
    kill_and_wait,
    loses_its_gpu_once,
    reads_through_dask,
    refuses,
    stumbles,
)

Outcome = dict[str, str]


def batches(*names: str) -> list[Batch]:
    """A batch of lenses with one letter for each text."""
    return [Batch(tuple(text)) for text in names]


def outcome(
    tasks: list[Batch], work: Callable[[Batch], str], where: Cluster, workers: int = 2, logs: Path | None = None
) -> Outcome:
    """What the run says of every lens; each must come once."""
    said = {}
    for task, result, reason in cluster.run(tasks, work, where, halves, workers, logs):
        for name in task.names:
            assert name not in said
            said[name] = reason or result
    return said


@pytest.mark.parametrize("workers", [1, 2])
def test_every_lens_comes_once(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the scheduler is given few tasks at a time."""
    monkeypatch.setattr(cluster, "IN_FLIGHT", 2)
    tasks = batches(*["abc", "d", "efg", "hi", "j", "kl", "m", "nop", "q", "rs", "t"])
    said = outcome(tasks, fitted, Cluster(), workers)
    assert said == dict.fromkeys("abcdefghijklmnopqrst", "fitted")


def test_workers_keep_freed_memory() -> None:
    """Also what a thread has freed: there is one arena for all of them."""
    assert outcome(batches("a", "b"), arenas, Cluster()) == {"a": "1", "b": "1"}


def test_a_lens_that_kills_its_workers_is_the_only_one_lost(tmp_path: Path) -> None:
    """Its batch is halved until it is alone; each part has a log, which ends where its worker did."""
    said = outcome(batches("abXde", "fg"), deadly, Cluster(retries=0), logs=tmp_path)
    assert said.pop("X") == "every worker that fitted it died, 1 in a row; it may need more memory than there is"
    assert said == dict.fromkeys("abdefg", "fitted")
    logs = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert set(logs) == {"0000", "0000a", "0000b", "0000ba", "0000bb", "0001"}
    assert "goes on as 0000a and 0000b" in logs["0000"]
    assert re.search(r"begins on \S+, process \d+", logs["0001"])
    assert "2 lenses: f g" in logs["0001"]
    assert re.search(r"done in \d+\.\d s", logs["0001"])
    assert "given up" in logs["0000ba"]
    assert "done in" not in logs["0000ba"]


def test_a_batch_whose_worker_died_is_tried_again(tmp_path: Path) -> None:
    tasks = batches("ab", "cd", "ef")
    assert outcome(tasks, partial(dies_once, traces=tmp_path), Cluster(retries=1)) == dict.fromkeys("abcdef", "fitted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ab", "cd", "ef"]  # not halved


def test_a_worker_whose_gpu_failed_is_replaced(tmp_path: Path) -> None:
    """This process itself has nobody to start it again."""
    lost = partial(loses_its_gpu_once, traces=tmp_path)
    assert outcome(batches("ab", "cd"), lost, Cluster(retries=1)) == dict.fromkeys("abcd", "fitted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ab", "cd"]
    with pytest.raises(DeviceError):
        outcome(batches("e"), lost, Cluster(retries=1), workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_cannot_be_read_for_a_while(workers: int, tmp_path: Path) -> None:
    """As on network file systems: tried again, but not for ever."""
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    twice = partial(stumbles, traces=tmp_path / "few", times=2)
    assert outcome(batches("ab", "c"), twice, Cluster(retries=2), workers) == dict.fromkeys("abc", "fitted")
    thrice = partial(stumbles, traces=tmp_path / "many", times=3)
    with pytest.raises(OSError, match="Stale file handle"):
        outcome(batches("ab", "c"), thrice, Cluster(retries=2), workers)


def test_an_error_of_the_run_is_no_fault_of_the_lenses(tmp_path: Path) -> None:
    """A missing file stops the job, so that it can be mended and run again; it makes no failed rows."""
    tasks = [FitTask("{}", Results(tmp_path), "b", (name,)) for name in "ab"]
    with pytest.raises((InputError, OSError), match=str(tmp_path)):
        list(cluster.run(tasks, fit_task, Cluster(), halves, 1, tmp_path / "logs"))
    assert "Traceback" in (tmp_path / "logs/0000.log").read_text()


def test_an_error_of_the_run_at_a_worker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is not tried again, and ends the run; its traceback is in the log of the batch and nowhere else."""
    with pytest.raises(InputError, match=r"catalogue.zarr: no such file"):
        outcome(batches("ab", "c"), refuses, Cluster(), logs=tmp_path)
    assert all(path.read_text().count("begins") == 1 for path in tmp_path.iterdir())
    assert any("Traceback" in path.read_text() for path in tmp_path.iterdir())
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_has_one_batch_at_a_time() -> None:
    """Also where the batch reads its data through Dask, which would let the worker begin another one."""
    said = outcome(batches("a", "b", "c", "d", "e"), reads_through_dask, Cluster(), 2)
    assert said == dict.fromkeys("abcde", "fitted alone")


def test_names_of_gpus() -> None:
    assert cluster.named_gpus(None, 0) == []
    assert cluster.named_gpus(None, 3) == ["0", "1", "2"]
    assert cluster.named_gpus("4,6", 2) == ["4", "6"]
    assert cluster.named_gpus("GPU-8932f937, GPU-72c8ab11", 2) == ["GPU-8932f937", "GPU-72c8ab11"]
    assert cluster.named_gpus("", 0) == []
    assert cluster.named_gpus("0,1", 0) == []  # a PyTorch without CUDA


def test_every_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are three of them here by all appearances, and more processors."""
    monkeypatch.setattr(cluster, "gpus", lambda: ["3", "GPU-a", "GPU-b"])
    assert cluster.side_by_side(Cluster(), 8) == 3
    assert cluster.side_by_side(Cluster(), 2) == 2
    assert cluster.side_by_side(Cluster()) == 3
    with SpecCluster(workers=cluster.nannies(cluster.gpus(), 2)) as two, Client(two) as client:
        client.wait_for_workers(2)
        assert sorted(client.run(device, None).values()) == ["3", "GPU-a"]
        resources = [worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    assert resources == [{"GPU": 1}, {"GPU": 1}]


def test_processors_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert cluster.side_by_side(Cluster()) == 12
    assert cluster.side_by_side(Cluster(), 20) == 20
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert cluster.side_by_side(Cluster()) == 3
    assert cluster.side_by_side(Cluster(kind="slurm", jobs_max=7), 2) == 7


def test_memory_of_a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its share of the machine or of the SLURM job, all that is free on its GPU, or what its own SLURM job has."""
    for name in ("NODE", "CPU"):
        monkeypatch.delenv(f"SLURM_MEM_PER_{name}", raising=False)
    monkeypatch.setattr(memory, "free_memory", lambda: 64 * 2**30)
    assert cluster.worker_memory(Cluster(), 4) == 16 * 2**30
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "8192")
    assert cluster.worker_memory(Cluster(), 4) == 2 * 2**30
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "2048")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert cluster.worker_memory(Cluster(), 4) == 2**30 / 2
    monkeypatch.setattr(cluster, "gpus", lambda: ["0", "1"])
    assert cluster.worker_memory(Cluster(), 2) == 64 * 2**30
    (tmp_path / "site.yaml").write_text("jobqueue: {slurm: {cores: 2, processes: 2, memory: 4GiB}}\n")
    assert cluster.worker_memory(Cluster(kind="slurm", site=str(tmp_path / "site.yaml")), 9) == 2 * 2**30
    (tmp_path / "site.yaml").write_text("jobqueue: {slurm: {cores: 4, memory: 4GiB}}\n")
    assert cluster.worker_memory(Cluster(kind="slurm", site=str(tmp_path / "site.yaml")), 9) == 2**30


def test_a_scheduler_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SCHEDULER_SECONDS", 0.2)
    where = Cluster(kind="address", address=str(tmp_path / "scheduler.json"))
    with pytest.raises(ClusterError, match=r"cluster.address: \S+scheduler.json: no such file of a scheduler"):
        cluster.side_by_side(where)


@pytest.fixture
def scheduler(tmp_path: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A Dask scheduler of its own with one worker, and the path of its file."""
    file = tmp_path / "scheduler.json"
    dask_cli = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    options = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", str(file)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*dask_cli, *options], **quiet)
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]
    worker += ["--no-dashboard", "--death-timeout", "5"]
    helper = subprocess.Popen(worker, **quiet, env={**os.environ, "PYTHONPATH": str(ROOT)})
    yield process, str(file)
    for running in (helper, process):
        running.kill()
        running.wait()


def test_a_scheduler_that_runs_already(scheduler: tuple[subprocess.Popen[bytes], str]) -> None:
    """Lost in the middle of a run it is one clear error, soon."""
    process, file = scheduler
    where = Cluster(kind="address", address=file)
    assert outcome(batches("ab", "c"), fitted, where) == dict.fromkeys("abc", "fitted")
    assert cluster.side_by_side(where) == 1
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"lost the Dask scheduler tcp://.* goes on from what is done"):
        outcome(batches("a", "b"), partial(kill_and_wait, pid=process.pid), where)
    assert time.monotonic() - began < 30


def test_no_scheduler_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
    ):
        outcome(batches("a"), fitted, Cluster(kind="address", address="tcp://127.0.0.1:9"))


def test_progress_of_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A plain line for every batch."""
    with progress(5, kept=3) as advance:
        advance(2, 0)
        advance(3, 1)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "fit: 3 lenses need no fit or have theirs, 5 are to be fitted"
    assert [line.split(", ")[:2] for line in lines] == [
        ["fit: 2 of 5 lenses done", "0 of them failed"],
        ["fit: 5 of 5 lenses done", "1 of them failed"],
    ]
    assert all(re.search(r", [\d.e+]+ a minute, 0:00:00 left$", line) for line in lines)


def test_progress_on_a_terminal() -> None:
    console = Console(force_terminal=True, width=140, record=True, file=StringIO())
    with progress(4, console=console) as advance:
        advance(3, 1)
    assert "fit: 3 of 4 lenses done, 1 of them failed" in console.export_text()


def test_time_left() -> None:
    tally = Tally(total=400, began=time.monotonic() - 600)
    assert str(tally) == "fit: 0 of 400 lenses done, 0 of them failed"
    tally.count(100, 2)
    assert str(tally) == "fit: 100 of 400 lenses done, 2 of them failed, 10 a minute, 0:30:00 left"
