"""Workers that are jobs of SLURM, without one: the job that it would get, and what becomes of jobs it does not take."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import dask
import pytest

pytest.importorskip("dask_jobqueue")
from lenspipe.config import Cluster
from lenspipe.errors import ClusterError, ConfigError
from lenspipe.fit import cluster, slurm
from tests.conftest import ROOT
from tests.fan_out_work import Batch, fitted, halves, slurm_job

SBATCH = """#!/bin/sh
# Too busy to say what it would do with a job, and to take {refusals} after the first {taken}; runs the others at once.
if [ "$1" = --test-only ]; then echo "{answer}" >&2; exit 1; fi
echo asked >> {folder}/asked
asked=$(wc -l < {folder}/asked)
if [ $asked -gt {taken} ] && [ $asked -le $(({taken} + {refusals})) ]; then
  echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
  exit 1
fi
cp "$1" {folder}/job
SLURM_JOB_ID=$asked sh {folder}/job > {folder}/output 2>&1 &
echo $! >> {folder}/jobs
echo "Submitted batch job $!"
"""
SQUEUE = """#!/bin/sh
for job in $(cat {folder}/jobs); do kill -0 $job 2>/dev/null && echo $job; done
true
"""
SCANCEL = """#!/bin/sh
kill $1
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """Settings for a SLURM that refuses the first so many jobs; waits between them are short."""

    def settings(refusals: int, answer: str = "sbatch: error: Socket timed out", taken: int = 0) -> Cluster:
        given = {"{folder}": tmp_path, "{refusals}": refusals, "{answer}": answer, "{taken}": taken}
        (tmp_path / "bin").mkdir()
        for name, script in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
            for key, value in given.items():
                script = script.replace(key, str(value))
            program = tmp_path / "bin" / name
            program.write_text(script)
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm, "WAITS", (0.1, 0.1))
        site = (ROOT / "workflow/profiles/slurm/dask.yaml").read_text()
        (tmp_path / "site.yaml").write_text(site.replace("results/logs/fit/workers", str(tmp_path)))
        return Cluster(kind="slurm", site=str(tmp_path / "site.yaml"), jobs_max=1 + taken)

    return settings


def test_a_job_that_was_not_taken_is_submitted_again(site: Callable[..., Cluster], tmp_path: Path) -> None:
    """As where SLURM's controller was too busy to answer."""
    done = list(cluster.run([Batch(("a", "b"))], fitted, site(2), halves))
    assert [(task.names, result) for task, result, _ in done] == [(("a", "b"), "fitted")]
    assert len((tmp_path / "asked").read_text().split()) == 3


def test_a_later_job_is_submitted_until_it_is_taken(site: Callable[..., Cluster]) -> None:
    """The worker that is there goes on meanwhile."""
    done = list(cluster.run([Batch((f"{i}",)) for i in range(14)], slurm_job, site(6, taken=1), halves))
    assert len(done) == 14
    assert {job for _, job, _ in done} == {"1", "8"}


def test_a_job_that_would_not_be_taken(site: Callable[..., Cluster], tmp_path: Path) -> None:
    """Said at once: no waiting makes it a good one."""
    with pytest.raises(ClusterError, match=r"SLURM refuses a worker's job: sbatch: error: invalid partition; mend"):
        list(cluster.run([Batch(("a",))], fitted, site(0, "sbatch: error: invalid partition"), halves))
    assert not (tmp_path / "asked").exists()


def test_jobs_that_are_never_taken(site: Callable[..., Cluster]) -> None:
    """Said, instead of waiting for ever."""
    with pytest.raises(ClusterError, match=r"SLURM refuses a worker's job: .*Socket timed out.*; mend \S+site.yaml"):
        list(cluster.run([Batch(("a",))], fitted, site(100), halves))


def test_a_job_that_has_no_number(site: Callable[..., Cluster], tmp_path: Path) -> None:
    """As where a site's own sbatch says something else: such a job could not be cancelled. Said, not waited for."""
    settings = site(0)
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho thank you\n")
    with pytest.raises(ClusterError, match=r"Could not parse job id .*thank you; mend \S+site.yaml"):
        list(cluster.run([Batch(("a",))], fitted, settings, halves))


def test_the_job_that_slurm_gets() -> None:
    """From the site's file: partition, processors, memory, time, a place for its output."""
    with dask.config.set(slurm.site_settings(Cluster(kind="slurm"))), slurm.SlurmCluster() as jobs:
        script = jobs.job_script()
        assert dask.config.get("distributed.scheduler.worker-ttl") == "5 minutes"
        assert dask.config.get("distributed.scheduler.bandwidth") == 100_000_000  # Dask's own stay
    for line in ("-J lenspipe-fit", "-n 1", "--cpus-per-task=1", "--mem=3G", "-t 04:00:00"):
        assert f"#SBATCH {line}\n" in script, script
    command = script.splitlines()[-1]
    assert command.startswith(f"{sys.executable} -m distributed.cli.dask_worker tcp://")
    for option in ("--nthreads 1", "--nanny", "--death-timeout", "--lifetime "):
        assert option in command


def test_a_site_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("jobqueue: {slurm: {queue: long, cores: 2, memory: 4GB}}\n")
    settings = slurm.site_settings(Cluster(kind="slurm", site=str(tmp_path / "site.yaml")))
    assert settings["jobqueue"]["slurm"]["queue"] == "long"
    assert settings["jobqueue"]["slurm"]["death-timeout"] == 60  # what the file leaves out is dask-jobqueue's own
    with pytest.raises(ConfigError, match=r"cluster.site: .*absent.yaml: no such file"):
        slurm.site_settings(Cluster(site=str(tmp_path / "absent.yaml")))
    for text, said in (
        ("slurm: {queue: long}", r"expected the section jobqueue.slurm, found \{'slurm'"),
        ("jobqueue:", "expected the section jobqueue.slurm, found"),
        (
            "jobqueue: {slurm: {queue: long}}",
            "jobqueue.slurm.memory: expected what a job may use, such as 4GB, found None",
        ),
        (
            "jobqueue: {slurm: {memory: 8GB, cores: 8, processes: 1}}",
            "has 8 cores for 1 processes; each process fits one",
        ),
        ("jobqueue: {slurm: {memory: much}}", "jobqueue.slurm.memory: .* found much"),
        ("jobqueue: {slurm: ", "site.yaml: not YAML"),
    ):
        (tmp_path / "site.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            slurm.site_settings(Cluster(site=str(tmp_path / "site.yaml")))
