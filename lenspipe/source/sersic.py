"""A Sersic profile as the source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lenspipe.config import SersicSource as Settings
from lenspipe.image.light import elliptical_radius2, sersic_b
from lenspipe.lens.coordinates import axis_ratio
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import Source, pixel_axis

CORE = 0.5  # radius within which the cusp is rounded off [px]


class SersicSource(Source):
    """A Sersic profile at the centre of the image, of brightness 1 there; its shape from the priors in config."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.priors = PriorMap(settings.expressions())
        self.size = len(self.priors.free)
        self.axis = nn.Buffer(pixel_axis(settings.pixels), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        return self.profile(self.priors(w))

    def profile(self, p: dict[str, Tensor]) -> Tensor:
        """Images [n, pixels, pixels] of parameters [n]."""
        e1, e2, R_sersic, n_sersic = (p[name][:, None, None] for name in ("e1", "e2", "R_sersic", "n_sersic"))
        q, phi = axis_ratio(e1, e2)
        axis, zero = self.axis.to(e1.dtype), torch.zeros_like(e1)
        core = CORE / len(axis)
        radius2 = elliptical_radius2(axis + zero, axis[:, None] + zero, q, phi, zero, zero) + core**2
        fall = (radius2 / R_sersic**2) ** (0.5 / n_sersic) - (core / R_sersic) ** (1 / n_sersic)
        return torch.exp(-sersic_b(n_sersic) * fall)
