"""Posteriors on disk: one Zarr folder a shard, in it one group for each shape of image.

A group has dimensions lens, chain, draw and, where they apply, latent, start, basin, sample, y, x, source_row,
source_column; `lenspipe.fit.diagnostics` says how the diagnostics are computed:

| variables | dimensions |
|---|---|
| `theta_E, gamma, q, phi, ...` | lens, chain, draw |
| `latent` (standard normal) | lens, chain, draw, latent |
| `log_density, acceptance, diverging, energy` | lens, chain, draw |
| `<parameter>_map, log_density_map, chi2_per_pixel, converged, step_size, seconds` | lens |
| `einstein_radius_map` ["], of the critical curve; `images_map`, of the source's centre | lens |
| `source_total_flux, source_lensed_flux` (image units), `magnification`, of draws spread evenly | lens, sample |
| `start_log_density`; `start_basin`, the basin that a start ended in, 0 the best | lens, start |
| `basin_log_density`, `basin_log_evidence` (Laplace), best first, NaN where there are fewer | lens, basin |
| `basin_w`, the unknowns of each solution (standard normal) | lens, basin, unknown |
| `predictive_p`, `residual_correlation`, `residual_excess` and its `_error`, `starts, starts_agreeing` | lens |
| `evidence_lead` [nat]; `prior_depth`, the greatest median of a named unknown's size; `prior_depth_of`, whose | lens |
| `model_map, model_mean, model_sd` (image units) | lens, y, x |
| `source_map, source_mean, source_sd` (image units) | lens, source_row, source_column |
| `source_frame`: x and y of the centre and the full width of those three ["] | lens, frame |
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import xarray as xr
import zarr

from lenspipe.catalogue.stage import AS_WRITTEN
from lenspipe.errors import InputError

LENS_PARAMETERS = ("theta_E", "gamma", "q", "phi", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2")
SOURCE_PARAMETERS = ("source_x", "source_y", "source_size", "source_flux")
PARAMETERS = LENS_PARAMETERS + SOURCE_PARAMETERS
STATISTICS = ("log_density", "acceptance", "diverging", "energy")
ARVIZ_NAMES = {"log_density": "lp", "acceptance": "acceptance_rate"}


def open_groups(fit: Path) -> Iterator[xr.Dataset]:
    """Every group of every shard in the folder of the stage `fit`, lazily."""
    shards = sorted(fit.glob("shard-*.zarr"))
    if not shards:
        raise InputError(f"{fit}: no posteriors here; run the stage fit first")
    for shard in shards:
        for bucket in sorted(zarr.open_group(shard, mode="r").group_keys()):
            yield xr.open_zarr(shard, group=bucket, consolidated=False)


def read_manifests(fit: Path) -> pd.DataFrame:
    """One row a lens, failures included, of all shards."""
    manifests = sorted(fit.glob("shard-*.csv"))
    if not manifests:
        raise InputError(f"{fit}: no manifest of a shard here; run the stage fit first")
    tables = [pd.read_csv(path, dtype={"name": str, "status": str, "reason": str}, **AS_WRITTEN) for path in manifests]
    return pd.concat(tables, ignore_index=True).fillna({"reason": ""})


def open_posteriors(fit: str | Path) -> xr.Dataset:
    """All lenses of a run as one lazy dataset: every variable of dimensions (lens, chain, draw) or (lens), by name.

    Variables whose size differs from lens to lens (images) are left out; `posterior` has those of one lens.
    """
    kept = [
        group[[n for n, v in group.items() if set(v.dims) <= {"lens", "chain", "draw"}]]
        for group in open_groups(Path(fit))
    ]
    return xr.concat(kept, dim="lens").set_index(lens="name")


def posterior(fit: str | Path, name: str) -> xr.DataTree:
    """One lens as an ArviZ object: groups posterior, sample_stats and images.

    Raises InputError where the lens is not among the posteriors, with its reason where it failed.
    """
    for group in open_groups(Path(fit)):
        names = group["name"].to_numpy().tolist()
        if name in names:
            return _tree(group.isel(lens=names.index(name)).load())
    manifest = read_manifests(Path(fit)).set_index("name")
    if name in manifest.index:
        raise InputError(
            f"lens {name} has no posterior: it {manifest.loc[name, 'status']}: {manifest.loc[name, 'reason']}"
        )
    raise InputError(f"no lens {name} in {fit}; the first of its {len(manifest)} lenses is {manifest.index[0]}")


def parameter_names(group: xr.Dataset) -> list[str]:
    """Names of the parameters in a group or a posterior: those of every lens, then others, such as of components."""
    chained = {str(name) for name, variable in group.items() if set(variable.dims) <= {"lens", "chain", "draw"}}
    chained = {name for name in chained if {"chain", "draw"} <= set(group[name].dims)} - set(STATISTICS)
    return [*(name for name in PARAMETERS if name in chained), *sorted(chained - set(PARAMETERS))]


def _tree(lens: xr.Dataset) -> xr.DataTree:
    coordinates = {dim: range(lens.sizes[dim]) for dim in ("chain", "draw")}
    chained = [str(name) for name, variable in lens.items() if {"chain", "draw"} <= set(variable.dims)]
    parameters = [*parameter_names(lens), "latent"]
    groups = {
        "posterior": lens[parameters].assign_coords(coordinates),
        "sample_stats": lens[list(STATISTICS)].assign_coords(coordinates).rename(ARVIZ_NAMES),
        "images": lens.drop_vars(chained),
    }
    return xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
