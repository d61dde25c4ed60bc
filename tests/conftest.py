"""Fixtures shared by all tests: the smallest run of the workflow, and guards of global state."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent
TINY = ROOT / "workflow/presets/tiny.yaml"
# files that take longest come first; the first one makes the run that others look at
ORDER = ("test_readme", "test_observed", "test_workflow", "test_calibration", "test_against_pyro")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


@pytest.fixture(autouse=True)
def untouched_globals() -> Iterator[None]:
    """No test may leave parameters in Pyro's store or change torch's default precision."""
    pyro.clear_param_store()
    yield
    assert torch.get_default_dtype() == torch.float32
    assert not list(pyro.get_param_store())


def environment() -> dict[str, str]:
    """Variables for a process of its own: the programs of this Python first, one thread for each process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def snakemake(directory: Path, *arguments: str, config: Path = TINY) -> subprocess.CompletedProcess[str]:
    """Run the workflow in `directory` on two cores; nothing is raised for a failure."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    command += ["--scheduler", "greedy", "--configfile", str(config), "--directory", str(directory), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny preset, made once, whatever number of test processes; tests must not change it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    directory, finished = shared / "tiny", shared / "tiny-finished"
    with FileLock(shared / "tiny.lock"):
        if not finished.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            done = snakemake(directory)
            logs = (path.read_text() for path in directory.rglob("results/logs/**/*.log"))
            assert done.returncode == 0, done.stderr + "".join(logs)
            finished.touch()
    return directory
