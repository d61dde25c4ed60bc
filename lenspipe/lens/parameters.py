"""Names of the parameters of every mass and light profile, as settings need them: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SERIES_Q_MIN = 0.01  # least axis ratio of the series of the elliptical power law
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


MGE_AMPLITUDES = tuple(f"amplitude{k}" for k in range(6))  # of the Gaussians of a multi-Gaussian expansion
LIGHT_PROFILES: dict[str, tuple[str, ...]] = {
    "sersic": ("amplitude", "R_sersic", "n_sersic", "q", "phi", *CENTER),
    "gaussian": ("amplitude", "sd", "q", "phi", *CENTER),
    "mge": (*MGE_AMPLITUDES, "sd_min", "sd_max", "q", "phi", *CENTER),
}


def component_parameters(
    profiles: Mapping[str, str], known: Mapping[str, tuple[str, ...]] = MASS_PROFILES
) -> tuple[str, ...]:
    """Names of all parameters of components {name: profile}: `<name>_<parameter>`, without prefix for the name ""."""
    return tuple(qualified(component, name) for component, profile in profiles.items() for name in known[profile])


def with_axis_ratios(given: Iterable[str]) -> set[str]:
    """Names of the parameters of components, with `<name>_q, <name>_phi` where `<name>_e1, <name>_e2` are given."""
    names = set(given)
    for component in ellipses(names):
        if not names & {f"{component}_q", f"{component}_phi"}:
            names = names - {f"{component}_e1", f"{component}_e2"} | {f"{component}_q", f"{component}_phi"}
    return names


def ellipses(given: Iterable[str]) -> list[str]:
    """The components that have both e1 and e2 among the names given."""
    names = set(given)
    return sorted(
        name.removesuffix("_e1") for name in names if name.endswith("_e1") and f"{name.removesuffix('_e1')}_e2" in names
    )


def qualified(component: str, parameter: str) -> str:
    """The name of a component's parameter."""
    return f"{component}_{parameter}" if component else parameter
