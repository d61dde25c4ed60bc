"""Noise of an image, and its signal-to-noise as the paper defines it."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter


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
