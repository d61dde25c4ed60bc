"""Size and speed of the store of posteriors: `python tests/benchmarks/store.py [LENSES] [PIXELS]`.

Made-up posteriors with all variables of a fit, 10,000 lenses of 64 x 64 pixels unless told otherwise, each of 4 chains
of 500 draws of 14 parameters and 64 unknowns of the source, in shards of 500; 7 GB in a temporary folder. Each step is
a process of its own with one thread and gives one JSON line: seconds on the clock and, `cpu`, of the processor, imports
aside, and its greatest resident memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

import lenspipe
from lenspipe.config import Summary
from lenspipe.posteriors.shards import damaged, find_lens
from lenspipe.posteriors.store import PARAMETERS, STATISTICS
from lenspipe.results import Results
from lenspipe.summary import write_summary
from tests.posteriors import posteriors, write_catalogue, write_store

LENSES, PIXELS, SHARD, PART = 10_000, 64, 500, 50
BUCKET = "image64x64_psf9x9"
CHAINS, DRAWS, UNKNOWNS = 4, 500, 64
SAMPLED = 30  # lenses read one by one
DRAWN = [*PARAMETERS, "latent", *STATISTICS]


def name_of(lens: int) -> str:
    return f"lens-{lens:06}"


class Clock:
    """Seconds since it was made, on the clock and of the processor."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self, name: str, scale: float = 1.0) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        return {name: round(scale * wall, 2), f"{name}_cpu": round(scale * cpu, 2)}


def write(root: Path, lenses: int, pixels: int) -> dict[str, object]:
    """The same part of 50 lenses again and again under other names."""
    part, names = posteriors([""] * PART, CHAINS, DRAWS, pixels, UNKNOWNS), [name_of(i) for i in range(lenses)]
    clock = Clock()
    for number, first in enumerate(range(0, lenses, SHARD)):
        own = names[first : first + SHARD]
        parts = [own[i : i + PART] for i in range(0, len(own), PART)]
        groups = {BUCKET: [part.isel(lens=slice(len(p))).assign(name=("lens", np.array(p, object))) for p in parts]}
        write_store(root / f"fit/shard-{number:04}.zarr", groups)
    files = [path for path in (root / "fit").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return clock.read("s") | {
        "bytes_per_lens": round(size / lenses),
        "bytes_in_memory": round(part.nbytes / PART),
        "files_per_lens": round(len(files) / lenses, 3),
    }


def catalogue(root: Path, lenses: int, pixels: int) -> dict[str, object]:
    write_catalogue(root / "catalogue", {BUCKET: [name_of(i) for i in range(lenses)]}, pixels=pixels)
    return {}


def open_all(root: Path, lenses: int, pixels: int) -> dict[str, object]:
    clock = Clock()
    run = lenspipe.open_posteriors(root / "fit")
    facts = clock.read("s")
    assert run.sizes["lens"] == lenses
    clock = Clock()
    assert np.isfinite(run["theta_E"].mean(("chain", "draw")).compute(scheduler="synchronous")).all()
    return facts | clock.read("mean_of_theta_E_s")


def read_one(root: Path, lenses: int, pixels: int) -> dict[str, object]:
    """Means over lenses: all there is of one, where it is found, all its draws, and its lens parameters alone."""
    names = [name_of(i) for i in np.random.default_rng(1).integers(lenses, size=SAMPLED)]
    lenspipe.posterior(root / "fit", names[0])
    clock = Clock()
    for name in names:
        lenspipe.posterior(root / "fit", name)
    whole = clock.read("whole_ms", 1e3 / SAMPLED)
    clock = Clock()
    found = [find_lens(root / "fit", name) for name in names]
    finding = clock.read("find_ms", 1e3 / SAMPLED)
    clock = Clock()
    for group in found:
        group.read(DRAWN)
    drawn = clock.read("draws_ms", 1e3 / SAMPLED)
    clock = Clock()
    for group in found:
        group.read(["theta_E", "gamma", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2"])
    return whole | finding | drawn | clock.read("lens_parameters_ms", 1e3 / SAMPLED)


def summarise(root: Path, lenses: int, pixels: int) -> dict[str, object]:
    clock = Clock()
    write_summary(Summary(), Results(root))
    return clock.read("s")


def check(root: Path, lenses: int, pixels: int) -> dict[str, object]:
    """Looking for damage in one shard."""
    clock = Clock()
    assert damaged(root / "fit/shard-0000.zarr") == []
    return clock.read("s_per_shard")


STEPS = {step.__name__: step for step in (write, catalogue, open_all, read_one, summarise, check)}


def main() -> None:
    lenses, pixels = (int(sys.argv[i]) if len(sys.argv) > i else size for i, size in ((1, LENSES), (2, PIXELS)))
    if len(sys.argv) > 4:
        facts = STEPS[sys.argv[3]](Path(sys.argv[4]), lenses, pixels)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"what": sys.argv[3], **facts, "MB": most, "load": round(os.getloadavg()[0], 1)}), flush=True)
        return
    print(json.dumps({"lenses": lenses, "pixels": pixels, "versions": [xr.__version__, sys.version.split()[0]]}))
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            arguments = [sys.executable, __file__, str(lenses), str(pixels), step, folder]
            subprocess.run(arguments, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
