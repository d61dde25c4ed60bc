"""A Sersic profile with shapelets on top, for what is not smooth in the source."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lenspipe.config import ShapeletSource as Settings
from lenspipe.source.base import Source, pushed_forward
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
        placed = torch.zeros(len(self.orders), self.order + 1, self.order + 1)
        for k, (x, y) in enumerate(self.orders):
            placed[k, y, x] = self.sds[k]
        self.placed = nn.Buffer(placed, persistent=False)

    def brightness(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        p = self.priors(w[:, : self.profile_size])
        return self.profile(p, u, v) + self.waves(p, w[:, self.profile_size :], u, v)

    def waves(self, p: dict[str, Tensor], w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The sum of the shapelets, [n, ny, nx]; w: their unknowns."""
        x, y = self.functions(p, u, v)
        weights = torch.einsum("nk,kyx->nyx", w, self.placed.to(w))
        return ((weights @ x.flatten(2)).view_as(y) * y).sum(1)

    def functions(self, p: dict[str, Tensor], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those along x and y that shapelets are products of, by order: two [n, order + 1, ny, nx]."""
        width = p["R_sersic"][:, None, None]
        x, y = (hermite_functions((axis / width).flatten(1), self.order) for axis in (u, v))
        return x.unflatten(2, u.shape[1:]), y.unflatten(2, u.shape[1:])

    def slopes(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Derivatives with respect to w: [n, size, ny, nx]; those of the coefficients are the shapelets."""
        of_profile, coefficients = w[:, : self.profile_size], w[:, self.profile_size :]

        def brightness(of_profile: Tensor) -> tuple[Tensor]:
            return (self.brightness(torch.cat([of_profile, coefficients], 1), u, v),)

        x, y = self.functions(self.priors(of_profile), u, v)
        first, second = zip(*self.orders, strict=True)
        shapelets = w.new_tensor(self.sds)[:, None, None] * x[:, list(first)] * y[:, list(second)]
        return torch.cat([pushed_forward(brightness, of_profile)[0], shapelets], 1)

    def sketch(self, components: int) -> Source:
        """The same without its higher orders: with all, starts far from the truth find ways to fit it in part."""
        settings = self.settings.model_copy(update={"order": min(self.order, SKETCHED)})
        return ShapeletSource(settings).to(self.placed.device)

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
