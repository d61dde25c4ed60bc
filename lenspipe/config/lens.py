"""The lens: the deflection table, the forward model and the priors."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from lenspipe.config.fields import Prior, Section, prior
from lenspipe.prior_expression import PriorExpression, shared


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


RESERVED = ("model", "source", "true")  # with which names of pictures, of the source and of truths begin


def _not_reserved(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"{name!r} is the beginning of other names in the results; call the component something else")
    return name


ComponentName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*$"), AfterValidator(_not_reserved)]
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
        for name, given in self.expressions().items():
            low, high = DOMAINS.get(own.get(name, name.partition("_")[2]), (-math.inf, math.inf))
            least, greatest = self.support(name)
            if not (low <= least and greatest <= high):
                found = f"{given}, in [{least:g}, {greatest:g}]," if given.distribution == "Shared" else given
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
