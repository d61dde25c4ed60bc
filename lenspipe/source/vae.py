"""The variational autoencoder of the paper: tables D1 and D2, with the number of channels left free."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn import functional

LOG_SD = (-8.0, 1.0)  # bounds of the logarithm of the latents' standard deviations


class Encoder(nn.Module):
    """Table D1: images [galaxy, 64, 64] to mean and standard deviation of the latents, each [galaxy, latents]."""

    def __init__(self, latents: int, channels: int, dense: int):
        super().__init__()
        widths = [channels * factor for factor in (1, 2, 4, 8)]
        layers: list[nn.Module] = [_down(1, widths[0]), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [_down(before, after), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        # A convolution whose kernel is as large as its image is a matrix product, and ten times faster as one.
        layers += [nn.Flatten(), nn.Linear(widths[-1] * 16, dense, bias=False), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*layers)
        self.mean = nn.Linear(dense, latents)
        self.log_sd = nn.Linear(dense, latents)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.blocks(image[:, None])
        return self.mean(features).to(image.dtype), bounded(self.log_sd(features).to(image.dtype)).exp()


class Decoder(nn.Module):
    """Table D2: latents [galaxy, latents] to the mean image [galaxy, 64, 64], within [-1, 1]."""

    def __init__(self, latents: int, channels: int):
        super().__init__()
        widths = [channels * factor for factor in (8, 4, 2, 1)]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latents, widths[0], 4, 1, 0, bias=False)]
        for before, after in pairwise(widths):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), _up(before, after)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), _up(widths[-1], 1), nn.Tanh()]
        self.blocks = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, latent: Tensor) -> Tensor:
        return self.blocks(latent[:, :, None, None])[:, 0].to(latent.dtype)

    def linearise(self, latent: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Images [galaxy, 64, 64] and their derivatives [galaxy, k, 64, 64] along `directions` [galaxy, k, latents].

        In evaluation mode. Layer by layer: convolutions are linear, the others multiply the derivatives by the slope of
        every feature.
        """
        value, tangent = latent[:, :, None, None], directions.flatten(0, 1)[:, :, None, None]
        slope: Tensor | float = 1.0
        for layer in self.blocks:
            if isinstance(layer, nn.ConvTranspose2d):
                tangent = layer(_scaled(tangent, slope, len(latent)))
                value, slope = layer(value), 1.0
            else:
                value, own = _with_slope(layer, value)
                slope = slope * own
        return value[:, 0], _scaled(tangent, slope, len(latent)).unflatten(0, directions.shape[:2])[:, :, 0]


class VAE(nn.Module):
    """Encoder and decoder, with the model and the guide (paper, eqs. 1-4) that Pyro trains.

    decoder_sd: sigma_d, or "learned", which begins at the paper's 1/50. Samples of the latents may have a dimension
    before that of the galaxies: those of the Monte Carlo estimate of the ELBO.
    """

    def __init__(self, latents: int, channels: int, dense: int, decoder_sd: float | Literal["learned"]):
        super().__init__()
        self.latents = latents
        self.encoder = Encoder(latents, channels, dense)
        self.decoder = Decoder(latents, channels)
        learned = decoder_sd == "learned"
        log_sd = torch.tensor(math.log(0.02 if isinstance(decoder_sd, str) else decoder_sd))
        self.log_decoder_sd = nn.Parameter(log_sd, requires_grad=learned)

    @property
    def decoder_sd(self) -> float:
        """sigma_d [peak flux]."""
        return float(self.log_decoder_sd.detach().exp())

    def model(self, image: Tensor, seen: Tensor | None = None) -> None:
        """p(x, z): latents from N(0, I), pixels from N(mu_d(z), sigma_d); `seen` is the guide's."""
        with pyro.plate("galaxies", len(image)):
            latent = pyro.sample("latent", dist.Normal(image.new_zeros(self.latents), 1.0).to_event(1))
            decoded = self.decoder(latent.flatten(0, -2)).unflatten(0, latent.shape[:-1])
            pyro.sample("image", dist.Normal(decoded, self.log_decoder_sd.exp()).to_event(2), obs=image)

    def guide(self, image: Tensor, seen: Tensor | None = None) -> None:
        """e(z | x): a diagonal Gaussian given by the encoder, from the image or from `seen`, a noisier one."""
        mean, sd = self.encoder(image if seen is None else seen)
        with pyro.plate("galaxies", len(image)):
            pyro.sample("latent", dist.Normal(mean, sd).to_event(1))

    def reconstruct(self, image: Tensor) -> Tensor:
        """mu_d of the encoded means: [galaxy, 64, 64]."""
        return self.decoder(self.encoder(image)[0])


def bounded(log_sd: Tensor) -> Tensor:
    """log_sd, smoothly kept within its bounds; with the paper's initial weights sd would begin at up to 4e5."""
    low, high = LOG_SD
    below = high - functional.softplus(high - log_sd)
    return low + functional.softplus(below - low)


def _scaled(tangent: Tensor, slope: Tensor | float, galaxies: int) -> Tensor:
    """Derivatives [galaxy * k, channel, y, x], all k of a galaxy times its slopes [galaxy or 1, channel, y, x]."""
    if not isinstance(slope, Tensor):
        return tangent
    return (tangent.unflatten(0, (galaxies, -1)) * slope[:, None]).flatten(0, 1)


def _with_slope(layer: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer that acts on every feature alone gives, and its derivative with respect to the feature."""
    result = layer(value)
    if isinstance(layer, nn.BatchNorm2d):
        assert layer.running_var is not None
        return result, (layer.weight * (layer.running_var + layer.eps).rsqrt())[None, :, None, None]
    if isinstance(layer, nn.Tanh):
        return result, 1 - result.square()
    return result, (result > 0).to(result.dtype)  # ReLU


def _down(before: int, after: int) -> nn.Module:
    return nn.Conv2d(before, after, 4, 2, 1, bias=False)


def _up(before: int, after: int) -> nn.Module:
    return nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)


def _initialise(layer: nn.Module) -> None:
    """Weights from N(0, 0.02), the reading of appendix D that trains (all equal to 0.02 would not); biases zero."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
