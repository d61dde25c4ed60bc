"""Sources as the rays of a batch see them: images that are looked up, or functions.

Both have the same methods. Places u, v [n, ny, nx] are in units of the image's width from its middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lenspipe.image.simulator import Brightness, Parameters, in_source_image
from lenspipe.image.source_plane import gathered, light_centre, sample, sample_blocks
from lenspipe.lens.profiles import Vector
from lenspipe.source.base import FunctionSource, Source

POINTS = 256  # along a side of the image of a function, at which its light is added up


@dataclass(frozen=True)
class Drawn:
    """Images [n, m, m], placed by the centre of the light of a `lead` [n, m, m], which may be themselves.

    derivatives: [n, size, m, m], where `slopes` is wanted; the last `unmoving` unknowns do not move the lead.
    """

    images: Tensor
    lead: Tensor
    interpolation: str
    derivatives: Tensor | None = None
    unmoving: int = 0
    has_edge = True

    def __len__(self) -> int:
        return len(self.images)

    @property
    def centre(self) -> Vector:
        """Of the light of the lead, [n] each."""
        return light_centre(self.lead)

    @property
    def total(self) -> Tensor:
        """Light [n] of the image, in brightnesses times the square of its width."""
        return self.images.mean((-2, -1))

    def take(self, rows: Tensor) -> Drawn:
        """The sources at `rows` [n], without derivatives."""
        return Drawn(self.images[rows], self.lead[rows], self.interpolation)

    def at(self, u: Tensor, v: Tensor) -> Tensor:
        """Brightness there."""
        return sample(self.images[:, None], u, v, self.interpolation)[:, 0]

    def slopes(self, places: Vector, along: Vector, block: int) -> Tensor:
        """Derivatives with respect to w, averaged over blocks of places: [n, size, ny / block, nx / block].

        along: those of the brightness along u and v, [n, ny, nx] each. The image is linear in the source, whose lead
        also moves the source by as much as the centre of it moves.
        """
        assert self.derivatives is not None
        slopes = sample_blocks(self.derivatives, *places, self.interpolation, block)
        leading = self.derivatives.shape[1] - self.unmoving
        steps = torch.stack(moved_centre(self.lead, self.derivatives[:, :leading]), -1)
        moved = steps @ gathered(torch.stack(along, 1), block).flatten(2)
        slopes[:, :leading] += moved.unflatten(2, slopes.shape[2:])
        return slopes

    def of(self, p: Parameters) -> Brightness:
        """What `Simulator.image` takes, where the lenses have these parameters [n]."""
        return partial(on_the_sky, self, p)


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

    def slopes(self, places: Vector, along: Vector, block: int) -> Tensor:
        return gathered(self.source.slopes(self.w, *places), block)

    def of(self, p: Parameters) -> Brightness:
        return partial(on_the_sky, self, p)


def on_the_sky(sources: Drawn | Seen, p: Parameters, x: Tensor, y: Tensor) -> Tensor:
    """Brightness of sources at places x, y ["] of the source plane, where the lenses have these parameters."""
    return p["source_flux"][:, None, None] * sources.at(*in_source_image(p, sources.centre, x, y))


def view(source: Source, w: Tensor, interpolation: str, derivatives: bool = False) -> Drawn | Seen:
    """The sources w [n, size], with or without what `slopes` needs."""
    if isinstance(source, FunctionSource):
        return Seen(source, w)
    if not derivatives:
        return Drawn(*source.led(w), interpolation)
    images, slopes = source.linearise(w)
    lead = source.led(w)[1] if source.unmoving else images
    return Drawn(images, lead, interpolation, slopes, source.unmoving)


def moved_centre(source: Tensor, d_source: Tensor) -> tuple[Tensor, ...]:
    """Derivatives [lens, n] of the centre of the light of images [lens, m, m] along `d_source` [lens, n, m, m]."""
    centre, back = torch.func.vjp(light_centre, source)[:2]
    zero, one = torch.zeros_like(centre[0]), torch.ones_like(centre[0])
    gradients = torch.stack([back(of)[0].flatten(1) for of in ((one, zero), (zero, one))], -1)
    return (d_source.flatten(2) @ gradients).unbind(-1)
