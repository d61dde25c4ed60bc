"""The command line: every stage has its command, files say what they are, errors are one message."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lenspipe import artefact
from lenspipe.cli import SPINS, app
from lenspipe.config import Config, PixelGridSource
from lenspipe.source.stage import write_source
from lenspipe.tensors import write_tensors
from tests.conftest import ROOT

STAGES = (
    "survey",
    "galaxies",
    "vae",
    "source",
    "validation",
    "deflection_table",
    "mocks",
    "catalogue",
    "fit",
    "summary",
    "report",
)


def lenspipe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name(stage: str) -> None:
    assert lenspipe(stage, "--help").exit_code == 0
    assert f"rule {stage}:" in (ROOT / f"workflow/rules/{stage}.smk").read_text()
    assert stage in Config.model_fields


def test_waiting_threads_sleep_soon_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert lenspipe("check-config", ROOT / "config.yaml").exit_code == 0
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert lenspipe("check-config", ROOT / "config.yaml").exit_code == 0
    assert os.environ["GOMP_SPINCOUNT"] == SPINS


def test_show_says_what_a_file_is(tmp_path: Path) -> None:
    settings = PixelGridSource(kind="pixel_grid", modes=3)
    write_source(settings, tmp_path, tmp_path, tmp_path / "prior.safetensors", seed=7)
    shown = lenspipe("show", tmp_path / "prior.safetensors")
    assert shown.exit_code == 0
    for text in ("source", "7", '"modes": 3', '"size": 3', '"torch"'):
        assert text in shown.output


def test_show_leaves_brackets_alone(tmp_path: Path) -> None:
    artefact.write_record(tmp_path, artefact.provenance("source", {}, [], where="data[v2]/[/old]"))
    assert "data[v2]/[/old]" in lenspipe("show", tmp_path).output


def test_show_of_something_else_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not ours")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr/zarr.json").write_text("[1")
    write_tensors(tmp_path / "checkpoint.safetensors", {"a": torch.zeros(1)}, {"names": ["x"]})
    names = ("note.txt", "absent.safetensors", "broken.safetensors", "empty.safetensors", "zarr")
    for name in (*names, "checkpoint.safetensors"):
        path = tmp_path / name
        shown = lenspipe("show", path)
        assert shown.exit_code == 1
        assert f"error: {path}" in shown.output
        assert "Traceback" not in shown.output


def test_check_config_counts_the_lenses(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mocks: {systems: 7}\n")
    checked = lenspipe("check-config", tmp_path / "config.yaml")
    assert checked.exit_code == 0
    assert "good; 21 lenses to fit" in checked.output


def test_check_config_names_missing_files(tmp_path: Path) -> None:
    lens = "{name: a, pixel_scale: 0.1, image: absent.fits, noise: n.fits, psf: '${LENSPIPE_NOWHERE}/p.fits'}"
    (tmp_path / "config.yaml").write_text(f"catalogue: {{lenses: [{lens}]}}\n")
    checked = lenspipe("check-config", tmp_path / "config.yaml")
    assert checked.exit_code == 1
    assert "the environment variable LENSPIPE_NOWHERE is not set" in checked.output
    (tmp_path / "config.yaml").write_text(f"catalogue: {{lenses: [{lens.replace('${LENSPIPE_NOWHERE}/', '')}]}}\n")
    assert "absent.fits: no such file" in lenspipe("check-config", tmp_path / "config.yaml").output


def test_check_config_names_every_mistake(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mocks: {sistems: 7}\nfit: {chains: 0}\n")
    checked = lenspipe("check-config", tmp_path / "config.yaml")
    assert checked.exit_code == 1
    assert "mocks.sistems" in checked.output
    assert "systems" in checked.output
    assert "fit.chains" in checked.output


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("survey", "deflection_table")])
def test_a_stage_before_its_inputs_names_what_is_missing(stage: str, tmp_path: Path) -> None:
    done = lenspipe(stage, "--config", ROOT / "config.yaml", "--results", tmp_path)
    assert done.exit_code == 1
    assert f"error: {tmp_path}" in done.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", [["fit"], ["refit", "a"]], ids=lambda command: command[0])
def test_where_fits_run_is_an_option(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of the settings' section; a bad one is one message."""
    asked: list[Config] = []
    monkeypatch.setattr("lenspipe.fit.stage.fit_shard", lambda settings, *_: asked.append(settings))
    monkeypatch.setattr("lenspipe.fit.refit.refit_lenses", lambda settings, *_: asked.append(settings) or (["a"], {}))
    (tmp_path / "config.yaml").write_text("mocks: {systems: 7}\ncluster: {retries: 5}\n")
    given = [*command, "--config", tmp_path / "config.yaml", "--cluster"]
    assert lenspipe(*given, '{"kind": "slurm", "jobs_max": 3}').exit_code == 0
    assert (asked[0].cluster.kind, asked[0].cluster.jobs_max, asked[0].cluster.retries) == ("slurm", 3, 2)
    assert asked[0].mocks.systems == 7
    bad = lenspipe(*given, '{"kind": "moon"}')
    assert bad.exit_code == 1
    assert "cluster.kind" in bad.output
    worse = lenspipe(*given, "slurm")
    assert worse.exit_code == 1
    assert '--cluster or LENSPIPE_CLUSTER: expected JSON such as {"kind": "slurm"}, found slurm' in worse.output
    assert len(asked) == 1


def test_it_tells_its_version() -> None:
    told = lenspipe("--version")
    assert told.exit_code == 0
    assert told.output.split() == ["lenspipe", version("lenspipe")]
