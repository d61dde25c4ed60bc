"""Stage `report`: one self-contained HTML page with the figures, tables and provenance of a run."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lenspipe import artefact
from lenspipe.config import Report
from lenspipe.galaxies.dataset import evenly, open_galaxies
from lenspipe.galaxies.ingest import SPLITS
from lenspipe.posteriors.shards import manifests
from lenspipe.report import figures
from lenspipe.report.lens import lens_sections
from lenspipe.report.recovery import fitted_with_truth, pulls_table, recovery_figure
from lenspipe.report.run import run_section
from lenspipe.report.source import source_section
from lenspipe.report.table import Table, number, within_error
from lenspipe.results import Results, read_summary

SURVEY = "survey"  # what the embedded synthetic survey is called in the galaxies' column `input`
STATES = ("failed", "flagged", "ok")
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
    "demagnified": "less light of the lensed source is in the image than the source has: most of the source is where "
    "nothing is seen of it, the solution may be a wrong one",
    "no_arcs": "the lensed source has less signal-to-noise than summary.arc_snr_min, or what was seen before the fit "
    "less than summary.first_arc_snr_min: there may be no arcs",
    "arcs_outside": "the arcs that were seen before the fit are further out than summary.arc_radius_max times theta_E: "
    "the solution may be a wrong one",
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
    inputs = [paths.summary, paths.catalogue.with_name("lenses.csv"), *manifests(paths.fit)]  # no images and draws
    inputs += [paths.galaxies, paths.source_prior, paths.validation, paths.deflection_table]
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
        number(row, "arc_snr", ".0f"),
        number(row, "seconds", ".0f"),
    ]
    return {key: row[key] for key in ("name", "anchor", "status", "reason")} | {
        "flags": row["flags"].split() if row["status"] != "failed" else [],
        "cells": cells,
    }
