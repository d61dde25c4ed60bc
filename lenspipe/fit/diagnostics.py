"""What makes a fit doubtful, in numbers: chi^2 of the draws, residuals on the arcs, other basins, priors pushed aside.

Each is a function of plain arrays; `variables` gathers them for the store. What follows from what the store has anyway
(R-hat, effective sample sizes, E-BFMI) is computed by the stage `summary`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import chi2 as chi2_distribution
from torch import Tensor
from torch.nn import functional

from lenspipe.fit.hmc import Draws
from lenspipe.fit.map_search import MapFit
from lenspipe.fit.model import LensModel

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows up and columns right: the other four are the same pairs
BLOCK = 8  # side [px] of the squares whose sums give the error of a correlation; noise correlates over less
RESIDUAL_DRAWS = 20  # draws whose residuals are looked at

Variables = dict[str, tuple[object, np.ndarray]]


def spread(w: Tensor, number: int) -> Tensor:
    """At most so many of the draws w [lens, chain, draw, size], spread evenly over all: [lens, n, size]."""
    flat = w.flatten(1, 2)
    return flat[:, torch.linspace(0, flat.shape[1] - 1, min(number, flat.shape[1])).long()]


@torch.no_grad()
def variables(model: LensModel, found: MapFit, draws: Draws) -> Variables:
    """The diagnostics of the lenses of a batch as variables of the posterior store, with their dimensions."""
    pixels = model.batch.usable.sum((-2, -1)).numpy()
    flat = draws.w.flatten(1, 2)
    on_arcs, elsewhere, error = mean_residual_correlation(model, spread(draws.w, RESIDUAL_DRAWS))
    depth, parameter = prior_depth(model.split(flat)[0].numpy(), model.priors.free)
    evidence = found.basins_log_evidence.numpy()
    highest = draws.log_density.flatten(1).amax(1)
    return {
        "draws_above_map": ("lens", (highest - found.log_density).numpy()),
        "predictive_p": ("lens", predictive_p(chi2_of_draws(draws), pixels)),
        "residual_correlation": ("lens", elsewhere),
        "residual_excess": ("lens", on_arcs - elsewhere),
        "residual_excess_error": ("lens", error),
        "prior_depth": ("lens", depth),
        "prior_depth_of": ("lens", parameter),
        "ray_chi2": ("lens", ray_chi2(model, found.w)),
        "start_basin": (("lens", "start"), found.start_basin.numpy()),
        "basin_log_density": (("lens", "basin"), found.basins_log_density.numpy()),
        "basin_log_evidence": (("lens", "basin"), evidence),
        "basin_w": (("lens", "basin", "unknown"), found.basins_w.numpy()),
        "starts": ("lens", found.starts.numpy()),
        "starts_agreeing": ("lens", starts_agreeing(found.start_basin.numpy(), found.start_count.numpy())),
        "evidence_lead": ("lens", evidence_lead(evidence)),
        "log_evidence": ("lens", total_evidence(evidence)),
    }


def chi2_of_draws(draws: Draws) -> NDArray:
    """chi^2 [lens, chain, draw] of the draws, from their log posterior -(chi^2 + |w|^2) / 2."""
    return (-2 * draws.log_density - draws.w.double().square().sum(-1)).numpy()


def predictive_p(chi2: NDArray, pixels: NDArray) -> NDArray:
    """Posterior predictive p-value [lens] of chi^2 [lens, ...] of draws, with `pixels` [lens] usable pixels.

    The share of data sets drawn anew from the posterior that have a greater chi^2 about the parameters that made them:
    theirs is distributed as chi^2 with as many degrees of freedom as pixels, so that no data are drawn.
    """
    flat = chi2.reshape(len(chi2), -1)
    return chi2_distribution.sf(flat, pixels[:, None]).mean(1)


def ray_chi2(model: LensModel, w: Tensor) -> NDArray:
    """chi^2 [lens] between the lensed sources at w [lens, size] and the same with twice as many rays a pixel side."""
    finer = replace(model.optics, supersampling=2 * model.optics.supersampling)
    finer_rays = LensModel(model.batch, model.priors, model.source, finer).source_rays(w)
    change = functional.avg_pool2d(finer_rays, 2) - model.source_rays(w)
    seen = model.simulator.observe(change[:, None])[:, 0] * model.weight
    return seen.double().square().sum((-2, -1)).numpy()


def mean_residual_correlation(model: LensModel, w: Tensor) -> tuple[NDArray, NDArray, NDArray]:
    """`residual_correlation`, each of its three numbers [lens] the mean over draws w [lens, draw, size].

    Of draws, not of the MAP, which follows the noise and leaves residuals that anticorrelate: if the model is right,
    residuals about a draw are white noise. An arc is where the lensed source is brighter than the noise.
    """
    found = []
    for at in w.unbind(1):
        bright = model.simulator.observe(model.source_rays(at)[:, None])[:, 0] * model.weight > 1
        residuals = model.residuals(at).double()
        found.append(residual_correlation(residuals.numpy(), model.batch.usable.numpy(), bright.numpy()))
    on_arcs, elsewhere, error = np.mean(found, axis=0)
    return on_arcs, elsewhere, error


def residual_correlation(residuals: NDArray, usable: NDArray, bright: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Correlation [lens] of neighbouring residuals among the bright pixels, among the others, error of the difference.

    residuals: in units of the noise; all [lens, ny, nx]. The neighbours are those to the right, above and on both
    diagonals, pooled; pairs across the border of the bright pixels are left out. The error is that of noise which
    correlates everywhere as it does in the other pixels, infinite where either region has no pairs.
    """
    on_arcs, bright_pairs, _ = neighbour_correlation(residuals, usable & bright)
    elsewhere, other_pairs, inflation = neighbour_correlation(residuals, usable & ~bright)
    with np.errstate(divide="ignore"):
        error = np.sqrt(np.maximum(1.0, inflation) * (1 / bright_pairs + 1 / other_pairs))
    return on_arcs, elsewhere, error


def neighbour_correlation(residuals: NDArray, region: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Correlation of neighbours that are both in the region, number of such pairs, variance of one: three [lens].

    The variance of the correlation is that of one over the number of pairs. It is taken from the scatter of sums over
    square blocks, and is 1 for white noise. Without pairs or residuals the correlation is 0.
    """
    squares = np.where(region, residuals, 0.0) ** 2
    products, pairs = neighbour_products(np.where(region, residuals, 0.0)), neighbour_products(region.astype(float))
    number, pixels = pairs.sum((1, 2)), region.sum((1, 2))
    mean_square = squares.sum((1, 2)) / np.maximum(pixels, 1)
    scale = np.where((number > 0) & (mean_square > 0), number * mean_square, np.inf)
    correlation = products.sum((1, 2)) / scale
    share = number / np.maximum(pixels, 1)  # pairs a pixel
    deviation = block_sums(products - (correlation * share)[:, None, None] * squares)
    return correlation, number, (deviation**2).sum((1, 2)) * number / scale**2


def neighbour_products(field: NDArray) -> NDArray:
    """Sum of the products of each pixel with its neighbours: [lens, ny, nx]."""
    products = np.zeros(field.shape)
    ny, nx = field.shape[1:]
    for up, right in NEIGHBOURS:
        here = (slice(None), slice(0, ny - up), slice(max(0, -right), nx - max(0, right)))
        there = (slice(None), slice(up, ny), slice(max(0, right), nx + min(0, right)))
        products[here] += field[here] * field[there]
    return products


def block_sums(field: NDArray) -> NDArray:
    """Sums over squares of BLOCK x BLOCK pixels; those at the upper and right edges may be smaller."""
    rows, columns = (range(0, side, BLOCK) for side in field.shape[1:])
    return np.add.reduceat(np.add.reduceat(field, rows, axis=1), columns, axis=2)


def starts_agreeing(start_basin: NDArray, start_count: NDArray) -> NDArray:
    """How many starts ended in the best basin, or led to it, the one numbered 0; each stands for `start_count`."""
    return np.where(start_basin == 0, start_count, 0).sum(1)


def total_evidence(log_evidence: NDArray) -> NDArray:
    """Log evidence of the model of each lens [lens] but for a constant of its data: the sum over its basins."""
    return logsumexp(np.where(np.isnan(log_evidence), -np.inf, log_evidence), axis=1)


def evidence_lead(log_evidence: NDArray) -> NDArray:
    """Log evidence of the best basin above the greatest of the others [nat], [lens]; infinite where there is no other.

    log_evidence: [lens, basin], the best solution first, NaN where there is no basin. Negative where the best
    solution is not the one with most evidence.
    """
    others = np.where(np.isnan(log_evidence[:, 1:]), -np.inf, log_evidence[:, 1:])
    return log_evidence[:, 0] - others.max(1, initial=-np.inf)


def prior_depth(w: NDArray, names: list[str]) -> tuple[NDArray, NDArray]:
    """How far out in its prior the posterior of a named parameter lies, and which: the greatest median of |w|, [lens].

    w: [lens, draw, named], standard normal under the prior. Above 2.6 where most draws are in the outer 1 % of the
    prior. 0 and no name where no named parameter is free.
    """
    if not names:
        return np.zeros(len(w)), np.full(len(w), "", dtype=object)
    depth = np.median(np.abs(w), axis=1).astype(float)
    return depth.max(1), np.array(names, dtype=object)[depth.argmax(1)]
