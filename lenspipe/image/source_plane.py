"""The source's surface brightness between the pixels of its image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sample(image: Tensor, x: Tensor, y: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Surface brightness of a source image at points of the source plane (paper, eq. 17).

    image: [lens, channel, n, n], row 0 at the lowest y; x, y: [lens, ny, nx], in units of the image's full width from
    its centre, so that the image covers [-1/2, 1/2]. Returns [lens, channel, ny, nx]; zero outside.
    """
    grid = 2 * torch.stack([x, y], dim=-1)
    return functional.grid_sample(image, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
