"""Stage `vae`: train the autoencoder on the galaxies; stage `source`: the prior that inference loads, made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lenspipe import artefact
from lenspipe.config import LearnedSource as LearnedSettings
from lenspipe.config import SourceSettings, Vae
from lenspipe.galaxies.dataset import galaxy_images, noise_of, open_galaxies
from lenspipe.memory import keep_freed_memory
from lenspipe.seeds import seed_for
from lenspipe.source.base import Source
from lenspipe.source.latent import FlowLatent, GaussianLatent, encoded, flow_latent, gaussian_latent
from lenspipe.source.learned import LearnedSource
from lenspipe.source.prior import blank, write_source_prior
from lenspipe.source.residual import principal_components, stationary_components
from lenspipe.source.training import Epoch, train
from lenspipe.source.vae import VAE
from lenspipe.tensors import read_tensors, write_tensors


def write_vae(settings: Vae, galaxies: Path, out: Path, seed: int) -> None:
    """Train on the galaxies in `galaxies`; write the weights to `out` and the curve to `training.csv` beside it.

    A run that was stopped leaves `checkpoint.safetensors` there, from which the next one goes on.
    """
    keep_freed_memory()
    images = {split: galaxy_images(galaxies, split) for split in ("train", "validation")}
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[elbo]}"),
    )
    checkpoint = out.with_name("checkpoint.safetensors")
    with Progress(*columns) as progress:
        task = progress.add_task("", total=settings.epochs, elbo="")

        def report(epoch: Epoch) -> None:
            progress.update(task, advance=1, elbo=f"validation ELBO {epoch.validation_elbo:.1f}")

        vae, curve = train(settings, images["train"], images["validation"], seed, report, checkpoint)
    best = max(curve, key=lambda e: e.validation_elbo)
    record = artefact.provenance(
        "vae",
        {"vae": settings},
        [galaxies],
        seed,
        galaxies={split: len(i) for split, i in images.items()},
        epochs=len(curve),
        best_epoch=best.epoch,
        validation_elbo=best.validation_elbo,
        decoder_sd=vae.decoder_sd,
        images_per_second=len(images["train"]) * len(curve) / sum(epoch.seconds for epoch in curve),
        parameters=sum(p.numel() for p in vae.parameters()),
    )
    with artefact.written_whole(out.with_name("training.csv")) as temporary:
        pd.DataFrame([epoch.as_row() for epoch in curve]).to_csv(temporary, index=False)
    write_tensors(out, vae.state_dict(), record)
    checkpoint.unlink(missing_ok=True)


def read_vae(path: Path) -> tuple[VAE, dict[str, Any]]:
    """The trained autoencoder and its record. Raises InputError where the file is missing or not one."""

    def build(tensors: dict[str, Tensor], record: dict[str, Any]) -> tuple[VAE, dict[str, Any]]:
        settings = record["settings"]["vae"]
        vae = VAE(settings["latents"], settings["channels"], settings["dense"], settings["decoder_sd"])
        vae.load_state_dict(tensors)
        return vae.requires_grad_(False).eval(), record

    return read_tensors(path, "an autoencoder", "vae", build)


def write_source(settings: SourceSettings, vae: Path, galaxies: Path, out: Path, seed: int) -> None:
    """Write the source prior to `out`: of the autoencoder in `vae` and the galaxies, where it is learned from them."""
    keep_freed_memory()
    source: Source
    if isinstance(settings, LearnedSettings):
        source, facts = learned_source(settings, vae, galaxies, seed)
        inputs = [vae, galaxies]
    else:
        source, facts, inputs = blank(settings, {}), {}, []
    record = artefact.provenance("source", {"source": settings}, inputs, seed, size=source.size, **facts)
    write_source_prior(source, record, out)


def learned_source(
    settings: LearnedSettings, path: Path, galaxies: Path, seed: int
) -> tuple[LearnedSource, dict[str, Any]]:
    """The learned source of an autoencoder and its training galaxies, and what is worth knowing of it."""
    vae, record = read_vae(path)
    training = open_galaxies(galaxies, "train")
    images = galaxy_images(galaxies, "train")
    latent = fitted_latent(settings, vae, images, galaxies, seed)
    basis, explained = residual_basis(settings, vae, images, noise_of(training), seed_for(seed, "residual"))
    network = {"latents": vae.latents, "channels": record["settings"]["vae"]["channels"], "components": len(basis)}
    facts = {
        "network": network,
        "vae": record["facts"],
        "residual_variance_explained": explained,
        "pixel_scale": [float(q) for q in training["pixel_scale"].quantile([0.16, 0.5, 0.84])],
    }
    return LearnedSource(vae.decoder, latent, vae.latents, basis), facts


def fitted_latent(
    settings: LearnedSettings, vae: VAE, images: Tensor, galaxies: Path, seed: int
) -> GaussianLatent | FlowLatent:
    """The density of the latents that the settings ask for, fitted to the training galaxies."""
    if settings.latent_density == "gaussian":
        return gaussian_latent(encoded(vae, images)[0], settings.latent_covariance_scale)
    flow = settings.flow
    with Progress() as progress:
        task = progress.add_task("flow", total=flow.epochs)
        return flow_latent(
            vae,
            images,
            galaxy_images(galaxies, "validation"),
            (flow.transforms, flow.hidden),
            flow.epochs,
            seed_for(seed, "flow"),
            lambda value: progress.update(task, advance=1),
        )


@torch.no_grad()
def residual_basis(
    settings: LearnedSettings, vae: VAE, images: Tensor, noise_sd: Tensor, seed: int
) -> tuple[Tensor, float]:
    """The residual field's basis [component, 64, 64], and the share of the variance above the noise that is in it."""
    residual = settings.residual
    if residual.components == 0:
        return images.new_zeros(0, *images.shape[1:]), 0.0
    residuals = torch.cat([batch - vae.reconstruct(batch) for batch in images.split(256)])
    if residual.kind == "stationary":
        assert residual.components is not None
        return stationary_components(residuals, noise_sd, residual.components)
    return principal_components(residuals, noise_sd, residual.components, residual.explained_variance, seed)
