"""Images of many different lenses in one program: rays, source, light of the lens, PSF."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType

import torch
from torch import Tensor

from lenspipe.image.light import Light
from lenspipe.image.psf import Convolution
from lenspipe.image.source_plane import gathered, light_centre, sample
from lenspipe.image.window import SOURCE_EDGE, Window, block_middles, block_side, spread_bound
from lenspipe.lens import multi_plane
from lenspipe.lens.coordinates import axis_ratio, pixel_grid, theta_E_from_r_Ein
from lenspipe.lens.parameters import MASS_PROFILES, ellipses
from lenspipe.lens.profiles import Composite, Vector, epl_deflection, shear_deflection
from lenspipe.lens.table import DeflectionTable

Parameters = dict[str, Tensor]
Brightness = Callable[[Tensor, Tensor], Tensor]


def canonical(parameters: Parameters, shared: Mapping[str, str] = MappingProxyType({})) -> Parameters:
    """The parameters with `theta_E, q, phi` filled in from `r_Ein` or `e1, e2` where those were given; all [lens].

    So are `<name>_q, <name>_phi` of components.

    shared: parameters that are not given, each with the one whose value it shares, which may be one filled in.
    """
    filled = {name: parameters[other] for name, other in shared.items() if other in parameters} | parameters
    if "q" not in filled:
        filled["q"], filled["phi"] = axis_ratio(filled["e1"], filled["e2"])
    if "theta_E" not in filled:
        filled["theta_E"] = theta_E_from_r_Ein(filled["r_Ein"], filled["q"])
    filled = {name: filled[other] for name, other in shared.items()} | filled
    for component in ellipses(filled):
        q, phi = axis_ratio(filled[f"{component}_e1"], filled[f"{component}_e2"])
        filled = {f"{component}_q": q, f"{component}_phi": phi} | filled
    return filled


def in_source_image(p: Parameters, centre: Vector, x: Tensor, y: Tensor) -> Vector:
    """Points x, y ["] of the source plane, [lens, ny, nx] each, in units of the source image's width (paper, eq. 17).

    centre: x and y [lens] of the point of the source image that lies at `source_x, source_y`.
    """
    scale = 1 / p["source_size"][:, None, None]
    shift_u = (centre[0] - p["source_x"] / p["source_size"])[:, None, None]
    shift_v = (centre[1] - p["source_y"] / p["source_size"])[:, None, None]
    return torch.addcmul(shift_u, x, scale), torch.addcmul(shift_v, y, scale)


@dataclass(frozen=True)
class LineOfSight:
    """Deflectors at other redshifts than the main lens.

    planes: the components of every plane in order of redshift, those of the main lens at `main`; ratios: from
    `multi_plane.distance_ratios`.
    """

    planes: tuple[Composite, ...]
    main: int
    ratios: Tensor


@dataclass(frozen=True)
class Optics:
    """What of the forward model does not depend on the lens.

    deflection: the table, or none for the exact series; supersampling: rays per pixel side; interpolation: between
    source pixels; psf_supersampling: values of the PSF per pixel side, 1 or as many as there are rays; components:
    deflectors beside the elliptical power law and the shear, on their plane; line_of_sight: instead of those,
    deflectors on several planes; light: of the lens galaxy.
    """

    deflection: DeflectionTable | None = None
    supersampling: int = 1
    interpolation: str = "bicubic"
    psf_supersampling: int = 1
    components: Composite | None = None
    line_of_sight: LineOfSight | None = None
    light: Light | None = None


class Simulator:
    """The forward model of a batch of images of one shape (ny, nx).

    psf: [lens, ky, kx], sum 1, see `Optics`; pixel_scale: [lens] ["]; light_unit: [lens], brightness that an amplitude
    of 1 of the lens galaxy's light has, 1 where it is none.
    """

    def __init__(
        self,
        optics: Optics,
        psf: Tensor,
        pixel_scale: Tensor,
        shape: tuple[int, int],
        light_unit: Tensor | None = None,
    ):
        self.optics, self.shape = optics, shape
        self.psf, self.pixel_scale = psf, pixel_scale
        self.light_unit = torch.ones_like(pixel_scale) if light_unit is None else light_unit
        self._convolutions: dict[tuple[int, int], Convolution] = {}

    @cached_property
    def x(self) -> Tensor:
        """x of the rays ["], [lens, ny s, nx s]."""
        return self._grid(0)

    @cached_property
    def y(self) -> Tensor:
        """y of the rays ["], [lens, ny s, nx s]."""
        return self._grid(1)

    @cached_property
    def convolution(self) -> Convolution:
        """With the PSF."""
        return self._convolution(self.shape)

    def _grid(self, axis: int) -> Tensor:
        grid = pixel_grid(*self.shape, self.optics.supersampling, dtype=self.psf.dtype)[axis]
        return self.pixel_scale[:, None, None] * grid.to(self.psf.device)

    def _convolution(self, shape: tuple[int, int]) -> Convolution:
        if shape not in self._convolutions:
            ny, nx = (side * self.optics.psf_supersampling for side in shape)
            self._convolutions[shape] = Convolution(self.psf, (ny, nx))
        return self._convolutions[shape]

    def within(self, window: Window, rows: Tensor) -> Simulator:
        """The forward model of the windows [n] of the lenses at `rows` [n]; no light from outside is blurred in."""
        part = Simulator(self.optics, self.psf[rows], self.pixel_scale[rows], window.size, self.light_unit[rows])
        s = self.optics.supersampling
        y, x = (
            self.pixel_scale[rows, None] * (first[:, None] + (torch.arange(s * size).to(self.psf) + 0.5) / s - side / 2)
            for first, size, side in zip((window.row, window.column), window.size, self.shape, strict=True)
        )
        part.x, part.y = x[:, None].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])
        part.convolution = self._convolution(window.size).take(rows)
        return part

    def take(self, rows: Tensor) -> Simulator:
        """The forward model of the lenses at `rows` [n]."""
        part = Simulator(self.optics, self.psf[rows], self.pixel_scale[rows], self.shape, self.light_unit[rows])
        part.x, part.y, part.convolution = self.x[rows], self.y[rows], self.convolution.take(rows)
        return part

    def lit(self, p: Parameters, centre: Vector | None, rows: Tensor) -> Tensor:
        """Which blocks of pixels the source may light up in the lenses at `rows` [n]: [n, by, bx]; see `window`.

        centre: of the light of the source images, [n] each; none, where the source has no edge. All blocks then, and
        where there are other deflectors than the elliptical power law and the shear, or other light than the source's.
        """
        x, y = (axis.to(self.psf) for axis in block_middles(self.shape))
        optics = self.optics
        if centre is None or optics.components or optics.line_of_sight or optics.light or "background" in p:
            return torch.ones(len(rows), *x.shape, dtype=torch.bool, device=self.psf.device)
        scale, size = self.pixel_scale[rows, None], p["source_size"][:, None]
        x, y = scale * x.flatten(), scale * y.flatten()
        alpha_x, alpha_y = self.deflection_at(x, y, p)
        spread = block_side(self.shape) / 2**0.5 * scale
        distance = torch.hypot(x - p["center_x"][:, None], y - p["center_y"][:, None]) - spread
        edge = size * SOURCE_EDGE + spread * spread_bound(p, distance)
        beyond_x = (x - alpha_x - p["source_x"][:, None] + size * centre[0][:, None]).abs() > edge
        beyond_y = (y - alpha_y - p["source_y"][:, None] + size * centre[1][:, None]).abs() > edge
        return ~(beyond_x | beyond_y).unflatten(1, block_middles(self.shape)[0].shape)

    def deflection(self, p: Parameters) -> Vector:
        """Deflection ["] of the main lens, the shear (paper, eq. 10) and all others: two [lens, ny s, nx s].

        Raises ValueError, with the values, where q or gamma is outside the deflection table.
        """
        x, y = self.deflection_at(self.x.flatten(1), self.y.flatten(1), p)
        return x.unflatten(1, self.x.shape[1:]), y.unflatten(1, self.x.shape[1:])

    def deflection_at(self, x: Tensor, y: Tensor, p: Parameters) -> Vector:
        """The same at any places x, y ["]: [lens, n] each."""
        sight = self.optics.line_of_sight
        if sight is None:
            return self._main_plane(x, y, p, self.optics.components)
        column = {name: value[:, None] for name, value in p.items()}
        planes: list[multi_plane.Plane] = [partial(plane.deflection, parameters=column) for plane in sight.planes]
        planes[sight.main] = partial(self._main_plane, p=p, components=sight.planes[sight.main])
        return multi_plane.deflection(x, y, planes, sight.ratios.to(x))

    def _main_plane(self, x: Tensor, y: Tensor, p: Parameters, components: Composite | None) -> Vector:
        column = {name: value[:, None] for name, value in p.items()}
        if self.optics.deflection is not None:
            main = self.optics.deflection.deflection(x, y, *(p[name] for name in MASS_PROFILES["epl"]))
        else:
            main = epl_deflection(x, y, *(column[name] for name in MASS_PROFILES["epl"]))
        parts = [main, shear_deflection(x, y, column["gamma1"], column["gamma2"])]
        if components is not None and components.profiles:
            parts.append(components.deflection(x, y, column))
        return sum((a for a, _ in parts[1:]), parts[0][0]), sum((b for _, b in parts[1:]), parts[0][1])

    def source_positions(self, p: Parameters) -> Vector:
        """Where the rays meet the source plane ["] (paper, eq. 6): two [lens, ny s, nx s]."""
        alpha_x, alpha_y = self.deflection(p)
        return self.x - alpha_x, self.y - alpha_y

    def source_points(self, p: Parameters, centre: tuple[Tensor, Tensor]) -> Vector:
        """Where the rays meet the source image, in units of its width (paper, eq. 17): two [lens, ny s, nx s].

        centre: x and y [lens] of the point of the source image that lies at `source_x, source_y`.
        """
        return in_source_image(p, centre, *self.source_positions(p))

    def source_slopes(self, p: Parameters, points: Vector, centre: Vector) -> tuple[tuple[str, ...], Tensor] | None:
        """Names of parameters and the derivatives of `source_points`, u and v, along them: [lens, 2, name, rays].

        points: what `source_points` gives. None where they are not written out: for other deflectors than the
        elliptical power law of the table and the shear.
        """
        table = self.optics.deflection
        if table is None or self.optics.components or self.optics.line_of_sight:
            return None
        x, y = self.x.flatten(1), self.y.flatten(1)
        of_mass = table.partial_derivatives(x, y, *(p[name] for name in MASS_PROFILES["epl"]))[2:]
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        from_centre = [point.flatten(1) - at[:, None] for point, at in zip(points, centre, strict=True)]
        of_u = [*(along for along, _ in of_mass), x, y, one, zero, from_centre[0]]
        of_v = [*(along for _, along in of_mass), -y, x, zero, one, from_centre[1]]
        slopes = torch.stack([torch.stack(of_u, 1), torch.stack(of_v, 1)], 1) / -p["source_size"][:, None, None, None]
        return (*MASS_PROFILES["epl"], "gamma1", "gamma2", "source_x", "source_y", "source_size"), slopes

    def observe(self, rays: Tensor) -> Tensor:
        """Rays [lens, channel, ny s, nx s] gathered into pixels and blurred by the PSF: [lens, channel, ny, nx].

        Blurred first, where the PSF has a value for each ray.
        """
        return self.blurred(self.gathered(rays))

    @property
    def block(self) -> int:
        """How many rays along a side are averaged before they are blurred."""
        return self.optics.supersampling // self.optics.psf_supersampling

    def gathered(self, rays: Tensor) -> Tensor:
        """Rays [lens, channel, ny s, nx s] as the PSF takes them: one value for each of its own."""
        return gathered(rays, self.block)

    def blurred(self, rays: Tensor) -> Tensor:
        """What was gathered, blurred by the PSF, as pixels [lens, channel, ny, nx]."""
        return gathered(self.convolution(rays), self.optics.psf_supersampling)

    def rays(self, points: Vector, source: Tensor) -> Tensor:
        """Source images [lens, channel, n, n] seen at source points: [lens, channel, ny s, nx s]."""
        return sample(source, *points, self.optics.interpolation)

    def lens_light(self, p: Parameters) -> Tensor | None:
        """Brightness of the lens galaxy along the rays [lens, ny s, nx s]; none where the optics has no light."""
        if self.optics.light is None:
            return None
        column = {name: value[:, None, None] for name, value in p.items()}
        return self.light_unit[:, None, None] * self.optics.light.brightness(self.x, self.y, column)

    def light_slopes(self, p: Parameters, names: Collection[str]) -> Tensor:
        """Derivatives of `lens_light` with respect to parameters: [lens, name, ny s, nx s].

        Raises ValueError where the optics has no light.
        """
        if self.optics.light is None:
            raise ValueError("the optics has no light of the lens galaxy")
        column = {name: value[:, None, None] for name, value in p.items()}
        return self.light_unit[:, None, None, None] * self.optics.light.slopes(self.x, self.y, column, names)

    def source_rays(self, p: Parameters, source: Tensor | Brightness) -> Tensor:
        """Brightness of the lensed source along the rays, without PSF: [lens, ny s, nx s]; see `image`."""
        if callable(source):
            return source(*self.source_positions(p))
        rays = self.rays(self.source_points(p, light_centre(source)), source[:, None])[:, 0]
        return p["source_flux"][:, None, None] * rays

    def image(self, p: Parameters, source: Tensor | Brightness) -> Tensor:
        """Images [lens, ny, nx]; p: [lens] each, canonical.

        source: images [lens, n, n] of peak 1, which count `source_flux` times and have the centre of their light at
        `source_x, source_y`; or any function of the position in the source plane ["], [lens, ny s, nx s] each, to the
        brightness there. The light of the lens galaxy and a `background`, where there are any, are added.
        """
        rays = self.source_rays(p, source)
        light = self.lens_light(p)
        image = self.observe((rays if light is None else rays + light)[:, None])[:, 0]
        return image + p["background"][:, None, None] if "background" in p else image

    def brightness_gradient(self, points: Vector, brightness: Brightness) -> tuple[Tensor, Tensor, Tensor]:
        """Rays I(u, v) of one source a lens and their derivatives dI/du and dI/dv: three [lens, ny s, nx s].

        Every ray depends on its own point alone, so the gradient of the sum of all rays holds each ray's derivative.
        """
        u, v = (axis.detach().requires_grad_() for axis in points)
        with torch.enable_grad():
            rays = brightness(u, v)
            du, dv = torch.autograd.grad(rays.sum(), (u, v))
        return rays.detach(), du, dv
