"""The density of the latents, as a map from a standard normal w: the paper's Gaussian, and a normalising flow.

Both are fitted to the galaxies that the autoencoder was trained on, and both give z, latents [n, latents], of w.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import zuko
from torch import Tensor, nn

from lenspipe.errors import TrainingError
from lenspipe.source.training import augmented
from lenspipe.source.vae import VAE

VIEWS = 16  # of every galaxy, turned and flipped at random, that a flow is fitted to


class GaussianLatent(nn.Module):
    """z = mean + scale w; mean: [latents], scale: [latents, latents], lower triangular."""

    def __init__(self, latents: int):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(latents))
        self.scale = nn.Buffer(torch.eye(latents))

    def forward(self, w: Tensor) -> Tensor:
        return self.mean + w @ self.scale.T

    def straight(self, w: Tensor) -> Tensor:
        """w: z whitened by the covariance of the latents."""
        return w

    def bent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and 0 [n]: nothing is bent."""
        return x, x.new_zeros(len(x))

    def normal(self, z: Tensor) -> Tensor:
        """The w of z."""
        return torch.linalg.solve_triangular(self.scale, (z - self.mean).T, upper=False).T

    def log_density(self, z: Tensor) -> Tensor:
        """log p(z) [n]."""
        return standard_normal(self.normal(z)) - self.scale.diagonal().log().sum()


class FlowLatent(nn.Module):
    """z = mean + scale f(w), f a flow of affine coupling layers, smooth in both directions."""

    def __init__(self, latents: int, transforms: int, hidden: int):
        super().__init__()
        self.gaussian = GaussianLatent(latents)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # order in which layers couple the latents, and first weights
            self.flow = zuko.flows.MAF(
                latents,
                transforms=transforms,
                hidden_features=(hidden, hidden),
                passes=2,
                randperm=True,
                activation=nn.SiLU,
            )

    def forward(self, w: Tensor) -> Tensor:
        for layer in reversed(self.flow.transform.transforms):
            w = uncoupled(layer, w)
        return self.gaussian(w)

    def normal(self, z: Tensor) -> Tensor:
        """The w of z."""
        return self.flow().transform(self.gaussian.normal(z))

    def straight(self, w: Tensor) -> Tensor:
        """f(w): z whitened by the covariance of the latents."""
        return self.gaussian.normal(self(w))

    def bent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The w whose f(w) is x [n, latents], and log |dw / dx| [n]."""
        w, log_volume = self.flow().transform.call_and_ladj(x)
        return w, log_volume

    def log_density(self, z: Tensor) -> Tensor:
        """log p(z) [n]."""
        return self.flow().log_prob(self.gaussian.normal(z)) - self.gaussian.scale.diagonal().log().sum()


def uncoupled(layer: zuko.flows.MaskedAutoregressiveTransform, y: Tensor) -> Tensor:
    """The x [n, latents] that a coupling layer takes to y: what zuko's inverse gives, with half of its work.

    The shift and scale of the features that come first depend on nothing, those of the others on the first ones.
    """
    nothing = y.new_zeros(1, y.shape[-1])
    first = torch.where(layer.order == 0, unscaled(layer, nothing, y), 0.0)
    return unscaled(layer, first, y)


def unscaled(layer: zuko.flows.MaskedAutoregressiveTransform, x: Tensor, y: Tensor) -> Tensor:
    """y without the shift and the scale that a coupling layer finds at x."""
    shift, scale = layer.hyper(x).unflatten(-1, (-1, 2)).unbind(-1)
    return zuko.transforms.MonotonicAffineTransform(shift, scale).inv(y)


def standard_normal(w: Tensor) -> Tensor:
    """log N(w; 0, I), [n]."""
    return -0.5 * (w.square().sum(-1) + w.shape[-1] * math.log(2 * math.pi))


@torch.no_grad()
def encoded(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents of images: [n, latents] each."""
    parts = [vae.encoder(batch) for batch in images.split(256)]
    means, sds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(sds)


def gaussian_latent(means: Tensor, covariance_scale: float) -> GaussianLatent:
    """The paper's prior (section 2.1): a Gaussian on the encoded means [n, latents], its covariance rescaled."""
    latent = GaussianLatent(means.shape[1])
    values = means.double()
    centred = values - values.mean(0)
    covariance = centred.T @ centred / max(len(values) - 1, 1)
    ridge = 1e-6 * covariance.diagonal().mean().clip(min=1e-6) * torch.eye(len(covariance), dtype=torch.float64)
    latent.mean.copy_(values.mean(0))
    latent.scale.copy_(torch.linalg.cholesky(covariance_scale * (covariance + ridge)))
    return latent


def flow_latent(
    vae: VAE,
    images: Tensor,
    validation_images: Tensor,
    shape: tuple[int, int],
    epochs: int,
    seed: int,
    report: Callable[[float], None],
) -> FlowLatent:
    """A flow of `shape` (coupling layers, hidden features), fitted to the aggregate posterior: draws from e(z | x).

    images, validation_images: [n, 64, 64]; epochs take turns with `VIEWS` sets of the first, turned and flipped at
    random. The weights with the greatest mean log density of the validation galaxies are kept; `report` is given that
    of each epoch.
    Raises TrainingError where it is no longer finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        held_out = [draw(*encoded(vae, augmented(validation_images))) for _ in range(4)]
        first = draw(*encoded(vae, images))
        latent = FlowLatent(first.shape[1], *shape)
        latent.gaussian.load_state_dict(gaussian_latent(first, 1.0).state_dict())
        optimiser = torch.optim.Adam(latent.parameters(), lr=1e-3, weight_decay=1e-5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
        best, kept = -math.inf, latent.state_dict()
        views: list[tuple[Tensor, Tensor]] = []
        for epoch in range(epochs):
            if epoch < VIEWS:  # a large encoder costs more than the flow
                views.append(encoded(vae, augmented(images)))
            means, sds = views[epoch % VIEWS]
            for rows in torch.randperm(len(means)).split(128):
                loss = -latent.log_density(draw(means[rows], sds[rows])).mean()
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(latent.parameters(), 10.0)
                optimiser.step()
            schedule.step()
            with torch.no_grad():
                value = float(latent.log_density(torch.cat(held_out)).mean())
            report(value)
            if not math.isfinite(value):
                raise TrainingError("the flow's log density is not finite; take source.latent_density: gaussian")
            if value > best:
                best, kept = value, {name: t.clone() for name, t in latent.state_dict().items()}
    latent.load_state_dict(kept)
    return latent.requires_grad_(False)


def divergence(mean: Tensor, sd: Tensor) -> Tensor:
    """Kullback-Leibler divergence [nat] of N(mean, sd) from N(0, 1)."""
    return 0.5 * (mean.square() + sd.square() - 1) - sd.log()


def draw(mean: Tensor, sd: Tensor) -> Tensor:
    """One draw from N(mean, sd)."""
    return mean + sd * torch.randn_like(sd)
