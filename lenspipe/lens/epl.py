"""The elliptical power law, EPL (the paper's SPLE): convergence, and two independent deflections of the unit lens.

    kappa = (3 - gamma)/2 (theta_E / sqrt(q x'^2 + y'^2 / q))^(gamma - 1)

with x' along the major axis and theta_E on the intermediate axis. The paper's eqs. 11-12 put r_Ein on the major axis:
theta_E = sqrt(q) r_Ein.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.integrate import quad_vec
from torch import Tensor

from lenspipe.lens.parameters import SERIES_Q_MIN


def convergence(x: Tensor, y: Tensor, theta_E: Tensor, gamma: Tensor, q: Tensor) -> Tensor:
    """Convergence at (x, y) ["] in the frame of the major axis; infinite at the centre."""
    return (3 - gamma) / 2 * (theta_E / torch.sqrt(q * x**2 + y**2 / q)) ** (gamma - 1)


def series_terms(q: Tensor) -> Tensor:
    """Number of terms [as q] that keeps the error of the series below its precision: f^N / (1 - f), f = (1-q)/(1+q).

    3e-11 in float64, 1e-8 in float32. Raises ValueError for an axis ratio below 0.01, where they are too many.
    """
    q = q.detach()
    if bool((q < SERIES_Q_MIN).any()):
        raise ValueError(f"q = {float(q.min()):.3g}: the series needs an axis ratio of {SERIES_Q_MIN} or more")
    tolerance = 3e-11 if q.dtype == torch.float64 else 1e-8
    f = ((1 - q) / (1 + q)).abs().double().clamp(min=1e-6)
    return torch.ceil(torch.log(tolerance * (1 - f)) / torch.log(f)).clamp(min=2).long()


def series_deflection(x: Tensor, y: Tensor, gamma: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Deflection of the lens with theta_E = 1 in the frame of its major axis (Tessore & Metcalf 2015, eqs. 13, 28).

    Their b is theta_E sqrt(q) over their q R, with t = gamma - 1. x, y, gamma, q: broadcastable. Every lens has the
    number of terms its own q needs, whatever lenses it is computed with. Zero at the centre.
    """
    t = gamma - 1
    f = (1 - q) / (1 + q)
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    radius = torch.sqrt(q * x**2 + y**2 / q + tiny)
    # the elliptical angle: exp(i phi) = (q x + i y) / sqrt(q^2 x^2 + y^2)
    norm = torch.sqrt(q) * radius
    c, s = q * x / norm, y / norm
    cos2, sin2 = c * c - s * s, 2 * c * s
    term_re, term_im = c, s
    total_re, total_im = c, s
    terms = series_terms(q)
    for n in range(1, int(terms.max())):
        factor = torch.where(n < terms, -f * (2 * n - (2 - t)) / (2 * n + (2 - t)), 0.0)
        term_re, term_im = factor * (term_re * cos2 - term_im * sin2), factor * (term_re * sin2 + term_im * cos2)
        total_re, total_im = total_re + term_re, total_im + term_im
    amplitude = 2 * torch.sqrt(q) / (1 + q) * radius ** (1 - t)
    return amplitude * total_re, amplitude * total_im


def quadrature_deflection(eta: np.ndarray, gamma: float, q: float) -> np.ndarray:
    """Deflection of the lens with theta_E = 1 on the unit circle, by the integrals of the paper's eqs. A1-A4.

    eta: angles [n] in [0, pi/2] from the major axis. Returns [2, n]. The paper's axes have the minor axis first; here
    the first is the major axis, so that rho^2 = x^2 + y^2 / q^2. With u = (rho' / rho)^(3 - gamma) the integrand is
    bounded at the centre.
    """
    x, y = np.cos(eta), np.sin(eta)
    rho = np.sqrt(x**2 + y**2 / q**2)
    power = 3 - gamma

    def integrand(u: float) -> np.ndarray:
        rho_u = rho * u ** (1 / power)
        excess = rho_u**2 * (1 - q**2)
        delta = np.sqrt((excess + y**2 - x**2) ** 2 + 4 * x**2 * y**2)
        omega2 = (delta + 1 + excess) / (delta + 1 - excess)
        weight = np.sqrt(omega2) / (x**2 + omega2**2 * y**2)
        return np.stack([weight * x, weight * omega2 * y])

    integral, _ = quad_vec(integrand, 0.0, 1.0, epsabs=1e-12, epsrel=1e-11, norm="max", limit=2000)
    # kappa(rho) = (3 - gamma)/2 (sqrt(q) rho)^(1 - gamma) and rho' d rho' rho'^(1-gamma) = rho^power du / power
    return q * q ** ((1 - gamma) / 2) * rho**power * integral
