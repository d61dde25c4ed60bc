"""The point spread function: kernels on the image's pixels, and the convolution with them."""

from __future__ import annotations

import numpy as np
import scipy.fft
import torch
from scipy.special import ndtr
from torch import Tensor


def gaussian_kernel(sd: float, radius: int | None = None) -> np.ndarray:
    """A Gaussian of standard deviation `sd` [px], integrated over the pixels and normalised: [2 r + 1, 2 r + 1].

    The radius is 4 sd, rounded up, where none is given.
    """
    radius = max(1, int(np.ceil(4 * sd))) if radius is None else radius
    edges = np.arange(-radius, radius + 2) - 0.5
    profile = np.diff(ndtr(edges / sd))
    kernel = np.outer(profile, profile)
    return kernel / kernel.sum()


class Convolution:
    """Convolution of images [lens, ..., ny, nx] with one kernel per lens [lens, ky, kx], by FFT with zero padding.

    The kernel's centre is its pixel [ky // 2, kx // 2]. Light from outside the image is not there to be blurred in.
    """

    def __init__(self, kernel: Tensor, shape: tuple[int, int]):
        ky, kx = kernel.shape[-2:]
        self.shape = shape
        self.padded = tuple(scipy.fft.next_fast_len(n + k - 1, real=True) for n, k in zip(shape, (ky, kx), strict=True))
        centred = torch.nn.functional.pad(kernel, (0, self.padded[1] - kx, 0, self.padded[0] - ky))
        centred = torch.roll(centred, (-(ky // 2), -(kx // 2)), dims=(-2, -1))
        self.transfer = torch.fft.rfft2(centred)

    def __call__(self, image: Tensor) -> Tensor:
        """Blur [lens, ..., ny, nx]."""
        transfer = self.transfer.reshape(len(self.transfer), *[1] * (image.ndim - 3), *self.transfer.shape[-2:])
        blurred = torch.fft.irfft2(torch.fft.rfft2(image, s=self.padded) * transfer, s=self.padded)
        return blurred[..., : self.shape[0], : self.shape[1]]
