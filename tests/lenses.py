"""Small lenses for tests of models, searches and samplers, in double precision."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lenspipe.catalogue.batch import LensBatch
from lenspipe.config import Config
from lenspipe.fit.model import LensModel
from lenspipe.image.psf import gaussian_kernel
from lenspipe.image.simulator import Optics
from lenspipe.lens.table import build_table
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import Source

NOISE = 0.05
TABLE = build_table(65, (16, 0.1), (10, 1.1, 2.9))
FIXED = {"gamma": 2, "center_x": 0, "center_y": 0, "gamma1": 0, "gamma2": 0.03, "source_size": 2, "source_flux": 1}


class Blobs(Source):
    """Three Gaussians whose brightness the unknowns set."""

    size = 3

    def forward(self, w: Tensor) -> Tensor:
        y, x = torch.meshgrid(*[torch.arange(64, dtype=w.dtype) - 31.5] * 2, indexing="ij")
        places = ((0, 0, 8.0), (9, 4, 4.0), (-6, 7, 3.0))
        blobs = torch.stack([torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sd**2)) for a, b, sd in places])
        return torch.einsum("lk,kyx->lyx", 0.4 + 0.2 * torch.tanh(w), blobs)


def lens_batch() -> LensBatch:
    """Three small empty images, in float64; one has a masked strip."""
    n, lenses = 24, 3
    usable = torch.ones(lenses, n, n, dtype=torch.bool)
    usable[1, :4] = False
    return LensBatch(
        ("a", "b", "c"),
        torch.zeros(lenses, n, n).double(),
        torch.full((lenses, n, n), NOISE).double(),
        usable,
        torch.from_numpy(gaussian_kernel(1.0)).expand(lenses, -1, -1),
        torch.full((lenses,), 0.2).double(),
        torch.tensor([1.0, 1.0, 2.0]).double(),
        torch.tensor([1.0, 3.0, 2.0]).double(),
    )


def small_lenses() -> tuple[LensModel, Tensor]:
    """Three small lenses drawn from the model, in float64, and their true unknowns; deflections by a table."""
    generator = torch.Generator().manual_seed(5)
    source = Blobs()
    batch = lens_batch()
    priors = PriorMap(Config().priors.expressions())
    blank = LensModel(batch, priors, source, Optics(TABLE))
    truth = 0.5 * torch.randn(len(batch), blank.size, generator=generator, dtype=torch.float64)
    noise = NOISE * torch.randn(batch.image.shape, generator=generator, dtype=torch.float64)
    image = blank.image(truth) * batch.flux_unit[:, None, None] + noise
    return LensModel(replace(batch, image=image), priors, source, Optics(TABLE)), truth


def easy_lenses(lenses: int, noise: float, noise_drawn: float = 1.0) -> tuple[LensModel, Tensor]:
    """At most three lenses with eight unknowns: theta_E, e1, e2, the source's position and three brightnesses.

    noise_drawn: how much of the noise [sd] is in the image. Returns their model and true unknowns [lens, 8].
    """
    priors = PriorMap(Config().priors.expressions() | {name: parse_prior(str(value)) for name, value in FIXED.items()})
    batch = lens_batch().take(torch.arange(lenses))
    batch = replace(batch, noise=torch.full_like(batch.noise, noise) * batch.flux_unit[:, None, None])
    blank = LensModel(batch, priors, Blobs(), Optics(TABLE))
    generator = torch.Generator().manual_seed(5)
    truth = 0.5 * torch.randn(lenses, blank.size, generator=generator, dtype=torch.float64)
    drawn = noise_drawn * noise * torch.randn(batch.image.shape, generator=generator, dtype=torch.float64)
    image = (blank.image(truth) + drawn) * batch.flux_unit[:, None, None]
    return LensModel(replace(batch, image=image), priors, Blobs(), Optics(TABLE)), truth
