"""The summary: diagnostics against chains whose behaviour is known, flags, the wrap of position angles."""

from __future__ import annotations

import re
from pathlib import Path

import arviz_stats
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import xarray as xr
from astropy.table import Table

from lenspipe.catalogue.reading import FOUND
from lenspipe.config import Summary
from lenspipe.posteriors import shards, writing
from lenspipe.posteriors.shards import Group
from lenspipe.report.page import FLAGS
from lenspipe.results import Results
from lenspipe.summary import (
    all_rows,
    ascii_text,
    diagnostics,
    find_flags,
    group_rows,
    moments,
    on_the_sky,
    unit_of,
    unwrapped,
    write_summary,
)
from tests.conftest import ROOT
from tests.posteriors import posteriors, write_catalogue, write_store

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
    "ray_chi2": 2.0,
    "images_map": 4,
    "magnification_median": 8.0,
    "arc_snr": 60.0,
    "draws_above_map": -20.0,
    "draws": 1000,
    "theta_E_median": 1.2,
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


def test_amplitudes_of_a_set_of_gaussians_need_not_agree() -> None:
    """Neighbours stand in for each other; the amplitude of a single profile has to be agreed on."""
    good, apart = autoregressive(0.0, (1, 4, 300)), autoregressive(0.0, (1, 4, 300))
    apart[0, 2] += 5.0
    assert diagnostics({"theta_E": good, "bulge_amplitude3": apart})["r_hat_max"][0] < 1.02
    assert diagnostics({"theta_E": good, "bulge_amplitude": apart})["r_hat_max"][0] > 1.5


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
        ({"ray_chi2": 30.0}, ["rays"]),
        ({"images_map": 1}, []),
        ({"images_map": 1, "magnification_median": 1.4}, ["single_image"]),
        ({"images_map": 0, "magnification_median": float("nan")}, ["single_image", "demagnified"]),
        ({"images_map": 2, "magnification_median": 0.9}, ["demagnified"]),
        ({"images_map": 2, "magnification_median": 1.1}, []),
        ({"converged": False, "r_hat_max": 3.0}, ["r_hat", "map_not_converged"]),
        ({"arc_snr": 4.0}, ["no_arcs"]),
        ({"first_arc_snr": 0.0}, ["no_arcs"]),
        ({"first_arc_snr": 59.0}, []),
        ({"draws_above_map": 5.0}, ["map_not_converged"]),
        ({"draws_above_map": 0.3}, []),
        ({"arc_radius": 2.7}, ["arcs_outside"]),
        ({"arc_radius": 2.4}, []),
        ({"arc_radius": float("nan")}, []),
        ({"companions": 1}, ["companion"]),
        ({"companions": 0, "masked": 0.1}, []),
        ({"masked": 0.5}, ["masked"]),
        ({"chi2_expected": 0.6, "chi2_per_pixel": 0.65, "predictive_p": 1.0}, []),  # as where the image is empty
        ({"chi2_expected": 0.6, "chi2_per_pixel": 0.95, "predictive_p": 0.99}, ["chi2_high"]),
        ({"chi2_expected": 0.9, "chi2_per_pixel": 0.5, "predictive_p": 1.0}, ["chi2_low"]),
    ],
)
def test_flags(change: dict[str, float], flags: list[str]) -> None:
    assert find_flags(GOOD | change, Summary()) == flags


def test_the_report_and_the_docs_explain_every_flag() -> None:
    bad = {name: float("nan") for name in GOOD} | {"converged": False, "companions": 2, "masked": 0.9}
    bad |= {"arc_radius": 3.0, "theta_E_median": 1.2}
    assert {*find_flags(bad, Summary()), "failed"} == FLAGS.keys()
    table = (ROOT / "docs/results.md").read_text().split("| flag | meaning |")[1].split("\n\n")[0]
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


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Two shards of lenses with a posterior, one lens that failed, one that could not be used, one not fitted yet."""
    write_store(tmp_path / "fit/shard-0000.zarr", {"small": [posteriors(["a", "b"], seed=1)]}, {"lost": "no memory"})
    write_store(tmp_path / "fit/shard-0001.zarr", {"small": [posteriors(["c"], seed=2)]}, {"café": "no PSF"})
    write_catalogue(tmp_path / "catalogue", {"small": ["c", "b", "a", "lost", "late"]}, ["café"])
    return Results(tmp_path)


def test_three_tables_say_the_same(results: Results) -> None:
    """Every lens in the order of the catalogue; ArviZ's numbers; units in FITS and Parquet."""
    write_summary(Summary(), results)
    table = pd.read_csv(results.summary)
    assert table["name"].tolist() == ["c", "b", "a", "lost", "late", "café"]
    assert table["status"].tolist()[3:] == ["failed"] * 3
    assert table["reason"].tolist()[3:] == ["no memory", "not fitted", "no PSF"]
    assert table["true_theta_E"].notna().tolist() == [True] * 5 + [False]
    draws = posteriors(["a", "b"], seed=1).isel(lens=1)
    expected = arviz_stats.summary(
        xr.DataTree.from_dict({"posterior": draws[["theta_E", "source_flux"]]}), kind="all", round_to="none"
    )
    row = table.iloc[1]
    for name in ("theta_E", "source_flux"):
        for ours, theirs in {"mean": "mean", "sd": "sd", "r_hat": "r_hat", "ess_bulk": "ess_bulk"}.items():
            assert row[f"{name}_{ours}"] == pytest.approx(float(expected.loc[name, theirs]), rel=1e-5), (name, ours)
        assert row[f"{name}_median"] == pytest.approx(float(draws[name].median()), rel=1e-5)
        assert row[f"{name}_map"] == pytest.approx(float(draws[f"{name}_map"]))
    fits, parquet = (
        Table.read(results.summary.with_suffix(".fits")),
        pq.read_table(results.summary.with_suffix(".parquet")),
    )
    assert fits.colnames == parquet.column_names == list(table.columns)
    for name in table:
        ours = table[name].to_numpy()
        if ours.dtype.kind in "fiub":
            np.testing.assert_array_equal(np.asarray(fits[name]), ours, err_msg=name)
            np.testing.assert_array_equal(parquet[name].to_numpy(), ours, err_msg=name)
        else:
            assert parquet[name].to_pylist() == table[name].fillna("").tolist(), name
    for name, unit in {"theta_E_median": "arcsec", "phi_p16": "rad", "seconds": "s", "true_theta_E": "arcsec"}.items():
        assert str(fits[name].unit) == unit
        assert parquet.schema.field(name).metadata[b"unit"] == unit.encode()
    assert fits["gamma_mean"].unit is fits["theta_E_r_hat"].unit is fits["name"].unit is None


def test_a_background_that_is_fitted_stands_beside_the_one_that_was_found(tmp_path: Path) -> None:
    """The catalogue's columns of a preparation, and those of a parameter of that name."""
    write_catalogue(tmp_path / "catalogue", {"small": ["a"]})
    lenses = tmp_path / "catalogue/lenses.csv"
    found = pd.read_csv(lenses).assign(**dict.fromkeys(FOUND, 3.0))
    found.to_csv(lenses, index=False)
    data = posteriors(["a"], seed=1)
    data = data.assign(background=data["theta_E"], background_map=data["theta_E_map"])
    write_store(tmp_path / "fit/shard-0000.zarr", {"small": [data]})
    row = all_rows(Summary(), Results(tmp_path)).iloc[0]
    assert row["background_sd"] == pytest.approx(row["theta_E_sd"])
    assert [row[name] for name in FOUND] == [3.0] * len(FOUND)


@pytest.mark.parametrize("parity", [1.0, -1.0])
def test_position_angles_are_between_minus_90_and_90(parity: float) -> None:
    """From North towards East, where East is a quarter turn counter-clockwise from it, and where it is clockwise."""
    north = np.radians([90.0, 90.0, 0.0, 20.0])
    turned = np.radians([0.0, 90.0, -60.0, 30.0])
    table = pd.DataFrame({"north": north, "parity": parity})
    table = table.assign(**{f"phi_{key}": north + parity * turned for key in ("median", "p16", "p84")})
    assert on_the_sky(table)["position_angle_median"].tolist() == pytest.approx([0.0, 90.0, -60.0, 30.0])


def test_summary_in_blocks_is_that_of_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"lens-{i}" for i in range(10)]
    write_catalogue(tmp_path / "catalogue", {"small": names})
    monkeypatch.setattr(writing, "BLOCK", 4)
    write_store(tmp_path / "fit/shard-0000.zarr", {"small": [posteriors(names, seed=1)]})
    whole = all_rows(Summary(), Results(tmp_path))
    sizes = []
    read = Group.read
    monkeypatch.setattr(shards, "BLOCK", 4)
    monkeypatch.setattr(Group, "read", lambda group, *of: sizes.append(len(group.rows)) or read(group, *of))
    pd.testing.assert_frame_equal(all_rows(Summary(), Results(tmp_path)), whole)
    assert sizes == [4, 4, 2]
    pd.testing.assert_frame_equal(all_rows(Summary(), Results(tmp_path), workers=2), whole)


def test_a_run_without_a_posterior_has_a_summary(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "catalogue", {"small": ["a"]}, ["b"])
    write_store(tmp_path / "fit/shard-0000.zarr", {}, {"a": "no memory", "b": "no PSF"})
    write_summary(Summary(), Results(tmp_path))
    assert pd.read_csv(tmp_path / "summary/lenses.csv")["reason"].tolist() == ["no memory", "no PSF"]
    assert len(Table.read(tmp_path / "summary/lenses.fits")) == 2


def test_units_of_parameters_that_are_called_as_statistics_are() -> None:
    for column in ("bulge_sd_median", "bulge_sd_sd", "true_bulge_sd", "halo_sd_min_p16", "halo_sd_max_map"):
        assert unit_of(column) == "arcsec", column
    for column in ("bulge_sd_r_hat", "gamma_sd", "true_gamma"):
        assert unit_of(column) is None, column


def test_statistics_of_draws_of_which_some_have_no_value() -> None:
    """As an Einstein radius where a critical curve does not close: few of them may lack it."""
    values = np.random.default_rng(1).normal(size=(3, 200))
    expected = moments("x", values)
    values[1, :15] = values[2, 1:] = np.nan
    found = moments("x", values)
    for name, of_all in expected.items():
        assert found[name][0] == of_all[0], name
        assert abs(found[name][1] - of_all[1]) < 0.3, name
        assert np.isnan(found[name][2]), name


def test_a_draw_that_is_no_number_has_not_converged() -> None:
    """Nor does it pass any gate."""
    draws = autoregressive(0.0, (1, 4, 300))
    draws[0, 0, 0] = np.nan
    found = diagnostics({"theta_E": draws})
    assert np.isnan(found["r_hat_max"][0])
    row = GOOD | {name: values[0] for name, values in found.items()} | {"draws_above_map": np.nan}
    assert {"r_hat", "ess", "map_not_converged"} <= set(find_flags(row, Summary()))


def test_angles_at_the_map_are_on_the_branch_of_their_draws(tmp_path: Path) -> None:
    lenses = posteriors(["a"], seed=1)
    phi = np.pi / 2 + 0.01 * np.random.default_rng(0).normal(size=lenses["phi"].shape)
    wrapped = (phi + np.pi / 2) % np.pi - np.pi / 2
    lenses = lenses.assign(phi=(lenses["phi"].dims, wrapped), phi_map=("lens", [np.pi / 2 - 0.02]))
    row = group_rows(lenses).iloc[0]
    assert abs(row["phi_map"] - row["phi_median"]) < 0.1
    row = group_rows(lenses.assign(phi_map=("lens", [-np.pi / 2 + 0.02]))).iloc[0]
    assert abs(row["phi_map"] - row["phi_median"]) < 0.1
