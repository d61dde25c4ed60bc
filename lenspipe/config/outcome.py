"""The summary of the fits and the report."""

from __future__ import annotations

from pydantic import Field

from lenspipe.config.fields import Count, Fraction, Positive, Section


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
    arc_radius_max: Positive = Field(
        2.2,
        description="greatest mean radius of the arcs that the preparation saw, in theta_E; beyond 2 an isothermal "
        "lens has one image, so that the arcs are hardly its own: of 14 lenses that are right none has more than 2.02",
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
        description="least number of starts that end in the best basin, where there are as many; those that were "
        "dropped as copies count with them; what one of n found, n others would miss in a third of all cases",
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
        30, ge=0, description="greatest number of lenses drawn one by one, flagged ones first; all are in its table"
    )
    reconstructions: Count = Field(8, description="number of test galaxies drawn with their reconstructions")
