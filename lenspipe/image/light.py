"""Light profiles: surface brightness at (x, y) ["], as pure functions of tensors.

x, y: [lens, ...]; parameters are numbers or [lens, 1, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenspipe.lens.coordinates import rotate
from lenspipe.lens.parameters import LIGHT_PROFILES, MGE_AMPLITUDES, component_parameters, qualified

FAINTEST = -80.0  # logarithm of a Gaussian below which it counts as that: near underflow exp takes ten times as long


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
    radius2 = elliptical_radius2(x, y, q, phi, center_x, center_y)
    return mixture(radius2, amplitude[..., None], -0.5 / sd[..., None] ** 2)


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
    each = torch.stack(torch.broadcast_tensors(*(amplitudes[name] for name in MGE_AMPLITUDES)), -1)
    return mixture(radius2, each, mge_rates(sd_min, sd_max))


def mge_rates(sd_min: Tensor, sd_max: Tensor) -> Tensor:
    """-1 / (2 sd^2) ["^-2] of the Gaussians of `mge`: [..., k]."""
    shares = torch.linspace(0, 1, len(MGE_AMPLITUDES), dtype=sd_min.dtype, device=sd_min.device)
    return -0.5 * torch.exp(-2 * torch.lerp(torch.log(sd_min)[..., None], torch.log(sd_max)[..., None], shares))


def mixture(radius2: Tensor, amplitudes: Tensor, rates: Tensor) -> Tensor:
    """The sum over k of amplitudes[..., k] exp(rates[..., k] radius2).

    radius2: [lens, ...]; the others are [k] or [lens, 1, ..., k].
    """
    shape = torch.broadcast_shapes(radius2.shape, amplitudes.shape[:-1], rates.shape[:-1])
    lenses = 1 if all(lines.shape[:-1].numel() == 1 for lines in (amplitudes, rates)) else shape[0]
    own = (lenses, *[1] * (len(shape) - 1))[: len(shape)]
    amplitudes, rates = (lines.expand(*own, -1).reshape(lenses, lines.shape[-1]) for lines in (amplitudes, rates))
    places = radius2.expand(shape).reshape(lenses, shape.numel() // max(1, lenses))
    return _Mixture.apply(places, amplitudes, rates)[0].reshape(shape)


def columns(radius2: Tensor, rates: Tensor) -> Tensor:
    """Each exp(rates[k] radius2), [lens, k, n], of radius2 [lens, n] and rates [lens, k]."""
    return (radius2[:, None] * rates[..., None]).clamp_(min=FAINTEST).exp_()


class _Mixture(torch.autograd.Function):
    """Of radius2 [lens, n], amplitudes and rates [lens, k]: the sum of Gaussians [lens, n], and each of them.

    With the derivatives written out they are gone over a few times, not a dozen. Second derivatives are those of
    reverse mode twice; those by forward mode of reverse mode are wrong where gradients are not enabled.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(radius2: Tensor, amplitudes: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        each = columns(radius2, rates)
        return _sum(amplitudes, each), each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if gradients[0] is None:
            return None, None, None
        radius2, amplitudes, rates, each = ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of what was kept are not known
            each = columns(radius2, rates)
        moments = torch.stack([gradients[0], gradients[0] * radius2], 1) @ each.mT
        return gradients[0] * _sum(amplitudes * rates, each), moments[:, 0], amplitudes * moments[:, 1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        radius2, amplitudes, rates = ctx.saved_tensors
        of_radius2, of_amplitudes, of_rates = tangents
        each, moved = columns(radius2, rates), torch.zeros_like(radius2)
        if of_radius2 is not None:
            moved = moved + of_radius2 * _sum(amplitudes * rates, each)
        if of_amplitudes is not None:
            moved = moved + _sum(of_amplitudes, each)
        if of_rates is not None:
            moved = moved + radius2 * _sum(amplitudes * of_rates, each)
        return moved, None


def _sum(weights: Tensor, each: Tensor) -> Tensor:
    """[lens, n] of weights [lens, k] and Gaussians [lens, k, n]."""
    return (weights[:, None] @ each)[:, 0]


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
        """Sum of the surface brightnesses; x, y ["]."""
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
        rates = mge_rates(rest.pop("sd_min"), rest.pop("sd_max"))
        radius2 = elliptical_radius2(x, y, **rest)
        return [mixture(radius2, torch.ones_like(rate), rate) for rate in rates.split(1, -1)]
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
