"""Every prior as a map from a standard normal: theta = T(w), w ~ N(0, 1).

By quantiles, but for a half normal, which is folded: theta = scale |w|. An image that is linear in it is linear in w,
and amplitudes that stand in for each other lie on a plane, not in a bent valley a thousand times as long as it is wide.

By quantiles a truncated normal is flat near its ends, where chains would go a long way for nothing. They move in
unknowns in which it is a normal one, theta = mean + sd x, between walls: `PriorMap.straight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import ndtri

from lenspipe.prior_expression import PriorExpression, shared
from lenspipe.pyro_prior import ndtr, quantile

NEAREST = 1e-14  # the share of a truncated normal that is beyond an unknown, at least


def from_normal(prior: PriorExpression, w: Tensor) -> Tensor:
    """The value whose quantile in the prior is that of `w` in the standard normal; any shape. Smooth, increasing.

    Of a half normal `scale |w|`, with the slope at 0 of what is above.
    """
    if prior.distribution == "HalfNormal":
        (scale,) = (*prior.arguments, *dict(prior.keywords).values())
        return scale * torch.where(w < 0, -w, w)
    if prior.is_pyros:
        return quantile(prior.distribution, prior.arguments, prior.keywords, w)
    match prior.distribution:
        case "Normal":
            return prior.mean + prior.sd * w
        case "LogNormal":
            return prior.median * torch.exp(prior.sd * w)
        case "Uniform":
            return prior.low + (prior.high - prior.low) * ndtr(w)
        case "TruncatedNormal":
            low, high = _bounds(prior)
            below, above = (_ndtr(bound) for bound in (low, high))
            # below the mean counted from the left, above it from the right: neither tail is rounded off
            left = ndtri(below + (above - below) * ndtr(w))
            right = -ndtri(_ndtr(-high) + (_ndtr(-low) - _ndtr(-high)) * ndtr(-w))
            inside = torch.where(left < 0, left, right)
            return prior.mean + prior.sd * inside
        case "Fixed":
            return torch.full_like(w, prior.value)
        case other:
            raise ValueError(f"no map from a standard normal for {other}")


def _bounds(prior: PriorExpression) -> tuple[float, float]:
    """The ends of a truncated normal in units of its standard deviation from its mean."""
    return (prior.low - prior.mean) / prior.sd, (prior.high - prior.mean) / prior.sd


def _ndtr(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


class Wall(NamedTuple):
    """Of the unknown in a column: where it is, side * w + offset >= 0; side is 1 or -1."""

    column: int
    side: float
    offset: float

    def distance(self, w: Tensor) -> Tensor:
        """How far inside w [..., size] are: [...]."""
        return self.side * w[..., self.column] + self.offset


class PriorMap:
    """The priors of the named parameters of a lens, together: w [lens, free] to {name: [lens]}.

    Computed in float64, where a quantile near 0 or 1 keeps its digits, and returned in the precision of `w`. Those that
    share the value of another are left out; `shared` has each with the one at the end of its chain, for `canonical`.
    Those at the places `folded` have the same value at w and -w. Chains keep within the `walls`: to w >= 0 of these
    and, where the map is of straight unknowns, to what a truncated normal leaves.
    """

    def __init__(self, priors: Mapping[str, PriorExpression], is_straight: bool = False):
        self.priors = dict(priors)
        self.own = {name: prior for name, prior in self.priors.items() if prior.distribution != "Shared"}
        self.free = [name for name, prior in self.own.items() if prior.distribution != "Fixed"]
        self.folded = [i for i, name in enumerate(self.free) if self.own[name].distribution == "HalfNormal"]
        self.shared = shared(self.priors)
        self.truncated = [i for i, name in enumerate(self.free) if self.own[name].distribution == "TruncatedNormal"]
        self.is_straight = is_straight
        turns = [math.pi / self.own[name].sd if self._turns(name) else math.inf for name in self.free]
        self.turns = torch.tensor(turns, dtype=torch.float64)
        self.walls = [Wall(i, 1.0, 0.0) for i in self.folded]
        if is_straight:
            for i in self.truncated:
                low, high = _bounds(self.own[self.free[i]])
                self.walls += [Wall(i, side, -side * end) for side, end in ((1.0, low), (-1.0, high))]

    def _turns(self, name: str) -> bool:
        prior = self.own[name]
        return name.rpartition("_")[2] == "phi" and prior.distribution == "Normal" and not prior.is_pyros

    def offset(self, offset: Tensor) -> Tensor:
        """Differences [..., free] of unknowns, those of position angles between directions: phi + pi is phi again.

        For priors that reach that far and have steps of one size: normal ones.
        """
        turns = self.turns.to(offset)
        return torch.where(turns.isfinite(), offset - turns * (offset / turns).round(), offset)

    def __call__(self, w: Tensor) -> dict[str, Tensor]:
        return self.named(self.values(w))

    def values(self, w: Tensor) -> Tensor:
        """The free parameters [..., free], in their order, of w [..., free]."""
        columns = [self._value(self.own[name], at) for name, at in zip(self.free, w.double().unbind(-1), strict=True)]
        return torch.stack(columns, -1).to(w.dtype) if columns else w

    def _value(self, prior: PriorExpression, w: Tensor) -> Tensor:
        if self.is_straight and prior.distribution == "TruncatedNormal":
            return (prior.mean + prior.sd * w).clamp(prior.low, prior.high)  # rounding may be outside of the wall
        return from_normal(prior, w)

    def straight(self) -> PriorMap:
        """The same priors of the unknowns x in which a truncated normal is linear; itself where there is none.

        Their density is that of standard normals within the walls, but for a constant.
        """
        return PriorMap(self.priors, is_straight=True) if self.truncated else self

    def to_straight(self, w: Tensor) -> Tensor:
        """Those unknowns [n, free] of w [n, free]."""
        columns = list(w.double().unbind(-1))
        for i in self.truncated:
            prior = self.own[self.free[i]]
            columns[i] = (from_normal(prior, columns[i]) - prior.mean) / prior.sd
        return torch.stack(columns, -1).to(w.dtype) if columns else w

    def from_straight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """w [n, free] of those, and log |dw / dx| [n] but for a constant, float64."""
        columns, log_volume = list(x.double().unbind(-1)), x.new_zeros(len(x), dtype=torch.float64)
        for i in self.truncated:
            low, high = _bounds(self.own[self.free[i]])
            at = columns[i].clamp(low, high)
            below, above = ((ndtr(side * at) - _ndtr(side * end)) for side, end in ((1, low), (-1, high)))
            left, right = (part.clamp(min=NEAREST) / (_ndtr(high) - _ndtr(low)) for part in (below, above))
            columns[i] = torch.where(left < right, ndtri(left), -ndtri(right))
            log_volume = log_volume + 0.5 * (columns[i].square() - at.square())
        return torch.stack(columns, -1).to(x.dtype) if columns else x, log_volume

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """All parameters by name, the fixed ones too, of the values of the free ones [..., free]."""
        column = dict(zip(self.free, values.unbind(-1), strict=True))
        blank = torch.zeros(values.shape[:-1], dtype=values.dtype, device=values.device)
        return {name: column[name] if name in column else from_normal(prior, blank) for name, prior in self.own.items()}

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the free parameters and their slopes with respect to w, [..., free] each."""
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            values = self.values(w)
            (slopes,) = torch.autograd.grad(values.sum(), w)
        return values.detach(), slopes
