"""Widths of the PSFs that a catalogue gives its galaxies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label, map_coordinates

from lenspipe.galaxies.catalogue import PsfImage
from lenspipe.galaxies.fits_files import opened, read_pixels

FINE = 8  # points of the spline across a pixel
MARGIN = 3  # [px] around the pixels above a quarter of the peak


def psf_fwhm(psf: NDArray[np.float64]) -> float:
    """Full width at half maximum [px] of an image [y, x]: the diameter of a circle as large as the region about the
    peak that is above half of it.

    On a cubic spline through the pixels, so that neither the place of the peak between pixels nor the wings matter.
    NaN where the image has no finite, positive peak.
    """
    if not (np.isfinite(psf).all() and psf.max() > 0):
        return float("nan")
    y, x = (_fine_axis(psf, axis) for axis in (0, 1))
    fine = map_coordinates(psf, np.meshgrid(y, x, indexing="ij"), order=3, mode="nearest")
    regions, _ = label(fine > fine.max() / 2)
    area = (regions == regions.flat[fine.argmax()]).sum() / FINE**2
    return float(2 * np.sqrt(area / np.pi))


def psf_fwhms(psfs: Sequence[PsfImage | None]) -> NDArray[np.float64]:
    """`psf_fwhm` of each PSF ["]; NaN where there is none, or no such file; one file is open at a time.

    Raises InputError for files that are broken and HDUs that are not there.
    """
    widths = np.full(len(psfs), np.nan)
    found = [(i, psf) for i, psf in enumerate(psfs) if psf and psf.path.is_file()]
    for path, members in groupby(sorted(found, key=lambda at: (at[1].path, at[1].hdu)), key=lambda at: at[1].path):
        with opened(path) as hdus:
            for i, psf in members:
                image = read_pixels(hdus, "PSF_HDU", psf.hdu, path, psf.origin)
                widths[i] = psf.pixel_scale * psf_fwhm(image)
    return widths


def _fine_axis(psf: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Points along an axis about the peak, `FINE` to a pixel [px]."""
    bright = np.nonzero((psf > psf.max() / 4).any(axis=1 - axis))[0]
    first, last = max(bright[0] - MARGIN, 0), min(bright[-1] + MARGIN, psf.shape[axis] - 1)
    return np.arange(first * FINE, last * FINE + 1) / FINE
