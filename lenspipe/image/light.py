"""Light profiles: surface brightness at (x, y) ["], as pure functions of broadcastable tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lenspipe.lens.coordinates import rotate
from lenspipe.lens.parameters import LIGHT_PROFILES, MGE_AMPLITUDES, component_parameters, qualified


def elliptical_radius2(x: Tensor, y: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor) -> Tensor:
    """q x'^2 + y'^2 / q ["^2]: the square of the radius on the intermediate axis; never zero, for its logarithm."""
    a, b = rotate(x - center_x, y - center_y, phi)
    return torch.addcmul(q * a.square() + torch.finfo(x.dtype).tiny ** 0.5, b.square(), 1 / q)


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
    logarithm = torch.log(elliptical_radius2(x, y, q, phi, center_x, center_y)) / 2 - torch.log(R_sersic)
    return amplitude * torch.exp(-sersic_b(n_sersic) * (torch.exp(logarithm / n_sersic) - 1))


def sersic_b(n: Tensor) -> Tensor:
    """b_n, for half the light within R_sersic (Ciotti & Bertin 1999, eq. 18): to 1e-4 of the light for n >= 0.5."""
    return 2 * n - 1 / 3 + 4 / (405 * n) + 46 / (25515 * n**2) + 131 / (1148175 * n**3) - 2194697 / (30690717750 * n**4)


def gaussian(
    x: Tensor, y: Tensor, amplitude: Tensor, sd: Tensor, q: Tensor, phi: Tensor, center_x: Tensor, center_y: Tensor
) -> Tensor:
    """Gaussian: `amplitude` at its centre, standard deviation `sd` ["] on the intermediate axis.

    A galaxy as a set of Gaussians (Cappellari 2002) is their sum, linear in the amplitudes; the flux of each is
    2 pi sd^2 amplitude.
    """
    return amplitude * torch.exp(-elliptical_radius2(x, y, q, phi, center_x, center_y) / (2 * sd**2))


def mge(
    x: Tensor,
    y: Tensor,
    *,
    sd_min: Tensor,
    sd_max: Tensor,
    q: Tensor,
    phi: Tensor,
    center_x: Tensor,
    center_y: Tensor,
    **amplitudes: Tensor,
) -> Tensor:
    """Multi-Gaussian expansion (Cappellari 2002): Gaussians of one shape, amplitudes `amplitude0` and so on.

    Their standard deviations on the intermediate axis, in even ratios from `sd_min` to `sd_max` ["], are given, so
    that the profile is linear in its amplitudes.
    """
    radius2 = elliptical_radius2(x, y, q, phi, center_x, center_y)
    share = torch.linspace(0, 1, len(MGE_AMPLITUDES), dtype=x.dtype, device=x.device)
    share = share.reshape(-1, *[1] * x.dim())  # all Gaussians at once: forward mode costs by the operation
    precision = torch.exp(-2 * ((1 - share) * torch.log(sd_min) + share * torch.log(sd_max)))
    heights = torch.stack([amplitudes[name] + x.new_zeros([1] * x.dim()) for name in MGE_AMPLITUDES])
    return (heights * torch.exp(radius2 * (-0.5 * precision))).sum(0)


PROFILES: dict[str, Callable[..., Tensor]] = {"sersic": sersic, "gaussian": gaussian, "mge": mge}
AMPLITUDES = {"sersic": ("amplitude",), "gaussian": ("amplitude",), "mge": MGE_AMPLITUDES}


@dataclass(frozen=True)
class Light:
    """Light profiles that add, by the names of their components, such as {"bulge": "sersic", "disc": "sersic"}.

    The parameters of a component are named `<component>_<parameter>`, as in `Composite`. Raises ValueError for a
    profile that is not known.
    """

    profiles: Mapping[str, str]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.profiles.values()) - PROFILES.keys()):
            raise ValueError(f"no light profile {', '.join(unknown)}; there are {', '.join(PROFILES)}")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return component_parameters(self.profiles, LIGHT_PROFILES)

    def brightness(self, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Sum of the surface brightnesses; x, y ["] and parameters broadcastable."""
        total = torch.zeros_like(x)
        for component, profile in self.profiles.items():
            total = total + PROFILES[profile](x, y, **self._own(component, profile, parameters))
        return total

    def columns(self, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Each amplitude in turn 1, all others 0, for `linear_amplitudes`: x, y [lens, ...] to [lens, k, ...]."""
        parts = []
        for component, profile in self.profiles.items():
            own = self._own(component, profile, parameters)
            none = {name: torch.zeros_like(own[name]) for name in AMPLITUDES[profile]}
            for name in none:
                parts.append(PROFILES[profile](x, y, **own | none | {name: torch.ones_like(own[name])}))
        return torch.stack(parts, dim=1)

    def _own(self, component: str, profile: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: parameters[qualified(component, name)] for name in LIGHT_PROFILES[profile]}


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
