"""Reading one lens from FITS files, with every reason why it may be unusable."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.units import Unit, UnitBase, UnrecognizedUnit
from astropy.wcs import WCS, FITSFixedWarning
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from lenspipe.catalogue.entry import Entry, LensFiles
from lenspipe.catalogue.fits_images import file_of, image_and_header, read_image
from lenspipe.catalogue.point_images import point_images
from lenspipe.catalogue.preparation import Prepared, prepare
from lenspipe.config import Preparation
from lenspipe.errors import InputError, in_one_line
from lenspipe.image.noise import noise_of_data, signal_to_noise
from lenspipe.image.psf import of_pixels

log = logging.getLogger("lenspipe")

NOISE_MASKED = 1e6  # a noise this many times its median marks a masked pixel
SCALE_KEYWORDS = ("PIXSCALE", "PIXSCAL", "SECPIX")  # ["], where the header has no WCS
LINEAR = ("CD1_1", "CD1_2", "CDELT1", "PC1_1")  # one of these is in the header where a WCS has a scale
DISTORTIONS = re.compile(r"(CPDIS|CPERR|CQDIS|CQERR|DP|DQ|D2IM|AXISCORR|[AB]P?_)")  # begin keywords of a WCS's
SCALES_DIFFER = 0.02  # share by which two pixel scales of one image are not the same
LEAST_SIDE = 16  # of an image [px]
FEWEST = 50  # pixels that can be fitted
OFF_CENTRE = 0.6  # how far the centre of a PSF may be off its middle pixel [px]: half of one where a side is even
BLUNT = 0.05  # mean of the outermost values of a PSF, of its greatest, above which it is told of
NO_NOISE = 1e-3  # a noise this many times its median is none
SUNK = 50.0  # how far below zero [noise] a pixel is no measurement
FEW = 0.01  # share of pixels that may be so, or exactly zero
SKY = 10.0  # level [noise of a pixel] of an image's outskirts above which it is told of; halos have 1 to 4
INFLATED = 3.0  # factor by which empty sky scatters more, or less, than the noise map says above which it is told of


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


def read_entry(entry: Entry, preparation: Preparation | None, psf_supersampling: int) -> LensImage:
    """The lens, checked and made ready; see `read_lens`. Raises InputError where it cannot be used, whatever it is."""
    if entry.problem:
        raise InputError(entry.problem)
    try:
        return read_lens(entry.files, preparation, psf_supersampling)
    except InputError:
        raise
    except Exception as error:  # one lens does not take the others with it
        log.warning("lens %s", entry.name, exc_info=True)
        raise InputError(
            f"{entry.files.image}: cannot be used for a reason not foreseen: {in_one_line(error)}"
        ) from error


def read_lens(files: LensFiles, preparation: Preparation | None = None, psf_supersampling: int = 1) -> LensImage:
    """Read and check one lens, and make it ready where `preparation` says how.

    psf_supersampling: values of the PSF per pixel side. A pixel without a finite image must be masked, or have a noise
    that is not finite. Raises InputError naming the file, what was found and what was expected.
    """
    image, header = image_and_header(files.image)
    if min(image.shape) < LEAST_SIDE:
        raise InputError(f"{files.image}: the image is {_size(image)} px; its sides must be at least {LEAST_SIDE}")
    usable, image_unit = _mask(files, image), _image_unit(header)
    finite = usable & np.isfinite(image)
    noise, origin, doubts = _noise(files, np.where(finite, image, 0.0), finite, image_unit)
    _refuse(origin, "not a number", np.isnan(noise) & usable)
    _refuse(origin, "zero or negative noise", (noise <= 0) & usable)
    if not usable.any():
        raise InputError(f"{files.mask}: every pixel is masked; if it has 0 where pixels are bad, set mask_bad to 0")
    median = _median_of_noise(image[finite], noise[finite])
    _refuse(origin, f"a noise below {NO_NOISE:g} times its median", (noise < NO_NOISE * median) & usable)
    usable &= noise < NOISE_MASKED * median
    if not usable.any():
        raise InputError(f"{origin}: no pixel has a finite noise")
    _refuse(files.image, "not a number", ~np.isfinite(image) & usable)
    image, noise = np.where(usable, image, 0.0), np.where(usable, noise, 1.0)
    usable, strange = _measured(image, noise, usable, origin)
    scale, north, parity, of_wcs = _orientation(files, header)
    psf, of_psf = _kernel(files.psf, [psf_supersampling * side for side in image.shape], scale / psf_supersampling)
    of_its_pixels = of_pixels(psf, psf_supersampling)
    notes = (*of_psf, *doubts, *strange, *of_wcs)
    lens = LensImage(image, noise, usable, psf, scale, 1.0, 1.0, 0.0, north, parity, image_unit, notes=notes)
    if preparation is not None:
        lens = _made_ready(lens, files, preparation, of_its_pixels)
    if lens.usable.sum() < FEWEST:
        raise InputError(
            f"{files.image}: only {lens.usable.sum()} pixels of {scale:.4g} arcsec are left to fit; see its mask, its "
            "pixel scale and, where they are given, center_column, center_row and fit_radius"
        )
    _refuse_point_images(files.image, lens, of_its_pixels)
    unit = files.flux_unit or (lens.prepared.flux_unit if lens.prepared else float(gaussian_filter(image, 1.0).max()))
    if not unit > 0:
        raise InputError(f"{files.image}: no light above zero in the usable pixels")
    light_unit = lens.prepared.light_unit if lens.prepared else unit
    found = signal_to_noise(lens.image, lens.noise, lens.usable)
    return replace(lens, flux_unit=unit, light_unit=light_unit, signal_to_noise=found)


def _median_of_noise(image: NDArray[np.float64], noise: NDArray[np.float64]) -> float:
    """The median of noise [n], without what masks pixels, however many those are; not finite where all are.

    Where most of it is huge beside the rest, it masks, if the rest suits the image [n]: a noise of next to nothing, at
    a few pixels or where there is no image, does not.
    """
    measured = np.isfinite(noise)
    if not measured.any():
        return np.inf
    median = np.median(noise[measured])
    low = noise < median
    lower = np.median(noise[low]) if low.any() else median
    suits = median > NOISE_MASKED * lower and 0 < np.median(np.abs(image[low]) / noise[low]) < 1 / NO_NOISE
    return float(lower if suits else median)


def _measured(
    image: NDArray[np.float64], noise: NDArray[np.float64], usable: NDArray[np.bool_], origin: Path
) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """The usable pixels without a few far below zero, and what was found of these and of exact zeros."""
    notes = []
    sunk, blank = usable & (image < -SUNK * noise), usable & (image == 0)
    if sunk.sum() > FEW * usable.sum():
        raise InputError(
            f"{origin}: {sunk.sum()} pixels of the image are more than {SUNK:g} times this noise below zero; is it a "
            "variance or a weight map, or the sky of the image taken off twice?"
        )
    if sunk.any():
        notes.append(f"{sunk.sum()} px more than {SUNK:g} times the noise below zero masked")
    if blank.sum() > FEW * usable.sum():
        notes.append(f"{blank.sum()} px are exactly 0; mask them if there is no image there")
    return usable & ~sunk, tuple(notes)


def _made_ready(lens: LensImage, files: LensFiles, preparation: Preparation, psf: NDArray[np.float64]) -> LensImage:
    try:
        found = prepare(lens.image, lens.noise, lens.usable, psf, lens.pixel_scale, preparation, files.wishes)
    except InputError as error:
        raise InputError(f"{files.image}: {error}") from None
    notes = list(lens.notes)
    if not 1 / INFLATED < found.noise_inflation < INFLATED:
        notes.append(f"empty sky scatters {found.noise_inflation:.3g} times as much as the noise says")
    sky = found.background / float(np.median(lens.noise[lens.usable]))
    if abs(sky) > SKY:
        notes.append(f"{found.background:.4g} of sky is left in the image, {sky:.3g} times the noise of a pixel")
    image, noise, usable = found.image, found.noise, found.usable
    return replace(lens, image=image, noise=noise, usable=usable, prepared=found, notes=tuple(notes))


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
        noise, header = image_and_header(files.noise)
        if noise.shape != image.shape:
            raise InputError(
                f"{files.noise}: the noise map is {_size(noise)} px, the image {files.image} {_size(image)}"
            )
        if file_of(files.noise) == file_of(files.image) and np.array_equal(noise[usable], image[usable]):
            raise InputError(
                f"{files.noise}: the noise map is the image itself; name another file, or its extension: lens.fits[ERR]"
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


def _kernel(path: Path, shape: Sequence[int], scale: float) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The PSF with a sum of 1, no larger than `shape`, the image, and what was done to it; scale: of its values ["]."""
    psf, header = image_and_header(path)
    if not np.isfinite(psf).all() or psf.sum() <= 0:
        raise InputError(f"{path}: the PSF must be finite with a sum above zero, found a sum of {psf.sum():g}")
    weight = np.square(psf)
    row, column = ((weight * place).sum() / weight.sum() for place in np.indices(psf.shape))
    middle = [side // 2 for side in psf.shape]
    if max(abs(row - middle[0]), abs(column - middle[1])) > OFF_CENTRE:
        raise InputError(
            f"{path}: the PSF of {_size(psf)} px has its centre at column {column:.1f}, row {row:.1f}, counted from 0; "
            f"it must be at column {middle[1]}, row {middle[0]}"
        )
    said = _scale_of(header)
    if abs(said - scale) > SCALES_DIFFER * scale:
        raise InputError(
            f"{path}: the header says {said:.4g} arcsec a pixel, the image {scale:.4g} for each value of the PSF; give "
            "one on the image's pixels, or set lens.psf_supersampling"
        )
    notes = []
    sides = [min(k, n - (n - k) % 2) for k, n in zip(psf.shape, shape, strict=True)]  # even or odd as before
    if tuple(sides) != psf.shape:
        rows, columns = (slice((k - side) // 2, (k + side) // 2) for k, side in zip(psf.shape, sides, strict=True))
        kept = psf[rows, columns]
        share = kept.sum() / psf.sum()
        notes.append(f"PSF of {_size(psf)} px cropped to {_size(kept)}, which has {share:.4f} of its sum")
        psf = kept
    border = np.concatenate([psf[0], psf[-1], psf[1:-1, 0], psf[1:-1, -1]]).mean() / psf.max()
    if border > BLUNT:
        notes.append(f"PSF with {border:.2g} of its peak at its border: it is cut too small, or is none")
    return psf / psf.sum(), tuple(notes)


def _scale_of(header: fits.Header) -> float:
    """The pixel scale that a header names ["]; not a number where there is none."""
    for key in SCALE_KEYWORDS:
        try:
            return float(header[key])
        except (KeyError, TypeError, ValueError):
            continue
    return np.nan


def _orientation(files: LensFiles, header: fits.Header) -> tuple[float, float, float, tuple[str, ...]]:
    """Pixel scale ["], from the table or the header; direction of North [rad] and parity, from the header; notes."""
    scale, north, parity, notes = _scale_of(header), np.nan, np.nan, []
    try:
        if "CTYPE1" in header and any(key in header for key in LINEAR):
            scale, north, parity = _on_the_sky(header)
    except InputError as error:
        raise InputError(f"{files.image}: {error}") from None
    except Exception as error:  # of astropy's, of a dozen kinds
        if files.pixel_scale is None and not scale > 0:
            raise InputError(
                f"{files.image}: its WCS cannot be read ({error}); give the pixel scale [arcsec] in the column "
                "pixel_scale"
            ) from None
        notes.append("its WCS cannot be read: North is not known")
    if files.pixel_scale is not None:
        if abs(scale - files.pixel_scale) > SCALES_DIFFER * files.pixel_scale:
            notes.append(f"pixels of {files.pixel_scale:.4g} arcsec by the table, {scale:.4g} by the header")
        scale = files.pixel_scale
    if not 0 < scale < np.inf:
        found = "has no WCS" if np.isnan(scale) else f"says {scale:g} arcsec a pixel"
        raise InputError(f"{files.image}: the header {found}; give the pixel scale [arcsec] in the column pixel_scale")
    return scale, north, parity, tuple(notes)


def _on_the_sky(header: fits.Header) -> tuple[float, float, float]:
    """Scale ["], direction of North [rad] and parity in the middle of an image, by its WCS without distortions."""
    plain = fits.Header([card for card in header.cards if not DISTORTIONS.match(card.keyword)])
    for axis in ("CTYPE1", "CTYPE2"):
        plain[axis] = str(plain[axis]).removesuffix("-SIP")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        wcs = WCS(plain).celestial
    x, y = ((int(header[f"NAXIS{axis}"]) - 1) / 2 for axis in (1, 2))
    middle, right, up = (wcs.pixel_to_world(x + dx, y + dy).icrs for dx, dy in ((0, 0), (1, 0), (0, 1)))
    scales = [middle.separation(step).arcsec for step in (right, up)]
    if np.ptp(scales) > 0.01 * np.mean(scales):
        raise InputError(f"pixels of {scales[0]:.4g} x {scales[1]:.4g} arcsec; only square ones can be fitted")
    angles = [middle.position_angle(step).rad for step in (right, up)]
    parity = float(np.sign(np.sin(angles[1] - angles[0])))
    north = float(np.angle(np.exp(-1j * parity * angles[0])))
    return float(np.mean(scales)), north, parity


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


def _refuse(path: Path, what: str, bad: NDArray[np.bool_]) -> None:
    if bad.any():
        y, x = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: {bad.sum()} pixels with {what}, the first at x = {x}, y = {y}; mask them, by a mask or an "
            "infinite noise, or mend the file"
        )


def _size(image: NDArray[np.float64]) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"
