"""Ray tracing through lenses at several redshifts (Blandford & Narayan 1986; Schneider 2019).

Positions on every plane are angles ["]. With alpha_i the deflection by plane i alone, scaled to the source,

    theta_j = theta - sum_{i < j} B_ij alpha_i(theta_i),   B_ij = D_ij D_s / (D_j D_is),

and the source is the plane at which every B is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lenspipe.lens.profiles import Vector

if TYPE_CHECKING:
    from astropy.cosmology import FLRW

Plane = Callable[[Tensor, Tensor], Vector]


def distance_ratios(redshifts: Sequence[float], z_source: float, cosmology: FLRW) -> Tensor:
    """B_ij [plane, plane] of lens planes in order of redshift, zero where i >= j; float64.

    Raises ValueError where the planes are not in order or the source is not behind all of them.
    """
    z = np.asarray(redshifts, dtype=float)
    if not (np.diff(z) >= 0).all() or (len(z) and not (z[0] > 0 and z[-1] < z_source)):
        raise ValueError(f"redshifts {list(redshifts)} must grow, above 0 and below that of the source, {z_source}")
    ratios = np.zeros((len(z), len(z)))
    to_source = cosmology.angular_diameter_distance(z_source).value
    for i, j in zip(*np.triu_indices(len(z), 1), strict=True):
        between = cosmology.angular_diameter_distance(z[i], z[j]).value
        there = cosmology.angular_diameter_distance(z[j]).value
        behind = cosmology.angular_diameter_distance(z[i], z_source).value
        ratios[i, j] = between * to_source / (there * behind)
    return torch.from_numpy(ratios)


def deflection(x: Tensor, y: Tensor, planes: Sequence[Plane], ratios: Tensor) -> Vector:
    """Total deflection theta - theta_source ["] at (x, y) ["].

    planes: the deflection of each as a function of the position on it, in order of redshift; ratios: from
    `distance_ratios`.
    """
    bent: list[Vector] = []
    for j, plane in enumerate(planes):
        here_x, here_y = x, y
        for i, (alpha_x, alpha_y) in enumerate(bent):
            here_x, here_y = here_x - ratios[i, j] * alpha_x, here_y - ratios[i, j] * alpha_y
        bent.append(plane(here_x, here_y))
    zero = torch.zeros_like(x)
    return sum((a for a, _ in bent), zero), sum((b for _, b in bent), zero)
