"""Things that go wrong while a shard is fitted: the whole catalogue is done, each lens once, with undisturbed numbers.

Eight mocks of 16x16 pixels with a Sersic source, in batches of two, by two workers; fits are processes of their own.
There is so little noise, and the searches go on so long, that batches of another size, which round differently, end at
the same place.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import xarray as xr
import yaml

from lenspipe import open_posteriors
from lenspipe.catalogue.stage import write_catalogue
from lenspipe.config import Config, load_config
from lenspipe.deflection_table import write_deflection_table
from lenspipe.errors import LenspipeError
from lenspipe.mocks import write_mocks
from lenspipe.posteriors.shards import read_manifests
from lenspipe.results import Results
from lenspipe.source.stage import write_source
from lenspipe.tensors import write_tensors
from tests.conftest import ROOT, environment

pytestmark = pytest.mark.cluster

SETTINGS = """
source: {kind: sersic}
deflection_table: {eta_nodes: 33, q_nodes: 8, gamma_nodes: 6}
mocks:
  {systems: 8, noise_levels: [{name: low, sd: 0.02}], image_size: 16, pixel_scale: 0.3, psf_sd: 0.2, source: prior}
fit:
  {batch_size: 2, starts: 2, scouts: 2, survivors: 2, scout_pixels: 16, temperatures: [10.0],
   settling_temperatures: [1.0], steps_per_temperature: 2, final_steps: 30, chains: 2, warmup: 20, draws: 20,
   rounds: 1, max_leapfrog_steps: 2}
"""
WALL_TIME = ["seconds", "seconds_map"]


def prepared(paths: Results, config: Config) -> Results:
    """All stages before the fits."""
    write_source(config.source, paths.vae, paths.galaxies, paths.source_prior, config.seed)
    write_deflection_table(config.deflection_table, paths.deflection_table)
    write_mocks(config, paths)
    write_catalogue(config.catalogue, paths.mocks, paths.catalogue)
    (paths.root / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return paths


def fitting(paths: Results, **variables: str) -> subprocess.Popen[str]:
    """The stage `fit` as a process, with two workers."""
    command = [sys.executable, "-m", "lenspipe", "fit", "--workers", "2"]
    command += ["--config", str(paths.root / "config.yaml"), "--results", str(paths.root)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(), **variables},
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What a process that must end well has said."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def stored(paths: Results) -> xr.Dataset:
    """All that the fits have found, but for the time they took."""
    return open_posteriors(paths.fit).sortby("lens").drop_vars(WALL_TIME).load()


def until(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until something is true, while a process runs."""
    end = time.monotonic() + 200
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that fit batches: children of the one that hands them out, but for Python's resource tracker."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return prepared(Results(tmp_path_factory.mktemp("ready")), load_config(yaml.safe_load(SETTINGS)))


@pytest.fixture(scope="module")
def undisturbed(ready: Results, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    paths = Results(shutil.copytree(ready.root, tmp_path_factory.mktemp("undisturbed") / "results"))
    ended(fitting(paths))
    assert read_manifests(paths.fit)["status"].tolist() == ["fitted"] * 8
    return stored(paths)


@pytest.fixture
def paths(ready: Results, tmp_path: Path) -> Results:
    return Results(shutil.copytree(ready.root, tmp_path / "results"))


def test_a_worker_is_killed_in_a_batch(paths: Results, undisturbed: xr.Dataset) -> None:
    process = fitting(paths)
    until(lambda: list(paths.parts(0).glob("*.npz")), process)
    workers_of(process)[0].kill()
    ended(process)
    xr.testing.assert_identical(stored(paths), undisturbed)


def test_the_job_is_killed_and_started_again(paths: Results, undisturbed: xr.Dataset) -> None:
    """With the scheduler and all workers, which are its own; what was done is kept, whatever the clock says."""
    process = fitting(paths)
    until(lambda: list(paths.parts(0).glob("*.npz")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    parts = list(paths.parts(0).glob("*.npz"))
    assert not paths.manifest(0).exists()
    for file in (paths.catalogue.with_name("lenses.csv"), paths.source_prior, *parts):
        os.utime(file, (2e9, 2e9))
    said = ended(fitting(paths, PYTHONHASHSEED="17"))
    assert f"{8 - 2 * len(parts)} are to be fitted" in said
    xr.testing.assert_identical(stored(paths), undisturbed)


def test_the_same_shard_twice_at_the_same_time(paths: Results, undisturbed: xr.Dataset) -> None:
    """As when a node is given up that still works."""
    first = fitting(paths)
    until(lambda: list(paths.parts(0).glob("*.npz")), first)
    second = fitting(paths)
    ended(first)
    ended(second)
    xr.testing.assert_identical(stored(paths), undisturbed)
    assert not list(paths.fit.glob("parts/*/*"))


@pytest.fixture
def small_disk(paths: Results) -> Iterator[Path]:
    """A file system of 300 kB where the fits go."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    paths.fit.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(paths.fit)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield paths.fit
    subprocess.run(["umount", str(paths.fit)], check=True)


def test_the_disk_is_full(small_disk: Path, paths: Results, undisturbed: xr.Dataset) -> None:
    process = fitting(paths)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("error:")
    assert "no space left to write it; make space and run again" in last
    assert not paths.manifest(0).exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    ended(fitting(paths))
    xr.testing.assert_identical(stored(paths), undisturbed)


def test_the_disk_is_full_of_a_checkpoint(small_disk: Path) -> None:
    """Safetensors' own way to files raises no OSError."""
    with pytest.raises(LenspipeError, match="no space left to write it; make space and run again"):
        write_tensors(small_disk / "whole.safetensors", {"w": torch.ones(100_000)}, {})
    assert not list(small_disk.iterdir())


@pytest.mark.filterwarnings("ignore:File may have been truncated")
def test_a_truncated_image_among_fifty(ready: Results, undisturbed: xr.Dataset, tmp_path: Path) -> None:
    """It is a row with its reason; the others are fitted, those of the undisturbed run with the same numbers."""
    config = load_config(yaml.safe_load(SETTINGS))
    mocks = config.mocks.model_copy(update={"systems": 50})
    config = config.model_copy(update={"mocks": mocks, "fit": config.fit.model_copy(update={"batch_size": 25})})
    paths = Results(tmp_path)
    shutil.copytree(ready.source_prior.parent, paths.source_prior.parent)
    shutil.copytree(ready.deflection_table.parent, paths.deflection_table.parent)
    write_mocks(config, paths)
    image = paths.mocks / "mock-0030-low/image.fits"
    image.write_bytes(image.read_bytes()[:3000])
    write_catalogue(config.catalogue, paths.mocks, paths.catalogue)
    (paths.root / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    ended(fitting(paths))
    rows = read_manifests(paths.fit).set_index("name")
    assert rows.index[rows["status"] == "failed"].tolist() == ["mock-0030-low"]
    assert str(image) in rows.loc["mock-0030-low", "reason"]
    assert len(rows) == 50
    same = stored(paths).sel(lens=undisturbed["lens"])
    np.testing.assert_allclose(same["theta_E_map"], undisturbed["theta_E_map"], rtol=1e-3)
    catalogue = pd.read_csv(paths.catalogue.with_name("lenses.csv"))
    assert catalogue["status"].value_counts().to_dict() == {"usable": 49, "failed": 1}


def watched(process: subprocess.Popen[str], limit: float = math.inf) -> tuple[float, float, int]:
    """Memory of a run's workers when the first batch begins and at most [bytes], and how many took more than the limit.

    Those are killed, as the kernel or SLURM would.
    """
    until(lambda: list(Path(process.args[-1]).rglob("logs/fit/*/*.log")), process)  # type: ignore[index]
    first, most, killed = 0.0, 0.0, 0
    while process.poll() is None:
        for worker in workers_of(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                taken = worker.memory_info().rss
                first, most = first or taken, max(most, taken)
                if taken > limit:
                    worker.kill()
                    killed += 1
        time.sleep(0.01)
    ended(process)
    return first, most, killed


def test_a_batch_that_exhausts_the_memory(tmp_path: Path) -> None:
    """It may have four fifths of what it takes: it is halved then, and its halves are fitted."""
    settings = yaml.safe_load(SETTINGS)
    settings["mocks"] |= {"image_size": 128, "pixel_scale": 0.05, "psf_sd": 0.1}
    settings["fit"] |= {"batch_size": 8, "scouts": 1, "survivors": 1, "chains": 4, "max_leapfrog_steps": 1}
    config = load_config(settings | {"cluster": {"retries": 1}})
    (tmp_path / "results").mkdir()
    paths = prepared(Results(tmp_path / "results"), config)
    whole, halved = (Results(shutil.copytree(paths.root, tmp_path / name)) for name in ("whole", "halved"))
    first, most, _ = watched(fitting(whole))
    _, _, killed = watched(fitting(paths), first + 0.8 * (most - first))
    assert killed > 1
    log = (paths.fit_logs / "shard-0000/0000.log").read_text()
    assert "every worker that fitted it died, 2 in a row; goes on as 0000a and 0000b" in log
    assert read_manifests(paths.fit)["status"].tolist() == ["fitted"] * 8
    settings["fit"]["batch_size"] = 4
    (halved.root / "config.yaml").write_text(yaml.safe_dump(load_config(settings).model_dump(mode="json")))
    ended(fitting(halved))
    np.testing.assert_allclose(stored(paths)["theta_E_map"], stored(halved)["theta_E_map"], rtol=1e-3)
