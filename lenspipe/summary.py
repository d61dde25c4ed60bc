"""Stage `summary`: one row a lens, with quantiles of every parameter, diagnostics and flags."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from arviz_stats.base import array_stats
from astropy.table import Table
from numpy.typing import NDArray

from lenspipe import artefact
from lenspipe.catalogue.stage import read_catalogue
from lenspipe.config import Summary
from lenspipe.posterior.convergence import convergence
from lenspipe.posterior.store import LENS_PARAMETERS, PARAMETERS, open_groups, parameter_names, read_manifests
from lenspipe.results import Results

DIAGNOSED = tuple(name for name in LENS_PARAMETERS if name not in ("q", "phi"))  # e1 and e2 have no edge and no wrap
FROM_DRAWS = ("source_total_flux", "source_lensed_flux", "magnification")
AS_STORED = (
    "chi2_per_pixel",
    "predictive_p",
    "pixels",
    "residual_correlation",
    "residual_excess",
    "residual_excess_error",
    "converged",
    "starts",
    "starts_agreeing",
    "evidence_lead",
    "prior_depth",
    "prior_depth_of",
    "seconds",
)
TEXTS = ("name", "status", "flags", "reason", "origin", "prior_depth_of")


def write_summary(settings: Summary, paths: Results) -> None:
    """Write lenses.csv and lenses.fits: every lens of the catalogue, in its order.

    `status` is ok, flagged or failed, `flags` says why, `reason` what a failed lens failed of.
    """
    lenses = read_catalogue(paths.catalogue).set_index("name", drop=False)
    fitted = {row["name"]: row for group in open_groups(paths.fit) for row in group_rows(group, settings)}
    reasons = read_manifests(paths.fit).set_index("name")["reason"].to_dict()
    rows = []
    for name, lens in lenses.iterrows():
        row = fitted.get(str(name)) or {"name": name, "status": "failed", "flags": "failed"}
        known = {key: lens[key] for key in lens.index if key.startswith("true_") or key in ("origin", "snr")}
        rows.append(row | known | {"reason": reasons.get(str(name), "not fitted")})
    first = ["name", "status", "flags", "reason", "origin", "snr"]
    table = pd.DataFrame(rows)
    if "converged" in table:  # a lens without a fit has none: FITS knows no missing booleans
        table["converged"] = table["converged"].eq(True)
    texts = [name for name in TEXTS if name in table]
    table[texts] = table[texts].fillna("")
    table = table[[*first, *(column for column in table.columns if column not in first)]]
    record = artefact.provenance("summary", {"summary": settings}, [paths.catalogue, paths.fit], lenses=len(table))
    out = paths.summary
    with (
        artefact.written_whole(out) as csv,
        artefact.written_whole(out.with_suffix(".fits")) as fits,
        artefact.written_whole(out.with_name("provenance.json")) as provenance,
    ):
        table.to_csv(csv, index=False)
        Table.from_pandas(table.assign(**{name: ascii_text(table[name]) for name in texts})).write(fits, format="fits")
        artefact.write_json(provenance, record)


def ascii_text(column: pd.Series) -> pd.Series:
    """Text as FITS can hold it: other characters as escapes such as \\xe9."""
    return column.astype(str).map(lambda text: text.encode("ascii", "backslashreplace").decode())


def group_rows(group: xr.Dataset, settings: Summary) -> list[dict[str, object]]:
    """Rows of all lenses of one group of the store."""
    names = group["name"].to_numpy().tolist()
    columns: dict[str, NDArray] = {}
    draws = {name: group[name].to_numpy().astype(float) for name in parameter_names(group)}
    draws |= {name: unwrapped(values) for name, values in draws.items() if is_angle(name)}
    for name, values in draws.items():
        columns |= quantiles(name, values.reshape(len(names), -1))
        columns[f"{name}_map"] = group[f"{name}_map"].to_numpy()
    for name in FROM_DRAWS:
        columns |= quantiles(name, group[name].to_numpy())
    for name in ("einstein_radius_map", "images_map"):
        columns[name] = group[name].to_numpy()
    further = [name for name in draws if name not in PARAMETERS and not is_angle(name)]
    columns |= diagnostics({name: draws[name] for name in (*DIAGNOSED, *further)})
    columns["divergences"] = group["diverging"].to_numpy().sum((1, 2))
    columns["bfmi_min"] = least_bfmi(group["energy"].to_numpy())
    for name in AS_STORED:
        columns[name] = group[name].to_numpy()
    lists = {column: values.tolist() for column, values in columns.items()}
    rows = []
    for index, name in enumerate(names):
        row = {column: values[index] for column, values in lists.items()}
        flags = find_flags(row, group.sizes["chain"] * group.sizes["draw"], settings)
        rows.append({"name": name, "status": "flagged" if flags else "ok", "flags": " ".join(flags), **row})
    return rows


def quantiles(name: str, values: NDArray) -> dict[str, NDArray]:
    """Median and central 68 % [lens] of values [lens, draw]."""
    p16, median, p84 = np.percentile(values, [16, 50, 84], axis=1)
    return {f"{name}_median": median, f"{name}_p16": p16, f"{name}_p84": p84}


def diagnostics(draws: dict[str, NDArray]) -> dict[str, NDArray]:
    """`r_hat_max`, `ess_bulk_min`, `ess_tail_min` [lens] over parameters [lens, chain, draw]; constant ones pass."""
    return dict(zip(("r_hat_max", "ess_bulk_min", "ess_tail_min"), convergence(draws.values()), strict=True))


def least_bfmi(energy: NDArray) -> NDArray:
    """Least E-BFMI over chains [lens] of the energy at the start of every transition [lens, chain, draw].

    Mean squared difference of successive energies over their variance: how far a new momentum moves the energy,
    against how far it has to be moved (Betancourt 2016, arXiv:1604.00695).
    """
    return array_stats.bfmi(energy).min(-1)


def find_flags(row: dict[str, float], draws: int, settings: Summary) -> list[str]:
    """Why a fit should be looked at: names of the thresholds it fails. A quantity that is not a number fails.

    chi^2 and the correlation of residuals fail by size and by significance, not by one of them alone.
    """
    p, chi2, excess = row["predictive_p"], row["chi2_per_pixel"], row["residual_excess"]
    passed = {
        "r_hat": row["r_hat_max"] <= settings.r_hat_max,
        "ess": row["ess_bulk_min"] >= settings.ess_bulk_min and row["ess_tail_min"] >= settings.ess_tail_min,
        "divergences": row["divergences"] <= settings.divergence_fraction_max * draws,
        "energy": row["bfmi_min"] >= settings.bfmi_min,
        "chi2_high": p >= settings.predictive_p_min or chi2 <= 1 + settings.chi2_floor,
        "chi2_low": p <= 1 - settings.predictive_p_min or chi2 >= 1 - settings.chi2_floor,
        "residuals": excess <= settings.residual_excess_max
        or excess <= settings.residual_significance * row["residual_excess_error"],
        "map_not_converged": bool(row["converged"]),
        "lone_start": row["starts_agreeing"] >= min(settings.starts_agreeing_min, row["starts"]),
        "rival_basin": row["evidence_lead"] >= settings.evidence_lead_min,
        "prior_edge": row["prior_depth"] <= settings.prior_depth_max,
        "single_image": row["images_map"] >= 2 or row["magnification_median"] >= settings.magnification_min,
    }
    return [name for name, good in passed.items() if not good]


def is_angle(name: str) -> bool:
    """Whether a parameter is a position angle, the main lens's or a component's."""
    return name == "phi" or name.endswith("_phi")


def unwrapped(phi: NDArray) -> NDArray:
    """Position angles [lens, chain, draw] moved by whole half turns to within pi/2 of the lens's mean direction."""
    mean = 0.5 * np.angle(np.exp(2j * phi).mean(axis=(1, 2), keepdims=True))
    return mean + (phi - mean + np.pi / 2) % np.pi - np.pi / 2
