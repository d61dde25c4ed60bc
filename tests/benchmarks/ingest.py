"""Speed and memory of the stage `galaxies` at survey size: `python tests/benchmarks/ingest.py [GALAXIES] [WORKERS]...`.

A catalogue in the COSMOS layout, 56,062 galaxies unless told otherwise, 1000 to an image file, in a temporary folder
(60 MB a file, 3.4 GB in all): the files are copies of one that the stage `survey` draws, under IDENTs and names of
their own. The stage runs as its own command, once for each number of workers, and once more killed when half of the
parts are there and started again. One JSON line a run; `MB` is the greatest sum of the resident memory of all its
processes, sampled ten times a second, pages that they share counted in each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from astropy.table import Table, vstack

from lenspipe.config import Survey
from lenspipe.survey import CATALOGUE, write_survey

GALAXIES, PER_FILE, WORKERS = 56_062, 1000, (1, 2)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def write_catalogue(folder: Path, galaxies: int) -> None:
    """The catalogue, its `_fits` table and all image and PSF files."""
    write_survey(Survey(galaxies=PER_FILE, galaxies_per_file=PER_FILE), folder, seed=1)
    files = -(-galaxies // PER_FILE)
    for path in [*folder.glob("*_n1.fits")]:
        for number in range(2, files + 1):
            shutil.copy(path, path.with_name(path.name.replace("_n1.", f"_n{number}.")))
    for path in (folder / CATALOGUE, folder / CATALOGUE.replace(".fits", "_fits.fits")):
        table = Table.read(path)
        vstack([renamed(table, number) for number in range(1, files + 1)])[:galaxies].write(path, overwrite=True)


def renamed(table: Table, number: int) -> Table:
    """The rows of image file 1 as those of file `number`."""
    table = table.copy()
    table["IDENT"] += (number - 1) * PER_FILE
    for name in {"GAL_FILENAME", "PSF_FILENAME"} & set(table.colnames):
        table[name] = np.char.replace(np.asarray(table[name], dtype=str), "_n1.", f"_n{number}.")
    return table


def run(root: Path, workers: int, enough: Callable[[], bool] = lambda: False) -> tuple[float, float]:
    """Seconds and greatest memory [MB] of the stage, killed once `enough`."""
    command = [sys.executable, "-m", "lenspipe", "galaxies", "--config", "{}", "--results", str(root)]
    began, most = time.perf_counter(), 0.0
    process = psutil.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, memory(process))
        if enough():
            process.kill()
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.returncode not in (0, -9):
        raise RuntimeError(f"the stage failed with status {process.returncode}")
    return seconds, most


def memory(process: psutil.Process) -> float:
    """Resident memory of a process and its children [MB]."""
    try:
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def digest(folder: Path) -> str:
    """A hash of all that the stage wrote; the folder is removed."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    shutil.rmtree(folder)
    return found.hexdigest()[:12]


def main() -> None:
    galaxies = int(sys.argv[1]) if len(sys.argv) > 1 else GALAXIES
    numbers = [int(text) for text in sys.argv[2:]] or WORKERS
    files = -(-galaxies // PER_FILE)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        write_catalogue(root / "survey", galaxies)
        size = sum(path.stat().st_size for path in (root / "survey").iterdir()) / 1e9
        say(what="written", galaxies=galaxies, files=files, GB=round(size, 2), s=round(time.perf_counter() - began))
        for workers in numbers:
            seconds, most = run(root, workers)
            rate = {"s": round(seconds, 1), "galaxies_per_s": round(galaxies / seconds), "MB": round(most)}
            say(what="ingest", workers=workers, **rate, result=digest(root / "galaxies"))
        parts = root / "galaxies/galaxies.zarr.parts"
        killed, _ = run(root, numbers[-1], lambda: len([*parts.glob("*.npz")]) >= files / 2)
        there = len([*parts.glob("*.npz")])
        seconds, most = run(root, numbers[-1])
        rate = {"killed_after_s": round(killed, 1), "parts": there, "resumed_s": round(seconds, 1), "MB": round(most)}
        say(what="kill and resume", workers=numbers[-1], **rate, result=digest(root / "galaxies"))


if __name__ == "__main__":
    main()
