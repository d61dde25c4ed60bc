"""What the decoder cannot draw: a field of components with N(0, 1) weights, learned from its residuals.

A basis [component, y, x] is scaled such that a sum of its images, with standard normal weights, has the second moments
of the residuals, turned by all quarter turns and flips, without those of their noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-12  # eigenvalues below this share of the greatest are zero


def principal_components(
    residuals: Tensor, noise_sd: Tensor, components: int | None, explained_variance: float, seed: int
) -> tuple[Tensor, float]:
    """The leading principal components [k, n, n] of residuals [galaxy, n, n], and the share of variance they explain.

    `components` bounds their number; None: as many as explain `explained_variance` of what is above the noise. Noise is
    taken as white, of each galaxy's `noise_sd` [galaxy]. Components whose variance does not exceed the greatest one of
    such noise alone, drawn with `seed`, are left out; that of the others is freed of it (spiked covariance model, noise
    of the mean variance; Donoho, Gavish & Johnstone 2018).
    """
    n = residuals.shape[-1]
    values, images = modes(residuals)
    if (noise_sd > 0).any():
        noise = torch.randn(residuals.shape, generator=torch.Generator().manual_seed(seed)) * noise_sd[:, None, None]
        variance = float(noise_sd.double().square().mean())
        freed = torch.where(values > modes(noise)[0][0], without_noise(values, variance, n * n / (8 * len(noise))), 0.0)
    else:
        freed = values.clip(min=0)
    total = freed.sum()
    if components is None:
        share = freed.cumsum(0) / total.clip(min=torch.finfo(total.dtype).tiny)
        components = int((share < explained_variance).sum()) + 1
    count = min(components, int((freed > ROUNDING * freed.max()).sum()))
    basis = freed[:count].sqrt()[:, None, None] * images[:count]
    return basis.float(), float(freed[:count].sum() / total) if count else 0.0


def modes(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors [n n, n, n] of the mean product of two pixels in all eight orientations.

    Flips leave nothing between images that are even along an axis and such that are odd: each parity is a problem of
    its own, 64 times cheaper than the whole. Of (even, odd) and (odd, even) one is the other transposed.
    """
    n = residuals.shape[-1]
    fold = parities(n)
    quarters = (fold @ residuals.double() @ fold.T).unflatten(1, (2, -1)).unflatten(3, (2, -1))
    values, images = [], []
    for one, other in ((0, 0), (1, 1), (0, 1)):
        part = torch.cat([quarters[:, one, :, other], quarters[:, other, :, one].transpose(1, 2)]).flatten(1)
        own_values, vectors = torch.linalg.eigh(part.T @ part / len(part))
        image = (
            fold[one * n // 2 :][: n // 2].T @ vectors.T.unflatten(1, (n // 2, -1)) @ fold[other * n // 2 :][: n // 2]
        )
        both = [image] if one == other else [image, image.transpose(1, 2)]
        values += [own_values] * len(both)
        images += both
    every = torch.cat(values)
    order = every.argsort(descending=True, stable=True)
    return every[order], torch.cat(images)[order]


def parities(n: int) -> Tensor:
    """Orthonormal vectors of even n pixels, [n, n]: first those that are even about the middle, then the odd ones."""
    pixel = torch.eye(n, dtype=torch.float64)[: n // 2]
    return torch.cat([pixel + pixel.flip(1), pixel - pixel.flip(1)]) / 2**0.5


def without_noise(values: Tensor, noise_variance: float, ratio: float) -> Tensor:
    """Variances above the noise from eigenvalues of the covariance of noisy samples; ratio: dimensions / samples."""
    middle = values / noise_variance - 1 - ratio
    return noise_variance * (middle + (middle.square() - 4 * ratio).clip(min=0).sqrt()).clip(min=0) / 2


def stationary_components(residuals: Tensor, noise_sd: Tensor, components: int) -> tuple[Tensor, float]:
    """Plane waves [k, n, n] with the mean isotropic power spectrum of residuals [galaxy, n, n], the strongest first.

    The variant for comparison: it knows how much power there is at each scale, not where. Returns also the share of
    the variance that they hold.
    """
    n = residuals.shape[-1]
    power = torch.fft.fft2(residuals.double()).abs().square().mean(0) / n**4  # of each frequency, sums to the variance
    frequency = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    k_y, k_x = torch.meshgrid(frequency, frequency, indexing="ij")
    ring = torch.hypot(k_x, k_y).round().long()
    mean = torch.bincount(ring.flatten(), power.flatten()) / torch.bincount(ring.flatten())
    isotropic = (mean[ring] - noise_sd.double().square().mean() / n**2).clip(min=0)
    strongest = isotropic.flatten().argsort(descending=True, stable=True)[:components]
    strongest = strongest[isotropic.flatten()[strongest] > 0]
    axis = 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n
    phase = k_x.flatten()[strongest, None, None] * axis + k_y.flatten()[strongest, None, None] * axis[:, None]
    # cos + sin (Hartley's cas): one real wave for each frequency, orthogonal to the others
    basis = isotropic.flatten()[strongest].sqrt()[:, None, None] * (phase.cos() + phase.sin())
    share = float(isotropic.flatten()[strongest].sum() / isotropic.sum()) if len(strongest) else 0.0
    return basis.float(), share
