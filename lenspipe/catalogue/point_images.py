"""Images of point sources, as a lensed quasar has: peaks that have the shape of the PSF."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, shift

BRIGHT = 25.0  # least signal-to-noise of a peak pixel that is looked at
PEAKS = 8  # brightest peaks that are looked at
UNLIKE = 0.04  # greatest rms residual of a point image over its height; 0.02 in quasars, from 0.08 up in galaxies


def point_images(
    image: NDArray[np.float64], noise: NDArray[np.float64], usable: NDArray[np.bool_], psf: NDArray[np.float64]
) -> list[tuple[int, int]]:
    """Pixels (x, y) of the peaks that a PSF on a sloping background fits, brightest first.

    The fit is linear least squares in a window of the PSF's core, at the best of sub-pixel shifts.
    """
    reach = max(2, round(1.25 * full_width(psf)))
    signal = np.divide(image, noise, out=np.zeros_like(image), where=usable)
    peaks = (signal == maximum_filter(signal, 2 * reach - 1)) & (signal > BRIGHT)
    y, x = np.nonzero(peaks)
    cores, found = shifted_cores(psf, reach), list[tuple[int, int]]()
    for row, column in sorted(zip(y.tolist(), x.tolist(), strict=True), key=lambda at: -image[at])[:PEAKS]:
        apart = all(max(abs(column - u), abs(row - v)) > reach for u, v in found)  # two pixels of a peak may be equal
        if apart and _is_point(image, usable, cores, row, column):
            found.append((column, row))
    return found


def full_width(psf: NDArray[np.float64]) -> float:
    """Diameter [px] of the circle with the area of the PSF above half its peak."""
    return float(2 * np.sqrt((psf > psf.max() / 2).sum() / np.pi))


def shifted_cores(psf: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The PSF's core [shift, 2 reach + 1, 2 reach + 1] of peak 1, at shifts of up to 0.6 px."""
    y, x = (n // 2 for n in psf.shape)
    padded = np.pad(psf, reach + 1)
    steps = np.linspace(-0.6, 0.6, 7)
    rows, columns = (slice(c + 1, c + 2 * reach + 2) for c in (y, x))
    cores = np.stack([shift(padded, (dy, dx), order=3)[rows, columns] for dy in steps for dx in steps])
    return cores / cores.max((1, 2), keepdims=True)


def misfit(window: NDArray[np.float64], good: NDArray[np.bool_], cores: NDArray[np.float64]) -> float:
    """Rms residual over the height of the best fit of a core with a sloping background; infinite where none fits."""
    reach = len(window) // 2
    v, u = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    plane = np.stack([np.ones_like(u), u, v]).reshape(3, -1)[:, good.ravel()]
    best = np.inf
    for core in cores:
        design = np.vstack([core.ravel()[good.ravel()], plane]).T
        solution, *_ = np.linalg.lstsq(design, window[good], rcond=None)
        height, level = solution[0], solution[1]
        if height > max(0.0, level):
            best = min(best, float(np.std(window[good] - design @ solution) / height))
    return best


def _is_point(
    image: NDArray[np.float64], usable: NDArray[np.bool_], cores: NDArray[np.float64], y: int, x: int
) -> bool:
    reach = cores.shape[1] // 2
    if not (reach <= y < image.shape[0] - reach and reach <= x < image.shape[1] - reach):
        return False
    at = np.s_[y - reach : y + reach + 1, x - reach : x + reach + 1]
    good = usable[at]
    return bool(good.sum() > good.size / 2 and misfit(image[at], good, cores) < UNLIKE)
