"""What follows from a fit: fluxes of the source, its magnification, its images, the radius of the critical curve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lenspipe.fit.model import LensModel
from lenspipe.image.simulator import Parameters, Simulator
from lenspipe.lens import derived
from lenspipe.lens.profiles import Vector

GRID = 100  # points a side at which critical curves and images are looked for; both are then brought to their place
FAINTEST = 0.1  # magnification of the faintest image that counts: the central one of a shallow lens may be among them


@torch.no_grad()
def source_fluxes(model: LensModel, w: Tensor) -> tuple[Tensor, Tensor]:
    """Total flux of the source and its flux in the image without PSF, [lens] each, in flux units times pixels.

    w: [lens, size]. Their ratio is the total magnification, of what of the lensed source lies in the image.
    """
    p, source = model.parameters(w), model.source(model.split(w)[1])
    unlensed = p["source_flux"] * source.sum((-2, -1)) * (p["source_size"] / source.shape[-1]) ** 2
    rays = model.simulator.source_rays(p, source).sum((-2, -1)) / model.optics.supersampling**2
    return unlensed / model.batch.pixel_scale**2, rays


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


def _radius_and_images(simulator: Simulator, p: Parameters, half_width: float) -> tuple[float, int]:
    def deflection(x: Tensor, y: Tensor) -> Vector:
        a, b = simulator.deflection_at(x.reshape(1, -1), y.reshape(1, -1), p)
        return a.reshape(x.shape), b.reshape(x.shape)

    source = float(p["source_x"]), float(p["source_y"])
    found = derived.image_positions(deflection, source, half_width, GRID)
    radius = derived.einstein_radius(deflection, half_width, GRID)
    return radius, int((np.abs(found.magnifications) >= FAINTEST).sum())
