"""Training of the autoencoder beside a plain PyTorch loop of the same network: images a second, in one run.

    python tests/benchmarks/training.py [--images 512] [--samples 1 10] [--full]

The plain loop has the same networks, minibatches, noise, optimiser and precision, and the ELBO written out. It draws M
samples for each image as the autoencoder does: encoded once, decoded M times. `--full`: tables D1 and D2 as printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lenspipe.config import Vae
from lenspipe.memory import keep_freed_memory
from lenspipe.source.training import TrainingState
from lenspipe.source.vae import VAE

FULL = {"latents": 64, "channels": 64, "dense": 4096, "learning_rate": 1e-6}
DATASET, EPOCHS = 15_500, 450  # the paper's


def plain_epoch(vae: VAE, optimiser: torch.optim.Optimizer, images: Tensor, settings: Vae) -> None:
    """One epoch of the loop that the paper's appendix describes."""
    vae.train()
    for rows in torch.randperm(len(images)).split(settings.batch_size):
        batch = images[rows]
        mean, sd = vae.encoder(batch)
        z = mean + sd * torch.randn(settings.samples, *mean.shape, device=mean.device)
        decoded = vae.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        misfit = ((batch - decoded) / settings.decoder_sd).square().sum((-2, -1)).mean(0)  # type: ignore[operator]
        divergence = (0.5 * (mean.square() + sd.square() - 1) - sd.log()).sum(-1)
        optimiser.zero_grad()
        (0.5 * misfit + divergence).mean().backward()
        optimiser.step()


def seconds(epochs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least time of each epoch, in turns, after one to warm up."""
    times: list[list[float]] = [[] for _ in epochs]
    for _ in range(repeats + 1):
        for epoch, own in zip(epochs, times, strict=True):
            began = time.perf_counter()
            epoch()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    return [min(own[1:]) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = 0.1 * torch.rand(arguments.images, 64, 64, device=device)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device)}
    print(json.dumps(environment | {"machine": platform.processor(), "images": len(images), "full": arguments.full}))
    for samples in arguments.samples:
        settings = Vae(samples=samples, augment=False, gradient_norm_max=None, **(FULL if arguments.full else {}))  # type: ignore[arg-type]
        state = TrainingState(settings, device)
        plain = VAE(settings.latents, settings.channels, settings.dense, settings.decoder_sd).to(device)
        adam = torch.optim.Adam(plain.parameters(), lr=settings.learning_rate, betas=settings.betas)
        loops = partial(state._train, images), partial(plain_epoch, plain, adam, images, settings)
        ours, theirs = seconds(loops, arguments.repeats)
        line = {"samples": samples, "images_per_second": len(images) / ours, "plain": len(images) / theirs}
        line |= {"ratio": theirs / ours, "hours_of_the_papers_450_epochs": ours / len(images) * DATASET * EPOCHS / 3600}
        print(json.dumps({name: round(value, 3) for name, value in line.items()}))


if __name__ == "__main__":
    main()
