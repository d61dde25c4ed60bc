"""Round halos: NFW, its truncated form, and the point mass.

Strengths are deflections: `alpha_Rs` ["] is that of the halo, without truncation, at its scale radius `Rs` ["], as in
lenstronomy. Everything is broadcastable and finite, with its derivatives, at the centre and at Rs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAR_SCALE = 0.03  # |1 - (R / Rs)^2| below which a series about R = Rs is used
SERIES_TERMS = 10  # the first one left out is below 1e-16 there
AT_SCALE = 1 - math.log(2)  # g of an NFW halo at R = Rs


def nfw_deflection(x: Tensor, y: Tensor, alpha_Rs: Tensor, Rs: Tensor) -> tuple[Tensor, Tensor]:
    """Deflection ["] of an NFW halo (Wright & Brainerd 2000, eq. 13) at (x, y) ["] from its centre."""
    s = _scaled(x, y, Rs)
    share = alpha_Rs / Rs / AT_SCALE * _enclosed(s) / s**2
    return share * x, share * y


def nfw_convergence(x: Tensor, y: Tensor, alpha_Rs: Tensor, Rs: Tensor) -> Tensor:
    """Convergence of an NFW halo (Wright & Brainerd 2000, eq. 11); it grows as a logarithm to the centre."""
    return alpha_Rs / (2 * Rs * AT_SCALE) * _excess(_scaled(x, y, Rs))


def nfw_potential(x: Tensor, y: Tensor, alpha_Rs: Tensor, Rs: Tensor) -> Tensor:
    """Potential ["^2] of an NFW halo (Meneghetti et al. 2003, eq. 11), zero at the centre."""
    s = _scaled(x, y, Rs)
    return alpha_Rs * Rs / (2 * AT_SCALE) * (torch.log(s / 2) ** 2 - (1 - s) * (1 + s) * _arc(s) ** 2)


def tnfw_deflection(x: Tensor, y: Tensor, alpha_Rs: Tensor, Rs: Tensor, r_trunc: Tensor) -> tuple[Tensor, Tensor]:
    """Deflection ["] of an NFW halo whose density is cut by 1 / (1 + (r / r_trunc)^2) (Baltz et al. 2009, eq. A.12)."""
    s, tau = _scaled(x, y, Rs), r_trunc / Rs
    root = torch.sqrt(tau**2 + s**2)
    mass = (
        (tau**2 + 2 * s**2 - 1) * _arc(s)
        + math.pi * (tau - root)
        + (tau**2 - 1) * (torch.log(tau) + root / tau * torch.log(s / (root + tau)))
    )
    share = alpha_Rs / Rs / AT_SCALE * _cut(tau) * mass / s**2
    return share * x, share * y


def tnfw_convergence(x: Tensor, y: Tensor, alpha_Rs: Tensor, Rs: Tensor, r_trunc: Tensor) -> Tensor:
    """Convergence of the truncated NFW halo (Baltz et al. 2009, eq. A.8)."""
    s, tau = _scaled(x, y, Rs), r_trunc / Rs
    root = torch.sqrt(tau**2 + s**2)
    shape = (
        (tau**2 + 1) * _excess(s)
        + 2 * _arc(s)
        - math.pi / root
        + (tau**2 - 1) / (tau * root) * torch.log(s / (root + tau))
    )
    return alpha_Rs / (2 * Rs * AT_SCALE) * _cut(tau) * shape


def point_mass_deflection(x: Tensor, y: Tensor, theta_E: Tensor) -> tuple[Tensor, Tensor]:
    """Deflection theta_E^2 / r^2 (x, y) ["] of a point mass; zero at the mass itself."""
    r2 = x**2 + y**2
    share = torch.where(r2 > 0, theta_E**2 / torch.where(r2 > 0, r2, torch.ones_like(r2)), torch.zeros_like(r2))
    return share * x, share * y


def point_mass_potential(x: Tensor, y: Tensor, theta_E: Tensor) -> Tensor:
    """Potential theta_E^2 ln r ["^2] of a point mass, r in arcsec; its convergence is zero but at the mass."""
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    return theta_E**2 / 2 * torch.log(x**2 + y**2 + tiny)


def _scaled(x: Tensor, y: Tensor, Rs: Tensor) -> Tensor:
    """R / Rs, never zero."""
    return torch.sqrt(x**2 + y**2 + torch.finfo(x.dtype).tiny ** 0.5) / Rs


def _cut(tau: Tensor) -> Tensor:
    return tau**2 / (tau**2 + 1) ** 2


def _arc(s: Tensor) -> Tensor:
    """arcosh(1 / s) / sqrt(1 - s^2), continued to s > 1 as arccos(1 / s) / sqrt(s^2 - 1)."""
    return 1 + (1 - s) * (1 + s) * _excess(s)


def _excess(s: Tensor) -> Tensor:
    """(_arc(s) - 1) / e with e = 1 - s^2, which is sum_n e^n / (2 n + 3)."""
    epsilon = (1 - s) * (1 + s)
    near, inside = epsilon.abs() < NEAR_SCALE, epsilon > 0
    close = torch.where(near, epsilon, torch.zeros_like(s))
    series = torch.zeros_like(s)
    for n in reversed(range(SERIES_TERMS)):
        series = series * close + 1 / (2 * n + 3)
    low, high = (torch.where(chosen & ~near, s, torch.full_like(s, v)) for chosen, v in ((inside, 0.5), (~inside, 2.0)))
    root_low, root_high = torch.sqrt((1 - low) * (1 + low)), torch.sqrt((high - 1) * (high + 1))
    arc = torch.where(inside, torch.log((1 + root_low) / low) / root_low, torch.atan(root_high) / root_high)
    return torch.where(near, series, (arc - 1) / torch.where(near, torch.ones_like(s), epsilon))


def _enclosed(s: Tensor) -> Tensor:
    """g(s) = ln(s / 2) + _arc(s), the mass within s; without cancellation at small s."""
    small = s < 0.1
    inner = torch.where(small, s, torch.full_like(s, 0.1))
    root = torch.sqrt(1 - inner**2)
    gap = inner**2 / (1 + root)  # 1 - root
    centre = (-torch.log(inner) * gap + torch.log1p(-gap / 2) + gap * math.log(2)) / root
    outer = torch.where(small, torch.full_like(s, 0.1), s)
    return torch.where(small, centre, torch.log(outer / 2) + _arc(outer))
