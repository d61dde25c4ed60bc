"""Other objects on a galaxy's stamp: found, and replaced by noise.

An object is a connected region in which the 5x5 mean is above a threshold. The galaxy is the one at the centre of the
light; objects that touch it count as its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label, sum_labels

from lenspipe.config import Galaxies
from lenspipe.galaxies.catalogue import GalaxyStamp
from lenspipe.galaxies.stamps import light_centre, smoothed
from lenspipe.seeds import seed_for


def neighbours(stamp: GalaxyStamp, settings: Galaxies) -> NDArray[np.bool_]:
    """The pixels [y, x] of the objects that have at least `neighbour_flux_ratio` times the galaxy's flux.

    None where the stamp has pixels that are not finite, or no light.
    """
    objects = _objects(stamp, settings)
    if not objects.any():
        return np.zeros(stamp.image.shape, dtype=bool)
    numbers = np.arange(1, objects.max() + 1)
    flux = sum_labels(stamp.image, objects, numbers)
    galaxy = _nearest(objects, light_centre(stamp.image))
    others = (flux >= settings.neighbour_flux_ratio * flux[galaxy - 1]) & (numbers != galaxy)
    return np.isin(objects, numbers[others])


def without_neighbours(stamp: GalaxyStamp, settings: Galaxies, seed: int) -> GalaxyStamp:
    """The stamp with the neighbours, and `neighbour_margin` pixels about them that are not the galaxy's, replaced by
    white noise of its own sd, drawn from the seed and the galaxy's name; by zero where the noise is not known."""
    where = neighbours(stamp, settings)
    if not where.any():
        return stamp
    galaxy = (_objects(stamp, settings) > 0) & ~where
    where = (distance_transform_edt(~where) <= settings.neighbour_margin) & ~galaxy
    rng = np.random.default_rng(seed_for(seed, "neighbours", stamp.name))
    noise = rng.normal(0, stamp.noise_sd, stamp.image.shape)
    return replace(stamp, image=np.where(where, noise, stamp.image))


def _objects(stamp: GalaxyStamp, settings: Galaxies) -> NDArray[np.int32]:
    """The number of the object that a pixel belongs to, [y, x]; 0: none."""
    smooth = smoothed(stamp.image)
    if not (np.isfinite(stamp.image).all() and smooth.max() > 0):
        return np.zeros(smooth.shape, dtype=np.int32)
    known = stamp.noise_sd > 0
    threshold = settings.neighbour_noise * stamp.noise_sd if known else settings.neighbour_peak * smooth.max()
    return np.asarray(label(smooth > threshold)[0])


def _nearest(objects: NDArray[np.int32], centre: tuple[float, float]) -> int:
    """The number of the object nearest to `centre` (row, column)."""
    y, x = np.nonzero(objects)
    nearest = np.hypot(y - centre[0], x - centre[1]).argmin()
    return int(objects[y[nearest], x[nearest]])
