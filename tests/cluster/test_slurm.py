"""A real SLURM on this machine, as `tests/cluster/slurm.sh up` starts it: `make test-slurm`.

The workflow through its SLURM profile, Dask workers that are SLURM's jobs, a job that is cancelled and a node that is
lost: every lens is there once, with the numbers of a run without SLURM.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from lenspipe import open_posteriors
from lenspipe.config import Cluster
from lenspipe.errors import ClusterError
from lenspipe.fit import cluster
from lenspipe.posteriors.shards import read_manifests
from lenspipe.results import Results
from tests.conftest import ROOT, TINY, environment
from tests.fan_out_work import Batch, fitted, halves, slurm_job

FITS = ("fit", "summary", "report")  # folders of the stages from the fits on
SUMMARY = "results/summary/lenses.csv"


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def answers() -> bool:
    """Whether the SLURM for tests is there; jobs of any other are left alone."""
    try:
        return re.search(r"^ClusterName += lenspipe$", slurm("scontrol", "show", "config"), re.MULTILINE) is not None
    except (OSError, subprocess.CalledProcessError):
        return False


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not answers(), reason="no SLURM for tests here; `make test-slurm` starts one"),
]


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    """Every test ends with no job of its own left, and with all nodes there."""
    yield
    try:
        until(lambda: not slurm("squeue", "--noheader", "--states=PENDING,RUNNING"), 30)
    finally:
        slurm("scancel", "--state=PENDING", f"--user={getpass.getuser()}")
        slurm("scancel", "--state=RUNNING", f"--user={getpass.getuser()}")


def until(true: Callable[[], object], seconds: float, run: Run | None = None) -> object:
    """What `true` returns as soon as it is true; fails when it does not become so, or when the run ends before."""
    end = time.monotonic() + seconds
    while not (found := true()):
        ended = run is not None and run.process.poll() is not None
        if ended or time.monotonic() > end:
            why = "the run ended before" if ended else f"not within {seconds} s"
            pytest.fail("\n".join([why, queue(), run.said() if run else ""]))
        time.sleep(0.2)
    return found


def queue() -> str:
    """SLURM's jobs and nodes, and the last that its daemons wrote."""
    logs = sorted((Path(os.environ["SLURM_CONF"]).parents[1] / "log").glob("slurm*.log"))
    last = [f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:]) for path in logs]
    asked = (["squeue", "--long", "--states=all"], ["sinfo", "--long", "--Node"])
    answers = [subprocess.run(command, capture_output=True, text=True, check=False).stdout for command in asked]
    return "\n".join([*answers, *last])


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Cluster]:
    """Settings of workers from SLURM: those of the shipped file, with what a test changes."""
    shipped = yaml.safe_load((ROOT / "workflow/profiles/slurm/dask.yaml").read_text())

    def settings(jobs_max: int = 2, **changes: object) -> Cluster:
        changes = {"log-directory": str(tmp_path / "workers"), "memory": "2GB"} | changes
        path = tmp_path / "dask.yaml"
        path.write_text(yaml.safe_dump(shipped | {"jobqueue": {"slurm": shipped["jobqueue"]["slurm"] | changes}}))
        return Cluster(kind="slurm", site=str(path), jobs_max=jobs_max, retries=1)

    return settings


def before_the_fits(finished: Path, to: Path) -> Path:
    """A copy of a run that has everything but its fits and what comes after."""
    return Path(shutil.copytree(finished, to, ignore=shutil.ignore_patterns(*FITS, "logs")))


@dataclass
class Run:
    """A workflow that runs in a folder of its own; what it says goes to a file there."""

    process: subprocess.Popen[bytes]
    directory: Path

    @classmethod
    def start(cls, directory: Path, *arguments: str, config: Path = TINY) -> Run:
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--directory", str(directory), "--configfile", str(config), "--latency-wait", "20", *arguments]
        with (directory / "said").open("wb") as said:
            return cls(subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT), directory)

    def said(self) -> str:
        """What it and its jobs said."""
        logs = [*self.directory.rglob("results/logs/**/*.log"), *self.directory.parent.glob("workers/*")]
        return "\n".join(f"{path}:\n{path.read_text()}" for path in [self.directory / "said", *logs])

    def finished(self) -> None:
        """Wait for a run that must succeed."""
        assert self.process.wait(timeout=1200) == 0, self.said()


PROFILE = ("--profile", str(ROOT / "workflow/profiles/slurm"), "--slurm-init-seconds-before-status-checks", "1")


def assert_same_numbers(run: Path, reference: Path) -> None:
    """The summaries of two runs, but for the time that fits took."""
    tables = [pd.read_csv(root / SUMMARY) for root in (run, reference)]
    ours, theirs = (table.drop(columns=[c for c in table if c.startswith("seconds")]) for table in tables)
    assert not ours["name"].duplicated().any()
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize("stages", ["fits", "all_stages"])
def test_the_workflow_through_the_profile(stages: str, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if stages == "fits":
        before_the_fits(tiny_run, run)
    else:
        run.mkdir()
    Run.start(run, *PROFILE, *([SUMMARY] if stages == "fits" else [])).finished()
    assert_same_numbers(run, tiny_run)
    log = (run / "results/logs/fit/shard-0000/0000.log").read_text()
    assert re.search(r"begins on \S+, process \d+, SLURM job \d+", log)


def test_workers_are_jobs_of_slurm(site: Callable[..., Cluster]) -> None:
    """As many as there is work for, up to the greatest number; each lens comes once."""
    tasks = [Batch((f"{number}a", f"{number}b")) for number in range(30)]
    outcome = list(cluster.run(tasks, slurm_job, site(), halves, 2))
    assert sorted(task.names for task, _, _ in outcome) == sorted(task.names for task in tasks)
    jobs = {job for _, job, _ in outcome}
    assert len(jobs) == 2
    assert all(str(job).isdigit() for job in jobs)


def test_a_job_that_slurm_refuses(site: Callable[..., Cluster]) -> None:
    with pytest.raises(ClusterError, match=r"SLURM refuses a worker's job: .*invalid partition.*; mend \S+dask.yaml"):
        list(cluster.run([Batch(("a",))], fitted, site(queue="nowhere"), halves, 2))


def test_jobs_that_end_without_becoming_workers(site: Callable[..., Cluster], tmp_path: Path) -> None:
    """As where the site's file loads a module that is not there: said once, and not submitted again for ever."""
    with pytest.raises(ClusterError, match=rf"the SLURM jobs \d+ ended without .* output in {tmp_path}/workers"):
        list(cluster.run([Batch(("a",))], fitted, site(**{"job-script-prologue": ["exit 1"]}), halves, 2))


def test_a_worker_job_is_cancelled(site: Callable[..., Cluster], tiny_run: Path, tmp_path: Path) -> None:
    """Its batch is fitted by another, which SLURM is asked for."""
    run = before_the_fits(tiny_run, tmp_path / "run")
    config = yaml.safe_load(TINY.read_text()) | {"cluster": site().model_dump(mode="json")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    workflow = Run.start(run, "--cores", "2", SUMMARY, config=tmp_path / "config.yaml")
    log = run / "results/logs/fit/shard-0000/0000.log"
    job = until(lambda: log.exists() and re.search(r"SLURM job (\d+)", log.read_text()), 300, workflow)
    slurm("scancel", job[1])  # type: ignore[index]
    workflow.finished()
    assert log.read_text().count("begins") == 2, "the batch was cut off and fitted again"
    assert_same_numbers(run, tiny_run)


@pytest.fixture
def lose() -> Iterator[Callable[[str, bool], None]]:
    """Sets a node down, with its daemon stopped first where its processes are to live on; at the end all are back."""
    lost: list[str] = []
    pids: list[int] = []

    def down(node: str, living_on: bool) -> None:
        if living_on:  # nothing that SLURM says reaches them
            pids.append(int((Path(os.environ["SLURM_CONF"]).parents[1] / f"run/slurmd-{node}.pid").read_text()))
            os.kill(pids[-1], signal.SIGSTOP)
        lost.append(node)
        slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    yield down
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    for node in lost:  # refused where the node has come back by itself
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
    until(lambda: "down" not in slurm("sinfo", "--noheader", "--format=%T"), 60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set a node down")
@pytest.mark.parametrize("processes", ["ended", "living_on"])
def test_a_node_is_lost(processes: str, tiny_run: Path, tmp_path: Path, lose: Callable[[str, bool], None]) -> None:
    """SLURM queues the job again, after two minutes; the batches that were done before are not fitted again.

    Where the job's processes live on, frozen until the job has begun again elsewhere, both fit and write the shard.
    """
    run = before_the_fits(tiny_run, tmp_path / "run")
    workflow = Run.start(run, *PROFILE, SUMMARY)
    log = run / "results/logs/fit/shard-0000/0000.log"
    begun = r"begins on \S+, process (\d+), SLURM job (\d+)"
    found = until(lambda: log.exists() and re.search(begun, log.read_text()), 300, workflow)
    worker, job = (int(number) for number in found.groups())  # type: ignore[attr-defined]
    node = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
    family = [psutil.Process(worker), *psutil.Process(worker).parents()[:1]]
    if processes == "living_on":
        family[0].suspend()
    lose(node, processes == "living_on")
    if processes == "living_on":
        until(lambda: len(re.findall(begun, log.read_text())) == 2, 300, workflow)
        assert all(one.is_running() for one in family)
        family[0].resume()
    workflow.finished()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    assert_same_numbers(run, tiny_run)
    fits = Results(run / "results")
    assert sorted(open_posteriors(fits.fit)["lens"].values) == sorted(read_manifests(fits.fit)["name"])
    assert not list(fits.fit.glob("parts/*/*"))
