"""Ranks and their uniformity on posteriors that are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lenspipe import calibration

LENSES, DRAWS = 200, 99


def posterior(rng: np.random.Generator, lenses: int, draws: int) -> tuple[NDArray, NDArray]:
    """Truths [lens, 3] from N(0, 1) and draws of their exact posterior given data with noise of 1, 0.3, 3."""
    noise = np.array([1.0, 0.3, 3.0])
    truth = rng.standard_normal((lenses, 3))
    data = truth + noise * rng.standard_normal((lenses, 3))
    variance = 1 / (1 + noise**-2)
    mean = variance * data / noise**2
    return truth, mean[:, None] + np.sqrt(variance) * rng.standard_normal((lenses, draws, 3))


@pytest.mark.parametrize(
    ("stretch", "shift", "right"),
    [(1.0, 0.0, True), (1 / 1.3, 0.0, False), (1.3, 0.0, False), (1.0, 0.5, False), (1.0, -0.5, False)],
    ids=["right", "too narrow", "too wide", "too high", "too low"],
)
def test_of_a_known_posterior(stretch: float, shift: float, right: bool) -> None:
    """A right one has p < 1e-3 in one run of a thousand; the seed is fixed."""
    rng = np.random.default_rng(2)
    truth, draws = posterior(rng, LENSES, DRAWS)
    mean, sd = draws.mean(1, keepdims=True), draws.std(1, keepdims=True)
    changed = mean + stretch * (draws - mean) + shift * sd
    p = calibration.uniformity(calibration.ranks(truth, changed, rng), DRAWS, rng)
    assert p.shape == (3,)
    assert (p > 1e-3 / 3).all() if right else (p < 1e-3 / 3).all()


def test_sees_a_posterior_with_two_modes_too_few() -> None:
    """By the bins: the truth is near 0.2 or 0.8 of the draws, its mean and width as they should be."""
    rng = np.random.default_rng(3)
    ranks = rng.choice([12, 87], (LENSES, 1))
    assert calibration.uniformity(ranks, DRAWS, rng)[0] < 1e-10


@pytest.mark.parametrize("lenses", [50, 100])
def test_false_alarms_are_as_stated(lenses: int) -> None:
    """Of 20,000 uniform sets at most as many are below x as a chance of x allows, and a third of that at least."""
    rng = np.random.default_rng(4)
    p = calibration.uniformity(rng.integers(0, DRAWS + 1, (lenses, 20_000)), DRAWS, rng)
    for level in (0.1, 0.01, 0.001):
        expected = 20_000 * level
        assert expected / 3 < (p < level).sum() < expected + 3 * np.sqrt(expected)


def test_ties_are_broken_fairly() -> None:
    """Draws that are all equal to the truth leave any rank as likely as another."""
    rng = np.random.default_rng(5)
    ranks = calibration.ranks(np.zeros((20_000, 1)), np.zeros((20_000, 9, 1)), rng)
    assert np.bincount(ranks[:, 0], minlength=10) == pytest.approx(np.full(10, 2000), abs=200)
    some = calibration.ranks(np.zeros((1000, 1)), np.tile([-1.0, 0.0, 1.0, 1.0], (1000, 1))[..., None], rng)
    assert set(some[:, 0].tolist()) == {1, 2}


def test_draws_are_spread_over_chains() -> None:
    draws = np.arange(2 * 3 * 40).reshape(2, 3, 40, 1)
    chosen = calibration.spread(draws, 12)[:, :, 0]
    assert chosen[0].tolist() == list(range(5, 120, 10))
    assert (chosen[1] - chosen[0] == 120).all()
