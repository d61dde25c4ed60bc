"""The source's surface brightness between the pixels of its image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CUBIC = -0.75  # of the kernel of PyTorch's bicubic interpolation (Keys 1981)


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


def gathered(rays: Tensor, block: int) -> Tensor:
    """Means [lens, channel, ny / block, nx / block] over blocks of block x block rays."""
    return rays if block == 1 else functional.avg_pool2d(rays, block)


def sample_blocks(images: Tensor, x: Tensor, y: Tensor, interpolation: str, block: int) -> Tensor:
    """What `sample` has, averaged over blocks of block x block points: [lens, channel, ny / block, nx / block].

    images: [lens, channel, n, n], where lenses may share their memory; x, y: [lens, ny, nx]. For many channels, seen at
    the same points: what a block takes of each source pixel is found once for all of them. Unlike `sample` it sees
    nothing at points that are not finite.
    """
    (lenses, ny, nx), n = x.shape, images.shape[-1]
    if images.stride(0) == 0:
        images = images[:1]
    (column, of_column), (row, of_row) = (_taps(axis, n, interpolation) for axis in (x, y))
    first = n * n * torch.arange(len(images), dtype=torch.int32, device=x.device)[:, None, None, None, None]
    place = first + n * row[..., :, None] + column[..., None, :]
    weight = of_row[..., :, None] * of_column[..., None, :] / block**2

    def bags(of_points: Tensor) -> Tensor:
        """[block, tap] of [lens, ny, nx, row, column]."""
        blocks = of_points.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)
        return blocks.flatten(3).flatten(0, 2)

    table = images.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
    seen = functional.embedding_bag(bags(place), table, per_sample_weights=bags(weight), mode="sum")
    return seen.unflatten(0, (lenses, ny // block, nx // block)).movedim(-1, 1)


def _taps(at: Tensor, n: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Which of n pixels along an axis count at places in units of its width from its middle, and how much: [..., tap].

    As in PyTorch's `grid_sample`: nothing is beyond the edge.
    """
    at = (at + 0.5) * n - 0.5
    first = torch.floor(at)
    share = (at - first)[..., None]
    taps = 2 if interpolation == "bilinear" else 4
    steps = torch.arange(taps, dtype=at.dtype, device=at.device) - (taps // 2 - 1)
    distance = (steps - share).abs()
    weight = 1 - distance
    if interpolation == "bicubic":
        inner = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        outer = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        weight = torch.where(distance <= 1, inner, outer)
    place = first[..., None] + steps
    inside = (place >= 0) & (place < n)
    return torch.where(inside, place, 0.0).int(), torch.where(inside, weight, 0.0)


def _sample(image: Tensor, grid: Tensor, interpolation: str) -> Tensor:
    return functional.grid_sample(image, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
