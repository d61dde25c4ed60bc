"""Coordinates and the conversions between the field's conventions, in one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pixel_grid(
    ny: int, nx: int, supersampling: int = 1, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Positions of the rays in units of one image pixel, centred on the image: x and y, each [ny s, nx s].

    Row 0 is the lowest y: images are stored with y up (`origin="lower"`), as FITS is.
    """
    x = (torch.arange(nx * supersampling, dtype=dtype) + 0.5) / supersampling - nx / 2
    y = (torch.arange(ny * supersampling, dtype=dtype) + 0.5) / supersampling - ny / 2
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return grid_x, grid_y


def rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Components of the vector (x, y) in axes turned counter-clockwise by `angle` [rad]."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.addcmul(c * x, s, y), torch.addcmul(c * y, -s, x)


def ellipticity(q: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """(e1, e2) = (1-q)/(1+q) (cos 2 phi, sin 2 phi)."""
    e = (1 - q) / (1 + q)
    return e * torch.cos(2 * phi), e * torch.sin(2 * phi)


def axis_ratio(e1: Tensor, e2: Tensor) -> tuple[Tensor, Tensor]:
    """(q, phi) of an ellipticity, phi in (-pi/2, pi/2].

    e = 0 is moved along e1 by the root of the rounding error: there d phi / d e2 is large and what a deflection makes
    of phi as small, and their product keeps half of its digits.
    """
    zero = (e1 == 0) & (e2 == 0)
    safe_e1 = torch.where(zero, e1 + torch.finfo(e1.dtype).eps ** 0.5, e1)
    e = torch.sqrt(safe_e1**2 + e2**2)
    return (1 - e) / (1 + e), torch.atan2(e2, safe_e1) / 2


def theta_E_from_r_Ein(r_Ein: Tensor, q: Tensor) -> Tensor:
    """The Einstein radius on the intermediate axis from the paper's (eq. 11), which is on the major axis."""
    return torch.sqrt(q) * r_Ein


def r_Ein_from_theta_E(theta_E: Tensor, q: Tensor) -> Tensor:
    """The paper's Einstein radius (eq. 11) from the one on the intermediate axis."""
    return theta_E / torch.sqrt(q)


def wrap_angle(angle: Tensor) -> Tensor:
    """The same axis with its angle in (-pi/2, pi/2]."""
    return math.pi / 2 - torch.remainder(math.pi / 2 - angle, math.pi)


def theta_E_from_pyautolens(einstein_radius: Tensor, gamma: Tensor, q: Tensor) -> Tensor:
    """The Einstein radius on the intermediate axis from PyAutoLens' `einstein_radius` of its PowerLaw."""
    return torch.sqrt(q) * (2 / (1 + q)) ** (1 / (gamma - 1)) * einstein_radius


def pyautolens_from_theta_E(theta_E: Tensor, gamma: Tensor, q: Tensor) -> Tensor:
    """PyAutoLens' `einstein_radius` from the Einstein radius on the intermediate axis."""
    return theta_E / torch.sqrt(q) * ((1 + q) / 2) ** (1 / (gamma - 1))


def phi_from_coolest(angle: Tensor) -> Tensor:
    """phi [rad] in (-pi/2, pi/2] from COOLEST's position angle [deg], counter-clockwise from +y."""
    return wrap_angle(torch.deg2rad(angle) + math.pi / 2)


def coolest_from_phi(phi: Tensor) -> Tensor:
    """COOLEST's position angle [deg] in (-90, 90], counter-clockwise from +y, from phi [rad]."""
    return torch.rad2deg(wrap_angle(phi - math.pi / 2))
