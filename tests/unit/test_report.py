"""The report: its tables against numbers worked out by hand, and figures of data at their limits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lenspipe.galaxies.dataset import evenly
from lenspipe.report import figures
from lenspipe.report.lens import starts_table
from lenspipe.report.page import cuts_table, results_section
from lenspipe.report.recovery import near, pulls, pulls_table
from lenspipe.report.table import decimals, within_error


def lens(name: str, status: str = "ok", **values: float) -> dict[str, object]:
    """A row of the summary with theta_E = 1.1 +- 0.1 and the rest of the lens parameters at 0 +- 1."""
    row: dict[str, object] = {"name": name, "status": status, "flags": "", "reason": "", "origin": "mock"}
    row |= {"anchor": name, "chi2_per_pixel": 1.0}
    for parameter in ("theta_E", "gamma", "q", "phi", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2"):
        median, error = (1.1, 0.1) if parameter == "theta_E" else (0.0, 1.0)
        row |= {f"{parameter}_p16": median - error, f"{parameter}_median": median, f"{parameter}_p84": median + error}
    return row | values


def test_cuts_add_up_in_their_row() -> None:
    rows = [
        ("survey", "read", 0, 2400),
        ("survey", "bad_pixels", 400, 2000),
        ("survey", "stamp_too_small", 5, 1995),
        ("cosmos.fits", "read", 0, 10),
        ("cosmos.fits", "bad_pixels", 10, 0),
        ("cosmos.fits", "stamp_too_small", 0, 0),
    ]
    cuts = pd.DataFrame(rows, columns=["input", "cut", "removed", "left"])
    table = cuts_table(cuts)
    assert table.heads == ["input", "read", "bad pixels", "too small", "kept"]
    assert table.rows[0] == ["embedded survey (synthetic)", "2,400", "400", "5", "1,995"]
    assert table.rows[1] == ["cosmos.fits", "10", "10", "0", "0"]


@pytest.mark.parametrize(
    ("error", "digits"), [(0.0123, 3), (0.5, 2), (1.0, 1), (30.0, 0), (0.0, 3), (float("nan"), 3), (1e-9, 6)]
)
def test_two_digits_of_an_error_are_shown(error: float, digits: int) -> None:
    assert decimals(error) == digits


def test_medians_are_shown_to_their_error() -> None:
    assert within_error(lens("a"), "theta_E") == "1.10 ± 0.10"
    assert within_error({}, "theta_E") == "–"


def test_pulls() -> None:
    table = pd.DataFrame([lens("a", true_theta_E=1.0), lens("b", true_theta_E=1.3), lens("c")])
    assert pulls(table, "theta_E") == pytest.approx([1.0, -2.0])


def test_pulls_of_angles_do_not_see_the_wrap() -> None:
    table = pd.DataFrame([lens("a", true_phi=np.pi - 0.1, phi_p16=-0.1, phi_p84=0.1)])
    assert pulls(table, "phi") == pytest.approx([1.0])
    assert near(3.0, 0.0) == pytest.approx(3.0 - np.pi)


def test_pulls_are_counted_over_all_and_over_ok_lenses() -> None:
    rows = [lens("a", true_theta_E=1.0), lens("b", "flagged", true_theta_E=1.4)]
    table = pulls_table(pd.DataFrame(rows))
    assert table.rows == [["theta_E", "2", "-1.00 ± 0.71", "2.24", "0%", "1", "+1.00 ± 1.00", "1.00", "0%"]]


def test_starts_are_listed_best_first_and_the_lost_last() -> None:
    table = starts_table(np.array([-20.0, -10.0, np.nan]), np.array([1, 0, -1]), np.array([-30.0, -37.5, np.nan]))
    assert table.rows == [
        ["2", "-10.0", "0.0", "1", "0.0"],
        ["1", "-20.0", "10.0", "2", "7.5"],
        ["3", "nan", "nan", "–", "–"],
    ]


def test_rows_spread_evenly() -> None:
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(2, 4) == [0, 1]
    assert evenly(0, 4) == []


def test_results_of_failed_lenses_alone() -> None:
    """A run in which nothing was fitted has a table of its failures and no recovery."""
    failed = {"name": "a", "status": "failed", "flags": "failed", "reason": "no such file", "origin": "t.csv"}
    section = results_section(pd.DataFrame([failed | {"anchor": "lens-0"}]))
    assert section["counts"] == {"failed": 1, "flagged": 0, "ok": 0}
    assert section["recovery"] is None
    assert section["rows"][0]["cells"][0] == "–"


@pytest.mark.parametrize(
    "draws",
    [np.ones((2, 30)), np.random.default_rng(0).normal(size=(2, 30)), np.linspace(0, 1e-12, 60).reshape(2, 30)],
    ids=["constant", "normal", "nearly constant"],
)
def test_chains_and_corner_of_any_draws(draws: np.ndarray) -> None:
    assert figures.embedded(figures.chains_plot({"theta_E": draws})).startswith("data:image/png;base64,")
    corner = figures.corner_plot({"theta_E": draws, "gamma": draws + 1}, {"theta_E": 0.5})
    assert (corner is None) == (np.ptp(draws) == 0)


def test_image_without_light_or_with_masked_pixels() -> None:
    image = np.zeros((20, 20))
    usable = np.ones((20, 20), dtype=bool)
    usable[:5] = False
    drawn = figures.image_plane(image, image, np.ones((20, 20)), usable, 0.1, np.zeros((4, 2)))
    assert len(drawn.axes) == 5
    source = figures.source_plane(image, image, (-1, 1, -1, 1), image, (-2, 2, -1, 1), "true", np.zeros((4, 2)))
    assert figures.embedded(source)


def test_arcs_without_a_first_look_have_two_panels() -> None:
    image, usable = np.random.default_rng(0).normal(size=(20, 20)), np.ones((20, 20), bool)
    blank, no_arcs, curve = np.zeros((20, 20)), np.zeros((20, 20), bool), np.zeros((4, 2))

    def panels(first: np.ndarray) -> int:
        drawn = figures.arcs_plane(image, blank, image, first, no_arcs, usable, np.ones((20, 20)), 0.1, curve)
        return sum(axes.get_visible() and bool(axes.get_title()) for axes in drawn.axes)

    assert (panels(blank), panels(image)) == (2, 3)
