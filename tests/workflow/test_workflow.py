"""The workflow itself, on the tiny preset: its jobs, a whole run, exact reruns, going on after a kill, bad input."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import arviz_stats
import numpy as np
import pandas as pd
import pytest
import yaml
from astropy.io import fits
from astropy.table import Table

from lenspipe import artefact, open_posteriors, posterior
from lenspipe.report.run import run_section
from lenspipe.results import Results
from tests.conftest import ROOT, TINY, environment, snakemake

pytestmark = pytest.mark.workflow

JOBS = Counter(
    dict(
        survey=1,
        galaxies=1,
        vae=1,
        source=1,
        validation=1,
        deflection_table=1,
        mocks=1,
        catalogue=1,
        fit=2,
        summary=1,
        report=1,
        all=1,
    )
)
FROM_MOCKS = {"mocks", "catalogue", "fit", "summary", "report"}
FROM_VAE = {"vae", "source", "validation"}
DOWNSTREAM = {
    "galaxies": {"galaxies"} | FROM_VAE | FROM_MOCKS,
    "deflection_table": {"deflection_table"} | FROM_MOCKS,
    "lens": FROM_MOCKS,
    "priors": FROM_MOCKS,
    "mocks": FROM_MOCKS,
    "catalogue": {"catalogue", "fit", "summary", "report"},
    "survey": {"survey", "galaxies"} | FROM_VAE | FROM_MOCKS,
    "vae": FROM_VAE | {"fit", "summary", "report"},
    "source": {"source", "validation", "fit", "summary", "report"},
    "validation": {"validation", "report"},
    "fit": {"fit", "summary", "report"},
    "cluster": set(),
    "summary": {"summary", "report"},
    "report": {"report"},
}
EDITS = {
    "galaxies": {"edge_feather": 5},
    "deflection_table": {"q_nodes": 9},
    "lens": {"source_interpolation": "bilinear"},
    "priors": {"gamma": "TruncatedNormal(2, 0.2, 1.4, 2.6)"},
    "mocks": {"image_size": 34},
    "catalogue": {"lenses": [{"name": "a", "pixel_scale": 0.1, "image": "i", "noise": "n", "psf": "p"}]},
    "survey": {"galaxies": 91},
    "vae": {"epochs": 5},
    "source": {"latent_density": "gaussian"},
    "validation": {"rotations": 3},
    "fit": {"draws": 21},
    "cluster": {"kind": "slurm", "jobs_max": 3, "retries": 1},
    "summary": {"r_hat_max": 1.2},
    "report": {"title": "another"},
}


def jobs(output: str) -> Counter[str]:
    """Number of jobs by rule, from Snakemake's table of a run."""
    table = output.split("Job stats:")[-1]
    return Counter({name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE) if name != "total"})


def tiny_with(path: Path, section: str, **values: object) -> Path:
    config = yaml.safe_load(TINY.read_text())
    config.setdefault(section, {}).update(values)
    path.write_text(yaml.safe_dump(config))
    return path


def test_jobs_of_a_dry_run(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert jobs(done.stdout + done.stderr) == JOBS


def test_a_source_that_is_not_learned_needs_no_training(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(TINY.read_text()) | {"source": {"kind": "sersic"}})
    )
    done = snakemake(tmp_path, "--dry-run", config=tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert jobs(done.stdout + done.stderr) == JOBS - Counter(["vae"])


def test_whole_run(tiny_run: Path) -> None:
    lenses = pd.read_csv(tiny_run / "results/summary/lenses.csv")
    assert lenses["name"].tolist() == ["mock-0000-low", "mock-0000-high", "mock-0001-low", "mock-0001-high"]
    assert set(lenses["status"]) <= {"ok", "flagged"}
    assert np.isfinite(lenses[["theta_E_median", "gamma_p84", "phi_map", "r_hat_max", "chi2_per_pixel"]]).all(axis=None)
    assert lenses["chi2_per_pixel"].between(0.8, 1.5).all(), "the fits explain the images, few draws as there are"
    assert len(Table.read(tiny_run / "results/summary/lenses.fits")) == 4
    page = (tiny_run / "results/report/report.html").read_text()
    assert "mock-0001-high" in page
    assert len(page) > 200_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing but itself"
    of_run = run_section(Results(tiny_run / "results"))
    for what in ("benchmarks", "records"):
        assert {row[0] for row in of_run[what].rows} == set(JOBS) - {"report", "all"}


def test_posterior_is_an_arviz_object(tiny_run: Path) -> None:
    tree = posterior(tiny_run / "results/fit", "mock-0001-low")
    table = arviz_stats.summary(tree, var_names=["theta_E", "gamma"])
    assert list(table.index) == ["theta_E", "gamma"]
    assert tree["posterior"]["theta_E"].shape == (2, 20)
    everything = open_posteriors(tiny_run / "results/fit")
    assert everything.sizes["lens"] == 4
    values = everything["theta_E"].sel(lens="mock-0001-low").to_numpy()
    np.testing.assert_array_equal(values, tree["posterior"]["theta_E"].to_numpy())


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("survey", "survey"),
        ("galaxies/galaxies.zarr", "galaxies"),
        ("vae/vae.safetensors", "vae"),
        ("source/source_prior.safetensors", "source"),
        ("validation/galaxies.csv", "validation"),
        ("deflection_table/deflection_table.safetensors", "deflection_table"),
        ("mocks/mock-0000-low/image.fits", "mocks"),
        ("catalogue/catalogue.zarr", "catalogue"),
        ("fit/shard-0001.zarr", "fit"),
        ("summary/lenses.fits", "summary"),
        ("report/report.html", "report"),
    ],
)
def test_every_artefact_says_what_it_is(tiny_run: Path, path: str, stage: str) -> None:
    record = artefact.read_record(tiny_run / "results" / path)
    assert record["stage"] == stage
    assert record["settings"][stage]
    assert record["versions"]["torch"]


def test_second_run_has_nothing_to_do(tiny_run: Path) -> None:
    done = snakemake(tiny_run)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.parametrize("section", DOWNSTREAM)
def test_an_edited_section_reruns_what_depends_on_it(tiny_run: Path, tmp_path: Path, section: str) -> None:
    config = tiny_with(tmp_path / "edited.yaml", section, **EDITS[section])
    done = snakemake(tiny_run, "--dry-run", config=config)
    assert done.returncode == 0, done.stderr
    assert set(jobs(done.stdout + done.stderr)) - {"all"} == DOWNSTREAM[section]
    assert ("Nothing to be done" in done.stdout + done.stderr) == (not DOWNSTREAM[section])


def test_another_seed_reruns_all(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | {"seed": 2}))
    done = snakemake(tiny_run, "--dry-run", config=tmp_path / "edited.yaml")
    assert done.returncode == 0, done.stderr
    assert jobs(done.stdout + done.stderr) == JOBS


def test_goes_on_after_kill_9(tiny_run: Path, tmp_path: Path) -> None:
    """Killed while the mocks' successors are missing, a run starts again and does only what is left."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("fit", "summary", "report", "logs"))
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    process = subprocess.Popen(
        [*command, "--configfile", str(TINY), "--directory", str(directory)],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(directory.glob("results/logs/fit-*.log")) and time.monotonic() < deadline:
        time.sleep(0.1)
    second = snakemake(Path(os.path.relpath(directory)))
    assert second.returncode != 0
    assert re.search(rf"results: process {process.pid} is running lenspipe here already", second.stdout + second.stderr)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (directory / "results/summary/lenses.csv").exists()
    locked = snakemake(directory)
    assert locked.returncode != 0
    assert "locked" in locked.stdout + locked.stderr
    assert snakemake(directory, "--unlock").returncode == 0
    done = snakemake(directory, "--rerun-incomplete")
    assert done.returncode == 0, done.stderr
    assert set(jobs(done.stdout + done.stderr)) <= {"fit", "summary", "report", "all"}
    again = pd.read_csv(directory / "results/summary/lenses.csv").drop(columns="seconds")
    first = pd.read_csv(tiny_run / "results/summary/lenses.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(again, first, rtol=1e-6)


def test_a_changed_lens_file_reruns_the_catalogue(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its path has a variable of the environment in it, whose braces Snakemake must leave alone."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setenv("LENSES", str(run / "results/mocks/mock-0000-high"))
    files = {kind: f"${{LENSES}}/{kind}.fits" for kind in ("image", "noise", "psf")}
    config = tiny_with(tmp_path / "config.yaml", "catalogue", lenses=[{"name": "twin", "pixel_scale": 0.2, **files}])
    assert snakemake(run, "--until", "catalogue", config=config).returncode == 0
    lenses = pd.read_csv(run / "results/catalogue/lenses.csv").set_index("name")
    assert lenses.loc["twin", "status"] == "usable"
    until = ("--dry-run", "--until", "catalogue")
    assert jobs(snakemake(run, *until, config=config).stdout) == Counter()
    psf = run / "results/mocks/mock-0000-high/psf.fits"
    fits.writeto(psf, 2 * fits.getdata(psf), overwrite=True)
    assert jobs(snakemake(run, *until, config=config).stdout) == Counter(catalogue=1)


def test_a_changed_image_is_fitted_also_where_the_catalogue_was_made_by_hand(tiny_run: Path, tmp_path: Path) -> None:
    """Its record is the same then, and Snakemake goes by the contents of small files."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "results/mocks/mock-0000-high/image.fits"
    fits.writeto(path, 2 * fits.getdata(path), overwrite=True)
    command = [sys.executable, "-m", "lenspipe", "catalogue", "--config", TINY, "--results", run / "results"]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    assert set(jobs(snakemake(run, "--dry-run").stdout)) == {"fit", "summary", "report", "all"}


def test_a_report_without_the_catalogue_says_so(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "results/catalogue/catalogue.zarr")
    command = [sys.executable, "-m", "lenspipe", "report", "--config", TINY, "--results", run / "results"]
    done = subprocess.run(command, env=environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"catalogue\.zarr:\s+mock-0000-\w+\s+is\s+not\s+in\s+it", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_refit_makes_a_new_summary(tiny_run: Path, tmp_path: Path) -> None:
    """The command tells what it does, and the next run sees that there is a new result."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    command = [sys.executable, "-m", "lenspipe", "refit", "mock-0000-high", "--draws-factor", "2", "--workers", "1"]
    done = subprocess.run(
        [*command, "--config", str(TINY), "--results", str(run / "results")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "fitted again: mock-0000-high" in done.stderr, done.stderr
    assert set(jobs(snakemake(run, "--dry-run").stdout)) == {"summary", "report", "all"}


def test_a_further_deflector_goes_through_the_run(tiny_run: Path, tmp_path: Path) -> None:
    """Mocks are lensed by it, its parameters are fitted, summarised and reported beside their truth."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = yaml.safe_load(TINY.read_text())
    config["lens"] = {"components": {"far": "sis"}}
    config["mocks"]["systems"] = 1
    place = {"far_center_x": 1.2, "far_center_y": "Normal(0.8, 0.05)"}
    config["priors"] = {"components": {"far_theta_E": "Uniform(0.05, 0.15)", **place}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(run, config=tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    lenses = pd.read_csv(run / "results/summary/lenses.csv")
    assert lenses["true_far_theta_E"].between(0.05, 0.15).all()
    assert lenses["far_theta_E_median"].between(0.05, 0.15).all()
    assert (lenses["far_theta_E_p84"] > lenses["far_theta_E_p16"]).all()
    assert (lenses["far_center_x_median"] == np.float32(1.2)).all()
    assert "far_center_y" in (run / "results/report/report.html").read_text()


def test_settings_of_the_command_line_go_over_the_file(tmp_path: Path) -> None:
    """`--config` alone changes the shipped settings; it does not replace them."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", "--dry-run"]
    command += ["--directory", str(tmp_path), "--printshellcmds", "--config", "mocks={systems: 5}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert '"systems":5' in shown
    draws = yaml.safe_load((ROOT / "config.yaml").read_text())["fit"]["draws"]
    assert f'"draws":{draws}' in shown


def test_a_second_file_of_settings_goes_over_the_first(tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("galaxies: {test_fraction: 0.125}\n")
    files = ("--configfile", str(TINY), str(second))
    done = snakemake(tmp_path, *files, "--dry-run", "--printshellcmds")
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert '"test_fraction":0.125' in shown
    assert f'"title":"{yaml.safe_load(TINY.read_text())["report"]["title"]}"' in shown


def test_bad_config_stops_before_any_job(tmp_path: Path) -> None:
    config = tiny_with(tmp_path / "bad.yaml", "fit", drawz=3)
    done = snakemake(tmp_path, config=config)
    assert done.returncode != 0
    assert "fit.drawz: unknown key; did you mean draws?" in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("obstacle", ["a file", "no permission"])
def test_results_that_cannot_be_written(obstacle: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    if obstacle == "a file":
        folder.write_text("a file where the folder should be")
    elif os.geteuid() == 0:
        folder = Path("/sys/results")  # no permission stops root but the kernel's own folders do
    else:
        folder.mkdir()
        folder.chmod(0o500)
    command = [sys.executable, "-m", "lenspipe", "survey", "--config", str(TINY), "--results", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(rf"error: {folder}\S*: cannot write here", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_bad_lens_is_a_row_and_the_others_stand(tiny_run: Path, tmp_path: Path) -> None:
    """A lens without files ends as a failed row and a line of the report; the mocks keep their numbers."""
    shutil.copytree(tiny_run, tmp_path / "run")
    absent = {"name": "absent", "pixel_scale": 0.2, "image": "<b>no</b>.fits", "noise": "no.fits", "psf": "no.fits"}
    done = snakemake(tmp_path / "run", config=tiny_with(tmp_path / "config.yaml", "catalogue", lenses=[absent]))
    assert done.returncode == 0, done.stderr
    lenses = pd.read_csv(tmp_path / "run/results/summary/lenses.csv").set_index("name")
    assert lenses.loc["absent", "status"] == "failed"
    assert "no such file" in lenses.loc["absent", "reason"]
    first = pd.read_csv(tiny_run / "results/summary/lenses.csv").set_index("name")
    assert lenses["theta_E_median"].drop("absent").to_dict() == pytest.approx(first["theta_E_median"].to_dict())
    page = (tmp_path / "run/results/report/report.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt;.fits: no such file" in page
    assert "<b>no</b>" not in page
