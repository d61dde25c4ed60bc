"""The source's surface brightness between the pixels of its image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def light_centre(image: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (x, y) of the square of the brightness, in units of the image's width from its centre; [lens] each.

    image: [lens, n, n]. Squared, because a decoded image may have faint negative light.
    """
    n = image.shape[-1]
    axis = (torch.arange(n, dtype=image.dtype, device=image.device) - (n - 1) / 2) / n
    weight = image.square()
    weight = weight / weight.sum((-2, -1), keepdim=True)
    return (weight * axis).sum((-2, -1)), (weight * axis[:, None]).sum((-2, -1))


def sample(image: Tensor, x: Tensor, y: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Surface brightness of a source image at points of the source plane (paper, eq. 17).

    image: [lens, channel, n, n], row 0 at the lowest y; x, y: [lens, ny, nx], in units of the image's full width from
    its centre, so that the image covers [-1/2, 1/2]. Returns [lens, channel, ny, nx]; zero outside.
    """
    grid = 2 * torch.stack([x, y], dim=-1)
    lenses, ny = x.shape[:2]
    bands = torch.get_num_threads() // max(1, lenses)
    if bands > 1 and ny % bands == 0 and not image.is_cuda:  # grid_sample gives a thread whole images: bands of rows
        wide = image[:, None].expand(-1, bands, -1, -1, -1).flatten(0, 1)
        rays = _sample(wide, grid.unflatten(1, (bands, -1)).flatten(0, 1), interpolation)
        return rays.unflatten(0, (lenses, bands)).movedim(1, 2).flatten(2, 3)
    return _sample(image, grid, interpolation)


def _sample(image: Tensor, grid: Tensor, interpolation: str) -> Tensor:
    return functional.grid_sample(image, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
