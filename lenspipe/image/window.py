"""Which rectangle of its frame each image is computed on: outside it is dark, or masked.

A source image has an edge, and most rays miss it. Whether a square block of pixels has a ray that does not is told by
the ray through its middle and a bound on how far apart the rays of one block can be in the source plane:

    |d beta / d theta| <= 1 + |shear| + 2 kappa + |2 - gamma| |alpha| / r

for the elliptical power law (Tessore & Metcalf 2015: its shear is at most kappa + |2 - gamma| |alpha| / r),
where at a distance r from its centre

    kappa <= (3 - gamma)/2 m,  |alpha| / r <= m,  m = (theta_E / r)^(gamma - 1) q^(-max(gamma - 1, 3 - gamma)/2).

So nothing is left out that would be there, and every lens has a window of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 48  # blocks along the longer side of a frame, at most
STEP = 16  # sides of windows are multiples of this [px], or those of the frame
# how far from its middle a source image sheds light, in its widths: interpolation reaches 2 px of at least 64
SOURCE_EDGE = 0.5 + 2.1 / 64


@dataclass(frozen=True)
class Window:
    """Rectangles of one size in frames: row and column [lens] of their first pixels; size (ny, nx)."""

    row: Tensor
    column: Tensor
    size: tuple[int, int]

    def cut(self, images: Tensor, rows: Tensor) -> Tensor:
        """The windows of the images at `rows` [n] of [lens, ny, nx]."""
        (ny, nx), corners = self.size, zip(rows.tolist(), self.row.tolist(), self.column.tolist(), strict=True)
        return torch.stack([images[lens, row : row + ny, column : column + nx] for lens, row, column in corners])


def block_side(frame: tuple[int, int]) -> int:
    """Side of a block of pixels of a frame (ny, nx)."""
    return max(2, -(-max(frame) // BLOCKS))


def block_middles(frame: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Middles x, y [by, bx] of the blocks of a frame, in pixels from its middle; the last blocks may stick out."""
    block = block_side(frame)
    y, x = ((torch.arange(-(-side // block)) + 0.5) * block - side / 2 for side in frame)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return grid_x, grid_y


def spread_bound(p: dict[str, Tensor], distance: Tensor) -> Tensor:
    """The bound on |d beta / d theta| at all points further than `distance` [lens, n] from the lens's centre.

    Infinite where the distance is not positive.
    """
    theta_E, gamma, q = (p[name][:, None] for name in ("theta_E", "gamma", "q"))
    steepness = torch.maximum(gamma - 1, 3 - gamma) / 2
    m = q**-steepness * (theta_E / distance.clamp(min=0)) ** (gamma - 1)
    shear = torch.hypot(p["gamma1"], p["gamma2"])[:, None]
    return 1 + shear + m * (3 - gamma + (2 - gamma).abs())


def windows(
    lit: Tensor, frame: tuple[int, int], reach: int, seen: tuple[tuple[Tensor, Tensor], ...]
) -> Iterator[tuple[Tensor, Window]]:
    """Windows of all lenses, those of one size together, each with the numbers of its lenses [n].

    lit: [lens, by, bx], blocks with light; reach: of the PSF [px]; seen: first and one after the last row, then column,
    [lens] each, beyond which nothing is blurred into a usable pixel.
    """
    corners, sizes = [], []
    for blocks, side, (low, high) in zip((lit.amax(2), lit.amax(1)), frame, seen, strict=True):
        first, end = extent(blocks)
        first = torch.maximum(first * block_side(frame) - reach, low)
        end = torch.minimum(end * block_side(frame) + reach, high)
        size = (-(-(end - first) // STEP) * STEP).clamp(min=min(STEP, side), max=side)
        corners.append(torch.minimum(first.clamp(min=0), side - size))
        sizes.append(size)
    classes = list(zip(sizes[0].tolist(), sizes[1].tolist(), strict=True))
    for ny, nx in sorted(set(classes)):
        lenses = torch.tensor([n for n, own in enumerate(classes) if own == (ny, nx)], device=lit.device)
        yield lenses, Window(corners[0][lenses], corners[1][lenses], (ny, nx))


def extent(marked: Tensor) -> tuple[Tensor, Tensor]:
    """First and one after the last True along the last axis of [lens, n], [lens] each; 0 and 0 where there is none."""
    place = torch.arange(marked.shape[-1], device=marked.device)
    first = torch.where(marked, place, marked.shape[-1]).amin(-1)
    return torch.where(marked.amax(-1), first, 0), torch.where(marked, place + 1, 0).amax(-1)
