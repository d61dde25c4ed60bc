"""Noise of an image, and its signal-to-noise as the paper defines it."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

SURROUNDINGS = 1.5  # standard deviation of the pixels that a pixel's noise is estimated from [px]
DIFFERS = 4.0  # by this much a pixel is not like those around it [standard deviations]


def signal_to_noise(image: np.ndarray, noise: np.ndarray, usable: np.ndarray, smoothing: float = 4.0) -> float:
    """S/N of the pixels that belong to the galaxy (paper, eqs. 24-25); 0 where no pixel does.

    image, noise, usable: [ny, nx]; the mask is where the image smoothed by `smoothing` [px] (the paper: 4 pixels) is
    above the noise. For a noise map that varies the sum is over I / sigma, which is eq. 24 where the noise is constant.
    """
    member = usable & (gaussian_filter(np.where(usable, image, 0.0), smoothing) > noise)
    return float((image[member] / noise[member]).sum() / np.sqrt(max(member.sum(), 1)))


def noise_map(image: np.ndarray, background_sd: float, counts: float | None) -> np.ndarray:
    """Standard deviation of every pixel of an image without noise: that of the background, and of the photons.

    counts: electrons for one unit of the image, gain times exposure time; none: no photon noise.
    """
    photons = np.clip(image, 0, None) / counts if counts else 0.0
    return np.sqrt(background_sd**2 + photons + np.zeros_like(image))


def noise_of_data(image: np.ndarray, usable: np.ndarray, background_sd: float, counts: float) -> np.ndarray:
    """Standard deviation of every pixel of an observed image, [ny, nx] as both are; see `noise_map` for the others.

    From each pixel's own value the low ones would have the greater weight, and every fit came out too faint (Humphrey
    et al. 2009, ApJ 693, 822). Taken so the standard deviation is, but for a factor, the image with its variance
    stabilised (Anscombe 1948): 1 / (2 counts) is its own scatter, in every pixel. So the mean of a pixel's
    surroundings is taken, but where the pixel differs from it by more than scatter does.
    """
    own = np.sqrt(np.clip(background_sd**2 + np.where(usable, image, 0.0) / counts, 0, None))
    weight = gaussian_filter(usable.astype(float), SURROUNDINGS)
    around = gaussian_filter(np.where(usable, own, 0.0), SURROUNDINGS) / np.where(weight > 0, weight, 1.0)
    scatter = 1 / (2 * counts)
    return np.where(np.abs(own - around) > DIFFERS * scatter, own, around).clip(min=background_sd)
