"""Reading back the filtered galaxies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from lenspipe.errors import InputError


def evenly(size: int, count: int) -> list[int]:
    """At most `count` of `size` rows, spread evenly."""
    return sorted({int(row) for row in np.linspace(0, size - 1, min(size, count))})


def open_galaxies(path: Path, split: str) -> xr.Dataset:
    """The galaxies of one split, lazily; the variables are those that `ingest` writes.

    Raises InputError where the file is missing or the split holds no galaxy.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no galaxies here; run the stage galaxies first")
    galaxies = xr.open_zarr(path, consolidated=False)
    chosen = galaxies.isel(galaxy=(galaxies["split"] == split).to_numpy())
    if chosen.sizes["galaxy"] == 0:
        raise InputError(f"{path}: no galaxies in the split {split!r}; raise galaxies.{split}_fraction or add galaxies")
    return chosen
