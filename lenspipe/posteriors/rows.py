"""Rows of a group of a store of posteriors: reading them, and finding those that cannot be read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr
import zarr
from zarr.storage import LocalStore, StorePath

from lenspipe.errors import InputError, in_one_line
from lenspipe.posteriors.writing import BLOCK, VARIABLES

T = TypeVar("T")
METADATA = "zarr.json"  # of a group and of an array
KEPT = 4096  # arrays whose metadata are kept: those of some fifty groups


def read_rows(group: Path, rows: Sequence[int] | None = None, variables: Iterable[str] | None = None) -> xr.Dataset:
    """Some variables of some lenses, or all, of the group of a store.

    group: its folder. Raises InputError, with the lenses concerned and what to do, where something is missing or
    damaged.
    """
    chosen = slice(None) if rows is None else slice(min(rows), max(rows) + 1)
    try:
        arrays, found = _read(group, chosen, variables)
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{group}: cannot be read ({in_one_line(error)}); {remedy(group.parent)}") from error
    read = {}
    for array, values in zip(arrays, found, strict=True):
        if isinstance(values, BaseException):
            lenses = _concerned(group, array.basename, range(array.shape[0])[chosen])
            raise InputError(
                f"{group / array.basename}: {lenses} cannot be read ({in_one_line(values)}); {remedy(group.parent)}"
            ) from values
        values = np.asarray(values, dtype=object if array.dtype.kind == "T" else None)
        values = values if rows is None else values[np.array(rows) - chosen.start]
        read[array.basename] = xr.Variable(array.metadata.dimension_names, values, dict(array.attrs))
    return xr.Dataset(read)


def variables_of(group: Path) -> list[str]:
    """Names of the variables of the group of a store."""
    try:
        return list(_variables(group, _stamp(group)))
    except Exception as error:
        raise InputError(f"{group}: cannot be read ({in_one_line(error)}); {remedy(group.parent)}") from error


def unreadable_rows(group: Path, variables: Iterable[str] | None = None) -> set[int]:
    """Rows of the group of a store in which one of some variables cannot be read, or one of all, after reading all.

    Raises OSError, ValueError or KeyError where it is not even known what should be there.
    """
    (name,), _ = _read(group, slice(0), ["name"])
    lenses, bad = name.shape[0], set()
    for first in range(0, lenses, BLOCK):
        last = min(first + BLOCK, lenses)
        arrays, found = _read(group, slice(first, last), variables)
        for array, values in zip(arrays, found, strict=True):
            if array.shape[0] != lenses:
                bad |= set(range(lenses))
            elif isinstance(values, BaseException):
                chunks = [range(row, min(row + array.chunks[0], last)) for row in range(first, last, array.chunks[0])]
                bad |= {row for chunk in chunks if not _readable(group, array.basename, chunk) for row in chunk}
    return bad


def readable_names(group: Path) -> dict[int, str]:
    """Names of the lenses by row, without those that cannot be read."""
    bad = unreadable_rows(group, ["name"])
    if not bad:
        return dict(enumerate(read_rows(group, variables=["name"])["name"].values.tolist()))
    (array,), _ = _read(group, slice(0), ["name"])
    good = [row for row in range(array.shape[0]) if row not in bad]
    return {row: read_rows(group, [row], ["name"])["name"].values[0] for row in good}


def listed(names: Sequence[str]) -> str:
    """Names of lenses for an error: five of them, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{'lens' if len(names) == 1 else 'lenses'} {', '.join(names[:5])}{more}"


def remedy(store: Path) -> str:
    """What to do about a damaged store."""
    return f"run the stage fit again for {store.stem}: it fits the lenses of a store that cannot be read"


def _concerned(group: Path, variable: str, rows: Sequence[int]) -> str:
    bad, names = unreadable_rows(group, [variable]), readable_names(group)
    return listed([names.get(row, f"in row {row}") for row in rows if row in bad])


def _readable(group: Path, variable: str, rows: range) -> bool:
    _, (values,) = _read(group, slice(rows.start, rows.stop), [variable])
    return not isinstance(values, BaseException)


def _read(group: Path, chosen: slice, variables: Iterable[str] | None) -> tuple[list[zarr.AsyncArray], list[Any]]:
    """Arrays of a group and, of each, its values in some rows or the error that came of reading them."""
    arrays = [_array(group / name, _stamp(group / name)) for name in variables or _variables(group, _stamp(group))]

    async def values(array: zarr.AsyncArray) -> Any:
        _check_files(group, array, range(array.shape[0])[chosen])
        return await array.getitem(chosen)

    async def all_values() -> list[Any]:
        return await asyncio.gather(*[values(array) for array in arrays], return_exceptions=True)

    found = _apart(all_values())
    if out_of_memory := [values for values in found if isinstance(values, MemoryError)]:
        raise out_of_memory[0]
    return arrays, found


@lru_cache(maxsize=KEPT)
def _array(folder: Path, stamp: tuple[int, int]) -> zarr.AsyncArray:
    """The array of a folder. Its metadata are read once as long as they stand: a quarter of what one lens costs."""
    store = LocalStore(folder.parent, read_only=True)
    return zarr.AsyncArray.from_dict(StorePath(store, folder.name), _metadata(folder))


@lru_cache(maxsize=KEPT)
def _variables(group: Path, stamp: tuple[int, int]) -> tuple[str, ...]:
    return tuple(_metadata(group)["attributes"][VARIABLES])


def _metadata(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / METADATA).read_bytes()))


def _stamp(folder: Path) -> tuple[int, int]:
    """What changes when the metadata of a group or an array are written anew."""
    found = (folder / METADATA).stat()
    return found.st_mtime_ns, found.st_ino


def _apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """Its result, from a thread of its own: in the caller's a loop may be running, as in a notebook's."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _check_files(group: Path, array: zarr.AsyncArray, rows: range) -> None:
    """Raise FileNotFoundError where a file with some of the rows is gone: Zarr would read the fill value."""
    lenses = (array.shards or array.chunks)[0]
    for file in range(rows.start // lenses, -(-rows.stop // lenses)):
        key = array.metadata.encode_chunk_key((file, *(0 for _ in array.shape[1:])))
        if not (group / array.basename / key).is_file():
            raise FileNotFoundError(f"{key} is missing")
