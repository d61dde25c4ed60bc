"""Stage `summary`: one row a lens, with quantiles of every parameter, diagnostics and flags."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from astropy.table import Table
from numpy.typing import NDArray

from lenspipe import artefact
from lenspipe.catalogue.reading import FOUND, read_catalogue
from lenspipe.config import Summary
from lenspipe.posteriors.convergence import convergence_of
from lenspipe.posteriors.shards import Group, groups, manifests, read_manifests
from lenspipe.posteriors.store import LENS_PARAMETERS, PARAMETERS, interchangeable, parameter_names
from lenspipe.processes import pool_of
from lenspipe.results import TEXTS, Results

DIAGNOSED = tuple(name for name in LENS_PARAMETERS if name not in ("q", "phi"))  # e1 and e2 have no edge and no wrap
FROM_DRAWS = (
    "source_total_flux",
    "source_lensed_flux",
    "magnification",
    "source_half_light_radius",
    "einstein_radius",
)
OF_CATALOGUE = (*FOUND, "north", "parity", "image_unit", "zero_point", "z_lens", "z_source", "notes")  # what it found
AS_STORED = (
    "bfmi_min",
    "arc_snr",
    "chi2_per_pixel",
    "predictive_p",
    "pixels",
    "residual_correlation",
    "residual_excess",
    "residual_excess_error",
    "converged",
    "draws_above_map",
    "starts",
    "starts_agreeing",
    "evidence_lead",
    "log_evidence",
    "prior_depth",
    "prior_depth_of",
    "ray_chi2",
    "seconds",
)
FIRST = ("name", "status", "flags", "reason", "origin", "snr")
LEFT = {"latent", "log_density", "acceptance", "basin_w", "basin_parameters", "start_log_density", "start_basin"}
LEFT |= {"energy", "light_map", "critical_curve", "caustic"}
PICTURES = ("model_", "source_map", "source_mean", "source_sd", "source_frame")  # beginnings of names; left too
LACKING = 0.1  # share of the draws without a value from which on a lens has no statistics of it
DEMAGNIFIED = 1.0  # magnification below which most of a source's light is not in the image: mass magnifies
ABOVE_MAP = 1.0  # how far a draw may be above the maximum that the search found, for its last steps [nat]
STATISTICS = ("median", "p16", "p84", "mean", "sd", "r_hat", "ess_bulk", "ess_tail")
LENGTHS: tuple[str, ...] = ("theta_E", "r_Ein", "center_x", "center_y", "source_x", "source_y", "source_size")
LENGTHS += ("einstein_radius", "source_half_light_radius", "fit_radius", "arc_radius")
LENGTHS_OF_COMPONENTS = ("alpha_Rs", "Rs", "r_trunc", "R_sersic", "_sd", "_sd_min", "_sd_max")


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
    wanted_of_it = ("name", "origin", "snr", *OF_CATALOGUE)
    known = lenses[[key for key in lenses if key.startswith("true_") or key in wanted_of_it]]
    blocks = [block for group in groups(paths.fit) for block in group.blocks()]
    if min(workers, len(blocks)) <= 1:
        rows = [block_rows(block) for block in blocks]
    else:
        with pool_of(min(workers, len(blocks)), "summary") as pool:
            rows = list(pool.map(block_rows, blocks))
    fitted = pd.concat([pd.DataFrame({"name": []}, dtype=str), *rows], ignore_index=True)
    table = with_flags(known.merge(fitted, "inner", on="name", validate="one_to_one"), settings)
    table = known.merge(on_the_sky(table).drop(columns=known.columns.drop("name")), "left", on="name")
    table = table.merge(read_manifests(paths.fit)[["name", "reason"]], "left", on="name", validate="one_to_one")
    table = table.fillna({"status": "failed", "flags": "failed", "reason": "not fitted"})
    if "converged" in table:  # a lens without a fit has none: FITS knows no missing booleans
        table["converged"] = table["converged"].eq(True)
    table = table.fillna({name: "" for name in TEXTS if name in table})
    truths = [column for column in table if column.startswith("true_")]
    return table[[*FIRST, *(column for column in table if column not in (*FIRST, *truths)), *truths]]


def block_rows(block: Group) -> pd.DataFrame:
    """Rows of a block of lenses, from disk."""
    return group_rows(block.read(wanted(block.variables())))


def with_flags(table: pd.DataFrame, settings: Summary) -> pd.DataFrame:
    """Rows of fitted lenses, with what the catalogue knows of them, and their `status` and `flags`."""
    flags = [" ".join(find_flags(row, settings)) for row in table.to_dict("records")]
    status = ["flagged" if found else "ok" for found in flags]
    return table.assign(status=pd.Series(status, table.index, str), flags=pd.Series(flags, table.index, str))


def on_the_sky(table: pd.DataFrame) -> pd.DataFrame:
    """The table with what needs the header or the zero point, NaN where a lens has none.

    `position_angle` [deg], East of North, of the mass, in (-90, 90] at the median; `source_magnitude` [AB].
    """
    numbers = table.reindex(columns=["north", "parity", "zero_point"]).astype(float)
    added: dict[str, Any] = {}
    if "phi_median" in table and numbers["north"].notna().any():
        turn = numbers["parity"] * (table["phi_median"] - numbers["north"])
        middle = 90 - (90 - np.degrees(turn)) % 180
        sides = [numbers["parity"] * (table[f"phi_{key}"] - table["phi_median"]) for key in ("p16", "p84")]
        low, high = (np.degrees(f(*(side.to_numpy(float) for side in sides))) for f in (np.minimum, np.maximum))
        added |= {"median": middle, "p16": middle + low, "p84": middle + high}
        added = {f"position_angle_{key}": value for key, value in added.items()}
    if "source_total_flux_median" in table and numbers["zero_point"].notna().any():
        for key, other in (("median", "median"), ("p16", "p84"), ("p84", "p16")):
            flux = table[f"source_total_flux_{other}"].to_numpy(float)
            magnitude = -2.5 * np.log10(np.where(flux > 0, flux, np.nan))
            added[f"source_magnitude_{key}"] = numbers["zero_point"] + magnitude
    return table.assign(**added)


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
    parameter, statistic = column.removeprefix("true_"), ""
    if parameter == column:
        statistic = next((s for s in (*STATISTICS, "map") if column.endswith(f"_{s}")), "")
        parameter = column.removesuffix(f"_{statistic}")
    if statistic in ("r_hat", "ess_bulk", "ess_tail"):
        return None
    if parameter.endswith(LENGTHS + LENGTHS_OF_COMPONENTS):
        return "arcsec"
    units = {"seconds": "s", "north": "rad", "position_angle": "deg", "source_magnitude": "mag", "zero_point": "mag"}
    return "rad" if is_angle(parameter) else units.get(parameter)


def ascii_text(column: pd.Series) -> pd.Series:
    """Text as FITS can hold it: other characters as escapes such as \\xe9."""
    return column.astype(str).map(lambda text: text.encode("ascii", "backslashreplace").decode())


def group_rows(group: xr.Dataset) -> pd.DataFrame:
    """Rows of all lenses of a group of the store, or of a part of it, without status and flags."""
    draws = {name: group[name].to_numpy().astype(float) for name in parameter_names(group)}
    draws |= {name: unwrapped(values) for name, values in draws.items() if is_angle(name)}
    columns: dict[str, NDArray] = {}
    for name, values in draws.items():
        columns |= moments(name, values.reshape(len(values), -1))
        at_map = group[f"{name}_map"].to_numpy()
        if is_angle(name):  # on the branch that its draws are on
            at_map = at_map + np.pi * np.round((columns[f"{name}_median"] - at_map) / np.pi)
        columns[f"{name}_map"] = at_map
    for name in FROM_DRAWS:
        columns |= moments(name, group[name].to_numpy())
    for name in ("einstein_radius_map", "images_map"):
        columns[name] = group[name].to_numpy()
    columns |= diagnostics({n: values for n, values in draws.items() if n != "q" and not is_angle(n)})
    columns["divergences"] = group["diverging"].to_numpy().sum((1, 2))
    columns |= {name: group[name].to_numpy() for name in AS_STORED}
    table = pd.DataFrame(columns | {"draws": group.sizes["chain"] * group.sizes["draw"]})
    table.insert(0, "name", group["name"].to_numpy().astype(str))
    return table


def moments(name: str, values: NDArray) -> dict[str, NDArray]:
    """Median, central 68 %, mean and standard deviation (over n, as ArviZ has it) [lens] of values [lens, draw].

    Of the draws that have a value: few may lack it, as a mass whose critical curve does not close, but not a tenth.
    """
    lacking = np.isnan(values).mean(1, keepdims=True)
    if not lacking.any():  # several times as fast
        p16, median, p84 = np.percentile(values, [16, 50, 84], axis=1)
        spread = {"mean": values.mean(1), "sd": values.std(1)}
    else:
        values = np.where(lacking < LACKING, values, np.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of lenses without any
            p16, median, p84 = np.nanpercentile(values, [16, 50, 84], axis=1)
            spread = {"mean": np.nanmean(values, 1), "sd": np.nanstd(values, 1)}
    return {f"{name}_{key}": value for key, value in ({"median": median, "p16": p16, "p84": p84} | spread).items()}


def diagnostics(draws: dict[str, NDArray]) -> dict[str, NDArray]:
    """R-hat and effective sample sizes [lens] of parameters [lens, chain, draw]; constant ones pass.

    `r_hat_max`, `ess_bulk_min` and `ess_tail_min` are the worst of the parameters of the lens, without the source's and
    the amplitudes of sets of Gaussians.
    """
    found = {name: convergence_of(values) for name, values in draws.items()}
    lens = [found[name] for name in draws if name in DIAGNOSED or not (name in PARAMETERS or interchangeable(name))]
    r_hat, bulk, tail = (np.array(numbers) for numbers in zip(*lens, strict=True))
    each = {f"{n}_{s}": v for n, values in found.items() for s, v in zip(STATISTICS[-3:], values, strict=True)}
    return {"r_hat_max": r_hat.max(0), "ess_bulk_min": bulk.min(0), "ess_tail_min": tail.min(0)} | each


def find_flags(row: dict[Any, Any], settings: Summary) -> list[str]:
    """Why a fit should be looked at: names of the thresholds it fails. A quantity that is not a number fails.

    chi^2 and the correlation of residuals fail by size and by significance, not by one of them alone. Where the empty
    part of the image was measured, chi^2 is held against what it has there: by its size alone, since pixels are not
    independent then.
    """
    p, chi2, excess = row["predictive_p"], row["chi2_per_pixel"], row["residual_excess"]
    measured = row.get("chi2_expected", np.nan)
    if measured > 0:
        chi2_high = chi2 <= measured * (1 + settings.chi2_measured_max)
        chi2_low = chi2 >= measured / (1 + settings.chi2_measured_max)
    else:
        chi2_high = p >= settings.predictive_p_min or chi2 <= 1 + settings.chi2_floor
        chi2_low = p <= 1 - settings.predictive_p_min or chi2 >= 1 - settings.chi2_floor
    passed = {
        "r_hat": row["r_hat_max"] <= settings.r_hat_max,
        "ess": row["ess_bulk_min"] >= settings.ess_bulk_min and row["ess_tail_min"] >= settings.ess_tail_min,
        "divergences": row["divergences"] <= settings.divergence_fraction_max * row["draws"],
        "energy": row["bfmi_min"] >= settings.bfmi_min,
        "chi2_high": chi2_high,
        "chi2_low": chi2_low,
        "residuals": excess <= settings.residual_excess_max
        or excess <= settings.residual_significance * row["residual_excess_error"],
        "map_not_converged": bool(row["converged"]) and row["draws_above_map"] <= ABOVE_MAP,
        "lone_start": row["starts_agreeing"] >= min(settings.starts_agreeing_min, row["starts"]),
        "rival_basin": row["evidence_lead"] >= settings.evidence_lead_min,
        "prior_edge": row["prior_depth"] <= settings.prior_depth_max,
        "rays": row["ray_chi2"] <= settings.ray_chi2_max,
        "single_image": row["images_map"] >= 2 or row["magnification_median"] >= settings.magnification_min,
        "demagnified": row["magnification_median"] >= DEMAGNIFIED,
        "no_arcs": row["arc_snr"] >= settings.arc_snr_min
        and not row.get("first_arc_snr", np.nan) < settings.first_arc_snr_min,
        "arcs_outside": not row.get("arc_radius", np.nan) > settings.arc_radius_max * row["theta_E_median"],
        "companion": not row.get("companions", 0) > 0,
        "masked": not row.get("masked", 0) > settings.masked_max,
    }
    return [name for name, good in passed.items() if not good]


def is_angle(name: str) -> bool:
    """Whether a parameter is a position angle, the main lens's or a component's."""
    return name == "phi" or name.endswith("_phi")


def unwrapped(phi: NDArray) -> NDArray:
    """Position angles [lens, chain, draw] moved by whole half turns to within pi/2 of the lens's mean direction."""
    mean = 0.5 * np.angle(np.exp(2j * phi).mean(axis=(1, 2), keepdims=True))
    return mean + (phi - mean + np.pi / 2) % np.pi - np.pi / 2
