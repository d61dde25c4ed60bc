"""Deflections: identities, limits, two independent computations and an external reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lenspipe.config import DeflectionTable as Settings
from lenspipe.deflection_table import measure_error
from lenspipe.lens import epl
from lenspipe.lens.coordinates import (
    axis_ratio,
    coolest_from_phi,
    ellipticity,
    phi_from_coolest,
    pixel_grid,
    pyautolens_from_theta_E,
    r_Ein_from_theta_E,
    rotate,
    theta_E_from_pyautolens,
    theta_E_from_r_Ein,
    wrap_angle,
)
from lenspipe.lens.table import DeflectionTable, build_table

CASES = [(0.1, 2.9), (0.3, 1.1), (0.6, 2.0), (0.999, 1.7), (1.0, 2.3)]


def real(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture(scope="module")
def table() -> DeflectionTable:
    """The table at the shipped settings."""
    s = Settings()
    return build_table(s.eta_nodes, (s.q_nodes, s.q_min), (s.gamma_nodes, s.gamma_min, s.gamma_max))


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, y


def deflection(x: Tensor, y: Tensor, q: float, gamma: float) -> tuple[Tensor, Tensor]:
    return epl.series_deflection(x, y, real(gamma), real(q), epl.series_terms(q))


@pytest.mark.parametrize(("q", "gamma"), CASES)
def test_series_equals_quadrature(q: float, gamma: float) -> None:
    eta = np.linspace(0, np.pi / 2, 41)
    series = deflection(torch.from_numpy(np.cos(eta)), torch.from_numpy(np.sin(eta)), q, gamma)
    np.testing.assert_allclose(torch.stack(series).numpy(), epl.quadrature_deflection(eta, gamma, q), atol=2e-9)


@pytest.mark.parametrize(("q", "gamma"), CASES)
def test_divergence_is_twice_the_convergence_and_curl_is_zero(
    q: float, gamma: float, points: tuple[Tensor, Tensor]
) -> None:
    x, y = (axis.clone().requires_grad_() for axis in points)
    a, b = deflection(x, y, q, gamma)
    ax, ay = torch.autograd.grad(a.sum(), (x, y), retain_graph=True)
    bx, by = torch.autograd.grad(b.sum(), (x, y))
    kappa = epl.convergence(x, y, real(1), real(gamma), real(q))
    torch.testing.assert_close(ax + by, 2 * kappa.detach(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ay, bx, rtol=1e-7, atol=1e-7)


def test_round_isothermal_lens(points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    a, b = deflection(x, y, 1.0, 2.0)
    torch.testing.assert_close(torch.hypot(a, b), torch.ones_like(x))
    assert bool((a * x + b * y > 0).all())  # towards the lens is beta = theta - alpha


def test_table_equals_series_between_the_nodes(table: DeflectionTable) -> None:
    error = measure_error(table)
    assert error["max_error"] < 1e-6
    assert error["max_gradient_error"] < 1e-5


def test_table_in_all_quadrants_and_radii(table: DeflectionTable, points: tuple[Tensor, Tensor]) -> None:
    x, y = 3 * points[0], 3 * points[1]
    q, gamma = 0.43, 2.31
    a, b = table.deflection(x[None], y[None], real(gamma)[None], real(q)[None])
    expected = deflection(x, y, q, gamma)
    torch.testing.assert_close(torch.stack([a[0], b[0]]), torch.stack(expected), rtol=0, atol=1e-6)


def test_table_is_smooth_across_a_node(table: DeflectionTable) -> None:
    node = math.pi / 2 / (table.values.shape[-1] - 1) * 40

    def slope(eta: float) -> Tensor:
        angle = real(eta).requires_grad_()
        a, _ = table.deflection(
            torch.cos(angle)[None, None], torch.sin(angle)[None, None], real(2.4)[None], real(0.3)[None]
        )
        return torch.autograd.grad(a.sum(), angle)[0]

    torch.testing.assert_close(slope(node - 1e-9), slope(node + 1e-9), rtol=1e-5, atol=1e-7)


def test_table_refuses_what_it_does_not_cover(table: DeflectionTable) -> None:
    table.check(torch.tensor([0.1, 1.0]), torch.tensor([1.1, 2.9]))
    with pytest.raises(ValueError, match=r"q = 0.05 is outside the deflection table \[0.1, 1\]"):
        table.check(torch.tensor([0.5, 0.05]), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize("q", [0.3, 1.0])
def test_finite_at_the_centre(table: DeflectionTable, q: float) -> None:
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    a, b = table.deflection(x, torch.zeros_like(x), real(1.8)[None], real(q)[None])
    (gradient,) = torch.autograd.grad((a + b).sum(), x)
    assert a.item() == b.item() == 0
    assert math.isfinite(gradient.item())


def test_conversions_go_both_ways() -> None:
    q, phi = torch.rand(2, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, phi = 0.1 + 0.89 * q, (phi - 0.5) * math.pi
    again = axis_ratio(*ellipticity(q, phi))
    torch.testing.assert_close(again[0], q)
    torch.testing.assert_close(again[1], phi)
    torch.testing.assert_close(theta_E_from_r_Ein(r_Ein_from_theta_E(phi, q), q), phi)
    torch.testing.assert_close(wrap_angle(phi + 3 * math.pi), phi)


def test_pyautolens_radius_gives_the_same_mass() -> None:
    """Its PowerLaw: kappa = (3 - gamma)/(1 + q) (b / xi)^(gamma - 1), xi^2 = x^2 + y^2 / q^2."""
    q, gamma, b = real(0.6), real(2.3), real(1.4)
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theirs = (3 - gamma) / (1 + q) * (b / torch.sqrt(x**2 + y**2 / q**2)) ** (gamma - 1)
    theta_E = theta_E_from_pyautolens(b, gamma, q)
    torch.testing.assert_close(epl.convergence(x, y, theta_E, gamma, q), theirs, rtol=1e-13, atol=0)
    torch.testing.assert_close(pyautolens_from_theta_E(theta_E, gamma, q), b, rtol=1e-14, atol=0)


def test_coolest_angles_are_from_the_y_axis() -> None:
    degrees = torch.tensor([0.0, 90.0, -45.0, 30.0], dtype=torch.float64)
    radians = torch.tensor([math.pi / 2, 0.0, math.pi / 4, -math.pi / 3], dtype=torch.float64)
    torch.testing.assert_close(phi_from_coolest(degrees), radians)
    torch.testing.assert_close(coolest_from_phi(radians), degrees)


def test_paper_radius_is_on_the_major_axis() -> None:
    """Eq. 11 with rho^2 = x^2 + y^2 / q^2 equals ours with theta_E = sqrt(q) r_Ein."""
    x, y, q, gamma, r_Ein = real(0.7), real(0.4), real(0.6), real(2.2), real(1.4)
    paper = (3 - gamma) / 2 * (torch.sqrt(x**2 + y**2 / q**2) / r_Ein) ** (1 - gamma)
    torch.testing.assert_close(epl.convergence(x, y, theta_E_from_r_Ein(r_Ein, q), gamma, q), paper)


def test_round_lens_has_finite_gradients() -> None:
    e1 = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    q, phi = axis_ratio(e1, torch.zeros_like(e1))
    (gradient,) = torch.autograd.grad((q + phi).sum(), e1)
    assert q.item() == pytest.approx(1)
    assert math.isfinite(gradient.item())


def test_grid_has_y_up_and_rotation_is_counter_clockwise() -> None:
    x, y = pixel_grid(3, 5)
    assert y[0, 0] == -1
    assert x[0, 0] == -2
    assert x[1, 2] == y[1, 2] == 0
    a, b = rotate(real(0.0), real(1.0), real(math.pi / 2))
    assert (a.item(), b.item()) == pytest.approx((1, 0))
