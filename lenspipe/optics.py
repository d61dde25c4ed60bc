"""The forward model that the settings ask for."""

from __future__ import annotations

from pathlib import Path

import torch

from lenspipe.config import Config, Lens
from lenspipe.deflection_table import read_deflection_table
from lenspipe.image.light import Light
from lenspipe.image.simulator import LineOfSight, Optics
from lenspipe.lens.multi_plane import distance_ratios
from lenspipe.lens.profiles import Composite


def read_optics(config: Config, path: Path, dtype: torch.dtype, device: torch.device | None = None) -> Optics:
    """The forward model of `config.lens`; the table at `path` is read only where it is wanted."""
    lens = config.lens
    several = any(component.redshift is not None for component in lens.components.values())
    return Optics(
        read_deflection_table(path).to(dtype=dtype, device=device) if lens.deflection == "table" else None,
        lens.supersampling,
        lens.source_interpolation,
        lens.psf_supersampling,
        Composite(lens.mass_profiles) if lens.components and not several else None,
        line_of_sight(lens) if several else None,
        Light(lens.light) if lens.light else None,
    )


def line_of_sight(lens: Lens) -> LineOfSight:
    """The planes of the main lens and of all its components, those of one redshift together."""
    from astropy import cosmology  # takes a second, and few runs have several planes

    if lens.redshift is None or lens.source_redshift is None:
        raise ValueError("several planes need the redshifts of the lens and of the source")
    places = {name: component.redshift or lens.redshift for name, component in lens.components.items()}
    redshifts = sorted({*places.values(), lens.redshift})
    planes = [
        Composite({name: lens.components[name].profile for name, place in places.items() if place == z})
        for z in redshifts
    ]
    ratios = distance_ratios(redshifts, lens.source_redshift, getattr(cosmology, lens.cosmology))
    return LineOfSight(tuple(planes), redshifts.index(lens.redshift), ratios)
