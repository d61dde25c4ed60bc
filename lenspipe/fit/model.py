"""The probabilistic model of a batch of lenses, and its derivatives.

Every unknown is a standard normal w: first the named parameters, through their priors, then the latents of the source.
The log posterior is then -(|r(w)|^2 + |w|^2) / 2 up to a constant, with r the residuals in units of the noise.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from lenspipe.catalogue.batch import LensBatch
from lenspipe.image.simulator import Optics, Parameters, Simulator, canonical
from lenspipe.image.source_plane import light_centre
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import Source, pushed_forward

CHUNK_ELEMENTS = 8_000_000  # entries of a Jacobian [lens, pixel, unknown] held at once


class LensModel:
    """The model of the lenses of a batch; `w` is [lens, size], one row of unknowns for each."""

    def __init__(self, batch: LensBatch, priors: PriorMap, source: Source, optics: Optics):
        self.batch, self.priors, self.source, self.optics = batch, priors, source, optics
        unit = batch.flux_unit[:, None, None]
        self.data = batch.image / unit
        self.weight = batch.usable / (batch.noise / unit)
        self.data = torch.where(batch.usable, self.data, 0.0)
        self.simulator = Simulator(optics, batch.psf, batch.pixel_scale, tuple(batch.image.shape[-2:]))  # type: ignore[arg-type]

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

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The unknowns of the named parameters and those of the source."""
        n = len(self.priors.free)
        return w[..., :n], w[..., n:]

    def parameters(self, w: Tensor) -> Parameters:
        """Named parameters [lens], those of config and the canonical ones; w may lack the source's unknowns."""
        return self.physical(self.priors.values(self.split(w)[0]))

    def physical(self, values: Tensor) -> Parameters:
        """The same of the values of the free parameters [lens, free]."""
        return canonical(self.priors.named(values), self.priors.shared)

    def source_frame(self, w: Tensor) -> Tensor:
        """Where the decoded image lies in the source plane: x and y of its centre and its full width ["], [lens, 3]."""
        p = self.parameters(w)
        u, v = light_centre(self.source(self.split(w)[1]))
        size = p["source_size"]
        return torch.stack([p["source_x"] - size * u, p["source_y"] - size * v, size], -1)

    def source_plane(self, w: Tensor, frame: Tensor) -> Tensor:
        """Brightness of the sources, in flux units, on the 64 x 64 pixels of a frame [lens, 3]: [lens, 64, 64]."""
        source = self.source(self.split(w)[1])
        n = source.shape[-1]
        axis = (torch.arange(n, dtype=w.dtype, device=w.device) - (n - 1) / 2) / n
        own, frame = self.source_frame(w)[:, :, None], frame[:, :, None]
        u, v = ((frame[:, i] + axis * frame[:, 2] - own[:, i]) / own[:, 2] for i in (0, 1))
        grid = u[:, None, :].expand(-1, n, -1), v[:, :, None].expand(-1, -1, n)
        return self.parameters(w)["source_flux"][:, None, None] * self.simulator.rays(grid, source[:, None])[:, 0]

    def image(self, w: Tensor) -> Tensor:
        """Predicted images [lens, ny, nx], in flux units."""
        return self.simulator.image(self.parameters(w), self.source(self.split(w)[1]))

    def residuals(self, w: Tensor) -> Tensor:
        """(prediction - data) / noise: [lens, ny, nx]; zero where masked."""
        return (self.image(w) - self.data) * self.weight

    def log_density(self, w: Tensor, temperature: float = 1.0) -> Tensor:
        """Log posterior [lens] without its constant, summed in float64; `temperature` multiplies the noise."""
        chi2 = self.residuals(w).double().square().sum((-2, -1))
        return -0.5 * (chi2 / temperature**2 + w.double().square().sum(-1))

    def value_and_gradient(self, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log posterior [lens] and its gradient [lens, size], by reverse mode; of all lenses or of those at `rows`."""
        model = self if rows is None else self.take(rows)
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            value = model.log_density(w)
            (gradient,) = torch.autograd.grad(value.sum(), w)
        return value.detach(), gradient

    @torch.no_grad()
    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals [lens, pixel] and their Jacobian [lens, pixel, size].

        The chain rule through the source plane: forward mode through the lens for every named parameter, the
        derivative of the source along each ray, and, the image being linear in the source, one more rendered
        image for every latent, whose light also moves the source by as much as it moves the centre of its light.
        """
        named, latent = self.split(w)
        values, slopes = self.priors.linearise(named)

        source, d_source = self.source.linearise(latent)
        centre = light_centre(source)
        d_centre_u, d_centre_v = moved_centre(source, d_source)

        def geometry(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p = self.physical(values)
            return *self.simulator.source_points(p, centre), p["source_flux"][:, None, None]

        u, v, flux = geometry(values)
        rays, along_u, along_v = self.simulator.brightness_gradient((u, v), source)
        du, dv, d_flux = pushed_forward(geometry, values)
        of_named = flux[:, None] * (along_u[:, None] * du + along_v[:, None] * dv) + d_flux * rays[:, None]
        of_latents = self.simulator.rays((u, v), d_source)
        of_latents += along_u[:, None] * d_centre_u[..., None, None] + along_v[:, None] * d_centre_v[..., None, None]
        total = flux * rays
        if self.optics.light is not None:

            def light(values: Tensor) -> tuple[Tensor, ...]:
                return (self.simulator.lens_light(self.physical(values)),)  # type: ignore[return-value]

            total = total + light(values)[0]
            of_named = of_named + pushed_forward(light, values)[0]
        of_named *= slopes[..., None, None]
        images = self.simulator.observe(torch.cat([total[:, None], of_named, flux[:, None] * of_latents], 1))
        if "background" in self.priors.priors:

            def background(values: Tensor) -> tuple[Tensor]:
                return (self.physical(values)["background"],)

            images[:, 0] += background(values)[0][:, None, None]
            images[:, 1 : 1 + named.shape[1]] += (slopes * pushed_forward(background, values)[0])[..., None, None]
        jacobian = images[:, 1:] * self.weight[:, None]
        residuals = (images[:, 0] - self.data) * self.weight
        return residuals.flatten(1), jacobian.flatten(2).transpose(1, 2)

    def normal_equations(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|r|^2 [lens], J^T r [lens, size] and J^T J [lens, size, size] in float64, a bounded piece at a time."""
        pieces = []
        for rows in self._pieces():
            residuals, jacobian = self.take(rows).linearise(w[rows])
            pieces.append(
                (
                    residuals.double().square().sum(-1),
                    (jacobian.transpose(1, 2) @ residuals[..., None])[..., 0].double(),
                    (jacobian.transpose(1, 2) @ jacobian).double(),
                )
            )
        chi2, gradient, hessian = (torch.cat(part) for part in zip(*pieces, strict=True))
        return chi2, gradient, hessian

    def hessian(self, w: Tensor) -> Tensor:
        """Gauss-Newton Hessian [lens, size, size] of minus the log posterior, float64, positive definite."""
        return self.normal_equations(w)[2] + torch.eye(self.size, dtype=torch.float64, device=w.device)

    def _pieces(self) -> Iterator[Tensor]:
        per_lens = self.data[0].numel() * self.size
        return iter(torch.arange(len(self.batch)).split(max(1, CHUNK_ELEMENTS // per_lens)))

    def pyro_model(self) -> None:
        """The same model in Pyro, one plate of lenses: for reference inference and for tests of this class."""
        with pyro.plate("lens", len(self.batch)):
            unit = self.data.new_zeros(self.size)
            w = pyro.sample("w", dist.Normal(unit, 1.0).to_event(1))
            noise = torch.where(self.batch.usable, 1 / self.weight, 1.0)
            observed = dist.Normal(self.image(w), noise).mask(self.batch.usable).to_event(2)
            pyro.sample("image", observed, obs=self.data)


def moved_centre(source: Tensor, d_source: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives [lens, n] of the centre of the light of images [lens, 64, 64] along `d_source` [lens, n, 64, 64]."""

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(light_centre, (source,), (direction,))[1]

    return torch.func.vmap(along, in_dims=1, out_dims=1)(d_source)
