"""Pyro's scalar distributions as priors: each as a map from a standard normal, and its support.

Needed only where a prior names one of them: this module, which imports torch and Pyro, is imported then.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro.distributions
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.special import log_ndtr

Arguments = tuple[float, ...]
Keywords = tuple[tuple[str, float], ...]


def ndtr(w: Tensor) -> Tensor:
    """The share of a standard normal below w; torch's own has lost 2 % at w = -8 and everything at -9."""
    return torch.erfc(-math.sqrt(0.5) * w) / 2


def _joined(w: Tensor, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]) -> Tensor:
    """`left` below the median and `right` above it, each counting from its own tail, neither seen beyond the median."""
    below = w < 0
    return torch.where(below, left(torch.where(below, w, 0.0)), right(torch.where(below, 0.0, w)))


def _mirrored(w: Tensor, left: Callable[[Tensor], Tensor]) -> Tensor:
    """`left` below the median and its mirror image above."""
    return _joined(w, left, lambda v: -left(-v))


# Quantiles by w, with Pyro's names of the arguments: from the logarithms of the shares below and above w, or each half
# from its own tail, since a share near 1 has no digits left.
QUANTILES: dict[str, Callable[..., Tensor]] = {
    "Cauchy": lambda w, loc, scale: loc + scale * _mirrored(w, lambda v: -1 / torch.tan(math.pi * ndtr(v))),
    "Exponential": lambda w, rate: -log_ndtr(-w) / rate,
    "GeneralizedPareto": lambda w, loc, scale, concentration: (
        loc + scale * (torch.expm1(-concentration * log_ndtr(-w)) / concentration if concentration else -log_ndtr(-w))
    ),
    "Gumbel": lambda w, loc, scale: loc - scale * torch.log(-log_ndtr(w)),
    "HalfCauchy": lambda w, scale: (
        scale * _joined(w, lambda v: torch.tan(math.pi / 2 * ndtr(v)), lambda v: 1 / torch.tan(math.pi / 2 * ndtr(-v)))
    ),
    "Kumaraswamy": lambda w, concentration1, concentration0: (
        (-torch.expm1(log_ndtr(-w) / concentration0)) ** (1 / concentration1)
    ),
    "Laplace": lambda w, loc, scale: loc + scale * _mirrored(w, lambda v: log_ndtr(v) + math.log(2)),
    "Logistic": lambda w, loc, scale: loc + scale * (log_ndtr(w) - log_ndtr(-w)),
    "Pareto": lambda w, scale, alpha: scale * torch.exp(-log_ndtr(-w) / alpha),
    "SkewLogistic": lambda w, loc, scale, asymmetry=1.0: (
        loc + scale * (log_ndtr(w) / asymmetry - torch.log(-torch.expm1(log_ndtr(w) / asymmetry)))
    ),
    "SoftLaplace": lambda w, loc, scale: (
        loc + scale * _mirrored(w, lambda v: torch.log(torch.tan(math.pi / 2 * ndtr(v))))
    ),
    "Weibull": lambda w, scale, concentration: scale * (-log_ndtr(-w)) ** (1 / concentration),
}

KNOWN = f"known are those of Pyro's with an inverse CDF, such as {', '.join(QUANTILES)}"


def quantile(name: str, arguments: Arguments, keywords: Keywords, w: Tensor) -> Tensor:
    """The value whose quantile in the distribution is that of `w` in the standard normal; w: float64, any shape.

    Those of `QUANTILES` are right to 1e-14 of their distance from the median, those without a `loc` to 1e-14 of
    themselves too (measured, as their derivatives to 1e-11, for |w| <= 8), bijective transforms of a normal to
    rounding. Any other is as good as Pyro's `icdf`, which knows shares near 1 to 1e-16: on an unbounded side its tail
    is right up to w = 5 or so. Raises NotImplementedError where it has none.
    """
    if name in QUANTILES:
        return QUANTILES[name](w, *arguments, **dict(keywords))
    distribution = _built(name, arguments, keywords)
    base, transforms = getattr(distribution, "base_dist", None), getattr(distribution, "transforms", ())
    if isinstance(distribution, Normal):
        base = distribution
    if not isinstance(base, Normal) or not all(transform.bijective for transform in transforms):
        return distribution.icdf(ndtr(w))
    value = base.loc + base.scale * w
    for transform in transforms:
        value = transform(value)
    return value


@cache
def support(name: str, arguments: Arguments, keywords: Keywords) -> tuple[float, float]:
    """The interval outside which the density is zero.

    Raises ValueError, with what was found and what is accepted, where Pyro has no such distribution or refuses the
    arguments, and where it is not one of a single real number with an inverse CDF or a normal behind it.
    """
    distribution = _built(name, arguments, keywords)
    if distribution.event_shape:
        raise ValueError(f"{name} is not a distribution of one number; {KNOWN}")
    try:
        limits = distribution.support
        values = quantile(name, arguments, keywords, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    except NotImplementedError:
        limits = None
    if limits is None or limits.is_discrete:
        raise ValueError(f"Pyro's {name} has no continuous inverse CDF and is no one-to-one map of a normal; {KNOWN}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has infinite quantiles: {values.tolist()} at -1, 0 and 1 sigma")
    return float(getattr(limits, "lower_bound", -math.inf)), float(getattr(limits, "upper_bound", math.inf))


@cache
def _built(name: str, arguments: Arguments, keywords: Keywords) -> Distribution:
    kind = getattr(pyro.distributions, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Distribution)):
        raise ValueError(f"unknown distribution {name!r}; {KNOWN}")
    taken = [p for p in inspect.signature(kind.__init__).parameters.values() if p.name not in ("self", "validate_args")]
    try:
        given = inspect.Signature(taken).bind(*arguments, **dict(keywords)).arguments
    except TypeError as error:
        raise ValueError(f"{error}; expected {name}({', '.join(p.name for p in taken)})") from None
    if not all(map(math.isfinite, given.values())):
        raise ValueError(f"expected finite numbers, found {given}")
    numbers: dict[str, Any] = {key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()}
    try:
        return kind(**numbers, validate_args=True)
    except Exception as error:  # whatever else it refuses: numbers beyond its constraints, or where it takes vectors
        raise ValueError(f"Pyro refuses the arguments of {name}: {' '.join(str(error).split())}") from None
