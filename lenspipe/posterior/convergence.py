"""Whether chains have converged, and how many independent draws they are worth: ArviZ's numbers for many lenses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from arviz_stats.base import array_stats
from numpy.typing import NDArray


def convergence(parameters: Iterable[NDArray]) -> tuple[NDArray, NDArray, NDArray]:
    """Greatest R-hat and least bulk and tail effective sample sizes [lens] over parameters [lens, chain, draw].

    Rank-normalised (Vehtari et al. 2021); a parameter that is constant passes. 1, infinity, infinity without any.
    """
    r_hat, bulk, tail = [], [], []
    axes = {"chain_axis": -2, "draw_axis": -1}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for values in parameters:
            moving = np.ptp(values, axis=(1, 2)) > 0
            count = values.shape[1] * values.shape[2]
            r_hat.append(np.where(moving, array_stats.rhat(values, **axes), 1.0))
            bulk.append(np.where(moving, array_stats.ess(values, method="bulk", **axes), count))
            tail.append(np.where(moving, array_stats.ess(values, method="tail", prob=(0.05, 0.95), **axes), count))
    return np.max(r_hat, axis=0), np.min(bulk, axis=0), np.min(tail, axis=0)
