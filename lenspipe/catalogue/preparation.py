"""An observed image made ready for a fit: its deflector found, its arcs seen, a cut-out with a mask about them.

A first look takes the light of the deflector, a set of concentric Gaussians of one shape, off the image, without what
stands out from it. What stands out near the deflector are taken for arcs, the rest for companions. Nothing of the first
look's light goes into the fit, which has the deflector's light in its own model; only scales of brightness do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from astropy.stats import mad_std, sigma_clip
from astroscrappy import detect_cosmics
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter, label
from scipy.optimize import minimize, nnls

from lenspipe.catalogue.entry import Wishes
from lenspipe.catalogue.point_images import full_width
from lenspipe.config import Preparation
from lenspipe.errors import InputError
from lenspipe.image.light import elliptical_radius2
from lenspipe.lens.coordinates import axis_ratio

Image = NDArray[np.float64]
Mask = NDArray[np.bool_]

SEEN = 7.0  # radius of the part of the image that the first look is at ["]
WIDTHS = np.geomspace(0.04, 5.0, 10)  # standard deviations of its Gaussians ["]
INNERMOST = 0.35  # radius within which nothing counts as an arc: what the first look leaves there is its own ["]
OUTERMOST = 2.7  # radius within which arcs have their middle ["]
HALFWAY = 1.5  # the same of those that reach the edge of the image ["]
UNIT_RADIUS = 0.5  # where the brightness of the deflector is 1 light unit ["]
ROUNDS = 4  # of taking the deflector's light off and looking for what stands out
SMOOTHED = 1.5  # sd of the Gaussian that residuals are smoothed by before they count [px]
SURE = 20.0  # signal-to-noise below which what stands out does not say how large the disc must be
FEW = 500  # pixels below which the empty part of an image says nothing about its noise
BLOCK = 4  # side of the blocks over which the noise is measured [px]
CAP = 10.0  # significance of a pixel above which it counts no more
SHARP = {"sigclip": 6.0, "sigfrac": 0.3, "objlim": 2.5, "niter": 2}  # of cosmic rays, as in LA Cosmic
CORE = 7  # [px] from the middle of the PSF that they are held against
SIDE_STEP = 16  # sides of cut-outs are multiples of this [px]


@dataclass(frozen=True)
class Prepared:
    """What was found. Arrays are of the cut-out [side, side], whose middle is the deflector's nearest pixel or corner.

    light: of the deflector at the first look; arcs: what is taken for them; center_column, center_row: of the deflector
    in the whole image [px]; background, background_error: clipped median of the image beyond the disc, and its error;
    fit_radius: of the disc that is fitted ["]; arc_radius, first_arc_snr: mean radius ["] and signal-to-noise of the
    arcs; companions, cosmic_rays: how many objects and pixels hit were masked in the disc; masked: share of its pixels
    that is not fitted;
    light_unit, flux_unit: brightnesses of the deflector at half an arcsec and of the arcs; corner: column and row of
    the cut-out's first pixel in the whole image. Of the empty part: noise_correlation, that of neighbouring pixels;
    noise_inflation, what the noise map would have to be multiplied by to be right over blocks of pixels, as it was
    where the settings say so; chi2_expected, per pixel, with the noise that is given here. 0, 1 and 1 where too little
    is empty.
    """

    image: Image
    noise: Image
    usable: Mask
    light: Image
    arcs: Mask
    center_column: float
    center_row: float
    background: float
    background_error: float
    fit_radius: float
    arc_radius: float
    first_arc_snr: float
    companions: int
    cosmic_rays: int
    masked: float
    light_unit: float
    flux_unit: float
    corner: tuple[int, int]
    noise_correlation: float
    noise_inflation: float
    chi2_expected: float


def prepare(
    image: Image,
    noise: Image,
    usable: Mask,
    psf: Image,
    pixel_scale: float,
    settings: Preparation,
    wishes: Wishes,
) -> Prepared:
    """Find the deflector and the arcs; cut out and mask. image, noise, usable: [ny, nx]; psf: [ky, kx].

    Raises InputError where there is no deflector.
    """
    hit = cosmic_rays(image, noise, usable, psf) if settings.mask_cosmic_rays else np.zeros_like(usable)
    usable = usable & ~hit
    column, row = deflector(image, noise, usable, pixel_scale, settings, wishes)
    pixels = np.indices(image.shape).astype(float)
    x: Image = pixel_scale * (pixels[1] - column)
    y: Image = pixel_scale * (pixels[0] - row)
    radius = np.hypot(x, y)
    psf_sd = pixel_scale * full_width(psf) / 2.355
    look = usable & (radius < SEEN)
    light, outside = deflector_light(image, noise, look, x, y, psf_sd, settings.significance)
    significance = stand_out(image - light, noise, look)
    arcs, others = sorted_objects(significance, radius, settings.significance)
    weights = np.where(arcs & usable, np.clip(significance, 0, CAP), 0.0)
    arc_radius = float((weights * radius).sum() / weights.sum()) if weights.any() else np.nan
    residual = np.where(usable, image - light, 0.0)
    snr = float(residual[arcs & usable].sum() / np.sqrt(np.square(noise[arcs & usable]).sum())) if arcs.any() else 0.0
    corner = float(radius.max())
    if (wishes.fit_radius or 0) > corner:
        raise InputError(f"fit_radius {wishes.fit_radius:g} arcsec is more than the image has, {corner:.3g} arcsec")
    sure = weights if snr >= SURE else np.zeros_like(weights)
    fit_radius = wishes.fit_radius or min(corner, disc(radius, sure, settings))
    within = radius < fit_radius
    arcs &= within
    reach = max(2, round(0.15 / pixel_scale))
    crossing = binary_dilation(others, iterations=reach) & ~arcs
    good = usable & within & ~crossing & (radius >= settings.core_radius)
    companions = len(np.unique(label(others & within)[0])) - 1
    ring = look & (np.abs(radius - UNIT_RADIUS) < 1.5 * pixel_scale)
    light_unit = float(np.median(light[ring])) if ring.any() else float(light.max())
    bright = gaussian_filter(residual, 1.0)[arcs & good]
    floor = 5 * float(np.median(noise[good])) if good.any() else 1.0
    flux_unit = max(float(np.percentile(bright, 90)) if len(bright) else 0.0, floor)
    background, error = background_level(image, usable, radius, fit_radius)
    empty = without_large_scales(image - light, noise, look & ~outside & ~arcs & ~others & (radius > fit_radius))
    inflation, scatter = block_scatter(empty), robust_sd(empty)
    factor = max(1.0, inflation) if settings.inflate_noise else 1.0
    side = SIDE_STEP * int(np.ceil(2 * fit_radius / pixel_scale / SIDE_STEP))
    at = cut_corner(column, side), cut_corner(row, side)
    return Prepared(
        image=cut(np.where(usable, image, 0.0), at, side, 0.0),
        noise=cut(np.where(usable, factor * noise, 1.0), at, side, 1.0),
        usable=cut(good, at, side, False),
        light=cut(light, at, side, 0.0),
        arcs=cut(arcs, at, side, False),
        center_column=column,
        center_row=row,
        background=background,
        background_error=error,
        fit_radius=fit_radius,
        arc_radius=arc_radius,
        first_arc_snr=snr,
        companions=companions,
        cosmic_rays=int((hit & within).sum()),
        masked=max(0.0, 1 - float(good.sum()) / max(1.0, np.pi * (fit_radius / pixel_scale) ** 2)),
        light_unit=max(light_unit, floor),
        flux_unit=flux_unit,
        corner=at,
        noise_correlation=correlation(empty),
        noise_inflation=inflation,
        chi2_expected=(scatter / factor) ** 2,
    )


def deflector(
    image: Image, noise: Image, usable: Mask, pixel_scale: float, settings: Preparation, wishes: Wishes
) -> tuple[float, float]:
    """Column and row of the brightest peak near the middle of the image, to a fraction of a pixel."""
    if (wishes.column is None) != (wishes.row is None):
        raise InputError("one of center_column and center_row is given: give both, or none")
    ny, nx = image.shape
    if wishes.column is not None and wishes.row is not None:
        if not (-0.5 <= wishes.column < nx and -0.5 <= wishes.row < ny):
            raise InputError(
                f"center_column {wishes.column:g}, center_row {wishes.row:g} are outside of the image of {nx} x {ny} px"
            )
        return wishes.column, wishes.row
    pixels = np.indices(image.shape)
    y, x = pixels[0], pixels[1]
    near = np.hypot(x - (nx - 1) / 2, y - (ny - 1) / 2) * pixel_scale <= settings.centre_within
    smooth = gaussian_filter(np.where(usable, image, 0.0), 1.5)
    around = smooth[near & usable]
    if not len(around) or around.max() <= 3 * np.median(noise[usable]) or np.ptp(around) == 0:
        raise InputError(
            f"no deflector within {settings.centre_within:g} arcsec of the middle of the image: centre the image on "
            "it, or give its pixel in the columns center_column and center_row; a mask that is read the wrong way "
            "around (mask_bad) hides it, too"
        )
    row, column = divmod(int(np.where(near & usable, smooth, -np.inf).argmax()), nx)
    at = np.s_[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
    weight = np.clip(smooth[at] - smooth[at].min(), 0, None)
    return float((weight * x[at]).sum() / weight.sum()), float((weight * y[at]).sum() / weight.sum())


def cosmic_rays(image: Image, noise: Image, usable: Mask, psf: Image) -> Mask:
    """Pixels hit by cosmic rays: what is sharper than the PSF (LA Cosmic, van Dokkum 2001), stars are not."""
    y, x = (n // 2 for n in psf.shape)
    reach = min(CORE, y, x, *((n - 1) // 2 for n in psf.shape))
    core = psf[y - reach : y + reach + 1, x - reach : x + reach + 1].astype("float32")
    hit, _ = detect_cosmics(
        np.where(usable, image, 0.0).astype("float32"),
        inmask=~usable,
        invar=np.where(usable, noise, 1.0).astype("float32") ** 2,
        satlevel=np.inf,
        cleantype="medmask",
        fsmode="convolve",
        psfk=np.ascontiguousarray(core / core.sum()),
        **SHARP,
    )
    return np.asarray(hit, dtype=bool) & usable


def deflector_light(
    image: Image, noise: Image, look: Mask, x: Image, y: Image, psf_sd: float, significance: float
) -> tuple[Image, Mask]:
    """Light of the deflector [ny, nx] by concentric Gaussians and a level, and which pixels were left out of it.

    Pixels that stand out, above or below, are left out from round to round.
    """
    left_out, shape, step = np.zeros_like(look), np.zeros(2), 1 + look.sum() // 6000
    light = np.zeros_like(image)
    for _ in range(ROUNDS):
        rows, columns = np.nonzero(look & ~left_out)
        chosen = rows[::step], columns[::step]
        weight = 1 / np.hypot(noise[chosen], 0.03 * np.abs(image[chosen]))
        shape, amplitudes = best_shape(image[chosen], weight, x[chosen], y[chosen], psf_sd, shape)
        light = gaussians(x, y, shape, psf_sd) @ amplitudes
        seen = stand_out(image - light, noise, look)
        core = np.hypot(x, y) < INNERMOST
        left_out = binary_dilation((np.abs(seen) > significance) & ~core, iterations=2)
    return light, left_out


def best_shape(
    data: NDArray, weight: NDArray, x: NDArray, y: NDArray, psf_sd: float, begun: NDArray
) -> tuple[NDArray, NDArray]:
    """Ellipticity and amplitudes that fit pixels [n] best."""

    def loss(e: NDArray) -> float:
        return fitted(gaussians(x, y, e, psf_sd) * weight[:, None], data * weight)[1] if np.hypot(*e) < 0.6 else np.inf

    simplex = begun + np.array([[0.0, 0.0], [0.08, 0.0], [0.0, 0.08]])
    options = {"xatol": 3e-3, "fatol": 1e-3, "maxfev": 60, "initial_simplex": simplex}
    shape = minimize(loss, begun, method="Nelder-Mead", options=options).x
    return shape, fitted(gaussians(x, y, shape, psf_sd) * weight[:, None], data * weight)[0]


def gaussians(x: NDArray, y: NDArray, e: NDArray, psf_sd: float) -> NDArray:
    """Gaussians of the widths of the first look, blurred, and a level, at places [...]: [..., 11]."""
    zero = torch.zeros(1, dtype=torch.float64)
    shape = axis_ratio(*torch.from_numpy(e))
    radius2 = elliptical_radius2(torch.from_numpy(x), torch.from_numpy(y), *shape, zero, zero).numpy()
    widths = np.hypot(WIDTHS, psf_sd)
    return np.stack([*(np.exp(-0.5 * radius2 / sd**2) for sd in widths), np.ones_like(radius2)], -1)


def fitted(design: NDArray, data: NDArray) -> tuple[NDArray, float]:
    """Non-negative least squares, and the root of the sum of squares that is left; on the triangle of a QR."""
    scale = np.sqrt(np.square(design).sum(0))
    q, r = np.linalg.qr(design / np.maximum(scale, 1e-300))
    found, left = nnls(r, q.T @ data, maxiter=1000)
    outside = max(0.0, float(data @ data) - float(np.square(q.T @ data).sum()))
    return found / np.maximum(scale, 1e-300), float(np.hypot(left, np.sqrt(outside)))


def stand_out(residual: Image, noise: Image, look: Mask) -> Image:
    """Smoothed residuals in units of their own scatter where nothing is: [ny, nx]; 0 outside `look`.

    The scatter is by half the distance of the 16th and 84th percentiles in the outer half, so that correlated noise
    and noise maps that are off do not matter.
    """
    ratio = np.where(look, residual / noise, 0.0)
    covered = gaussian_filter(look.astype(float), SMOOTHED)
    smooth = np.divide(gaussian_filter(ratio, SMOOTHED), covered, out=np.zeros_like(ratio), where=look)
    values = smooth[look]
    spread = (np.percentile(values, 84) - np.percentile(values, 16)) / 2 if len(values) else 1.0
    return smooth / max(spread, 1e-12)


def sorted_objects(significance: Image, radius: Image, least: float) -> tuple[Mask, Mask]:
    """Pixels that stand out: those of arcs and those of companions [ny, nx].

    An object is an arc where its pixels have their mean radius below `OUTERMOST`, below `HALFWAY` where it reaches the
    edge of the image.
    """
    objects, count = label((significance > least) & (radius > INNERMOST))
    edge = np.ones(radius.shape, dtype=bool)
    edge[1:-1, 1:-1] = False
    arcs, others = np.zeros_like(edge), np.zeros_like(edge)
    for number in range(1, count + 1):
        own = objects == number
        if own.sum() < 4:
            continue
        mean = radius[own].mean()
        (others if mean > OUTERMOST or (mean > HALFWAY and (own & edge).any()) else arcs)[own] = True
    return arcs, others


def disc(radius: Image, weights: Image, settings: Preparation) -> float:
    """Radius ["] of the disc that is fitted: beyond 95 % of the arcs' weight, with a margin."""
    if not weights.any():
        return settings.fit_radius_max
    order = radius.ravel().argsort()
    sums = weights.ravel()[order].cumsum()
    reach = radius.ravel()[order][np.searchsorted(sums, 0.95 * sums[-1])]
    return float(np.clip(reach + settings.margin, settings.fit_radius_min, settings.fit_radius_max))


def background_level(image: Image, usable: Mask, radius: Image, fit_radius: float) -> tuple[float, float]:
    """Clipped median of the outer half of the image beyond the disc, and its standard error."""
    far = usable & (radius > max(fit_radius, np.percentile(radius, 60)))
    values = sigma_clip(image[far], sigma=3, maxiters=3, stdfunc="mad_std", masked=False)
    if len(values) < 10:
        return np.nan, np.nan
    return float(np.median(values)), float(1.25 * values.std() / np.sqrt(len(values)))


def without_large_scales(residual: Image, noise: Image, empty: Mask) -> Image:
    """Residuals over noise without their large scales, NaN outside of the empty part."""
    ratio = np.where(empty, residual / noise, 0.0)
    covered = np.maximum(gaussian_filter(empty.astype(float), 6), 1e-6)
    return np.where(empty, ratio - gaussian_filter(ratio, 6) / covered, np.nan)


def correlation(field: Image) -> float:
    """Mean correlation of pixels with those to their right and above; 0 where there are few."""
    pairs = [(field[:, 1:], field[:, :-1]), (field[1:], field[:-1])]
    found = []
    for a, b in pairs:
        both = np.isfinite(a) & np.isfinite(b)
        if both.sum() >= FEW:
            found.append(np.clip(np.mean(a[both] * b[both]) / np.mean((a[both] ** 2 + b[both] ** 2) / 2), -1, 1))
    return float(np.mean(found)) if found else 0.0


def robust_sd(values: NDArray) -> float:
    """Standard deviation by the median distance from the median, of what is a number; 1 where there are few."""
    return float(mad_std(values, ignore_nan=True)) if np.isfinite(values).sum() >= FEW else 1.0


def block_scatter(field: Image) -> float:
    """Standard deviation of sums over blocks of `BLOCK` x `BLOCK` pixels over that of unit white noise."""
    ny, nx = (side - side % BLOCK for side in field.shape)
    blocks = field[:ny, :nx].reshape(ny // BLOCK, BLOCK, nx // BLOCK, BLOCK).sum((1, 3)) / BLOCK
    return float(mad_std(blocks, ignore_nan=True)) if np.isfinite(blocks).sum() >= FEW / BLOCK**2 else 1.0


def cut_corner(place: float, side: int) -> int:
    """First pixel of a cut-out of an even side, such that its middle is as near to `place` as a whole pixel allows."""
    return round(place + 0.5 - side / 2)


def cut(field: NDArray, corner: tuple[int, int], side: int, blank: float | bool) -> NDArray:
    """The square [side, side] of a field [ny, nx] from the pixel (column, row) on; `blank` beyond its edges."""
    (column, row), (ny, nx) = corner, field.shape
    out = np.full((side, side), blank, dtype=field.dtype)
    rows, columns = slice(max(row, 0), min(row + side, ny)), slice(max(column, 0), min(column + side, nx))
    out[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column] = field[rows, columns]
    return out
