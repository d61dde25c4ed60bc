"""The unknowns in which chains of a learned source move: the weights of its field and its place follow its latents.

What a decoder draws bends with the latents z, and observed images are sharp: where z moves, the weights r and the place
of the source have to move along, by many of their own standard deviations and on a bent path. Here they do so by
themselves. With e(z) the weights that draw the decoder's image, as well as the field can, and how far the centre of its
light moves the place, in a frame as large as it is,

    x = (r, source_x, source_y) + A e(z),    A = 1 - 1 / H,

where H is the Hessian of these unknowns at the maximum: 1 - 1 / H of a change is what the image undoes, the rest is
left to the prior. With z and x as unknowns the target is the same, and so are volumes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lenspipe.catalogue.batch import LensBatch
from lenspipe.fit.model import LensModel
from lenspipe.image.source_plane import light_centre
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import pushed_forward
from lenspipe.source.learned import LearnedSource
from lenspipe.source.view import Drawn, moved_centre

PLACE = ("source_x", "source_y")


@dataclass(frozen=True)
class Following:
    """The model of lenses with a learned source in those unknowns; all others are as in `model`.

    columns: [o], of the unknowns that follow; answer: [lens, o, o], A; axes: of the place, those that are free and have
    no walls; centre: [lens, axis], of the decoder's light at the maximum; pull: [lens, axis], how far one unit of it
    moves the place of a source whose size is 1; drawn_by: [k, pixel], from an image to the weights that draw it.
    """

    model: LensModel
    columns: Tensor
    answer: Tensor
    axes: list[int]
    centre: Tensor
    pull: Tensor
    drawn_by: Tensor

    @classmethod
    @torch.no_grad()
    def at(cls, model: LensModel, w: Tensor, hessian: Tensor) -> Following:
        """Made at the maxima w [lens, size] of a model whose source is learned, with the Hessians there."""
        source, named = learned(model), model.split(w)[0]
        walled = {wall.column for wall in model.priors.walls}
        movable = [name for i, name in enumerate(model.priors.free) if i not in walled]
        axes = [axis for axis, name in enumerate(PLACE) if name in movable]
        place = [model.priors.free.index(PLACE[axis]) for axis in axes]
        weights = range(named.shape[1] + source.latents, model.size)
        columns = torch.tensor([*place, *weights], dtype=torch.long, device=w.device)
        own = hessian[:, columns][:, :, columns]
        slopes = model.priors.linearise(named)[1]
        drawn_by = torch.linalg.pinv(source.basis.flatten(1).double().T).to(w)
        return cls(
            model,
            columns,
            (torch.eye(len(columns), device=w.device) - torch.linalg.inv(own)).to(w),
            axes,
            centre_of(source.decoded(model.split(w)[1]), axes),
            -1 / slopes[:, place],
            drawn_by,
        )

    @property
    def batch(self) -> LensBatch:
        return self.model.batch

    @property
    def priors(self) -> PriorMap:
        return self.model.priors

    def take(self, rows: Tensor) -> Following:
        """The lenses at `rows` [n], which may repeat."""
        own = {name: getattr(self, name)[rows] for name in ("answer", "centre", "pull")}
        return replace(self, model=self.model.take(rows), **own)

    def followed(self, x: Tensor, decoded: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """A e [n, size] where decoded images are [n, m, m], of the lenses at `rows` [n]; zero for what stays.

        x: [n, size]; that of w is the same, as sizes and latents are.
        """
        pull = self.pull[rows] * self.model.parameters(x)["source_size"][:, None]
        moved = pull * (centre_of(decoded, self.axes) - self.centre[rows])
        e = torch.cat([moved, decoded.flatten(1) @ self.drawn_by.T], 1)
        answer = (self.answer[rows] @ e[..., None])[..., 0]
        return answer.new_zeros(len(answer), self.model.size).index_copy(1, self.columns, answer)

    def sizes(self, named: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes of the sources [n], and their derivatives with respect to the named unknowns [n, named]."""
        values, slopes = self.model.priors.linearise(named)

        def size(values: Tensor) -> tuple[Tensor]:
            return (self.model.physical(values)["source_size"],)

        return size(values)[0], slopes * pushed_forward(size, values)[0]

    def decoded(self, w: Tensor) -> Tensor:
        """The decoder's images of unknowns w or x [n, size]: the latents of both are the same."""
        return learned(self.model).decoded(self.model.split(w)[1])

    def to_following(self, w: Tensor) -> Tensor:
        """x [lens, size] of w [lens, size]."""
        return w + self.followed(w, self.decoded(w))

    def from_following(self, x: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """w [n, size] of x [n, size] of the lenses at `rows` [n]."""
        return x - self.followed(x, self.decoded(x), rows)

    def value_and_gradient(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of `LensModel`, with respect to x; the decoder draws once."""
        model = self.model
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            decoded = self.decoded(x)
            w = x - self.followed(x, decoded, slice(None) if rows is None else rows)
            field = learned(model).field(model.split(w)[1])
            sources = Drawn(decoded + field, decoded, model.optics.interpolation)
            value = model.log_density(w, rows=rows, sources=sources)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    def hessian(self, x: Tensor) -> Tensor:
        """As of `LensModel`, in x: [lens, size, size]."""
        return self.changed(x, self.model.hessian(self.from_following(x)))

    @torch.no_grad()
    def changed(self, x: Tensor, hessian: Tensor) -> Tensor:
        """In x what the model's own Hessians [lens, size, size] are there."""
        source, (named, of_source) = learned(self.model), self.model.split(x)
        begin, decoded = named.shape[1], self.decoded(x)
        slopes = source.linearise(of_source)[1][:, : source.latents]
        size, by_named = self.sizes(named)
        away = self.pull * (centre_of(decoded, self.axes) - self.centre)
        moved = torch.stack(moved_centre(decoded, slopes), -1)[..., self.axes]
        place = torch.cat([by_named[..., None] * away[:, None], size[:, None, None] * self.pull[:, None] * moved], 1)
        weights = slopes.flatten(2) @ self.drawn_by.T
        weights = torch.cat([weights.new_zeros(len(x), begin, weights.shape[2]), weights], 1)
        e = torch.cat([place, weights], 2)  # [lens, named and latent, o]
        jacobian = torch.eye(x.shape[1], dtype=torch.float64, device=x.device).repeat(len(x), 1, 1)
        jacobian[:, self.columns, : e.shape[1]] -= (self.answer @ e.mT).double()
        return jacobian.mT @ hessian @ jacobian


def learned(model: LensModel) -> LearnedSource:
    """The source of a model that has a learned one."""
    assert isinstance(model.source, LearnedSource)
    return model.source


def centre_of(images: Tensor, axes: list[int]) -> Tensor:
    """Centre of the light of images [n, m, m] along some axes: [n, axis]."""
    return torch.stack(light_centre(images), 1)[:, axes]
