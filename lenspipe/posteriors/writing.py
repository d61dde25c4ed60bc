"""Posteriors to disk: the Zarr folder of a shard, in blocks of lenses.

Every file holds one variable of `BLOCK` lenses, cut into chunks that are compressed and read on their own. Each chunk
has a checksum, and so has the table of a file's chunks. All chunks are written, those full of zeros too, so that
one that is missing is known to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from lenspipe import artefact
from lenspipe.errors import InputError

BLOCK = 128  # lenses in a file, and in memory at a time
CHUNK_BYTES = 1 << 16  # what a chunk may hold uncompressed if it holds more than one lens
VARIABLES = "variables"  # attribute of a group: the names of its variables, so that a missing one is missed
TEXT = "OUT"  # kinds of NumPy's types of text


def write_shard(path: Path, groups: Mapping[str, Sequence[xr.Dataset]], record: Mapping[str, Any]) -> None:
    """Write the folder of a shard: one group for each bucket that has lenses, sorted by name.

    groups: by bucket, datasets in the layout of `lenspipe.posteriors.store` of some of its lenses each, in memory or
    not. They must have the same variables, of the same sizes; raises InputError where they differ or share a lens.
    record: goes into the folder's attributes.
    """
    root = zarr.open_group(path, mode="w", zarr_format=3, attributes={artefact.KEY: dict(record)})
    for bucket, datasets in groups.items():
        parts = [part for part in datasets if part.sizes["lens"]]
        if parts:
            variables = [str(name) for name in parts[0].variables]
            group = root.create_group(bucket, attributes={VARIABLES: variables})
            _write_group(group, parts, f"{path}, lenses of {bucket}")


def _write_group(group: zarr.Group, parts: Sequence[xr.Dataset], where: str) -> None:
    lenses = _sorted_lenses(parts, where)
    _check_alike(parts, where)
    arrays = {
        str(name): _create(group, str(name), variable, len(lenses), _dtype(parts, str(name)))
        for name, variable in parts[0].variables.items()
    }
    for first in range(0, len(lenses), BLOCK):
        block = lenses[first : first + BLOCK]
        for name, array in arrays.items():
            array[first : first + len(block)] = _gathered(parts, name, block)


def _create(group: zarr.Group, name: str, variable: xr.Variable, lenses: int, dtype: Any) -> zarr.Array:
    """An array of a variable of the group. Where a chunk holds as many lenses as a file, the file is that chunk."""
    row = int(np.prod(variable.shape[1:])) * (16 if dtype is str else dtype.itemsize)
    together = min(BLOCK, 1 << max(0, (CHUNK_BYTES // max(row, 1)).bit_length() - 1))  # a power of two: divides BLOCK
    return group.create_array(
        name,
        shape=(lenses, *variable.shape[1:]),
        dtype=dtype,
        chunks=(together, *variable.shape[1:]),
        shards=(BLOCK, *variable.shape[1:]) if together < BLOCK else None,
        compressors=ZstdCodec(level=3, checksum=True),
        fill_value=np.nan if dtype is not str and dtype.kind == "f" else None,
        dimension_names=[str(dim) for dim in variable.dims],
        attributes=variable.attrs,
        config={"write_empty_chunks": True},  # of this object: the store does not keep it
    )


def _sorted_lenses(parts: Sequence[xr.Dataset], where: str) -> list[tuple[str, int, int]]:
    """(name, part, row in it) of every lens, by name."""
    lenses = sorted((str(n), part, row) for part, data in enumerate(parts) for row, n in enumerate(data["name"].values))
    twice = [lens[0] for lens, following in pairwise(lenses) if lens[0] == following[0]]
    if twice:
        raise InputError(f"{where}: {', '.join(twice)} twice; each lens has one posterior")
    return lenses


def _check_alike(parts: Sequence[xr.Dataset], where: str) -> None:
    first = _layout(parts[0])
    for part in parts[1:]:
        if differing := first ^ _layout(part):
            names = sorted({variable[0] for variable in differing})
            raise InputError(
                f"{where}: {part['name'].values[0]} and {parts[0]['name'].values[0]} differ in the variables or sizes "
                f"of {', '.join(names)}; they were fitted with different settings: fit them again with the same ones"
            )


def _layout(part: xr.Dataset) -> set[tuple[str, tuple[Any, ...], tuple[int, ...], str]]:
    """(name, dimensions, sizes of a lens, attributes) of all variables."""
    return {(str(n), v.dims, v.shape[1:], json.dumps(v.attrs, sort_keys=True)) for n, v in part.variables.items()}


def _dtype(parts: Sequence[xr.Dataset], name: str) -> Any:
    dtypes = [part[name].dtype for part in parts]
    return str if dtypes[0].kind in TEXT else np.result_type(*dtypes)


def _gathered(parts: Sequence[xr.Dataset], name: str, block: Sequence[tuple[str, int, int]]) -> NDArray:
    """Values of a variable for the lenses of a block; of each part no more than they need is loaded."""
    rows: dict[int, dict[int, int]] = {}  # part: {row in the part: row in the block}
    for target, (_, part, row) in enumerate(block):
        rows.setdefault(part, {})[row] = target
    variable = parts[0][name]
    text = variable.dtype.kind in TEXT
    values = np.empty((len(block), *variable.shape[1:]), object if text else _dtype(parts, name))
    for part, targets in rows.items():
        taken = parts[part][name].isel(lens=list(targets)).to_numpy()
        values[list(targets.values())] = taken.astype(object) if text else taken
    return values
