"""Light profiles against lenstronomy and closed forms; amplitudes against a known mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lenstronomy.LightModel.light_model import LightModel
from references import lenstronomys
from scipy.special import gamma as gamma_function
from scipy.special import gammainc
from torch import Tensor

from lenspipe.image import light
from lenspipe.lens.parameters import MGE_AMPLITUDES
from lenspipe.source.base import pushed_forward


def real(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("n", [0.5, 1.0, 4.0, 6.0])
def test_half_the_light_is_within_the_sersic_radius(n: float) -> None:
    assert gammainc(2 * n, float(light.sersic_b(*real(n)))) == pytest.approx(0.5, abs=2e-4)


@pytest.mark.parametrize("n", [1.0, 4.0])
def test_sersic_against_lenstronomy(n: float, points: tuple[Tensor, Tensor]) -> None:
    """The same shape; lenstronomy's b_n is a rougher approximation, 1.9992 n - 0.3271."""
    q, phi = 0.6, 0.4
    ours = light.sersic(*points, *real(2.0, 0.8, n, q, phi, 0.1, -0.2))
    shape = dict(R_sersic=0.8, n_sersic=n, q=q, phi=phi, center_x=0.1, center_y=-0.2)
    x, y = (axis.numpy() for axis in points)
    theirs = LightModel(["SERSIC_ELLIPSE"]).surface_brightness(x, y, [{"amp": 2.0} | lenstronomys(shape)])
    shapes = torch.log(ours / 2) / light.sersic_b(*real(n)), np.log(theirs / 2) / (1.9992 * n - 0.3271)
    np.testing.assert_allclose(shapes[0].numpy(), shapes[1], rtol=1e-5, atol=1e-5)


def test_flux_of_the_profiles() -> None:
    """Summed over a fine grid: 1 for the Gaussian, the closed form for the exponential."""
    axis = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cell = 0.01**2
    peak = 1 / (2 * np.pi * 0.7**2)
    assert float(light.gaussian(x, y, *real(peak, 0.7, 0.5, 0.3, 0.2, 0.1)).sum() * cell) == pytest.approx(1, abs=1e-6)
    total = float(light.sersic(x, y, *real(1.0, 0.5, 1.0, 0.7, 0.3, 0.0, 0.0)).sum() * cell)
    b = float(light.sersic_b(*real(1.0)))
    assert total == pytest.approx(2 * np.pi * 0.5**2 * np.exp(b) * b**-2 * gamma_function(2), rel=1e-4)


def test_gradients_at_the_centre_are_finite() -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    brightness = light.sersic(x, y, *real(1.0, 0.5, 4.0, 0.7, 0.3, 0.0, 0.0))
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(brightness.sum(), (x, y)))


def test_a_multi_gaussian_expansion_is_its_gaussians(points: tuple[Tensor, Tensor]) -> None:
    """Six Gaussians of one shape with widths in even ratios, linear in the amplitudes."""
    shape = dict(zip(("q", "phi", "center_x", "center_y"), real(0.7, 0.4, 0.1, -0.2), strict=True))
    amplitudes = dict(zip(MGE_AMPLITUDES, real(5.0, 3.0, 2.0, 0.0, 0.5, 0.1), strict=True))
    low, high = real(0.05, 2.0)
    ours = light.mge(*points, sd_min=low, sd_max=high, **shape, **amplitudes)
    sds = torch.from_numpy(np.geomspace(0.05, 2.0, 6))
    each = [light.gaussian(*points, a, sd, **shape) for a, sd in zip(amplitudes.values(), sds, strict=True)]
    torch.testing.assert_close(ours, torch.stack(each).sum(0), rtol=1e-12, atol=1e-12)


def test_derivatives_of_a_mixture_of_gaussians() -> None:
    """First and second ones, in both modes, of two lenses with their own amplitudes and of two with the same."""
    generator = torch.Generator().manual_seed(3)
    radius2, *own = (torch.rand(*shape, generator=generator).double() for shape in ((2, 2, 3), (2, 1, 1, 4), (4,)))
    for amplitudes, rates in (own, own[::-1]):
        inputs = tuple(t.requires_grad_() for t in (radius2, amplitudes, -rates.detach()))
        expected = (inputs[1] * torch.exp(inputs[2] * radius2[..., None])).sum(-1)
        torch.testing.assert_close(light.mixture(*inputs), expected, rtol=1e-12, atol=0)
        assert torch.autograd.gradcheck(light.mixture, inputs, check_forward_ad=True, check_batched_forward_grad=True)
        assert torch.autograd.gradgradcheck(light.mixture, inputs)


@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (1,), (), (0, 4)])
def test_numbers_do_for_parameters(shape: tuple[int, ...]) -> None:
    """Whatever the places are; and one value a lens where the first axis is that of lenses."""
    radius2 = torch.rand(shape, generator=torch.Generator().manual_seed(4)).double()
    amplitudes, rates = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, -3.0]).double()
    expected = torch.exp(-radius2) + 2 * torch.exp(-3 * radius2)
    torch.testing.assert_close(light.mixture(radius2, amplitudes, rates), expected)
    if shape:
        own = amplitudes.expand(shape[0], *[1] * (len(shape) - 1), 2)
        torch.testing.assert_close(light.mixture(radius2, own, rates), expected)


def test_gaussians_far_out_are_nothing() -> None:
    """Where they underflow, in single precision, too: their derivatives as well."""
    inputs = [torch.tensor(values, requires_grad=True) for values in ([[0.0, 1.0, 1e4]], [[2.0]], [[-90.0]])]
    assert float(light.columns(*(inputs[i].detach() for i in (0, 2))).min()) > torch.finfo(torch.float32).tiny
    total = light.mixture(inputs[0], inputs[1][..., None, :], inputs[2][..., None, :])
    torch.testing.assert_close(total, torch.tensor([[2.0, 0.0, 0.0]]), rtol=1e-6, atol=1e-30)
    of_radius2, of_amplitude, of_rate = torch.autograd.grad(total.sum(), inputs)
    torch.testing.assert_close(of_radius2, torch.tensor([[-180.0, 0.0, 0.0]]), rtol=1e-6, atol=1e-30)
    assert float(of_amplitude) == pytest.approx(1.0)
    assert abs(float(of_rate)) < 1e-25


@pytest.mark.parametrize("q", [0.6, 1.0])
def test_slopes_of_light_are_those_of_forward_mode(q: float, points: tuple[Tensor, Tensor]) -> None:
    """A component of each profile, with respect to every parameter; some of them alone, in any order."""
    lens_light = light.Light({"bulge": "sersic", "knot": "gaussian", "halo": "mge"})
    given = {"q": q, "phi": 0.4, "center_x": 0.1, "center_y": -0.2, "R_sersic": 0.5, "n_sersic": 3.0, "sd": 0.3}
    given |= {"sd_min": 0.05, "sd_max": 2.0, "amplitude": 1.5} | {
        name: 0.3 + k for k, name in enumerate(MGE_AMPLITUDES)
    }
    names = lens_light.parameters
    values = torch.tensor([given[name.split("_", 1)[1]] for name in names], dtype=torch.float64)
    values = torch.stack([values, values + 0.05])
    if q == 1:
        values[1] = values[0]
    x, y = (axis.expand(2, -1) for axis in points)

    def brightness(values: Tensor) -> Tensor:
        return lens_light.brightness(x, y, {n: v[:, None] for n, v in zip(names, values.unbind(1), strict=True)})

    (expected,) = pushed_forward(lambda values: (brightness(values),), values)
    column = {n: v[:, None] for n, v in zip(names, values.unbind(1), strict=True)}
    found = lens_light.slopes(x, y, column, names)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    some = ["halo_q", "bulge_n_sersic", "knot_amplitude"]
    places = [names.index(name) for name in some]
    torch.testing.assert_close(lens_light.slopes(x, y, column, some), found[:, places])
