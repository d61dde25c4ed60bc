"""Stage `source`: train the autoencoder on the galaxies, fit the latent prior, write both as one artefact."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lenspipe import artefact
from lenspipe.config import Source
from lenspipe.galaxies.dataset import open_galaxies
from lenspipe.memory import keep_freed_memory
from lenspipe.source.prior import SourcePrior, gaussian_latent_prior, write_source_prior
from lenspipe.source.training import Epoch, train


def write_source(settings: Source, galaxies: Path, out: Path, seed: int) -> None:
    """Train on the galaxies in `galaxies`; write the prior to `out` and the curve to `training.csv` beside it."""
    keep_freed_memory()
    images = {split: _images(galaxies, split) for split in ("train", "validation")}
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[elbo]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=settings.epochs, elbo="")

        def report(epoch: Epoch) -> None:
            progress.update(task, advance=1, elbo=f"validation ELBO {epoch.validation_elbo:.1f}")

        vae, curve = train(settings, images["train"], images["validation"], seed, report)
    best = max(curve, key=lambda e: e.validation_elbo)
    record = artefact.provenance(
        "source",
        {"source": settings},
        [galaxies],
        seed,
        galaxies={split: len(i) for split, i in images.items()},
        epochs=len(curve),
        best_epoch=best.epoch,
        validation_elbo=best.validation_elbo,
        parameters=sum(p.numel() for p in vae.parameters()),
    )
    prior = SourcePrior(vae, *gaussian_latent_prior(vae, images["train"], settings.latent_covariance_scale))
    with artefact.written_whole(out.with_name("training.csv")) as temporary:
        pd.DataFrame([epoch.as_row() for epoch in curve]).to_csv(temporary, index=False)
    write_source_prior(prior, record, out)


def _images(galaxies: Path, split: str) -> Tensor:
    return torch.from_numpy(open_galaxies(galaxies, split)["image"].to_numpy().astype("float32"))
