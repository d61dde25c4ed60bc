"""Diagnostics of a fit on cases whose answer is known: noise, residuals on an arc, made-up basins and draws."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from lenspipe.config import Fit, Summary
from lenspipe.fit import chains, diagnostics
from lenspipe.fit.hmc import Draws, bfmi_of
from lenspipe.summary import find_flags
from tests.unit.test_summary import GOOD, autoregressive

LENSES = 400


def noise(correlation_length: float = 0.0, seed: int = 0) -> np.ndarray:
    """Images [lens, 48, 64] of unit variance, white or smoothed with a Gaussian of that width [px]."""
    images = np.random.default_rng(seed).normal(size=(LENSES, 48, 64))
    images = gaussian_filter(images, (0, correlation_length, correlation_length))
    return images / images.std()


@pytest.fixture(scope="module")
def ring() -> tuple[np.ndarray, np.ndarray]:
    """Usable and bright pixels [lens, 48, 64]: a ring, of which a strip is masked."""
    y, x = np.mgrid[-23.5:24, -31.5:32]
    bright = np.broadcast_to(np.abs(np.hypot(x, y) - 15) < 3, (LENSES, 48, 64))
    usable = np.ones(bright.shape, dtype=bool)
    usable[:, :12] = False
    return usable, bright


def flagged(on_arcs: np.ndarray, elsewhere: np.ndarray, error: np.ndarray) -> list[bool]:
    """Whether the excess of each lens is flagged."""
    rows = (
        {"residual_excess": a - b, "residual_excess_error": e}
        for a, b, e in zip(on_arcs, elsewhere, error, strict=True)
    )
    return [bool(find_flags(GOOD | row, Summary())) for row in rows]


@pytest.mark.parametrize(("length", "correlation"), [(0.0, 0.0), (0.7, 0.455)])
def test_noise_is_not_flagged_white_or_correlated(
    ring: tuple[np.ndarray, np.ndarray], length: float, correlation: float
) -> None:
    """The excess scatters by its own error. One flag in 10,000 is expected (white) or in 4,000: none of 400 here.

    Correlation of neighbours in noise smoothed by a Gaussian of 0.7 px: exp(-d^2 / 4 sd^2), mean over d = 1 and
    sqrt 2, or 0.48 in the continuum; 0.455 on pixels.
    """
    on_arcs, elsewhere, error = diagnostics.residual_correlation(noise(length), *ring)
    assert elsewhere.mean() == pytest.approx(correlation, abs=0.005)
    pull = (on_arcs - elsewhere) / error
    assert abs(pull.mean()) < 0.3
    assert pull.std() == pytest.approx(1.0, abs=0.15)
    assert not any(flagged(on_arcs, elsewhere, error))


@pytest.mark.parametrize(("length", "correlation", "size"), [(0.0, 0.0, 1.0), (0.7, 0.455, 2.0)])
def test_a_smooth_residual_on_the_arc_is_flagged(
    ring: tuple[np.ndarray, np.ndarray], length: float, correlation: float, size: float
) -> None:
    """A smooth residual of mean square s on noise of correlation c makes (c + s) / (1 + s), less by what it turns."""
    usable, bright = ring
    _, x = np.mgrid[-23.5:24, -31.5:32]
    residual = size * np.sin(x / 4) * bright
    on_arcs, elsewhere, error = diagnostics.residual_correlation(noise(length) + residual, usable, bright)
    square = (residual**2)[usable & bright].mean()
    assert on_arcs.mean() == pytest.approx((correlation + square) / (1 + square), rel=0.1)
    assert elsewhere.mean() == pytest.approx(correlation, abs=0.005)
    assert np.mean(flagged(on_arcs, elsewhere, error)) > 0.95


def test_masked_pixels_are_left_out(ring: tuple[np.ndarray, np.ndarray]) -> None:
    usable, bright = ring
    images = noise()[:3]
    spoiled = np.where(usable[:3], images, 1e9)
    for first, second in zip(
        diagnostics.residual_correlation(images, usable[:3], bright[:3]),
        diagnostics.residual_correlation(spoiled, usable[:3], bright[:3]),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


def test_correlation_by_hand() -> None:
    """[[1, 2], [3, 4]]: products 2 and 12 right, 3 and 8 up, 4 and 6 on the diagonals; mean square 7.5."""
    correlation, pairs, _ = diagnostics.neighbour_correlation(np.array([[[1.0, 2], [3, 4]]]), np.ones((1, 2, 2), bool))
    assert correlation == pytest.approx([35 / 6 / 7.5])
    assert pairs == pytest.approx([6])


def test_a_lens_without_an_arc_above_the_noise_is_not_flagged() -> None:
    """Nor one that is all arc, or without any residual: nothing is known, and nothing is said."""
    usable = np.ones((3, 20, 20), dtype=bool)
    bright = np.zeros((3, 20, 20), dtype=bool)
    bright[1], bright[2, 5:9] = True, True
    residuals = noise()[:3, :20, :20] * np.array([1, 1, 0])[:, None, None]
    on_arcs, elsewhere, error = diagnostics.residual_correlation(residuals, usable, bright)
    assert np.isfinite([on_arcs, elsewhere]).all()
    assert np.isinf(error).tolist() == [True, True, False]
    assert not any(flagged(on_arcs, elsewhere, error))


def test_predictive_p_of_a_right_model_is_that_of_chi2() -> None:
    """Draws at the median of chi^2 with n degrees of freedom have p = 1/2; five standard deviations off none or all."""
    pixels = np.array([1000, 1000, 1000, 64])
    n = pixels[:, None, None].astype(float)
    offset = np.array([0, 5, -5, 0])[:, None, None]
    chi2 = np.broadcast_to(n * (1 - 2 / (9 * n)) ** 3 + offset * np.sqrt(2 * n), (4, 2, 50))
    p = diagnostics.predictive_p(chi2, pixels)
    assert p[[0, 3]] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert p[1] < 1e-5
    assert p[2] > 1 - 1e-6


def test_predictive_p_of_conjugate_gaussians_is_uniform() -> None:
    """Data with n pixels and one unknown of unit prior, its exact posterior: p is nearly uniform over data sets."""
    generator = np.random.default_rng(5)
    lenses, n, draws = 2000, 200, 50
    w = generator.normal(size=(lenses, 1))
    data = w + generator.normal(size=(lenses, n))
    spread = 1 / np.sqrt(n + 1)
    posterior = data.sum(1, keepdims=True) * spread**2 + spread * generator.normal(size=(lenses, draws))
    chi2 = np.stack([((data - posterior[:, [draw]]) ** 2).sum(1) for draw in range(draws)], 1)
    p = diagnostics.predictive_p(chi2, np.full(lenses, n))
    assert np.histogram(p, bins=5, range=(0, 1))[0] == pytest.approx(np.full(5, 400), rel=0.2)


def test_chi2_of_draws_is_that_of_the_log_posterior() -> None:
    w = torch.tensor([[[[1.0, 2.0]]]])
    draws = SimpleNamespace(w=w, log_density=torch.tensor([[[-0.5 * (70.0 + 5.0)]]], dtype=torch.float64))
    assert diagnostics.chi2_of_draws(draws) == pytest.approx(70.0)  # type: ignore[arg-type]


def test_energy_that_momenta_hardly_move() -> None:
    """E-BFMI of an AR(1) energy is 2 (1 - rho); the worst chain counts."""
    energy = autoregressive(0.5, (2, 4, 4000))
    assert bfmi_of(torch.from_numpy(energy)).numpy() == pytest.approx([1.0, 1.0], abs=0.1)
    energy[1, 2] = autoregressive(0.95, (1, 1, 4000))
    assert bfmi_of(torch.from_numpy(energy)).numpy() == pytest.approx([1.0, 0.1], abs=0.1)


def test_energies_are_judged_by_all_transitions() -> None:
    """Not by the draws that are kept: one in ten has lost what the energy was before. Also over two rounds."""
    energy = torch.from_numpy(autoregressive(0.95, (1, 4, 4000)))
    halves = [
        Draws(half[..., None], half, half, half > 0, half, half[:, 0, 0], bfmi_of(half)) for half in energy.chunk(2, 2)
    ]
    whole = chains.joined(*halves, Fit(r_hat_max=2.0), [])
    kept = chains.thinned(whole, 400)
    assert kept.energy.shape[2] == 400
    assert kept.bfmi == pytest.approx(0.1, abs=0.03)
    assert bfmi_of(kept.energy) > 0.6


def test_starts_and_evidence() -> None:
    """Three of four in the best basin, with copies or without; a rival 2 nat behind, with more evidence; none."""
    basins = np.array([[0, 0, 1, 0], [0, 1, 2, 3], [-1, 0, 1, 1]])
    assert diagnostics.starts_agreeing(basins, np.ones_like(basins)).tolist() == [3, 1, 1]
    assert diagnostics.starts_agreeing(basins, np.array([[3, 1, 1, 1]] * 3)).tolist() == [5, 3, 1]
    nan = np.nan
    evidence = np.array([[-100, -120, -102, nan], [-50, -49, nan, nan], [-10, nan, nan, nan]])
    assert diagnostics.evidence_lead(evidence).tolist() == [2, -1, np.inf]
    assert diagnostics.evidence_lead(evidence[:, :1]).tolist() == [np.inf] * 3
    expected = [-100 + np.log1p(np.exp(-2) + np.exp(-20)), -49 + np.log1p(np.exp(-1)), -10]
    np.testing.assert_allclose(diagnostics.total_evidence(evidence), expected, rtol=1e-12)


def test_depth_in_the_prior_is_that_of_the_worst_parameter() -> None:
    """A posterior whose median is where 0.1 % of the prior is further out."""
    w = np.random.default_rng(1).normal(size=(2, 1000, 3))
    w[1, :, 2] = -3.4 + 0.1 * w[1, :, 2]
    depth, parameter = diagnostics.prior_depth(w, ["theta_E", "gamma", "e1"])
    assert depth == pytest.approx([0.67, 3.4], abs=0.05)  # the median of |w| under the prior is 0.674
    assert parameter[1] == "e1"
    depth, parameter = diagnostics.prior_depth(np.zeros((2, 10, 0)), [])
    assert (depth.tolist(), parameter.tolist()) == ([0, 0], ["", ""])
