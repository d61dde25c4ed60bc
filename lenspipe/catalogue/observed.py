"""Reading one lens from FITS files, with every reason why it may be unusable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from lenspipe.catalogue.point_images import point_images
from lenspipe.errors import InputError
from lenspipe.image.noise import signal_to_noise

NOISE_MASKED = 1e6  # a noise this many times its median marks a masked pixel


@dataclass(frozen=True)
class LensImage:
    """One usable lens: image, noise [ny, nx], usable [ny, nx] bool, psf [ky, kx] of sum 1."""

    image: NDArray[np.float64]
    noise: NDArray[np.float64]
    usable: NDArray[np.bool_]
    psf: NDArray[np.float64]
    flux_unit: float
    signal_to_noise: float


def read_lens(
    image_path: Path, noise_path: Path, psf_path: Path, mask_path: Path | None, flux_unit: float | None
) -> LensImage:
    """Read and check one lens. mask: 1 = bad pixel. A pixel without a finite image or noise must be masked.

    Raises InputError naming the file, what was found and what was expected.
    """
    image, noise, psf = read_image(image_path), read_image(noise_path), read_image(psf_path)
    if noise.shape != image.shape:
        raise InputError(f"{noise_path}: the noise map is {_size(noise)} px, the image {image_path} is {_size(image)}")
    usable = np.ones(image.shape, dtype=bool)
    if mask_path is not None:
        mask = read_image(mask_path)
        if mask.shape != image.shape:
            raise InputError(f"{mask_path}: the mask is {_size(mask)} px, the image {image_path} is {_size(image)}")
        usable = mask == 0
    _refuse(image_path, "not a number", ~np.isfinite(image) & usable)
    _refuse(noise_path, "not a number", np.isnan(noise) & usable)
    _refuse(noise_path, "zero or negative noise", (noise <= 0) & usable)
    if not usable.any():
        raise InputError(f"{mask_path}: every pixel is masked")
    usable &= noise < NOISE_MASKED * np.median(noise[usable])
    if not usable.any():
        raise InputError(f"{noise_path}: no pixel has a finite noise")
    if not np.isfinite(psf).all() or psf.sum() <= 0:
        raise InputError(f"{psf_path}: the PSF must be finite with a sum above zero, found a sum of {psf.sum():g}")
    _refuse_point_images(image_path, image, noise, usable, psf)
    image, noise = np.where(usable, image, 0.0), np.where(usable, noise, 1.0)
    unit = float(gaussian_filter(image, 1.0).max()) if flux_unit is None else flux_unit
    if not unit > 0:
        raise InputError(f"{image_path}: no light above zero in the usable pixels")
    return LensImage(image, noise, usable, psf / psf.sum(), unit, signal_to_noise(image, noise, usable))


def _refuse_point_images(
    path: Path,
    image: NDArray[np.float64],
    noise: NDArray[np.float64],
    usable: NDArray[np.bool_],
    psf: NDArray[np.float64],
) -> None:
    """A galaxy's light may have one sharp peak; several are a lensed quasar, stars or a PSF that is too wide."""
    points = point_images(image, noise, usable, psf)
    if len(points) > 1:
        places = ", ".join(f"({x}, {y})" for x, y in points)
        raise InputError(
            f"{path}: {len(points)} point images at pixels (x, y) = {places}, as a lensed quasar has; only lensed "
            "galaxies can be fitted: mask stars, or leave this lens out"
        )


def read_image(path: Path) -> NDArray[np.float64]:
    """The first two-dimensional image of a FITS file. Raises InputError where there is none or the file is broken."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with fits.open(path, memmap=False) as hdus:
            for hdu in hdus:
                if isinstance(hdu, fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU) and hdu.header["NAXIS"] == 2:
                    return np.asarray(hdu.data, dtype=np.float64)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a readable FITS file ({error}); it may be truncated, fetch it again") from None
    raise InputError(f"{path}: no two-dimensional image in this FITS file")


def _refuse(path: Path, what: str, bad: NDArray[np.bool_]) -> None:
    if bad.any():
        y, x = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: {bad.sum()} pixels with {what}, the first at x = {x}, y = {y}; mask them or mend the file"
        )


def _size(image: NDArray[np.float64]) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"
