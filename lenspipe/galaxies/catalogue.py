"""Readers of galaxy catalogues: one generator a layout, each yielding one GalaxyStamp at a time.

Columns are found by name, since integer and string widths differ between catalogues. GAL_HDU is the absolute HDU
index: 0 is the primary HDU, which then holds an image.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from lenspipe.errors import InputError

REQUIRED = ("IDENT", "GAL_FILENAME", "GAL_HDU", "PIXEL_SCALE", "NOISE_VARIANCE")
SERSIC = ("IDENT", "sersicfit", "fit_status")

Table = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SersicFit:
    """The Sersic fit of a catalogue: fit_status[4] (1 to 4 good, 0 or 5 failed), half-light radius along the major
    axis [0.03" px], index and axis ratio."""

    status: int
    hlr: float
    n: float
    q: float


NO_FIT = SersicFit(status=0, hlr=0.0, n=0.0, q=0.0)


@dataclass(frozen=True)
class GalaxyStamp:
    """One galaxy as its catalogue gives it."""

    name: str  # the same for every band and version of one galaxy of one catalogue
    image: NDArray[np.float64]  # [y, x], linear flux
    pixel_scale: float  # ["]
    noise_sd: float  # pixel noise [image units]; 0: not known
    sersic: SersicFit | None = None  # None: the catalogue has no Sersic fits
    zero_outside: bool = False  # pixels outside the galaxy are exactly 0
    excluded: bool = False  # left out by hand
    below_level: bool = False  # removed by the exclusion level


def read_real_galaxy_catalog(
    catalogue: Path, sersic_table: Path | None = None, excluded_rows: NDArray[np.bool_] | None = None
) -> Iterator[GalaxyStamp]:
    """Galaxies of a RealGalaxyCatalog, by image file and HDU; one image file is open at a time.

    `sersic_table` is the `_fits` table; None: `<catalogue>_fits.fits`, where it exists and holds Sersic fits.
    A galaxy that has no row there counts as a failed fit. `excluded_rows` are below an exclusion level. Raises
    InputError for files and columns that are missing, HDUs that are not there and files cut short.
    """
    table = read_table(catalogue)
    require(table, REQUIRED, catalogue)
    sersic = _sersic_fits(catalogue, sersic_table)
    for row, image in _images(catalogue, table):
        ident = int(table["IDENT"][row])
        yield GalaxyStamp(
            name=str(ident),
            image=image,
            pixel_scale=float(table["PIXEL_SCALE"][row]),
            noise_sd=float(np.sqrt(max(0.0, table["NOISE_VARIANCE"][row]))),
            sersic=None if sersic is None else sersic.get(ident, NO_FIT),
            below_level=excluded_rows is not None and bool(excluded_rows[row]),
        )


def read_stamp_archive(
    archive: Path, key: str, pixel_scale: float, noise_sd: float = 0.0, exclude: tuple[int, ...] = ()
) -> Iterator[GalaxyStamp]:
    """Galaxies of the array `key` [galaxy, y, x] of an npz archive; the one array is held in memory.

    They are named by archive and row, so that the bands of one galaxy share a name.
    Raises InputError where the archive, the key or an excluded row is not there.
    """
    images = _archive_array(archive, key)
    if beyond := [row for row in exclude if not 0 <= row < len(images)]:
        raise InputError(
            f"{archive}: exclude names rows {beyond}, but {key} has {len(images)} galaxies; correct exclude"
        )
    for row, image in enumerate(images):
        name, pixels = f"{archive.stem}_{row}", image.astype(np.float64)
        yield GalaxyStamp(name, pixels, pixel_scale, noise_sd, zero_outside=True, excluded=row in exclude)


def read_table(path: Path) -> Table:
    """The columns of the first table of a FITS file, by name. Raises InputError where it is missing or broken."""
    if not path.is_file():
        raise InputError(f"{path}: no such catalogue; expected a FITS table, so correct the path or fetch the file")
    with _opened(path) as hdus:
        tables = [number for number, hdu in enumerate(hdus) if isinstance(hdu, fits.BinTableHDU)]
        if not tables:
            raise InputError(f"{path}: expected a catalogue table, found {len(hdus)} HDU(s) and none a table")
        _check_complete(hdus, tables[0], path)
        data = hdus[tables[0]].data
        return {name: np.array(data[name]) for name in data.names}


def require(table: Table, columns: tuple[str, ...], path: Path) -> None:
    """Raise InputError naming the columns that a table lacks."""
    if missing := [name for name in columns if name not in table]:
        raise InputError(
            f"{path}: column(s) {', '.join(missing)} missing; found {', '.join(table)}; "
            "give a table in the RealGalaxyCatalog layout"
        )


def _sersic_fits(catalogue: Path, given: Path | None) -> dict[int, SersicFit] | None:
    """Sersic fits by IDENT; None where no table is given and the one beside the catalogue has none."""
    path = given or catalogue.with_name(f"{catalogue.stem}_fits.fits")
    if given is None and not path.is_file():
        return None
    table = read_table(path)
    if given is None and not all(name in table for name in SERSIC):
        return None
    require(table, SERSIC, path)
    columns = zip(table["IDENT"], table["fit_status"], table["sersicfit"], strict=True)
    return {int(i): SersicFit(int(status[4]), *(float(v) for v in fit[1:4])) for i, status, fit in columns}


def _images(catalogue: Path, table: Table) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Row number and image of every galaxy, in the order of image files and HDUs."""
    files = [str(name).strip() for name in table["GAL_FILENAME"]]
    rows = sorted(range(len(files)), key=lambda row: (files[row], table["GAL_HDU"][row]))
    for file, members in groupby(rows, key=lambda row: files[row]):
        path, members_list = catalogue.parent / file, list(members)
        if not path.is_file():
            raise InputError(
                f"{path}: no such image file; row {members_list[0]} (IDENT {table['IDENT'][members_list[0]]}) of "
                f"{catalogue} names it; put the image files beside the catalogue"
            )
        with _opened(path) as hdus:
            for row in members_list:
                yield row, _pixels(hdus, int(table["GAL_HDU"][row]), path, f"row {row} of {catalogue}")


def _pixels(hdus: fits.HDUList, number: int, path: Path, origin: str) -> NDArray[np.float64]:
    """A copy of the image in HDU `number`, so that the file's memory map can be let go."""
    try:
        hdu = hdus[number]
    except IndexError:
        raise InputError(
            f"{path}: {origin} has GAL_HDU {number}, but the file has {len(hdus)} HDUs (0 to {len(hdus) - 1}); "
            "the file is cut short or belongs to another catalogue"
        ) from None
    _check_complete(hdus, number, path)
    image = hdu.data
    if image is None or not isinstance(hdu, fits.ImageHDU | fits.PrimaryHDU) or image.ndim != 2:
        raise InputError(f"{path}: {origin} has GAL_HDU {number}, which holds no image [y, x]; correct the catalogue")
    pixels = image.astype(np.float64)
    del image, hdu.data
    return np.asarray(pixels)


@contextmanager
def _opened(path: Path) -> Iterator[fits.HDUList]:
    """A FITS file, memory-mapped; astropy's warning of a cut file is left to `_check_complete`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*truncated.*|.*validating header.*")
        try:
            hdus = fits.open(path, memmap=True)
        except OSError as error:
            raise InputError(f"{path}: not a FITS file, or cut short ({error}); fetch it again") from None
        with hdus:
            yield hdus


def _check_complete(hdus: fits.HDUList, number: int, path: Path) -> None:
    found, end = path.stat().st_size, hdus[number].fileinfo()["datLoc"] + hdus[number].size
    if end > found:
        raise InputError(f"{path}: cut short: HDU {number} ends at byte {end}, the file at {found}; fetch it again")


def _archive_array(archive: Path, key: str) -> NDArray[Any]:
    if not archive.is_file():
        raise InputError(f"{archive}: no such stamp archive; correct galaxies.inputs.archive or fetch the file")
    try:
        with archive.open("rb") as stream, np.load(stream) as arrays:
            if key not in arrays:
                raise InputError(f"{archive}: no array {key!r}; found {', '.join(arrays.files)}; correct the key")
            images = arrays[key]
    except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive}: not an npz archive, or cut short ({error}); fetch it again") from None
    if images.ndim != 3:
        raise InputError(f"{archive}: {key} has shape {images.shape}; expected stamps [galaxy, y, x]")
    return np.asarray(images)
