"""Observed lenses from FITS files to report, by the preset for them: one that is drawn here, and one that is broken."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from astropy.io import fits

import lenspipe
from lenspipe.config import load_config
from tests.conftest import ROOT, snakemake
from tests.unit.test_preparation import RADIUS, write_lens
from tests.workflow.test_workflow import jobs

pytestmark = pytest.mark.workflow
PRESET = ROOT / "workflow/presets/observed.yaml"
QUICK = {"starts": 2, "survivors": 1, "scout_pixels": 32, "temperatures": [10.0], "settling_temperatures": [3.0, 1.0]}
QUICK |= {"steps_per_temperature": 4, "final_steps": 8, "chains": 2, "warmup": 20, "draws": 20, "max_leapfrog_steps": 4}
QUICK |= {"explorations": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the preset on a folder with two lenses, with a small source and few draws."""
    folder = tmp_path_factory.mktemp("observed")
    for name in ("good", "broken"):
        write_lens(folder / "lenses" / name)
    fits.writeto(folder / "lenses/broken/psf.fits", np.zeros((5, 5), "float32"), overwrite=True)
    settings = yaml.safe_load(PRESET.read_text())
    settings |= {"fit": QUICK, "source": {"kind": "sersic", "R_sersic": 0.15}}
    settings["deflection_table"] = {"eta_nodes": 33, "q_nodes": 8, "gamma_nodes": 6}
    settings["catalogue"]["tables"] = [str(folder / "lenses")]
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    done = snakemake(folder, config=folder / "settings.yaml")
    assert done.returncode == 0, done.stderr + "".join(p.read_text() for p in folder.rglob("results/logs/**/*.log"))
    return folder


def test_the_preset_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LENSPIPE_LENSES", "somewhere")
    assert load_config(PRESET).lens.light == {"bulge": "mge", "halo": "mge"}


def test_each_lens_is_a_row(run: Path) -> None:
    table = pd.read_csv(run / "results/summary/lenses.csv").set_index("name")
    assert table.loc["broken", "status"] == "failed"
    assert "sum of 0" in table.loc["broken", "reason"]
    good = table.loc["good"]
    assert good["status"] in ("ok", "flagged")
    assert good["theta_E_median"] == pytest.approx(RADIUS, rel=0.25)
    assert good["einstein_radius_median"] == pytest.approx(good["theta_E_median"], rel=0.1)
    assert -95 < good["position_angle_median"] <= 95
    assert good["arc_radius"] == pytest.approx(RADIUS, rel=0.1)
    assert good["source_half_light_radius_median"] > 0


def test_light_of_the_lens_is_part_of_the_model(run: Path) -> None:
    """In the middle the lens galaxy is nearly all of the model, on the arcs the source is."""
    lens = lenspipe.posterior(run / "results/fit", "good")
    model, light = (lens["map"][name].to_numpy() for name in ("image", "light"))
    middle = len(model) // 2
    assert light[middle, middle] > 0.95 * model[middle, middle]
    image, arcs = (lens["observed_data"][name].to_numpy() for name in ("image", "arcs"))
    assert (model - light)[arcs].sum() == pytest.approx((image - light)[arcs].sum(), rel=0.3)
    assert (light >= 0).all()


def test_changed_files_are_noticed(run: Path, tmp_path: Path) -> None:
    """Those of a folder of lenses; before, there is nothing to do."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    settings["catalogue"]["tables"] = [str(folder / "lenses")]
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))

    def to_do(*arguments: str) -> Counter[str]:
        done = snakemake(folder, "--until", "catalogue", *arguments, config=folder / "settings.yaml")
        assert done.returncode == 0, done.stderr
        return jobs(done.stdout)

    to_do()
    assert to_do("--dry-run") == Counter()
    shutil.rmtree(folder / "lenses/broken")
    write_lens(folder / "lenses/broken")
    assert to_do("--dry-run") == Counter(catalogue=1)


def test_the_report_draws_it(run: Path) -> None:
    page = (run / "results/report/report.html").read_text()
    assert "first look" in page
    assert "radius of the disc that is fitted" in page
    assert "galaxies used" not in page
