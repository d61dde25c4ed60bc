"""Stage `fit`: MAP and posterior of every lens of a shard of the catalogue.

What is fitted already, from the same settings and inputs, is kept. The other lenses, those of one shape together, are
cut into batches; each batch is one Dask task and leaves a part on disk. When all are there, they become the shard's
store. A lens that cannot be fitted is a row of the shard's manifest with its reason.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from lenspipe import artefact
from lenspipe.catalogue.reading import read_catalogue
from lenspipe.config import Config
from lenspipe.errors import InputError, LenspipeError
from lenspipe.fit import cluster, resume
from lenspipe.fit.batch import NO_MEMORY, Task, batch_checkpoint, fit_task, halves
from lenspipe.fit.progress import progress
from lenspipe.fit.resume import Place
from lenspipe.posteriors.writing import write_shard
from lenspipe.results import Results

BYTES_PER_RAY = 250  # that a chain takes for its gradient
LARGEST_BATCH = 64  # lenses


def fit_shard(
    config: Config,
    paths: Results,
    shard: int,
    workers: int | None = 1,
    again: Collection[str] = (),
    draws_factor: int = 1,
) -> dict[str, str]:
    """Fit the lenses of one shard; write its manifest (shard-0000.csv) and `shard-0000.zarr` beside it.

    Returns why lenses that were tried, or that are in `again` and cannot be, were not fitted, by name.

    workers: greatest number of processes on this machine that fit batches side by side, one thread each; 1 fits in this
    process, None is one for each GPU or processor. again: names of lenses that are fitted even if they have a result,
    with `draws_factor` times as many draws.
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
    recorded = resume.recorded_failures(store, own)
    parts = [path for path in paths.parts(shard).glob("*") if path.suffix in (".npz", resume.DAMAGED)]
    todo = [name for name, h in own.items() if name in again or (h not in places and name not in recorded)]
    workers = cluster.side_by_side(config.cluster, workers) if todo else 1
    tasks = []
    for names, factor in ((set(todo) - set(again), 1), (set(todo) & set(again), draws_factor)):
        tasks += plan(config, paths, shard, lenses[lenses["name"].isin(names)], own, workers, factor)
    made, failures, machine = _fit(config, paths, shard, tasks, workers, len(lenses) - len(todo))
    failed = {name: why for name, why in recorded.items() if name not in todo} | failures
    unusable = lenses.set_index("name")["reason"].to_dict()
    with artefact.alone(store):
        places = resume.located(paths, shard, own.values(), unreadable)
        reasons = {name: why for name, why in failed.items() if own[name] not in places}
        if lost := [name for name, h in own.items() if h not in places and name not in reasons]:
            raise LenspipeError(f"{store}: another job has taken away the results of {', '.join(lost)}; run again")
        buckets = catalogue.set_index("name")["bucket"].to_dict()
        places |= resume.guests(paths, shard, own.values(), hashes.values(), unreadable)
        standing = {name: [own[name], why] for name, why in reasons.items() if name not in machine}
        written = _write_shard(config, paths, shard, places, standing, buckets)
        _write_manifest(paths.manifest(shard), unusable | reasons, written)
        for path in (*parts, *made, *resume.useless(config, paths, shard, catalogue, machine)):
            path.unlink(missing_ok=True)
    _remove_shards_beyond(config, paths, len(catalogue), set(hashes.values()))
    asked = {name: why for name, why in unusable.items() if why and name in again}
    return asked | failures


def _fit(
    config: Config, paths: Results, shard: int, tasks: list[Task], workers: int, kept: int
) -> tuple[list[Path], dict[str, str], set[str]]:
    """Fit batches; the parts that were written, why lenses failed, and those of which it may be the machine's fault.

    kept: how many lenses of the shard need no fit, for the display of the progress.
    """
    parts: list[Path] = []
    failed: dict[str, str] = {}
    machine: set[str] = set()
    logs = paths.fit_logs / f"shard-{shard:04d}"
    with progress(sum(len(task.names) for task in tasks), kept) as advance:
        for task, result, reason in cluster.run(tasks, fit_task, config.cluster, halves, workers, logs):
            _, made, failures = result or (task, [], dict.fromkeys(task.names, reason))
            lacking = {name for name, why in failures.items() if why.startswith(NO_MEMORY)}
            machine |= lacking if result else set(task.names)
            parts += made
            failed |= failures
            advance(len(task.names), len(failures))
    return parts, failed, machine


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
    """The batches that some usable lenses of a shard are fitted in: first those that were begun, as they were."""
    if lenses.empty:
        return []
    text, automatic = config.model_dump_json(), config.fit.batch_size == "auto"
    memory = cluster.worker_memory(config.cluster, workers) if automatic else 0

    def task(bucket: object, names: Iterable[str]) -> Task:
        batch = tuple(names)
        own = tuple(hashes[name] for name in batch)
        return Task(text, paths, str(bucket), batch, own, shard, draws_factor)

    tasks: list[Task] = []
    left = lenses.set_index("name")["bucket"]
    for path, key in resume.begun(paths).items():
        names = key["names"]
        if not set(names) <= set(left.index):
            continue  # of another shard, or done, or in another that was begun
        bucket = left[names[0]]
        resumed = task(bucket, names)
        expected = batch_checkpoint(resumed)
        if (expected.path, expected.key) == (path, key) and len(names) <= largest_batch(config, bucket, memory):
            tasks.append(resumed)
            left = left.drop(names)
    for bucket, same in left.groupby(left, sort=True):
        names = same.index.tolist()
        size = largest_batch(config, str(bucket), memory)
        if automatic:
            size = min(size, -(-len(names) // workers))
        tasks += [task(bucket, names[first : first + size]) for first in range(0, len(names), size)]
    return tasks


def _write_shard(
    config: Config,
    paths: Results,
    shard: int,
    places: Mapping[str, Place],
    failed: Mapping[str, list[str]],
    bucket_of: Mapping[str, str],
) -> str:
    """Write the store of a shard from results that lie at `places`; one that would stay the same is left alone.

    failed: hash and reason of the lenses that would fail again; not those whose workers died or had too little memory.
    Returns when it was written. To be called by one process at a time.
    """
    store = paths.store(shard)
    used = {name: getattr(config, name) for name in ("lens", "priors", "fit")}
    files = [paths.catalogue.with_name("lenses.csv"), *resume.files_that_decide(config, paths)]
    facts = {"shard": shard, "failed": dict(failed)}
    if store.exists() and resume.index_of_store(store) == places:
        before = artefact.read_record(store)["facts"]
        if before == facts | {"written": before.get("written")}:
            return str(before["written"])
    for left in store.parent.glob(artefact.partial(store, "*").name):  # by a process that was killed in this
        shutil.rmtree(left, ignore_errors=True)
    written = datetime.now(UTC).isoformat()
    record = artefact.provenance("fit", used, files, config.seed, **facts, written=written)
    with artefact.written_whole(store) as whole:
        write_shard(whole, resume.gathered(places.values(), bucket_of), record)
    return written


def _write_manifest(path: Path, reasons: Mapping[str, str], written: str) -> None:
    """One row a lens: failed for a reason, or fitted. And when the store was written.

    Without that, Snakemake would see the same manifest where a lens has another result, and make no new summary.
    """
    rows = [{"name": n, "status": "failed" if why else "fitted", "reason": why} for n, why in reasons.items()]
    with artefact.written_whole(path) as manifest:
        pd.DataFrame(rows).assign(written=written).to_csv(manifest, index=False)


def _remove_shards_beyond(config: Config, paths: Results, lenses: int, hashes: Collection[str]) -> None:
    """Remove what an earlier run of more lenses or smaller shards left: it would be read with the new ones.

    A store stays without its manifest as long as it has results that shards of this run have not taken over yet.
    """
    shards = shard_count(config, lenses)

    def beyond(path: Path) -> bool:
        return int(path.stem.split("-")[1]) >= shards

    for manifest in filter(beyond, paths.fit.glob("shard-*.csv")):
        manifest.unlink(missing_ok=True)  # another shard may be at this too
    stores = resume.stores(paths.fit)
    if not any(map(beyond, stores)):
        return
    taken = {h for store in stores if not beyond(store) for h in resume.index_of_store(store)}
    for store in filter(beyond, stores):
        try:
            left = (resume.read_index(store).keys() & set(hashes)) - taken
        except resume.UNREADABLE:  # now, but perhaps not for ever
            continue
        if not left:
            shutil.rmtree(store, ignore_errors=True)


def largest_batch(config: Config, bucket: str, memory: float) -> int:
    """Most lenses of a bucket to fit together: what the settings say, or what half of a memory [bytes] holds."""
    if config.fit.batch_size != "auto":
        return config.fit.batch_size
    ny, nx = (int(side) for side in re.findall(r"\d+", bucket)[:2])
    rays = ny * nx * config.lens.supersampling**2
    chains = config.fit.chains * (2 if config.fit.explorations else 1)  # which begin at two solutions
    held = memory / 2 / (BYTES_PER_RAY * chains * rays)
    return int(max(1, min(held, LARGEST_BATCH)))
