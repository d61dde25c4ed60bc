"""What follows from the deflection of one lens: magnification, critical curves, caustics, Einstein radius, images.

A deflection is any function of x and y ["], in float64, to its two components ["], such as

    lens = Composite({"": "epl", "shear": "shear"})
    deflection = lambda x, y: lens.deflection(x, y, parameters)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import find_contours
from torch import Tensor

from lenspipe.lens.profiles import Vector

Deflection = Callable[[Tensor, Tensor], Vector]
Curve = NDArray[np.float64]
NEWTON_STEPS = 8
POINTS = 300  # of a critical curve, at least
ON_CURVE = 1e-7  # greatest eigenvalue at a point of a critical curve
SOLVED = 1e-9  # greatest distance ["] in the source plane between an image, traced back, and its source
SHIFT = 1e-5  # step of finite differences ["]
THERE = 1e-12  # distance ["] in the source plane at which Newton's method has found an image
RAY_STEPS = 50  # places on a ray where it is looked for the critical curve
BISECTIONS = 17  # between two of them, to a millionth of the curve's size
SAME = 1e-5  # images closer than this ["] are one


@dataclass(frozen=True)
class Images:
    """Images of a point source, brightest first: place [image, 2] ["] and signed magnification [image]."""

    positions: Curve
    magnifications: Curve


def jacobian(deflection: Deflection, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries xx, xy, yx, yy of d(source) / d(image) = 1 - d alpha at (x, y), by forward mode."""

    def trace(x: Tensor, y: Tensor) -> Vector:
        a, b = deflection(x, y)
        return x - a, y - b

    x, y = x.contiguous(), y.contiguous()
    ways = torch.eye(2, dtype=x.dtype).reshape(2, 2, *[1] * x.dim()).expand(2, 2, *x.shape)
    along = torch.func.vmap(lambda way: torch.func.jvp(trace, (x, y), (way[0], way[1]))[1])(ways)
    return along[0][0], along[0][1], along[1][0], along[1][1]


def magnification(deflection: Deflection, x: Tensor, y: Tensor) -> Tensor:
    """Signed magnification of a point source at image positions (x, y); infinite on a critical curve."""
    xx, xy, yx, yy = jacobian(deflection, x, y)
    return 1 / (xx * yy - xy * yx)


def eigenvalues(deflection: Deflection, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """1 - kappa - gamma, zero on tangential critical curves, and 1 - kappa + gamma, zero on radial ones.

    Several planes also turn the image: their product is the determinant there too.
    """
    return _of_jacobian(*jacobian(deflection, x, y))


def _of_jacobian(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor]:
    middle = torch.sqrt(((xx + yy) / 2) ** 2 + ((xy - yx) / 2) ** 2) * torch.sign(xx + yy)
    half = torch.sqrt(((xx - yy) / 2) ** 2 + ((xy + yx) / 2) ** 2 + torch.finfo(xx.dtype).tiny)
    return middle - half, middle + half


def critical_curves(deflection: Deflection, half_width: float, pixels: int = 400) -> tuple[list[Curve], list[Curve]]:
    """Closed tangential and closed radial critical curves [point, 2] ["], longest first.

    Contours of the eigenvalues on a grid over [-half_width, half_width], every point then brought onto the curve by
    Newton's method. A curve that leaves the field or is smaller than a grid cell is not found; a lens of slope 2 or
    steeper has no radial one.
    """
    fields = _eigenvalue_fields(deflection, half_width, pixels)
    tangential, radial = (_curves(deflection, half_width, kind, fields[kind]) for kind in (0, 1))
    return tangential, radial


def _eigenvalue_fields(deflection: Deflection, half_width: float, pixels: int) -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-half_width, half_width, pixels, dtype=torch.float64)
    y, x = torch.meshgrid(axis + 1e-9, axis + 1e-9, indexing="ij")
    return eigenvalues(deflection, x, y)


def _curves(deflection: Deflection, half_width: float, kind: int, values: Tensor) -> list[Curve]:
    """Closed curves on which an eigenvalue, with these values on the grid, is zero; longest first."""
    field = torch.nan_to_num(values, nan=-1e6, posinf=1e6, neginf=-1e6).clamp(-1e3, 1e3).numpy()
    cell = 2 * half_width / (len(field) - 1)
    curves = []
    for contour in find_contours(field, 0.0):
        if len(contour) > 8 and np.array_equal(contour[0], contour[-1]):
            rough = _denser(contour[:, ::-1]) * cell - half_width
            refined = _onto_curve(deflection, kind, rough)
            if refined is not None and np.abs(refined - rough).max() < cell:
                curves.append(refined)
    return sorted(curves, key=len, reverse=True)


def _denser(points: Curve) -> Curve:
    """At least POINTS points on the same polygon: a small curve in the image is a large one in the source plane."""
    between = max(1, -(-POINTS // len(points)))
    at = np.arange((len(points) - 1) * between + 1) / between
    return np.stack([np.interp(at, np.arange(len(points)), points[:, i]) for i in (0, 1)], 1)


def _onto_curve(deflection: Deflection, kind: int, points: Curve) -> Curve | None:
    """The points moved along the gradient of an eigenvalue to where it is zero; None where that is not reached."""
    x, y = (torch.from_numpy(points[:, i].copy()) for i in (0, 1))
    for _ in range(NEWTON_STEPS):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        with torch.enable_grad():
            value = eigenvalues(deflection, x, y)[kind]
            gx, gy = torch.autograd.grad(value.sum(), (x, y))
        x, y, value = x.detach(), y.detach(), value.detach()
        if bool(value.abs().max() < ON_CURVE):
            return torch.stack([x, y], 1).numpy()
        step = value / (gx**2 + gy**2)
        x, y = x - step * gx, y - step * gy
    return None


def traced(deflection: Deflection, curve: Curve) -> Curve:
    """Points [point, 2] ["] of the image plane in the source plane: of a critical curve, its caustic."""
    x, y = (torch.from_numpy(curve[:, i].copy()) for i in (0, 1))
    a, b = deflection(x, y)
    return torch.stack([x - a, y - b], 1).numpy()


def enclosed_area(curves: Curve) -> NDArray:
    """Areas ["^2] [...] within closed curves [..., point, 2]; NaN for curves with gaps."""
    x, y = curves[..., 0], curves[..., 1]
    return np.abs((x * np.roll(y, -1, -1) - y * np.roll(x, -1, -1)).sum(-1)) / 2


def einstein_radius(deflection: Deflection, half_width: float, pixels: int = 400) -> float:
    """Radius ["] of the circle with the area of the largest tangential critical curve; NaN where there is none."""
    tangential = _curves(deflection, half_width, 0, _eigenvalue_fields(deflection, half_width, pixels)[0])
    return float(np.sqrt(max(map(enclosed_area, tangential)) / np.pi)) if tangential else float("nan")


def tangential_radii(deflection: Deflection, centre: Vector, largest: Tensor, angles: Tensor) -> Tensor:
    """Distance ["] of the outer tangential critical curve from `centre` in given directions, of many lenses at once.

    deflection: of x, y [lens, n]; centre, largest: [lens], the latter beyond the curve ["]; angles: [n]. By bisection
    of the first eigenvalue, which is negative within: for curves that every ray crosses once, such as those of an
    elliptical power law with shear. Where there are others further out the first is taken, of those that RAY_STEPS
    places on the ray tell apart; NaN where there is none.
    """
    cos, sin = torch.cos(angles), torch.sin(angles)

    def within(radius: Tensor) -> Tensor:
        x, y = centre[0][:, None] + radius * cos, centre[1][:, None] + radius * sin
        return _of_jacobian(*_by_differences(deflection, x, y)[2:])[0] < 0

    places = torch.linspace(0.02, 1.0, RAY_STEPS, dtype=largest.dtype) * largest[:, None]  # [lens, place]
    inside = torch.stack([within(at[:, None].expand(-1, len(angles))) for at in places.unbind(1)])
    crosses = inside[0] & ~inside.all(0)
    first = inside.to(torch.uint8).argmin(0).clamp(min=1)  # the first place without
    low, high = places.gather(1, first - 1), places.gather(1, first)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = within(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(crosses, (low + high) / 2, torch.nan)


def image_positions(
    deflection: Deflection, source: tuple[float, float], half_width: float, pixels: int = 200
) -> Images:
    """All images of a point source ["] within [-half_width, half_width], brightest first.

    The grid's triangles are traced to the source plane; those that hold the source start Newton's method. Pairs
    closer together than a cell of the grid may be missed.
    """
    axis = np.linspace(-half_width, half_width, pixels)
    vertices = np.stack([a.ravel() for a in np.meshgrid(axis, axis + 1e-9)], 1)
    offset = (traced(deflection, vertices) - np.asarray(source)).reshape(pixels, pixels, 2)
    corners = offset[:-1, :-1], offset[:-1, 1:], offset[1:, :-1], offset[1:, 1:]
    inside = _holds_origin(corners[0], corners[1], corners[2]) | _holds_origin(corners[3], corners[1], corners[2])
    rows, columns = np.nonzero(inside)
    cell = axis[1] - axis[0]
    starts = np.stack([axis[columns], axis[rows]], 1) + cell / 2
    x, y = (torch.from_numpy(starts[:, i].copy()) for i in (0, 1))
    for _ in range(4 * NEWTON_STEPS):
        u, v, xx, xy, yx, yy = _by_differences(deflection, x, y)
        u, v = u - source[0], v - source[1]
        determinant = xx * yy - xy * yx
        dx, dy = (yy * u - xy * v) / determinant, (xx * v - yx * u) / determinant
        shrink = (cell / torch.hypot(dx, dy).clamp(min=1e-300)).clamp(max=1.0)
        x, y = x - shrink * dx, y - shrink * dy
        if not bool((torch.hypot(u, v) > THERE).any()):
            break
    ends = torch.stack([x, y], 1).numpy()
    good = np.hypot(*(traced(deflection, ends) - np.asarray(source)).T) < SOLVED
    good &= np.abs(ends).max(1) <= half_width + cell
    kept: list[NDArray[np.float64]] = []
    for end in ends[good]:
        if all(np.hypot(*(end - other)) > SAME for other in kept):
            kept.append(end)
    positions = np.array(kept).reshape(-1, 2)
    strength = magnification(deflection, *(torch.from_numpy(positions[:, i].copy()) for i in (0, 1))).numpy()
    order = np.argsort(-np.abs(strength))
    return Images(positions[order], strength[order])


def _by_differences(deflection: Deflection, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Source positions and entries xx, xy, yx, yy of the Jacobian at points [..., n], near enough and cheap."""
    steps = ((0.0, 0.0), (SHIFT, 0.0), (-SHIFT, 0.0), (0.0, SHIFT), (0.0, -SHIFT))
    at_x, at_y = (torch.cat([axis + step[i] for step in steps], -1) for i, axis in enumerate((x, y)))
    a, b = deflection(at_x, at_y)
    u, v = ((at - by).unflatten(-1, (5, -1)).unbind(-2) for at, by in ((at_x, a), (at_y, b)))
    slopes = [(s[i] - s[i + 1]) / (2 * SHIFT) for s, i in ((u, 1), (u, 3), (v, 1), (v, 3))]
    return u[0], v[0], *slopes


def _holds_origin(a: NDArray, b: NDArray, c: NDArray) -> NDArray[np.bool_]:
    """Whether triangles with these corners [..., 2] hold the origin."""

    def cross(p: NDArray, q: NDArray) -> NDArray:
        return p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]

    sides = np.stack([cross(a, b), cross(b, c), cross(c, a)])
    return np.asarray((sides >= 0).all(0) | (sides <= 0).all(0))
