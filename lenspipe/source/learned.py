"""The learned source: the decoder's image of latents z(w), and the residual field that it cannot draw."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lenspipe.config import LearnedSource as Settings
from lenspipe.source.base import IMAGE_SIZE, Source, pushed_forward
from lenspipe.source.latent import FlowLatent, GaussianLatent
from lenspipe.source.sketch import principal_source
from lenspipe.source.vae import Decoder

FAINTEST = 0.5  # what the peak of a decoded image is brightened to, roughly, where it is less; those to train on have 1
SHARPNESS = 8  # with this power in it a mean stands for the greater of two values, with twice of it for the greatest


class LearnedSource(Source):
    """lifted(mu_d(z(w))) + sum_k r_k b_k; w: first the latents' unknowns, then the weights r of the basis b.

    decoder: the VAE's; latent: from w to z; basis: [component, 64, 64].
    """

    def __init__(self, decoder: Decoder, latent: GaussianLatent | FlowLatent, latents: int, basis: Tensor):
        super().__init__()
        self.decoder, self.latent, self.latents = decoder, latent, latents
        self.basis = nn.Buffer(basis)
        self.unmoving = len(basis)
        self.size = latents + self.unmoving
        self._sketches: dict[int, Source] = {}
        self.requires_grad_(False).eval()

    @classmethod
    def blank(cls, settings: Settings, latents: int, channels: int, components: int) -> LearnedSource:
        """One whose tensors are still to be loaded."""
        latent = latent_map(settings, latents)
        return cls(Decoder(latents, channels), latent, latents, torch.zeros(components, IMAGE_SIZE, IMAGE_SIZE))

    def forward(self, w: Tensor) -> Tensor:
        return self.led(w)[0]

    def led(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the decoder's part of them: where that is says where the source is, whatever field is on it."""
        decoded = self.decoded(w)
        return decoded + self.field(w), decoded

    def without_residual(self) -> LearnedSource:
        """The same source without its residual field."""
        return LearnedSource(self.decoder, self.latent, self.latents, self.basis[:0])

    def decoded(self, w: Tensor) -> Tensor:
        """The decoder's part [n, 64, 64]."""
        return lifted(self.decoder(self.latent(w[:, : self.latents])))

    def field(self, w: Tensor) -> Tensor:
        """The residual field [n, 64, 64]."""
        return torch.einsum("nk,kyx->nyx", w[:, self.latents :], self.basis)

    def straight(self) -> Source:
        """With the latents themselves as unknowns, where a flow makes them of w: its density instead of its map."""
        return StraightSource(self) if isinstance(self.latent, FlowLatent) else self

    def to_straight(self, w: Tensor) -> Tensor:
        return torch.cat([self.latent.straight(w[:, : self.latents]), w[:, self.latents :]], 1)

    def from_straight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unknowns, log_volume = self.latent.bent(x[:, : self.latents])
        return torch.cat([unknowns, x[:, self.latents :]], 1), log_volume.double()

    def sketch(self, components: int) -> Source:
        """The linear source with the mean and the principal components of this one's draws."""
        if components not in self._sketches:
            self._sketches[components] = principal_source(self, components)
        return self._sketches[components]

    def from_sketch(self, w: Tensor) -> Tensor:
        """The middle of the latents, whatever the sketch was."""
        return w.new_zeros(*w.shape[:-1], self.size)

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and their derivatives [n, size, 64, 64]; those of the residual field are its basis."""
        unknowns = w[:, : self.latents]
        (directions,) = pushed_forward(lambda unknowns: (self.latent(unknowns),), unknowns)
        decoded, of_latents = self.decoder.linearise(self.latent(unknowns), directions)
        of_latents = torch.func.vmap(
            lambda along: torch.func.jvp(lifted, (decoded,), (along,))[1], in_dims=1, out_dims=1
        )(of_latents)
        return lifted(decoded) + self.field(w), torch.cat([of_latents, self.basis.expand(len(w), -1, -1, -1)], 1)


class StraightSource(LearnedSource):
    """A learned source whose unknowns are its latents, whitened by their covariance, and the weights as they were.

    Where a flow bends, images made through it bend by tens of standard deviations of the noise. Here the flow is in the
    prior alone, which bends by those of its own unknowns.
    """

    def __init__(self, source: LearnedSource):
        assert isinstance(source.latent, FlowLatent)
        super().__init__(source.decoder, source.latent.gaussian, source.latents, source.basis)
        self.flow = source.latent

    def log_prior(self, w: Tensor) -> Tensor:
        unknowns, log_volume = self.flow.bent(w[:, : self.latents])
        return super().log_prior(torch.cat([unknowns, w[:, self.latents :]], 1)) + log_volume.double()

    def prior_curvature(self, w: Tensor) -> Tensor:
        (slopes,) = pushed_forward(lambda latents: (self.flow.bent(latents)[0],), w[:, : self.latents])
        curvature = super().prior_curvature(w).clone()
        curvature[:, : self.latents, : self.latents] = slopes.double() @ slopes.double().mT
        return curvature


def lifted(images: Tensor) -> Tensor:
    """Images [n, 64, 64] that are fainter than `FAINTEST`, multiplied so that they are not.

    Far out in the latents the decoder draws faint images. A bright `source_flux` on such an image is a residual field
    many times as strong as galaxies have it, with which a source can draw the arcs themselves.
    """
    top = images.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1e-6)
    peak = top * (images / top).pow(2 * SHARPNESS).sum((-2, -1), keepdim=True) ** (0.5 / SHARPNESS)
    return images * (1 + (FAINTEST / peak.clamp(min=1e-3)) ** SHARPNESS) ** (1 / SHARPNESS)


def latent_map(settings: Settings, latents: int) -> GaussianLatent | FlowLatent:
    """The latent map that the settings ask for, not yet fitted."""
    if settings.latent_density == "gaussian":
        return GaussianLatent(latents)
    return FlowLatent(latents, settings.flow.transforms, settings.flow.hidden)
