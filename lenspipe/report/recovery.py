"""What fits of mocks found, beside what their truth is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lenspipe.posteriors.store import LENS_PARAMETERS
from lenspipe.report import figures
from lenspipe.report.table import Table


def fitted_with_truth(lenses: pd.DataFrame) -> pd.DataFrame:
    """Lenses with a posterior whose true theta_E and gamma are known."""
    needed = ["theta_E_median", "gamma_median", "true_theta_E", "true_gamma"]
    return lenses.reindex(columns=lenses.columns.union(needed, sort=False)).dropna(subset=needed)


def recovery_figure(known: pd.DataFrame) -> Figure:
    """Recovered against true theta_E and gamma."""
    names = ("theta_E", "gamma")
    median = {name: known[f"{name}_median"].to_numpy(float) for name in names}
    errors = {
        n: np.clip(
            [median[n] - known[f"{n}_p16"].to_numpy(float), known[f"{n}_p84"].to_numpy(float) - median[n]], 0, None
        )
        for n in names
    }
    truths = {name: known[f"true_{name}"].to_numpy(float) for name in names}
    return figures.recovery(truths, median, errors, known["status"].tolist())


def pulls_table(known: pd.DataFrame) -> Table:
    """Mean and scatter of (median - true) / sigma of every lens parameter, over all and over ok lenses."""
    rows = []
    groups = {"all": known, "ok": known[known["status"] == "ok"]}
    for name in LENS_PARAMETERS:
        if f"true_{name}" not in known:
            continue
        row = [name]
        for lenses in groups.values():
            pull = pulls(lenses, name)
            row += [f"{len(pull)}", *pull_cells(pull)]
        rows.append(row)
    heads = [head for label in groups for head in (f"{label} lenses", "mean pull", "rms", "within 1 σ")]
    return Table(["parameter", *heads], rows)


def pull_cells(pull: NDArray) -> list[str]:
    """Mean with its expected error, root mean square, share below 1 in size."""
    if not len(pull):
        return ["–", "–", "–"]
    rms = np.sqrt(np.mean(pull**2))
    return [f"{pull.mean():+.2f} ± {1 / np.sqrt(len(pull)):.2f}", f"{rms:.2f}", f"{np.mean(np.abs(pull) < 1):.0%}"]


def pulls(lenses: pd.DataFrame, name: str) -> NDArray:
    """(median - true) / sigma of the lenses whose truth is known, sigma half the width of the central 68 %."""
    sigma = (lenses[f"{name}_p84"] - lenses[f"{name}_p16"]).to_numpy(float) / 2
    truth, median = lenses[f"true_{name}"].to_numpy(float), lenses[f"{name}_median"].to_numpy(float)
    truth = near(truth, median) if name == "phi" else truth
    good = np.isfinite(truth) & (sigma > 0)
    return (median - truth)[good] / sigma[good]


def near(truth: Any, median: Any) -> Any:
    """Position angles `truth` moved by whole half turns to within a quarter turn of `median` [rad]."""
    return truth + np.pi * np.round((median - truth) / np.pi)
