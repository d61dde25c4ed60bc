"""The paper's deflection table (appendix A): unit-circle deflections of the EPL, tabulated in (eta, q, gamma).

Radius and Einstein radius scale out (eqs. A6-A7), the four quadrants are mirror images (eq. A5). Chebyshev nodes in q
and gamma make the interpolation there polynomial; cubic Hermite pieces in eta, with spectral derivatives at the nodes,
make it continuous with its first derivative. q and gamma are scalars of a lens, so the table is first contracted over
them to one periodic function of eta per lens: the cost per pixel does not depend on the size of the table. Derivatives
are those of the interpolant, written out: a gradient keeps none of its steps in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenspipe.lens.coordinates import rotate
from lenspipe.lens.epl import quadrature_deflection

CHUNK_RAYS = 524288  # rays of a chunk: bounds the memory of its temporaries
ON_EDGE = 1e-6  # [rad] from the ends of the Chebyshev interval, within which a slope is that at this angle


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

    @cached_property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The least and greatest q and gamma."""
        return {name: (float(n[0]), float(n[-1])) for name, n in (("q", self.q), ("gamma", self.gamma))}

    def check(self, q: Tensor, gamma: Tensor) -> None:
        """Raise ValueError, with the values, where a parameter is outside the table; NaN passes, and makes NaN."""
        for name, value in (("q", q.detach()), ("gamma", gamma.detach())):
            low, high = self.bounds[name]
            outside = (value < low - 1e-6) | (value > high + 1e-6)
            if bool(outside.any()):
                found = ", ".join(f"{v:.4g}" for v in value[outside].tolist())
                raise ValueError(f"{name} = {found} is outside the deflection table [{low:g}, {high:g}]")

    def deflection(
        self,
        x: Tensor,
        y: Tensor,
        theta_E: Tensor,
        gamma: Tensor,
        q: Tensor,
        phi: Tensor,
        center_x: Tensor,
        center_y: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Deflection ["] at x, y ["], [lens, n] each; the parameters are [lens]. Zero at the centre.

        Differentiable in both modes, with respect to everything. Raises ValueError, with the values, where q or gamma
        is outside the table.
        """
        self.check(q, gamma)
        tensors = (x, y, theta_E, gamma, q, phi, center_x, center_y)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return _Deflection.apply(*tensors, self, keep)[:2]

    def partial_derivatives(self, *lens: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Derivatives of both components [lens, n] with respect to x, y, theta_E ... center_y, as of `deflection`."""
        place = _Place(self, *lens)
        a, b = place.components()
        (m_eta, n_eta), (m_q, n_q), (m_gamma, n_gamma) = _slopes(self, place.q, place.gamma[:, 0], place.cell, place.t)
        sign = place.sign_u * place.sign_v
        a_turned, b_turned = sign * place.power_u * m_eta, sign * place.power_v * n_eta
        nearness = 1 / (place.radius2 * place.theta_E)
        a_grown, b_grown = ((2 - place.gamma) * component for component in (a, b))

        def moved(grown: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
            """Of one component in the frame of the lens, along x and y: the point moves outward and around."""
            along_u, along_v = grown * place.u - turned * place.v, grown * place.v + turned * place.u
            return rotate(along_u * nearness, along_v * nearness, -place.phi)

        (a_x, a_y), (b_x, b_y) = moved(a_grown, a_turned), moved(b_grown, b_turned)
        steepness = (place.gamma - 1) / place.theta_E
        in_lens_frame = [
            (a_x, b_x),
            (a_y, b_y),
            (a * steepness, b * steepness),
            (place.power_u * m_gamma - a * place.log_radius, place.power_v * n_gamma - b * place.log_radius),
            (place.power_u * m_q, place.power_v * n_q),
            (-a_turned - b, a - b_turned),
        ]
        x, y, *others = (rotate(along_a, along_b, -place.phi) for along_a, along_b in in_lens_frame)
        return x, y, *others, (-x[0], -x[1]), (-y[0], -y[1])

    def contract(self, q: Tensor, gamma: Tensor) -> Tensor:
        """Cubic pieces in eta of each lens [lens, 8, n_eta - 1], four coefficients for either component."""
        return self._pieces(self._basis("q", q)[0], self._basis("gamma", gamma)[0])

    def contract_with_slopes(self, q: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pieces of `contract` and their derivatives with respect to q and to gamma."""
        (of_q, slope_q), (of_gamma, slope_gamma) = self._basis("q", q), self._basis("gamma", gamma)
        pieces = self._pieces(torch.cat([of_q, slope_q, of_q]), torch.cat([of_gamma, of_gamma, slope_gamma]))
        value, by_q, by_gamma = pieces.chunk(3)
        return value, by_q, by_gamma

    @cached_property
    def _coefficients(self) -> Tensor:
        """Values and slopes as Chebyshev series in q and gamma: [n_q, n_gamma * 4 * n_eta]."""
        table = torch.cat([self.values, self.slopes]).double()
        q, gamma = (torch.linalg.inv(self._basis(name, n)[0]) for name, n in (("q", self.q), ("gamma", self.gamma)))
        series = torch.einsum("iq,jg,cqge->ijce", q.double(), gamma.double(), table)
        return series.flatten(1).to(self.values.dtype).contiguous()

    def _basis(self, name: str, at: Tensor) -> tuple[Tensor, Tensor]:
        """Chebyshev polynomials at `at` [lens] and their derivatives: [lens, n] each, float64."""
        low, high = self.bounds[name]
        order = torch.arange(len(getattr(self, name)), dtype=torch.float64, device=at.device)
        angle = torch.acos(((2 * at.double() - low - high) / (high - low)).clamp(-1, 1))[:, None]
        inside = angle.clamp(ON_EDGE, torch.pi - ON_EDGE)
        slope = order * torch.sin(order * inside) / torch.sin(inside) * (2 / (high - low))
        return torch.cos(order * angle), slope

    def _pieces(self, of_q: Tensor, of_gamma: Tensor) -> Tensor:
        n_gamma, n_eta = len(self.gamma), self.values.shape[-1]
        dtype = self.values.dtype
        rows = (of_q.to(dtype) @ self._coefficients).unflatten(1, (n_gamma, 4, n_eta))
        table = (of_gamma.to(dtype)[:, None] @ rows.flatten(2)).unflatten(2, (4, n_eta))[:, 0]
        step = torch.pi / 2 / (n_eta - 1)
        f, d = table[:, :2], table[:, 2:] * step
        rise, left, right = f[..., 1:] - f[..., :-1], d[..., :-1], d[..., 1:]
        cubic = f[..., :-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise
        return torch.stack(cubic, dim=2).flatten(1, 2)


class _Deflection(torch.autograd.Function):
    """The deflection with its derivatives written out.

    With (u, v) = R(phi) (x - center) / theta_E the deflection is R(-phi) (A, B),

        A = theta_E s M(eta) sign u,  B = theta_E s N(eta) sign v,  s = (u^2 + v^2)^(1 - gamma/2),

    and eta = atan(|v| / |u|). Where a gradient is wanted (`keep`), what its backward pass needs along each ray is kept
    instead of found again: 40 bytes in single precision.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *tensors, table, keep = inputs
        return _chunked(partial(_forward, keep=keep), tensors, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        kept = output[2:]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*inputs[:8], *kept)
        ctx.save_for_forward(*inputs[:8])
        ctx.table = inputs[8]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        lens, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        again = torch.is_grad_enabled()  # derivatives of what was kept are not known
        tensors = [*lens, *gradients[:2], *(() if again else kept)]
        return *_chunked(_backward, tensors, ctx.table), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        # the same for all directions of a vectorised call; of those it takes two fused products a tangent
        partials = ctx.table.partial_derivatives(*ctx.saved_tensors[:8])
        moved = [torch.zeros_like(ctx.saved_tensors[0])] * 2
        for tangent, along in zip(tangents[:8], partials, strict=True):
            if tangent is not None:
                wide = tangent if tangent.dim() == 2 else tangent[:, None]
                moved = [torch.addcmul(so_far, wide, slope) for so_far, slope in zip(moved, along, strict=True)]
        return *moved, *[None] * (len(ctx.saved_tensors) - 8)


def _chunked(
    work: Callable[..., tuple[Tensor, ...]], tensors: Iterable[Tensor], table: DeflectionTable
) -> tuple[Tensor, ...]:
    """`work` on a few lenses at a time: its many temporaries take no more memory for a larger batch."""
    tensors = list(tensors)
    lenses, rays = tensors[0].shape
    size = max(1, CHUNK_RAYS // max(1, rays))
    if lenses <= size or tensors[0].is_cuda:
        return work(*tensors, table)
    parts = [work(*chunk, table) for chunk in zip(*(t.split(size) for t in tensors), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _forward(*inputs: Any, keep: bool) -> tuple[Tensor, ...]:
    *lens, table = inputs
    place = _Place(table, *lens)
    a, b = place.components()
    deflection = rotate(a, b, -place.phi)
    return (*deflection, *place.kept(a, b)) if keep else deflection


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of x, y ... center_y, from these, the gradients of the deflection and what `_Place.kept` returned."""
    x, y, theta_E, gamma, q, phi, center_x, center_y, gradient_x, gradient_y, *kept, table = inputs
    if not kept:
        place = _Place(table, x, y, theta_E, gamma, q, phi, center_x, center_y)
        kept = list(place.kept(*place.components()))
    u, v, cell, t, log_radius, power_u, power_v, a, b = kept
    (m_eta, n_eta), (m_q, n_q), (m_gamma, n_gamma) = _slopes(table, q, gamma, cell, t)
    along, across = rotate(gradient_x, gradient_y, phi[:, None])
    of_power = torch.addcmul(along * a, across, b)
    of_turn = torch.addcmul(along * power_v * m_eta, across * power_u, n_eta)
    turning = torch.addcmul(across * a, along, b, value=-1)
    left, right = along * power_u, across * power_v
    of_q = torch.addcmul(left * m_q, right, n_q)
    of_gamma = torch.addcmul(torch.addcmul(left * m_gamma, right, n_gamma), log_radius, of_power, value=-1)
    # in units of the radius: u and v over r^2, times 1 / theta_E
    nearness = 1 / (torch.addcmul(u * u, v, v) + _tiny(u)) / theta_E[:, None]
    inward, sideways = of_power * ((2 - gamma)[:, None] * nearness), of_turn * nearness
    of_u = torch.addcmul(inward * u, sideways, v, value=-1)
    of_v = torch.addcmul(inward * v, sideways, u)
    of_x, of_y = rotate(of_u, of_v, -phi[:, None])
    return (
        of_x,
        of_y,
        (gamma - 1) * of_power.sum(-1) / theta_E,
        of_gamma.sum(-1),
        of_q.sum(-1),
        turning.sum(-1) - of_turn.sum(-1),
        -of_x.sum(-1),
        -of_y.sum(-1),
    )


class _Place:
    """Points [lens, n] in the frame of their lens, in units of theta_E, and where in the table they are."""

    def __init__(
        self,
        table: DeflectionTable,
        x: Tensor,
        y: Tensor,
        theta_E: Tensor,
        gamma: Tensor,
        q: Tensor,
        phi: Tensor,
        center_x: Tensor,
        center_y: Tensor,
    ):
        self.table, self.q = table, q
        self.theta_E, self.gamma, self.phi = theta_E[:, None], gamma[:, None], phi[:, None]
        scale = 1 / self.theta_E
        c, s = torch.cos(self.phi) * scale, torch.sin(self.phi) * scale
        dx, dy = x - center_x[:, None], y - center_y[:, None]
        self.u, self.v = torch.addcmul(c * dx, s, dy), torch.addcmul(c * dy, -s, dx)
        tiny = _tiny(x)
        n = table.values.shape[-1] - 1
        eta = torch.atan2(self.v.abs(), self.u.abs() + tiny) * (n / (torch.pi / 2))
        self.cell = eta.detach().long().clamp(0, n - 1)
        self.t = eta - self.cell
        radius2 = torch.addcmul(self.u * self.u, self.v, self.v)
        self.radius2 = radius2 + tiny
        self.log_radius = torch.log(self.radius2) / 2
        power = self.theta_E * torch.exp((2 - self.gamma) * self.log_radius)
        power = power * (radius2 / self.radius2)  # no deflection at the centre itself
        one = self.u.new_ones(())  # on an axis either sign serves: M or N is zero there, its slope is not
        self.sign_u, self.sign_v = torch.copysign(one, self.u), torch.copysign(one, self.v)
        self.power_u, self.power_v = power * self.sign_u, power * self.sign_v

    def components(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        pieces = self.table.contract(self.q, self.gamma[:, 0])
        m, n = (_polynomial(_gathered(pieces[:, k : k + 4], self.cell), self.t) for k in (0, 4))
        return self.power_u * m, self.power_v * n

    def kept(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """What a backward pass needs; a, b: A and B."""
        return self.u, self.v, self.cell, self.t, self.log_radius, self.power_u, self.power_v, a, b


def _slopes(
    table: DeflectionTable, q: Tensor, gamma: Tensor, cell: Tensor, t: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Derivatives of M and N with respect to eta, q and gamma: those of the interpolant."""
    pieces, of_q, of_gamma = table.contract_with_slopes(q, gamma)
    per_cell = (table.values.shape[-1] - 1) * 2 / torch.pi
    order = per_cell * torch.arange(1, 4, dtype=t.dtype, device=t.device)[:, None]
    of_eta = torch.cat([pieces[:, 1:4] * order, pieces[:, 5:8] * order], 1)
    return tuple(
        (_polynomial(_gathered(p[:, :k], cell), t), _polynomial(_gathered(p[:, k:], cell), t))
        for p, k in ((of_eta, 3), (of_q, 4), (of_gamma, 4))
    )


def _gathered(pieces: Tensor, cell: Tensor) -> list[Tensor]:
    """The coefficients [lens, k, cells] of the rays' cells [lens, rays]: k of [lens, rays]."""
    lenses, rays = cell.shape
    bands = max(1, torch.get_num_threads() // max(1, lenses))  # gather gives a thread whole rows
    if bands == 1 or rays % bands or pieces.is_cuda:
        return [coefficient.gather(1, cell) for coefficient in pieces.unbind(1)]
    cell, wide = cell.reshape(lenses * bands, -1), pieces.repeat_interleave(bands, 0)
    return [coefficient.gather(1, cell).reshape(lenses, rays) for coefficient in wide.unbind(1)]


def _polynomial(coefficients: list[Tensor], t: Tensor) -> Tensor:
    """The sum of coefficients[k] t^k."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = torch.addcmul(coefficient, t, value)
    return value


def _tiny(x: Tensor) -> float:
    """A squared radius that is zero but for its logarithm and its inverse."""
    return torch.finfo(x.dtype).tiny ** 0.5


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


def _quadrant_slope(values: np.ndarray, *, odd: bool) -> np.ndarray:
    """Spectral derivative in eta of a function on one quadrant: odd or even about 0, the opposite about pi/2."""
    sign = -1.0 if odd else 1.0
    half = np.concatenate([values, -sign * values[..., -2::-1]], axis=-1)  # [0, pi]
    circle = np.concatenate([half, sign * half[..., -2:0:-1]], axis=-1)  # [0, 2 pi)
    n = circle.shape[-1]
    derivative = np.fft.irfft(1j * np.arange(n // 2 + 1) * np.fft.rfft(circle), n)
    return derivative[..., : values.shape[-1]]
