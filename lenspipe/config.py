"""Every setting of lenspipe: one frozen class a section, with unit, range, default and meaning at each field.

A config file holds only what differs from these defaults. Unknown keys are errors. The JSON schema in
`workflow/schemas/config.schema.json` is generated from these classes (`lenspipe check-config --write-schema`).
Science is here; machines and partitions are in `workflow/profiles/`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from lenspipe.errors import ConfigError
from lenspipe.lens.parameters import LIGHT_PROFILES, SERIES_Q_MIN, component_parameters, ellipses, with_axis_ratios
from lenspipe.prior_expression import PriorExpression, parse_prior, shared

Prior = Annotated[
    PriorExpression,
    BeforeValidator(lambda v: v if isinstance(v, PriorExpression) else parse_prior(v)),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "type": ["string", "number"],
            "description": "a prior such as Normal(0, 0.1) or Laplace(0, 0.1), a number that fixes the parameter, or "
            "the name of another parameter of the lens, whose value it shares",
        }
    ),
]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def prior(text: str, description: str) -> Any:
    """A field whose default is the prior `text`."""
    return Field(default=parse_prior(text), description=description)


class Section(BaseModel):
    """A frozen section that knows no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)


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


class SurveyInput(Section):
    """Take the galaxies of the embedded synthetic survey."""

    layout: Literal["survey"] = "survey"
    split: SplitName = Field("random", description="put all galaxies on one side, or split them at random")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that it names."""
        return ()


class RealGalaxyCatalogInput(Section):
    """A galaxy catalogue in the GalSim / GREAT3 RealGalaxyCatalog layout (COSMOS 23.5, 25.2, AEGIS ...)."""

    layout: Literal["real_galaxy_catalog"]
    catalogue: str = Field(description="path of real_galaxy_catalog_*.fits; images are looked up beside it")
    fits: str | None = Field(None, description="path of the _fits table; none: <catalogue>_fits.fits where it exists")
    selection: str | None = Field(None, description="path of the _selection table; none: <catalogue>_selection.fits")
    exclusion: Literal["none", "bad_stamp", "bad_fits", "marginal"] = Field(
        "none", description="GalSim's exclusion level, before the other cuts (which remove every failed Sersic fit)"
    )
    sample: Literal["23.5", "25.2"] = Field("23.5", description="COSMOS sample whose limits bad_stamp and marginal use")
    split: SplitName = Field("random", description="put all galaxies on one side, or split them at random")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that it names."""
        return tuple(path for path in (self.catalogue, self.fits, self.selection) if path)


class StampArchiveInput(Section):
    """An npz archive of galaxy stamps, [galaxy, y, x], each centred on its galaxy and zero outside it."""

    layout: Literal["stamp_archive"]
    archive: str = Field(description="path of the .npz file")
    key: str = Field(description="name of the image array inside the archive")
    pixel_scale: Positive = Field(description='pixel scale ["]')
    noise_sd: Annotated[float, Field(ge=0)] = Field(
        0.0, description="pixel noise [image units]; 0: not known, and the signal-to-noise cut does not apply"
    )
    exclude: tuple[int, ...] = Field((), description="rows left out by hand (duplicates, artefacts)")
    split: SplitName = Field("random", description="put all galaxies on one side, or split them at random")

    @property
    def files(self) -> tuple[str, ...]:
        """Files from outside that it names."""
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


class Vae(Section):
    """The variational autoencoder and its training (stage `vae`); paper, section 2.1 and appendix D."""

    latents: Count = Field(32, le=512, description="dimensions of the latent space (paper: 64)")
    channels: Count = Field(
        12, le=256, description="channels of the first convolution (paper: 64); the next have 2, 4, 8 times"
    )
    dense: Count = Field(512, le=16384, description="features before the two dense layers (paper: 4096)")
    decoder_sd: Positive | Literal["learned"] = Field(
        0.02, description="sigma_d, noise of the decoding distribution [peak flux] (paper: 1/50), or learned"
    )
    samples: Count = Field(1, description="samples M of the latents per image in the ELBO (paper: 10)")
    batch_size: int = Field(32, ge=2, description="images in a minibatch; batch normalisation needs two")
    learning_rate: Positive = Field(1e-3, lt=1, description="Adam's learning rate (paper: 1e-6)")
    betas: tuple[Fraction, Fraction] = Field((0.5, 0.999), description="Adam's momentum parameters")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate over the epochs")
    epochs: Count = Field(100, description="greatest number of epochs")
    patience: Count = Field(15, description="stop after this many epochs without a better validation ELBO")
    augment: bool = Field(True, description="turn, flip and shift the training images at random")
    noise: float = Field(0, ge=0, lt=1, description="sd of noise added to the encoder's training images [peak flux]")
    ema: Fraction = Field(
        0, description="what the moving average of the weights, which is kept, retains at each step; 0: none"
    )
    gradient_norm_max: Positive | None = Field(1e4, description="a longer gradient is shortened to this; none: never")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the network's arithmetic in training; bfloat16 is for GPUs"
    )


class Flow(Section):
    """A normalising flow on the latents of the training galaxies: affine coupling layers."""

    transforms: Count = Field(6, le=32, description="coupling layers")
    hidden: Count = Field(64, le=1024, description="features of the two hidden layers of each")
    epochs: Count = Field(60, description="passes over the training galaxies")


class ResidualField(Section):
    """What the decoder cannot draw: components of its residuals on the training galaxies, with N(0, 1) weights."""

    kind: Literal["principal_components", "stationary"] = Field(
        "principal_components",
        description="principal components, or plane waves with the residuals' power spectrum (for comparison)",
    )
    components: int | None = Field(
        64, ge=0, le=1024, description="their greatest number; none: as many as explain explained_variance"
    )
    explained_variance: float = Field(
        0.9, gt=0, le=1, description="share of the residuals' variance that the principal components explain"
    )

    @model_validator(mode="after")
    def _counted(self) -> ResidualField:
        if self.kind == "stationary" and self.components is None:
            raise ValueError("a stationary residual field needs a number of components")
        return self


class LearnedSource(Section):
    """The decoder of the stage `vae`, a density of its latents, and a residual field."""

    kind: Literal["vae"] = "vae"
    latent_density: Literal["gaussian", "flow"] = Field(
        "flow", description="of the encoded galaxies: the paper's Gaussian, or a normalising flow"
    )
    latent_covariance_scale: Positive = Field(
        9.0, description="factor on the covariance of the encoded means in the Gaussian (paper: 9)"
    )
    flow: Flow = Flow()
    residual: ResidualField = ResidualField()


class SersicSource(Section):
    """A Sersic profile, of brightness 1 at 1/128 from its centre; lengths in widths of its image, source_size."""

    kind: Literal["sersic"]
    pixels: int = Field(64, ge=64, le=512, description="side of the pictures of it [px]; rays see the profile itself")
    R_sersic: Prior = prior("LogNormal(0.12, 0.4)", "half-light radius, on the intermediate axis")
    n_sersic: Prior = prior("TruncatedNormal(1.5, 0.8, 0.5, 6)", "Sersic index")
    e1: Prior = prior("TruncatedNormal(0, 0.2, -0.6, 0.6)", "ellipticity component")
    e2: Prior = prior("TruncatedNormal(0, 0.2, -0.6, 0.6)", "ellipticity component")

    def expressions(self) -> dict[str, PriorExpression]:
        """The priors by name."""
        return {name: getattr(self, name) for name in ("R_sersic", "n_sersic", "e1", "e2")}

    @model_validator(mode="after")
    def _within_their_domains(self) -> SersicSource:
        for name, low, high in (("R_sersic", 0, math.inf), ("n_sersic", 0.3, 10), ("e1", -0.7, 0.7), ("e2", -0.7, 0.7)):
            value = getattr(self, name)
            if value.distribution == "Shared":
                raise ValueError(
                    f"{name} = {value}: expected a prior or a number; only parameters of the lens are shared"
                )
            if not (low <= value.support[0] and value.support[1] <= high):
                raise ValueError(f"{name} = {value} reaches outside [{low:g}, {high:g}]; truncate it")
        if all(prior.distribution == "Fixed" for prior in self.expressions().values()):
            raise ValueError("all of R_sersic, n_sersic, e1 and e2 are fixed; leave one of them free")
        return self


class ShapeletSource(SersicSource):
    """A Sersic profile and shapelets as wide as it, whose coefficients are the smaller the higher the order."""

    kind: Literal["shapelets"]  # type: ignore[assignment]
    order: int = Field(8, ge=2, le=30, description="highest order; those below 2 are the profile's and its place")
    sd: Positive = Field(0.1, description="standard deviation of a coefficient of order 2 [brightness of the centre]")
    decline: float = Field(2.0, ge=0, description="power of 2 / order by which that of higher ones is smaller")


class PixelGridSource(Section):
    """Free pixels with a smoothness prior: a Gaussian random field below a round envelope, on top of the envelope."""

    kind: Literal["pixel_grid"]
    envelope: Fraction = Field(0.15, gt=0, description="standard deviation of the round Gaussian [width of the image]")
    correlation: Fraction = Field(0.08, gt=0, description="length over which the field is smooth [width of the image]")
    sd: Positive = Field(1.0, description="standard deviation of the field, relative to the envelope")
    modes: Count = Field(120, le=2048, description="number of modes of the field")


SourceSettings = Annotated[
    LearnedSource | SersicSource | ShapeletSource | PixelGridSource,
    Field(discriminator="kind"),
    BeforeValidator(lambda v: {"kind": "vae"} | v if isinstance(v, dict) else v),
]


class Validation(Section):
    """What the source can and cannot draw (stage `validation`), on galaxies of the test split."""

    galaxies: Count = Field(40, description="greatest number of test galaxies")
    noise_sds: tuple[Positive, ...] = Field(
        (0.1, 0.05, 0.02, 0.01, 0.005),
        min_length=1,
        description="white noise of the images that are fitted [peak flux]",
    )
    rotations: int = Field(12, ge=2, le=360, description="angles that a galaxy is turned by")
    unusual_quantile: float = Field(
        0.99, gt=0.5, lt=1, description="a galaxy further out than this share of the validation galaxies is unusual"
    )


class DeflectionTable(Section):
    """The table of SPLE deflections on the unit circle (stage `deflection_table`); paper, appendix A."""

    eta_nodes: int = Field(257, ge=17, le=4097, description="nodes of the angle eta in [0, pi/2]")
    q_nodes: int = Field(32, ge=4, le=256, description="Chebyshev nodes of the axis ratio")
    gamma_nodes: int = Field(16, ge=4, le=256, description="Chebyshev nodes of the slope")
    q_min: float = Field(0.1, ge=0.05, lt=1, description="least axis ratio; the greatest is 1")
    gamma_min: float = Field(1.1, gt=1, lt=3, description="least slope")
    gamma_max: float = Field(2.9, gt=1, lt=3, description="greatest slope")

    @model_validator(mode="after")
    def _ordered(self) -> DeflectionTable:
        if not self.gamma_min < self.gamma_max:
            raise ValueError(f"gamma_min ({self.gamma_min}) must be below gamma_max ({self.gamma_max})")
        return self


ComponentName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*$")]
MassProfile = Literal["epl", "sie", "sis", "shear", "sheet", "point_mass", "nfw", "tnfw"]
LightProfile = Literal["sersic", "gaussian", "mge"]
Redshift = Annotated[float, Field(gt=0, le=20)]


class Component(Section):
    """A deflector beside the main lens; written as the profile's name alone where it is at the main lens's redshift."""

    profile: MassProfile = Field(description="mass profile")
    redshift: Redshift | None = Field(None, description="where it is on the line of sight; none: with the main lens")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        return {"profile": data} if isinstance(data, str) else data


class Lens(Section):
    """The forward model, shared by mocks and fits."""

    deflection: Literal["table", "series"] = Field("table", description="how the SPLE deflection is computed")
    supersampling: Literal[1, 2, 4] = Field(1, description="rays per pixel side")
    psf_supersampling: Literal[1, 2, 4] = Field(
        1, description="values of the PSFs per pixel side: 1, or supersampling, to blur rays instead of pixels"
    )
    source_interpolation: Literal["bilinear", "bicubic"] = Field(
        "bicubic", description="between the pixels of the decoded source (paper: bilinear)"
    )
    components: dict[ComponentName, Component] = Field(
        {}, description="further deflectors beside the elliptical power law and the shear: name to mass profile"
    )
    redshift: Redshift | None = Field(None, description="of the main lens; needed where a component has one")
    source_redshift: Redshift | None = Field(None, description="of the source; needed where a component has one")
    cosmology: Literal["WMAP9", "Planck13", "Planck15", "Planck18"] = Field(
        "Planck18", description="astropy's cosmology of the distances between redshifts"
    )
    light: dict[ComponentName, LightProfile] = Field(
        {}, description="light of the lens galaxy: name to light profile; the sum of all"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Lens:
        placed = {name: c.redshift for name, c in self.components.items() if c.redshift is not None}
        if not placed:
            if self.redshift is not None and self.source_redshift is not None and self.redshift >= self.source_redshift:
                raise ValueError(
                    f"redshift ({self.redshift:g}) is not below source_redshift ({self.source_redshift:g})"
                )
            return self
        if self.redshift is None or self.source_redshift is None:
            raise ValueError(f"redshift and source_redshift are needed, since {', '.join(placed)} has a redshift")
        for name, redshift in (placed | {"redshift": self.redshift}).items():
            if redshift >= self.source_redshift:
                raise ValueError(f"{name} ({redshift:g}) is not in front of source_redshift ({self.source_redshift:g})")
        return self

    @property
    def mass_profiles(self) -> dict[str, str]:
        """Component to mass profile."""
        return {name: component.profile for name, component in self.components.items()}


LARGEST_E = 0.69  # of a component's e1 and e2; both together are an axis ratio above SERIES_Q_MIN
DOMAINS = {
    "theta_E": (0, math.inf),
    "r_Ein": (0, math.inf),
    "gamma": (1, 3),
    "q": (0, 1),
    "source_size": (0, math.inf),
    "source_flux": (0, math.inf),
    "Rs": (0, math.inf),
    "r_trunc": (0, math.inf),
    "R_sersic": (0, math.inf),
    "n_sersic": (0.36, math.inf),  # below, the half-light radius of the profile is not what it says
    "sd": (0, math.inf),
    "sd_min": (0, math.inf),
    "sd_max": (0, math.inf),
}


class Priors(Section):
    """Priors of the lens and of the source's place, size and flux; mocks are drawn from them, fits use them.

    Give `theta_E` or `r_Ein` (the paper's, theta_E = sqrt(q) r_Ein), and `e1, e2` or `q, phi`. The name of another
    parameter in place of a prior, `theta_E, q, phi` always among them, is the value of that one.
    """

    theta_E: Prior | None = Field(None, description='Einstein radius on the intermediate axis ["]')
    r_Ein: Prior | None = Field(None, description="the paper's Einstein radius, eq. 11 [\"]; theta_E = sqrt(q) r_Ein")
    gamma: Prior = prior("TruncatedNormal(2.0, 0.2, 1.3, 2.7)", "three-dimensional logarithmic slope of the mass")
    e1: Prior | None = Field(None, description="ellipticity (1-q)/(1+q) cos 2 phi")
    e2: Prior | None = Field(None, description="ellipticity (1-q)/(1+q) sin 2 phi")
    q: Prior | None = Field(None, description="axis ratio, minor over major")
    phi: Prior | None = Field(None, description="position angle of the major axis, counter-clockwise from +x [rad]")
    center_x: Prior = prior("Normal(0, 0.05)", 'lens centre, x to the right ["]')
    center_y: Prior = prior("Normal(0, 0.05)", 'lens centre, y up ["]')
    gamma1: Prior = prior("Normal(0, 0.05)", "external shear")
    gamma2: Prior = prior("Normal(0, 0.05)", "external shear")
    source_x: Prior = prior("Normal(0, 0.15)", 'centre of the light of the source ["]')
    source_y: Prior = prior("Normal(0, 0.15)", 'centre of the light of the source ["]')
    source_size: Prior = prior("LogNormal(2.0, 0.4)", 'full width s of the 64x64 source image ["] (paper, eq. 15)')
    source_flux: Prior = prior("TruncatedNormal(1.0, 0.5, 0.05, 10)", "peak flux iota [flux unit of the lens]")
    background: Prior | None = Field(None, description="level of the background [flux unit]; none: zero")
    components: dict[str, Prior] = Field({}, description="of the parameters <name>_<parameter> of lens.components")
    light: dict[str, Prior] = Field({}, description="of the parameters <name>_<parameter> of lens.light")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if "r_Ein" not in data:
                data.setdefault("theta_E", "TruncatedNormal(1.2, 0.25, 0.4, 3.0)")
            if "q" not in data and "phi" not in data:
                data.setdefault("e1", "TruncatedNormal(0, 0.15, -0.45, 0.45)")
                data.setdefault("e2", "TruncatedNormal(0, 0.15, -0.45, 0.45)")
        return data

    @model_validator(mode="after")
    def _one_parametrisation(self) -> Priors:
        if (self.theta_E is None) == (self.r_Ein is None):
            raise ValueError("give exactly one of theta_E and r_Ein")
        given = [name for name in ("e1", "e2", "q", "phi") if getattr(self, name) is not None]
        if given not in (["e1", "e2"], ["q", "phi"]):
            raise ValueError(f"give either e1 and e2, or q and phi; found {', '.join(given)}")
        return self

    @model_validator(mode="after")
    def _shared_with_what_there_is(self) -> Priors:
        given = self.expressions()
        derived = [*(["q", "phi"] if self.e1 is not None else []), *(["theta_E"] if self.r_Ein is not None else [])]
        for name, other in shared(given).items():
            if other not in (*given, *derived):
                close = difflib.get_close_matches(other, [*given, *derived], n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join([*given, *derived])}"
                raise ValueError(f"{name} = {given[name]}: no parameter {other}; {hint}")
            if other in derived and name in ("r_Ein", "e1", "e2", "q"):
                raise ValueError(f"{name} = {given[name]}: {other} is derived itself; share a parameter with a prior")
        return self

    @model_validator(mode="after")
    def _within_their_domains(self) -> Priors:
        own = {name: name for name in type(self).model_fields}
        for name, prior in self.expressions().items():
            low, high = DOMAINS.get(own.get(name, name.partition("_")[2]), (-math.inf, math.inf))
            least, greatest = self.support(name)
            if not (low <= least and greatest <= high):
                found = f"{prior}, in [{least:g}, {greatest:g}]," if prior.distribution == "Shared" else prior
                raise ValueError(f"{name} = {found} reaches outside [{low:g}, {high:g}]; truncate it")
        return self

    def support(self, name: str) -> tuple[float, float]:
        """The interval outside which a parameter, given or derived, cannot be; shared ones have that of the other."""
        given = self.expressions()
        name = shared(given).get(name, name)
        if name in given:
            return given[name].support
        if name == "phi":
            return -math.pi / 2, math.pi / 2
        q = 2 / (1 + self.greatest_ellipticity()) - 1 if self.q is None else self.support("q")[0]
        if name == "q":
            return q, 1.0
        low, high = self.support("r_Ein")
        return math.sqrt(max(q, 0)) * low, high

    def greatest_ellipticity(self) -> float:
        """The length of the greatest (e1, e2) that their priors reach."""
        return math.hypot(*(max(map(abs, self.support(name))) for name in ("e1", "e2")))

    def expressions(self) -> dict[str, PriorExpression]:
        """The priors that are given, by name, in the order of the fields; those of components and light last."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name not in ("components", "light")}
        return {name: value for name, value in named.items() if value is not None} | self.components | self.light


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


NAME = r"[A-Za-z0-9_.+-]+"  # of a lens


class ObservedLens(Section):
    """One observed lens, written in config instead of in a table. Same fields as the columns of a table."""

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
        (), description="CSV or ECSV tables of observed lenses; paths inside are relative to them"
    )
    lenses: tuple[ObservedLens, ...] = Field((), description="observed lenses written here")
    preparation: Preparation | None = Field(
        None, description="how observed lenses are made ready; none: their images are fitted as they are"
    )


class Fit(Section):
    """MAP and Hamiltonian Monte Carlo for every lens (stage `fit`)."""

    shard_size: Count = Field(500, description="lenses in one job")
    batch_size: Count | Literal["auto"] = Field(
        "auto", description="lenses fitted together in one batched program; auto: as many as the memory holds"
    )
    search: Literal["gauss_newton", "adam"] = Field(
        "gauss_newton", description="MAP search; adam, the paper's, compares"
    )
    starts: Count = Field(24, description="starting points of the MAP search per lens, the scouts")
    scouts: Count = Field(8, description="scouts that go on after every rung of the ladder of temperatures")
    scout_pixels: int = Field(
        48, ge=8, description="least side of the image on whose coarse pixels the scouts climb [px]"
    )
    scout_components: Count = Field(32, description="principal components that a learned source has for the scouts")
    survivors: Count = Field(4, description="scouts that are followed with the whole source")
    rival_gap: Positive = Field(
        50.0, description="another solution that is not further below the best is followed to the end too [nat]"
    )
    temperatures: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (50.0, 25.0, 12.0, 6.0, 3.0, 1.5),
        min_length=1,
        description="factors on the noise, from first to last, that the scouts climb at",
    )
    settling_temperatures: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (6.0, 3.0, 1.5, 1.0), min_length=1, description="the same for those that survive, with the whole source"
    )
    steps_per_temperature: Count = Field(4, description="greatest number of Gauss-Newton steps at each temperature")
    final_steps: Count = Field(60, description="greatest number of Gauss-Newton steps on all pixels")
    explorations: int = Field(
        0, ge=0, description="times that annealed chains look for a solution with more evidence, at most"
    )
    adam_steps: Count = Field(10_000, description="steps of Adam, where it is the search; the paper's number")
    adam_learning_rate: Positive = Field(0.02, description="its first learning rate; it falls to zero")
    sampler: Literal["hmc", "pyro_nuts", "pyro_hmc", "svi_full_rank", "svi_low_rank"] = Field(
        "hmc", description="what draws from the posterior; all but hmc are for comparison, one lens at a time"
    )
    chains: int = Field(4, ge=2, description="Markov chains per lens")
    warmup: int = Field(200, ge=20, description="draws per chain that tune the step size and are thrown away")
    draws: int = Field(300, ge=20, description="draws kept per chain")
    target_accept: float = Field(0.8, gt=0.4, lt=1, description="mean acceptance that the step size is tuned to")
    rounds: Count = Field(
        2, description="rounds of draws for a lens that misses a gate; each makes as many draws as all before it"
    )
    r_hat_max: float = Field(1.05, gt=1, description="gate: greatest R-hat of the lens parameters")
    ess_min: float = Field(100, ge=0, description="gate: least effective sample size of them, bulk and tail")
    path_length: Positive = Field(3.0, description="mean trajectory length in whitened coordinates")
    max_leapfrog_steps: int = Field(32, ge=1, le=1024, description="greatest number of leapfrog steps of one draw")
    svi_steps: Count = Field(2000, description="steps of variational inference, where it is the sampler")
    svi_learning_rate: Positive = Field(0.01, description="its first learning rate; it falls to a hundredth")
    svi_rank: Count = Field(10, description="rank of the covariance of svi_low_rank, beside its diagonal")

    @model_validator(mode="after")
    def _ends_cold(self) -> Fit:
        if self.settling_temperatures[-1] != 1:
            raise ValueError(
                "the last of settling_temperatures must be 1 (the true noise), "
                f"found {self.settling_temperatures[-1]:g}"
            )
        return self


class Summary(Section):
    """One row a lens, with flags (stage `summary`). A lens beyond a threshold is `flagged`."""

    r_hat_max: float = Field(
        1.05,
        gt=1,
        description="greatest R-hat of any lens parameter; at 1.05 all chains together are 5 % wider than one of them",
    )
    ess_bulk_min: float = Field(
        100,
        ge=0,
        description="least bulk effective sample size of any lens parameter; with 100 a mean is known to 0.1 sd",
    )
    ess_tail_min: float = Field(
        100,
        ge=0,
        description="least tail effective sample size of any lens parameter; with 100 the share of draws beyond "
        "a 5 % quantile is known to 2 %",
    )
    divergence_fraction_max: float = Field(
        0.01,
        ge=0,
        le=1,
        description="greatest share of divergent draws; 1 % passes stray steps of a chain that is well tuned",
    )
    bfmi_min: float = Field(
        0.3,
        ge=0,
        description="least E-BFMI of a chain; 0.3 is Stan's own threshold, about 1 what a Gaussian has",
    )
    predictive_p_min: float = Field(
        1e-4,
        gt=0,
        lt=0.5,
        description="least predictive p-value of chi2, and of 1 minus it; chance alone flags two in 10,000 good fits",
    )
    chi2_floor: float = Field(
        0.02,
        ge=0,
        description="|chi2 per pixel - 1| below this is never flagged: noise maps are not known to better than 1 %",
    )
    chi2_measured_max: Positive = Field(
        0.5,
        description="greatest share by which chi2 per pixel is off what it is in the empty part of the image, where "
        "that was measured, in place of the two above; PSFs that are known to a few per cent add 0.3 in bright cores",
    )
    arc_snr_min: float = Field(
        10, ge=0, description="least signal-to-noise of the lensed source as a whole; below it there may be no arcs"
    )
    first_arc_snr_min: float = Field(
        20,
        ge=0,
        description="least signal-to-noise of the arcs that the preparation sees, where there is one; below it there "
        "may be no arcs: of 18 lenses none has less than 58, of ten galaxies that lens nothing eight have less than 20",
    )
    masked_max: Fraction = Field(0.3, description="greatest share of the fitted disc that may be masked")
    residual_excess_max: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="greatest excess of the correlation of neighbouring residuals on the arcs; 0.1 is a smooth "
        "residual of a third of the noise, which moves chi2 by a tenth there",
    )
    residual_significance: Positive = Field(
        4.0,
        description="an excess of fewer standard errors than this is never flagged; white noise has 4 in one lens of "
        "10,000",
    )
    starts_agreeing_min: Count = Field(
        2,
        description="least number of surviving starts that end in the best basin, where there are as many; what one of "
        "n starts found, n others would miss in a third of all cases, what two of four found in one of 16",
    )
    evidence_lead_min: float = Field(
        5.0,
        description="least lead of the best basin's log evidence over any other's [nat]; 5 leave the other 1/150 of "
        "the posterior, and 5 % where Laplace's approximation errs by 2",
    )
    prior_depth_max: Positive = Field(
        3.3,
        description="greatest median |w| of a named parameter, w standard normal under the prior; beyond 3.3 lies "
        "0.1 % of the prior, and so one of 12 parameters in 1.2 % of the lenses that the prior does describe",
    )
    ray_chi2_max: Positive = Field(
        25.0,
        description="greatest chi^2 between the lensed source and the same with twice the rays a pixel side; 25 are "
        "five standard deviations where all of it falls on one parameter",
    )
    magnification_min: float = Field(
        2.0,
        ge=0,
        description="least magnification of a source whose centre has a single image; a strong lens has more",
    )


class Report(Section):
    """The HTML page of the run (stage `report`)."""

    title: str = Field("lenspipe", description="heading of the page")
    lenses: int = Field(
        30, ge=0, description="greatest number of lenses drawn one by one; flagged and failed ones first"
    )
    reconstructions: Count = Field(8, description="number of test galaxies drawn with their reconstructions")


class Cluster(Section):
    """Where batches of lenses are fitted, inside stage `fit`; results do not depend on it, a change reruns nothing."""

    kind: Literal["local", "address", "slurm"] = Field(
        "local",
        description="local: processes of the machine or SLURM job that the stage runs in; address: a Dask scheduler "
        "that runs already; slurm: jobs that the stage itself submits, as many as it needs",
    )
    address: str | None = Field(
        None, description="of the scheduler, such as tcp://host:8786, or the path of its scheduler file"
    )
    site: str = Field(
        "workflow/profiles/slurm/dask.yaml",
        description="Dask's settings for the site, with what a SLURM job of a worker asks for; a relative path is "
        "taken from the folder the run is in, then from the one of the Snakefile",
    )
    jobs_min: int = Field(0, ge=0, description="SLURM jobs that are kept even with nothing to do")
    jobs_max: Count = Field(20, description="greatest number of SLURM jobs of one shard")
    retries: int = Field(
        2, ge=0, description="times that a batch is tried again after its worker died, before it is halved"
    )

    @model_validator(mode="after")
    def _complete(self) -> Cluster:
        if self.kind == "address" and not self.address:
            raise ValueError("kind is address, but no address is given; write that of the Dask scheduler")
        if self.jobs_min > self.jobs_max:
            raise ValueError(f"jobs_min ({self.jobs_min}) must not be above jobs_max ({self.jobs_max})")
        return self


class Config(Section):
    """All settings of a run."""

    seed: int = Field(1, ge=0, description="seed of everything random")
    survey: Survey = Survey()
    galaxies: Galaxies = Galaxies()
    vae: Vae = Vae()
    source: SourceSettings = LearnedSource()
    validation: Validation = Validation()
    deflection_table: DeflectionTable = DeflectionTable()
    lens: Lens = Lens()
    priors: Priors = Priors()
    mocks: Mocks = Mocks()
    catalogue: Catalogue = Catalogue()
    fit: Fit = Fit()
    cluster: Cluster = Cluster()
    summary: Summary = Summary()
    report: Report = Report()

    def conflicts(self) -> list[str]:
        """What is wrong between sections that are each good by themselves."""
        found = []
        mass = component_parameters(self.lens.mass_profiles)
        light = component_parameters(self.lens.light, LIGHT_PROFILES)
        for kind, needed, priors in (("components", mass, self.priors.components), ("light", light, self.priors.light)):
            if missing := sorted(set(needed) - with_axis_ratios(priors)):
                found.append(f"priors.{kind}: no prior of {', '.join(missing)}, which lens.{kind} needs")
            if unknown := sorted(with_axis_ratios(priors) - set(needed)):
                found.append(f"priors.{kind}: {', '.join(unknown)}: no such parameter of lens.{kind}")
            for name in [f"{component}_{e}" for component in ellipses(priors) for e in ("e1", "e2")]:
                if max(map(abs, self.priors.support(name))) > LARGEST_E:
                    found.append(f"priors.{kind}.{name} ({priors[name]}) reaches beyond {LARGEST_E}; truncate it")
        if both := sorted(set(mass) & set(light)):
            found.append(f"lens.components and lens.light both have {', '.join(both)}; give one of them another name")
        if self.lens.psf_supersampling not in (1, self.lens.supersampling):
            found.append(
                f"lens.psf_supersampling = {self.lens.psf_supersampling}: give 1 or lens.supersampling, "
                f"{self.lens.supersampling}"
            )
        if self.lens.deflection == "table":
            table, gamma = self.deflection_table, self.priors.support("gamma")
            if gamma[0] < table.gamma_min or gamma[1] > table.gamma_max:
                found.append(
                    f"priors.gamma ({self.priors.gamma}) reaches outside the deflection table "
                    f"[{table.gamma_min}, {table.gamma_max}]; truncate the prior or widen deflection_table"
                )
        for name, component in self.lens.components.items():
            axis_ratio = self.priors.components.get(f"{name}_q")
            if (
                component.profile == "epl"
                and axis_ratio is not None
                and self.priors.support(f"{name}_q")[0] < SERIES_Q_MIN
            ):
                found.append(
                    f"priors.components.{name}_q ({axis_ratio}) reaches below {SERIES_Q_MIN}, the least axis ratio of "
                    "the series that components are computed by; truncate it"
                )
        scaled = not self.lens.light or self.catalogue.preparation is not None
        if unscaled := [lens.name for lens in self.catalogue.lenses if not (scaled or lens.flux_unit)]:
            found.append(
                f"catalogue.lenses: {', '.join(unscaled)}: give flux_unit, the brightness of the source at "
                "source_flux = 1; with lens.light the brightest pixel of the image does not tell it"
            )
        least = self.deflection_table.q_min if self.lens.deflection == "table" else SERIES_Q_MIN
        if self.priors.q is not None and self.priors.support("q")[0] < least:
            remedy = " or lower deflection_table.q_min" if self.lens.deflection == "table" else ""
            reach = f"the deflection {self.lens.deflection} [{least}, 1]"
            found.append(f"priors.q ({self.priors.q}) reaches outside {reach}; truncate the prior{remedy}")
        if self.priors.e1 is not None and self.priors.e2 is not None:
            corner = self.priors.greatest_ellipticity()
            if not corner <= (1 - least) / (1 + least):
                found.append(
                    f"priors.e1 ({self.priors.e1}) and priors.e2 ({self.priors.e2}) reach an ellipticity of "
                    f"{corner:.3g}, beyond {(1 - least) / (1 + least):.3g}, the axis ratio {least}; truncate them"
                )
        if not self.has_mocks and not (self.catalogue.tables or self.catalogue.lenses):
            found.append("there is nothing to fit: no mocks are taken in, and no tables or lenses are given")
        return found

    @property
    def has_mocks(self) -> bool:
        """Whether the lens catalogue takes in mocks."""
        return self.catalogue.mocks and self.mocks.systems > 0

    @property
    def has_galaxies(self) -> bool:
        """Whether unlensed galaxies are needed: to learn the source from, or to be lensed as mocks."""
        return self.source.kind == "vae" or (self.has_mocks and self.mocks.source == "galaxies")

    @property
    def has_survey(self) -> bool:
        """Whether the galaxies come, at least in part, from the embedded synthetic survey."""
        return any(isinstance(source, SurveyInput) for source in self.galaxies.inputs)


def load_config(source: str | Path | dict[str, Any]) -> Config:
    """Read settings from a YAML file, from inline YAML or JSON that starts with `{`, or from a dict.

    Inline text may be a part of a run's settings, what one stage needs: sections are then not held against each other.
    Raises ConfigError naming every bad key, what was found and what was expected.
    """
    if isinstance(source, dict):
        return _validated(source, "config", whole=True)
    text = str(source)
    if text.lstrip().startswith("{"):
        return _validated(_parsed(text, "config"), "config", whole=False)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    return _validated(_parsed(path.read_text(), str(path)), str(path), whole=True)


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: expected sections with keys, found {type(data).__name__}")
    return data


def _validated(data: dict[str, Any], origin: str, *, whole: bool) -> Config:
    try:
        config = Config.model_validate(data)
        problems = config.conflicts() if whole else []
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
    if problems:
        raise ConfigError("\n".join([f"{origin}: {len(problems)} bad setting(s)", *(f"  {p}" for p in problems)]))
    return config


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), _known_keys(), n=1)
        return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    found = error.get("input")
    return f"{key}: {message}" + (f" (found {found!r})" if isinstance(found, str | int | float) else "")


def _known_keys() -> list[str]:
    schema = Config.model_json_schema()
    parts = [schema, *schema["$defs"].values()]
    return sorted({name for part in parts for name in part.get("properties", {})})


def json_schema() -> str:
    """The JSON schema of a config file, as text."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def expand_path(text: str, base: Path | None = None) -> Path:
    """A path from config or a table: `${VARIABLE}` and `~` expanded, relative ones taken from `base`.

    Raises ConfigError where a variable is not set.
    """
    for name in re.findall(r"\$\{(\w+)\}", text):
        if not os.environ.get(name):
            raise ConfigError(f"{text}: the environment variable {name} is not set; set it to the folder meant")
    path = Path(os.path.expandvars(text)).expanduser()
    return path if path.is_absolute() or base is None else base / path
