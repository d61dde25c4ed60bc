"""What follows from a fit: fluxes of the source, its magnification, its images, the radius of the critical curve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lenspipe.fit.model import LensModel
from lenspipe.image.simulator import Parameters, Simulator
from lenspipe.image.source_plane import light_centre
from lenspipe.lens import derived
from lenspipe.lens.profiles import Vector
from lenspipe.source.base import pixel_axis
from lenspipe.source.view import POINTS

ANGLES = 90  # directions in which a critical curve is looked for
REACH = 4.0  # how far out, in Einstein radii
GRID = 100  # points a side at which critical curves and images are looked for; both are then brought to their place
RINGS = 2000  # about the centre of a source's light, to the corners of its image
RING = 2 / RINGS  # their width [widths of the image]
FAINTEST = 0.1  # magnification of the faintest image that counts: the central one of a shallow lens may be among them


@torch.no_grad()
def source_fluxes(model: LensModel, w: Tensor) -> tuple[Tensor, Tensor]:
    """Total flux of the source and its flux in the image without PSF, [lens] each, in flux units times pixels.

    w: [lens, size]. Of what lies within `source_size`. Their ratio is the total magnification, of what of the lensed
    source lies in the image.
    """
    p, sources = model.parameters(w), model.view(w)
    u, v = model.simulator.source_points(p, sources.centre)
    within = (u.abs() < 0.5) & (v.abs() < 0.5)
    rays = torch.where(within, sources.at(u, v), 0.0).sum((-2, -1)) / model.optics.supersampling**2
    unlensed = sources.total * (p["source_size"] / model.batch.pixel_scale) ** 2
    return p["source_flux"] * unlensed, p["source_flux"] * rays


@torch.no_grad()
def geometry(model: LensModel, w: Tensor) -> dict[str, np.ndarray]:
    """`einstein_radius` ["] and `images`, [lens] each, at w [lens, size].

    einstein_radius: of the circle with the area within the tangential critical curve; images: of the centre of the
    source's light, with a magnification of 0.1 or more. NaN and 0 where a lens is too odd for them to be found.
    """
    optics = replace(model.optics, deflection=None)
    parameters = model.parameters(w)
    radii, counts = [], []
    for lens in range(len(model.batch)):
        row = torch.tensor([lens])
        batch = model.batch.take(row).to(torch.float64)
        p = {name: value[row].double() for name, value in parameters.items()}
        simulator = Simulator(optics, batch.psf, batch.pixel_scale, model.simulator.shape)
        half_width = max(model.simulator.shape) * float(batch.pixel_scale) / 2
        try:
            radius, number = _radius_and_images(simulator, p, half_width)
        except (ValueError, ArithmeticError, RuntimeError):
            radius, number = float("nan"), 0
        radii.append(radius)
        counts.append(number)
    return {"einstein_radius": np.array(radii), "images": np.array(counts)}


@torch.no_grad()
def lensed_signal_to_noise(model: LensModel, w: Tensor) -> np.ndarray:
    """Signal-to-noise [lens] of the lensed source as a whole, as a filter of its own shape would have it."""
    image = model.simulator.observe(model.source_rays(w)[:, None])[:, 0]
    return (image * model.weight).double().square().sum((-2, -1)).sqrt().numpy()


@torch.no_grad()
def half_light_radius(model: LensModel, w: Tensor) -> Tensor:
    """Radius ["] [lens] about the centre of the source's light that holds half of what is positive of it.

    Of what lies within `source_size`; not a number where there is no light.
    """
    axis = pixel_axis(POINTS).to(w)
    grid = axis.expand(len(w), POINTS, -1)
    source = model.view(w).at(grid, grid.mT).clamp(min=0)
    u, v = light_centre(source)
    radius = torch.hypot(axis - u[:, None, None], axis[:, None] - v[:, None, None]).flatten(1)
    ring = radius.new_zeros(len(w), RINGS).scatter_add(1, (radius / RING).nan_to_num().long(), source.flatten(1))
    within = ring.cumsum(1)
    half = (within >= within[:, -1:] / 2).to(torch.uint8).argmax(1, keepdim=True)
    beyond = (within - within[:, -1:] / 2).gather(1, half) / ring.gather(1, half)  # share of that ring
    return RING * (half + 1 - beyond)[:, 0] * model.parameters(w)["source_size"]


@torch.no_grad()
def lens_light(model: LensModel, w: Tensor) -> Tensor:
    """Image of the lens galaxy alone, blurred by the PSF, in flux units [lens, ny, nx]; zero where it has none."""
    rays = model.simulator.lens_light(model.parameters(w))
    return torch.zeros_like(model.data) if rays is None else model.simulator.observe(rays[:, None])[:, 0]


@torch.no_grad()
def critical_curves(model: LensModel, lens: int, w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Outer tangential critical curves of one lens at points w [n, size], and their caustics: [n, ANGLES, 2] ["].

    NaN where a ray from the lens's centre does not cross one once.
    """
    row = torch.full((len(w),), lens)
    p = {name: value.double() for name, value in model.parameters(w).items()}
    optics = replace(model.optics, deflection=None)
    psf = model.batch.psf[row[:1]].double()
    simulator = Simulator(optics, psf, model.batch.pixel_scale[row[:1]].double(), model.simulator.shape)
    angles = torch.arange(ANGLES, dtype=torch.float64) * (2 * torch.pi / ANGLES)

    def deflection(x: Tensor, y: Tensor) -> Vector:
        return simulator.deflection_at(x, y, p)

    centre = p["center_x"], p["center_y"]
    radii = derived.tangential_radii(deflection, centre, REACH * p["theta_E"], angles)
    x = centre[0][:, None] + radii * torch.cos(angles)
    y = centre[1][:, None] + radii * torch.sin(angles)
    a, b = deflection(x.nan_to_num(), y.nan_to_num())
    curves = torch.stack([x, y], -1)
    caustics = torch.stack([x - a, y - b], -1)
    return curves.numpy(), torch.where(curves.isfinite(), caustics, torch.nan).numpy()


def equal_area_radius(curves: np.ndarray) -> np.ndarray:
    """Radius ["] [n] of circles with the areas within closed curves [n, point, 2]; NaN for curves with gaps."""
    return np.sqrt(derived.enclosed_area(curves) / np.pi)


def _radius_and_images(simulator: Simulator, p: Parameters, half_width: float) -> tuple[float, int]:
    def deflection(x: Tensor, y: Tensor) -> Vector:
        a, b = simulator.deflection_at(x.reshape(1, -1), y.reshape(1, -1), p)
        return a.reshape(x.shape), b.reshape(x.shape)

    source = float(p["source_x"]), float(p["source_y"])
    found = derived.image_positions(deflection, source, half_width, GRID)
    radius = derived.einstein_radius(deflection, half_width, GRID)
    return radius, int((np.abs(found.magnifications) >= FAINTEST).sum())
