"""Stage `mocks`: mock lenses as in the paper's section 5.1, written as FITS files and a table, with their truth.

A source is a galaxy of the test set, denoised by non-local means and rescaled to a given share of the field; lens
parameters are drawn from the priors. Every system is written once per noise level.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from astropy.io import fits
from rich.progress import track
from torch import Tensor

from lenspipe import artefact
from lenspipe.config import Config, Mocks
from lenspipe.galaxies.dataset import open_galaxies
from lenspipe.galaxies.denoise import denoised
from lenspipe.image.noise import noise_map
from lenspipe.image.psf import gaussian_kernel
from lenspipe.image.simulator import Optics, Parameters, Simulator, canonical
from lenspipe.lens.coordinates import ellipticity
from lenspipe.optics import read_optics
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from lenspipe.seeds import seed_for
from lenspipe.source.prior import read_source_prior
from lenspipe.source.view import Drawn, Seen, view

LIGHT_SHARE = 0.9  # of a galaxy's flux, inside the circle whose diameter is its extent


def write_mocks(config: Config, paths: Results) -> None:
    """Write `config.mocks.systems` systems at every noise level below `paths.mocks`, with `lenses.csv`."""
    settings = config.mocks
    optics = read_optics(config, paths.deflection_table, torch.float64)
    inputs = [paths.galaxies if settings.source == "galaxies" else paths.source_prior]
    prior = read_source_prior(paths.source_prior).double() if settings.source == "prior" else None
    images, noise_sds, names = _sources(config, paths.galaxies) if prior is None else ([], [], [])
    rows = []
    with artefact.written_whole(paths.mocks) as folder:
        folder.mkdir()
        for system in track(range(settings.systems), description="mocks"):
            generator = torch.Generator().manual_seed(seed_for(config.seed, "mocks", system))
            priors = PriorMap(config.priors.expressions())
            if prior is None:
                galaxy = system % len(images)
                picture = denoised(images[galaxy], noise_sds[galaxy])
                field = settings.image_size * settings.pixel_scale
                size = settings.source_extent * field / light_extent(picture)
                parameters = draw_parameters(priors, generator, {"source_size": size})
                stamp = torch.from_numpy(picture)[None]
                source: Drawn | Seen = Drawn(stamp, stamp, optics.interpolation)
                origin = names[galaxy]
            else:
                parameters = draw_parameters(priors, generator)
                latent = torch.randn(1, prior.size, generator=generator).double()
                picture, source = prior(latent)[0].numpy(), view(prior, latent, optics.interpolation)
                origin = "prior"
            rows += _write_system(settings, system, parameters, picture, source, origin, optics, generator, folder)
        pd.DataFrame(rows).to_csv(folder / "lenses.csv", index=False)
        used = {name: getattr(config, name) for name in ("mocks", "lens", "priors")}
        artefact.write_record(folder, artefact.provenance("mocks", used, inputs, config.seed))


def draw_parameters(
    priors: PriorMap, generator: torch.Generator, known: Mapping[str, float] = MappingProxyType({})
) -> Parameters:
    """One draw of the named parameters but those `known`, canonical ones filled in: [1] each, float64."""
    drawn = priors(torch.randn(1, len(priors.free), generator=generator, dtype=torch.float64))
    given = {name: torch.tensor([value], dtype=torch.float64) for name, value in known.items()}
    return canonical(drawn | given, priors.shared)


def light_extent(image: np.ndarray, share: float = LIGHT_SHARE) -> float:
    """Diameter of the circle about the centroid that holds `share` of the light, in units of the image's width."""
    n = len(image)
    y, x = np.mgrid[:n, :n]
    centre_x, centre_y = ((image * axis).sum() / image.sum() for axis in (x, y))
    radius = np.hypot(x - centre_x, y - centre_y).ravel()
    order = radius.argsort()
    within = np.cumsum(image.ravel()[order]) / image.sum()
    return float(2 * max(radius[order][np.searchsorted(within, share)], 1.0) / n)


def _sources(config: Config, galaxies: Path) -> tuple[list[np.ndarray], list[float], list[str]]:
    """As many galaxies of the test set as there are systems, in random order; all of them where there are fewer."""
    chosen = open_galaxies(galaxies, "test")
    order = np.random.default_rng(seed_for(config.seed, "mocks", "galaxies")).permutation(chosen.sizes["galaxy"])
    chosen = chosen.isel(galaxy=order[: config.mocks.systems])
    images = list(chosen["image"].to_numpy().astype(float))
    return images, chosen["noise_sd"].to_numpy().tolist(), [str(name) for name in chosen["name"].to_numpy()]


def _write_system(
    settings: Mocks,
    system: int,
    parameters: Parameters,
    picture: np.ndarray,
    source: Drawn | Seen,
    origin: str,
    optics: Optics,
    generator: torch.Generator,
    folder: Path,
) -> list[dict[str, object]]:
    """Write one system at every noise level; its rows of the table.

    picture: image of the source.
    """
    n, scale = settings.image_size, settings.pixel_scale
    kernel = gaussian_kernel(settings.psf_sd / scale * optics.psf_supersampling)
    simulator = Simulator(optics, torch.from_numpy(kernel)[None], torch.tensor([scale]).double(), (n, n))
    clean = simulator.image(parameters, source.of(parameters))[0]
    truth = {f"true_{name}": float(value) for name, value in _with_ellipticity(parameters).items()}
    in_flux_units = torch.from_numpy(picture * truth["true_source_flux"])
    centre = {f"CENTRE_{axis}": float(place) for axis, place in zip("UV", source.centre, strict=True)}
    rows: list[dict[str, object]] = []
    for level in settings.noise_levels:
        name = f"mock-{system:04d}-{level.name}"
        place = folder / name
        place.mkdir()
        sd = torch.from_numpy(noise_map(clean.numpy(), level.sd, level.counts))
        noisy = clean + sd * torch.randn(n, n, generator=generator, dtype=torch.float64)
        _write_fits(place / "image.fits", noisy, scale)
        _write_fits(place / "noise.fits", sd, scale)
        _write_fits(place / "psf.fits", torch.from_numpy(kernel), scale / optics.psf_supersampling)
        _write_fits(place / "source.fits", in_flux_units, truth["true_source_size"] / len(picture), centre)
        paths = {kind: f"{name}/{kind}.fits" for kind in ("image", "noise", "psf")}
        rows.append({"name": name, "pixel_scale": scale, **paths, "flux_unit": 1.0, "source_galaxy": origin, **truth})
    return rows


def _with_ellipticity(parameters: Parameters) -> Parameters:
    e1, e2 = ellipticity(parameters["q"], parameters["phi"])
    return {**parameters, "e1": e1, "e2": e2}


def _write_fits(
    path: Path, image: Tensor, pixel_scale: float, centre: Mapping[str, float] = MappingProxyType({})
) -> None:
    hdu = fits.PrimaryHDU(image.numpy().astype("float32"))
    hdu.header["PIXSCALE"] = (pixel_scale, "arcsec per pixel")
    for key, place in centre.items():
        hdu.header[key] = (place, "of the light [width of the image]")
    hdu.writeto(path)
