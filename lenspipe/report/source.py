"""The section of the report on the source prior: how it was trained, and what it can and cannot draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from lenspipe import artefact
from lenspipe.config import Report
from lenspipe.errors import InputError
from lenspipe.galaxies.dataset import evenly
from lenspipe.report import figures, source_figures
from lenspipe.report.table import Table
from lenspipe.results import Results

KINDS = {
    "vae": "the decoder of a variational autoencoder",
    "sersic": "a Sérsic profile",
    "shapelets": "a Sérsic profile with shapelets",
    "pixel_grid": "pixels with a smoothness prior",
}


def source_section(settings: Report, paths: Results) -> dict[str, Any]:
    """Training curve, reconstructions, draws, and the tests of the stage `validation`.

    A source that is not learned may have no tests. Raises InputError where a learned one has none.
    """
    record = artefact.read_record(paths.source_prior)
    kind = record["settings"]["source"]["kind"]
    if kind == "vae" and not paths.validation.is_dir():
        raise InputError(f"{paths.validation}: no tests of the source here; run the stage validation first")
    section: dict[str, Any] = {
        "kind": kind,
        "name": KINDS[kind],
        "settings": record["settings"]["source"],
        "facts": record["facts"],
        "curve": None,
        "tests": validation_section(settings, paths.validation),
    }
    if kind == "vae":
        curve = pd.read_csv(paths.vae.with_name("training.csv"))
        columns = (curve[name].to_numpy() for name in ("epoch", "train_elbo", "validation_elbo"))
        section["curve"] = figures.embedded(figures.training_curve(*columns))
    return section


def validation_section(settings: Report, folder: Path) -> dict[str, Any] | None:
    """Figures and tables of the stage `validation`; None where it has not run."""
    if not folder.is_dir():
        return None
    pictures = xr.open_zarr(folder / "pictures.zarr", consolidated=False).load()
    galaxies = pd.read_csv(folder / "galaxies.csv", dtype={"name": str, "input": str})
    shown = pictures.isel(galaxy=evenly(pictures.sizes["galaxy"], settings.reconstructions))
    learned = "encoder" in pictures
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("signal_to_noise", "power")}
    latents = pd.read_csv(folder / "latents.csv") if learned else None
    unusual = galaxies[galaxies["unusual"]] if learned else galaxies.iloc[:0]
    return {
        "facts": artefact.read_record(folder)["facts"],
        "reconstructions": figures.embedded(source_figures.reconstructions(shown)),
        "rotations": figures.embedded(source_figures.rotations(pictures)),
        "draws": figures.embedded(figures.galaxy_strip(pictures["draw"].to_numpy())),
        "data": figures.embedded(figures.galaxy_strip(pictures["galaxy"].to_numpy()[: pictures.sizes["draws"]])),
        "curves": figures.embedded(source_figures.curves(tables["signal_to_noise"], tables["power"], latents)),
        "noise": noise_table(tables["signal_to_noise"]),
        "densities": densities_table(pd.read_csv(folder / "densities.csv")) if learned else None,
        "galaxies": len(galaxies),
        "unusual": unusual_table(unusual),
        "used": None if latents is None else int((latents["kl"] > 0.1).sum()),
        "latents": None if latents is None else len(latents),
    }


def noise_table(table: pd.DataFrame) -> Table:
    """chi^2 per pixel against the noise, of the decoder alone and of the whole source."""
    names = [name for name in ("decoder", "source") if name in table]
    heads = {"decoder": "decoder alone", "source": "source prior"}
    rows = [
        [f"{row['noise_sd']:g}", f"{1 / row['noise_sd']:.0f}", *(f"{row[name]:.2f}" for name in names)]
        for row in table.to_dict("records")
    ]
    return Table(["noise [peak]", "peak S/N", *(f"chi² per pixel, {heads[name]}" for name in names)], rows)


def densities_table(table: pd.DataFrame) -> Table:
    """Agreement of densities with the latents of the test galaxies."""
    rows = [
        [row["density"], f"{row['log_density']:.1f}", f"{row['mismatch']:.3f}", f"{row['expected']:.3f}"]
        for row in table.to_dict("records")
    ]
    return Table(["density of the latents", "mean log density [nat]", "mismatch", "of normal draws"], rows)


def unusual_table(galaxies: pd.DataFrame) -> Table:
    """Test galaxies that are further from the training set than those of the validation split."""
    rows = [
        [row["name"], row["input"], f"{row['rarity']:.0f}", f"{row['unlikeness']:.2f}"]
        for row in galaxies.to_dict("records")
    ]
    return Table(["galaxy", "input", "rarity [nat]", "unlikeness"], rows)
