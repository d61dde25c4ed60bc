"""The stage `validation`: its measures against images whose answer is known, its files, and its part of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from lenspipe import artefact
from lenspipe.config import LearnedSource, PixelGridSource, Report, ResidualField, Vae, Validation
from lenspipe.config import SersicSource as SersicSettings
from lenspipe.errors import InputError
from lenspipe.report.source import noise_table, source_section, unusual_table
from lenspipe.results import Results
from lenspipe.source.pixel_grid import PixelGridSource as PixelGrid
from lenspipe.source.stage import write_source, write_vae
from lenspipe.source.validation import (
    Sample,
    mark_unusual,
    ring_power,
    signal_to_noise,
    turn,
    turned_galaxies,
    write_validation,
)

GRID = PixelGridSource(kind="pixel_grid", modes=20, sd=0.3)
SETTINGS = Validation(galaxies=5, noise_sds=(0.1, 0.02), rotations=4)


def galaxies(path: Path, counts: dict[str, int]) -> Tensor:
    """Draws from a source of pixels as the stage `galaxies` leaves them, with noise of 0.01; returns the images."""
    generator = torch.Generator().manual_seed(8)
    n = sum(counts.values())
    source = PixelGrid(GRID)
    images = source(torch.randn(n, source.size, generator=generator))
    images = images / images.amax((1, 2), keepdim=True) + 0.01 * torch.randn(images.shape, generator=generator)
    columns = {
        "name": np.array([f"g{i}" for i in range(n)], dtype=object),
        "input": np.array(["survey"] * n, dtype=object),
        "split": np.array([split for split, count in counts.items() for _ in range(count)], dtype=object),
        "noise_sd": np.full(n, 0.01),
        "pixel_scale": np.full(n, 0.03),
    }
    data = xr.Dataset(
        {"image": (("galaxy", "y", "x"), images.numpy())} | {k: ("galaxy", v) for k, v in columns.items()}
    )
    data.to_zarr(path, zarr_format=3, consolidated=False)
    return images


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """The stages from `vae` to `validation`, for a learned source with a residual field and for one of pixels."""
    first = Results(tmp_path_factory.mktemp("learned"))
    galaxies(first.galaxies, {"train": 48, "validation": 16, "test": 8})
    write_vae(Vae(latents=3, channels=4, dense=16, epochs=3), first.galaxies, first.vae, seed=1)
    learned = LearnedSource(latent_density="gaussian", residual=ResidualField(components=30))
    second = Results(tmp_path_factory.mktemp("pixels"))
    for paths, settings in ((first, learned), (second, GRID)):
        write_source(settings, first.vae, first.galaxies, paths.source_prior, seed=1)
        write_validation(SETTINGS, first.vae, paths.source_prior, first.galaxies, paths.validation, seed=1)
    return {"learned": first, "pixels": second}


def test_a_profile_with_large_pictures_is_held_against_galaxies(results: dict[str, Results], tmp_path: Path) -> None:
    paths, profile = results["learned"], SersicSettings(kind="sersic", pixels=96)
    write_source(profile, paths.vae, paths.galaxies, tmp_path / "prior.safetensors", seed=1)
    write_validation(SETTINGS, paths.vae, tmp_path / "prior.safetensors", paths.galaxies, tmp_path / "out", seed=1)
    assert len(pd.read_csv(tmp_path / "out/galaxies.csv")) == 5


def test_files_of_a_learned_source(results: dict[str, Results]) -> None:
    folder = results["learned"].validation
    facts = artefact.read_record(folder)["facts"]
    table = pd.read_csv(folder / "galaxies.csv")
    assert len(table) == 5
    assert facts["chi2_source"] == pytest.approx(table["chi2_source"].mean())
    assert facts["chi2_source"] < 0.5 * facts["chi2_decoder"], "the residual field draws what the decoder does not"
    assert facts["unusual"] == table["unusual"].sum()
    power = pd.read_csv(folder / "power.csv")
    assert abs(power["source"][1:4] - 1).mean() < abs(power["decoder"][1:4] - 1).mean()
    assert len(pd.read_csv(folder / "latents.csv")) == 3
    assert list(pd.read_csv(folder / "densities.csv")["density"]) == ["standard normal", "Gaussian", "source prior"]
    pictures = xr.open_zarr(folder / "pictures.zarr", consolidated=False)
    assert dict(pictures.sizes) == {"galaxy": 5, "rotated": 4, "angle": 4, "draws": 16, "y": 64, "x": 64}


def test_files_of_a_source_that_is_not_learned(results: dict[str, Results]) -> None:
    """The galaxies are draws from it: it fits them to their noise at any signal-to-noise."""
    folder = results["pixels"].validation
    assert not (folder / "latents.csv").exists()
    curve = pd.read_csv(folder / "signal_to_noise.csv")
    assert curve["source"].to_numpy() == pytest.approx([1, 1], abs=0.08)
    assert artefact.read_record(folder)["facts"]["rotation_error"] < 1.5


def test_the_same_again(results: dict[str, Results], tmp_path: Path) -> None:
    paths = results["learned"]
    write_validation(SETTINGS, paths.vae, paths.source_prior, paths.galaxies, tmp_path / "again", seed=1)
    for name in ("galaxies", "signal_to_noise", "power", "latents", "densities", "rotation"):
        first, again = ((folder / f"{name}.csv").read_text() for folder in (paths.validation, tmp_path / "again"))
        assert first == again, name


@pytest.mark.parametrize("kind", ["learned", "pixels"])
def test_the_report_shows_it(kind: str, results: dict[str, Results]) -> None:
    section = source_section(Report(), results[kind])
    assert (section["curve"] is not None) is (kind == "learned")
    assert (section["tests"]["densities"] is not None) is (kind == "learned")
    for name in ("reconstructions", "rotations", "draws", "data", "curves"):
        assert section["tests"][name].startswith("data:image/png;base64,")


def test_the_report_before_validation_names_what_is_missing(results: dict[str, Results], tmp_path: Path) -> None:
    """Sources that are not learned may have no tests, in runs without galaxies."""
    grid, learned = (Results(tmp_path / name) for name in ("grid", "learned"))
    write_source(GRID, grid.vae, grid.galaxies, grid.source_prior, seed=1)
    assert source_section(Report(), grid)["tests"] is None
    learned.source_prior.parent.mkdir(parents=True)
    learned.source_prior.write_bytes(results["learned"].source_prior.read_bytes())
    with pytest.raises(InputError, match="validation: no tests of the source here; run the stage validation"):
        source_section(Report(), learned)


def test_power_of_a_wave_is_at_its_frequency() -> None:
    axis = torch.arange(64) / 64
    wave = torch.cos(2 * torch.pi * 5 * axis) + torch.zeros(64, 1)
    power = ring_power(wave[None])
    assert power.argmax() == 5
    assert np.delete(power, 5).max() < 1e-6 * power[5]


@pytest.mark.parametrize("angle", [90.0, 180.0, 270.0])
def test_quarter_turns_are_exact(angle: float) -> None:
    """Counter-clockwise, with y up."""
    image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = torch.rot90(image[0].flip(0), int(angle / 90)).flip(0)
    torch.testing.assert_close(turn(image, angle)[0], expected, rtol=0, atol=1e-5)


class Corner(nn.Module):
    """An encoder that reads one latent from a corner, and reconstructs round galaxies."""

    latents = 1
    decoder_sd = 0.02

    def encoder(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[:, 0, :1], torch.full_like(images[:, 0, :1], 0.1)

    def reconstruct(self, images: Tensor) -> Tensor:
        return torch.zeros_like(images)


def test_galaxies_far_from_the_training_set_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a latent of 8 sd, one with light that is not reconstructed; the others are usual."""
    generator = torch.Generator().manual_seed(2)

    def drawn(path: object, split: str) -> Tensor:
        images = 0.02 * torch.randn(200, 64, 64, generator=generator)
        images[:, 0, 0] = torch.randn(200, generator=generator)
        return images

    monkeypatch.setattr("lenspipe.source.validation.galaxy_images", drawn)
    monkeypatch.setattr("lenspipe.source.validation.open_galaxies", lambda path, split: None)
    monkeypatch.setattr("lenspipe.source.validation.noise_of", lambda galaxies: torch.zeros(200))
    images = 0.02 * torch.randn(4, 64, 64, generator=generator)
    images[:, 0, 0] = torch.tensor([0.1, 8.0, -0.2, 0.3])
    images[2, 20:40, 20:40] += 0.3
    table = pd.DataFrame({"name": list("abcd"), "input": "x", "noise_sd": 0.0})
    training, _ = Corner().encoder(drawn(None, "train"))
    sample = Sample(images, images, torch.zeros(4), table)
    marked = mark_unusual(table, Validation(), Corner(), training, Path(), sample)  # type: ignore[arg-type]
    assert marked["unusual"].tolist() == [False, True, True, False]
    assert marked["rarity"].idxmax() == 1
    assert unusual_table(marked[marked["unusual"]].assign(input="x")).rows[0][0] == "b"


def test_a_source_that_turns_with_the_galaxy_has_no_rotation_error() -> None:
    """Round envelope and all modes of two equal axes: quarter turns of a galaxy are as likely as itself."""
    source = PixelGrid(PixelGridSource(kind="pixel_grid", modes=3))
    clean = source(torch.zeros(1, 3))
    clean[:, 20:26, 30:34] += 0.5
    sample = Sample(clean, clean, torch.zeros(1), pd.DataFrame({"name": ["a"]}))
    pictures, errors = turned_galaxies(Validation(rotations=4), source, None, sample)
    assert pictures["turned"].shape == (1, 4, 64, 64)
    assert errors["angle"].tolist() == [90, 180, 270]
    assert errors["rms"].max() < 0.02


def test_misfit_against_noise() -> None:
    """A source without freedom, a galaxy that differs by 0.1 everywhere: chi^2 = 1 + (0.1 / noise)^2."""
    source = PixelGrid(PixelGridSource(kind="pixel_grid", modes=1, sd=1e-6))
    clean = source(torch.zeros(3, 1)) + 0.1
    table = signal_to_noise(SETTINGS, source, None, clean, torch.Generator().manual_seed(3))
    assert table["source"].to_numpy() == pytest.approx(1 + (0.1 / table["noise_sd"].to_numpy()) ** 2, rel=0.03)
    assert noise_table(table).rows[1][:2] == ["0.02", "50"]
