"""Light profiles: surface brightness at (x, y) ["], as pure functions of broadcastable tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lenspipe.lens.coordinates import rotate


def elliptical_radius(x: Tensor, y: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor) -> Tensor:
    """sqrt(q x'^2 + y'^2 / q) ["]: the radius on the intermediate axis; never zero, so that its gradient is finite."""
    a, b = rotate(x - center_x, y - center_y, phi)
    return torch.sqrt(q * a**2 + b**2 / q + torch.finfo(x.dtype).tiny ** 0.5)


def sersic(
    x: Tensor,
    y: Tensor,
    amplitude: Tensor,
    R_sersic: Tensor,
    n_sersic: Tensor,
    q: Tensor,
    phi: Tensor,
    center_x: Tensor,
    center_y: Tensor,
) -> Tensor:
    """Sersic profile: `amplitude` at the half-light radius `R_sersic` ["] on the intermediate axis."""
    radius = elliptical_radius(x, y, q, phi, center_x, center_y)
    return amplitude * torch.exp(-sersic_b(n_sersic) * ((radius / R_sersic) ** (1 / n_sersic) - 1))


def sersic_b(n: Tensor) -> Tensor:
    """b_n, for half the light within R_sersic (Ciotti & Bertin 1999, eq. 18): to 1e-4 of the light for n >= 0.5."""
    return 2 * n - 1 / 3 + 4 / (405 * n) + 46 / (25515 * n**2) + 131 / (1148175 * n**3) - 2194697 / (30690717750 * n**4)


def gaussian(
    x: Tensor, y: Tensor, flux: Tensor, sd: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Tensor:
    """Gaussian of total flux `flux` and standard deviation `sd` ["] on the intermediate axis; per square arcsec.

    A galaxy as a set of Gaussians (Cappellari 2002) is their sum, linear in the fluxes.
    """
    radius2 = elliptical_radius(x, y, q, phi, center_x, center_y) ** 2
    return flux / (2 * torch.pi * sd**2) * torch.exp(-radius2 / (2 * sd**2))


def linear_amplitudes(columns: Tensor, data: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitudes [lens, k] of images that add linearly, by weighted least squares, and their covariance [lens, k, k].

    columns: [lens, k, ny, nx], each of amplitude 1 and as observed, blurred by the PSF; data, weight = 1 / noise or 0:
    [lens, ny, nx]. Sums are in float64. Raises torch.linalg.LinAlgError where the columns are not independent.
    """
    design = (columns * weight[:, None]).flatten(2).double()
    normal = design @ design.transpose(1, 2)
    right = design @ (data * weight).flatten(1).double()[..., None]
    root = torch.linalg.cholesky(normal)
    return torch.cholesky_solve(right, root)[..., 0], torch.cholesky_inverse(root)
