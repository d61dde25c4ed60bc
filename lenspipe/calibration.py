"""Simulation-based calibration: whether posteriors of data drawn from the model have the right place and width.

Truths drawn from the prior, data from the truths: among independent draws of right posteriors the ranks of the truths
are uniform (Talts et al. 2018; Modrák et al. 2023), for every quantity of unknowns and data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

BINS = 10
TESTS = 3  # of one parameter: of bins, of the mean and of the width


def spread(draws: NDArray, number: int) -> NDArray:
    """`number` draws [lens, draw, parameter] spread evenly over chains [lens, chain, draw, parameter], end to end.

    They are nearly independent where their number is not above the effective sample size.
    """
    joined = draws.reshape(len(draws), -1, draws.shape[-1])
    return joined[:, ((np.arange(number) + 0.5) * joined.shape[1] / number).astype(int)]


def ranks(truth: NDArray, draws: NDArray, rng: np.random.Generator) -> NDArray:
    """How many draws [lens, draw, parameter] are below the truth [lens, parameter]: 0 to draws; ties by the dice."""
    below = (draws < truth[:, None]).sum(1)
    return below + rng.integers(0, (draws == truth[:, None]).sum(1) + 1)


def normal_scores(ranks: NDArray, draws: int, rng: np.random.Generator) -> NDArray:
    """Scores of ranks among so many draws: standard normal where ranks are uniform, by a random place in each step."""
    return stats.norm.ppf((ranks + rng.uniform(1e-12, 1, ranks.shape)) / (draws + 1))


def uniformity(ranks: NDArray, draws: int, rng: np.random.Generator) -> NDArray:
    """p-values [parameter] of uniform ranks [lens, parameter] among so many draws.

    Thrice the least p of three tests (Bonferroni): chi^2 of ten bins, the mean of the normal scores, which sees
    posteriors that are shifted, and their mean square, which sees those too narrow or too wide. The last two are exact
    for any number of lenses, the first from about 50 on. So a right posterior has p < x with a chance of at most x,
    and any of n parameters p < x / n likewise, however they depend on each other.
    """
    lenses = len(ranks)
    scores = normal_scores(ranks, draws, rng)
    bins = (stats.norm.cdf(scores) * BINS).astype(int).clip(0, BINS - 1)
    counts = np.stack([(bins == each).sum(0) for each in range(BINS)])
    of_bins = stats.chi2.sf(((counts - lenses / BINS) ** 2).sum(0) / (lenses / BINS), BINS - 1)
    of_mean = 2 * stats.norm.sf(np.abs(scores.sum(0)) / np.sqrt(lenses))
    square = (scores**2).sum(0)
    of_width = 2 * np.minimum(stats.chi2.sf(square, lenses), stats.chi2.cdf(square, lenses))
    return np.minimum(1.0, TESTS * np.min([of_bins, of_mean, of_width], axis=0))
