"""A Sersic profile with shapelets on top, for what is not smooth in the source."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lenspipe.config import ShapeletSource as Settings
from lenspipe.source.base import Source
from lenspipe.source.sersic import SersicSource

SKETCHED = 4  # highest order of the sketch


class ShapeletSource(SersicSource):
    """A Sersic profile and the shapelets of orders 2 to `order` (Refregier 2003, eqs. 1 and 18), as wide as it is.

    w: first the unknowns of the profile, then the coefficients, by order.
    """

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.settings, self.profile_size = settings, self.size
        self.order = settings.order
        self.orders = [(n - m, m) for n in range(2, settings.order + 1) for m in range(n + 1)]
        self.sds = [settings.sd * (2 / (a + b)) ** settings.decline for a, b in self.orders]
        self.size += len(self.orders)

    def forward(self, w: Tensor) -> Tensor:
        p = self.priors(w[:, : self.profile_size])
        waves = hermite_functions(self.axis.to(w.dtype) / p["R_sersic"][:, None], self.order)
        x, y = (waves[:, [pair[i] for pair in self.orders]] for i in (0, 1))
        weights = w[:, self.profile_size :] * w.new_tensor(self.sds)
        return self.profile(p) + torch.einsum("nk,nky,nkx->nyx", weights, y, x)

    def sketch(self, components: int) -> Source:
        """The same without its higher orders: with all, starts far from the truth find ways to fit it in part."""
        settings = self.settings.model_copy(update={"order": min(self.order, SKETCHED)})
        return ShapeletSource(settings).to(self.axis.device)

    def from_sketch(self, w: Tensor) -> Tensor:
        """The same, with higher orders at zero: coefficients go by their order."""
        return torch.cat([w, w.new_zeros(*w.shape[:-1], self.size - w.shape[-1])], -1)


def hermite_functions(x: Tensor, order: int) -> Tensor:
    """H_k(x) exp(-x^2 / 2) / sqrt(2^k k!) for k = 0 to `order`, x: [n, pixel]: [n, order + 1, pixel].

    Those of Refregier 2003, eq. 1, times pi^(1/4): the first one is 1 at its centre.
    """
    waves = [torch.exp(-x.square() / 2)]
    for k in range(1, order + 1):
        before = math.sqrt((k - 1) / k) * waves[k - 2] if k > 1 else torch.zeros_like(x)
        waves.append(math.sqrt(2 / k) * x * waves[k - 1] - before)
    return torch.stack(waves, 1)
