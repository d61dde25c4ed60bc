"""Training of the autoencoder: minibatches, ELBO, early stop on the validation ELBO."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.nn import functional

from lenspipe.config import Source
from lenspipe.errors import TrainingError
from lenspipe.source.vae import VAE


@dataclass(frozen=True)
class Epoch:
    """One row of the training curve; ELBOs are means per image [nat]."""

    epoch: int
    train_elbo: float
    validation_elbo: float
    learning_rate: float
    seconds: float

    as_row = asdict


def train(
    settings: Source, train_images: Tensor, validation_images: Tensor, seed: int, report: Callable[[Epoch], None]
) -> tuple[VAE, list[Epoch]]:
    """Train on images [galaxy, 64, 64] of peak 1; return the weights with the best validation ELBO, and the curve.

    `report` is called after every epoch. Raises TrainingError where the loss is no longer finite.
    """
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        vae = VAE(settings.latents, settings.channels, settings.dense, settings.decoder_sd)
        optimiser = torch.optim.Adam(vae.parameters(), lr=settings.learning_rate, betas=settings.betas)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _schedule(settings))
        elbo = TraceMeanField_ELBO(num_particles=settings.samples)
        best, curve = copy.deepcopy(vae.state_dict()), []
        for epoch in range(settings.epochs):
            began, rate = time.perf_counter(), optimiser.param_groups[0]["lr"]
            train_elbo = _train_epoch(vae, elbo, optimiser, train_images, settings)
            schedule.step()
            validation_elbo = _evaluate(vae, validation_images, settings.batch_size)
            curve.append(Epoch(epoch, train_elbo, validation_elbo, rate, time.perf_counter() - began))
            report(curve[-1])
            best_epoch = max(curve, key=lambda e: e.validation_elbo).epoch
            if best_epoch == epoch:
                best = copy.deepcopy(vae.state_dict())
            if epoch - best_epoch >= settings.patience:
                break
    vae.load_state_dict(best)
    return vae.eval(), curve


def _train_epoch(
    vae: VAE, elbo: TraceMeanField_ELBO, optimiser: torch.optim.Optimizer, images: Tensor, settings: Source
) -> float:
    vae.train()
    total = 0.0
    for batch in _minibatches(images, settings.batch_size):
        batch = augmented(batch) if settings.augment else batch
        loss = elbo.differentiable_loss(vae.model, vae.guide, batch) / len(batch)
        if not math.isfinite(loss.item()):
            raise TrainingError("the training loss is not finite; lower source.learning_rate")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1e4)
        optimiser.step()
        total -= loss.item() * len(batch)
    return total / len(images)


def _minibatches(images: Tensor, size: int) -> Iterator[Tensor]:
    """All images in random order; a last batch of one image, which batch normalisation cannot take, joins no epoch."""
    for rows in torch.randperm(len(images)).split(size):
        if len(rows) > 1:
            yield images[rows]


@torch.no_grad()
def _evaluate(vae: VAE, images: Tensor, batch_size: int) -> float:
    """Mean ELBO per image, with the same noise in the latents at every call."""
    vae.eval()
    elbo = TraceMeanField_ELBO()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return -sum(elbo.loss(vae.model, vae.guide, batch) for batch in images.split(batch_size)) / len(images)


def augmented(images: Tensor) -> Tensor:
    """Images [galaxy, 64, 64] turned by a random angle, flipped at random, shifted by up to half a pixel.

    No more: a decoder that can shift a galaxy competes with the source's position, and chains do not mix.
    """
    n = len(images)
    angle = 2 * math.pi * torch.rand(n)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    shift = (2 * torch.rand(n, 2) - 1) / images.shape[-1]
    c, s = torch.cos(angle), torch.sin(angle)
    affine = torch.stack([torch.stack([c * flip, -s, shift[:, 0]], 1), torch.stack([s * flip, c, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(affine, [n, 1, *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0]


def _schedule(settings: Source) -> Callable[[int], float]:
    if settings.schedule == "constant":
        return lambda _: 1.0
    return lambda epoch: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
