"""The paper's deflection table (appendix A): unit-circle deflections of the EPL, tabulated in (eta, q, gamma).

Radius and Einstein radius scale out (eqs. A6-A7), the four quadrants are mirror images (eq. A5). Chebyshev nodes in q
and gamma make the interpolation there polynomial; cubic Hermite pieces in eta, with spectral derivatives at the nodes,
make it continuous with its first derivative. q and gamma are scalars of a lens, so the table is first contracted over
them to one periodic function of eta per lens: the cost per pixel does not depend on the size of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lenspipe.lens.epl import quadrature_deflection


@dataclass(frozen=True)
class DeflectionTable:
    """Tabulated deflections of the lens with theta_E = 1 on the unit circle.

    q: [n_q] nodes; gamma: [n_gamma] nodes; values, slopes: [2, n_q, n_gamma, n_eta] components along the major and the
    minor axis, and their derivatives with respect to eta, at eta = linspace(0, pi/2, n_eta).
    """

    q: Tensor
    gamma: Tensor
    values: Tensor
    slopes: Tensor

    def to(self, **kwargs: Any) -> DeflectionTable:
        """The table on another device or in another precision."""
        return DeflectionTable(*(t.to(**kwargs) for t in (self.q, self.gamma, self.values, self.slopes)))

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The least and greatest q and gamma."""
        return {name: (float(n.min()), float(n.max())) for name, n in (("q", self.q), ("gamma", self.gamma))}

    def check(self, q: Tensor, gamma: Tensor) -> None:
        """Raise ValueError, with the values, where a parameter is outside the table."""
        for name, value in (("q", q), ("gamma", gamma)):
            low, high = self.bounds[name]
            outside = (value < low - 1e-6) | (value > high + 1e-6)
            if bool(outside.any()):
                found = ", ".join(f"{v:.4g}" for v in value[outside].tolist())
                raise ValueError(f"{name} = {found} is outside the deflection table [{low:g}, {high:g}]")

    def contract(self, q: Tensor, gamma: Tensor) -> Tensor:
        """Hermite pieces in eta for each lens: [lens, n_eta - 1, 8], from q [lens] and gamma [lens]."""
        weights = torch.einsum("lq,lg->lqg", barycentric_weights(self.q, q), barycentric_weights(self.gamma, gamma))
        f, d = (torch.einsum("lqg,cqge->lce", weights, t) for t in (self.values, self.slopes))
        step = torch.pi / 2 / (f.shape[-1] - 1)
        left, right, d_left, d_right = f[..., :-1], f[..., 1:], d[..., :-1] * step, d[..., 1:] * step
        cubic = (
            left,
            d_left,
            3 * (right - left) - 2 * d_left - d_right,
            2 * (left - right) + d_left + d_right,
        )
        return torch.stack(cubic, dim=-1).movedim(1, 2).flatten(-2)

    def deflection(self, x: Tensor, y: Tensor, gamma: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Deflection of the lens with theta_E = 1 in the frame of its major axis: x, y [lens, n]; gamma, q [lens]."""
        pieces = self.contract(q, gamma)
        n_eta = pieces.shape[1]
        lenses = torch.arange(len(q), device=q.device)[:, None]
        tiny = torch.finfo(x.dtype).tiny ** 0.5
        eta = torch.atan2(y.abs(), x.abs() + tiny) * (n_eta / (torch.pi / 2))
        cell = eta.detach().long().clamp(0, n_eta - 1)
        t = eta - cell
        c = functional.embedding(cell + lenses * n_eta, pieces.flatten(0, 1)).unbind(-1)
        major, minor = (c[k] + t * (c[k + 1] + t * (c[k + 2] + t * c[k + 3])) for k in (0, 4))
        scale = (x**2 + y**2 + tiny) ** (1 - gamma / 2)[:, None]
        return scale * major * x.sign(), scale * minor * y.sign()


def build_table(
    eta_nodes: int,
    q: tuple[int, float],
    gamma: tuple[int, float, float],
    track: Callable[[Iterable[float]], Iterable[float]] = iter,
) -> DeflectionTable:
    """Tabulate the quadrature of eqs. A1-A4.

    q: number of nodes and least value (the greatest is 1); gamma: number of nodes, least and greatest value. `track`
    wraps the loop over q, for a progress bar.
    """
    eta = np.linspace(0, np.pi / 2, eta_nodes)
    q_nodes = chebyshev_nodes(q[0], q[1], 1.0)
    gamma_nodes = chebyshev_nodes(*gamma)
    values = np.stack([[quadrature_deflection(eta, g, v) for g in gamma_nodes] for v in track(q_nodes)])
    slopes = np.stack([_quadrant_slope(values[:, :, 0], odd=False), _quadrant_slope(values[:, :, 1], odd=True)])
    tensors = (q_nodes, gamma_nodes, np.moveaxis(values, 2, 0), slopes)
    return DeflectionTable(*(torch.from_numpy(np.ascontiguousarray(t)) for t in tensors))


def chebyshev_nodes(number: int, low: float, high: float) -> np.ndarray:
    """Chebyshev points of the second kind on [low, high], both ends included, ascending."""
    nodes = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(number) / (number - 1))
    nodes[0], nodes[-1] = low, high
    return nodes


def barycentric_weights(nodes: Tensor, at: Tensor) -> Tensor:
    """Weights [lens, nodes] of the polynomial through Chebyshev points of the second kind, at `at` [lens].

    Lagrange products rather than the barycentric quotient: finite with its derivative at the nodes themselves.
    """
    n = len(nodes)
    diagonal = torch.eye(n, dtype=torch.bool, device=nodes.device)
    difference = (nodes[:, None] - nodes[None, :]).masked_fill(diagonal, 1.0)
    factors = ((at[:, None, None] - nodes[None, None, :]) / difference).masked_fill(diagonal, 1.0)
    return factors.prod(dim=-1)


def _quadrant_slope(values: np.ndarray, *, odd: bool) -> np.ndarray:
    """Spectral derivative in eta of a function on one quadrant: odd or even about 0, the opposite about pi/2."""
    sign = -1.0 if odd else 1.0
    half = np.concatenate([values, -sign * values[..., -2::-1]], axis=-1)  # [0, pi]
    circle = np.concatenate([half, sign * half[..., -2:0:-1]], axis=-1)  # [0, 2 pi)
    n = circle.shape[-1]
    derivative = np.fft.irfft(1j * np.arange(n // 2 + 1) * np.fft.rfft(circle), n)
    return derivative[..., : values.shape[-1]]
