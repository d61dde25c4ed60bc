"""Every mass profile under the same contract, against lenstronomy, and several of them on one and on many planes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from astropy.cosmology import FlatLambdaCDM
from caustics.lenses import func
from lenstronomy.LensModel.lens_model import LensModel
from references import lenstronomys
from scipy.special import hyp2f1
from torch import Tensor

from lenspipe.lens import epl, multi_plane
from lenspipe.lens.coordinates import rotate
from lenspipe.lens.parameters import MASS_PROFILES
from lenspipe.lens.profiles import PROFILES, Composite

VALUES = {
    "theta_E": 1.2,
    "gamma": 2.2,
    "q": 0.6,
    "phi": 0.4,
    "center_x": 0.1,
    "center_y": -0.2,
    "gamma1": 0.05,
    "gamma2": -0.03,
    "kappa": 0.1,
    "alpha_Rs": 0.7,
    "Rs": 0.9,
    "r_trunc": 2.3,
}
THEIRS = {
    "epl": "EPL",
    "sie": "SIE",
    "sis": "SIS",
    "shear": "SHEAR",
    "sheet": "CONVERGENCE",
    "point_mass": "POINT_MASS",
    "nfw": "NFW",
    "tnfw": "TNFW",
}


def tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def parameters(profile: str, **changes: float) -> dict[str, Tensor]:
    return tensors({name: (VALUES | changes)[name] for name in MASS_PROFILES[profile]})


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    """Points about a lens, some of them at the scale radius of the halos."""
    x, y = 1.5 * torch.randn(2, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    angle = torch.linspace(0, 6, 20, dtype=torch.float64)
    radius = VALUES["Rs"] * (1 + torch.linspace(-1e-2, 1e-2, 20, dtype=torch.float64))
    x[:20], y[:20] = VALUES["center_x"] + radius * torch.cos(angle), VALUES["center_y"] + radius * torch.sin(angle)
    return x, y


def test_all_profiles_are_compared() -> None:
    assert THEIRS.keys() == PROFILES.keys() == MASS_PROFILES.keys()


@pytest.mark.parametrize("name", PROFILES)
def test_against_lenstronomy(name: str, points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    values = {key: VALUES[key] for key in MASS_PROFILES[name]}
    theirs = LensModel([THEIRS[name]])
    kwargs = [lenstronomys(values)]
    tolerance = 1e-8 if name == "sie" else 1e-12  # lenstronomy softens its SIE
    for ours, reference in zip(
        PROFILES[name].deflection(x, y, **tensors(values)), theirs.alpha(x.numpy(), y.numpy(), kwargs), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), reference, atol=tolerance)
    if name != "point_mass":
        kappa = PROFILES[name].convergence(x, y, **tensors(values)).numpy()
        np.testing.assert_allclose(
            kappa, theirs.kappa(x.numpy(), y.numpy(), kwargs), rtol=1e-4 if name == "sie" else 1e-9, atol=1e-10
        )


@pytest.mark.parametrize("name", ["epl", "sie", "shear", "point_mass"])
def test_against_caustics(name: str, points: tuple[Tensor, Tensor]) -> None:
    """A second reference, with the parameters in its order; its t is gamma - 1 and its EPL a series of given length."""
    x, y = points
    v = tensors({key: VALUES[key] for key in MASS_PROFILES[name]})
    at = (v.get("center_x"), v.get("center_y"))
    match name:
        case "epl":
            shape = (*at, v["q"], v["phi"], v["theta_E"], v["gamma"] - 1, x, y)
            theirs = func.reduced_deflection_angle_epl(*shape, 80)
            kappa = func.convergence_epl(*shape)
        case "sie":
            theirs = func.reduced_deflection_angle_sie(*at, v["q"], v["phi"], v["theta_E"], x, y)
            kappa = func.convergence_sie(*at, v["q"], v["phi"], v["theta_E"], x, y)
        case "shear":
            zero = torch.zeros((), dtype=torch.float64)
            theirs = func.reduced_deflection_angle_external_shear(zero, zero, v["gamma1"], v["gamma2"], x, y)
            kappa = torch.zeros_like(x)
        case _:
            theirs = func.reduced_deflection_angle_point(*at, v["theta_E"], x, y)
            kappa = torch.zeros_like(x)
    torch.testing.assert_close(PROFILES[name].deflection(x, y, **v), tuple(theirs), rtol=0, atol=1e-9)
    torch.testing.assert_close(PROFILES[name].convergence(x, y, **v), kappa, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PROFILES)
def test_contract(name: str, points: tuple[Tensor, Tensor]) -> None:
    """div alpha = 2 kappa, no curl, alpha = grad psi."""
    profile, values = PROFILES[name], parameters(name)
    x, y = (axis.clone().requires_grad_() for axis in points)
    a, b = profile.deflection(x, y, **values)
    ax, ay = torch.autograd.grad(a.sum(), (x, y), retain_graph=True, materialize_grads=True)
    bx, by = torch.autograd.grad(b.sum(), (x, y), materialize_grads=True)
    kappa = profile.convergence(*points, **values)
    torch.testing.assert_close(ax + by, 2 * kappa, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ay, bx, rtol=1e-9, atol=1e-9)
    if profile.potential is not None:
        along = torch.autograd.grad(profile.potential(x, y, **values).sum(), (x, y))
        torch.testing.assert_close(along, (a.detach(), b.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROFILES)
def test_derivatives_by_parameters(name: str) -> None:
    """Against finite differences, also at q = 1 and at the scale radius."""
    names = MASS_PROFILES[name]
    x, y = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64), torch.tensor([-0.2, 0.8, 0.7], dtype=torch.float64)
    for q in (0.6, 1.0):
        values = tuple(value.requires_grad_() for value in parameters(name, q=q).values())
        assert torch.autograd.gradcheck(
            lambda *v: PROFILES[name].deflection(x, y, **dict(zip(names, v, strict=True))), values, atol=1e-6
        )


@pytest.mark.parametrize("name", [name for name in PROFILES if "center_x" in MASS_PROFILES[name]])
def test_moves_and_turns_with_its_lens(name: str, points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    angle, shift = torch.tensor(0.7, dtype=torch.float64), (0.4, -0.6)
    values = parameters(name)
    a, b = PROFILES[name].deflection(x, y, **values)
    moved = values | {"center_x": values["center_x"] + shift[0], "center_y": values["center_y"] + shift[1]}
    torch.testing.assert_close(PROFILES[name].deflection(x + shift[0], y + shift[1], **moved), (a, b))
    turned = dict(values)
    turned["center_x"], turned["center_y"] = rotate(values["center_x"], values["center_y"], -angle)
    if "phi" in turned:
        turned["phi"] = values["phi"] + angle
    at = rotate(x, y, -angle)
    torch.testing.assert_close(PROFILES[name].deflection(*at, **turned), rotate(a, b, -angle))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROFILES)
def test_finite_at_the_centre(name: str, dtype: torch.dtype) -> None:
    values = {key: value.to(dtype) for key, value in parameters(name, q=1.0).items()}
    x = torch.tensor([VALUES["center_x"]], dtype=dtype, requires_grad=True)
    y = torch.tensor([VALUES["center_y"]], dtype=dtype, requires_grad=True)
    a, b = PROFILES[name].deflection(x, y, **values)
    derivatives = torch.autograd.grad((a + b).sum(), (x, y))
    assert all(bool(torch.isfinite(t).all()) for t in (a, b, *derivatives))


def test_limits(points: tuple[Tensor, Tensor]) -> None:
    """The EPL at gamma = 2 is the SIE, the SIE at q = 1 the SIS, a halo cut far out the NFW."""
    epl_like = PROFILES["epl"].deflection(*points, **parameters("epl", gamma=2.0))
    sie_like = PROFILES["sie"].deflection(*points, **parameters("sie"))
    torch.testing.assert_close(epl_like, sie_like, rtol=1e-10, atol=1e-10)
    round_like = PROFILES["sie"].deflection(*points, **parameters("sie", q=1.0))
    torch.testing.assert_close(round_like, PROFILES["sis"].deflection(*points, **parameters("sis")))
    cut = PROFILES["tnfw"].deflection(*points, **parameters("tnfw", r_trunc=1e5))
    torch.testing.assert_close(cut, PROFILES["nfw"].deflection(*points, **parameters("nfw")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("q", [0.1, 0.3, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("gamma", [1.1, 1.7, 2.0, 2.9])
def test_series_against_the_hypergeometric_function(q: float, gamma: float) -> None:
    """Tessore & Metcalf 2015, eq. 13, with SciPy's 2F1: within 1e-10 of the deflection."""
    x, y = torch.randn(2, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = epl.series_deflection(x, y, *tensors({"gamma": gamma, "q": q}).values())
    z = q * x.numpy() + 1j * y.numpy()
    radius, turn, t = np.abs(z) / np.sqrt(q), z / np.abs(z), gamma - 1
    f = (1 - q) / (1 + q)
    exact = 2 * np.sqrt(q) / (1 + q) * radius ** (1 - t) * turn * hyp2f1(1, t / 2, 2 - t / 2, -f * turn**2)
    assert np.abs((ours[0].numpy() + 1j * ours[1].numpy()) / exact - 1).max() < 1e-10


def test_a_lens_does_not_see_its_neighbours_in_the_series() -> None:
    """Bit by bit: a round lens needs 2 terms, alone or beside one that needs 130."""
    x, y = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, gamma = torch.tensor([[0.9], [0.1]], dtype=torch.float64), torch.tensor([[2.2], [1.8]], dtype=torch.float64)
    assert epl.series_terms(q)[:, 0].tolist() == [9, 130]
    together = epl.series_deflection(x, y, gamma, q)
    alone = epl.series_deflection(x, y, gamma[:1], q[:1])
    assert all(torch.equal(a[:1], b) for a, b in zip(together, alone, strict=True))


def test_the_series_refuses_a_needle() -> None:
    with pytest.raises(ValueError, match=r"q = 0.001: the series needs an axis ratio of 0.01 or more"):
        PROFILES["epl"].deflection(*torch.ones(2, 3), **parameters("epl", q=0.001))


def test_components_add(points: tuple[Tensor, Tensor]) -> None:
    lens = Composite({"": "epl", "shear": "shear", "sub": "nfw"})
    assert "theta_E" in lens.parameters
    assert "sub_alpha_Rs" in lens.parameters
    values = tensors({name: VALUES[name.removeprefix("shear_").removeprefix("sub_")] for name in lens.parameters})
    parts = [PROFILES[name].deflection(*points, **parameters(name)) for name in ("epl", "shear", "nfw")]
    for axis, total in enumerate(lens.deflection(*points, values)):
        torch.testing.assert_close(total, sum(part[axis] for part in parts))
    kappa = sum(PROFILES[name].convergence(*points, **parameters(name)) for name in ("epl", "nfw"))
    torch.testing.assert_close(lens.convergence(*points, values), kappa)
    psi = sum(PROFILES[name].potential(*points, **parameters(name)) for name in ("epl", "shear", "nfw"))  # type: ignore[misc]
    torch.testing.assert_close(lens.potential(*points, values), psi)


def test_what_a_composite_cannot_do(points: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="no mass profile epk; there are epl, sie"):
        Composite({"": "epk"})
    lens = Composite({"sub": "tnfw"})
    with pytest.raises(ValueError, match="component sub: profile tnfw has no potential"):
        lens.potential(*points, tensors({name: VALUES[name.removeprefix("sub_")] for name in lens.parameters}))


@pytest.mark.filterwarnings("ignore:Cosmology is provided")
def test_planes_against_lenstronomy(points: tuple[Tensor, Tensor]) -> None:
    """Three planes, two profiles on the middle one, as lenstronomy traces them."""
    cosmology = FlatLambdaCDM(70, 0.3)
    ratios = multi_plane.distance_ratios([0.3, 0.5, 0.9], 2.0, cosmology)
    planes = [Composite({"": "sis"}), Composite({"": "epl", "shear": "shear"}), Composite({"": "nfw"})]
    front = {"theta_E": 0.2, "center_x": 0.5, "center_y": 0.3}
    main = {name: VALUES[name] for name in MASS_PROFILES["epl"]}
    shear = {"gamma1": 0.03, "gamma2": -0.02}
    back = {"alpha_Rs": 0.1, "Rs": 0.5, "center_x": -0.4, "center_y": 1.0}
    prefixed = {f"shear_{name}": value for name, value in shear.items()}
    values = [tensors(front), tensors(main | prefixed), tensors(back)]
    plane_wise = [partial(plane.deflection, parameters=own) for plane, own in zip(planes, values, strict=True)]
    ours = multi_plane.deflection(*points, plane_wise, ratios)
    theirs = LensModel(
        ["SIS", "EPL", "SHEAR", "NFW"],
        multi_plane=True,
        z_source=2.0,
        lens_redshift_list=[0.3, 0.5, 0.5, 0.9],
        cosmo=cosmology,
    )
    kwargs = [front, lenstronomys(main), shear, back]
    for mine, other in zip(ours, theirs.alpha(*(axis.numpy() for axis in points), kwargs), strict=True):
        np.testing.assert_allclose(mine.numpy(), other, atol=1e-12)


def test_one_plane_twice_is_one_plane(points: tuple[Tensor, Tensor]) -> None:
    """Two lenses at the same redshift do not bend each other's light on the way."""
    ratios = multi_plane.distance_ratios([0.5, 0.5], 2.0, FlatLambdaCDM(70, 0.3))
    one = Composite({"": "sis"})
    values = [parameters("sis"), parameters("sis", center_x=-0.7)]
    both = multi_plane.deflection(*points, [partial(one.deflection, parameters=value) for value in values], ratios)
    apart = [one.deflection(*points, value) for value in values]
    torch.testing.assert_close(both, (apart[0][0] + apart[1][0], apart[0][1] + apart[1][1]))


@pytest.mark.parametrize("redshifts", [[0.5, 0.3], [0.5, 2.0], [0.0, 0.5]])
def test_planes_out_of_order(redshifts: list[float]) -> None:
    with pytest.raises(ValueError, match="must grow, above 0 and below that of the source, 2"):
        multi_plane.distance_ratios(redshifts, 2.0, FlatLambdaCDM(70, 0.3))
