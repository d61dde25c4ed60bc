"""A lens of the catalogue before its files are opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Wishes:
    """What the table says of a lens, in place of what would be found; pixels are counted from 0 at the lower left.

    column, row: of the deflector [px]; fit_radius: of the disc that is fitted ["].
    """

    column: float | None = None
    row: float | None = None
    fit_radius: float | None = None


@dataclass(frozen=True)
class LensFiles:
    """What is given of one lens; the paths of images may name extensions (`lens.fits[SCI]`).

    noise: map of 1 sigma or, without one, background_rms [image units], exposure_time [s] and gain [electrons per image
    unit and second]; mask_bad: value, 0 or 1, of the mask's bad pixels; pixel_scale ["]: from the image's header where
    it is none; flux_unit: image units for one unit of `source_flux`, from the image where it is none.
    """

    image: Path
    psf: Path
    noise: Path | None = None
    mask: Path | None = None
    mask_bad: int = 1
    pixel_scale: float | None = None
    background_rms: float | None = None
    exposure_time: float | None = None
    gain: float = 1.0
    flux_unit: float | None = None
    wishes: Wishes = field(default_factory=Wishes)


@dataclass(frozen=True)
class Entry:
    """A lens before its files are opened.

    facts: what else the table says of it that goes into the summary: zero_point [AB magnitude of one image unit],
    z_lens, z_source; problem: why it cannot be used, where the table has it wrong.
    """

    name: str
    files: LensFiles
    origin: str
    truth: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    problem: str = ""
