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
from lenspipe.lens.profiles import PROFILES
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
    return epl.series_deflection(x, y, real(gamma), real(q))


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


def tabulated(table: DeflectionTable, x: Tensor, y: Tensor, q: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Deflection [lens, n] of one lens with theta_E = 1 along the x axis."""
    values = (1.0, gamma, q, 0.0, 0.0, 0.0)
    return table.deflection(x, y, *(torch.tensor([value], dtype=x.dtype) for value in values))


def test_table_equals_series_between_the_nodes(table: DeflectionTable) -> None:
    """At the shipped settings, over the whole domain."""
    error = measure_error(table)
    assert error["max_error"] < 1e-6
    assert error["max_error_any_radius"] < 1e-5
    assert error["max_gradient_error"] < 1e-4


def test_table_in_single_precision(table: DeflectionTable) -> None:
    generator = torch.Generator().manual_seed(7)
    names = ("theta_E", "gamma", "q", "phi", "center_x", "center_y")
    low, high = torch.tensor([[0.5, 1.1, 0.1, -1, -0.1, -0.1], [2.0, 2.9, 1.0, 1, 0.1, 0.1]], dtype=torch.float64)
    values = (low + (high - low) * torch.rand(200, 6, generator=generator, dtype=torch.float64)).float().unbind(1)
    x, y = 1.5 * torch.randn(2, 200, 300, generator=generator)
    single = table.to(dtype=torch.float32).deflection(x, y, *values)
    columns = (value.double()[:, None] for value in values)
    exact = PROFILES["epl"].deflection(x.double(), y.double(), **dict(zip(names, columns, strict=True)))
    size = torch.hypot(*exact)
    for ours, theirs in zip(single, exact, strict=True):
        assert float(((ours - theirs).abs() / size).max()) < 3e-6


@pytest.mark.parametrize("name", ["x", "y", "theta_E", "gamma", "q", "phi", "center_x", "center_y"])
def test_derivatives_of_the_table_are_those_of_the_interpolant(table: DeflectionTable, name: str) -> None:
    """Both modes against finite differences of the table itself."""
    x, y = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = {"x": x, "y": y, "theta_E": [1.2, 0.8, 1.0], "gamma": [1.4, 2.0, 2.8], "q": [0.2, 0.7, 0.99]}
    inputs |= {"phi": [0.3, -1.0, 0.0], "center_x": [0.0, 0.1, -0.1], "center_y": [0.0, -0.2, 0.1]}
    values = {key: torch.as_tensor(value, dtype=torch.float64) for key, value in inputs.items()}

    def of(value: Tensor) -> tuple[Tensor, Tensor]:
        return table.deflection(**values | {name: value})

    assert torch.autograd.gradcheck(
        of, values[name].clone().requires_grad_(), rtol=1e-4, atol=1e-5, check_forward_ad=True
    )


def test_second_derivatives_of_the_table(table: DeflectionTable) -> None:
    """A gradient of a gradient does not take what the first one kept for constants."""
    x, y = torch.randn(2, 2, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    columns = torch.tensor(
        [[1.2, 0.8], [1.4, 2.2], [0.4, 0.8], [0.3, -1.0], [0.0, 0.1], [0.1, 0.0]], dtype=torch.float64
    )

    def of(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return table.deflection(x, y, *columns)

    inputs = x.clone().requires_grad_(), columns.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(of, inputs, eps=1e-7, rtol=1e-3, atol=1e-4)


def test_derivatives_on_the_axes_and_next_to_them(table: DeflectionTable) -> None:
    """Where a component changes its sign its slope does not: as the series has it."""
    x = torch.tensor([[0.0, 1e-9, 1.0, 0.7, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0, 1.0, 0.0, 1e-9, 0.0, -0.6]], dtype=torch.float64, requires_grad=True)
    for axis in (0, 1):
        ours = torch.autograd.grad(tabulated(table, x, y, 0.5, 2.1)[axis].sum(), (x, y))
        theirs = torch.autograd.grad(deflection(x, y, 0.5, 2.1)[axis].sum(), (x, y))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        along_x = torch.func.jvp(
            lambda x, a=axis: tabulated(table, x, y.detach(), 0.5, 2.1)[a], (x.detach(),), (torch.ones_like(x),)
        )[1]
        torch.testing.assert_close(along_x, theirs[0], rtol=1e-5, atol=1e-5)


def test_no_points_at_all(table: DeflectionTable) -> None:
    assert tabulated(table, torch.zeros(1, 0), torch.zeros(1, 0), 0.5, 2.1)[0].shape == (1, 0)


def test_table_in_all_quadrants_and_radii(table: DeflectionTable, points: tuple[Tensor, Tensor]) -> None:
    x, y = 3 * points[0], 3 * points[1]
    q, gamma = 0.43, 2.31
    a, b = tabulated(table, x[None], y[None], q, gamma)
    expected = deflection(x, y, q, gamma)
    torch.testing.assert_close(torch.stack([a[0], b[0]]), torch.stack(expected), rtol=0, atol=1e-6)


def test_table_is_smooth_across_its_nodes(table: DeflectionTable) -> None:
    """In eta the slope does not jump at any node; in q and gamma the table is one polynomial."""
    nodes = torch.linspace(0, math.pi / 2, table.values.shape[-1], dtype=torch.float64)[1:-1]

    def slope(eta: Tensor) -> Tensor:
        angle = eta.requires_grad_()
        a, b = tabulated(table, torch.cos(angle)[None], torch.sin(angle)[None], 0.3, 2.4)
        return torch.autograd.grad((a + b).sum(), angle)[0]

    torch.testing.assert_close(slope(nodes - 1e-9), slope(nodes + 1e-9), rtol=1e-6, atol=1e-6)


def test_table_refuses_what_it_does_not_cover(table: DeflectionTable) -> None:
    x = torch.ones(2, 1, dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    table.deflection(x, x, one, torch.tensor([1.1, 2.9]), torch.tensor([0.1, 1.0]), zero, zero, zero)
    with pytest.raises(ValueError, match=r"q = 0.05 is outside the deflection table \[0.1, 1\]"):
        table.deflection(x, x, one, 2 * one, torch.tensor([0.05, 0.5]), zero, zero, zero)
    with pytest.raises(ValueError, match=r"gamma = 2.95 is outside the deflection table \[1.1, 2.9\]"):
        table.deflection(x, x, one, torch.tensor([2.0, 2.95]), one, zero, zero, zero)


@pytest.mark.parametrize("deflect", ["table", "series"])
def test_what_is_not_a_number_stays_with_its_lens(table: DeflectionTable, deflect: str) -> None:
    """A trajectory that has left all numbers is one lens's: no error, and nothing of it in its neighbours."""
    x = torch.ones(2, 3, dtype=torch.float64)
    one, lost = torch.ones(2, dtype=torch.float64), torch.tensor([0.7, math.nan], dtype=torch.float64)
    values = (one, 2 * lost + 0.6, lost, lost, lost, lost)
    if deflect == "table":
        values = tuple(value.clone().requires_grad_() for value in values)
        a, b = table.deflection(x, x, *values)
        gradients = torch.autograd.grad((a + b)[0].sum(), values)
        assert all(bool(torch.isfinite(g[0])) for g in gradients)
    else:
        a, b = PROFILES["epl"].deflection(x, x, *(value[:, None] for value in values))
    assert bool(torch.isfinite(a[0] + b[0]).all())
    assert bool(torch.isnan(a[1] + b[1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1.1, 1.8, 2.0, 2.9])
@pytest.mark.parametrize("q", [0.1, 1.0])
def test_finite_at_the_centre(table: DeflectionTable, q: float, gamma: float, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    a, b = tabulated(table.to(dtype=dtype), x, torch.zeros_like(x), q, gamma)
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
