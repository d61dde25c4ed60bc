"""Images of several lenses of one shape, as the fits take them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LensBatch:
    """Lenses of one image shape and one PSF shape.

    image, noise: [lens, ny, nx], in the image's own units; usable: [lens, ny, nx] bool; psf: [lens, ky, kx], sum 1;
    pixel_scale: [lens] ["]; flux_unit: [lens], image units for one unit of `source_flux`.
    """

    names: tuple[str, ...]
    image: Tensor
    noise: Tensor
    usable: Tensor
    psf: Tensor
    pixel_scale: Tensor
    flux_unit: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Tensor) -> LensBatch:
        """The lenses at `rows` [n]; rows may repeat."""
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "names"}
        return LensBatch(tuple(self.names[row] for row in rows.tolist()), **tensors)

    def to(self, dtype: torch.dtype) -> LensBatch:
        """The same lenses with their real numbers in another precision."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "names"}
        return LensBatch(self.names, **{n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()})
