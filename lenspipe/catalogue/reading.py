"""What the stage `catalogue` has written, as fits and summaries read it: the table of lenses and batches of images."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
import xarray as xr

from lenspipe.catalogue.batch import LensBatch
from lenspipe.errors import InputError, in_one_line
from lenspipe.memory import out_of_memory
from lenspipe.results import AS_WRITTEN

FOUND = (
    "center_column",
    "center_row",
    "background",
    "background_error",
    "fit_radius",
    "arc_radius",
    "first_arc_snr",
    "companions",
    "cosmic_rays",
    "masked",
    "noise_correlation",
    "noise_inflation",
    "chi2_expected",
)  # of `preparation.Prepared`, in the table of lenses
TEXTS = ("origin", "reason", "bucket", "hash", "image_unit", "notes")  # columns of the table that may be empty


def read_catalogue(out: Path) -> pd.DataFrame:
    """The rows of `lenses.csv` beside the catalogue at `out`; empty cells of text are empty strings."""
    path = out.with_name("lenses.csv")
    if not path.is_file():
        raise InputError(f"{path}: no lens catalogue here; run the stage catalogue first")
    table = pd.read_csv(path, dtype=dict.fromkeys(("name", "status", *TEXTS), str), **AS_WRITTEN)
    return table.fillna(dict.fromkeys(TEXTS, ""))


def read_batch(out: Path, bucket: str, names: list[str], dtype: torch.dtype) -> LensBatch:
    """The lenses of one bucket by name, in the order asked for.

    Raises InputError where they are missing or damaged, MemoryError where there is no room for them, OSError where the
    file system does not answer.
    """
    parts = ("image", "noise", "usable", "psf", "pixel_scale", "flux_unit", "light_unit")
    try:
        group = xr.open_zarr(out, group=bucket, consolidated=False)
        position = {name: row for row, name in enumerate(group["name"].to_numpy().tolist())}
        lenses = group.isel(lens=[position[name] for name in names])
        tensors = {name: torch.from_numpy(lenses[name].to_numpy()) for name in parts}
    except Exception as error:  # whatever xarray, Zarr and its codecs raise
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        if out_of_memory(error):
            raise MemoryError(f"{out / bucket}: {error}") from None
        raise InputError(
            f"{out / bucket}: {', '.join(names)}: cannot be read ({in_one_line(error)}); run the stage catalogue again"
        ) from error
    return LensBatch(tuple(names), **tensors).to(dtype)
