"""A Sersic profile as the source."""

from __future__ import annotations

import torch
from torch import Tensor

from lenspipe.config import SersicSource as Settings
from lenspipe.image.light import elliptical_radius2, sersic_b
from lenspipe.lens.coordinates import axis_ratio
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import FunctionSource

CORE = 3e-4  # radius within which the cusp is rounded off [widths of the image]
UNIT = 1 / 128  # where the brightness is 1: half a pixel of an image of 64 from the centre


class SersicSource(FunctionSource):
    """A Sersic profile, of brightness 1 near its centre, at the radius UNIT; its shape from the priors in config."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.priors = PriorMap(settings.expressions())
        self.size = len(self.priors.free)
        self.pixels = settings.pixels

    def brightness(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self.profile(self.priors(w), u, v)

    def profile(self, p: dict[str, Tensor], u: Tensor, v: Tensor) -> Tensor:
        """Brightness [n, ny, nx] of parameters [n] at u, v [n, ny, nx]."""
        e1, e2, R_sersic, n_sersic = (p[name][:, None, None] for name in ("e1", "e2", "R_sersic", "n_sersic"))
        q, phi = axis_ratio(e1, e2)
        zero = torch.zeros_like(e1)
        radius2 = elliptical_radius2(u, v, q, phi, zero, zero) + CORE**2
        fall = (radius2 / R_sersic**2) ** (0.5 / n_sersic) - (UNIT / R_sersic) ** (1 / n_sersic)
        return torch.exp(-sersic_b(n_sersic) * fall)
