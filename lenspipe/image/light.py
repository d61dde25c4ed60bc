"""Light profiles: surface brightness at (x, y) ["], as pure functions of broadcastable tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
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
    total = torch.zeros_like(x)
    columns = mge_columns(x, y, sd_min, sd_max, q=q, phi=phi, center_x=center_x, center_y=center_y)
    for name, column in zip(MGE_AMPLITUDES, columns, strict=True):
        total = torch.addcmul(total, amplitudes[name], column)
    return total


def mge_columns(x: Tensor, y: Tensor, sd_min: Tensor, sd_max: Tensor, **ellipse: Tensor) -> Iterator[Tensor]:
    """The Gaussians of `mge`, each of amplitude 1; ellipse: what `elliptical_radius2` takes."""
    radius2 = elliptical_radius2(x, y, **ellipse)
    for share in torch.linspace(0, 1, len(MGE_AMPLITUDES), dtype=x.dtype, device=x.device):
        yield torch.exp(radius2 * (-0.5 * torch.exp(-2 * torch.lerp(torch.log(sd_min), torch.log(sd_max), share))))


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

    def slopes(self, x: Tensor, y: Tensor, parameters: Mapping[str, Tensor], names: Collection[str]) -> Tensor:
        """Derivatives of `brightness` with respect to parameters: x, y [lens, ...] to [lens, name, ...]."""
        found: dict[str, Tensor] = {}
        for component, profile in self.profiles.items():
            wanted = [name for name in LIGHT_PROFILES[profile] if qualified(component, name) in names]
            own = slopes(profile, x, y, self._own(component, profile, parameters), wanted)
            found |= {qualified(component, name): slope for name, slope in own.items()}
        return torch.stack([found[name] for name in names], 1)

    def _own(self, component: str, profile: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: parameters[qualified(component, name)] for name in LIGHT_PROFILES[profile]}


def unit_columns(profile: str, x: Tensor, y: Tensor, own: Mapping[str, Tensor]) -> list[Tensor]:
    """A profile with each of its amplitudes in turn 1, all others 0."""
    rest = {name: value for name, value in own.items() if name not in AMPLITUDES[profile]}
    if profile == "mge":
        return list(mge_columns(x, y, **rest))
    return [PROFILES[profile](x, y, amplitude=torch.ones_like(own["amplitude"]), **rest)]


def slopes(profile: str, x: Tensor, y: Tensor, own: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Derivatives of a profile with respect to some of its parameters.

    In an amplitude it is linear. Where it is, how it is turned and its axis ratio change it as a move of the place
    does, along which one reverse pass has its derivative: each place has its own. Along others in forward mode.
    """
    amplitudes = AMPLITUDES[profile]
    found = dict(zip(amplitudes, unit_columns(profile, x, y, own), strict=True) if set(amplitudes) & set(names) else ())
    if {"q", "phi", "center_x", "center_y"} & set(names):
        places = [axis.detach().requires_grad_() for axis in (x, y)]
        with torch.enable_grad():
            along_x, along_y = torch.autograd.grad(PROFILES[profile](*places, **own).sum(), places)
        from_x, from_y = x - own["center_x"], y - own["center_y"]
        (a, b), (along_a, along_b) = rotate(from_x, from_y, own["phi"]), rotate(along_x, along_y, own["phi"])
        found |= {"center_x": -along_x, "center_y": -along_y, "phi": along_x * from_y - along_y * from_x}
        found["q"] = (a * along_a - b * along_b) / (2 * own["q"])
    for name in set(names) - found.keys():

        def of_one(value: Tensor, name: str = name) -> Tensor:
            return PROFILES[profile](x, y, **{**own, name: value})

        found[name] = torch.func.jvp(of_one, (own[name],), (torch.ones_like(own[name]),))[1]
    return {name: found[name] for name in names}
