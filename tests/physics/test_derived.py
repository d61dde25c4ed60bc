"""Critical curves, Einstein radii and images against closed forms and lenstronomy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LensModel.Solver.lens_equation_solver import LensEquationSolver
from torch import Tensor

from lenspipe.lens import derived
from lenspipe.lens.profiles import Composite

EPL = {"theta_E": 1.2, "gamma": 2.1, "q": 0.7, "phi": 0.4, "center_x": 0.05, "center_y": -0.1}
SHEAR = {"gamma1": 0.05, "gamma2": -0.03}
THEIR_EPL = {
    "theta_E": 1.2,
    "gamma": 2.1,
    "e1": 0.3 / 1.7 * np.cos(0.8),
    "e2": 0.3 / 1.7 * np.sin(0.8),
    "center_x": 0.05,
    "center_y": -0.1,
}


def deflection(profiles: dict[str, str], values: dict[str, float]) -> derived.Deflection:
    lens = Composite(profiles)
    parameters = {name: torch.tensor(values[name], dtype=torch.float64) for name in lens.parameters}
    return lambda x, y: lens.deflection(x, y, parameters)


@pytest.fixture(scope="module")
def lens() -> derived.Deflection:
    return deflection({"": "epl", "shear": "shear"}, EPL | {f"shear_{name}": value for name, value in SHEAR.items()})


def test_magnification_against_lenstronomy(lens: derived.Deflection) -> None:
    x, y = 1.5 * torch.randn(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = LensModel(["EPL", "SHEAR"]).magnification(x.numpy(), y.numpy(), [THEIR_EPL, SHEAR])
    np.testing.assert_allclose(derived.magnification(lens, x, y).numpy(), theirs, rtol=1e-9)


def test_ring_of_a_round_lens() -> None:
    """The SIS: its tangential critical curve is the circle of radius theta_E, its caustic a point."""
    sis = deflection({"": "sis"}, {"theta_E": 1.3, "center_x": 0.2, "center_y": 0.0})
    tangential, radial = derived.critical_curves(sis, 2.5)
    assert len(tangential) == 1
    assert radial == []
    np.testing.assert_allclose(np.hypot(tangential[0][:, 0] - 0.2, tangential[0][:, 1]), 1.3, atol=1e-9)
    np.testing.assert_allclose(derived.traced(sis, tangential[0]), [[0.2, 0.0]] * len(tangential[0]), atol=1e-9)


@pytest.mark.parametrize("q", [0.3, 0.7, 0.95])
def test_einstein_radius_is_that_of_the_intermediate_axis(q: float) -> None:
    """Of an isothermal ellipsoid the critical curve is the contour kappa = 1/2, whose area is pi theta_E^2."""
    isothermal = deflection({"": "sie"}, EPL | {"q": q})
    assert derived.einstein_radius(isothermal, 3.0, pixels=300) == pytest.approx(1.2, rel=1e-4)


def test_curves_are_where_the_magnification_diverges() -> None:
    """A slope below 2 has both kinds of curve; the radial caustic holds the tangential one of a nearly round lens."""
    shallow = deflection({"": "epl"}, EPL | {"gamma": 1.6, "q": 0.95})
    tangential, radial = derived.critical_curves(shallow, 2.5, pixels=120)
    assert len(tangential) == len(radial) == 1
    for curve in (tangential[0], radial[0]):
        x, y = (torch.from_numpy(curve[:, i].copy()) for i in (0, 1))
        assert float((1 / derived.magnification(shallow, x, y)).abs().max()) < 1e-6
    areas = [derived.enclosed_area(derived.traced(shallow, curve[0])) for curve in (radial, tangential)]
    assert areas[0] > 10 * areas[1]


def test_no_lens_has_no_curve() -> None:
    weak = deflection({"": "shear"}, {"gamma1": 0.1, "gamma2": 0.0})
    assert derived.critical_curves(weak, 2.0) == ([], [])
    assert np.isnan(derived.einstein_radius(weak, 2.0))
    images = derived.image_positions(weak, (0.3, -0.2), 2.0)
    np.testing.assert_allclose(images.positions, [[0.3 / 0.9, -0.2 / 1.1]], atol=1e-9)
    np.testing.assert_allclose(images.magnifications, [1 / 0.99])


@pytest.mark.parametrize("source", [(0.06, -0.05), (0.02, 0.12), (0.4, 0.3), (1.2, -1.1)])
def test_images_against_lenstronomy(lens: derived.Deflection, source: tuple[float, float]) -> None:
    """Number, places and magnifications, for sources with four, two and one image."""
    images = derived.image_positions(lens, source, 3.0, pixels=150)
    model = LensModel(["EPL", "SHEAR"])
    x, y = LensEquationSolver(model).image_position_from_source(
        *source, [THEIR_EPL, SHEAR], min_distance=0.01, search_window=6, precision_limit=1e-12, num_iter_max=200
    )
    order = np.argsort(-np.abs(model.magnification(x, y, [THEIR_EPL, SHEAR])))
    assert len(images.positions) == len(x)
    np.testing.assert_allclose(images.positions, np.stack([x, y], 1)[order], atol=1e-6)
    np.testing.assert_allclose(images.magnifications, model.magnification(x, y, [THEIR_EPL, SHEAR])[order], rtol=1e-4)


def test_number_of_images_changes_by_two_across_the_caustic(lens: derived.Deflection) -> None:
    tangential, _ = derived.critical_curves(lens, 2.5, pixels=120)
    caustic = derived.traced(lens, tangential[0])
    middle = caustic.mean(0)
    tip = caustic[np.argmax(np.hypot(*(caustic - middle).T))]

    def count(share: float) -> int:
        x, y = middle + share * (tip - middle)
        return len(derived.image_positions(lens, (float(x), float(y)), 3.0, pixels=150).positions)

    assert count(0.7) - count(1.3) == 2


def test_area_of_a_square() -> None:
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]], dtype=float)
    assert derived.enclosed_area(square) == 4


def test_jacobian_of_no_deflection() -> None:
    x = torch.zeros(3, dtype=torch.float64)

    def nothing(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return 0 * x, 0 * y

    xx, xy, yx, yy = derived.jacobian(nothing, x, x)
    assert xx.tolist() == yy.tolist() == [1, 1, 1]
    assert xy.tolist() == yx.tolist() == [0, 0, 0]


def test_radii_of_many_curves_at_once_are_those_of_the_contour(lens: derived.Deflection) -> None:
    """Two lenses in one call, of which the second has no shear; areas as of `einstein_radius`, to a few 1e-4."""
    strength = torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None]
    epl = Composite({"": "epl"})
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in EPL.items()}

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = epl.deflection(x, y, values)
        g1, g2 = strength * SHEAR["gamma1"], strength * SHEAR["gamma2"]
        return a + g1 * x + g2 * y, b + g2 * x - g1 * y

    centre = tuple(torch.full((2,), EPL[name], dtype=torch.float64) for name in ("center_x", "center_y"))
    angles = torch.arange(180, dtype=torch.float64) * (2 * torch.pi / 180)
    radii = derived.tangential_radii(both, centre, torch.tensor([4.0, 4.0], dtype=torch.float64), angles)
    found = (radii.square().mean(1)).sqrt().numpy()
    alone = deflection({"": "epl"}, EPL)
    expected = [derived.einstein_radius(one, 3.0) for one in (lens, alone)]
    np.testing.assert_allclose(found, expected, rtol=5e-4)


def test_rays_that_cross_no_curve_say_so() -> None:
    weak = deflection({"": "sis"}, {"theta_E": 1e-6, "center_x": 0.0, "center_y": 0.0})
    centre = (torch.zeros(1, dtype=torch.float64),) * 2
    largest = torch.ones(1, dtype=torch.float64)
    radii = derived.tangential_radii(weak, centre, largest, torch.zeros(1, dtype=torch.float64))
    assert bool(radii.isnan().all())


@pytest.mark.parametrize(("strength", "distance", "error"), [(0.3, 2.5, 1e-3), (0.05, 2.5, 1e-3), (0.3, 1.5, 1e-2)])
def test_of_several_curves_on_a_ray_the_first_is_taken(strength: float, distance: float, error: float) -> None:
    """Of a lens with another deflector beside it, in its curve or in one of its own: the area that the contour has."""
    two = {"main_theta_E": 1.0, "main_center_x": 0.0, "main_center_y": 0.0}
    two |= {"other_theta_E": strength, "other_center_x": distance, "other_center_y": 0.0}
    both = deflection({"main": "sis", "other": "sis"}, two)
    centre = (torch.zeros(1, dtype=torch.float64),) * 2
    angles = torch.arange(360, dtype=torch.float64) * (2 * torch.pi / 360)
    radii = derived.tangential_radii(both, centre, 4 * torch.ones(1, dtype=torch.float64), angles)
    assert float(radii.square().mean().sqrt()) == pytest.approx(derived.einstein_radius(both, 4.0), rel=error)
