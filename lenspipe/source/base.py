"""What every source is: images of a galaxy, of brightness about 1, made from a standard normal w."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

IMAGE_SIZE = 64  # side of the images that are learned from [px]; the least of any source


class Source(nn.Module):
    """Images [n, m, m] of w [n, size], w ~ N(0, I) or as `log_prior` says; derivatives nearly everywhere.

    A kind of source is one file with a subclass of this; it is built from its section of the settings alone or, where
    it is learned, from tensors that the stage `source` puts into its file. `prior.py` lists them.
    """

    size: int  # number of entries of w
    pixels: int = IMAGE_SIZE  # side m of the images [px]
    unmoving: int = 0  # how many of the last entries do not move the lead

    def led(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the lead whose centre of light they are placed by, [n, m, m] both; by default the same."""
        images = self(w)
        return images, images

    def log_prior(self, w: Tensor) -> Tensor:
        """Logarithm of the density of w [n, size], without a constant: [n], float64."""
        return -0.5 * w.double().square().sum(-1)

    def prior_curvature(self, w: Tensor) -> Tensor:
        """What stands for the Hessian of minus that: [n, size, size], float64, positive definite."""
        return torch.eye(w.shape[-1], dtype=torch.float64, device=w.device).expand(len(w), -1, -1)

    def straight(self) -> Source:
        """This source in other unknowns x [n, size], in which its images bend less, for chains; by default itself."""
        return self

    def to_straight(self, w: Tensor) -> Tensor:
        """x [n, size] of w."""
        return w

    def from_straight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """w [n, size] of x, and log |dw / dx| [n], float64."""
        return x, x.new_zeros(len(x), dtype=torch.float64)

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and their derivatives with respect to w [n, size, m, m]; by forward mode."""
        (derivatives,) = pushed_forward(lambda w: (self(w),), w)
        return self(w), derivatives

    def sketch(self, components: int) -> Source:
        """A source like this one that is cheap enough for the many starts of a search; by default itself."""
        return self

    def from_sketch(self, w: Tensor) -> Tensor:
        """Unknowns [..., size] to go on from where a search ended with the sketch at w [..., its size]."""
        return w


class FunctionSource(Source, ABC):
    """A source that is known at every point, not on pixels alone, so that rays see it as it is, without an edge.

    The middle of its image is its centre.
    """

    @abstractmethod
    def brightness(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Brightness of w [n, size] at u, v [n, ny, nx], in units of the image's width from its middle."""

    def slopes(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Derivatives of that with respect to w: [n, size, ny, nx]; by forward mode."""
        return pushed_forward(lambda w: (self.brightness(w, u, v),), w)[0]

    def drawn(self, w: Tensor, pixels: int) -> Tensor:
        """Images on so many pixels a side: [n, pixels, pixels]."""
        axis = pixel_axis(pixels).to(w).expand(len(w), pixels, -1)
        return self.brightness(w, axis, axis.transpose(1, 2))

    def forward(self, w: Tensor) -> Tensor:
        return self.drawn(w, self.pixels)


def pushed_forward(function: Callable[[Tensor], tuple[Tensor, ...]], at: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of every output [n, ...] with respect to `at` [n, size]: [n, size, ...] each, in forward mode.

    Rows do not depend on each other, so one direction serves all of them.
    """

    def along(direction: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(function, (at,), (direction.expand_as(at),))[1]

    directions = torch.eye(at.shape[-1], dtype=at.dtype, device=at.device)
    derivatives = torch.func.vmap(along)(directions)  # out_dims=1 fails for an output that does not depend on `at`
    return tuple(derivative.transpose(0, 1) for derivative in derivatives)


def pixel_axis(pixels: int = IMAGE_SIZE) -> Tensor:
    """Centres of the pixels along one axis, in units of the image's width from its centre: [pixels]."""
    return (torch.arange(pixels) - (pixels - 1) / 2) / pixels
