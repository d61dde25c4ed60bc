"""The source: how it is learned and drawn, and how that is validated."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from lenspipe.config.fields import Count, Fraction, Positive, Prior, Section, prior
from lenspipe.prior_expression import PriorExpression


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
    augment: bool = Field(True, description="turn and flip the training images at random")
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
