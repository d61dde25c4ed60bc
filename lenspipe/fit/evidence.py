"""Laplace's approximation to the log evidence of a solution, with what walls leave of it.

Where unknowns end at a wall, as amplitudes of lens light do at 0, there is only part of the Gaussian about a maximum:
half of it and less where the maximum is at the wall.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp, ndtri_exp
from scipy.stats import qmc
from torch import Tensor

from lenspipe.fit.model import LensModel

ROUNDING = 1e-14  # least share of a variance that is left once others are known
POINTS = 10  # log2 of how many points an orthant's probability is averaged over


@torch.no_grad()
def log_evidence(
    model: LensModel, w: Tensor, log_density: Tensor, hessian: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Log evidence [n] but for a constant of the data, float64, of maxima w [n, size], folded unknowns at or above 0.

    Minus infinity where the log density is not finite or the Hessian, by rounding, not positive definite.
    log_density: [n], there; hessian: [n, size, size], of minus it; rows: [n], the lens of the model that each is of.
    The log posterior is taken for a quadratic, with a slope along what is held at its wall, where w >= 0.
    """
    whole, folded = log_density - 0.5 * torch.logdet(hessian), model.priors.folded
    if not folded:
        return torch.where(whole.isnan(), -torch.inf, whole)
    gradient = model.value_and_gradient(w, rows)[1].double()
    held = torch.zeros_like(w, dtype=torch.bool)
    held[:, folded] = (w[:, folded] <= 0) & (gradient[:, folded] < 0)
    slope, covariance = torch.where(held, gradient, 0.0), torch.linalg.inv(hessian)
    beyond = (covariance @ slope[..., None])[..., 0]  # from w to the top of the Gaussian
    tops, spreads = (w.double() + beyond)[:, folded], covariance[:, folded][:, :, folded]
    inside = [log_orthant(top.numpy(), spread.numpy()) for top, spread in zip(tops.cpu(), spreads.cpu(), strict=True)]
    share = torch.tensor(inside, dtype=torch.float64, device=w.device) + len(folded) * math.log(2)  # of half normals
    within = whole + 0.5 * (slope * beyond).sum(-1) + share
    return torch.where(within.isnan(), -torch.inf, within)


@np.errstate(invalid="ignore")
def log_orthant(mean: NDArray, covariance: NDArray) -> float:
    """Log of the probability that all of x [size] from a normal distribution are positive; NaN where it is none.

    By conditional probabilities, each averaged over quasi-random draws of those before it (Genz 1992), the least likely
    first (Gibson, Glasbey & Elston 1994). Always the same points.
    """
    size = len(mean)
    mean, root, expected = mean.copy(), np.zeros((size, size)), np.zeros(size)
    order = np.arange(size)
    for k in range(size):
        alone = covariance[order[k:], order[k:]]
        spread = np.sqrt(np.maximum(alone - np.square(root[k:, :k]).sum(1), ROUNDING * alone))
        chosen = k + np.argmin((mean[order[k:]] + root[k:, :k] @ expected[:k]) / spread)
        root[k, k] = spread[chosen - k]
        pair = np.array([k, chosen])
        order[pair], root[pair, :k] = order[pair[::-1]], root[pair[::-1], :k]
        root[k + 1 :, k] = (covariance[order[k + 1 :], order[k]] - root[k + 1 :, :k] @ root[k, :k]) / root[k, k]
        far = (mean[order[k]] + root[k, :k] @ expected[:k]) / root[k, k]
        expected[k] = np.exp(-0.5 * far**2 - 0.5 * np.log(2 * np.pi) - log_ndtr(far))
    log_uniform = np.log(qmc.Sobol(size, rng=0).random_base2(POINTS).T)
    drawn, log_share = np.empty_like(log_uniform), np.zeros(2**POINTS)
    for k in range(size):
        log_inside = log_ndtr((mean[order[k]] + root[k, :k] @ drawn[:k]) / root[k, k])
        drawn[k] = -ndtri_exp(log_uniform[k] + log_inside)
        log_share += log_inside
    return float(logsumexp(log_share) - POINTS * np.log(2))
