"""The probabilistic model of a batch of lenses, and its derivatives.

Every unknown is a standard normal w: first the named parameters, through their priors, then the latents of the source.
Some are folded: the same at w and -w; search and chains keep to w >= 0.
The log posterior is then -(|r(w)|^2 + |w|^2) / 2 up to a constant, with r the residuals in units of the noise.
Chains may move in other unknowns, whose prior is not normal: `LensModel.straight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from lenspipe.catalogue.batch import LensBatch
from lenspipe.image.simulator import Optics, Parameters, Simulator, canonical
from lenspipe.image.window import extent, windows
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import Source, pixel_axis, pushed_forward
from lenspipe.source.view import Drawn, Seen, view

CHUNK_ELEMENTS = 8_000_000  # derivatives of rays [lens, ray, unknown], or of the source's pixels, held at once


@dataclass(frozen=True)
class Part:
    """Images in windows of one size: at places [n] of a batch, with data and weight = 1 / noise [n, ny, nx].

    dark: chi^2 [n] of the pixels outside, float64, where there is no light.
    """

    places: Tensor
    simulator: Simulator
    data: Tensor
    weight: Tensor
    dark: Tensor

    def split(self, size: int) -> Iterator[Part]:
        """Parts of at most `size` images."""
        for rows in torch.arange(len(self.places), device=self.places.device).split(size):
            fields = (field[rows] for field in (self.data, self.weight, self.dark))
            yield Part(self.places[rows], self.simulator.take(rows), *fields)


class LensModel:
    """The model of the lenses of a batch; `w` is [lens, size], one row of unknowns for each."""

    def __init__(self, batch: LensBatch, priors: PriorMap, source: Source, optics: Optics):
        self.batch, self.priors, self.source, self.optics = batch, priors, source, optics
        unit = batch.flux_unit[:, None, None]
        self.data = batch.image / unit
        self.weight = batch.usable / (batch.noise / unit)
        self.data = torch.where(batch.usable, self.data, 0.0)
        ny, nx = batch.image.shape[-2:]
        self.simulator = Simulator(optics, batch.psf, batch.pixel_scale, (ny, nx), batch.light_unit / batch.flux_unit)
        self.blank = (self.data * self.weight).square().sum((-2, -1), dtype=torch.float64)  # chi^2 without light
        self.reach = -(-(max(batch.psf.shape[-2:]) // 2) // optics.psf_supersampling)  # of the PSF [px]
        edges = (extent(batch.usable.amax(axis)) for axis in (2, 1))
        self.seen = [(first - self.reach, end + self.reach) for first, end in edges]

    @property
    def size(self) -> int:
        """Number of unknowns of a lens."""
        return len(self.priors.free) + self.source.size

    def take(self, rows: Tensor) -> LensModel:
        """The model of the lenses at `rows` [n]; rows may repeat, as for starts and chains."""
        return LensModel(self.batch.take(rows), self.priors, self.source, self.optics)

    def coarse(self) -> LensModel:
        """The model of the same lenses on pixels twice as wide; itself where a side of the image is odd."""
        if any(side % 2 for side in self.simulator.shape):
            return self
        return LensModel(self.batch.coarse(), self.priors, self.source, self.optics)

    def sketched(self, components: int) -> LensModel:
        """The model of the same lenses with the source's sketch of so many components."""
        return LensModel(self.batch, self.priors, self.source.sketch(components), self.optics)

    def straight(self) -> LensModel:
        """The model of the same lenses in the unknowns in which chains move; itself where those are no others."""
        source, priors = self.source.straight(), self.priors.straight()
        if source is self.source and priors is self.priors:
            return self
        return LensModel(self.batch, priors, source, self.optics)

    def to_straight(self, w: Tensor) -> Tensor:
        """Those unknowns [n, size] of w [n, size]."""
        named, of_source = self.split(w)
        return torch.cat([self.priors.to_straight(named), self.source.to_straight(of_source)], 1)

    def from_straight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """w [n, size] of those, and log |dw / dx| [n], float64."""
        named, of_source = self.split(x)
        (w, log_volume), (own, own_log_volume) = self.source.from_straight(of_source), self.priors.from_straight(named)
        return torch.cat([own, w], 1), log_volume + own_log_volume

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The unknowns of the named parameters and those of the source."""
        n = len(self.priors.free)
        return w[..., :n], w[..., n:]

    def unfolded(self, w: Tensor) -> Tensor:
        """The same lenses, folded unknowns at or above 0; w: [..., size]."""
        w = w.clone()
        w[..., self.priors.folded] = w[..., self.priors.folded].abs()
        return w

    def parameters(self, w: Tensor) -> Parameters:
        """Named parameters [lens], those of config and the canonical ones; w may lack the source's unknowns."""
        return self.physical(self.priors.values(self.split(w)[0]))

    def physical(self, values: Tensor) -> Parameters:
        """The same of the values of the free parameters [lens, free]."""
        return canonical(self.priors.named(values), self.priors.shared)

    def view(self, w: Tensor, derivatives: bool = False) -> Drawn | Seen:
        """The sources of unknowns w [n, size], as rays see them."""
        return view(self.source, self.split(w)[1], self.optics.interpolation, derivatives)

    def source_frame(self, w: Tensor) -> Tensor:
        """Where the decoded image lies in the source plane: x and y of its centre and its full width ["], [lens, 3]."""
        return frame_of(self.parameters(w), self.view(w))

    def source_plane(self, w: Tensor, frame: Tensor) -> Tensor:
        """Brightness of the sources, in flux units, on as many pixels over a frame [lens, 3]: [lens, m, m]."""
        n, p, sources = self.source.pixels, self.parameters(w), self.view(w)
        axis = pixel_axis(n).to(w)
        own, frame = frame_of(p, sources)[:, :, None], frame[:, :, None]
        u, v = ((frame[:, i] + axis * frame[:, 2] - own[:, i]) / own[:, 2] for i in (0, 1))
        grid = u[:, None, :].expand(-1, n, -1), v[:, :, None].expand(-1, -1, n)
        return p["source_flux"][:, None, None] * sources.at(*grid)

    def source_rays(self, w: Tensor) -> Tensor:
        """Brightness of the lensed source along the rays, without PSF, in flux units: [lens, ny s, nx s]."""
        p = self.parameters(w)
        return self.simulator.source_rays(p, self.view(w).of(p))

    def image(self, w: Tensor) -> Tensor:
        """Predicted images [lens, ny, nx], in flux units."""
        p = self.parameters(w)
        return self.simulator.image(p, self.view(w).of(p))

    def residuals(self, w: Tensor) -> Tensor:
        """(prediction - data) / noise: [lens, ny, nx]; zero where masked."""
        return (self.image(w) - self.data) * self.weight

    def log_density(
        self,
        w: Tensor,
        temperature: float = 1.0,
        rows: Tensor | None = None,
        sources: Drawn | Seen | None = None,
    ) -> Tensor:
        """Log posterior [n] without its constant, summed in float64, of all lenses or of those at `rows` [n].

        w: [n, size]; temperature: what the noise is multiplied by; sources: `view(w)`, where it is known.
        """
        sources, p = self.view(w) if sources is None else sources, self.parameters(w)
        chi2 = w.new_zeros(len(w), dtype=torch.float64)
        for part in self.parts(p, sources, rows):
            here = {name: value[part.places] for name, value in p.items()}
            image = part.simulator.image(here, sources.take(part.places).of(here))
            residuals = (image - part.data) * part.weight
            chi2 = chi2.index_add(0, part.places, part.dark + residuals.double().square().sum((-2, -1)))
        named, of_source = self.split(w)
        return self.source.log_prior(of_source) - 0.5 * (chi2 / temperature**2 + named.double().square().sum(-1))

    def value_and_gradient(
        self, w: Tensor, rows: Tensor | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`log_density` [n] and its gradient [n, size], by reverse mode."""
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            value = self.log_density(w, temperature, rows)
            (gradient,) = torch.autograd.grad(value.sum(), w)
        return value.detach(), gradient

    @torch.no_grad()
    def parts(self, p: Parameters, sources: Drawn | Seen, rows: Tensor | None = None) -> Iterator[Part]:
        """The images of parameters [n] and sources [n], of the lenses at `rows` [n], in their windows."""
        rows = torch.arange(len(sources), device=self.data.device) if rows is None else rows
        p = {name: value.detach() for name, value in p.items()}
        lit = self.simulator.lit(p, sources.centre if sources.has_edge else None, rows)
        seen = tuple((low[rows], high[rows]) for low, high in self.seen)
        for places, window in windows(lit, self.simulator.shape, self.reach, seen):
            lenses = rows[places]
            data, weight = (window.cut(field, lenses) for field in (self.data, self.weight))
            dark = self.blank[lenses] - (data * weight).square().sum((-2, -1), dtype=torch.float64)
            yield Part(places, self.simulator.within(window, lenses), data, weight, dark)

    @torch.no_grad()
    def linearise(self, w: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """Residuals [lens, pixel] and their Jacobian [lens, pixel, size], of whole frames or of the windows of a part.

        The chain rule through the source plane: how each ray moves with every named parameter, by forward mode where it
        is not written out, the derivative of the source along each ray, and one more rendered image for every unknown
        of the source.
        """
        if part is None:
            part = Part(torch.arange(len(w)), self.simulator, self.data, self.weight, torch.zeros(len(w)))
        named, _ = self.split(w)
        values, slopes = self.priors.linearise(named)

        sources = self.view(w, derivatives=True)
        centre, simulator = sources.centre, part.simulator

        def geometry(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p = self.physical(values)
            return *simulator.source_points(p, centre), p["source_flux"][:, None, None]

        u, v, flux = geometry(values)
        rays, along_u, along_v = simulator.brightness_gradient((u, v), sources.at)
        if (known := simulator.source_slopes(self.physical(values), (u, v), centre)) is None:
            du, dv, d_flux = pushed_forward(geometry, values)
        else:
            names, along = known

            def chosen(values: Tensor) -> tuple[Tensor, ...]:
                p = self.physical(values)
                return tuple(p[name] for name in (*names, "source_flux"))

            *moved, d_flux = pushed_forward(chosen, values)
            du, dv = (torch.stack(moved, -1)[:, None] @ along).unflatten(-1, u.shape[1:]).unbind(1)
            d_flux = d_flux[..., None, None]
        of_named = flux[:, None] * (along_u[:, None] * du + along_v[:, None] * dv) + d_flux * rays[:, None]
        of_latents = flux[:, None] * sources.slopes((u, v), (along_u, along_v), simulator.block)
        total = flux * rays
        light = simulator.lens_light(self.physical(values))
        if light is not None:
            total = total + light
            of_named = of_named + self.light_slopes(values, simulator)
        of_named *= slopes[..., None, None]
        along_rays = simulator.gathered(torch.cat([total[:, None], of_named], 1))
        images = simulator.blurred(torch.cat([along_rays, of_latents], 1))
        if "background" in self.priors.priors:

            def background(values: Tensor) -> tuple[Tensor]:
                return (self.physical(values)["background"],)

            images[:, 0] += background(values)[0][:, None, None]
            images[:, 1 : 1 + named.shape[1]] += (slopes * pushed_forward(background, values)[0])[..., None, None]
        jacobian = images[:, 1:] * part.weight[:, None]
        residuals = (images[:, 0] - part.data) * part.weight
        return residuals.flatten(1), jacobian.flatten(2).transpose(1, 2)

    def light_slopes(self, values: Tensor, simulator: Simulator) -> Tensor:
        """Derivatives of the lens galaxy's light along the rays with respect to `values` [lens, free]: one each."""
        assert self.optics.light is not None
        names = self.optics.light.parameters

        def of_light(values: Tensor) -> tuple[Tensor, ...]:
            p = self.physical(values)
            return tuple(p[name] for name in names)

        moved = dict(zip(names, pushed_forward(of_light, values), strict=True))
        moved = {name: by for name, by in moved.items() if by.any()}
        if not moved:
            return values.new_zeros(*values.shape, *simulator.x.shape[1:])
        along = simulator.light_slopes(self.physical(values), moved.keys())
        return (torch.stack(list(moved.values()), -1) @ along.flatten(2)).unflatten(-1, along.shape[2:])

    @torch.no_grad()
    def normal_equations(self, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """|r|^2 [n], J^T r [n, size] and J^T J [n, size, size] as float64, of all lenses or those at `rows` [n].

        The products are made in the precision of the images, a bounded piece at a time.
        """
        chi2 = w.new_zeros(len(w), dtype=torch.float64)
        gradient, hessian = w.new_zeros(*w.shape, dtype=torch.float64), torch.diag_embed(torch.zeros_like(w).double())
        for part in self.parts(self.parameters(w), self.view(w), rows):
            rays = part.data[0].numel() * self.optics.supersampling**2
            per_lens = max(rays, self.source.pixels**2) * self.size
            for piece in part.split(max(1, CHUNK_ELEMENTS // per_lens)):
                residuals, jacobian = self.linearise(w[piece.places], piece)
                chi2[piece.places] = piece.dark + residuals.double().square().sum(-1)
                gradient[piece.places] = (jacobian.transpose(1, 2) @ residuals[..., None])[..., 0].double()
                hessian[piece.places] = (jacobian.transpose(1, 2) @ jacobian).double()
        return chi2, gradient, hessian

    def hessian(self, w: Tensor, rows: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Gauss-Newton Hessian [n, size, size] of minus `log_density`, float64, positive definite but for rounding."""
        named, of_source = self.split(w)
        prior = torch.diag_embed(torch.ones_like(w, dtype=torch.float64))
        prior[:, named.shape[1] :, named.shape[1] :] = self.source.prior_curvature(of_source)
        return self.normal_equations(w, rows)[2] / temperature**2 + prior

    def pyro_model(self) -> None:
        """The same model in Pyro, one plate of lenses: for reference inference and for tests of this class."""
        with pyro.plate("lens", len(self.batch)):
            unit = self.data.new_zeros(self.size)
            w = pyro.sample("w", dist.Normal(unit, 1.0).to_event(1))
            noise = torch.where(self.batch.usable, 1 / self.weight, 1.0)
            observed = dist.Normal(self.image(w), noise).mask(self.batch.usable).to_event(2)
            pyro.sample("image", observed, obs=self.data)


def frame_of(p: Parameters, sources: Drawn | Seen) -> Tensor:
    """Centre x, y and full width ["] of the images of sources, where the lenses have these parameters: [n, 3]."""
    (u, v), size = sources.centre, p["source_size"]
    return torch.stack([p["source_x"] - size * u, p["source_y"] - size * v, size], -1)
