"""Where each stage leaves its output, below one folder of results, and how its tables are to be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lenspipe.errors import InputError

AS_WRITTEN: Any = {"keep_default_na": False, "na_values": [""]}  # for read_csv: a lens may be called NA


# columns of the summary that are text
TEXTS = ("name", "status", "flags", "reason", "origin", "prior_depth_of", "image_unit", "notes")


@dataclass(frozen=True)
class Results:
    """Paths of the artefacts of a run in the folder `root`."""

    root: Path

    @property
    def survey(self) -> Path:
        return self.root / "survey"

    @property
    def galaxies(self) -> Path:
        return self.root / "galaxies/galaxies.zarr"

    @property
    def vae(self) -> Path:
        return self.root / "vae/vae.safetensors"

    @property
    def source_prior(self) -> Path:
        return self.root / "source/source_prior.safetensors"

    @property
    def validation(self) -> Path:
        return self.root / "validation"

    @property
    def deflection_table(self) -> Path:
        return self.root / "deflection_table/deflection_table.safetensors"

    @property
    def mocks(self) -> Path:
        return self.root / "mocks"

    @property
    def catalogue(self) -> Path:
        return self.root / "catalogue/catalogue.zarr"

    @property
    def fit(self) -> Path:
        return self.root / "fit"

    @property
    def fit_logs(self) -> Path:
        """A folder for each shard, in it a log file for each batch."""
        return self.root / "logs/fit"

    def manifest(self, shard: int) -> Path:
        return self.fit / f"shard-{shard:04d}.csv"

    def store(self, shard: int) -> Path:
        return self.fit / f"shard-{shard:04d}.zarr"

    def parts(self, shard: int) -> Path:
        return self.fit / f"parts/shard-{shard:04d}"

    @property
    def checkpoints(self) -> Path:
        return self.fit / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.root / "summary/lenses.csv"

    @property
    def report(self) -> Path:
        return self.root / "report/report.html"


def read_summary(path: Path) -> pd.DataFrame:
    """The rows of `lenses.csv`; empty cells of text are empty strings. Raises InputError where the file is missing."""
    if not path.is_file():
        raise InputError(f"{path}: no summary of the lenses here; run the stage summary first")
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), **AS_WRITTEN)
    return table.fillna(dict.fromkeys(TEXTS, "")).copy()  # in one piece: it has hundreds of columns
