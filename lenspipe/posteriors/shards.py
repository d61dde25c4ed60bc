"""The shards of a run: which lenses have a posterior, where it lies, and what of it is damaged.

A shard's manifest says which lenses are its own. Its store may hold others, which are about to move to another shard:
they are not seen here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from lenspipe.errors import InputError, in_one_line
from lenspipe.posteriors.rows import listed, read_rows, readable_names, remedy, unreadable_rows, variables_of
from lenspipe.posteriors.writing import BLOCK
from lenspipe.results import AS_WRITTEN


@dataclass(frozen=True)
class Group:
    """Lenses of one bucket of a shard: their names, and their rows in the group of the store at `path`."""

    path: Path
    names: tuple[str, ...]
    rows: tuple[int, ...]

    def blocks(self) -> Iterator[Group]:
        """The same lenses in portions of the same files, so that each file is read once."""
        files = np.array(self.rows) // BLOCK
        for file in np.unique(files):
            yield self.take(np.flatnonzero(files == file).tolist())

    def take(self, chosen: Iterable[int]) -> Group:
        """Some of the lenses, by their place among them."""
        places = list(chosen)
        return Group(self.path, tuple(self.names[i] for i in places), tuple(self.rows[i] for i in places))

    def variables(self) -> list[str]:
        """Names of the variables that there are."""
        return variables_of(self.path)

    def read(self, variables: Iterable[str] | None = None) -> xr.Dataset:
        """Some variables of the lenses, or all, in memory. Raises InputError where they cannot be read."""
        return read_rows(self.path, self.rows, variables)


def manifests(fit: Path) -> list[Path]:
    """The manifests of all shards. Raises InputError where there is none."""
    found = sorted(fit.glob("shard-*.csv"))
    if not found:
        raise InputError(f"{fit}: no manifest of a shard here; run the stage fit first")
    return found


def read_manifest(path: Path) -> pd.DataFrame:
    """One row a lens of a shard, failures included: `name, status, reason, written`."""
    return pd.read_csv(path, dtype={"name": str, "status": str, "reason": str}, **AS_WRITTEN).fillna({"reason": ""})


def read_manifests(fit: Path) -> pd.DataFrame:
    """One row a lens, failures included, of all shards. Raises InputError where a lens is in two of them."""
    table = pd.concat([read_manifest(path).assign(shard=path.name) for path in manifests(fit)], ignore_index=True)
    if (twice := table["name"].duplicated(keep=False)).any():
        name = table["name"][twice].iloc[0]
        where = " and ".join(table["shard"][table["name"] == name])
        raise InputError(f"{fit}: the lens {name} is in {where}; run the stage fit for all shards again")
    return table.drop(columns="shard")


def groups(fit: Path) -> Iterator[Group]:
    """The lenses of a run that have a posterior, by shard and bucket."""
    for manifest in manifests(fit):
        yield from groups_of_shard(manifest)


def groups_of_shard(manifest: Path, table: pd.DataFrame | None = None) -> Iterator[Group]:
    """The lenses of a shard that have a posterior, by bucket; table: its manifest, where that is read already.

    Raises InputError where its store lacks one of them.
    """
    fitted = fitted_lenses(read_manifest(manifest) if table is None else table)
    store = manifest.with_suffix(".zarr")
    missing = set(fitted)
    for path in _group_folders(store) if fitted else []:
        names = read_rows(path, variables=["name"])["name"].values.tolist()
        rows = tuple(row for row, name in enumerate(names) if name in fitted)
        missing -= {names[row] for row in rows}
        if rows:
            yield Group(path, tuple(names[row] for row in rows), rows)
    if missing:
        raise InputError(f"{store}: {listed(sorted(missing))} of its manifest not in it; {remedy(store)}")


def find_lens(fit: Path, name: str) -> Group:
    """Where the posterior of a lens lies. Manifests are searched as bytes first: one shard of many is read.

    Raises InputError where the lens has none, with its reason where it failed.
    """
    written = name.replace('"', '""').encode()
    for manifest in manifests(fit):
        if written not in manifest.read_bytes():
            continue
        table = read_manifest(manifest)
        row = table[table["name"] == name].to_dict("records")
        if not row:
            continue
        if row[0]["status"] != "fitted":
            raise InputError(f"lens {name} has no posterior: it {row[0]['status']}: {row[0]['reason']}")
        for group in groups_of_shard(manifest, table):
            if name in group.names:
                return group.take([group.names.index(name)])
    table = read_manifests(fit)
    raise InputError(f"no lens {name} in {fit}; the first of its {len(table)} lenses is {table['name'].iloc[0]}")


def fitted_lenses(table: pd.DataFrame) -> set[str]:
    """Names of the lenses of a shard's manifest that have a posterior."""
    return set(table.loc[table["status"] == "fitted", "name"])


def damaged(store: Path) -> list[str]:
    """Names of the lenses in a shard's store that cannot be read, after reading all of it.

    Lenses whose very names cannot be read are those that the shard's manifest has and the store has not.
    """
    manifest = store.with_suffix(".csv")
    known = fitted_lenses(read_manifest(manifest)) if manifest.is_file() else set()
    sound: set[str] = set()
    unsound: set[str] = set()
    try:
        folders = _group_folders(store)
    except InputError:
        return sorted(known)
    for group in folders:
        try:
            names = readable_names(group)
        except Exception:  # of Zarr, its codecs and the file system, where even the names' own metadata are bad
            continue
        try:
            bad = unreadable_rows(group)
        except Exception:
            bad = set(names)
        unsound |= {name for row, name in names.items() if row in bad}
        sound |= {name for row, name in names.items() if row not in bad}
    return sorted(unsound | (known - sound))


def _group_folders(store: Path) -> list[Path]:
    try:
        return [store / bucket for bucket in sorted(zarr.open_group(store, mode="r", zarr_format=3).group_keys())]
    except Exception as error:
        raise InputError(f"{store}: cannot be read ({in_one_line(error)}); {remedy(store)}") from error
