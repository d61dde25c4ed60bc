"""Training of the autoencoder: minibatches, ELBO, moving average of the weights, early stop, checkpoints."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lenspipe.artefact import versions
from lenspipe.config import Vae
from lenspipe.errors import TrainingError
from lenspipe.seeds import seed_for
from lenspipe.source.checkpoint import read_checkpoint, write_checkpoint
from lenspipe.source.vae import VAE

CHECKPOINT_SECONDS = 60.0  # least time between checkpoints


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
    settings: Vae,
    train_images: Tensor,
    validation_images: Tensor,
    seed: int,
    report: Callable[[Epoch], None],
    checkpoint: Path | None = None,
) -> tuple[VAE, list[Epoch]]:
    """Train on images [galaxy, 64, 64] of peak 1; return the weights with the best validation ELBO, and the curve.

    `report` is called after every epoch. With `checkpoint`, a file of the same settings, images and seed is gone on
    from, and one is left every minute; on processors, losses are those of a run that was never stopped.
    Raises TrainingError where the loss is no longer finite, and for fewer than two images to train on.
    """
    if len(train_images) < 2:
        raise TrainingError(f"galaxies to train on: expected two at least, found {len(train_images)}; add galaxies")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_images, validation_images = train_images.to(device), validation_images.to(device)
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        state = TrainingState(settings, device)
        images = [hashlib.sha256(i.cpu().numpy().tobytes()).hexdigest() for i in (train_images, validation_images)]
        key = {"settings": settings.model_dump(mode="json"), "seed": seed, "images": images, "versions": versions()}
        if checkpoint is not None:
            state.load(checkpoint, key)
        for epoch in state.curve:
            report(epoch)
        saved = time.monotonic()
        while not state.finished:
            torch.manual_seed(seed_for(seed, "vae", len(state.curve)))
            state.advance(train_images, validation_images)
            report(state.curve[-1])
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                state.save(checkpoint, key)
                saved = time.monotonic()
    return state.trained(), state.curve


class TrainingState:
    """All that an epoch goes on from: weights, their moving average, the optimiser, the curve and the best weights."""

    def __init__(self, settings: Vae, device: torch.device):
        self.settings, self.device = settings, device
        self.vae = VAE(settings.latents, settings.channels, settings.dense, settings.decoder_sd).to(device)
        self.average = AveragedModel(self.vae, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        free = [parameter for parameter in self.vae.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.Adam(free, lr=settings.learning_rate, betas=settings.betas, fused=True)
        self.elbo = TraceMeanField_ELBO(
            num_particles=settings.samples, max_plate_nesting=1, vectorize_particles=settings.samples > 1
        )
        self.best = copy.deepcopy(self.vae.state_dict())
        self.curve: list[Epoch] = []

    @property
    def best_epoch(self) -> int:
        return max(self.curve, key=lambda e: e.validation_elbo).epoch

    @property
    def finished(self) -> bool:
        """The last epoch is done, or the best one is `patience` epochs ago."""
        done = len(self.curve)
        return done >= self.settings.epochs or (done > 0 and done - 1 - self.best_epoch >= self.settings.patience)

    def advance(self, train_images: Tensor, validation_images: Tensor) -> None:
        """One epoch."""
        began, epoch = time.perf_counter(), len(self.curve)
        rate = self.settings.learning_rate * decay(self.settings, epoch)
        self.optimiser.param_groups[0]["lr"] = rate
        train_elbo = self._train(train_images)
        validation_elbo = checked(held_out_elbo(self.judged, validation_images, self.settings.batch_size))
        self.curve.append(Epoch(epoch, train_elbo, validation_elbo, rate, time.perf_counter() - began))
        if self.best_epoch == epoch:
            self.best = copy.deepcopy(self.judged.state_dict())

    @property
    def judged(self) -> VAE:
        """The moving average of the weights, or these themselves where there is none."""
        return cast(VAE, self.average.module) if self.settings.ema else self.vae

    def trained(self) -> VAE:
        """The weights of the best epoch, on the CPU."""
        self.vae.load_state_dict(self.best)
        return self.vae.cpu().eval()

    def save(self, path: Path, key: dict[str, object]) -> None:
        """Write everything to a checkpoint."""
        moments = {
            f"{index}.{name}": value
            for index, moment in self.optimiser.state_dict()["state"].items()
            for name, value in moment.items()
        }
        parts = {
            "vae": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best,
            "adam": moments,
        }
        write_checkpoint(path, parts, {"key": key, "curve": [epoch.as_row() for epoch in self.curve]})

    def load(self, path: Path, key: dict[str, object]) -> None:
        """Go on from a checkpoint of the same key; one that is absent, broken or of another key changes nothing."""
        found = read_checkpoint(path, key)
        if found is None:
            return
        parts, curve = found
        self.curve = [Epoch(**row) for row in curve]
        self.vae.load_state_dict(parts["vae"])
        self.best = parts["best"]
        self.average.load_state_dict(parts["average"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["adam"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})

    def _train(self, images: Tensor) -> float:
        settings = self.settings
        self.vae.train()
        total, seen_images = images.new_zeros(()), 0
        for batch in _minibatches(images, settings.batch_size):
            batch = augmented(batch) if settings.augment else batch
            seen = batch + settings.noise * torch.randn_like(batch) if settings.noise else batch
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = self.elbo.differentiable_loss(self.vae.model, self.vae.guide, batch, seen) / len(batch)
            self.optimiser.zero_grad()
            loss.backward()
            if settings.gradient_norm_max is not None:
                torch.nn.utils.clip_grad_norm_(self.vae.parameters(), settings.gradient_norm_max)
            self.optimiser.step()
            if settings.ema:
                self.average.update_parameters(self.vae)
            total -= loss.detach() * len(batch)
            seen_images += len(batch)
        return checked(total.item()) / seen_images


def checked(elbo: float) -> float:
    """The ELBO itself. Raises TrainingError where it is not finite."""
    if not math.isfinite(elbo):
        raise TrainingError("the training loss is not finite; lower vae.learning_rate")
    return elbo


def _minibatches(images: Tensor, size: int) -> Iterator[Tensor]:
    """All images in random order; a last batch of one image, which batch normalisation cannot take, joins no epoch."""
    for rows in torch.randperm(len(images)).split(size):
        if len(rows) > 1:
            yield images[rows.to(images.device)]


@torch.no_grad()
def held_out_elbo(vae: VAE, images: Tensor, batch_size: int) -> float:
    """Mean ELBO per image [nat], with the same noise in the latents at every call."""
    vae.eval()
    elbo = TraceMeanField_ELBO()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return -sum(elbo.loss(vae.model, vae.guide, batch) for batch in images.split(batch_size)) / len(images)


def augmented(images: Tensor) -> Tensor:
    """Images [galaxy, 64, 64] turned by a random angle and flipped at random: their light stays in the middle."""
    n = len(images)
    angle = 2 * math.pi * torch.rand(n)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    c, s, zero = torch.cos(angle), torch.sin(angle), torch.zeros(n)
    affine = torch.stack([torch.stack([c * flip, -s, zero], 1), torch.stack([s * flip, c, zero], 1)], 1)
    grid = functional.affine_grid(affine.to(images), [n, 1, *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0]


def decay(settings: Vae, epoch: int) -> float:
    """The factor on the learning rate in an epoch."""
    if settings.schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
