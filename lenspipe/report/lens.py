"""The section of one lens in the report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import arviz_stats
import numpy as np
import pandas as pd
import xarray as xr
from astropy.io import fits
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import track

from lenspipe.errors import InputError
from lenspipe.posteriors.reading import posterior
from lenspipe.posteriors.store import PARAMETERS, parameter_names
from lenspipe.report import figures
from lenspipe.report.recovery import near
from lenspipe.report.table import Table, decimals, number, within_error
from lenspipe.results import Results
from lenspipe.summary import DIAGNOSED, is_angle, unwrapped

CORNER = ("theta_E", "gamma", "phi")
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


def lens_sections(lenses: pd.DataFrame, limit: int, paths: Results) -> Iterable[dict[str, Any]]:
    """The drawn lenses, flagged ones first, then in the catalogue's order; one at a time in memory."""
    rows = [row for state in ("flagged", "ok") for row in lenses[lenses["status"] == state].to_dict("records")][:limit]
    for row in track(rows, description="report") if rows else ():
        yield lens_section(row, paths)


def lens_section(row: dict[str, Any], paths: Results) -> dict[str, Any]:
    """Figures and tables of one lens."""
    name = str(row["name"])
    tree = posterior(paths.fit, name)
    if "observed_data" not in tree:
        raise InputError(f"{paths.catalogue}: {name} is not in it as it was fitted; run the stage catalogue, then fit")
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
        "chains": figures.chains_plot({n: draws[n].to_numpy() for n in (*DIAGNOSED, *further)}),
    }
    return {
        **{key: row[key] for key in ("name", "anchor", "status", "origin")},
        "flags": row["flags"].split(),
        "line": {name: within_error(row, name) for name in ("theta_E", "gamma")}
        | {"chi2": number(row, "chi2_per_pixel", ".2f"), "snr": number(row, "arc_snr", ".0f")},
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
        truth = np.asarray(file[0].data, dtype=float)
        scale, u, v = (float(file[0].header[key]) for key in ("PIXSCALE", "CENTRE_U", "CENTRE_V"))
    width = scale * len(truth)
    there = source_extent(row["true_source_x"] - width * u, row["true_source_y"] - width * v, width)
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
