"""Stage `fit`: MAP and posterior of every lens of a shard of the catalogue.

What is fitted already, from the same settings and inputs, is kept. The other lenses, those of one shape together, are
cut into batches; each batch is one Dask task and leaves a part on disk. When all are there, they become the shard's
store. A lens that cannot be fitted is a row of the shard's manifest with its reason.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dask
import pandas as pd
from dask.distributed import Client, KilledWorker, LocalCluster, as_completed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lenspipe import artefact
from lenspipe.catalogue.stage import read_catalogue
from lenspipe.config import Config
from lenspipe.errors import InputError, LenspipeError
from lenspipe.fit import resume
from lenspipe.fit.batch import Result, Task, fit_task, one_by_one
from lenspipe.fit.resume import Place
from lenspipe.memory import free_memory
from lenspipe.posteriors.writing import write_shard
from lenspipe.results import Results

BYTES_PER_RAY = 250  # that a chain takes for its gradient
LARGEST_BATCH = 64  # lenses


def fit_shard(
    config: Config,
    paths: Results,
    shard: int,
    workers: int = 1,
    again: Collection[str] = (),
    draws_factor: int = 1,
) -> None:
    """Fit the lenses of one shard; write its manifest (shard-0000.csv) and `shard-0000.zarr` beside it.

    workers: processes that fit batches side by side, one thread each; 1 fits in this process. again: names of lenses
    that are fitted even if they have a result, with `draws_factor` times as many draws.
    """
    lenses, catalogue = members(config, paths, shard)
    store = paths.store(shard)
    artefact.restore(store)
    hashes = resume.lens_hashes(config, paths, catalogue)
    own = {name: hashes[name] for name in lenses["name"] if name in hashes}
    unreadable = resume.damaged(store) if store.exists() else []
    places = resume.located(paths, shard, own.values(), unreadable)
    resume.take_over(paths, shard, own.values() - places.keys())
    places = resume.located(paths, shard, own.values(), unreadable)
    failed = resume.recorded_failures(store, own)
    parts = list(paths.parts(shard).glob("*.npz"))
    todo = [name for name, h in own.items() if name in again or (h not in places and name not in failed)]
    tasks = plan(config, paths, shard, lenses[lenses["name"].isin(todo)], own, workers, draws_factor)
    with _progress(len(lenses)) as advance:
        advance(len(lenses) - len(todo))
        for task, made, failures in _run(tasks, workers):
            parts += made
            failed = {name: why for name, why in failed.items() if name not in task.names} | failures
            advance(len(task.names))
    with artefact.alone(store):
        places = resume.located(paths, shard, own.values(), unreadable)
        reasons = {name: why for name, why in failed.items() if own[name] not in places}
        if lost := [name for name, h in own.items() if h not in places and name not in reasons]:
            raise LenspipeError(f"{store}: another job has taken away the results of {', '.join(lost)}; run again")
        buckets = catalogue.set_index("name")["bucket"].to_dict()
        places |= resume.guests(paths, shard, own.values(), hashes.values())
        _write_shard(config, paths, shard, places, own, reasons, buckets)
        _write_manifest(paths.manifest(shard), lenses.set_index("name")["reason"].to_dict() | reasons)
        for part in parts:
            part.unlink(missing_ok=True)
    _remove_shards_beyond(config, paths, len(catalogue), set(hashes.values()))


def members(config: Config, paths: Results, shard: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The lenses of a shard, and the whole catalogue. Raises InputError where there is no such shard."""
    size, catalogue = config.fit.shard_size, read_catalogue(paths.catalogue)
    shards = shard_count(config, len(catalogue))
    if not 0 <= shard < shards:
        raise InputError(f"no shard {shard}: the catalogue {paths.catalogue} has {shards}, the first is 0")
    return catalogue.iloc[shard * size : (shard + 1) * size], catalogue


def shard_count(config: Config, lenses: int) -> int:
    """Into how many shards a catalogue of so many lenses is cut."""
    return -(-lenses // config.fit.shard_size)


def plan(
    config: Config,
    paths: Results,
    shard: int,
    lenses: pd.DataFrame,
    hashes: Mapping[str, str],
    workers: int,
    draws_factor: int = 1,
) -> list[Task]:
    """The batches that some usable lenses of a shard are fitted in."""
    text, tasks = config.model_dump_json(), []
    for bucket, same in lenses.groupby("bucket", sort=True):
        names = same["name"].tolist()
        size = config.fit.batch_size
        if size == "auto":
            shape = tuple(int(side) for side in re.findall(r"\d+", str(bucket))[:2])
            size = automatic_batch(config, shape, len(names), workers)  # type: ignore[arg-type]
        for first in range(0, len(names), size):
            batch = tuple(names[first : first + size])
            own = tuple(hashes[name] for name in batch)
            tasks.append(Task(text, paths, str(bucket), batch, own, shard, draws_factor))
    return tasks


def _write_shard(
    config: Config,
    paths: Results,
    shard: int,
    places: Mapping[str, Place],
    own: Mapping[str, str],
    failed: Mapping[str, str],
    bucket_of: Mapping[str, str],
) -> None:
    """Write the store of a shard from results that lie at `places`; one that would stay the same is left alone."""
    store = paths.store(shard)
    used = {name: getattr(config, name) for name in ("lens", "priors", "fit")}
    files = [paths.catalogue.with_name("lenses.csv"), *resume.files_that_decide(config, paths)]
    facts = {"shard": shard, "failed": {name: [own[name], reason] for name, reason in failed.items()}}
    if store.exists() and resume.index_of_store(store) == places and artefact.read_record(store)["facts"] == facts:
        return
    record = artefact.provenance("fit", used, files, config.seed, **facts)
    with artefact.written_whole(store) as whole:
        write_shard(whole, resume.gathered(places.values(), bucket_of), record)


def _write_manifest(path: Path, reasons: Mapping[str, str]) -> None:
    """One row a lens: failed for a reason, or fitted."""
    rows = [{"name": n, "status": "failed" if why else "fitted", "reason": why} for n, why in reasons.items()]
    with artefact.written_whole(path) as manifest:
        pd.DataFrame(rows).to_csv(manifest, index=False)


def _remove_shards_beyond(config: Config, paths: Results, lenses: int, hashes: Collection[str]) -> None:
    """Remove what an earlier run of more lenses or smaller shards left: it would be read with the new ones.

    A store stays without its manifest as long as it has results that shards of this run have not taken over yet.
    """
    shards = shard_count(config, lenses)

    def beyond(path: Path) -> bool:
        return int(path.stem.split("-")[1]) >= shards

    for manifest in filter(beyond, paths.fit.glob("shard-*.csv")):
        manifest.unlink()
    stores = resume.stores(paths.fit)
    if not any(map(beyond, stores)):
        return
    taken = {h for store in stores if not beyond(store) for h in resume.index_of_store(store)}
    for store in filter(beyond, stores):
        if not (resume.index_of_store(store).keys() & set(hashes)) - taken:
            shutil.rmtree(store)


def automatic_batch(config: Config, shape: tuple[int, int], lenses: int, workers: int) -> int:
    """How many lenses of images of this shape to fit together: an even share for each worker, half the free memory."""
    rays = shape[0] * shape[1] * config.lens.supersampling**2
    held = free_memory() / 2 / workers / (BYTES_PER_RAY * config.fit.chains * rays)
    return int(max(1, min(held, -(-lenses // workers), LARGEST_BATCH)))


def _run(tasks: list[Task], workers: int, work: Callable[[Task], Result] | None = None) -> Iterator[Result]:
    """Results of all tasks as they come. The lenses of a batch whose workers died are tried again, one by one."""
    work = work or fit_task
    if workers == 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    settings = {
        "distributed.scheduler.allowed-failures": 2,
        "distributed.scheduler.worker-saturation": 1.0,  # no second batch waits at a worker while another has none
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=min(workers, len(tasks)), threads_per_worker=1, memory_limit=0, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(min(workers, len(tasks)))
        futures = dict(zip(client.map(work, tasks, pure=False), tasks, strict=True))
        waiting = as_completed(futures)
        for future in waiting:
            task, error = futures[future], future.exception()
            if error is None:
                yield future.result()
            elif not isinstance(error, KilledWorker):
                raise error
            elif len(task.names) == 1:
                yield (
                    task,
                    [],
                    {task.names[0]: "every worker that fitted it died; it may need more memory than there is"},
                )
            else:
                for alone in one_by_one(task):
                    again = client.submit(work, alone, pure=False)
                    futures[again] = alone
                    waiting.add(again)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of lenses done, with the time spent and left; yields what to call with the number of lenses just done."""
    columns = (TextColumn("fit"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("fit", total=total)
        yield lambda lenses: bar.advance(task, lenses)
