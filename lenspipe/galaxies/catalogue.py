"""Galaxies of a RealGalaxyCatalog: its tables are read at once, its image files one at a time.

Columns are found by name, since integer and string widths differ between catalogues. GAL_HDU is the absolute HDU
index: 0 is the primary HDU, which then holds an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lenspipe.config.galaxies import table_beside
from lenspipe.errors import InputError
from lenspipe.galaxies.fits_files import Table, opened, read_pixels, read_table, require, require_width

REQUIRED = ("IDENT", "GAL_FILENAME", "GAL_HDU", "PIXEL_SCALE", "NOISE_VARIANCE")
SERSIC = ("IDENT", "sersicfit", "fit_status")
PSF = ("PSF_FILENAME", "PSF_HDU")


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
class PsfImage:
    """Where the PSF of a galaxy is, its pixel scale ["], and the row that says so."""

    path: Path
    hdu: int
    pixel_scale: float
    origin: str


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
    psf: PsfImage | None = None  # None: the catalogue names none


@dataclass(frozen=True)
class Row:
    """What the tables say of one galaxy."""

    number: int
    ident: int
    hdu: int
    pixel_scale: float
    noise_sd: float
    sersic: SersicFit | None
    below_level: bool
    psf: PsfImage | None


@dataclass(frozen=True)
class ImageFile:
    """One image file of a catalogue, and its rows by HDU."""

    catalogue: Path
    path: Path
    rows: tuple[Row, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The image file, and the files of PSFs, which need not be there."""
        return (self.path, *sorted({row.psf.path for row in self.rows if row.psf}))

    def stamps(self) -> Iterator[GalaxyStamp]:
        """Its galaxies, by HDU. Raises InputError for HDUs that are not there and a file cut short."""
        with opened(self.path) as hdus:
            for row in self.rows:
                image = read_pixels(hdus, "GAL_HDU", row.hdu, self.path, f"row {row.number} of {self.catalogue}")
                yield GalaxyStamp(
                    name=str(row.ident),
                    image=image,
                    pixel_scale=row.pixel_scale,
                    noise_sd=row.noise_sd,
                    sersic=row.sersic,
                    below_level=row.below_level,
                    psf=row.psf,
                )


def image_files(
    catalogue: Path, sersic_table: Path | None = None, excluded_rows: NDArray[np.bool_] | None = None
) -> list[ImageFile]:
    """The image files of a RealGalaxyCatalog, by name.

    `sersic_table` is the `_fits` table; None: `<catalogue>_fits.fits`, where it exists and holds Sersic fits.
    A galaxy that has no row there counts as a failed fit. `excluded_rows` are below an exclusion level. Raises
    InputError for files and columns that are missing.
    """
    table = read_table(catalogue)
    require(table, REQUIRED, catalogue)
    fits = _sersic_fits(catalogue, sersic_table)
    excluded = np.zeros(len(table["IDENT"]), dtype=bool) if excluded_rows is None else excluded_rows
    names = [str(name).strip() for name in table["GAL_FILENAME"]]
    order = sorted(range(len(names)), key=lambda row: (names[row], table["GAL_HDU"][row]))
    return [
        _image_file(catalogue, name, tuple(_row(catalogue, table, number, fits, excluded) for number in numbers))
        for name, numbers in groupby(order, key=lambda row: names[row])
    ]


def _image_file(catalogue: Path, name: str, rows: tuple[Row, ...]) -> ImageFile:
    path = catalogue.parent / name
    if not path.is_file():
        raise InputError(
            f"{path}: no such image file; row {rows[0].number} (IDENT {rows[0].ident}) of "
            f"{catalogue} names it; put the image files beside the catalogue"
        )
    return ImageFile(catalogue, path, rows)


def _row(
    catalogue: Path, table: Table, number: int, fits: dict[int, SersicFit] | None, excluded: NDArray[np.bool_]
) -> Row:
    ident = int(table["IDENT"][number])
    return Row(
        number=number,
        ident=ident,
        hdu=int(table["GAL_HDU"][number]),
        pixel_scale=float(table["PIXEL_SCALE"][number]),
        noise_sd=float(np.sqrt(max(0.0, table["NOISE_VARIANCE"][number]))),
        sersic=None if fits is None else fits.get(ident, NO_FIT),
        below_level=bool(excluded[number]),
        psf=_psf(catalogue, table, number),
    )


def _psf(catalogue: Path, table: Table, number: int) -> PsfImage | None:
    if not all(name in table for name in PSF):
        return None
    name, hdu = (table[column][number] for column in PSF)
    path, scale = catalogue.parent / str(name).strip(), float(table["PIXEL_SCALE"][number])
    return PsfImage(path, int(hdu), scale, f"row {number} of {catalogue}")


def _sersic_fits(catalogue: Path, given: Path | None) -> dict[int, SersicFit] | None:
    """Sersic fits by IDENT; None where no table is given and the one beside the catalogue has none."""
    path = given or table_beside(catalogue, "fits")
    if given is None and not path.is_file():
        return None
    table = read_table(path)
    if given is None and not all(name in table for name in SERSIC):
        return None
    require(table, SERSIC, path)
    require_width(table, {"fit_status": 5, "sersicfit": 4}, path)
    columns = zip(table["IDENT"], table["fit_status"], table["sersicfit"], strict=True)
    return {int(i): SersicFit(int(status[4]), *(float(v) for v in fit[1:4])) for i, status, fit in columns}
