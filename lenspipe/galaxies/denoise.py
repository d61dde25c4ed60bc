"""Galaxies without their noise, as sources of mocks and as what a source model should be able to draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.restoration import denoise_nl_means, estimate_sigma

ROUNDING = 1e-9  # estimate below which there is no noise [peak]


def estimated_noise(stamp: NDArray[np.float64]) -> float:
    """Pixel noise of a stamp as its catalogue gives it, by the finest detail of what is not exactly 0; 0: it has none.

    Of no later image: whatever resamples a stamp makes its finest detail less.
    """
    sd = float(estimate_sigma(stamp)) if stamp.any() else 0.0
    return sd if sd > ROUNDING * stamp.max(initial=0.0) else 0.0  # it is not a number where nothing is left


def denoised(image: NDArray[np.float64], noise_sd: float) -> NDArray[np.float64]:
    """A galaxy image [n, n] without its noise: non-local means (Buades et al. 2005), no negative light, peak 1.

    noise_sd: of a pixel; where it is 0 the image is left as it is.
    """
    if noise_sd == 0:
        return np.clip(image, 0, None) / image.max()
    clean = denoise_nl_means(image, patch_size=5, patch_distance=7, h=0.8 * noise_sd, sigma=noise_sd, fast_mode=True)
    clean = np.clip(clean - 0.5 * noise_sd, 0, None)
    return clean / clean.max()
