"""The images that are fitted: mocks and observed lenses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lenspipe.config.fields import Fraction, Positive, Section


class NoiseLevel(Section):
    """One noise level of the mocks."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="goes into the mocks' names")
    sd: Positive = Field(description="noise of the background [flux unit; a source peaks at source_flux]")
    counts: Positive | None = Field(
        None, description="electrons for one flux unit, of which the photon noise is; none: no photon noise"
    )


class Mocks(Section):
    """Mock lenses (stage `mocks`); paper, section 5.1. Every system is written once per noise level."""

    systems: int = Field(3, ge=0, description="number of lens systems")
    noise_levels: tuple[NoiseLevel, ...] = Field(
        (NoiseLevel(name="low", sd=0.333), NoiseLevel(name="medium", sd=0.1), NoiseLevel(name="high", sd=0.0333)),
        min_length=1,
        description="noise levels, named by the signal-to-noise they give",
    )
    image_size: int = Field(64, ge=16, le=1024, description="side of the image [px] (paper: 256)")
    pixel_scale: Positive = Field(0.1, description='pixel scale ["] (paper: 10/256)')
    psf_sd: Positive = Field(0.1, description='standard deviation of the Gaussian PSF ["] (paper: 0.05)')
    source: Literal["galaxies", "prior"] = Field(
        "galaxies", description="denoised galaxies of the test set, or draws from the source prior"
    )
    source_extent: Fraction = Field(
        0.2, gt=0, description="share of the field's width that the galaxy's light is rescaled to (paper: 1/3)"
    )

    @model_validator(mode="after")
    def _unique(self) -> Mocks:
        names = [level.name for level in self.noise_levels]
        if len(set(names)) < len(names):
            raise ValueError(f"two noise levels have the same name: {', '.join(names)}")
        return self


NAME = r"[A-Za-z0-9_.+-]*[A-Za-z0-9_+-][A-Za-z0-9_.+-]*"  # of a lens


class ObservedLens(Section):
    """One observed lens, written in config instead of in a table: its columns, but z_lens and z_source."""

    name: str = Field(pattern=f"^{NAME}$", description="unique name")
    image: str = Field(description="path of the FITS image")
    psf: str = Field(description="path of the FITS PSF kernel")
    noise: str | None = Field(None, description="path of the FITS noise map (1 sigma)")
    background_rms: Positive | None = Field(None, description="noise of the background [image unit], without a map")
    exposure_time: Positive | None = Field(None, description="for photon noise, without a map [s]")
    gain: Positive = Field(1.0, description="electrons per image unit and second")
    mask: str | None = Field(None, description="path of a FITS mask")
    mask_bad: Literal[0, 1] = Field(1, description="value of the mask's bad pixels")
    pixel_scale: Positive | None = Field(None, description='pixel scale ["]; none: from the header')
    flux_unit: Positive | None = Field(None, description="image units per unit of source_flux; none: from the image")
    zero_point: float | None = Field(None, description="AB magnitude of one image unit")
    center_column: float | None = Field(None, description="the deflector's, from 0 [px]; none: preparation finds it")
    center_row: float | None = Field(None, description="the deflector's, from 0 [px]; none: preparation finds it")
    fit_radius: Positive | None = Field(None, description='of the disc that is fitted ["]; none: preparation finds it')
    truth: dict[str, float] = Field({}, description="true values of parameters, where they are known")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that it names."""
        return tuple(path for path in (self.image, self.noise, self.psf, self.mask) if path)


class Preparation(Section):
    """Observed lenses made ready for a fit: deflector found, arcs looked for, cut-out and mask; see `preparation`."""

    centre_within: Positive = Field(1.2, description='how far from the middle of the image the deflector may be ["]')
    significance: Positive = Field(
        4.0, description="of pixels that stand out from the deflector's light, as arcs and companions do [scatter]"
    )
    fit_radius_min: Positive = Field(1.2, description='least radius of the disc that is fitted ["]')
    fit_radius_max: Positive = Field(3.2, description='its greatest; also where no arcs are seen ["]')
    margin: Positive = Field(0.4, description='between the arcs and the edge of that disc ["]')
    core_radius: float = Field(
        0.0, ge=0, description='radius about the deflector that is not fitted ["]; where its PSF is not well known'
    )
    mask_cosmic_rays: bool = Field(True, description="leave out what is sharper than the PSF (van Dokkum 2001)")
    inflate_noise: bool = Field(
        True,
        description="multiply the noise map by what the scatter of blocks of empty pixels is above it, as drizzling"
        " makes it; by 1 where it is below",
    )


class Catalogue(Section):
    """The lens catalogue (stage `catalogue`): mocks and observed lenses, in one format."""

    mocks: bool = Field(True, description="take in the mocks")
    tables: tuple[str, ...] = Field(
        (), description="tables (CSV, ECSV, FITS) or folders of observed lenses; paths in a table are relative to it"
    )
    lenses: tuple[ObservedLens, ...] = Field((), description="observed lenses written here")
    preparation: Preparation | None = Field(
        None, description="how observed lenses are made ready; none: their images are fitted as they are"
    )
