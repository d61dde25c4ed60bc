"""The unlensed galaxies: the embedded survey, and what is taken in from files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lenspipe.config.fields import Count, Fraction, Positive, Section


class Survey(Section):
    """The embedded synthetic galaxy survey (stage `survey`), written in the RealGalaxyCatalog layout."""

    galaxies: Count = Field(2400, description="number of galaxies drawn")
    galaxies_per_file: Count = Field(400, description="number of stamps in one image file")
    pixel_scale: Positive = Field(0.03, description='pixel scale ["], as in COSMOS')
    magnitude_bright: float = Field(20.5, ge=15, le=30, description="brightest F814W AB magnitude")
    magnitude_faint: float = Field(23.5, ge=15, le=30, description="faintest F814W AB magnitude")
    noise_sd: Positive = Field(0.0026, description="pixel noise [count rate of a 1 s exposure, zero point 25.94]")
    psf_fwhm: Positive = Field(0.09, description='full width at half maximum of the Moffat PSF ["]')
    stamp_size_max: int = Field(160, ge=64, le=512, description="largest stamp [px]; the smallest is set by the galaxy")

    @model_validator(mode="after")
    def _ordered(self) -> Survey:
        if not self.magnitude_bright < self.magnitude_faint:
            raise ValueError(
                f"magnitude_bright ({self.magnitude_bright}) must be below magnitude_faint ({self.magnitude_faint})"
            )
        return self


SplitName = Literal["random", "train", "validation", "test"]


class _Input(Section):
    """Where galaxies come from."""

    split: SplitName = Field("random", description="put all galaxies on one side, or split them at random")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that must be there."""
        return ()

    @property
    def read_where_there(self) -> tuple[str, ...]:
        """Others, which are read where they are there."""
        return ()


class SurveyInput(_Input):
    """Take the galaxies of the embedded synthetic survey."""

    layout: Literal["survey"] = "survey"


# tables that GalSim's exclusion levels need
TABLES = {"none": (), "bad_stamp": ("selection",), "bad_fits": ("fits",), "marginal": ("fits", "selection")}


def table_beside(catalogue: Path, kind: str) -> Path:
    """The table of a kind, `fits` or `selection`, that lies beside a catalogue."""
    return catalogue.with_name(f"{catalogue.stem}_{kind}.fits")


class RealGalaxyCatalogInput(_Input):
    """A galaxy catalogue in the GalSim / GREAT3 RealGalaxyCatalog layout (COSMOS 23.5, 25.2, AEGIS ...)."""

    layout: Literal["real_galaxy_catalog"]
    catalogue: str = Field(description="path of real_galaxy_catalog_*.fits; images are looked up beside it")
    fits: str | None = Field(None, description="path of the _fits table; none: <catalogue>_fits.fits where it exists")
    selection: str | None = Field(None, description="path of the _selection table; none: <catalogue>_selection.fits")
    exclusion: Literal["none", "bad_stamp", "bad_fits", "marginal"] = Field(
        "none", description="GalSim's exclusion level, before the other cuts (which remove every failed Sersic fit)"
    )
    sample: Literal["23.5", "25.2"] = Field("23.5", description="COSMOS sample whose limits bad_stamp and marginal use")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that must be there."""
        tables = {"fits": self.fits, "selection": self.selection}
        return self.catalogue, *(
            name or self._beside(kind) for kind, name in tables.items() if name or kind in TABLES[self.exclusion]
        )

    @property
    def read_where_there(self) -> tuple[str, ...]:
        """Others, which are read where they are there."""
        return () if self.fits or "fits" in TABLES[self.exclusion] else (self._beside("fits"),)

    def _beside(self, kind: str) -> str:
        return str(table_beside(Path(self.catalogue), kind))


class StampArchiveInput(_Input):
    """An npz archive of galaxy stamps, [galaxy, y, x], each centred on its galaxy and zero outside it."""

    layout: Literal["stamp_archive"]
    archive: str = Field(description="path of the .npz file")
    key: str = Field(description="name of the image array inside the archive")
    pixel_scale: Positive = Field(description='pixel scale ["]')
    noise_sd: Annotated[float, Field(ge=0)] = Field(
        0.0, description="pixel noise [image units]; 0: not known, and the signal-to-noise cut does not apply"
    )
    exclude: tuple[int, ...] = Field((), description="rows left out by hand (duplicates, artefacts)")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that must be there."""
        return (self.archive,)


GalaxyInput = Annotated[
    SurveyInput | RealGalaxyCatalogInput | StampArchiveInput,
    Field(discriminator="layout"),
]


class Galaxies(Section):
    """Ingestion and filtering of unlensed galaxies (stage `galaxies`); the cuts of the paper, section 2.2."""

    inputs: tuple[GalaxyInput, ...] = Field((SurveyInput(),), min_length=1, description="where the galaxies come from")
    stamp_size: Literal[64] = Field(64, description="side of the images the source model learns [px]")
    min_stamp_size: Count = Field(64, description="stamps with a side below this are cut [px]")
    side_per_half_light_radius: Positive = Field(
        7.0, description="side of the square cut from a stamp archive [half-light radii]; median of COSMOS stamps: 7.1"
    )
    sersic_index_min: Positive = Field(0.1, description="least Sersic index; COSMOS fits were sought in [0.1, 6.2]")
    sersic_index_max: Positive = Field(6.2, description="greatest Sersic index")
    signal_to_noise_min: float = Field(15, ge=0, description="least max(I downscaled) / sigma_noise")
    signal_to_noise_max: float = Field(50, gt=0, description="greatest max(I downscaled) / sigma_noise")
    signal_to_noise_downscale: int = Field(
        4, ge=1, le=64, description="factor by which the image is downscaled for that ratio"
    )
    neighbours: Literal["keep", "mask", "reject"] = Field(
        "keep", description="other objects on a stamp: keep them, replace them by noise, or cut the galaxy"
    )
    neighbour_noise: Positive = Field(
        1.5, description="least 5x5 mean of the pixels of an object, where the noise is known [pixel noise]"
    )
    neighbour_peak: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="the same where the noise is not known [greatest 5x5 mean]"
    )
    neighbour_flux_ratio: Annotated[float, Field(ge=0)] = Field(
        0.05, description="least flux of an object that counts as a neighbour [flux of the galaxy]"
    )
    neighbour_margin: int = Field(3, ge=0, description="width of the rim that is replaced with a neighbour [px]")
    edge_feather: int = Field(
        4, ge=0, le=16, description="width of the taper at the edge of the 64x64 image [px]; 0: none"
    )
    validation_fraction: Fraction = Field(0.09, description="share of the randomly split galaxies kept for validation")
    test_fraction: Fraction = Field(0.03, description="share of the randomly split galaxies kept for tests and mocks")

    @model_validator(mode="after")
    def _consistent(self) -> Galaxies:
        if not self.signal_to_noise_min < self.signal_to_noise_max:
            raise ValueError(
                f"signal_to_noise_min ({self.signal_to_noise_min:g}) must be below "
                f"signal_to_noise_max ({self.signal_to_noise_max:g})"
            )
        if not self.sersic_index_min < self.sersic_index_max:
            raise ValueError(
                f"sersic_index_min ({self.sersic_index_min:g}) must be below "
                f"sersic_index_max ({self.sersic_index_max:g})"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1, or no galaxy is left to train on")
        return self
