"""Sources as the rays of a batch see them: images that are looked up, or functions.

Both have the same methods. Places u, v [n, ny, nx] are in units of the image's width from its middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lenspipe.image.simulator import Brightness, Parameters
from lenspipe.image.source_plane import light_centre, sample
from lenspipe.lens.profiles import Vector
from lenspipe.source.base import FunctionSource, Source

POINTS = 256  # along a side of the image of a function, at which its light is added up


@dataclass(frozen=True)
class Drawn:
    """Images [n, m, m], and their derivatives [n, size, m, m] where `slopes` is wanted."""

    images: Tensor
    interpolation: str
    derivatives: Tensor | None = None
    has_edge = True

    def __len__(self) -> int:
        return len(self.images)

    @property
    def centre(self) -> Vector:
        """Of the light, [n] each."""
        return light_centre(self.images)

    @property
    def total(self) -> Tensor:
        """Light [n] of the image, in brightnesses times the square of its width."""
        return self.images.mean((-2, -1))

    def take(self, rows: Tensor) -> Drawn:
        """The sources at `rows` [n], without derivatives."""
        return Drawn(self.images[rows], self.interpolation)

    def at(self, u: Tensor, v: Tensor) -> Tensor:
        """Brightness there."""
        return sample(self.images[:, None], u, v, self.interpolation)[:, 0]

    def slopes(self, places: Vector, along: Vector) -> Tensor:
        """Derivatives with respect to w, [n, size, ny, nx], where those of the brightness along u and v are given.

        The image is linear in the source, whose light also moves the source by as much as the centre of it moves.
        """
        assert self.derivatives is not None
        slopes = sample(self.derivatives, *places, self.interpolation)
        for moved, step in zip(along, moved_centre(self.images, self.derivatives), strict=True):
            slopes += moved[:, None] * step[..., None, None]
        return slopes

    def of(self, p: Parameters) -> Tensor:
        """What `Simulator.image` takes, where the lenses have these parameters [n]."""
        return self.images


@dataclass(frozen=True)
class Seen:
    """A function of w [n, size]; the middle of its image is its centre."""

    source: FunctionSource
    w: Tensor
    has_edge = False

    def __len__(self) -> int:
        return len(self.w)

    @property
    def centre(self) -> Vector:
        return self.w.new_zeros(len(self)), self.w.new_zeros(len(self))

    @property
    def total(self) -> Tensor:
        return self.source.drawn(self.w, POINTS).mean((-2, -1))

    def take(self, rows: Tensor) -> Seen:
        return Seen(self.source, self.w[rows])

    def at(self, u: Tensor, v: Tensor) -> Tensor:
        return self.source.brightness(self.w, u, v)

    def slopes(self, places: Vector, along: Vector) -> Tensor:
        return self.source.slopes(self.w, *places)

    def of(self, p: Parameters) -> Brightness:
        return partial(self._on_the_sky, p)

    def _on_the_sky(self, p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        source_x, source_y, size, flux = (p[f"source_{name}"][:, None, None] for name in ("x", "y", "size", "flux"))
        return flux * self.at((x - source_x) / size, (y - source_y) / size)


def view(source: Source, w: Tensor, interpolation: str, derivatives: bool = False) -> Drawn | Seen:
    """The sources w [n, size], with or without what `slopes` needs."""
    if isinstance(source, FunctionSource):
        return Seen(source, w)
    if not derivatives:
        return Drawn(source(w), interpolation)
    images, slopes = source.linearise(w)
    return Drawn(images, interpolation, slopes)


def moved_centre(source: Tensor, d_source: Tensor) -> tuple[Tensor, ...]:
    """Derivatives [lens, n] of the centre of the light of images [lens, m, m] along `d_source` [lens, n, m, m]."""
    centre, back = torch.func.vjp(light_centre, source)[:2]
    zero, one = torch.zeros_like(centre[0]), torch.ones_like(centre[0])
    gradients = torch.stack([back(of)[0].flatten(1) for of in ((one, zero), (zero, one))], -1)
    return (d_source.flatten(2) @ gradients).unbind(-1)
