"""Posteriors on disk: one Zarr folder a shard, in it one group for each shape of image.

A group has dimensions lens, chain, draw and, where they apply, source_unknown, start, basin, sample, y, x, source_row,
source_column; `lenspipe.fit.diagnostics` says how the diagnostics are computed:

| variables | dimensions |
|---|---|
| `theta_E, gamma, q, phi, ...` | lens, chain, draw |
| `latent`, the source's unknowns (standard normal) | lens, chain, draw, source_unknown |
| `log_density, acceptance, diverging, energy` | lens, chain, draw |
| `<parameter>_map, log_density_map, chi2_per_pixel, converged, step_size, seconds` | lens |
| `bfmi_min`, the least E-BFMI over chains, of all transitions, also those whose draws are not kept | lens |
| `einstein_radius_map` ["], of the critical curve; `images_map`, of the source's centre; `arc_snr` | lens |
| `critical_curve, caustic` at the MAP ["], NaN where a ray from the centre does not cross it | ... |
| `source_total_flux, source_lensed_flux` (image units), `magnification`, of draws spread evenly | lens, sample |
| `source_half_light_radius, einstein_radius` ["], of the same draws | lens, sample |
| `start_log_density`; `start_basin`, where a start or an exploration from it ended, 0 the best, -1 none | lens, start |
| `basin_log_density`, `basin_log_evidence` (Laplace), best first, NaN where there are fewer | lens, basin |
| `basin_parameters`, the same solutions' parameters in the order of `parameter_names` | lens, basin, parameter |
| `basin_w`, the unknowns of each solution (standard normal) | lens, basin, unknown |
| `predictive_p`, `residual_correlation`, `residual_excess` and its `_error`, `starts, starts_agreeing` | lens |
| `draws_above_map`, `evidence_lead`, `log_evidence` [nat] but for a constant of the data | lens |
| `prior_depth`, the greatest median of a named unknown's size; `prior_depth_of`, whose | lens |
| `ray_chi2`, chi^2 between the lensed source and the same with twice as many rays a pixel side | lens |
| `model_map, model_mean, model_sd`; `light_map`, the lens galaxy alone (image units) | lens, y, x |
| `source_map, source_mean, source_sd` (image units) | lens, source_row, source_column |
| `source_frame`: x and y of the centre and the full width of those three ["] | lens, frame |
"""

from __future__ import annotations

import re

import xarray as xr

LENS_PARAMETERS = ("theta_E", "gamma", "q", "phi", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2")
SOURCE_PARAMETERS = ("source_x", "source_y", "source_size", "source_flux")
PARAMETERS = LENS_PARAMETERS + SOURCE_PARAMETERS
STATISTICS = ("log_density", "acceptance", "diverging", "energy")


def interchangeable(name: str) -> bool:
    """Whether others can stand in for a parameter, so that chains need not agree on it.

    Place, size and flux of the source can be taken on by its unknowns, the amplitude of a Gaussian of an `mge` by its
    neighbours.
    """
    return name in SOURCE_PARAMETERS or re.search(r"_amplitude\d+$", name) is not None


def parameter_names(group: xr.Dataset) -> list[str]:
    """Names of the parameters in a group or a posterior: those of every lens, then others, such as of components."""
    along = {str(name): set(group.variables[name].dims) - {"lens"} for name in group.data_vars}
    chained = {name for name, dims in along.items() if dims == {"chain", "draw"}} - set(STATISTICS)
    return [*(name for name in PARAMETERS if name in chained), *sorted(chained - set(PARAMETERS))]
