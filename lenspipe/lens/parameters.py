"""Names of the parameters of every mass profile, as settings need them: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping

CENTER = ("center_x", "center_y")
MASS_PROFILES: dict[str, tuple[str, ...]] = {
    "epl": ("theta_E", "gamma", "q", "phi", *CENTER),
    "sie": ("theta_E", "q", "phi", *CENTER),
    "sis": ("theta_E", *CENTER),
    "shear": ("gamma1", "gamma2"),
    "sheet": ("kappa",),
    "point_mass": ("theta_E", *CENTER),
    "nfw": ("alpha_Rs", "Rs", *CENTER),
    "tnfw": ("alpha_Rs", "Rs", "r_trunc", *CENTER),
}


def component_parameters(profiles: Mapping[str, str]) -> tuple[str, ...]:
    """Names of all parameters of components {name: profile}: `<name>_<parameter>`, without prefix for the name ""."""
    return tuple(
        qualified(component, name) for component, profile in profiles.items() for name in MASS_PROFILES[profile]
    )


def qualified(component: str, parameter: str) -> str:
    """The name of a component's parameter."""
    return f"{component}_{parameter}" if component else parameter
