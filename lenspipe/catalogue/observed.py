"""Reading one lens from FITS files, with every reason why it may be unusable."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.units import Unit, UnitBase, UnrecognizedUnit
from astropy.wcs import WCS, FITSFixedWarning
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from lenspipe.catalogue.point_images import point_images
from lenspipe.catalogue.preparation import Prepared, Wishes, prepare
from lenspipe.config import Preparation
from lenspipe.errors import InputError
from lenspipe.image.noise import noise_of_data, signal_to_noise
from lenspipe.image.psf import of_pixels

NOISE_MASKED = 1e6  # a noise this many times its median marks a masked pixel
SCALE_KEYWORDS = ("PIXSCALE", "PIXSCAL", "SECPIX")  # ["], where the header has no WCS


@dataclass(frozen=True)
class LensFiles:
    """What is given of one lens.

    noise: map of 1 sigma or, without one, background_rms [image units], exposure_time [s] and gain [electrons per image
    unit and second]; mask_bad: value, 0 or 1, of the mask's bad pixels; pixel_scale ["]: from the image's header where
    it is none; flux_unit: image units for one unit of `source_flux`, from the image where it is none.
    """

    image: Path
    psf: Path
    noise: Path | None = None
    mask: Path | None = None
    mask_bad: int = 1
    pixel_scale: float | None = None
    background_rms: float | None = None
    exposure_time: float | None = None
    gain: float = 1.0
    flux_unit: float | None = None
    wishes: Wishes = field(default_factory=Wishes)


@dataclass(frozen=True)
class LensImage:
    """One usable lens: image, noise [ny, nx], usable [ny, nx] bool, psf [ky, kx] of sum 1.

    north: direction of North in the image, counter-clockwise from +x [rad], and parity: +1 where East is a quarter turn
    counter-clockwise from it, as on the sky, -1 where it is clockwise; not numbers where the header has no WCS.
    image_unit: what the header says the unit of the image is (BUNIT); empty where it does not.
    prepared: what was found when it was made ready, where it was; image, noise and usable are then the cut-out.
    notes: what was changed on the way, or looks wrong.
    """

    image: NDArray[np.float64]
    noise: NDArray[np.float64]
    usable: NDArray[np.bool_]
    psf: NDArray[np.float64]
    pixel_scale: float
    flux_unit: float
    light_unit: float
    signal_to_noise: float
    north: float = np.nan
    parity: float = np.nan
    image_unit: str = ""
    prepared: Prepared | None = None
    notes: tuple[str, ...] = ()

    def in_words(self) -> str:
        """What it is, in one line."""
        (ny, nx), (ky, kx) = self.image.shape, self.psf.shape
        words = [f"{nx} x {ny} px of {self.pixel_scale:.4g} arcsec", f"PSF {kx} x {ky} px"]
        words.append(f"{self.usable.sum()} px to fit, S/N {self.signal_to_noise:.0f}")
        if (found := self.prepared) is not None:
            words.append(f"deflector at column {found.center_column:.1f}, row {found.center_row:.1f}")
            arcs = f"arcs at {found.arc_radius:.2f} arcsec, S/N {found.first_arc_snr:.0f}"
            words.append(arcs if found.arcs.any() else "no arcs seen")
            hit = f" and {found.cosmic_rays} px of cosmic rays" if found.cosmic_rays else ""
            words.append(f"{found.companions} other objects{hit} masked")
        return ", ".join([*words, *self.notes])


def read_lens(files: LensFiles, preparation: Preparation | None = None, psf_supersampling: int = 1) -> LensImage:
    """Read and check one lens, and make it ready where `preparation` says how.

    psf_supersampling: values of the PSF per pixel side. A pixel without a finite image or noise must be masked. Raises
    InputError naming the file, what was found and what was expected.
    """
    (image, header), psf = _first_image(files.image), read_image(files.psf)
    usable, image_unit = _mask(files, image), _image_unit(header)
    _refuse(files.image, "not a number", ~np.isfinite(image) & usable)
    noise, origin, doubts = _noise(files, np.where(usable, image, 0.0), usable, image_unit)
    _refuse(origin, "not a number", np.isnan(noise) & usable)
    _refuse(origin, "zero or negative noise", (noise <= 0) & usable)
    if not usable.any():
        raise InputError(f"{files.mask}: every pixel is masked")
    usable &= noise < NOISE_MASKED * np.median(noise[usable])
    if not usable.any():
        raise InputError(f"{origin}: no pixel has a finite noise")
    image, noise = np.where(usable, image, 0.0), np.where(usable, noise, 1.0)
    psf, notes = _kernel(files.psf, psf, [psf_supersampling * side for side in image.shape])
    of_its_pixels = of_pixels(psf, psf_supersampling)
    scale, north, parity = _orientation(files, header)
    lens = LensImage(image, noise, usable, psf, scale, 1.0, 1.0, 0.0, north, parity, image_unit, notes=notes + doubts)
    if preparation is not None:
        lens = _made_ready(lens, files, preparation, of_its_pixels)
    _refuse_point_images(files.image, lens, of_its_pixels)
    unit = files.flux_unit or (lens.prepared.flux_unit if lens.prepared else float(gaussian_filter(image, 1.0).max()))
    if not unit > 0:
        raise InputError(f"{files.image}: no light above zero in the usable pixels")
    light_unit = lens.prepared.light_unit if lens.prepared else unit
    found = signal_to_noise(lens.image, lens.noise, lens.usable)
    return replace(lens, flux_unit=unit, light_unit=light_unit, signal_to_noise=found)


def _made_ready(lens: LensImage, files: LensFiles, preparation: Preparation, psf: NDArray[np.float64]) -> LensImage:
    try:
        found = prepare(lens.image, lens.noise, lens.usable, psf, lens.pixel_scale, preparation, files.wishes)
    except InputError as error:
        raise InputError(f"{files.image}: {error}") from None
    return replace(lens, image=found.image, noise=found.noise, usable=found.usable, prepared=found)


def _mask(files: LensFiles, image: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Pixels that are not masked [ny, nx]."""
    if files.mask is None:
        return np.ones(image.shape, dtype=bool)
    mask = read_image(files.mask)
    if mask.shape != image.shape:
        raise InputError(f"{files.mask}: the mask is {_size(mask)} px, the image {files.image} is {_size(image)}")
    if files.mask_bad == 1:
        return mask == 0
    if strange := sorted(set(np.unique(mask[mask != 0])[:5].tolist()) - {1.0}):
        raise InputError(f"{files.mask}: with mask_bad = 0 a mask has 0 and 1 alone, found {strange}")
    return mask == 1


def _noise(
    files: LensFiles, image: NDArray[np.float64], usable: NDArray[np.bool_], image_unit: str
) -> tuple[NDArray[np.float64], Path, tuple[str, ...]]:
    """The noise map [ny, nx], the file to blame for it and what looks wrong with its unit."""
    if files.noise is not None:
        noise, header = _first_image(files.noise)
        if noise.shape != image.shape:
            raise InputError(
                f"{files.noise}: the noise map is {_size(noise)} px, the image {files.image} {_size(image)}"
            )
        unit = _image_unit(header)
        differ = unit and image_unit and _unit(unit) != _unit(image_unit)
        return noise, files.noise, (f"noise map in {unit}, image in {image_unit}",) if differ else ()
    if files.background_rms is None or files.exposure_time is None:
        raise InputError(
            f"{files.image}: its noise is not known; give a noise map in the column noise, or background_rms and "
            "exposure_time (and gain, where an image unit is not an electron per second)"
        )
    noise = noise_of_data(image, usable, files.background_rms, files.gain * files.exposure_time)
    return noise, files.image, ()


def _image_unit(header: fits.Header) -> str:
    return str(header.get("BUNIT", "")).strip()


def _unit(text: str) -> UnitBase | str:
    """A unit however it is written: ELECTRONS/S is electron s-1."""
    small = text.casefold()
    for written in (text, small.replace("electrons", "electron").replace("counts", "count")):
        if not isinstance(found := Unit(written, parse_strict="silent"), UnrecognizedUnit):
            return found
    return small


def _kernel(path: Path, psf: NDArray[np.float64], shape: Sequence[int]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The PSF with a sum of 1, no larger than the image, and what was done to it."""
    if not np.isfinite(psf).all() or psf.sum() <= 0:
        raise InputError(f"{path}: the PSF must be finite with a sum above zero, found a sum of {psf.sum():g}")
    notes: tuple[str, ...] = ()
    sides = [min(k, n - (n - k) % 2) for k, n in zip(psf.shape, shape, strict=True)]  # even or odd as before
    if tuple(sides) != psf.shape:
        rows, columns = (slice((k - side) // 2, (k + side) // 2) for k, side in zip(psf.shape, sides, strict=True))
        kept = psf[rows, columns]
        share = kept.sum() / psf.sum()
        notes = (f"PSF of {_size(psf)} px cropped to {_size(kept)}, which has {share:.4f} of its sum",)
        psf = kept
    return psf / psf.sum(), notes


def _orientation(files: LensFiles, header: fits.Header) -> tuple[float, float, float]:
    """Pixel scale ["], from the table or the header; direction of North [rad] and parity, from the header."""
    north = parity = scale = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        wcs = WCS(header).celestial if "CTYPE1" in header else None
    if wcs is not None and wcs.naxis == 2:
        scales = proj_plane_pixel_scales(wcs) * 3600
        if np.ptp(scales) > 0.01 * scales.mean():
            raise InputError(
                f"{files.image}: pixels of {scales[0]:.4g} x {scales[1]:.4g} arcsec; only square ones can be fitted"
            )
        scale = float(scales.mean())
        east, up = np.linalg.inv(wcs.pixel_scale_matrix).T  # pixel steps of a degree to the East and to the North
        north = float(np.arctan2(up[1], up[0]))
        parity = float(np.sign(up[0] * east[1] - up[1] * east[0]))
    else:
        scale = next((float(header[key]) for key in SCALE_KEYWORDS if key in header), np.nan)
    scale = files.pixel_scale if files.pixel_scale is not None else scale
    if not scale > 0:
        raise InputError(
            f"{files.image}: the header has no WCS; give the pixel scale [arcsec] in the column pixel_scale"
        )
    return scale, north, parity


def _refuse_point_images(path: Path, lens: LensImage, psf: NDArray[np.float64]) -> None:
    """A galaxy's light may have one sharp peak; several are a lensed quasar, stars or a PSF that is too wide."""
    points = point_images(lens.image, lens.noise, lens.usable, psf)
    if len(points) > 1:
        column, row = lens.prepared.corner if lens.prepared else (0, 0)
        places = ", ".join(f"({column + x}, {row + y})" for x, y in points)
        raise InputError(
            f"{path}: {len(points)} point images at pixels (x, y) = {places}, as a lensed quasar has; only lensed "
            "galaxies can be fitted: mask stars, or leave this lens out"
        )


def read_image(path: Path) -> NDArray[np.float64]:
    """The first two-dimensional image of a FITS file. Raises InputError where there is none or the file is broken."""
    return _first_image(path)[0]


def _first_image(path: Path) -> tuple[NDArray[np.float64], fits.Header]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with fits.open(path, memmap=False) as hdus:
            for hdu in hdus:
                if isinstance(hdu, fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU) and hdu.header["NAXIS"] == 2:
                    return np.asarray(hdu.data, dtype=np.float64), hdu.header
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
