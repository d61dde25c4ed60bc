"""Tables and images in FITS files, with errors that say which file is broken and how."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from lenspipe.errors import InputError

Table = dict[str, NDArray[Any]]
COMPRESSED = (".gz", ".bz2", ".xz", ".Z")  # files whose size says nothing of that of what is in them


def read_table(path: Path) -> Table:
    """The columns of the first table of a FITS file, by name. Raises InputError where it is missing or broken."""
    if not path.is_file():
        raise InputError(f"{path}: no such catalogue; expected a FITS table, so correct the path or fetch the file")
    with opened(path) as hdus:
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


def read_pixels(hdus: fits.HDUList, column: str, number: int, path: Path, origin: str) -> NDArray[np.float64]:
    """The image [y, x] in HDU `number` of a file, which `column` of the row `origin` names.

    A copy, so that the file's memory map can be let go. Raises InputError where the HDU is not there, holds no image or
    is cut short.
    """
    if not 0 <= number < len(hdus):
        raise InputError(
            f"{path}: {origin} has {column} {number}, but the file has {len(hdus)} HDUs (0 to {len(hdus) - 1}); "
            "the file is cut short or belongs to another catalogue"
        )
    hdu = hdus[number]
    _check_complete(hdus, number, path)
    image = hdu.data
    if image is None or not isinstance(hdu, fits.ImageHDU | fits.PrimaryHDU) or image.ndim != 2:
        raise InputError(f"{path}: {origin} has {column} {number}, which holds no image [y, x]; correct the catalogue")
    pixels = image.astype(np.float64)
    del image, hdu.data
    return np.asarray(pixels)


@contextmanager
def opened(path: Path) -> Iterator[fits.HDUList]:
    """A FITS file, memory-mapped where it can be. Raises InputError where it is none or what is read breaks off.

    astropy's warning of a cut file is left to the readers, which check its length.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*truncated.*|.*validating header.*")
        try:
            with fits.open(path) as hdus:
                yield hdus
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a FITS file, or cut short ({error}); fetch it again") from None


def require_width(table: Table, widths: dict[str, int], path: Path) -> None:
    """Raise InputError for the first column [row, n] that has fewer than so many numbers a row."""
    for name, width in widths.items():
        found = table[name].shape
        if len(found) != 2 or found[1] < width:
            raise InputError(
                f"{path}: column {name} has shape {found}; expected rows of {width} or more numbers, as in the "
                "RealGalaxyCatalog layout"
            )


def _check_complete(hdus: fits.HDUList, number: int, path: Path) -> None:
    if path.suffix in COMPRESSED:
        return
    found, end = path.stat().st_size, hdus[number].fileinfo()["datLoc"] + hdus[number].size
    if end > found:
        raise InputError(f"{path}: cut short: HDU {number} ends at byte {end}, the file at {found}; fetch it again")
