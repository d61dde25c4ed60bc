"""Stage `galaxies`: from every input's catalogue, through the cuts, to galaxies.zarr and cuts.csv."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from rich.progress import track

from lenspipe.artefact import KEY, provenance, written_whole
from lenspipe.config import Galaxies, GalaxyInput, RealGalaxyCatalogInput, SurveyInput, expand_path
from lenspipe.errors import InputError
from lenspipe.galaxies.catalogue import GalaxyStamp, read_real_galaxy_catalog, read_stamp_archive
from lenspipe.galaxies.exclusion import excluded_rows
from lenspipe.galaxies.selection import Tally
from lenspipe.galaxies.stamps import downscale, feather, noise_factor, normalised, square_stamp
from lenspipe.survey import CATALOGUE

BLOCK = 256  # galaxies in memory at a time, and in one chunk of galaxies.zarr
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Galaxy:
    """One galaxy as the source model sees it."""

    name: str
    input: str
    split: str
    image: NDArray[np.float64]  # [64, 64], peak 1
    noise_sd: float  # pixel noise [peak flux]; 0: not known
    pixel_scale: float  # ["]


def ingest(settings: Galaxies, survey: Path | None, out: Path, seed: int) -> None:
    """Write `out` (galaxies.zarr) and, beside it, cuts.csv.

    galaxies.zarr has `image` float32 [galaxy, y, x] of peak 1, `noise_sd` [peak flux], `pixel_scale` ["], `name`,
    `input` and `split` (train, validation or test). `survey` is the folder of the synthetic survey.
    Raises InputError for inputs that are missing or broken, and where no galaxy, or none of a split, is left.
    """
    paths = [input_path(source, survey) for source in settings.inputs]
    labels = unique([input_label(source, path) for source, path in zip(settings.inputs, paths, strict=True)])
    tallies = [Tally(label) for label in labels]
    splits = dict.fromkeys(SPLITS, 0)
    with written_whole(out) as store, written_whole(out.with_name("cuts.csv")) as table:
        galaxies = kept_galaxies(settings, paths, tallies, seed)
        while block := list(islice(galaxies, BLOCK)):
            for galaxy in block:
                splits[galaxy.split] += 1
            _append(store, block)
        check_selection(settings, tallies, splits)
        cuts = [row for tally in tallies for row in tally.rows()]
        record = provenance("galaxies", {"galaxies": settings}, sorted(set(paths)), seed, cuts=cuts, splits=splits)
        zarr.open_group(store, mode="r+").attrs[KEY] = record
        with table.open("w", newline="") as stream:
            csv.writer(stream).writerows([("input", "cut", "removed", "left"), *cuts])


def kept_galaxies(settings: Galaxies, paths: list[Path], tallies: list[Tally], seed: int) -> Iterator[Galaxy]:
    """Every galaxy that passes the cuts, input after input; the tallies are filled on the way."""
    for source, path, tally in zip(settings.inputs, paths, tallies, strict=True):
        for stamp in track(read_input(source, path), description=tally.origin):
            if tally.keeps(stamp, settings):
                split = random_split(settings, seed, stamp.name) if source.split == "random" else source.split
                yield learnable(settings, stamp, tally.origin, split)


def learnable(settings: Galaxies, stamp: GalaxyStamp, origin: str, split: str) -> Galaxy:
    """The square image of peak 1, with the noise and pixel scale that it has then."""
    square = square_stamp(stamp.image, settings.min_stamp_size, stamp.zero_outside)
    side = settings.stamp_size
    image, peak = normalised(feather(downscale(square, side), settings.edge_feather))
    noise_sd = stamp.noise_sd * noise_factor(len(square), side) / peak
    return Galaxy(stamp.name, origin, split, image, noise_sd, stamp.pixel_scale * len(square) / side)


def random_split(settings: Galaxies, seed: int, name: str) -> str:
    """The side of a galaxy, from the seed and its name alone: whatever else is read, it stays where it is."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < settings.test_fraction:
        return "test"
    return "validation" if draw < settings.test_fraction + settings.validation_fraction else "train"


def input_path(source: GalaxyInput, survey: Path | None) -> Path:
    """The catalogue or archive of an input. Raises InputError where the survey is asked for and there is none."""
    if isinstance(source, SurveyInput):
        if survey is None:
            raise InputError("galaxies.inputs has layout survey, but no survey was given; run the stage `survey` first")
        return survey / CATALOGUE
    return expand_path(source.catalogue if isinstance(source, RealGalaxyCatalogInput) else source.archive)


def input_label(source: GalaxyInput, path: Path) -> str:
    """What an input is called in cuts.csv and galaxies.zarr."""
    if isinstance(source, SurveyInput):
        return "survey"
    name = f"{path.parent.name}/{path.name}"
    return name if isinstance(source, RealGalaxyCatalogInput) else f"{name}:{source.key}"


def unique(labels: list[str]) -> list[str]:
    """Labels of which the second and later of the same name carry a number."""
    return [
        f"{label} ({labels[: i + 1].count(label)})" if label in labels[:i] else label for i, label in enumerate(labels)
    ]


def read_input(source: GalaxyInput, path: Path) -> Iterator[GalaxyStamp]:
    """The galaxies of an input, with the reader of its layout."""
    if isinstance(source, SurveyInput):
        return read_real_galaxy_catalog(path)
    if isinstance(source, RealGalaxyCatalogInput):
        fits, selection = (expand_path(name) if name else None for name in (source.fits, source.selection))
        excluded = None
        if source.exclusion != "none":
            excluded = excluded_rows(path, source.exclusion, source.sample, fits, selection)
        return read_real_galaxy_catalog(path, fits, excluded)
    return read_stamp_archive(path, source.key, source.pixel_scale, source.noise_sd, source.exclude)


def check_selection(settings: Galaxies, tallies: list[Tally], splits: dict[str, int]) -> None:
    """Raise InputError where no galaxy is left, or where a split has none."""
    if not sum(splits.values()):
        lines = "\n".join(f"  {tally.in_words()}" for tally in tallies)
        raise InputError(f"no galaxy is left after the cuts; widen the cuts under `galaxies`, or add inputs\n{lines}")
    if empty := [name for name, count in splits.items() if not count]:
        counts = ", ".join(f"{name} {count}" for name, count in splits.items())
        raise InputError(
            f"no galaxy in the split(s) {', '.join(empty)} (found {counts}); add galaxies, or raise "
            f"galaxies.validation_fraction ({settings.validation_fraction:g}) and test_fraction "
            f"({settings.test_fraction:g}), or give an input a split of its own"
        )


def _append(store: Path, block: list[Galaxy]) -> None:
    """Write a block of galaxies, or append it where there are some already."""
    columns: dict[str, tuple[str, NDArray[Any]]] = {
        name: ("galaxy", np.array([getattr(galaxy, name) for galaxy in block], dtype=dtype))
        for name, dtype in (
            ("noise_sd", float),
            ("pixel_scale", float),
            ("name", object),
            ("input", object),
            ("split", object),
        )
    }
    images = np.array([galaxy.image for galaxy in block], dtype=np.float32)
    data = xr.Dataset({"image": (("galaxy", "y", "x"), images), **columns})
    if store.exists():
        data.to_zarr(store, zarr_format=3, consolidated=False, append_dim="galaxy")
    else:
        encoding = {name: {"chunks": (BLOCK, *data[name].shape[1:])} for name in data.data_vars}
        data.to_zarr(store, zarr_format=3, consolidated=False, encoding=encoding)
