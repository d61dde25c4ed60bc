"""Stage `report`: one self-contained HTML page with the figures, tables and provenance of a run."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pandas as pd
import torch
import xarray as xr
import yaml
from astropy.io import fits
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import track

from lenspipe import artefact
from lenspipe.config import Report
from lenspipe.errors import InputError
from lenspipe.galaxies.dataset import evenly, open_galaxies
from lenspipe.galaxies.ingest import SPLITS
from lenspipe.image.source_plane import light_centre
from lenspipe.posteriors.reading import posterior
from lenspipe.posteriors.store import LENS_PARAMETERS, PARAMETERS, parameter_names
from lenspipe.report import figures
from lenspipe.report.source import source_section
from lenspipe.report.table import Table
from lenspipe.results import Results
from lenspipe.summary import is_angle, read_summary, unwrapped

SURVEY = "survey"  # what the embedded synthetic survey is called in the galaxies' column `input`
STATES = ("failed", "flagged", "ok")
TRACED = tuple(name for name in LENS_PARAMETERS if name not in ("q", "phi"))  # e1 and e2 say the same without a wrap
CORNER = ("theta_E", "gamma", "phi")
STRIP = 16  # galaxies in a strip
OPEN = 3  # lenses shown unfolded
CUTS = {
    "excluded_by_hand": "by hand",
    "exclusion_level": "GalSim's exclusion level",
    "sersic_fit_failed": "no Sérsic fit",
    "sersic_unphysical": "unphysical fit",
    "stamp_too_small": "too small",
    "bad_pixels": "bad pixels",
    "signal_to_noise_low": "S/N low",
    "signal_to_noise_high": "S/N high",
    "has_neighbour": "neighbour",
}
HEADS = {
    "eti89_lb": "89 % from",
    "eti89_ub": "to",
    "ess_bulk": "ESS bulk",
    "ess_tail": "ESS tail",
    "r_hat": "R-hat",
    "mcse_mean": "MCSE mean",
    "mcse_sd": "MCSE sd",
}
FINDINGS = {
    "position_angle_median": ("position angle of the mass, East of North", ".1f", "°"),
    "source_magnitude_median": ("magnitude of the source", ".2f", ""),
    "center_column": ("deflector in the image, column from 0", ".1f", " px"),
    "center_row": ("the same, row", ".1f", " px"),
    "arc_radius": ("mean radius of the arcs at the first look", ".2f", "″"),
    "fit_radius": ("radius of the disc that is fitted", ".2f", "″"),
    "masked": ("share of it that is masked", ".1%", ""),
    "companions": ("objects masked in it", ".0f", ""),
    "cosmic_rays": ("pixels of it hit by cosmic rays", ".0f", ""),
    "background": ("background beyond it, in image units", ".3g", ""),
    "noise_correlation": ("correlation of neighbouring empty pixels", ".2f", ""),
    "noise_inflation": ("scatter of blocks of empty pixels over the noise map's", ".2f", ""),
    "chi2_expected": ("χ² per pixel where the image is empty", ".2f", ""),
}  # of the preparation of an observed image: what they are called, format, unit
FLAGS = {
    "r_hat": "R-hat of a lens parameter above summary.r_hat_max: the chains do not agree",
    "ess": "bulk or tail effective sample size of a lens parameter below summary.ess_bulk_min or ess_tail_min: "
    "the chains are too short",
    "divergences": "more divergent draws than summary.divergence_fraction_max allows: the chains may miss a part",
    "energy": "E-BFMI of a chain below summary.bfmi_min: the chains may not have reached the posterior's tails",
    "chi2_high": "chi² higher than the noise explains (summary.predictive_p_min, chi2_floor; chi2_measured_max for an "
    "image whose empty pixels were measured): "
    "the model does not fit, or the noise map is too low",
    "chi2_low": "chi² lower than the noise explains (summary.predictive_p_min, chi2_floor, chi2_measured_max): "
    "the noise map is too high, as those of drizzled images may be",
    "residuals": "neighbouring residuals correlate on the arcs more than elsewhere, by more than "
    "summary.residual_excess_max and summary.residual_significance allow: the model leaves light there",
    "map_not_converged": "the MAP search stopped before it converged, or a chain has come upon a higher point",
    "lone_start": "fewer starts of the MAP search than summary.starts_agreeing_min found the best solution, or that "
    "from which an exploration led to it: there may be a better one",
    "rival_basin": "the MAP search found another solution whose evidence is within summary.evidence_lead_min of the "
    "best one's: the chains may not have seen it",
    "prior_edge": "most draws of a parameter are further out in its prior than summary.prior_depth_max: "
    "the prior may not hold for this lens",
    "rays": "twice the rays a pixel side change the lensed source by more chi² than summary.ray_chi2_max: "
    "it has more detail than the rays see; raise lens.supersampling",
    "single_image": "the source's centre has one image, and its magnification is below summary.magnification_min",
    "no_arcs": "the lensed source has less signal-to-noise than summary.arc_snr_min, or what was seen before the fit "
    "less than summary.first_arc_snr_min: there may be no arcs",
    "companion": "another object was masked in the disc that is fitted: it may deflect light too",
    "masked": "more of the disc than summary.masked_max is masked",
    "failed": "no posterior; the reason is given",
}


def write_report(settings: Report, paths: Results) -> None:
    """Write the page of the run to `paths.report`. Raises InputError where an earlier stage has not run."""
    lenses = read_summary(paths.summary)
    lenses = lenses.assign(anchor=[f"lens-{row}" for row in range(len(lenses))])  # its place in the page
    page = {
        "title": settings.title,
        "galaxies": galaxies_section(paths),
        "source": source_section(settings, paths),
        "deflection": deflection_section(paths.deflection_table),
        "results": results_section(lenses),
        "failed": lenses[lenses["status"] == "failed"].head(settings.lenses).to_dict("records"),
        "drawn": list(lens_sections(lenses, settings.lenses, paths)),
        "run": run_section(paths),
    }
    inputs = [paths.summary, paths.catalogue, paths.fit, paths.galaxies, paths.source_prior, paths.validation]
    inputs += [paths.deflection_table]
    record = artefact.provenance(
        "report", {"report": settings}, [path for path in inputs if path.exists()], lenses=len(lenses)
    )
    with artefact.written_whole(paths.report) as temporary:
        temporary.write_text(render(page, record), encoding="utf-8")


def render(page: dict[str, Any], record: dict[str, Any]) -> str:
    """The page as HTML, with the record embedded; every text in `page` is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("lenspipe.report").joinpath("template.html").read_text(encoding="utf-8")
    embedded = Markup(json.dumps(record).replace("<", "\\u003c"))
    return environment.from_string(text).render(page, record=record, embedded=embedded, flag_meanings=FLAGS, open=OPEN)


# --- galaxies and source prior


def galaxies_section(paths: Results) -> dict[str, Any] | None:
    """Counts of the cuts and splits, and a strip of training galaxies; None where the run has no galaxies."""
    if not paths.galaxies.exists():
        return None
    cuts = pd.read_csv(paths.galaxies.with_name("cuts.csv"))
    training = open_galaxies(paths.galaxies, "train")
    chosen = training.isel(galaxy=evenly(training.sizes["galaxy"], STRIP))
    counts = split_counts(paths.galaxies)
    synthetic = sum(counts.get(SURVEY, {}).values())
    total = sum(sum(row.values()) for row in counts.values())
    origins = [str(origin) for origin in chosen["input"].to_numpy()]
    labels = ["synthetic" if origin == SURVEY else "observed" for origin in origins] if len(counts) > 1 else []
    return {
        "total": total,
        "synthetic": synthetic,
        "cuts": cuts_table(cuts),
        "splits": Table(
            ["input", *SPLITS, "all"],
            [[input_name(o), *(f"{row[s]:,}" for s in SPLITS), f"{sum(row.values()):,}"] for o, row in counts.items()],
        ),
        "strip": figures.embedded(figures.galaxy_strip(chosen["image"].to_numpy(), labels)),
    }


def cuts_table(cuts: pd.DataFrame) -> Table:
    """One row an input: galaxies read, removed by every cut in its order, and kept."""
    names = [cut for cut in dict.fromkeys(cuts["cut"]) if cut != "read"]
    rows = []
    for origin, found in cuts.set_index("cut").groupby("input", sort=False):
        removed = [f"{found.loc[cut, 'removed']:,}" for cut in names]
        rows.append(
            [input_name(str(origin)), f"{found.loc['read', 'left']:,}", *removed, f"{found['left'].iloc[-1]:,}"]
        )
    return Table(["input", "read", *(CUTS.get(cut, cut) for cut in names), "kept"], rows)


def split_counts(galaxies: Path) -> dict[str, dict[str, int]]:
    """Galaxies by input and split."""
    data = xr.open_zarr(galaxies, consolidated=False)[["input", "split"]].load()
    counts: dict[str, dict[str, int]] = {}
    for origin, split in zip(data["input"].to_numpy().tolist(), data["split"].to_numpy().tolist(), strict=True):
        counts.setdefault(str(origin), dict.fromkeys(SPLITS, 0))[str(split)] += 1
    return counts


def input_name(origin: str) -> str:
    """What an input is called on the page: the synthetic survey is never left unnamed."""
    return "embedded survey (synthetic)" if origin == SURVEY else origin


def deflection_section(table: Path) -> Table | None:
    """Bounds, nodes and measured errors of the deflection table, where there is one."""
    if not table.is_file():
        return None
    record = artefact.read_record(table)
    facts, settings = record["facts"], record["settings"]["deflection_table"]
    rows = [
        [f"range of {symbol}", f"{low:g} to {high:g}"]
        for symbol, (low, high) in zip(("q", "γ"), (facts["bounds"]["q"], facts["bounds"]["gamma"]), strict=True)
    ]
    rows.append(["nodes in η, q, γ", " × ".join(str(settings[f"{name}_nodes"]) for name in ("eta", "q", "gamma"))])
    errors = facts["errors"]
    rows.append(["greatest error of the deflection on the unit circle [θ_E]", f"{errors['max_error']:.2g}"])
    rows.append(["the same at radii from 0.001 to 10 θ_E", f"{errors['max_error_any_radius']:.2g}"])
    rows.append(["greatest error of its derivatives in x, y, q and γ, relative", f"{errors['max_gradient_error']:.2g}"])
    return Table(["", "value"], rows)


# --- all lenses


def results_section(lenses: pd.DataFrame) -> dict[str, Any]:
    """The table of results, and how well the truth is recovered where it is known."""
    known = fitted_with_truth(lenses)
    return {
        "counts": {state: int((lenses["status"] == state).sum()) for state in STATES},
        "mocks": int((lenses["origin"] == "mock").sum()),
        "rows": [result_row(row) for row in lenses.to_dict("records")],
        "flags": sorted({flag for flags in lenses["flags"] for flag in flags.split()}),
        "recovery": figures.embedded(recovery_figure(known)) if len(known) else None,
        "pulls": pulls_table(known) if len(known) else None,
    }


def result_row(row: dict[str, Any]) -> dict[str, Any]:
    """The cells of one lens in the table of results."""
    cells = [within_error(row, name) for name in ("theta_E", "gamma", "q", "phi")]
    cells += [
        number(row, "chi2_per_pixel", ".3f"),
        number(row, "r_hat_max", ".3f"),
        number(row, "ess_bulk_min", ".0f"),
        number(row, "divergences", ".0f"),
        number(row, "snr", ".1f"),
        number(row, "seconds", ".1f"),
    ]
    return {key: row[key] for key in ("name", "anchor", "status", "reason")} | {
        "flags": row["flags"].split() if row["status"] != "failed" else [],
        "cells": cells,
    }


def number(row: dict[str, Any], key: str, form: str) -> str:
    """A number of a row, or a dash where it is absent."""
    value = row.get(key, math.nan)
    return f"{value:{form}}" if value is not None and math.isfinite(value) else "–"


def within_error(row: dict[str, Any], name: str) -> str:
    """Median and half the width of the central 68 %, to the digits that the width allows."""
    low, median, high = (row.get(f"{name}_{key}", math.nan) for key in ("p16", "median", "p84"))
    if not all(math.isfinite(value) for value in (low, median, high)):
        return "–"
    error = (high - low) / 2
    digits = decimals(error)
    return f"{median:z.{digits}f} ± {error:.{digits}f}" if error > 0 else f"{median:.4g}"


def decimals(error: float) -> int:
    """Decimals that show two digits of an error."""
    return int(np.clip(1 - math.floor(math.log10(error)), 0, 6)) if error > 0 and math.isfinite(error) else 3


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


# --- one lens


def lens_sections(lenses: pd.DataFrame, limit: int, paths: Results) -> Iterable[dict[str, Any]]:
    """The drawn lenses, flagged ones first, then in the catalogue's order; one at a time in memory."""
    rows = [row for state in STATES[1:] for row in lenses[lenses["status"] == state].to_dict("records")][:limit]
    for row in track(rows, description="report") if rows else ():
        yield lens_section(row, paths)


def lens_section(row: dict[str, Any], paths: Results) -> dict[str, Any]:
    """Figures and tables of one lens."""
    name = str(row["name"])
    tree = posterior(paths.fit, name)
    draws = tree["posterior"].to_dataset()
    for angle in filter(is_angle, parameter_names(draws)):
        draws[angle] = (("chain", "draw"), unwrapped(draws[angle].to_numpy()[None].astype(float))[0])
    further = [n for n in parameter_names(draws) if n not in PARAMETERS]
    found = tree["diagnostics"].to_dataset()
    truths = known_truths(row)
    panels = {
        "images": image_figure(tree),
        "arcs": arcs_figure(tree),
        "source": source_figure(tree, row, paths.mocks / name / "source.fits"),
        "corner": figures.corner_plot(
            {n: draws[n].to_numpy() for n in CORNER}, {n: truths[n] for n in CORNER if n in truths}
        ),
        "chains": figures.chains_plot({n: draws[n].to_numpy() for n in (*TRACED, *further)}),
    }
    return {
        **{key: row[key] for key in ("name", "anchor", "status", "origin")},
        "flags": row["flags"].split(),
        "line": {name: within_error(row, name) for name in ("theta_E", "gamma")}
        | {"chi2": number(row, "chi2_per_pixel", ".2f"), "snr": number(row, "snr", ".0f")},
        "figures": {key: figures.embedded(figure) for key, figure in panels.items() if figure is not None},
        "summary": posterior_table(draws, row, truths),
        "starts": starts_table(
            found["start_log_density"].to_numpy(),
            found["start_basin"].to_numpy(),
            tree["basins"]["log_evidence"].to_numpy(),
        ),
        "diagnostics": diagnostics_table(row, tree["sample_stats"].to_dataset(), found),
    }


def diagnostics_table(row: dict[str, Any], statistics: Any, found: Any) -> Table:
    """How the chains of one lens went."""
    rows = [
        ["χ² per pixel at the MAP", number(row, "chi2_per_pixel", ".3f")],
        ["predictive p-value of χ²", number(row, "predictive_p", ".2g")],
        ["usable pixels", f"{int(found['pixels']):,}"],
        ["correlation of neighbouring residuals, off the arcs", number(row, "residual_correlation", "+.3f")],
        ["the same on the arcs, above it", excess_cell(row)],
        ["R-hat, greatest", number(row, "r_hat_max", ".3f")],
        ["ESS bulk, least", number(row, "ess_bulk_min", ".0f")],
        ["ESS tail, least", number(row, "ess_tail_min", ".0f")],
        ["draws", " × ".join(str(statistics.sizes[name]) for name in ("chain", "draw"))],
        ["divergent", number(row, "divergences", ".0f")],
        ["E-BFMI, least", number(row, "bfmi_min", ".2f")],
        ["mean acceptance", f"{float(statistics['acceptance_rate'].mean()):.2f}"],
        [
            "starts that found the best solution",
            f"{number(row, 'starts_agreeing', '.0f')} of {number(row, 'starts', '.0f')}",
        ],
        [f"furthest out in its prior: {row['prior_depth_of'] or 'none'}", number(row, "prior_depth", ".1f") + " σ"],
        ["χ² of twice as many rays a pixel side", number(row, "ray_chi2", ".1f")],
        ["seconds, MAP and draws", number(row, "seconds", ".1f")],
        ["total magnification", within_error(row, "magnification")],
        ["images of the source's centre, at the MAP", number(row, "images_map", ".0f")],
        ["Einstein radius of the critical curve", within_error(row, "einstein_radius") + "″"],
        ["half-light radius of the source", within_error(row, "source_half_light_radius") + "″"],
        ["signal-to-noise of the lensed source", number(row, "arc_snr", ".0f")],
        *(
            [label, number(row, key, form) + unit]
            for key, (label, form, unit) in FINDINGS.items()
            if math.isfinite(row.get(key, math.nan))
        ),
    ]
    return Table(["diagnostic", "value"], rows)


def excess_cell(row: dict[str, Any]) -> str:
    """Excess of the residuals' correlation on the arcs with its error; a dash where there is no arc above the noise."""
    if not math.isfinite(row["residual_excess_error"]):
        return "–"
    return f"{row['residual_excess']:+.3f} ± {row['residual_excess_error']:.3f}"


def known_truths(row: dict[str, Any]) -> dict[str, float]:
    """True parameters of a lens; position angles are moved to the half turn of the posterior."""
    further = [key.removeprefix("true_") for key in row if key.startswith("true_")]
    truths = {name: float(row.get(f"true_{name}", math.nan)) for name in (*PARAMETERS, *further)}
    known = {name: value for name, value in truths.items() if math.isfinite(value)}
    angles = [name for name in known if is_angle(name) and f"{name}_median" in row]
    return known | {name: float(near(known[name], row[f"{name}_median"])) for name in angles}


def image_figure(tree: xr.DataTree) -> Figure:
    """Observed image, model and residual."""
    observed, model = tree["observed_data"], tree["posterior_predictive"]["image_mean"].to_numpy()
    image, noise, usable = (observed[part].to_numpy() for part in ("image", "noise", "usable"))
    curve = tree["diagnostics"]["critical_curve"].to_numpy()
    return figures.image_plane(image, model, noise, usable, float(observed["pixel_scale"]), curve)


def arcs_figure(tree: xr.DataTree) -> Figure | None:
    """Image and model without the lens galaxy's light, and the first look; None where that light is no part of them."""
    observed, at_map = tree["observed_data"], tree["map"]
    light, first = at_map["light"].to_numpy(), observed["first_light"].to_numpy()
    if not light.any():
        return None
    image, noise, usable, arcs = (observed[part].to_numpy() for part in ("image", "noise", "usable", "arcs"))
    scale, curve = float(observed["pixel_scale"]), tree["diagnostics"]["critical_curve"].to_numpy()
    return figures.arcs_plane(image, light, at_map["image"].to_numpy(), first, arcs, usable, noise, scale, curve)


def source_figure(tree: xr.DataTree, row: dict[str, Any], true_source: Path) -> Figure:
    """Reconstructed source and its spread; beside them a mock's true source, else the MAP. Each at its own size."""
    mean, spread = (tree["posterior_predictive"][f"source_{kind}"].to_numpy() for kind in ("mean", "sd"))
    at_map = tree["map"]["source"].to_numpy()
    here = source_extent(*tree["diagnostics"]["source_frame"].to_numpy())
    caustic = tree["diagnostics"]["caustic"].to_numpy()
    if row["origin"] != "mock" or not true_source.is_file():
        return figures.source_plane(mean, spread, here, at_map, here, "source (MAP)", caustic)
    with fits.open(true_source, memmap=False) as file:
        truth, scale = np.asarray(file[0].data, dtype=float), float(file[0].header["PIXSCALE"])
    width = scale * len(truth)
    u, v = light_centre(torch.from_numpy(truth)[None])
    there = source_extent(row["true_source_x"] - width * float(u), row["true_source_y"] - width * float(v), width)
    return figures.source_plane(mean, spread, here, truth, there, "true source (mock)", caustic)


def source_extent(x: float, y: float, size: float) -> figures.Extent:
    """Left, right, bottom and top ["] of a source image of full width `size`."""
    return (x - size / 2, x + size / 2, y - size / 2, y + size / 2)


def posterior_table(draws: xr.Dataset, row: dict[str, Any], truths: dict[str, float]) -> Table:
    """ArviZ's summary of the lens and source parameters, with MAP and truth."""
    names = parameter_names(draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = arviz_stats.summary(xr.DataTree.from_dict({"posterior": draws[names]}), round_to="none")
    row = row | {f"{n}_map": near(row[f"{n}_map"], row[f"{n}_median"]) for n in filter(is_angle, names)}
    rows = []
    for name, values in table.iterrows():
        digits = decimals(float(values["sd"]))
        cells = [summary_cell(str(column), float(value), digits) for column, value in values.items()]
        known = [f"{truths[str(name)]:z.{digits}f}" if str(name) in truths else "–"] if truths else []
        rows.append([str(name), *known, number(row, f"{name}_map", f"z.{digits}f"), *cells])
    heads = [HEADS.get(str(column), str(column).replace("_", " ")) for column in table.columns]
    return Table(["parameter", *(["true"] if truths else []), "MAP", *heads], rows)


def summary_cell(column: str, value: float, digits: int) -> str:
    """One number of ArviZ's summary to its digits."""
    if not math.isfinite(value):
        return "–"
    if column.startswith("ess"):
        return f"{value:.0f}"
    if column == "r_hat":
        return f"{value:.3f}"
    return f"{value:z.{digits + column.startswith('mcse')}f}"


def starts_table(reached: NDArray, basins: NDArray, evidence: NDArray) -> Table:
    """Log posterior that each start of the MAP search reached, best first, and the solution that it ended in.

    reached, basins: [start]; evidence: [basin], Laplace's log evidence of the solutions, shown below the first's.
    """
    order = np.argsort(-np.where(np.isfinite(reached), reached, -np.inf), kind="stable")
    best = reached[order[0]]
    rows = []
    for start in order:
        basin = int(basins[start])
        solution = [str(basin + 1), f"{evidence[0] - evidence[basin]:.1f}"] if basin >= 0 else ["–", "–"]
        rows.append([str(start + 1), f"{reached[start]:.1f}", f"{best - reached[start]:.1f}", *solution])
    return Table(["start", "log posterior", "below the best", "solution", "log evidence below the first"], rows)


# --- the run


def run_section(paths: Results) -> dict[str, Any]:
    """Time and memory of the stages, and the record of each."""
    shards = sorted(paths.fit.glob("shard-*.zarr"))
    places = {
        "survey": paths.survey,
        "galaxies": paths.galaxies,
        "vae": paths.vae,
        "source": paths.source_prior,
        "validation": paths.validation,
        "deflection_table": paths.deflection_table,
        "mocks": paths.mocks,
        "catalogue": paths.catalogue,
        **({"fit": shards[0]} if shards else {}),
        "summary": paths.summary,
    }
    records = {stage: record for stage, place in places.items() if (record := record_of(place)) is not None}
    stages = [
        [s, str(r["commit"] or "–")[:19], "–" if r["seed"] is None else str(r["seed"])] for s, r in records.items()
    ]
    dumped = {
        stage: yaml.safe_dump(record["settings"], sort_keys=False, allow_unicode=True)
        for stage, record in records.items()
    }
    return {
        "benchmarks": benchmark_table(paths.root / "benchmarks", list(places)),
        "records": Table(["stage", "commit", "seed"], stages),
        "settings": dumped,
    }


def record_of(place: Path) -> dict[str, Any] | None:
    """The record of an artefact, None where there is none."""
    try:
        return artefact.read_record(place)
    except InputError:
        return None


def benchmark_table(folder: Path, stages: Sequence[str]) -> Table | None:
    """Wall time and peak memory of every stage from Snakemake's benchmark files; None where there are none."""
    files: dict[str, list[pd.Series]] = {}
    for path in sorted(folder.glob("*.tsv")):
        table = pd.read_csv(path, sep="\t", na_values=["-", "NA"])
        if len(table):
            files.setdefault(path.stem.split("-")[0], []).append(table.iloc[-1])
    rows = [benchmark_row(stage, files[stage]) for stage in stages if stage in files]
    heads = ["stage", "jobs", "wall time, all jobs [s]", "longest job [s]", "peak memory [MB]", "processor time [s]"]
    return Table(heads, rows) if rows else None


def benchmark_row(stage: str, jobs: list[pd.Series]) -> list[str]:
    """Time and memory over the jobs of one stage."""
    measured = {
        key: pd.to_numeric(pd.Series([job.get(key) for job in jobs]), errors="coerce").dropna()
        for key in ("s", "max_rss", "cpu_time")
    }
    values = (measured["s"].sum(), measured["s"].max(), measured["max_rss"].max(), measured["cpu_time"].sum())
    return [stage, str(len(jobs)), *(f"{value:.1f}" if math.isfinite(value) else "–" for value in values)]
