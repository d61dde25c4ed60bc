"""The summary: diagnostics against chains whose behaviour is known, flags, the wrap of position angles."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from lenspipe.config import Summary
from lenspipe.report.page import FLAGS
from lenspipe.summary import ascii_text, diagnostics, find_flags, unwrapped
from tests.conftest import ROOT

GOOD = {
    "pixels": 4096,
    "r_hat_max": 1.01,
    "ess_bulk_min": 500.0,
    "ess_tail_min": 400.0,
    "divergences": 0,
    "bfmi_min": 0.9,
    "chi2_per_pixel": 1.0,
    "predictive_p": 0.4,
    "residual_excess": 0.01,
    "residual_excess_error": 0.03,
    "converged": True,
    "starts": 4,
    "starts_agreeing": 3,
    "evidence_lead": float("inf"),
    "prior_depth": 1.5,
    "images_map": 4,
    "magnification_median": 8.0,
}


def autoregressive(correlation: float, shape: tuple[int, int, int]) -> np.ndarray:
    """Chains [lens, chain, draw] of unit variance whose neighbours correlate."""
    noise = np.random.default_rng(3).normal(size=shape)
    chain = noise.copy()
    for draw in range(1, shape[2]):
        chain[..., draw] = correlation * chain[..., draw - 1] + np.sqrt(1 - correlation**2) * noise[..., draw]
    return chain


def test_diagnostics_of_chains_that_agree() -> None:
    """Effective number of draws of an AR(1) process: n (1 - rho) / (1 + rho), within a quarter."""
    found = diagnostics({"theta_E": autoregressive(0.5, (3, 4, 2000))})
    assert found["r_hat_max"] == pytest.approx(np.ones(3), abs=0.01)
    assert found["ess_bulk_min"] == pytest.approx(np.full(3, 8000 / 3), rel=0.25)


def test_diagnostics_are_those_of_the_worst_parameter_of_each_lens() -> None:
    good, apart = autoregressive(0.0, (2, 4, 300)), autoregressive(0.0, (2, 4, 300))
    apart[1, 2] += 5.0
    found = diagnostics({"theta_E": good, "gamma": apart, "fixed": np.ones((2, 4, 300))})
    assert found["r_hat_max"][0] < 1.02
    assert found["r_hat_max"][1] > 1.5
    assert found["ess_bulk_min"][1] < 20 < found["ess_bulk_min"][0]


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({}, []),
        ({"r_hat_max": 1.2}, ["r_hat"]),
        ({"r_hat_max": float("nan")}, ["r_hat"]),
        ({"ess_bulk_min": 20.0}, ["ess"]),
        ({"divergences": 11}, ["divergences"]),
        ({"divergences": 10}, []),
        ({"ess_tail_min": 20.0}, ["ess"]),
        ({"bfmi_min": 0.2}, ["energy"]),
        ({"bfmi_min": float("nan")}, ["energy"]),
        ({"chi2_per_pixel": 1.2, "predictive_p": 1e-9}, ["chi2_high"]),
        ({"chi2_per_pixel": 1.2, "predictive_p": 0.01}, []),  # few pixels may scatter more
        ({"chi2_per_pixel": 1.01, "predictive_p": 1e-9}, []),  # many pixels tell what no noise map is good for
        ({"chi2_per_pixel": 0.8, "predictive_p": 1.0}, ["chi2_low"]),
        ({"chi2_per_pixel": 0.8, "predictive_p": 0.5}, []),  # many unknowns: the MAP follows the noise
        ({"chi2_per_pixel": float("nan"), "predictive_p": float("nan")}, ["chi2_high", "chi2_low"]),
        ({"residual_excess": 0.2}, ["residuals"]),
        ({"residual_excess": 0.2, "residual_excess_error": 0.06}, []),
        ({"residual_excess": 0.08, "residual_excess_error": 0.01}, []),
        ({"residual_excess": -0.3}, []),
        ({"starts_agreeing": 1}, ["lone_start"]),
        ({"starts_agreeing": 2}, []),
        ({"starts_agreeing": 0}, ["lone_start"]),
        ({"starts_agreeing": 1, "starts": 1}, []),
        ({"evidence_lead": 3.0}, ["rival_basin"]),
        ({"evidence_lead": -8.0}, ["rival_basin"]),
        ({"evidence_lead": 20.0}, []),
        ({"prior_depth": 3.6}, ["prior_edge"]),
        ({"images_map": 1}, []),
        ({"images_map": 1, "magnification_median": 1.4}, ["single_image"]),
        ({"images_map": 0, "magnification_median": float("nan")}, ["single_image"]),
        ({"converged": False, "r_hat_max": 3.0}, ["r_hat", "map_not_converged"]),
    ],
)
def test_flags(change: dict[str, float], flags: list[str]) -> None:
    assert find_flags(GOOD | change, 1000, Summary()) == flags


def test_the_report_and_the_readme_explain_every_flag() -> None:
    bad = {name: float("nan") for name in GOOD} | {"converged": False}
    assert {*find_flags(bad, 1000, Summary()), "failed"} == FLAGS.keys()
    table = (ROOT / "README.md").read_text().split("| flag | meaning |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(FLAGS)


def test_angles_on_both_sides_of_the_wrap_are_brought_together() -> None:
    generator = np.random.default_rng(0)
    angle = np.pi / 2 + 0.05 * generator.normal(size=(2, 2, 50))
    wrapped = (angle + np.pi / 2) % np.pi - np.pi / 2
    assert np.ptp(wrapped, axis=(1, 2)).min() > 3
    together = unwrapped(wrapped)
    assert np.ptp(together, axis=(1, 2)).max() < 0.6
    np.testing.assert_allclose(np.sin(together - wrapped), 0, atol=1e-12)


def test_text_of_any_language_fits_into_fits() -> None:
    assert ascii_text(pd.Series(["Caf\xe9/l.csv", "plain"])).tolist() == ["Caf\\xe9/l.csv", "plain"]
