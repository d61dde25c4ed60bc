"""The embedded synthetic galaxy survey, written exactly as the GREAT3 / GalSim RealGalaxyCatalog is.

No pixel of it was observed. Bulges, exponential discs with logarithmic spiral arms, bars and clumps of young stars,
irregulars and mergers are drawn with COSMOS-like magnitudes (counts rising to the faint end), sizes, PSF and noise, so
that everything behind this stage runs, and can be tested, without a download.

Each galaxy has its own random generator, from (seed, IDENT): it is the same however many others are drawn.
Lengths are in pixels and angles in radians, counter-clockwise from +x, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.random import Generator
from numpy.typing import NDArray
from rich.progress import track
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from scipy.special import gammaincinv

from lenspipe.artefact import provenance, write_record, written_whole
from lenspipe.config import Survey

Array = NDArray[np.float64]
Row = dict[str, Any]

CATALOGUE = "real_galaxy_catalog_synthetic.fits"
ZERO_POINT = 25.94  # AB magnitude of one count a second in F814W, as in COSMOS
COUNTS_SLOPE = 0.25  # d log10 N / d mag
FORMS = {"elliptical": 0.12, "disc": 0.18, "spiral": 0.42, "irregular": 0.16, "merger": 0.12}
FAILED_FITS = {"status 0": 0.015, "status 5": 0.01, "n out of range": 0.01, "no size": 0.005}
PSF_SIDE = 39  # [px]
PSF_BETA = 3.0  # Moffat exponent

CATALOGUE_FORMATS = {
    "IDENT": "J", "RA": "D", "DEC": "D", "MAG": "D", "BAND": "5A", "WEIGHT": "D",
    "GAL_FILENAME": "48A", "PSF_FILENAME": "48A", "GAL_HDU": "J", "PSF_HDU": "J",
    "PIXEL_SCALE": "D", "NOISE_MEAN": "D", "NOISE_VARIANCE": "D", "stamp_flux": "D",
}  # fmt: skip
FITS_FORMATS = {
    "IDENT": "J", "mag_auto": "D", "flux_radius": "D", "zphot": "D", "sersicfit": "8D", "bulgefit": "16D",
    "fit_status": "5J", "fit_mad_s": "D", "fit_mad_b": "D", "fit_dvc_btt": "D", "use_bulgefit": "J",
    "viable_sersic": "J", "hlr": "3D", "flux": "4D",
}  # fmt: skip
SELECTION_FORMATS = {
    "IDENT": "J", "dmag": "D", "sn_ellip_gauss": "D", "min_mask_dist_pixels": "D",
    "average_mask_adjacent_pixel_count": "D", "peak_image_pixel_count": "D",
}  # fmt: skip


def write_survey(settings: Survey, out: Path, seed: int) -> None:
    """Draw the survey into the folder `out`: catalogue, fits, selection, image and PSF files, provenance.json.

    NOISE_FILENAME is left out of the catalogue, which in this layout means white noise.
    """
    per_file = settings.galaxies_per_file
    with written_whole(out) as folder:
        folder.mkdir()
        rows: list[Row] = []
        for first in track(range(0, settings.galaxies, per_file), description="survey"):
            idents = range(first + 1, min(first + per_file, settings.galaxies) + 1)
            rows += _write_image_file(settings, folder, first // per_file + 1, idents, seed)
        _write_table(folder / CATALOGUE, rows, CATALOGUE_FORMATS)
        _write_table(folder / CATALOGUE.replace(".fits", "_fits.fits"), rows, FITS_FORMATS)
        _write_table(folder / CATALOGUE.replace(".fits", "_selection.fits"), rows, SELECTION_FORMATS)
        counts = {kind: sum(row["form"] == kind for row in rows) for kind in FORMS}
        about = "synthetic: drawn by lenspipe, no pixel was observed"
        write_record(folder, provenance("survey", {"survey": settings}, seed=seed, about=about, forms=counts))


def _write_image_file(settings: Survey, folder: Path, number: int, idents: range, seed: int) -> list[Row]:
    """Write the stamps and PSFs of `idents` into the pair of files `number`; return their rows."""
    psf = moffat(settings.psf_fwhm / settings.pixel_scale)
    images, psfs, rows = fits.HDUList(), fits.HDUList(), []
    for hdu, ident in enumerate(idents):
        image, row = draw_galaxy(settings, ident, psf, seed)
        make = fits.ImageHDU if hdu else fits.PrimaryHDU
        images.append(make(image.astype(np.float32)))
        psfs.append(make(psf.astype(np.float32)))
        names = {"GAL_FILENAME": f"real_galaxy_images_synthetic_n{number}.fits", "GAL_HDU": hdu}
        names |= {"PSF_FILENAME": f"real_galaxy_PSF_images_synthetic_n{number}.fits", "PSF_HDU": hdu}
        rows.append(row | names)
    images.writeto(folder / rows[0]["GAL_FILENAME"])
    psfs.writeto(folder / rows[0]["PSF_FILENAME"])
    return rows


def _write_table(path: Path, rows: list[Row], formats: dict[str, str]) -> None:
    columns = [fits.Column(name, form, array=np.array([row[name] for row in rows])) for name, form in formats.items()]
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns)]).writeto(path)


def moffat(fwhm: float) -> Array:
    """The Moffat PSF [39, 39], of unit sum; `fwhm` in pixels."""
    y, x = np.indices((PSF_SIDE, PSF_SIDE)) - PSF_SIDE // 2
    core = fwhm / (2 * np.sqrt(2 ** (1 / PSF_BETA) - 1))
    psf = (1 + (x**2 + y**2) / core**2) ** -PSF_BETA
    return np.asarray(psf / psf.sum())


@dataclass(frozen=True)
class Form:
    """What a galaxy looks like, before its random details."""

    kind: str
    magnitude: float
    hlr: float  # half-light radius along the major axis [px]
    q: float
    phi: float
    bulge_fraction: float
    bulge_n: float


def draw_galaxy(settings: Survey, ident: int, psf: Array, seed: int) -> tuple[Array, Row]:
    """The stamp [y, x] of galaxy `ident`, as observed, and its row in the three tables."""
    rng = np.random.default_rng([seed, ident])
    form = draw_form(settings, rng)
    shape = draw_stamp_shape(settings, form, rng)
    light = fftconvolve(draw_light(form, shape, rng), psf, mode="same")
    light *= 10 ** (0.4 * (ZERO_POINT - form.magnitude)) / light.sum()
    image = light + rng.normal(0, settings.noise_sd, shape)
    return image, _row(settings, ident, form, light, image, rng)


def draw_form(settings: Survey, rng: Generator) -> Form:
    """A kind of galaxy, a magnitude from N ~ 10^(0.25 mag), and a size that shrinks with magnitude."""
    kind = str(rng.choice(list(FORMS), p=list(FORMS.values())))
    growth = np.log(10) * COUNTS_SLOPE
    faint = np.expm1(growth * (settings.magnitude_faint - settings.magnitude_bright))
    magnitude = settings.magnitude_bright + np.log1p(rng.uniform() * faint) / growth
    hlr = np.clip(0.46 * 10 ** (-0.14 * (magnitude - 22)) * np.exp(rng.normal(0, 0.22)), 0.15, 0.9)
    smooth = kind == "elliptical"
    cos_i = rng.uniform(0.1, 1)
    return Form(
        kind=kind,
        magnitude=float(magnitude),
        hlr=float(hlr) / settings.pixel_scale,
        q=float(rng.uniform(0.55, 1) if smooth else np.hypot(cos_i, 0.2) / np.hypot(1, 0.2)),
        phi=float(rng.uniform(0, np.pi)),
        bulge_fraction=1.0 if smooth else float(rng.beta(1.2, 6)) * (kind not in ("irregular", "merger")),
        bulge_n=float(rng.uniform(1.5, 4)),
    )


def draw_stamp_shape(settings: Survey, form: Form, rng: Generator) -> tuple[int, int]:
    """Height and width [px]: some 7 half-light radii, as in COSMOS; one stamp in three is not square."""
    side = min(int(form.hlr * form.q**0.25 * rng.uniform(6.5, 8.5)) + 8, settings.stamp_size_max)
    longer = min(int(side * rng.uniform(1, 1.3)), settings.stamp_size_max)
    shapes = [(side, side), (side, longer), (longer, side)]
    return shapes[rng.choice(3, p=[2 / 3, 1 / 6, 1 / 6])]


def draw_light(form: Form, shape: tuple[int, int], rng: Generator) -> Array:
    """The light of a galaxy on a stamp `shape`, before the PSF; arbitrary units."""
    y, x = np.indices(shape, dtype=np.float64)
    x -= (shape[1] - 1) / 2 + rng.normal(0, 0.5)
    y -= (shape[0] - 1) / 2 + rng.normal(0, 0.5)
    return PAINTERS[form.kind](form, x, y, rng)


def sersic(radius: Array, n: float) -> Array:
    """The Sersic profile at `radius` [half-light radii], of value 1 at radius 0."""
    return np.asarray(np.exp(-gammaincinv(2 * n, 0.5) * radius ** (1 / n)))


def in_plane(form: Form, x: Array, y: Array) -> tuple[Array, Array]:
    """Radius [half-light radii, major axis] and angle in the galaxy's plane; the core is softened by 0.4 px."""
    c, s = np.cos(form.phi), np.sin(form.phi)
    u, v = c * x + s * y, (c * y - s * x) / form.q
    return np.sqrt(u**2 + v**2 + 0.16) / form.hlr, np.arctan2(v, u)


def paint_elliptical(form: Form, x: Array, y: Array, rng: Generator) -> Array:
    """A smooth Sersic profile."""
    return sersic(in_plane(form, x, y)[0], form.bulge_n)


def paint_disc(form: Form, x: Array, y: Array, rng: Generator) -> Array:
    """A bulge in an exponential disc with clumps."""
    radius, _ = in_plane(form, x, y)
    disc = sersic(radius, 1) * flocculence(x.shape, form.hlr, rng.uniform(0.1, 0.4), rng)
    return with_bulge(form, x, y, with_clumps(disc, form.hlr, rng.uniform(0, 0.15), rng))


def paint_spiral(form: Form, x: Array, y: Array, rng: Generator) -> Array:
    """A bulge, for some a bar, and a disc with logarithmic arms along which the clumps lie."""
    radius, angle = in_plane(form, x, y)
    start, axis = rng.uniform(0.2, 0.5), rng.uniform(0, 2 * np.pi)
    number = int(rng.choice([1, 2, 3, 4], p=[0.05, 0.65, 0.2, 0.1]))
    arms = spiral_arms(radius, angle - axis, start, number, rng)
    disc = sersic(radius, rng.uniform(0.7, 1)) * arms * flocculence(x.shape, form.hlr, 0.25, rng)
    disc = with_clumps(disc / disc.sum(), form.hlr, rng.uniform(0.05, 0.3), rng)
    if number == 2 and rng.uniform() < 0.45:
        disc += rng.uniform(0.08, 0.2) * bar(radius, angle - axis, start)
    return with_bulge(form, x, y, disc)


def paint_irregular(form: Form, x: Array, y: Array, rng: Generator) -> Array:
    """A lopsided, flocculent disc with strong clumps and no bulge."""
    radius, angle = in_plane(form, x, y)
    lopsided = 1 + rng.uniform(0.3, 0.9) * np.cos(angle - rng.uniform(0, 2 * np.pi)) * radius / (radius + 0.5)
    disc = sersic(radius, rng.uniform(0.5, 1)) * lopsided * flocculence(x.shape, form.hlr, 0.7, rng)
    return with_clumps(disc, form.hlr, rng.uniform(0.2, 0.5), rng)


def paint_merger(form: Form, x: Array, y: Array, rng: Generator) -> Array:
    """Two discs with a core each, one torn into a tail, 0.7 to 1.6 half-light radii apart."""
    apart, way = form.hlr * rng.uniform(0.7, 1.6), rng.uniform(0, 2 * np.pi)
    dx, dy = apart * np.cos(way), apart * np.sin(way)
    light = np.zeros_like(x)
    for side, share in ((0.4, 1.0), (-0.6, rng.uniform(0.35, 0.9))):
        hlr, q, phi = form.hlr * rng.uniform(0.5, 0.85), rng.uniform(0.4, 1), rng.uniform(0, np.pi)
        one = Form(form.kind, form.magnitude, hlr, q, phi, bulge_fraction=rng.uniform(0.1, 0.3), bulge_n=1.5)
        radius, angle = in_plane(one, x - side * dx, y - side * dy)
        tail = spiral_arms(radius, angle - rng.uniform(0, 2 * np.pi), 0.6, 1, rng)
        disc = with_clumps(sersic(radius, 1) * tail, one.hlr, rng.uniform(0, 0.25), rng)
        light += share * unit(with_bulge(one, x - side * dx, y - side * dy, disc))
    return light


Painter = Callable[[Form, Array, Array, Generator], Array]
PAINTERS: dict[str, Painter] = {
    "elliptical": paint_elliptical,
    "disc": paint_disc,
    "spiral": paint_spiral,
    "irregular": paint_irregular,
    "merger": paint_merger,
}


def unit(light: Array) -> Array:
    """`light` scaled to unit sum."""
    return np.asarray(light / light.sum())


def with_bulge(form: Form, x: Array, y: Array, disc: Array) -> Array:
    """Add a rounder Sersic bulge, a third the size of the disc, that holds `bulge_fraction` of the light."""
    q = 0.5 + 0.5 * form.q
    bulge = Form(form.kind, form.magnitude, form.hlr / 3, q, form.phi, 1.0, form.bulge_n)
    profile = sersic(in_plane(bulge, x, y)[0], form.bulge_n)
    return form.bulge_fraction * unit(profile) + (1 - form.bulge_fraction) * unit(disc)


def spiral_arms(radius: Array, angle: Array, start: float, number: int, rng: Generator) -> Array:
    """The factor on a disc that makes logarithmic arms of one pitch, faint within the radius `start`."""
    pitch = np.tan(np.deg2rad(rng.uniform(12, 32))) * rng.choice([-1, 1])
    phase = number * (angle - np.log(radius / start) / pitch)
    ridge = np.exp(rng.uniform(1.2, 3) * (np.cos(phase) - 1))
    onset = radius**2 / (radius**2 + start**2)
    return np.asarray(1 + rng.uniform(3, 7) * onset * (ridge - 0.25))


def bar(radius: Array, angle: Array, length: float) -> Array:
    """A bar of unit sum along angle 0, `length` half-light radii to each end and a third as wide."""
    along, across = radius * np.cos(angle) / length, radius * np.sin(angle) / (0.3 * length)
    return unit(np.exp(-0.7 * (along**4 + across**2)))


def flocculence(shape: tuple[int, ...], hlr: float, strength: float, rng: Generator) -> Array:
    """A lognormal factor of mean about 1 that varies over a sixth of the half-light radius."""
    field = gaussian_filter(rng.normal(size=shape), hlr / 6)
    return np.asarray(np.exp(strength * field / field.std()))


def with_clumps(disc: Array, hlr: float, share: float, rng: Generator) -> Array:
    """Put `share` of the light of `disc` into round clumps, drawn where the disc is bright; unit sum."""
    density = unit(np.clip(disc, 0, None))
    clumps = np.zeros(disc.size)
    where = rng.choice(disc.size, size=rng.integers(8, 41), p=unit(density.ravel() ** 1.4))
    np.add.at(clumps, where, rng.lognormal(0, 0.6, where.size))
    spread = gaussian_filter(clumps.reshape(disc.shape), max(0.8, hlr * rng.uniform(0.05, 0.12)))
    return (1 - share) * density + share * unit(spread)


def half_light_radius(light: Array) -> float:
    """Radius about the centroid that holds half of the noise-free `light` [px]."""
    y, x = np.indices(light.shape)
    total = light.sum()
    radius = np.hypot(x - (x * light).sum() / total, y - (y * light).sum() / total).ravel()
    order = np.argsort(radius)
    return float(radius[order][np.searchsorted(np.cumsum(light.ravel()[order]), total / 2)])


def _row(settings: Survey, ident: int, form: Form, light: Array, image: Array, rng: Generator) -> Row:
    """What the three tables say of a galaxy, except where its stamp is."""
    flux, radius = float(light.sum()), half_light_radius(light)
    aperture = settings.noise_sd * np.sqrt(2 * np.pi) * radius
    return {
        "form": form.kind,
        "IDENT": ident,
        "RA": rng.uniform(0, 0.1),
        "DEC": rng.uniform(0, 0.1),
        "MAG": form.magnitude,
        "BAND": "F814W",
        "WEIGHT": 1.0,
        "PIXEL_SCALE": settings.pixel_scale,
        "NOISE_MEAN": 0.0,
        "NOISE_VARIANCE": settings.noise_sd**2,
        "stamp_flux": float(image.sum()),
        "mag_auto": form.magnitude,
        "flux_radius": radius,
        "zphot": rng.gamma(4, 0.2),
        "dmag": rng.normal(0, 0.05),
        "sn_ellip_gauss": flux / aperture,
        "min_mask_dist_pixels": rng.uniform(15, 60),
        "average_mask_adjacent_pixel_count": settings.noise_sd,
        "peak_image_pixel_count": float(light.max()),
        **_fit_columns(settings, form, flux, radius, light.shape, rng),
    }


def _fit_columns(
    settings: Survey, form: Form, flux: float, radius: float, shape: tuple[int, ...], rng: Generator
) -> Row:
    """The `_fits` columns: near the truth, except for the few per cent of fits that fail or are unphysical."""
    fate = rng.choice([*FAILED_FITS, "good"], p=[*FAILED_FITS.values(), 1 - sum(FAILED_FITS.values())])
    status = {"status 0": 0, "status 5": 5}.get(fate, 1)
    n = form.bulge_n if form.kind == "elliptical" else 0.7 + 2.5 * form.bulge_fraction
    n = float(rng.choice([0.02, 9.0])) if fate == "n out of range" else n * float(np.exp(rng.normal(0, 0.1)))
    major = -1.0 if fate == "no size" else radius / np.sqrt(form.q)
    place = [0.0, shape[1] / 2, shape[0] / 2, form.phi]
    level = flux / (2 * np.pi * radius**2 * 2)
    disc, bulge = [level, major, 1.0, form.q, *place], [level, major / 3, 4.0, 0.5 + 0.5 * form.q, *place]
    return {
        "sersicfit": [level, major, n, form.q, *place],
        "bulgefit": disc + bulge,
        "fit_status": [status] * 5,
        "fit_mad_s": settings.noise_sd,
        "fit_mad_b": settings.noise_sd,
        "fit_dvc_btt": form.bulge_fraction,
        "use_bulgefit": 0,
        "viable_sersic": int(fate == "good"),
        "hlr": [major * np.sqrt(form.q) * settings.pixel_scale, 0.0, 0.0],
        "flux": [flux, 0.0, 0.0, 0.0],
    }
