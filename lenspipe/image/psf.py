"""The point spread function: kernels on the image's pixels, and the convolution with them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import scipy.fft
import torch
from scipy.ndimage import convolve1d
from scipy.special import ndtr
from torch import Tensor
from torch.nn import functional

DIRECT = 7  # greatest side of a kernel [px] that is applied without FFT


def gaussian_kernel(sd: float, radius: int | None = None) -> np.ndarray:
    """A Gaussian of standard deviation `sd` [px], integrated over the pixels and normalised: [2 r + 1, 2 r + 1].

    The radius is 4 sd, rounded up, where none is given.
    """
    radius = max(1, int(np.ceil(4 * sd))) if radius is None else radius
    edges = np.arange(-radius, radius + 2) - 0.5
    profile = np.diff(ndtr(edges / sd))
    kernel = np.outer(profile, profile)
    return kernel / kernel.sum()


def of_pixels(kernel: np.ndarray, supersampling: int) -> np.ndarray:
    """The kernel of pixels, of one with `supersampling` (even, or 1) values a pixel side: [ky, kx], both sides odd.

    Its values are the means over pixels about the given one's centre, [ky // 2, kx // 2], times their number.
    """
    if supersampling == 1:
        return kernel
    share = np.ones(supersampling + 1)
    share[[0, -1]] = 0.5  # those on an edge are of two pixels
    for _ in (0, 1):
        reach = -(-(len(kernel) // 2 + supersampling // 2) // supersampling) * supersampling
        after = 2 * reach + 1 - len(kernel) - (before := reach - len(kernel) // 2)
        wide = np.pad(kernel, ((before, after), (0, 0)))
        kernel = convolve1d(wide, share, axis=0, mode="constant")[::supersampling].T
    return kernel


class Convolution:
    """Convolution of images [lens, ..., ny, nx] with one kernel per lens [lens, ky, kx], with zero padding.

    The kernel's centre is its pixel [ky // 2, kx // 2]. Light from outside the image is not there to be blurred in.
    Small kernels are applied directly, larger ones by FFT; the choice is the kernel's alone.
    """

    def __init__(self, kernel: Tensor, shape: tuple[int, int]):
        ky, kx = kernel.shape[-2:]
        self.shape, self.kernel = shape, kernel
        self.direct = max(ky, kx) <= DIRECT
        self.padded = tuple(scipy.fft.next_fast_len(n + k - 1, real=True) for n, k in zip(shape, (ky, kx), strict=True))

    @cached_property
    def transfer(self) -> Tensor:
        """Fourier transform of the kernels, centred on the first pixel."""
        ky, kx = self.kernel.shape[-2:]
        centred = functional.pad(self.kernel, (0, self.padded[1] - kx, 0, self.padded[0] - ky))
        return torch.fft.rfft2(torch.roll(centred, (-(ky // 2), -(kx // 2)), dims=(-2, -1)))

    def take(self, rows: Tensor) -> Convolution:
        """The convolution with the kernels at `rows` [n]; transforms are not made anew."""
        taken = Convolution(self.kernel[rows], self.shape)
        if not self.direct:
            taken.transfer = self.transfer[rows]
        return taken

    def __call__(self, image: Tensor) -> Tensor:
        """Blur [lens, ..., ny, nx]."""
        if self.direct:
            return self._directly(image)
        transfer = self.transfer.reshape(len(self.transfer), *[1] * (image.ndim - 3), *self.transfer.shape[-2:])
        return _ByTransfer.apply(image, transfer, self.padded)

    def _directly(self, image: Tensor) -> Tensor:
        ky, kx = self.kernel.shape[-2:]
        dtype = torch.result_type(image, self.kernel)
        flipped = self.kernel.flip(-2, -1).expand(len(image), -1, -1)[:, None].to(dtype)  # conv2d is a correlation
        after, before = (ky // 2, kx // 2), (ky - 1 - ky // 2, kx - 1 - kx // 2)
        channels = image.to(dtype).reshape(len(image), -1, *self.shape).transpose(0, 1)
        padded = functional.pad(channels, (before[1], after[1], before[0], after[0]))
        blurred = functional.conv2d(padded, flipped, groups=len(image))
        return blurred.transpose(0, 1).reshape(image.shape)


class _ByTransfer(torch.autograd.Function):
    """Convolution by FFT. Its gradient is one with the conjugate: autograd's takes a full complex FFT."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, transfer: Tensor, padded: tuple[int, int]) -> Tensor:
        blurred = torch.fft.irfft2(torch.fft.rfft2(image, s=padded) * transfer, s=padded)
        return blurred[..., : image.shape[-2], : image.shape[-1]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, transfer, ctx.padded = inputs
        ctx.save_for_backward(transfer)
        ctx.save_for_forward(transfer)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (transfer,) = ctx.saved_tensors
        return _ByTransfer.apply(gradients[0], transfer.conj(), ctx.padded), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (transfer,) = ctx.saved_tensors
        return _ByTransfer.apply(tangents[0], transfer, ctx.padded)
