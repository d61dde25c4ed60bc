"""The table of a run as LaTeX and VOTable, and what of it needs the header or the zero point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io.votable import parse_single_table

from lenspipe.errors import InputError
from lenspipe.export_table import export_table, quantiles
from lenspipe.results import Results
from lenspipe.summary import on_the_sky


def row(name: str, theta_E: float) -> dict[str, object]:
    found = {"name": name, "status": "ok", "flags": "", "reason": "", "origin": "t.csv", "prior_depth_of": "gamma"}
    for key, low, middle, high in (("theta_E", theta_E - 0.012, theta_E, theta_E + 0.02), ("gamma", 1.9, 2.0, 2.1)):
        found |= {f"{key}_p16": low, f"{key}_median": middle, f"{key}_p84": high}
    return found


@pytest.fixture
def paths(tmp_path: Path) -> Results:
    paths = Results(tmp_path)
    paths.summary.parent.mkdir()
    failed = {"name": "J_bad", "status": "failed", "flags": "failed", "reason": "no PSF", "origin": "t.csv"}
    pd.DataFrame([row("J1", 1.1), row("J2", 0.7), failed]).to_csv(paths.summary, index=False)
    return paths


def test_latex(paths: Results, tmp_path: Path) -> None:
    assert export_table(paths, tmp_path / "t.tex") == 3
    lines = (tmp_path / "t.tex").read_text().splitlines()
    assert r"J1 & $1.100^{+0.020}_{-0.012}$ & $2.00^{+0.10}_{-0.10}$ & ok \\" in lines
    assert r"J\_bad & \ldots & \ldots & failed \\" in lines
    assert {line.count("&") for line in lines if "&" in line} == {3}


def test_votable_has_units(paths: Results, tmp_path: Path) -> None:
    assert export_table(paths, tmp_path / "t.vot", ["J2"]) == 1
    table = parse_single_table(tmp_path / "t.vot").to_table()
    assert table["theta_E_median"].unit == "arcsec"
    assert float(table["theta_E_median"][0]) == pytest.approx(0.7)


def test_bad_requests(paths: Results, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="J9: no such lens"):
        export_table(paths, tmp_path / "t.tex", ["J9"])
    with pytest.raises(InputError, match=r"t.doc: a table is written as .tex, .vot, .xml"):
        export_table(paths, tmp_path / "t.doc")
    with pytest.raises(InputError, match="run the stage summary first"):
        export_table(Results(tmp_path / "elsewhere"), tmp_path / "t.tex")


def test_numbers_have_two_digits_of_their_error() -> None:
    assert quantiles({"x_p16": 0.9, "x_median": 1.0, "x_p84": 1.3}, "x") == "$1.00^{+0.30}_{-0.10}$"
    assert quantiles({"x_p16": 1.0, "x_median": 1.0, "x_p84": 1.0}, "x") == "$1.0000^{+0.0000}_{-0.0000}$"


@pytest.mark.parametrize(
    ("north", "parity", "phi", "angle"),
    [(90.0, 1.0, 90.0, 0.0), (90.0, 1.0, 120.0, 30.0), (60.0, 1.0, 20.0, -40.0), (90.0, -1.0, 120.0, -30.0)],
)
def test_position_angle_is_east_of_north(north: float, parity: float, phi: float, angle: float) -> None:
    phis = {f"phi_{key}": [np.radians(phi + off)] for key, off in (("p16", -3), ("median", 0), ("p84", 5))}
    found = on_the_sky(pd.DataFrame({"north": [np.radians(north)], "parity": [parity]} | phis)).iloc[0]
    assert found["position_angle_median"] == pytest.approx(angle)
    below, above = (3, 5) if parity > 0 else (5, 3)
    assert found["position_angle_p16"] == pytest.approx(angle - below)
    assert found["position_angle_p84"] == pytest.approx(angle + above)


def test_magnitude_of_the_source() -> None:
    table = pd.DataFrame({"zero_point": [25.0, np.nan], "source_total_flux_median": [100.0, 100.0],
                          "source_total_flux_p16": [90.0, 90.0], "source_total_flux_p84": [110.0, 110.0]})  # fmt: skip
    found = on_the_sky(table)
    assert found["source_magnitude_median"][0] == pytest.approx(20.0)
    assert found["source_magnitude_p16"][0] < 20 < found["source_magnitude_p84"][0]
    assert np.isnan(found["source_magnitude_median"][1])
