"""Stage `summary`: one row a lens, with quantiles of every parameter, diagnostics and flags."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from arviz_stats.base import array_stats
from astropy.table import Table
from numpy.typing import NDArray

from lenspipe import artefact
from lenspipe.catalogue.stage import read_catalogue
from lenspipe.config import Summary
from lenspipe.posteriors.convergence import convergence_of
from lenspipe.posteriors.shards import Group, groups, manifests, read_manifests
from lenspipe.posteriors.store import LENS_PARAMETERS, PARAMETERS, parameter_names
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
FIRST = ("name", "status", "flags", "reason", "origin", "snr")
LEFT = {"latent", "log_density", "acceptance", "basin_w", "basin_parameters", "start_log_density", "start_basin"}
PICTURES = ("model_", "source_map", "source_mean", "source_sd", "source_frame")  # beginnings of names; left too
STATISTICS = ("median", "p16", "p84", "mean", "sd", "r_hat", "ess_bulk", "ess_tail")
LENGTHS = ("theta_E", "r_Ein", "center_x", "center_y", "source_x", "source_y", "source_size", "einstein_radius")
LENGTHS_OF_COMPONENTS = ("alpha_Rs", "Rs", "r_trunc", "R_sersic", "_sd")


def write_summary(settings: Summary, paths: Results, workers: int = 1) -> None:
    """Write lenses.csv, lenses.fits and lenses.parquet: every lens of the catalogue, in its order.

    `status` is ok, flagged or failed, `flags` says why, `reason` what a failed lens failed of. Posteriors are read a
    block of lenses at a time by each of so many workers; 1 works in this process.
    """
    table = all_rows(settings, paths, workers)
    inputs = [paths.catalogue.with_name("lenses.csv"), *manifests(paths.fit)]  # not terabytes of images and draws
    record = artefact.provenance("summary", {"summary": settings}, inputs, lenses=len(table))
    out = paths.summary
    with (
        artefact.written_whole(out) as csv,
        artefact.written_whole(out.with_suffix(".fits")) as fits,
        artefact.written_whole(out.with_suffix(".parquet")) as parquet,
        artefact.written_whole(out.with_name("provenance.json")) as provenance,
    ):
        table.to_csv(csv, index=False)
        write_fits(table, fits)
        write_parquet(table, parquet)
        artefact.write_json(provenance, record)


def all_rows(settings: Summary, paths: Results, workers: int = 1) -> pd.DataFrame:
    """One row for every lens of the catalogue, in its order, with what is known of it besides."""
    lenses = read_catalogue(paths.catalogue)
    known = lenses[[key for key in lenses if key.startswith("true_") or key in ("name", "origin", "snr")]]
    blocks = [block for group in groups(paths.fit) for block in group.blocks()]
    if min(workers, len(blocks)) <= 1:
        rows = [block_rows(block, settings) for block in blocks]
    else:
        with ProcessPoolExecutor(min(workers, len(blocks)), get_context("spawn")) as pool:
            rows = list(pool.map(partial(block_rows, settings=settings), blocks))
    fitted = pd.concat([pd.DataFrame({"name": [], "status": [], "flags": []}, dtype=str), *rows], ignore_index=True)
    table = known.merge(fitted, "left", on="name", validate="one_to_one")
    table = table.merge(read_manifests(paths.fit)[["name", "reason"]], "left", on="name", validate="one_to_one")
    table = table.fillna({"status": "failed", "flags": "failed", "reason": "not fitted"})
    if "converged" in table:  # a lens without a fit has none: FITS knows no missing booleans
        table["converged"] = table["converged"].eq(True)
    table = table.fillna({name: "" for name in TEXTS if name in table})
    truths = [column for column in table if column.startswith("true_")]
    return table[[*FIRST, *(column for column in table if column not in (*FIRST, *truths)), *truths]]


def block_rows(block: Group, settings: Summary) -> pd.DataFrame:
    """Rows of a block of lenses, from disk."""
    return group_rows(block.read(wanted(block.variables())), settings)


def wanted(variables: list[str]) -> list[str]:
    """The variables of the store that the summary reads: neither pictures nor the source's unknowns."""
    return [name for name in variables if name not in LEFT and not name.startswith(PICTURES)]


def write_fits(table: pd.DataFrame, path: Path) -> None:
    """Write a table as FITS, with the columns' units."""
    texts = {name: ascii_text(table[name]) for name in TEXTS if name in table}
    columns = Table.from_pandas(table.assign(**texts))
    for name in columns.colnames:
        columns[name].unit = unit_of(name)
    columns.write(path, format="fits")


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet, with the units in the columns' metadata under the key `unit`."""
    columns = pa.Table.from_pandas(table, preserve_index=False)
    units = {field.name: unit_of(field.name) for field in columns.schema}
    fields = [
        field.with_metadata({"unit": units[field.name]} if units[field.name] else None) for field in columns.schema
    ]
    pq.write_table(columns.cast(pa.schema(fields, columns.schema.metadata)), path)


def unit_of(column: str) -> str | None:
    """The unit of a column of the summary, as FITS writes it; None for numbers, text and fluxes (image units)."""
    statistic = next((s for s in (*STATISTICS, "map") if column.endswith(f"_{s}")), "")
    parameter = column.removeprefix("true_").removesuffix(f"_{statistic}")
    if statistic in ("r_hat", "ess_bulk", "ess_tail"):
        return None
    if parameter.endswith(LENGTHS + LENGTHS_OF_COMPONENTS):
        return "arcsec"
    return "rad" if is_angle(parameter) else {"seconds": "s"}.get(parameter)


def ascii_text(column: pd.Series) -> pd.Series:
    """Text as FITS can hold it: other characters as escapes such as \\xe9."""
    return column.astype(str).map(lambda text: text.encode("ascii", "backslashreplace").decode())


def group_rows(group: xr.Dataset, settings: Summary) -> pd.DataFrame:
    """Rows of all lenses of a group of the store, or of a part of it."""
    draws = {name: group[name].to_numpy().astype(float) for name in parameter_names(group)}
    draws |= {name: unwrapped(values) for name, values in draws.items() if is_angle(name)}
    columns: dict[str, NDArray] = {}
    for name, values in draws.items():
        columns |= moments(name, values.reshape(len(values), -1))
        columns[f"{name}_map"] = group[f"{name}_map"].to_numpy()
    for name in FROM_DRAWS:
        columns |= moments(name, group[name].to_numpy())
    for name in ("einstein_radius_map", "images_map"):
        columns[name] = group[name].to_numpy()
    columns |= diagnostics({n: values for n, values in draws.items() if n != "q" and not is_angle(n)})
    columns["divergences"] = group["diverging"].to_numpy().sum((1, 2))
    columns["bfmi_min"] = least_bfmi(group["energy"].to_numpy())
    columns |= {name: group[name].to_numpy() for name in AS_STORED}
    table = pd.DataFrame(columns)
    count = group.sizes["chain"] * group.sizes["draw"]
    flags = [" ".join(find_flags(row, count, settings)) for row in table.to_dict("records")]
    table.insert(0, "name", group["name"].to_numpy().astype(str))
    table.insert(1, "status", ["flagged" if found else "ok" for found in flags])
    table.insert(2, "flags", flags)
    return table


def moments(name: str, values: NDArray) -> dict[str, NDArray]:
    """Median, central 68 %, mean and standard deviation (over n, as ArviZ has it) [lens] of values [lens, draw]."""
    p16, median, p84 = np.percentile(values, [16, 50, 84], axis=1)
    spread = {"mean": values.mean(1), "sd": values.std(1)}
    return {f"{name}_{key}": value for key, value in ({"median": median, "p16": p16, "p84": p84} | spread).items()}


def diagnostics(draws: dict[str, NDArray]) -> dict[str, NDArray]:
    """R-hat and effective sample sizes [lens] of parameters [lens, chain, draw]; constant ones pass.

    `r_hat_max`, `ess_bulk_min` and `ess_tail_min` are the worst of the parameters of the lens, without the source's.
    """
    found = {name: convergence_of(values) for name, values in draws.items()}
    lens = [found[name] for name in draws if name in DIAGNOSED or name not in PARAMETERS]
    r_hat, bulk, tail = (np.array(numbers) for numbers in zip(*lens, strict=True))
    each = {f"{n}_{s}": v for n, values in found.items() for s, v in zip(STATISTICS[-3:], values, strict=True)}
    return {"r_hat_max": r_hat.max(0), "ess_bulk_min": bulk.min(0), "ess_tail_min": tail.min(0)} | each


def least_bfmi(energy: NDArray) -> NDArray:
    """Least E-BFMI over chains [lens] of the energy at the start of every transition [lens, chain, draw].

    Mean squared difference of successive energies over their variance: how far a new momentum moves the energy,
    against how far it has to be moved (Betancourt 2016, arXiv:1604.00695).
    """
    return array_stats.bfmi(energy).min(-1)


def find_flags(row: dict[Any, Any], draws: int, settings: Summary) -> list[str]:
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
