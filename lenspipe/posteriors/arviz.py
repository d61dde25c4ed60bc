"""One lens as ArviZ reads it: the only place that knows ArviZ's names.

The object is an xarray DataTree, as ArviZ 1.x has them: arviz-base and arviz-stats from 0.8 on take it as it is, and
functions of ArviZ 0.23.4, which is what there is on Python 3.11, take `arviz.from_datatree` of it.

| group | contents |
|---|---|
| `posterior` | parameters and `latent`, the source's unknowns (chain, draw, ...) |
| `sample_stats` | `lp`, `energy`, `diverging`, `acceptance_rate` (chain, draw) |
| `observed_data` | `image`, `noise`, `usable`, `psf`, `pixel_scale`, units, first look: the lens in the catalogue |
| `posterior_predictive` | `image_mean`, `image_sd` of the model image, `source_mean`, `source_sd` (image units) |
| `map` | parameters, `image`, `light`, `source`, `log_density` and more at the maximum of the posterior |
| `basins` | parameters, `log_density`, `log_evidence`, unknowns `w` of the best solution and its runner-up (or NaN) |
| `diagnostics` | what else the fit has found |
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lenspipe.posteriors.store import STATISTICS, parameter_names

STATISTIC_NAMES = {"log_density": "lp", "acceptance": "acceptance_rate"}
PREDICTIVE = {
    "model_mean": "image_mean",
    "model_sd": "image_sd",
    "source_mean": "source_mean",
    "source_sd": "source_sd",
}
BASINS = {"basin_log_density": "log_density", "basin_log_evidence": "log_evidence", "basin_w": "w"}
OF_THE_SEARCH = ("draws_above_map", "seconds_map")  # which say how it went, not what is at the maximum
SOURCE_SIDES = {"source_column": 0, "source_row": 1}  # place of the centre's coordinate in the frame of the source


def tree(lens: xr.Dataset, observed: xr.Dataset | None) -> xr.DataTree:
    """The variables of one lens of the store, in ArviZ's groups; observed: the same lens in the catalogue."""
    places = _coordinates(lens, observed)
    parameters, lens = parameter_names(lens), lens.assign_coords(_along(places, lens))
    of_map = [str(name) for name in lens if str(name).endswith("_map") and name not in OF_THE_SEARCH]
    at_map = {name: _map_name(name) for name in of_map}
    groups = {
        "posterior": lens[[*parameters, "latent"]],
        "sample_stats": lens[list(STATISTICS)].rename(STATISTIC_NAMES),
        "posterior_predictive": lens[list(PREDICTIVE)].rename(PREDICTIVE),
        "map": lens[list(at_map)].rename(at_map),
        "basins": lens[list(BASINS)].rename(BASINS).merge(_basin_parameters(lens, parameters)),
    }
    elsewhere = {*parameters, "latent", *STATISTICS, *PREDICTIVE, *at_map, *BASINS, "basin_parameters", "name"}
    groups["diagnostics"] = lens[[name for name in lens.data_vars if name not in elsewhere]]
    if observed is not None:
        groups["observed_data"] = observed.assign_coords(_along(places, observed))
    return xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()}, name=str(lens["name"].item()))


def _map_name(name: str) -> str:
    return {"model_map": "image", "light_map": "light"}.get(name, name.removesuffix("_map"))


def _basin_parameters(lens: xr.Dataset, parameters: list[str]) -> xr.Dataset:
    columns = lens["basin_parameters"].to_numpy().T
    return xr.Dataset({name: ("basin", column) for name, column in zip(parameters, columns, strict=True)})


def _coordinates(lens: xr.Dataset, observed: xr.Dataset | None) -> dict[str, NDArray]:
    """Numbers of chains and draws, and places ["] of the pixels of the image and of the source."""
    places: dict[str, NDArray] = {dim: np.arange(lens.sizes[dim]) for dim in ("chain", "draw")}
    if observed is not None:
        scale = float(observed["pixel_scale"])
        places |= {dim: _middles(observed.sizes[dim]) * observed.sizes[dim] * scale for dim in ("y", "x")}
    frame = lens["source_frame"].to_numpy()
    return places | {d: frame[at] + frame[2] * _middles(lens.sizes[d]) for d, at in SOURCE_SIDES.items()}


def _middles(pixels: int) -> NDArray:
    """Middles of pixels that fill the interval from -1/2 to 1/2."""
    return (np.arange(pixels) + 0.5) / pixels - 0.5


def _along(places: dict[str, NDArray], group: xr.Dataset) -> dict[str, tuple[str, NDArray]]:
    return {dim: (dim, values) for dim, values in places.items() if dim in group.dims}
