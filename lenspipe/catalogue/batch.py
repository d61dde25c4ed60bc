"""Images of several lenses of one shape, as the fits take them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad


@dataclass(frozen=True)
class LensBatch:
    """Lenses of one image shape and one PSF shape.

    image, noise: [lens, ny, nx], in the image's own units; usable: [lens, ny, nx] bool; psf: [lens, ky, kx], sum 1;
    pixel_scale: [lens] ["]; flux_unit: [lens], image units for one unit of `source_flux`; light_unit: [lens], image
    units for one unit of an amplitude of the lens galaxy's light.
    """

    names: tuple[str, ...]
    image: Tensor
    noise: Tensor
    usable: Tensor
    psf: Tensor
    pixel_scale: Tensor
    flux_unit: Tensor
    light_unit: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Tensor) -> LensBatch:
        """The lenses at `rows` [n]; rows may repeat."""
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "names"}
        return LensBatch(tuple(self.names[row] for row in rows.tolist()), **tensors)

    def coarse(self) -> LensBatch:
        """The same lenses on pixels twice as wide, for a first look; sides must be even.

        A wide pixel holds the mean of its four, and is usable where all four are. Its noise is that of independent
        pixels. The PSF is that of light spread evenly over a wide pixel.
        """
        unit = self.flux_unit[:, None, None]  # squares of fluxes in cgs units underflow
        ky, kx = self.psf.shape[-2:]
        psf = pad(self.psf, (2 - kx // 2 % 2, 3, 2 - ky // 2 % 2, 3))[:, None]  # centre on an even pixel
        triangle = torch.tensor([0.5, 1.0, 0.5], dtype=psf.dtype, device=psf.device)
        spread = conv2d(psf, torch.outer(triangle, triangle)[None, None], padding=1)[:, 0, ::2, ::2]
        centre = [(k // 2 + 2 - k // 2 % 2) // 2 for k in (ky, kx)]
        reach = [max(c, n - 1 - c) for c, n in zip(centre, spread.shape[1:], strict=True)]
        around = [(r - c, r - (n - 1 - c)) for r, c, n in zip(reach, centre, spread.shape[1:], strict=True)]
        return replace(
            self,
            image=avg_pool2d(self.image, 2),
            noise=unit * avg_pool2d((self.noise / unit).square(), 2).sqrt() / 2,
            usable=avg_pool2d(self.usable.float(), 2) == 1,
            psf=pad(spread, (*around[1], *around[0])),
            pixel_scale=2 * self.pixel_scale,
        )

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LensBatch:
        """The same lenses with their real numbers in another precision, and all of them on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        tensors = {f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "names"}
        return LensBatch(self.names, **tensors)
