"""Whether chains have converged, and how many independent draws they are worth: ArviZ's numbers for many lenses."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from arviz_stats.base import array_stats
from numpy.typing import NDArray


def convergence(parameters: Iterable[NDArray]) -> tuple[NDArray, NDArray, NDArray]:
    """Greatest R-hat and least bulk and tail effective sample sizes [lens] over one or more [lens, chain, draw]."""
    r_hat, bulk, tail = zip(*map(convergence_of, parameters), strict=True)
    return np.max(r_hat, axis=0), np.min(bulk, axis=0), np.min(tail, axis=0)


def least_bfmi(energy: NDArray) -> NDArray:
    """Least E-BFMI over chains [lens] of the energy at the start of every transition [lens, chain, draw].

    How far a new momentum moves the energy, against how far it has to be moved (Betancourt 2016, arXiv:1604.00695); 2
    where successive draws are independent, not a number where all energies are the same.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.asarray(array_stats.bfmi(energy)).min(-1)


def convergence_of(values: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """R-hat and bulk and tail effective sample sizes [lens] of a parameter [lens, chain, draw].

    Rank-normalised (Vehtari et al. 2021); where it is constant 1 and the number of draws, where a draw is not a number
    none.
    """
    axes = {"chain_axis": -2, "draw_axis": -1}
    moving, count = np.ptp(values, axis=(1, 2)) != 0, values.shape[1] * values.shape[2]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        r_hat = array_stats.rhat(values, **axes)
        bulk = array_stats.ess(values, method="bulk", **axes)
        tail = array_stats.ess(values, method="tail", prob=(0.05, 0.95), **axes)
    return np.where(moving, r_hat, 1.0), np.where(moving, bulk, count), np.where(moving, tail, count)
