"""Images of FITS files, whose extensions may be named in brackets after the path, as CFITSIO has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from lenspipe.errors import InputError

EXTENSION = re.compile(r"(.+)\[\s*(\w[^][]*?)\s*\]")  # a file, and in brackets the extension that is meant


def read_image(path: Path) -> NDArray[np.float64]:
    """The first two-dimensional image of a FITS file, or that of the extension named in brackets after it.

    An extension is named as CFITSIO does: `[SCI]`, `[SCI,2]` or, by number, `[1]`; the primary image is `[0]`. Raises
    InputError where there is none or the file is broken.
    """
    return image_and_header(path)[0]


def file_of(path: Path) -> Path:
    """The file that a path names which may have an extension in brackets after it."""
    return _in_file(path)[0]


def _in_file(path: Path) -> tuple[Path, str]:
    """A file, and the extension that is named; empty where none is, as in a file whose own name ends in brackets."""
    named = EXTENSION.fullmatch(str(path))
    return (Path(named[1]), named[2]) if named and not path.is_file() else (path, "")


def image_and_header(path: Path) -> tuple[NDArray[np.float64], fits.Header]:
    """What `read_image` reads, and the header of its HDU. Raises what that does."""
    file, extension = _in_file(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    shapes = []
    try:
        with fits.open(file, memmap=False) as hdus:
            for hdu in _extension(path, hdus, extension) if extension else hdus:
                if isinstance(hdu, fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU) and hdu.data is not None:
                    if (flat := np.squeeze(hdu.data)).ndim == 2:
                        return np.asarray(flat, dtype=np.float64), hdu.header
                    shapes.append(" x ".join(map(str, hdu.data.shape[::-1])))
    except InputError:
        raise
    except Exception as error:  # of astropy's and of the decompression's, of a dozen kinds
        raise InputError(f"{file}: not a readable FITS file ({error}); it may be truncated, fetch it again") from None
    found = f", found {', '.join(shapes)}" if shapes else ""
    raise InputError(f"{path}: no two-dimensional image {'there' if extension else 'in this FITS file'}{found}")


def _extension(path: Path, hdus: fits.HDUList, extension: str) -> list[Any]:
    """The one that is named, in a list. Raises InputError where there is none of that name or number."""
    name, _, version = (part.strip() for part in extension.partition(","))
    try:
        return [hdus[int(name) if name.isdigit() else (name, int(version)) if version else name]]
    except (KeyError, IndexError, ValueError):
        there = ", ".join(f"[{number}] {hdu.name}".rstrip() for number, hdu in enumerate(hdus))
        raise InputError(f"{path}: no such extension; this file has {there}") from None
