"""Small lenses whose posterior is nearly Gaussian, in double precision, for tests of searches and samplers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lenspipe.config import Config
from lenspipe.fit.model import LensModel
from lenspipe.image.simulator import Optics
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from tests.unit.test_fit import TABLE, Blobs, lens_batch

FIXED = {"gamma": 2, "center_x": 0, "center_y": 0, "gamma1": 0, "gamma2": 0.03, "source_size": 2, "source_flux": 1}


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
