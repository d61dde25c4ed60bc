"""Laplace's evidence where amplitudes end at a wall."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.signal import fftconvolve
from scipy.special import log_ndtr

from lenspipe.config import Config
from lenspipe.fit.evidence import laplace, log_orthant
from lenspipe.fit.map_search import climb
from lenspipe.fit.model import LensModel
from lenspipe.image.light import Light
from lenspipe.image.simulator import Optics
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from tests.lenses import FIXED, TABLE, Blobs, lens_batch

ALIKE = 0.5 + 0.5 * np.eye(12)  # a covariance: the chance that all twelve are positive is 1 / 13


@pytest.mark.parametrize(
    ("mean", "covariance", "expected"),
    [
        (np.array([-40.0]), np.eye(1), float(log_ndtr(-40.0))),
        (np.array([-2.0, 1.0, 30.0]), np.diag([1.0, 4.0, 9.0]), float(log_ndtr(-2.0) + log_ndtr(0.5))),
        (np.zeros(2), np.array([[1.0, -0.97], [-0.97, 1.0]]), math.log(0.25 + math.asin(-0.97) / (2 * math.pi))),
        (np.zeros(12), ALIKE, math.log(1 / 13)),
        (np.array([-900.0, 1.0]), np.eye(2), float(log_ndtr(-900.0) + log_ndtr(1.0))),
    ],
)
def test_probability_that_all_are_positive(mean: NDArray, covariance: NDArray, expected: float) -> None:
    """Closed forms: far tails, none correlated, two, and many that are correlated alike."""
    assert log_orthant(mean, covariance) == pytest.approx(expected, abs=0.02)


def test_probability_is_that_of_draws() -> None:
    """Correlated by turns, some of the means below 0."""
    rng = np.random.default_rng(4)
    root, mean = rng.normal(size=(6, 6)), np.array([2.0, 1.0, -0.5, 1.5, 0.3, 2.0])
    covariance = root @ root.T + 0.1 * np.eye(6)
    share = (rng.multivariate_normal(mean, covariance, 1_000_000) >= 0).all(1).mean()
    assert share > 0.001
    assert log_orthant(mean, covariance) == pytest.approx(math.log(share), abs=0.1)


@pytest.mark.parametrize("known", [30.0, 9.0, 3.0, 1.0, 0.3])
def test_probability_of_many_that_stand_in_for_each_other(known: float) -> None:
    """Twelve standard normals whose sum is known to a hundredth, as amplitudes of neighbouring Gaussians are.

    The density of the sum of their halves, by convolution, over that of the sum of whole ones.
    """
    size, error, fine = 12, 0.01, 0.002
    precision = np.eye(size) + 1 / error**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.full(size, known / error**2)
    place = np.arange(0, 60, fine)
    half = np.exp(-0.5 * place**2) / np.sqrt(2 * np.pi)
    half[0] /= 2
    of_halves = np.ones(1)
    for _ in range(size):
        of_halves = fftconvolve(of_halves, half * fine)[: len(place)]
    seen = np.exp(-0.5 * ((place - known) / error) ** 2)
    of_all = np.exp(-0.5 * place**2 / size) / np.sqrt(2 * np.pi * size) * fine
    expected = math.log((of_halves * seen).sum() / (of_all * seen).sum())
    assert log_orthant(mean, covariance) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("true", [(0.5, 0.5), (0.003, 0.5), (-0.004, 0.5), (-0.2, -0.1)])
def test_evidence_is_the_integral_within_the_walls(true: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two amplitudes of light, all else fixed: well inside, next to a wall, at it, far beyond both of them.

    The same sum of the posterior on a grid: an image is linear in amplitudes, so the approximation is exact.
    """
    fixed = FIXED | {"theta_E": 1.2, "e1": 0, "e2": 0, "source_x": 0, "source_y": 0, "source_flux": 0}
    shape = {"amplitude": "HalfNormal(3)", "q": "0.8", "phi": "0.3", "center_x": "0", "center_y": "0"}
    light = {f"{name}_{key}": text for name in ("bulge", "halo") for key, text in shape.items()}
    light |= {"bulge_sd": "0.3", "halo_sd": "0.5"}
    own = {name: parse_prior(str(text)) for name, text in (fixed | light).items()}
    priors = PriorMap(Config().priors.expressions() | own)
    optics = Optics(TABLE, light=Light({"bulge": "gaussian", "halo": "gaussian"}))
    batch = lens_batch().take(torch.arange(1))
    model = LensModel(batch, priors, Blobs(), optics)
    columns = [model.priors.free.index(f"{name}_amplitude") for name in ("bulge", "halo")]
    assert model.priors.folded == columns

    dark = torch.zeros(1, model.size, dtype=torch.float64)
    image = torch.zeros_like(batch.image)
    for column, amplitude in zip(columns, true, strict=True):
        image = image + amplitude * model.image(dark.index_fill(1, torch.tensor([column]), 1.0))
    batch = replace(batch, image=image * batch.flux_unit[:, None, None])
    model = LensModel(batch, priors, Blobs(), optics)
    w = dark.index_fill(1, torch.tensor(columns), 0.3)
    for _ in range(3):  # a climb ends where a step gains a hundredth of a nat
        w, value, done = climb(model, w, 1.0, 60)
    assert bool(done.all())
    hessian, evidence = laplace(model, w, value)
    torch.testing.assert_close(hessian, model.hessian(w))

    slope = model.value_and_gradient(w)[1][0, columns].clamp(max=-1e-9)
    sd = torch.linalg.inv(hessian[0]).diagonal().sqrt()[columns]
    sd = torch.where(w[0, columns] > 0, sd, torch.minimum(sd, -4 / slope))  # at a wall the posterior falls by its slope
    axes = [torch.linspace(max(0.0, w[0, c] - 8 * s), w[0, c] + 8 * s, 61) for c, s in zip(columns, sd, strict=True)]
    grid = torch.cartesian_prod(*(axis.double() for axis in axes))
    places = dark.repeat(len(grid), 1)
    places[:, columns] = grid
    at = torch.cat(
        [model.log_density(some, rows=torch.zeros(len(some), dtype=torch.long)) for some in places.split(500)]
    )
    simpson = torch.tensor([1.0, *[4.0, 2.0] * 29, 4.0, 1.0]).double() / 3
    share = torch.cartesian_prod(simpson, simpson).prod(1)
    area = math.prod(float(axis[1] - axis[0]) for axis in axes)
    summed = torch.logsumexp(at + share.log(), 0) + math.log(4 * area / (2 * math.pi))  # density of two half normals
    torch.testing.assert_close(evidence[0], summed, rtol=0, atol=0.02)
    spoiled = hessian - torch.diag(torch.tensor([3.0, 3.0] + [0.0] * (model.size - 2)) * hessian[0].diagonal())
    monkeypatch.setattr(model, "normal_equations", lambda *_: (None, torch.zeros_like(w), spoiled))
    assert laplace(model, w, value)[1] == -math.inf
