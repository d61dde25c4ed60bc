"""Every prior as a map from a standard normal: theta = T(w), w ~ N(0, 1).

By quantiles, but for a half normal, which is folded: theta = scale |w|. An image that is linear in it is linear in w,
and amplitudes that stand in for each other lie on a plane, not in a bent valley a thousand times as long as it is wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.special import ndtri

from lenspipe.prior_expression import PriorExpression, shared
from lenspipe.pyro_prior import ndtr, quantile


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
            low, high = ((bound - prior.mean) / prior.sd for bound in (prior.low, prior.high))
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


def _ndtr(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


class PriorMap:
    """The priors of the named parameters of a lens, together: w [lens, free] to {name: [lens]}.

    Computed in float64, where a quantile near 0 or 1 keeps its digits, and returned in the precision of `w`. Those that
    share the value of another are left out; `shared` has each with the one at the end of its chain, for `canonical`.
    Those at the places `folded` have the same value at w and -w.
    """

    def __init__(self, priors: Mapping[str, PriorExpression]):
        self.priors = dict(priors)
        self.own = {name: prior for name, prior in self.priors.items() if prior.distribution != "Shared"}
        self.free = [name for name, prior in self.own.items() if prior.distribution != "Fixed"]
        self.folded = [i for i, name in enumerate(self.free) if self.own[name].distribution == "HalfNormal"]
        self.shared = shared(self.priors)

    def __call__(self, w: Tensor) -> dict[str, Tensor]:
        return self.named(self.values(w))

    def values(self, w: Tensor) -> Tensor:
        """The free parameters [..., free], in their order, of w [..., free]."""
        columns = [from_normal(self.own[name], at) for name, at in zip(self.free, w.double().unbind(-1), strict=True)]
        return torch.stack(columns, -1).to(w.dtype) if columns else w

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
