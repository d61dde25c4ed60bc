"""Mass profiles by name: what parameters each has, its deflection, its convergence and, where closed, its potential.

Every function takes x and y ["] and the profile's parameters by name, all broadcastable. A lens is a list of profiles
(`Composite`); their deflections, convergences and potentials add. Lenses at several redshifts are in `multi_plane`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lenspipe.lens import halo
from lenspipe.lens.coordinates import rotate
from lenspipe.lens.epl import convergence, series_deflection
from lenspipe.lens.parameters import MASS_PROFILES, component_parameters, qualified

Vector = tuple[Tensor, Tensor]
NEAR_ROUND = 0.03  # below which series in the squared eccentricity are used


def epl_deflection(
    x: Tensor, y: Tensor, theta_E: Tensor, gamma: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Vector:
    """Elliptical power law: deflection ["], by the exact series."""
    a, b = rotate(x - center_x, y - center_y, phi)
    a, b = series_deflection(a / theta_E, b / theta_E, gamma, q)
    return rotate(theta_E * a, theta_E * b, -phi)


def epl_convergence(
    x: Tensor, y: Tensor, theta_E: Tensor, gamma: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Tensor:
    """Elliptical power law: convergence."""
    return convergence(*rotate(x - center_x, y - center_y, phi), theta_E, gamma, q)


def epl_potential(
    x: Tensor, y: Tensor, theta_E: Tensor, gamma: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Tensor:
    """Elliptical power law: potential (x . alpha) / (3 - gamma) ["^2] (Tessore & Metcalf 2015, eq. 15)."""
    a, b = epl_deflection(x, y, theta_E, gamma, q, phi, center_x, center_y)
    return ((x - center_x) * a + (y - center_y) * b) / (3 - gamma)


def sie_deflection(
    x: Tensor, y: Tensor, theta_E: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Vector:
    """Singular isothermal ellipsoid (Kormann et al. 1994): deflection ["]; the EPL with gamma = 2, q = 1 included."""
    a, b = rotate(x - center_x, y - center_y, phi)
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    psi = torch.sqrt(q**2 * a**2 + b**2 + tiny)
    # f = sqrt(1 - q^2) leaves atan(f a / psi) / f and atanh(f b / psi) / f, both smooth in f^2
    f2 = (1 - q) * (1 + q)
    along, across = a / psi, b / psi
    scale = theta_E * torch.sqrt(q)
    return rotate(scale * along * _arctan(f2 * along**2), scale * across * _arctanh(f2 * across**2), -phi)


def sie_convergence(
    x: Tensor, y: Tensor, theta_E: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Tensor:
    """Singular isothermal ellipsoid: convergence."""
    a, b = rotate(x - center_x, y - center_y, phi)
    return theta_E / 2 / torch.sqrt(q * a**2 + b**2 / q)


def sie_potential(
    x: Tensor, y: Tensor, theta_E: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Tensor:
    """Singular isothermal ellipsoid: potential x . alpha ["^2]."""
    a, b = sie_deflection(x, y, theta_E, q, phi, center_x, center_y)
    return (x - center_x) * a + (y - center_y) * b


def sis_deflection(x: Tensor, y: Tensor, theta_E: Tensor, center_x: Tensor, center_y: Tensor) -> Vector:
    """Singular isothermal sphere: deflection ["], zero at the centre."""
    a, b = x - center_x, y - center_y
    share = theta_E / torch.sqrt(a**2 + b**2 + torch.finfo(x.dtype).tiny ** 0.5)
    return share * a, share * b


def sis_convergence(x: Tensor, y: Tensor, theta_E: Tensor, center_x: Tensor, center_y: Tensor) -> Tensor:
    """Singular isothermal sphere: convergence."""
    return theta_E / 2 / torch.hypot(x - center_x, y - center_y)


def sis_potential(x: Tensor, y: Tensor, theta_E: Tensor, center_x: Tensor, center_y: Tensor) -> Tensor:
    """Singular isothermal sphere: potential ["^2]."""
    return theta_E * torch.sqrt((x - center_x) ** 2 + (y - center_y) ** 2 + torch.finfo(x.dtype).tiny ** 0.5)


def shear_deflection(x: Tensor, y: Tensor, gamma1: Tensor, gamma2: Tensor) -> Vector:
    """External shear about the origin (paper, eq. 13)."""
    return torch.addcmul(gamma1 * x, gamma2, y), torch.addcmul(gamma2 * x, -gamma1, y)


def shear_potential(x: Tensor, y: Tensor, gamma1: Tensor, gamma2: Tensor) -> Tensor:
    """External shear: potential ["^2]."""
    return gamma1 / 2 * (x**2 - y**2) + gamma2 * x * y


def sheet_deflection(x: Tensor, y: Tensor, kappa: Tensor) -> Vector:
    """A sheet of constant convergence, about the origin."""
    return kappa * x, kappa * y


def sheet_potential(x: Tensor, y: Tensor, kappa: Tensor) -> Tensor:
    """A sheet of constant convergence: potential ["^2]."""
    return kappa / 2 * (x**2 + y**2)


def _arctan(v: Tensor) -> Tensor:
    """arctan(sqrt v) / sqrt v for v >= 0, smooth at 0."""
    small = v < NEAR_ROUND
    root = torch.sqrt(torch.where(small, torch.ones_like(v), v))
    return torch.where(small, _series(torch.where(small, -v, torch.zeros_like(v))), torch.atan(root) / root)


def _arctanh(v: Tensor) -> Tensor:
    """artanh(sqrt v) / sqrt v for 0 <= v < 1, smooth at 0."""
    small = v < NEAR_ROUND
    root = torch.sqrt(torch.where(small, torch.full_like(v, 0.5), v))
    return torch.where(small, _series(torch.where(small, v, torch.zeros_like(v))), torch.atanh(root) / root)


def _series(v: Tensor) -> Tensor:
    """sum_n v^n / (2 n + 1)."""
    total = torch.zeros_like(v)
    for n in reversed(range(10)):
        total = total * v + 1 / (2 * n + 1)
    return total


def _nowhere(x: Tensor, y: Tensor, **parameters: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _centred(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A round profile, written about its own centre, as one with a place."""

    def placed(x: Tensor, y: Tensor, center_x: Tensor, center_y: Tensor, **parameters: Tensor) -> Tensor:
        return function(x - center_x, y - center_y, **parameters)

    return placed


@dataclass(frozen=True)
class Profile:
    """The functions of (x, y, **parameters) of a mass profile; potential: none where it has no closed form."""

    deflection: Callable[..., Vector]
    convergence: Callable[..., Tensor]
    potential: Callable[..., Tensor] | None


PROFILES: dict[str, Profile] = {
    "epl": Profile(epl_deflection, epl_convergence, epl_potential),
    "sie": Profile(sie_deflection, sie_convergence, sie_potential),
    "sis": Profile(sis_deflection, sis_convergence, sis_potential),
    "shear": Profile(shear_deflection, _nowhere, shear_potential),
    "sheet": Profile(sheet_deflection, lambda x, y, kappa: kappa + 0 * x, sheet_potential),
    "point_mass": Profile(
        _centred(halo.point_mass_deflection),  # type: ignore[arg-type]
        _nowhere,
        _centred(halo.point_mass_potential),
    ),
    "nfw": Profile(
        _centred(halo.nfw_deflection),  # type: ignore[arg-type]
        _centred(halo.nfw_convergence),
        _centred(halo.nfw_potential),
    ),
    "tnfw": Profile(
        _centred(halo.tnfw_deflection),  # type: ignore[arg-type]
        _centred(halo.tnfw_convergence),
        None,
    ),
}


@dataclass(frozen=True)
class Composite:
    """Profiles on one plane, by the names of their components.

    profiles: component to profile, such as {"main": "epl", "shear": "shear", "subhalo1": "tnfw"}. The parameters of a
    component are named `<component>_<parameter>`; those of a component whose name is empty have no prefix.
    Raises ValueError for a profile that is not known.
    """

    profiles: Mapping[str, str]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.profiles.values()) - PROFILES.keys()):
            raise ValueError(f"no mass profile {', '.join(unknown)}; there are {', '.join(PROFILES)}")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return component_parameters(self.profiles)

    def deflection(self, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Vector:
        """Sum of the deflections ["]; x, y and parameters broadcastable."""
        parts = [PROFILES[p].deflection(x, y, **self._own(c, p, parameters)) for c, p in self.profiles.items()]
        zero = torch.zeros_like(x)
        return sum((part[0] for part in parts), zero), sum((part[1] for part in parts), zero)

    def convergence(self, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Sum of the convergences."""
        parts = (PROFILES[p].convergence(x, y, **self._own(c, p, parameters)) for c, p in self.profiles.items())
        return sum(parts, torch.zeros_like(x))

    def potential(self, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Sum of the potentials ["^2]. Raises ValueError where one has no closed form."""
        total = torch.zeros_like(x)
        for component, name in self.profiles.items():
            function = PROFILES[name].potential
            if function is None:
                raise ValueError(f"component {component}: profile {name} has no potential in closed form")
            total = total + function(x, y, **self._own(component, name, parameters))
        return total

    def _own(self, component: str, profile: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: parameters[qualified(component, name)] for name in MASS_PROFILES[profile]}
