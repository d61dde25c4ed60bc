"""Stage `validation`: what the source can and cannot draw, on galaxies that it was not made from.

Of any source: fits to test galaxies without their noise and with white noise of several strengths, its power at each
spatial frequency, and how fits follow a galaxy that is turned (paper, fig. 3). Of a learned one too: the encoder's
reconstructions (paper, fig. 2), the use of each latent, how well densities of the latents agree with the galaxies, and
which test galaxies are unusual.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.progress import track
from scipy.ndimage import rotate
from scipy.stats import kstest
from torch import Tensor

from lenspipe import artefact
from lenspipe.config import Validation
from lenspipe.galaxies.dataset import evenly, galaxy_images, noise_of, open_galaxies
from lenspipe.galaxies.denoise import denoised
from lenspipe.seeds import seed_for
from lenspipe.source.base import IMAGE_SIZE, FunctionSource, Source, pixel_axis
from lenspipe.source.latent import FlowLatent, GaussianLatent, divergence, draw, encoded, gaussian_latent
from lenspipe.source.learned import LearnedSource
from lenspipe.source.prior import read_source_prior
from lenspipe.source.reconstruction import misfit, reconstruct
from lenspipe.source.stage import read_vae
from lenspipe.source.vae import VAE

Encoded = tuple[Tensor, Tensor]  # means and standard deviations of the latents, [galaxy, latents] each
SIGMA = 0.02  # unit of residuals, noise of fits to galaxies freed of theirs [peak flux]; the paper's sigma_d
DRAWS = 16  # draws from the prior that are kept as pictures
ROTATED = 4  # galaxies that are turned
DIRECTIONS = 200  # along which draws are compared with a normal distribution


def write_validation(settings: Validation, vae: Path, source: Path, galaxies: Path, out: Path, seed: int) -> None:
    """Write tables and pictures of the source prior in `source` below the folder `out`.

    `vae`: the autoencoder, which only a learned source has.
    """
    prior = read_source_prior(source)
    if isinstance(prior, FunctionSource):
        prior.pixels = IMAGE_SIZE  # galaxies have no others
    sample = Sample.read(galaxies, settings.galaxies)
    encoder = read_vae(vae)[0] if isinstance(prior, LearnedSource) else None
    generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
    with artefact.written_whole(out) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "validation", "encoder"))
        folder.mkdir()
        fits = {name: clean_fit(kind, encoder, sample) for name, kind in variants(prior).items()}
        table = sample.table.assign(**{f"chi2_{name}": fit.chi2 for name, fit in fits.items()})
        facts = {f"chi2_{name}": float(fit.chi2.mean()) for name, fit in fits.items()}
        pictures = {"galaxy": sample.images, "clean": sample.clean}
        pictures |= {name: fit.images for name, fit in fits.items()}
        if isinstance(prior, LearnedSource) and encoder is not None:
            pictures["encoder"] = encoder.reconstruct(sample.images)
            table["chi2_encoder"] = chi2(sample.images - pictures["encoder"]).numpy()
            facts["chi2_encoder"] = float(table["chi2_encoder"].mean())
            training, test = (encoded(encoder, galaxy_images(galaxies, split)) for split in ("train", "test"))
            table = mark_unusual(table, settings, encoder, training[0], galaxies, sample)
            facts["unusual"] = int(table["unusual"].sum())
            latent_use(test).to_csv(folder / "latents.csv", index=False)
            densities(prior, training, test).to_csv(folder / "densities.csv", index=False)
        table.to_csv(folder / "galaxies.csv", index=False)
        curve = signal_to_noise(settings, prior, encoder, sample.clean, generator)
        curve.to_csv(folder / "signal_to_noise.csv", index=False)
        power_ratio(sample.clean, fits).to_csv(folder / "power.csv", index=False)
        turned, errors = turned_galaxies(settings, prior, encoder, sample)
        errors.to_csv(folder / "rotation.csv", index=False)
        facts["rotation_error"] = float(errors["rms"].mean())
        draws = prior(torch.randn(DRAWS, prior.size, generator=generator))
        write_pictures(pictures, turned, draws, folder / "pictures.zarr")
        inputs = [source, galaxies, *([vae] if encoder is not None else [])]
        artefact.write_record(
            folder, artefact.provenance("validation", {"validation": settings}, inputs, seed, **facts)
        )


@dataclass(frozen=True)
class Sample:
    """Test galaxies: `images` [galaxy, 64, 64] as they are, `clean` without their noise, its `noise_sd`, a row each."""

    images: Tensor
    clean: Tensor
    noise_sd: Tensor
    table: pd.DataFrame

    @classmethod
    def read(cls, galaxies: Path, most: int) -> Sample:
        test = open_galaxies(galaxies, "test")
        test = test.isel(galaxy=evenly(test.sizes["galaxy"], most))
        table = pd.DataFrame({name: test[name].to_numpy() for name in ("name", "input", "noise_sd")})
        images = test["image"].to_numpy().astype(float)
        clean = np.array([denoised(image, sd) for image, sd in zip(images, table["noise_sd"], strict=True)])
        return cls(torch.from_numpy(images).float(), torch.from_numpy(clean).float(), noise_of(test), table)


@dataclass(frozen=True)
class CleanFit:
    """Fits to galaxies without noise: images [galaxy, 64, 64] and chi^2 per pixel [galaxy] at SIGMA."""

    images: Tensor
    chi2: np.ndarray


def variants(prior: Source) -> dict[str, Source]:
    """The source, and where it has a residual field its decoder alone."""
    if isinstance(prior, LearnedSource) and len(prior.basis):
        return {"decoder": prior.without_residual(), "source": prior}
    return {"source": prior}


def start(source: Source, encoder: VAE | None, images: Tensor) -> Tensor:
    """Where a fit of the source to images begins: at the encoder's means, or at the middle of the prior."""
    w = images.new_zeros(len(images), source.size)
    if encoder is not None and isinstance(source, LearnedSource):
        w[:, : source.latents] = source.latent.normal(encoded(encoder, images)[0])
    return w


def clean_fit(source: Source, encoder: VAE | None, sample: Sample) -> CleanFit:
    """The source's fit to the galaxies without their noise."""
    images = source(reconstruct(source, sample.clean, SIGMA, start(source, encoder, sample.clean)))
    return CleanFit(images, chi2(sample.clean - images).numpy())


def chi2(residual: Tensor) -> Tensor:
    """Per pixel, at SIGMA: [galaxy]."""
    return (residual / SIGMA).square().mean((-2, -1))


def signal_to_noise(
    settings: Validation, prior: Source, encoder: VAE | None, clean: Tensor, generator: torch.Generator
) -> pd.DataFrame:
    """chi^2 per pixel (mean and 16th, 84th percentile over galaxies) of fits to galaxies with white noise."""
    rows = []
    noise = torch.randn(clean.shape, generator=generator)
    for sd in track(settings.noise_sds, description="fits to galaxies"):
        noisy = clean + sd * noise
        row = {"noise_sd": sd}
        for name, source in variants(prior).items():
            w = reconstruct(source, noisy, sd, start(source, encoder, noisy))
            value = misfit(source, noisy, sd, w).numpy()
            low, high = np.quantile(value, (0.16, 0.84))
            row |= {name: float(value.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def power_ratio(clean: Tensor, fits: dict[str, CleanFit]) -> pd.DataFrame:
    """Power of the fits over that of the galaxies, at each spatial frequency [cycles per width of the image]."""
    truth = ring_power(clean)
    ratios = {name: ring_power(fit.images) / truth for name, fit in fits.items()}
    return pd.DataFrame({"frequency": np.arange(len(truth)), **ratios})


def ring_power(images: Tensor) -> np.ndarray:
    """Mean power of images [galaxy, n, n] in rings of spatial frequency 0 to n / 2 [cycles per width]."""
    n = images.shape[-1]
    power = torch.fft.fft2(images.double()).abs().square().mean(0).numpy()
    frequency = np.fft.fftfreq(n, 1 / n)
    ring = np.rint(np.hypot(frequency, frequency[:, None])).astype(int)
    within = ring <= n // 2
    return np.bincount(ring[within], power[within]) / np.bincount(ring[within])


def latent_use(test: Encoded) -> pd.DataFrame:
    """Mean Kullback-Leibler divergence [nat] of e(z_i | x) from N(0, 1) over the test galaxies, for each latent."""
    use = divergence(*test).mean(0)
    return pd.DataFrame({"latent": range(len(use)), "kl": use.numpy()})


def densities(prior: LearnedSource, training: Encoded, test: Encoded) -> pd.DataFrame:
    """How well densities of the latents agree with draws from e(z | x) of the test galaxies.

    `log_density`: its mean [nat]; `mismatch`: the greatest distance between the distribution of the draws, mapped to
    w, and a standard normal one (Kolmogorov-Smirnov), mean over directions; `expected`: that of as many normal draws.
    The Gaussian is fitted to draws of the training galaxies, as a flow is.
    """
    draws = draw(*test)
    maps: dict[str, GaussianLatent | FlowLatent] = {
        "standard normal": GaussianLatent(prior.latents),
        "Gaussian": gaussian_latent(draw(*training), 1.0),
        "source prior": prior.latent,
    }
    directions = torch.randn(prior.latents, DIRECTIONS)
    expected = normal_distance(torch.randn_like(draws), directions)
    rows = [
        {
            "density": name,
            "log_density": float(latent.log_density(draws).mean()),
            "mismatch": normal_distance(latent.normal(draws), directions),
            "expected": expected,
        }
        for name, latent in maps.items()
    ]
    return pd.DataFrame(rows)


def normal_distance(w: Tensor, directions: Tensor) -> float:
    """Kolmogorov-Smirnov distance of w [n, size] from a standard normal, mean over its entries and `directions`
    [size, k]."""
    along = torch.cat([w, w @ (directions / directions.norm(dim=0))], 1).numpy()
    return float(np.mean([kstest(column, "norm").statistic for column in along.T]))


def mark_unusual(
    table: pd.DataFrame, settings: Validation, encoder: VAE, means: Tensor, galaxies: Path, sample: Sample
) -> pd.DataFrame:
    """The table with `rarity` and `unlikeness`, and `unusual` where either is beyond that of the validation galaxies.

    `rarity`: minus the log density of the encoded mean, in the Gaussian of `means`, those of the training galaxies
    [galaxy, latents]; `unlikeness`: mean
    square of what the reconstruction leaves, in units of the squares of sigma_d and of the pixel noise together.
    """
    reference = open_galaxies(galaxies, "validation")
    latent = gaussian_latent(means, 1.0)

    def measures(images: Tensor, noise_sd: Tensor) -> dict[str, np.ndarray]:
        left = (images - encoder.reconstruct(images)).square().mean((-2, -1))
        rarity = -latent.log_density(encoded(encoder, images)[0])
        unlikeness = left / (encoder.decoder_sd**2 + noise_sd.square())
        return {"rarity": rarity.numpy(), "unlikeness": unlikeness.numpy()}

    seen = measures(galaxy_images(galaxies, "validation"), noise_of(reference))
    own = measures(sample.images, sample.noise_sd)
    beyond = [own[name] > np.quantile(seen[name], settings.unusual_quantile) for name in own]
    return table.assign(**own, unusual=np.logical_or(*beyond))


def turned_galaxies(
    settings: Validation, prior: Source, encoder: VAE | None, sample: Sample
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Some galaxies turned, reconstructed and turned back: [galaxy, angle, 64, 64], and the scatter about no turn.

    `rms`: of the difference from the reconstruction of the galaxy that is not turned, in units of SIGMA, within the
    circle that every turn keeps.
    """
    rows = evenly(len(sample.clean), ROTATED)
    angles = 360 * np.arange(settings.rotations) / settings.rotations
    originals = sample.clean[rows]
    turned = torch.stack([turn(originals, angle) for angle in angles], 1)
    flat = turned.flatten(0, 1)
    if encoder is not None:
        models = encoder.reconstruct(flat)
    else:
        models = prior(reconstruct(prior, flat, SIGMA, start(prior, None, flat)))
    models = models.unflatten(0, turned.shape[:2])
    back = torch.stack([turn(models[:, i], -angle) for i, angle in enumerate(angles)], 1)
    axis = pixel_axis()
    circle = torch.hypot(axis, axis[:, None]) < 0.45
    rms = ((back - back[:, :1]) / SIGMA)[..., circle].square().mean(-1).sqrt()
    table = pd.DataFrame(
        {
            "name": np.repeat(sample.table["name"].to_numpy()[rows], len(angles)),
            "angle": np.tile(angles, len(rows)),
            "rms": rms.flatten().numpy(),
        }
    )
    return {"turned": turned, "model": models, "turned_back": back}, table[table["angle"] > 0]


def turn(images: Tensor, angle: float) -> Tensor:
    """Images [galaxy, n, n] turned counter-clockwise by `angle` [deg] about their centre, zero beyond their frame."""
    pictures = rotate(images.numpy(), -angle, axes=(1, 2), reshape=False, order=3)
    return torch.from_numpy(pictures).float()


def write_pictures(pictures: dict[str, Tensor], turned: dict[str, Tensor], draws: Tensor, out: Path) -> None:
    """All images, as one Zarr group."""
    data = {name: xr.DataArray(image.numpy(), dims=("galaxy", "y", "x")) for name, image in pictures.items()}
    data |= {name: xr.DataArray(image.numpy(), dims=("rotated", "angle", "y", "x")) for name, image in turned.items()}
    data["draw"] = xr.DataArray(draws.numpy(), dims=("draws", "y", "x"))
    xr.Dataset(data).to_zarr(out, zarr_format=3, consolidated=False)
