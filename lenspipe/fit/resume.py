"""What is fitted already: a lens's settings and inputs decide its result, and their hash finds it again.

Results lie in stores, one a shard, and in parts, batches of a shard that is not whole yet. A lens may have moved to
another shard, because the catalogue has grown or shards have another size: its result is taken over from there. What a
batch that was begun has done lies in its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from lenspipe import artefact
from lenspipe.config import Config
from lenspipe.errors import InputError
from lenspipe.fit.parts import read_part, write_part
from lenspipe.posteriors.shards import damaged
from lenspipe.results import Results
from lenspipe.tensors import hash_of_tensors

HOW_IT_RUNS = ("shard_size", "batch_size")  # settings of fits that decide no result
DAMAGED = ".damaged"  # ending of the names of parts that are
METHODS = ("adam", "svi")  # begin the names of settings that decide none where no such method is chosen


@dataclass(frozen=True)
class Place:
    """Where the result of a lens lies: a row of a part, or of the group of a store."""

    file: Path
    row: int
    name: str
    bucket: str = ""  # of a store


def lens_hashes(config: Config, paths: Results, lenses: pd.DataFrame) -> dict[str, str]:
    """Hash of all that decides the result of each usable lens, by name: settings, earlier stages, its data."""
    settings = config.model_dump(mode="json", include={"seed": True, "lens": True, "priors": True, "fit": True})
    chosen = (config.fit.search, config.fit.sampler)
    unused = [f"{method}_" for method in METHODS if not any(name.startswith(method) for name in chosen)]
    left_out = (*HOW_IT_RUNS, *unused)
    settings["fit"] = {key: value for key, value in settings["fit"].items() if not key.startswith(left_out)}
    common = {
        "settings": settings,
        "files": {path.name: hash_of_tensors(path) for path in files_that_decide(config, paths)},
        "lenspipe": artefact.versions()["lenspipe"],
    }
    begun = hashlib.sha256(json.dumps(common, sort_keys=True).encode())
    usable = lenses[lenses["status"] == "usable"]
    found = {}
    for name, own in zip(usable["name"], usable["hash"], strict=True):
        digest = begun.copy()
        digest.update(json.dumps([name, own]).encode())
        found[name] = digest.hexdigest()
    return found


def files_that_decide(config: Config, paths: Results) -> list[Path]:
    """Files of earlier stages that decide the results of all lenses."""
    return [paths.source_prior, *([paths.deflection_table] if config.lens.deflection == "table" else [])]


def stores(fit: Path) -> list[Path]:
    """The stores of all shards, those of an earlier, larger catalogue too."""
    return sorted(fit.glob("shard-*.zarr"))


UNREADABLE = (OSError, ValueError, KeyError, RuntimeError)  # what reading the index of a broken store raises


def index_of_store(store: Path) -> dict[str, Place]:
    """Where the lenses of a store lie, by hash; nothing where it cannot be read."""
    try:
        return read_index(store)
    except UNREADABLE:
        return {}


def read_index(store: Path) -> dict[str, Place]:
    """The same; raises one of `UNREADABLE` where it cannot be read."""
    found: dict[str, Place] = {}
    for bucket, group in zarr.open_group(store, mode="r").groups():
        names, hashes = (np.asarray(group[key]).tolist() for key in ("name", "hash"))
        found |= {h: Place(store, row, n, bucket) for row, (n, h) in enumerate(zip(names, hashes, strict=True))}
    return found


def index_of_parts(parts: Iterable[Path]) -> dict[str, Place]:
    """Where the lenses of parts lie, by hash; what cannot be read is passed over."""
    found: dict[str, Place] = {}
    for path in parts:
        part = None
        with suppress(OSError):
            part = read_part(path, ["name", "hash"])
        if part is not None:
            rows = zip(part["name"].to_numpy().tolist(), part["hash"].to_numpy().tolist(), strict=True)
            found |= {h: Place(path, row, name) for row, (name, h) in enumerate(rows)}
    return found


def located(paths: Results, shard: int, hashes: Collection[str], unreadable: Collection[str] = ()) -> dict[str, Place]:
    """Where results lie, by hash: in this shard's store, without the names `unreadable`, or, later, in parts."""
    found = {h: place for h, place in index_of_store(paths.store(shard)).items() if place.name not in unreadable}
    found |= index_of_parts(sorted(paths.fit.glob("parts/*/*.npz"), key=age))
    wanted = set(hashes)
    return {h: place for h, place in found.items() if h in wanted}


def age(path: Path) -> float:
    """When a file was written; zero for one that another job has just removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def take_over(paths: Results, shard: int, hashes: Collection[str]) -> None:
    """Make parts of this shard from results that are in the stores of other shards."""
    wanted = set(hashes)
    for store in stores(paths.fit):
        if store == paths.store(shard) or not wanted:
            continue
        here = {h: place for h, place in index_of_store(store).items() if h in wanted}
        for batch in loaded(store, here.values()) if here else []:
            write_part(paths.parts(shard), batch)
            wanted -= set(batch["hash"].to_numpy().tolist())


def loaded(store: Path, places: Iterable[Place]) -> Iterator[xr.Dataset]:
    """Rows of the store of another shard, without lenses that are damaged, until it is replaced by another job."""
    try:
        before = store.stat().st_ino
        unsound = set(damaged(store))
        for (_, bucket), chosen in by_file(place for place in places if place.name not in unsound).items():
            batch = opened(store, bucket, chosen).load()
            if store.stat().st_ino != before:
                return
            yield batch
    except (OSError, ValueError, KeyError, RuntimeError, InputError):
        return


def guests(
    paths: Results, shard: int, members: Collection[str], hashes: Collection[str], unreadable: Collection[str] = ()
) -> dict[str, Place]:
    """Results in this shard's store, of lenses that are another shard's now and have no result elsewhere yet.

    Without the lenses of the names `unreadable`, which that shard has to fit again.
    """
    own, others = paths.store(shard), set(hashes) - set(members)
    here = index_of_store(own)
    leaving = {h: place for h, place in here.items() if h in others and place.name not in unreadable}
    if leaving:
        elsewhere = {h for store in stores(paths.fit) if store != own for h in index_of_store(store)}
        elsewhere |= index_of_parts(paths.fit.glob("parts/*/*.npz")).keys()
        leaving = {h: place for h, place in leaving.items() if h not in elsewhere}
    return leaving


def by_file(places: Iterable[Place]) -> dict[tuple[Path, str], list[Place]]:
    """Places that can be read together."""
    found: dict[tuple[Path, str], list[Place]] = defaultdict(list)
    for place in places:
        found[place.file, place.bucket].append(place)
    return found


def opened(file: Path, bucket: str, places: list[Place]) -> xr.Dataset:
    """The rows of one part, or of one group of a store, lazily. Raises InputError where a part cannot be read."""
    batch = xr.open_zarr(file, group=bucket, consolidated=False) if bucket else whole_part(file)
    return batch.isel(lens=[place.row for place in places])


def whole_part(file: Path) -> xr.Dataset:
    """A part; raises InputError where it cannot be read. One that is damaged is moved out of the next run's way."""
    again = "run the stage fit again, it makes what is missing"
    try:
        part = read_part(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); {again}, or remove the file if this stays so") from error
    if part is None:
        with suppress(OSError):
            file.rename(file.with_suffix(DAMAGED))
        raise InputError(f"{file}: is damaged; {again}")
    return part


def gathered(places: Iterable[Place], bucket_of: Mapping[str, str]) -> dict[str, list[xr.Dataset]]:
    """The results at all places, by the bucket that each lens has in the catalogue."""
    groups: dict[str, list[xr.Dataset]] = defaultdict(list)
    for (file, bucket), chosen in by_file(places).items():
        for name in {bucket_of[place.name] for place in chosen}:
            same = [place for place in chosen if bucket_of[place.name] == name]
            groups[name].append(opened(file, bucket, same))
    return groups


def recorded_failures(store: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """Reasons of lenses that failed when this shard was last fitted, from the same settings and inputs, by name."""
    try:
        facts: dict[str, Any] = artefact.read_record(store)["facts"]
    except (InputError, KeyError, ValueError):
        return {}
    failed = facts.get("failed", {})
    return {name: reason for name, (own, reason) in failed.items() if hashes.get(name) == own}


def begun(paths: Results) -> dict[Path, dict[str, Any]]:
    """Checkpoints of batches that were begun and not ended, with the key of each, those of fewer lenses first."""
    found = {}
    for path in sorted(paths.checkpoints.glob("*.safetensors")):
        with suppress(InputError, KeyError):
            found[path] = artefact.read_record(path)["key"]
    return dict(sorted(found.items(), key=lambda entry: len(entry[1]["names"])))


def useless(
    config: Config, paths: Results, shard: int, catalogue: pd.DataFrame, tried_again: Collection[str]
) -> list[Path]:
    """Checkpoints that no run goes on from: of this shard, which is done, or of lenses that no shard has together.

    tried_again: lenses of this shard that the next run begins with, where theirs were left.
    """
    shard_of = {name: row // config.fit.shard_size for row, name in enumerate(catalogue["name"])}

    def can_go_on(names: list[str]) -> bool:
        shards = {shard_of.get(name, -1) for name in names}
        return len(shards) == 1 and shards != {-1} and (shards != {shard} or not {*names}.isdisjoint(tried_again))

    return [path for path, key in begun(paths).items() if not can_go_on(key["names"])]
