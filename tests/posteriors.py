"""Made-up posteriors in the layout of the store, for tests and benchmarks that need no fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from lenspipe.catalogue.stage import chunks_of
from lenspipe.posteriors.store import PARAMETERS
from lenspipe.posteriors.writing import write_shard

CENTRES = {"theta_E": 1.2, "gamma": 2.0, "q": 0.8, "source_size": 1.5, "source_flux": 1.0}
DIAGNOSTICS = ("chi2_per_pixel", "predictive_p", "residual_correlation", "residual_excess", "residual_excess_error")
DIAGNOSTICS += (
    "evidence_lead",
    "log_evidence",
    "prior_depth",
    "ray_chi2",
    "log_density_map",
    "step_size",
    "einstein_radius_map",
    "arc_snr",
    "draws_above_map",
)
FLUXES = ("source_total_flux", "source_lensed_flux", "magnification", "source_half_light_radius", "einstein_radius")
START_COUNT, BASIN_COUNT, SAMPLE_COUNT = 8, 2, 100


def posteriors(
    names: Sequence[str], chains: int = 2, draws: int = 20, pixels: int = 16, latents: int = 3, seed: int = 0
) -> xr.Dataset:
    """Normal draws for every parameter of the lenses, with all variables that a fit has."""
    rng, n = np.random.default_rng(seed), len(names)
    chain_draw = ("lens", "chain", "draw")

    def normal(*shape: int, dtype: str = "float64") -> np.ndarray:
        return rng.standard_normal((n, *shape), dtype=np.float32).astype(dtype)

    def drawn(name: str) -> np.ndarray:
        return (CENTRES.get(name, 0.0) + 0.05 * (normal(1, 1) + normal(chains, draws))).astype("float32")

    data: dict[str, tuple[object, np.ndarray]] = {"name": ("lens", np.array(names, dtype=object))}
    data |= {name: (chain_draw, drawn(name)) for name in PARAMETERS}
    data |= {f"{name}_map": ("lens", data[name][1].mean((1, 2), dtype=float)) for name in PARAMETERS}
    data["latent"] = ((*chain_draw, "source_unknown"), normal(chains, draws, latents, dtype="float32"))
    data |= {name: (chain_draw, normal(chains, draws)) for name in ("log_density", "energy")}
    data["acceptance"] = (chain_draw, rng.random((n, chains, draws)))
    data["diverging"] = (chain_draw, np.zeros((n, chains, draws), bool))
    data |= {name: ("lens", np.abs(normal()) + 0.1) for name in (*DIAGNOSTICS, "seconds", "seconds_map")}
    data |= {name: ("lens", np.full(n, 4)) for name in ("pixels", "images_map", "starts", "starts_agreeing")}
    data["converged"] = ("lens", np.ones(n, bool))
    data["bfmi_min"] = ("lens", np.ones(n))
    data["prior_depth_of"] = ("lens", np.array(["gamma"] * n))
    data["start_log_density"] = (("lens", "start"), normal(START_COUNT))
    data["start_basin"] = (("lens", "start"), np.zeros((n, START_COUNT), int))
    for name in ("basin_log_density", "basin_log_evidence"):
        data[name] = (("lens", "basin"), -np.sort(np.abs(normal(BASIN_COUNT))))
    data["basin_parameters"] = (("lens", "basin", "parameter"), normal(BASIN_COUNT, len(PARAMETERS)))
    data["basin_w"] = (("lens", "basin", "unknown"), normal(BASIN_COUNT, 12 + latents))
    data |= {name: (("lens", "y", "x"), normal(pixels, pixels, dtype="float32")) for name in IMAGES}
    source = ("lens", "source_row", "source_column")
    data |= {name: (source, normal(64, 64, dtype="float32")) for name in SOURCES}
    data |= {name: (("lens", "curve_point", "axis"), normal(30, 2)) for name in ("critical_curve", "caustic")}
    data["source_frame"] = (("lens", "frame"), normal(3, dtype="float32"))
    data |= {name: (("lens", "sample"), np.abs(normal(min(SAMPLE_COUNT, chains * draws)))) for name in FLUXES}
    return xr.Dataset(data)


IMAGES = ("model_map", "model_mean", "model_sd", "light_map")
SOURCES = ("source_map", "source_mean", "source_sd")


def write_store(
    store: Path,
    groups: Mapping[str, Sequence[xr.Dataset]],
    failed: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """A shard's store and its manifest; failed: reasons of lenses without a posterior."""
    write_shard(store, groups, record or {})
    names = sorted(str(name) for parts in groups.values() for part in parts for name in part["name"].values)
    rows = [{"name": name, "status": "fitted", "reason": ""} for name in names]
    rows += [{"name": name, "status": "failed", "reason": reason} for name, reason in (failed or {}).items()]
    pd.DataFrame(rows).to_csv(store.with_suffix(".csv"), index=False)


def write_catalogue(
    folder: Path, buckets: Mapping[str, Sequence[str]], unusable: Sequence[str] = (), pixels: int = 16
) -> None:
    """A catalogue of square lenses with pixels of 0.1 arcsec, by bucket, with the value 1, 2 ... in their images."""
    rows = []
    for bucket, names in buckets.items():
        values = np.arange(1, len(names) + 1, dtype="float32")[:, None, None]
        lenses = xr.Dataset(
            {
                "image": (("lens", "y", "x"), values * np.ones((pixels, pixels), "float32")),
                "noise": (("lens", "y", "x"), np.ones((len(names), pixels, pixels), "float32")),
                "usable": (("lens", "y", "x"), np.ones((len(names), pixels, pixels), bool)),
                "psf": (("lens", "psf_y", "psf_x"), np.full((len(names), 3, 3), 1 / 9, "float32")),
                "first_light": (("lens", "y", "x"), np.zeros((len(names), pixels, pixels), "float32")),
                "arcs": (("lens", "y", "x"), np.zeros((len(names), pixels, pixels), bool)),
                "flux_unit": ("lens", np.full(len(names), 2.0)),
                "light_unit": ("lens", np.ones(len(names))),
                "pixel_scale": ("lens", np.full(len(names), 0.1)),
                "name": ("lens", np.array(names, dtype=object)),
            }
        )
        place = {"store": folder / "catalogue.zarr", "group": bucket, "mode": "a", "zarr_format": 3}
        lenses.to_zarr(**place, consolidated=False, encoding=chunks_of(lenses))
        rows += [(name, "usable", "", bucket, 30.0, 1.21) for name in names]
    rows += [(name, "failed", "no PSF", "", np.nan, np.nan) for name in unusable]
    table = pd.DataFrame(rows, columns=["name", "status", "reason", "bucket", "snr", "true_theta_E"])
    table.insert(1, "origin", "mock")
    table.insert(2, "pixel_scale", 0.1)
    table.to_csv(folder / "lenses.csv", index=False)
