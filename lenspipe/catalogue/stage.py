"""Stage `catalogue`: check every lens and bring mocks and observed lenses into one format.

`lenses.csv` has one row a lens, unusable ones with their reason; `catalogue.zarr` has the images of the usable ones,
one group for each shape of image and PSF, so that a group is a batch that can be fitted together.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr
from rich.progress import track

from lenspipe import artefact
from lenspipe.catalogue.entry import Entry
from lenspipe.catalogue.observed import LensImage, read_entry
from lenspipe.catalogue.reading import FOUND
from lenspipe.catalogue.tables import read_entries
from lenspipe.config import Catalogue, expand_path
from lenspipe.errors import InputError
from lenspipe.lens.coordinates import axis_ratio, ellipticity, theta_E_from_r_Ein

ARRAYS = {"image": "<f4", "noise": "<f4", "usable": "bool", "psf": "<f4"}  # of a lens, as they are stored
BLOCK = 64  # lenses in memory at a time, and in one chunk of the catalogue
NAMES = 64 * BLOCK  # names in one chunk: whoever looks for one lens reads those of all


def write_catalogue(settings: Catalogue, mocks: Path | None, out: Path, psf_supersampling: int = 1) -> None:
    """Write `out` (catalogue.zarr) and `lenses.csv` beside it.

    mocks: folder of the stage `mocks`, where they are taken in; psf_supersampling: see `config.Lens`. Raises
    InputError for a broken table; a broken lens is a row with `status` failed.
    """
    entries = read_entries(settings, mocks)
    rows = []
    with artefact.written_whole(out) as folder:
        store = _Store(folder)
        for entry in track(entries, description="catalogue"):
            row: dict[str, object] = {"name": entry.name, "origin": entry.origin, "pixel_scale": np.nan}
            try:
                preparation = None if entry.origin == "mock" else settings.preparation
                lens = read_entry(entry, preparation, psf_supersampling)
            except InputError as error:
                row |= {"status": "failed", "reason": str(error), "bucket": "", "snr": np.nan, "hash": ""}
            else:
                bucket = store.add(entry, lens)
                row |= {"pixel_scale": lens.pixel_scale, "status": "usable", "reason": "", "bucket": bucket}
                row |= {"snr": lens.signal_to_noise, "hash": data_hash(lens)} | findings(lens) | entry.facts
            rows.append(row | {f"true_{name}": value for name, value in completed(entry.truth).items()})
        store.flush()
        inputs = [*([mocks] if mocks else []), *(expand_path(table) for table in settings.tables)]
        record = artefact.provenance("catalogue", {"catalogue": settings}, inputs, lenses=len(entries))
        zarr.open_group(folder, mode="a").attrs[artefact.KEY] = record
        with artefact.written_whole(out.with_name("lenses.csv")) as table:
            pd.DataFrame(rows).to_csv(table, index=False)


def findings(lens: LensImage) -> dict[str, object]:
    """What the table of lenses says of one beside what it needs: columns of `FOUND` and their values."""
    row: dict[str, object] = {"north": lens.north, "parity": lens.parity, "image_unit": lens.image_unit}
    row["notes"] = "; ".join(lens.notes)
    units = {"flux_unit": lens.flux_unit, "light_unit": lens.light_unit}
    return row | units | ({} if lens.prepared is None else {key: getattr(lens.prepared, key) for key in FOUND})


def data_hash(lens: LensImage) -> str:
    """SHA-256 of all that a fit sees of a lens, as it is stored; its name aside."""
    numbers = [lens.pixel_scale, lens.flux_unit, lens.light_unit, lens.image.shape, lens.psf.shape]
    digest = hashlib.sha256(json.dumps(numbers).encode())
    for name, dtype in ARRAYS.items():
        digest.update(getattr(lens, name).astype(dtype).tobytes())
    return digest.hexdigest()


def completed(truth: dict[str, float]) -> dict[str, float]:
    """True values with those that follow from them: e1 and e2 from q and phi or the other way, theta_E from r_Ein."""
    known = {name: torch.tensor(value, dtype=torch.float64) for name, value in truth.items()}
    if {"q", "phi"} <= known.keys():
        known["e1"], known["e2"] = ellipticity(known["q"], known["phi"])
    elif {"e1", "e2"} <= known.keys():
        known["q"], known["phi"] = axis_ratio(known["e1"], known["e2"])
    if {"r_Ein", "q"} <= known.keys():
        known["theta_E"] = theta_E_from_r_Ein(known["r_Ein"], known["q"])
    return {name: float(value) for name, value in known.items()} | truth


def first_look(lens: LensImage) -> tuple[np.ndarray, np.ndarray]:
    """The deflector's light of the first look and where arcs were seen, for pictures; blank where there was none."""
    if lens.prepared is None:
        return np.zeros(lens.image.shape, dtype="<f4"), np.zeros(lens.image.shape, dtype=bool)
    return lens.prepared.light.astype("<f4"), lens.prepared.arcs


def chunks_of(lenses: xr.Dataset) -> dict[str, dict[str, tuple[int, ...]]]:
    """How the variables of a bucket are cut on disk, as xarray takes it."""
    return {str(n): {"chunks": (NAMES if n == "name" else BLOCK, *v.shape[1:])} for n, v in lenses.items()}


class _Store:
    """Writes lenses to their bucket's group, a block at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waiting: dict[str, list[tuple[Entry, LensImage]]] = defaultdict(list)
        self.written: set[str] = set()

    def add(self, entry: Entry, lens: LensImage) -> str:
        (ny, nx), (ky, kx) = lens.image.shape, lens.psf.shape
        bucket = f"image{ny}x{nx}_psf{ky}x{kx}"
        self.waiting[bucket].append((entry, lens))
        if len(self.waiting[bucket]) == BLOCK:
            self._write(bucket)
        return bucket

    def flush(self) -> None:
        for bucket, lenses in self.waiting.items():
            if lenses:
                self._write(bucket)

    def _write(self, bucket: str) -> None:
        entries, lenses = zip(*self.waiting[bucket], strict=True)

        def stack(name: str) -> np.ndarray:
            return np.stack([getattr(lens, name) for lens in lenses]).astype(ARRAYS.get(name, "float64"))

        block = xr.Dataset(
            {
                "image": (("lens", "y", "x"), stack("image")),
                "noise": (("lens", "y", "x"), stack("noise")),
                "usable": (("lens", "y", "x"), stack("usable")),
                "psf": (("lens", "psf_y", "psf_x"), stack("psf")),
                "first_light": (("lens", "y", "x"), np.stack([first_look(lens)[0] for lens in lenses])),
                "arcs": (("lens", "y", "x"), np.stack([first_look(lens)[1] for lens in lenses])),
                "flux_unit": ("lens", stack("flux_unit")),
                "light_unit": ("lens", stack("light_unit")),
                "pixel_scale": ("lens", stack("pixel_scale")),
                "name": ("lens", np.array([entry.name for entry in entries], dtype=object)),
            }
        )
        if bucket in self.written:
            block.to_zarr(self.folder, group=bucket, append_dim="lens", zarr_format=3, consolidated=False)
        else:
            chunks = chunks_of(block)
            block.to_zarr(self.folder, group=bucket, mode="a", zarr_format=3, consolidated=False, encoding=chunks)
            self.written.add(bucket)
        self.waiting[bucket].clear()
