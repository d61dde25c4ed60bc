"""Runs of the same lenses compared by their evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lenspipe.cli import app
from lenspipe.compare import compare
from lenspipe.errors import InputError
from lenspipe.results import Results


def run(folder: Path, evidence: dict[str, float], hashes: dict[str, str]) -> Results:
    """A run with a catalogue and a summary."""
    paths = Results(folder)
    for path in (paths.catalogue, paths.summary):
        path.parent.mkdir(parents=True)
    rows = [
        {"name": name, "status": "ok", "reason": "", "theta_E_median": 1.2, "gamma_median": 2.0, "chi2_per_pixel": 1.0}
        for name in hashes
    ]
    pd.DataFrame(rows).assign(log_evidence=[evidence.get(name, np.nan) for name in hashes]).to_csv(
        paths.summary, index=False
    )
    pd.DataFrame({"name": list(hashes), "hash": list(hashes.values()), "status": "usable"}).to_csv(
        paths.catalogue.with_name("lenses.csv"), index=False
    )
    return paths


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Results]:
    """Of A, B and C the data are the same, D is another image; C has no fit in one run, E in none."""
    hashes = {"A": "1", "B": "2", "C": "3", "D": "4", "E": "5", "F": ""}
    smooth = run(tmp_path / "smooth", {"A": -900.0, "B": -50.0, "C": -7.0, "D": -1.0, "F": -2.0}, hashes)
    learned = run(tmp_path / "learned", {"A": -880.5, "B": -62.0, "D": -3.0, "F": -1.0}, hashes | {"D": "other"})
    return {"smooth": smooth, "learned": learned}


def test_the_run_with_most_evidence_is_preferred(runs: dict[str, Results]) -> None:
    rows = compare(runs).set_index("name")
    assert rows["preferred"].to_dict() == {"A": "learned", "B": "smooth", "C": "smooth", "E": ""}
    assert rows["lead"][["A", "B", "C"]].tolist() == [19.5, 12.0, np.inf]
    assert np.isnan(rows["lead"]["E"])
    assert rows["log_evidence:smooth"]["A"] == -19.5
    assert np.isnan(rows["log_evidence:learned"]["C"])
    assert rows["theta_E_median:learned"]["A"] == 1.2


def test_what_cannot_be_compared_is_said(runs: dict[str, Results], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one run alone"):
        compare({"smooth": runs["smooth"]})
    with pytest.raises(InputError, match="no summary of the lenses"):
        compare(runs | {"empty": Results(tmp_path / "empty")})
    other = run(tmp_path / "other", {"A": -1.0}, {"A": "9"})
    with pytest.raises(InputError, match="no lens is in all of them"):
        compare({"smooth": runs["smooth"], "other": other})
    summary = runs["smooth"].summary
    pd.read_csv(summary).drop(columns="log_evidence").to_csv(summary, index=False)
    with pytest.raises(InputError, match="fit again with this version"):
        compare(runs)


def test_the_command_writes_the_table(runs: dict[str, Results], tmp_path: Path) -> None:
    folders = [str(paths.root) for paths in runs.values()]
    done = CliRunner().invoke(app, ["compare", *folders, "--to", str(tmp_path / "t.csv")])
    assert done.exit_code == 0
    assert "19.5" in done.stdout  # not where messages go
    assert pd.read_csv(tmp_path / "t.csv")["lead"][0] == 19.5
