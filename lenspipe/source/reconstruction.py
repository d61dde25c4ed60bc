"""Fits of a source to images of galaxies themselves, without a lens: what it can and cannot draw."""

from __future__ import annotations

import torch
from torch import Tensor

from lenspipe.source.base import Source

PIECE = 16  # galaxies whose derivatives are held at once


@torch.no_grad()
def reconstruct(source: Source, images: Tensor, noise_sd: float, start: Tensor, steps: int = 10) -> Tensor:
    """The most probable w [galaxy, size] of images [galaxy, 64, 64] with white noise, by damped Gauss-Newton steps.

    Begins at `start` [galaxy, size]; no step is taken that does not lower |image - source(w)|^2 / noise_sd^2 + |w|^2.
    """
    parts = zip(images.split(PIECE), start.split(PIECE), strict=True)
    return torch.cat([_descend(source, image, noise_sd, w, steps) for image, w in parts])


def misfit(source: Source, images: Tensor, noise_sd: float, w: Tensor) -> Tensor:
    """chi^2 per pixel [galaxy]."""
    return ((images - source(w)) / noise_sd).square().mean((-2, -1))


def _descend(source: Source, images: Tensor, noise_sd: float, w: Tensor, steps: int) -> Tensor:
    pixels = images[0].numel()

    def objective(w: Tensor) -> Tensor:
        return misfit(source, images, noise_sd, w).double() * pixels + w.double().square().sum(-1)

    best, damping = objective(w), torch.full((len(w),), 1e-3, dtype=torch.float64)
    identity = torch.eye(w.shape[1], dtype=torch.float64)
    for _ in range(steps):
        image, derivatives = source.linearise(w)
        jacobian = derivatives.flatten(2) / noise_sd
        residual = ((images - image) / noise_sd).flatten(1)
        hessian = (jacobian @ jacobian.transpose(1, 2)).double() + identity
        slope = (jacobian @ residual[..., None])[..., 0].double() - w.double()
        damped = hessian + (damping[:, None] * hessian.diagonal(dim1=1, dim2=2)).diag_embed()
        trial = w + torch.linalg.solve(damped, slope).to(w.dtype)
        value = objective(trial)
        better = value < best
        w, best = torch.where(better[:, None], trial, w), torch.where(better, value, best)
        damping = torch.where(better, damping / 10, damping * 10).clip(1e-9, 1e6)
    return w
