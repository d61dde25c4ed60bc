"""Laplace's approximation to the log evidence of a solution, with what walls leave of it.

Where unknowns end at a wall, as amplitudes of lens light do at 0, there is only part of the Gaussian about a maximum:
half of it and less where the maximum is at the wall.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_ndtr
from torch import Tensor

from lenspipe.fit.model import LensModel

SWEEPS = 100  # over the walls, at most
SETTLED = 1e-4  # change in a sweep that is the last [nat]
FAR = 30.0  # standard deviations beyond a wall from which on series serve


@torch.no_grad()
def laplace(model: LensModel, w: Tensor, log_density: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hessians [n, size, size] of minus the log posterior at maxima w [n, size], and their log evidence [n]; float64.

    Of the search's unknowns, whose prior is normal; folded ones are at or above 0. log_density: [n], there; rows: [n],
    the lens of the model that each is of. The log posterior is taken for a quadratic, with a slope along what is held
    at its wall, where w >= 0. The evidence is but for a constant of the data, and minus infinity where the log density
    is not finite or the Hessian, by rounding, not positive definite.
    """
    _, slope, curvature = model.normal_equations(w, rows)
    gradient, hessian = -slope - w.double(), curvature + torch.eye(w.shape[1], dtype=torch.float64, device=w.device)
    root, failed = torch.linalg.cholesky_ex(hessian)
    evidence = log_density - root.diagonal(dim1=1, dim2=2).log().sum(-1)
    if folded := model.priors.folded:
        covariance = torch.cholesky_inverse(root)
        held = torch.zeros_like(w, dtype=torch.bool)
        held[:, folded] = (w[:, folded] <= 0) & (gradient[:, folded] < 0)
        gradient = torch.where(held, gradient, 0.0)
        beyond = (covariance @ gradient[..., None])[..., 0]  # from w to the top of the Gaussian
        tops, spreads = (w.double() + beyond)[:, folded].cpu(), covariance[:, folded][:, :, folded].cpu()
        inside = [log_orthant(top.numpy(), spread.numpy()) for top, spread in zip(tops, spreads, strict=True)]
        share = torch.tensor(inside, dtype=torch.float64, device=w.device) + len(folded) * math.log(2)  # half normals
        evidence = evidence + 0.5 * (gradient * beyond).sum(-1) + share
    return hessian, torch.where((failed > 0) | evidence.isnan(), -torch.inf, evidence)


@np.errstate(invalid="ignore")
def log_orthant(mean: NDArray, covariance: NDArray) -> float:
    """Log of the probability that all of x [size] from a normal distribution are positive; NaN where it is none.

    By expectation propagation (Minka 2001; Cunningham, Hennig & Lacoste-Julien 2011, arXiv:1111.6832): every wall in
    turn becomes the Gaussian factor exp(shift x - width x^2 / 2) that gives x the mean and variance which the wall
    gives it, the other factors being what they are.
    """
    size, precision = len(mean), np.linalg.inv(covariance)
    width, shift, pull = np.zeros(size), np.zeros(size), precision @ mean
    without_width, without_shift, log_share = np.empty(size), np.empty(size), np.empty(size)
    total = math.inf
    for _ in range(SWEEPS):
        spread = np.linalg.inv(precision + np.diag(width))
        for i in range(size):
            at = spread[i] @ (pull + shift)
            without_width[i], without_shift[i] = 1 / spread[i, i] - width[i], at / spread[i, i] - shift[i]
            sd = without_width[i] ** -0.5
            depth = without_shift[i] * sd
            log_share[i] = log_ndtr(depth)
            push, left = truncated(depth)
            more = (1 / left - 1) / sd**2 - width[i]
            width[i], shift[i] = width[i] + more, (depth + push) / (left * sd) - without_shift[i]
            spread -= np.outer(spread[i], spread[i]) * (more / (1 + more * spread[i, i]))
        square = (shift + without_shift) ** 2 / (width + without_width) - without_shift**2 / without_width
        factors = log_share + 0.5 * np.log1p(width / without_width) - 0.5 * square
        middle = np.linalg.solve(precision + np.diag(width), pull + shift)
        before, total = total, factors.sum() + 0.5 * ((pull + shift) @ middle - mean @ pull)
        total -= 0.5 * np.linalg.slogdet(np.eye(size) + covariance * width)[1]
        if abs(total - before) < SETTLED:
            break
    return float(total)


def truncated(depth: float) -> tuple[float, float]:
    """Of a standard normal that is left from `-depth` on: by how much its mean is above 0, and its variance."""
    if depth < -FAR:
        i = depth**-2.0
        return -depth * (1 + i - 2 * i**2 + 10 * i**3), i * (1 - 6 * i + 50 * i**2)
    push = math.exp(-0.5 * depth**2 - 0.5 * math.log(2 * math.pi) - log_ndtr(depth))
    return push, 1 - push * (push + depth)
