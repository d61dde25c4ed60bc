"""Galaxies without their noise, as sources of mocks and as what a source model should be able to draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.restoration import denoise_nl_means, estimate_sigma


def noise_level(image: NDArray[np.float64], noise_sd: float) -> float:
    """Pixel noise of an image: `noise_sd`, or where that is not known (0) an estimate from the image."""
    return float(noise_sd or estimate_sigma(image))


def denoised(image: NDArray[np.float64], noise_sd: float) -> NDArray[np.float64]:
    """A galaxy image [n, n] without its noise: non-local means (Buades et al. 2005), no negative light, peak 1.

    Where the noise is not known (0) it is estimated from the image; an image without any is left as it is.
    """
    sigma = noise_level(image, noise_sd)
    if sigma == 0:
        return np.clip(image, 0, None) / image.max()
    clean = denoise_nl_means(image, patch_size=5, patch_distance=7, h=0.8 * sigma, sigma=sigma, fast_mode=True)
    clean = np.clip(clean - 0.5 * sigma, 0, None)
    return clean / clean.max()
