"""Several runs of the same lenses with other models, such as other sources: which one the data of each lens prefer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lenspipe.catalogue.reading import read_catalogue
from lenspipe.errors import InputError
from lenspipe.results import Results, read_summary

BESIDE = ("theta_E_median", "gamma_median", "chi2_per_pixel", "status")  # of every run, for the eye


def compare(runs: Mapping[str, Results]) -> pd.DataFrame:
    """A row for each lens that all runs have with the same data; runs are called as they are in `runs`.

    `preferred`: the run with most evidence, by Laplace's approximation; `lead`: by how much it is above the next [nat];
    `log_evidence:<run>`: below that of the preferred one; what is in `BESIDE` of each. A lens without a fit in a run is
    NaN there and not preferred. Raises InputError for fewer than two runs, for one without a summary or of another
    version, and where no lens is in all of them.
    """
    if len(runs) < 2:
        raise InputError("one run alone: name two or more folders of results to compare")
    tables = {name: _lenses(paths) for name, paths in runs.items()}
    first, *others = tables.values()
    same = [
        lens
        for lens in first.index
        if first["hash"][lens] and all(table["hash"].get(lens) == first["hash"][lens] for table in others)
    ]
    if not same:
        raise InputError(f"{', '.join(runs)}: no lens is in all of them with the same image, noise and mask")
    evidence = pd.DataFrame({name: table["log_evidence"][same] for name, table in tables.items()}).astype(float)
    known = evidence.notna().any(axis=1)
    ranked = np.sort(evidence[known].fillna(-np.inf).to_numpy(), axis=1)
    rows = pd.DataFrame(index=pd.Index(same, name="name"))
    rows["preferred"] = evidence[known].idxmax(axis=1).reindex(same, fill_value="")
    rows.loc[known, "lead"] = ranked[:, -1] - ranked[:, -2]
    for name in tables:
        rows[f"log_evidence:{name}"] = evidence[name] - evidence.max(axis=1)
    for name, table in tables.items():
        for column in BESIDE:
            rows[f"{column}:{name}"] = table[column][same]
    return rows.reset_index()


def _lenses(paths: Results) -> pd.DataFrame:
    """The summary by name, with the hash of each lens's data."""
    table = read_summary(paths.summary)
    if "log_evidence" not in table:
        raise InputError(f"{paths.summary}: no column log_evidence; fit again with this version")
    hashes = read_catalogue(paths.catalogue)[["name", "hash"]]
    return table.reindex(columns=["name", "log_evidence", *BESIDE]).merge(hashes, on="name").set_index("name")
