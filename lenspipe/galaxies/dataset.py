"""Reading back the filtered galaxies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from lenspipe.errors import InputError


def evenly(size: int, count: int) -> list[int]:
    """At most `count` of `size` rows, spread evenly."""
    return sorted({int(row) for row in np.linspace(0, size - 1, min(size, count))})


def open_galaxies(path: Path, split: str) -> xr.Dataset:
    """The galaxies of one split, lazily; the variables are those that `ingest` writes.

    Raises InputError where the file is missing or unfinished, or the split holds no galaxy.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no galaxies here; run the stage galaxies first")
    try:
        galaxies = xr.open_zarr(path, consolidated=False)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{path}: unfinished or damaged ({error}); run the stage galaxies again") from None
    chosen = galaxies.isel(galaxy=(galaxies["split"] == split).to_numpy())
    if chosen.sizes["galaxy"] == 0:
        remedy = "add galaxies" if split == "train" else f"raise galaxies.{split}_fraction or add galaxies"
        raise InputError(f"{path}: no galaxies in the split {split!r}; {remedy}")
    return chosen


def noise_of(galaxies: xr.Dataset) -> Tensor:
    """Pixel noise [galaxy] of galaxies."""
    return torch.from_numpy(galaxies["noise_sd"].to_numpy()).float()


def galaxy_images(galaxies: Path, split: str) -> Tensor:
    """Images [galaxy, 64, 64] of peak 1 of one split."""
    return torch.from_numpy(open_galaxies(galaxies, split)["image"].to_numpy().astype("float32"))
