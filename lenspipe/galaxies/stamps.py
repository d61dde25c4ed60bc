"""From a stamp of any shape to the square image that the source model learns.

crop to a square about the light -> average down to 64x64 -> taper the edge -> centre the light -> divide by the peak.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, center_of_mass, distance_transform_edt, fourier_shift, uniform_filter
from scipy.sparse import csr_array

Array = NDArray[np.float64]


def smoothed(image: Array) -> Array:
    """The 5x5 mean of an image, zero beyond its frame."""
    return np.asarray(uniform_filter(image, 5, mode="constant"))


def light_centre(image: Array) -> tuple[float, float]:
    """Row and column of the flux-weighted centre of the pixels above half the peak, both of the 5x5 mean."""
    smooth = smoothed(image)
    y, x = center_of_mass(np.where(smooth >= smooth.max() / 2, smooth, 0))
    return float(y), float(x)


def half_light_radius(image: Array, centre: tuple[float, float]) -> float:
    """Radius about `centre` (row, column) that holds half of the positive light of the whole image [px]."""
    y, x = np.indices(image.shape)
    radius = np.hypot(y - centre[0], x - centre[1]).ravel()
    order = np.argsort(radius)
    light = np.cumsum(np.clip(image, 0, None).ravel()[order])
    return float(radius[order][np.searchsorted(light, light[-1] / 2)])


def square_stamp(image: Array, side_min: int, side_per_radius: float | None = None) -> Array:
    """The square about the light: the greatest that fits or, where `side_per_radius` is given, one of so many
    half-light radii and at least `side_min` pixels. It never reaches outside the image."""
    centre, side = light_centre(image), min(image.shape)
    if side_per_radius is not None:
        wanted = side_per_radius * half_light_radius(image, centre)
        side = int(np.clip(np.ceil(wanted), min(side_min, side), side))
    y, x = (int(np.clip(round(c - (side - 1) / 2), 0, n - side)) for c, n in zip(centre, image.shape, strict=True))
    return image[y : y + side, x : x + side]


@lru_cache(maxsize=512)
def averaging_matrix(pixels: int, means: int) -> csr_array:
    """Weights [means, pixels] that average `pixels` in a row over `means` equal intervals, cut ones by their share.

    Sparse: a dense product would go through BLAS, whose threads hold up several workers and whose order of summation
    hangs on their number.
    """
    edges = np.arange(means + 1) * pixels / means
    left, right = edges[:-1, None], edges[1:, None]
    start = np.arange(pixels)
    overlap = np.clip(np.minimum(right, start + 1) - np.maximum(left, start), 0, None)
    return csr_array(overlap * means / pixels)


def downscale(image: Array, side: int) -> Array:
    """Area means of a square image on [side, side]; any ratio of sizes."""
    rows = averaging_matrix(image.shape[0], side)
    return np.asarray((rows @ (rows @ image).T).T)


def noise_factor(pixels: int, side: int) -> float:
    """What `downscale` from `pixels` to `side` makes of the standard deviation of white noise (mean over pixels)."""
    return float(np.sqrt(averaging_matrix(pixels, side).power(2).sum(axis=1)).mean() ** 2)


def feather(image: Array, width: int) -> Array:
    """Taper the image to zero over `width` pixels at its frame, and at the edge of the region that is not zero."""
    if width == 0:
        return image
    support = np.pad(binary_fill_holes(image != 0), 1)
    inside = distance_transform_edt(support)[1:-1, 1:-1]
    return np.asarray(image * np.sin(np.pi / 2 * np.clip(inside / (width + 1), 0, 1)) ** 2)


def centred(image: Array) -> Array:
    """A tapered image, moved so that the centroid of the square of its brightness is in its middle.

    That centroid is where a lens has its source (`image.source_plane.light_centre`). A decoder that can move a galaxy
    in its frame competes with the source's position, and chains do not mix. Moved by the Fourier transform: white
    noise stays what it is.
    """
    middle, room = (np.array(image.shape) - 1) / 2, max(image.shape) // 4
    move = middle - center_of_mass(smoothed(image) ** 2)
    spectrum = np.fft.fft2(np.pad(image, room))  # padded: what leaves the frame does not come back at the other side
    return np.asarray(np.fft.ifft2(fourier_shift(spectrum, move)).real[room:-room, room:-room])


def normalised(image: Array) -> tuple[Array, float]:
    """The image divided by its maximum, and that maximum."""
    peak = float(image.max())
    return image / peak, peak
