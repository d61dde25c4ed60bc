"""Stage `galaxies`: from every input's image files, through the cuts, to galaxies.zarr and cuts.csv.

The image files are read and cut one by one, each into a part file; the parts are then strung together. Memory is that
of one image file's kept galaxies a worker, whatever the size of the catalogue.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from rich.progress import track

from lenspipe.artefact import KEY, provenance, written_whole
from lenspipe.config import Galaxies, GalaxyInput, RealGalaxyCatalogInput, SurveyInput, expand_path
from lenspipe.errors import InputError
from lenspipe.galaxies.archive import StampArchive
from lenspipe.galaxies.catalogue import image_files
from lenspipe.galaxies.exclusion import excluded_rows
from lenspipe.galaxies.parts import Images, Unit, cut, make_parts, read_part, remove_others, unit_of
from lenspipe.galaxies.selection import Tally
from lenspipe.survey import CATALOGUE

BLOCK = 256  # galaxies in one chunk of galaxies.zarr
SPLITS = ("train", "validation", "test")
COLUMNS = {"noise_sd": float, "pixel_scale": float, "psf_fwhm": float, "name": object, "input": object, "split": object}
Entry = dict[str, Any]  # of one galaxy: `image` and COLUMNS


def ingest(settings: Galaxies, survey: Path, out: Path, seed: int, workers: int = 1) -> None:
    """Write `out` (galaxies.zarr) and, beside it, cuts.csv; the same for any number of `workers` (processes).

    galaxies.zarr has `image` float32 [galaxy, y, x] of peak 1, `noise_sd` [peak flux], `pixel_scale` ["], `psf_fwhm` of
    the stamp as it was read ["] (NaN: not known), `name`, `input` and `split` (train, validation or test). `survey` is
    the folder of the synthetic survey. The parts lie in `<out>.parts` until all is written: a killed or failed run that
    is started again goes on from those that still hold.
    Raises InputError for inputs that are missing or broken, and where no galaxy, or none of a split, is left.
    """
    paths = [input_path(source, survey) for source in settings.inputs]
    labels = unique([input_label(source, path) for source, path in zip(settings.inputs, paths, strict=True)])
    folder = out.with_name(f"{out.name}.parts")
    units = [
        [unit_of(images, settings, seed, folder) for images in image_sets(source, path)]
        for source, path in zip(settings.inputs, paths, strict=True)
    ]
    make_all_parts([unit for of_input in units for unit in of_input], folder, workers)
    tallies = [Tally(label) for label in labels]
    splits = dict.fromkeys(SPLITS, 0)
    with written_whole(out) as store, written_whole(out.with_name("cuts.csv")) as table:
        galaxies = kept_galaxies(settings, units, tallies, seed)
        while block := list(islice(galaxies, BLOCK)):
            for galaxy in block:
                splits[galaxy["split"]] += 1
            _append(store, block)
        check_selection(settings, tallies, splits)
        cuts = [row for tally in tallies for row in tally.rows()]
        read = sorted({*paths, *tables_read(settings.inputs)})
        record = provenance("galaxies", {"galaxies": settings}, read, seed, cuts=cuts, splits=splits)
        zarr.open_group(store, mode="r+").attrs[KEY] = record
        with table.open("w", newline="") as stream:
            csv.writer(stream).writerows([("input", "cut", "removed", "left"), *cuts])
    shutil.rmtree(folder)


def make_all_parts(units: list[Unit], folder: Path, workers: int) -> None:
    """Make the parts in `folder` those of the units, each once, with a bar of the image files done."""
    remove_others(units, folder)
    different = list({unit.path: unit for unit in units}.values())
    for _ in track(make_parts(different, workers), description="galaxies: image files", total=len(different)):
        pass


def kept_galaxies(settings: Galaxies, units: list[list[Unit]], tallies: list[Tally], seed: int) -> Iterator[Entry]:
    """Every galaxy of the parts, input after input; the tallies are filled on the way."""
    for source, of_input, tally in zip(settings.inputs, units, tallies, strict=True):
        for unit in of_input:
            part = read_part(unit.path) or cut(unit.images, settings, seed)
            tally.add(int(part.read), part.removed)
            for i, name in enumerate(part.name.tolist()):
                split = random_split(settings, seed, name) if source.split == "random" else source.split
                values = {key: getattr(part, key)[i] for key in ("image", "noise_sd", "pixel_scale", "psf_fwhm")}
                yield {**values, "name": name, "input": tally.origin, "split": split}


def random_split(settings: Galaxies, seed: int, name: str) -> str:
    """The side of a galaxy, from the seed and its name alone: whatever else is read, it stays where it is."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < settings.test_fraction:
        return "test"
    return "validation" if draw < settings.test_fraction + settings.validation_fraction else "train"


def input_path(source: GalaxyInput, survey: Path) -> Path:
    """The catalogue or archive of an input. Raises InputError where the survey is asked for and is not there."""
    if isinstance(source, SurveyInput):
        if not (survey / CATALOGUE).is_file():
            raise InputError(f"{survey / CATALOGUE}: no survey here; run the stage survey first")
        return survey / CATALOGUE
    return expand_path(source.catalogue if isinstance(source, RealGalaxyCatalogInput) else source.archive)


def tables_read(inputs: Iterable[GalaxyInput]) -> list[Path]:
    """Files from outside that the inputs name, or that lie beside those and are read too."""
    paths = [expand_path(path) for source in inputs for path in (*source.files, *source.read_where_there)]
    return [path for path in paths if path.is_file()]


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


def image_sets(source: GalaxyInput, path: Path) -> list[Images]:
    """What an input is read from, one after the other: the image files of a catalogue, or the one archive."""
    if isinstance(source, SurveyInput):
        return [*image_files(path)]
    if isinstance(source, RealGalaxyCatalogInput):
        fits, selection = (expand_path(name) if name else None for name in (source.fits, source.selection))
        excluded = None
        if source.exclusion != "none":
            excluded = excluded_rows(path, source.exclusion, source.sample, fits, selection)
        return [*image_files(path, fits, excluded)]
    return [StampArchive(path, source.key, source.pixel_scale, source.noise_sd, source.exclude)]


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


def _append(store: Path, block: list[Entry]) -> None:
    """Write a block of galaxies, or append it where there are some already."""
    columns = {name: ("galaxy", np.array([one[name] for one in block], dtype)) for name, dtype in COLUMNS.items()}
    images = np.array([galaxy["image"] for galaxy in block], dtype=np.float32)
    data = xr.Dataset({"image": (("galaxy", "y", "x"), images), **columns})
    if store.exists():
        data.to_zarr(store, zarr_format=3, consolidated=False, append_dim="galaxy")
    else:
        encoding = {name: {"chunks": (BLOCK, *data[name].shape[1:])} for name in data.data_vars}
        data.to_zarr(store, zarr_format=3, consolidated=False, encoding=encoding)
