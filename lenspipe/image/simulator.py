"""Images of many different lenses in one program: rays, source, PSF."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lenspipe.image.psf import Convolution
from lenspipe.image.source_plane import light_centre, sample
from lenspipe.lens.coordinates import axis_ratio, pixel_grid, rotate, theta_E_from_r_Ein
from lenspipe.lens.epl import series_deflection
from lenspipe.lens.profiles import Composite, shear_deflection
from lenspipe.lens.table import DeflectionTable

Parameters = dict[str, Tensor]


def canonical(parameters: Parameters) -> Parameters:
    """The parameters with `theta_E, q, phi` filled in from `r_Ein` or `e1, e2` where those were given; all [lens]."""
    filled = dict(parameters)
    if "q" not in filled:
        filled["q"], filled["phi"] = axis_ratio(filled["e1"], filled["e2"])
    if "theta_E" not in filled:
        filled["theta_E"] = theta_E_from_r_Ein(filled["r_Ein"], filled["q"])
    return filled


@dataclass(frozen=True)
class Optics:
    """What of the forward model does not depend on the lens.

    deflection: the table, or the number of terms of the series; supersampling: rays per pixel side; interpolation:
    between source pixels; components: deflectors beside the elliptical power law and the shear.
    """

    deflection: DeflectionTable | int
    supersampling: int = 1
    interpolation: str = "bicubic"
    components: Composite | None = None


class Simulator:
    """The forward model of a batch of images of one shape (ny, nx).

    psf: [lens, ky, kx], sum 1; pixel_scale: [lens] ["].
    """

    def __init__(self, optics: Optics, psf: Tensor, pixel_scale: Tensor, shape: tuple[int, int]):
        self.optics = optics
        self.shape = shape
        x, y = pixel_grid(*shape, optics.supersampling, dtype=psf.dtype)
        self.x, self.y = (pixel_scale[:, None, None] * axis.to(psf.device) for axis in (x, y))
        self.convolution = Convolution(psf, shape)

    def deflection(self, p: Parameters) -> tuple[Tensor, Tensor]:
        """Deflection ["] of the main lens, the shear (paper, eq. 10) and the components: two [lens, ny s, nx s]."""
        x, y = (axis.flatten(1) for axis in (self.x, self.y))
        column = {name: value[:, None] for name, value in p.items()}
        x_major, y_major = rotate(x - column["center_x"], y - column["center_y"], column["phi"])
        theta_E = column["theta_E"]
        if isinstance(self.optics.deflection, DeflectionTable):
            unit = self.optics.deflection.deflection(x_major / theta_E, y_major / theta_E, p["gamma"], p["q"])
        else:
            unit = series_deflection(
                x_major / theta_E, y_major / theta_E, column["gamma"], column["q"], self.optics.deflection
            )
        main = rotate(theta_E * unit[0], theta_E * unit[1], -column["phi"])
        shear = shear_deflection(x, y, column["gamma1"], column["gamma2"])
        total = main[0] + shear[0], main[1] + shear[1]
        if self.optics.components is not None:
            further = self.optics.components.deflection(x, y, column)
            total = total[0] + further[0], total[1] + further[1]
        shape = self.x.shape[1:]
        return total[0].unflatten(1, shape), total[1].unflatten(1, shape)

    def source_points(self, p: Parameters, centre: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the rays meet the source image, in units of its width (paper, eqs. 6, 17): two [lens, ny s, nx s].

        centre: x and y [lens] of the point of the source image that lies at `source_x, source_y`.
        """
        alpha_x, alpha_y = self.deflection(p)
        size = p["source_size"][:, None, None]
        u = (self.x - alpha_x - p["source_x"][:, None, None]) / size + centre[0][:, None, None]
        v = (self.y - alpha_y - p["source_y"][:, None, None]) / size + centre[1][:, None, None]
        return u, v

    def observe(self, rays: Tensor) -> Tensor:
        """Rays [lens, channel, ny s, nx s] gathered into pixels and blurred by the PSF: [lens, channel, ny, nx]."""
        if self.optics.supersampling > 1:
            rays = functional.avg_pool2d(rays, self.optics.supersampling)
        return self.convolution(rays)

    def rays(self, points: tuple[Tensor, Tensor], source: Tensor) -> Tensor:
        """Source images [lens, channel, n, n] seen at source points: [lens, channel, ny s, nx s]."""
        return sample(source, *points, self.optics.interpolation)

    def image(self, p: Parameters, source: Tensor) -> Tensor:
        """Images [lens, ny, nx] of sources [lens, n, n] of peak 1, times `source_flux`; p: [lens] each, canonical.

        `source_x, source_y` is where the centre of the source's light lies.
        """
        rays = self.rays(self.source_points(p, light_centre(source)), source[:, None])
        return (p["source_flux"][:, None, None, None] * self.observe(rays))[:, 0]

    def brightness_gradient(self, points: tuple[Tensor, Tensor], source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rays I(u, v) of one source a lens and their derivatives dI/du and dI/dv: three [lens, ny s, nx s].

        Every ray depends on its own point alone, so the gradient of the sum of all rays holds each ray's derivative.
        """
        u, v = (axis.detach().requires_grad_() for axis in points)
        with torch.enable_grad():
            rays = sample(source[:, None].detach(), u, v, self.optics.interpolation)[:, 0]
            du, dv = torch.autograd.grad(rays.sum(), (u, v))
        return rays.detach(), du, dv
