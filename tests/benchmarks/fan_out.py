"""What the fan-out costs beside the fits: `python tests/benchmarks/fan_out.py [--alone] [LENSES]...`.

For each number of lenses, 1,000, 10,000 and 100,000 unless told otherwise, a catalogue of that size is planned and
fitted by work that does nothing, in batches of 50, on two worker processes, with a log file for each batch as in a run;
with `--alone` in batches of one. One JSON line each, from a process of its own: `plan_shard_s` is what the job of one
shard of 500 spends before its first batch (it reads the table of the whole catalogue), `plan_s` the batches of all
lenses at once, `start_s` the time to the first result, `dispatch_s` the rest, `ms_a_batch` that by batch,
`cpu_ms_a_batch` the processor time of the process that hands out in it, `MB` its greatest memory. A last line: 60
batches whose work is to sleep for a second, and what the run takes more than that.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from lenspipe.config import Config
from lenspipe.fit import cluster, resume
from lenspipe.fit.batch import Task, halves
from lenspipe.fit.stage import members, plan
from lenspipe.results import Results
from lenspipe.tensors import write_tensors

LENSES, BATCH, WORKERS = (1_000, 10_000, 100_000), 50, 2


def nothing(task: Task) -> int:
    return len(task.names)


def nap(task: Task) -> int:
    time.sleep(1)
    return len(task.names)


def write_inputs(paths: Results, lenses: int) -> None:
    """A table of usable lenses of one shape, and files in place of those of earlier stages."""
    paths.catalogue.parent.mkdir(parents=True)
    for path in (paths.source_prior, paths.deflection_table):
        write_tensors(path, {"values": torch.zeros(2**18)}, {"settings": {}})
    names = [f"lens-{number:06d}" for number in range(lenses)]
    hashes = [f"{number:064x}" for number in range(lenses)]
    table = {"name": names, "origin": "table", "status": "usable", "reason": "", "bucket": "64x64", "hash": hashes}
    pd.DataFrame(table).to_csv(paths.catalogue.with_name("lenses.csv"), index=False)


def timed(tasks: list[Task], work: object, logs: Path) -> tuple[float, float, float, int]:
    """Seconds to the first result, from there to the last, of this process's own in that, and the lenses that came."""
    began = time.perf_counter()
    first, spent, lenses = 0.0, 0.0, 0
    for _, done, _ in cluster.run(tasks, work, Config().cluster, halves, WORKERS, logs):  # type: ignore[arg-type]
        first, spent = first or time.perf_counter(), spent or time.process_time()
        lenses += done or 0
    return first - began, time.perf_counter() - first, time.process_time() - spent, lenses


def measure(lenses: int, batch: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        paths = Results(Path(folder))
        config = Config.model_validate({"fit": {"batch_size": batch}})
        write_inputs(paths, lenses)
        began = time.perf_counter()
        shard, catalogue = members(config, paths, 0)
        hashes = resume.lens_hashes(config, paths, catalogue)
        plan(config, paths, 0, shard, hashes, WORKERS)
        shard_planned = time.perf_counter()
        tasks = plan(config, paths, 0, catalogue, hashes, WORKERS)
        planned = time.perf_counter()
        start, dispatch, spent, done = timed(tasks, nothing, paths.fit_logs)
        logs = len(list(paths.fit_logs.iterdir()))
    assert done == lenses
    assert logs == len(tasks)
    return {
        "lenses": lenses,
        "lenses_a_batch": batch,
        "plan_shard_s": round(shard_planned - began, 3),
        "plan_s": round(planned - shard_planned, 3),
        "start_s": round(start, 2),
        "dispatch_s": round(dispatch, 2),
        "ms_a_batch": round(1e3 * dispatch / len(tasks), 2),
        "cpu_ms_a_batch": round(1e3 * spent / len(tasks), 2),
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def overhead() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task("{}", Results(Path(folder)), "b", (str(number),)) for number in range(60)]
        start, rest, _, _ = timed(tasks, nap, Path(folder))
    busy = len(tasks) / WORKERS
    return {
        "naps": len(tasks),
        "busy_s": busy,
        "wall_s": round(start + rest, 2),
        "start_s": round(start - 1, 2),
        "after_the_start": round((rest - (busy - 1)) / (busy - 1), 4),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))), flush=True)
        sys.exit()
    batch = 1 if "--alone" in sys.argv else BATCH
    for lenses in [int(text) for text in sys.argv[1:] if text.isdigit()] or LENSES:
        subprocess.run([sys.executable, __file__, "--measure", str(lenses), str(batch)], check=True)
    print(json.dumps(overhead()), flush=True)
