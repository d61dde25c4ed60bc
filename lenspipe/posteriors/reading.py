"""What a run has found: all its posteriors as one lazy dataset, or one lens as an ArviZ object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from lenspipe.errors import InputError
from lenspipe.posteriors.arviz import tree
from lenspipe.posteriors.rows import listed, read_rows
from lenspipe.posteriors.shards import Group, find_lens, groups
from lenspipe.results import Results

IMAGE = {"y", "x"}  # dimensions that differ between the lenses of a run


def open_posteriors(fit: str | Path) -> xr.Dataset:
    """All lenses of a run as one lazy dataset, by name along `lens`: draws, sample statistics and diagnostics.

    fit: the folder of the stage fit. Of it, only the names of lenses are read; a Dask block is up to 128 lenses. Images
    of the lenses, whose sizes differ, are left out: `posterior` has those of one.
    """
    blocks = [block for group in groups(Path(fit)) for block in group.blocks()]
    if not blocks:
        raise InputError(f"{fit}: no lens of this run has a posterior; its manifests shard-*.csv say why")
    one = blocks[0].take([0]).read().drop_vars("name")
    variables = {
        name: (variable.dims, _lazy(blocks, str(name), variable))
        for name, variable in one.items()
        if not IMAGE & set(variable.dims)
    }
    coordinates = {dim: range(one.sizes[dim]) for dim in ("chain", "draw")}
    return xr.Dataset(variables, {"lens": [name for block in blocks for name in block.names], **coordinates})


def posterior(fit: str | Path, name: str) -> xr.DataTree:
    """One lens as an ArviZ object, in memory; `lenspipe.posteriors.arviz` lists its groups.

    fit: the folder of the stage fit. The observed image is read from the catalogue beside it, where that is.
    Raises InputError where the lens is not among the posteriors, with its reason where it failed.
    """
    group = find_lens(Path(fit), name)
    try:
        image = observed(Path(fit), group.path.name, [name]).isel(lens=0)
    except InputError:
        image = None
    return tree(group.read().isel(lens=0), image)


def observed(fit: Path, bucket: str, names: Sequence[str]) -> xr.Dataset:
    """Lenses as they are in the catalogue beside the folder of the stage fit.

    Raises InputError where there is no catalogue or it has other lenses.
    """
    catalogue = Results(fit.parent).catalogue
    if not (catalogue / bucket).is_dir():
        raise InputError(f"{catalogue}: no images of {bucket} here; keep the catalogue beside the folder of the fits")
    arrays = dict(zarr.open_group(catalogue / bucket, mode="r", zarr_format=3).arrays())
    places = {name: row for row, name in enumerate(np.asarray(arrays.pop("name")).tolist())}
    if absent := [name for name in names if name not in places]:
        raise InputError(f"{catalogue}: {listed(absent)} not in it; it is not the one that was fitted")
    rows = np.array([places[name] for name in names])
    return xr.Dataset({n: (a.metadata.dimension_names, a.oindex[rows]) for n, a in arrays.items()})  # type: ignore[union-attr]


def _lazy(blocks: Sequence[Group], variable: str, like: xr.DataArray) -> da.Array:
    """A variable of all blocks; like: its values for one lens."""
    of_a_lens = like.shape[1:]
    token = f"{variable}-{uuid4().hex}"
    graph = {
        (token, number, *(0 for _ in of_a_lens)): (_values, block.path, block.rows, variable, of_a_lens)
        for number, block in enumerate(blocks)
    }
    chunks = (tuple(len(block.names) for block in blocks), *((size,) for size in of_a_lens))
    return da.Array(graph, token, chunks, dtype=like.dtype)


def _values(group: Path, rows: Sequence[int], variable: str, of_a_lens: tuple[int, ...]) -> NDArray:
    values = read_rows(group, rows, [variable])[variable].to_numpy()
    if values.shape[1:] != of_a_lens:
        raise InputError(
            f"{group / variable}: {values.shape[1:]} values a lens, and {of_a_lens} in the first shard; "
            "fit all lenses with the same settings"
        )
    return np.asarray(values)
