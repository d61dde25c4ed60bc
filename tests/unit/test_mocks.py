"""Mock lenses: what is put into their sources, and that a system depends on the seed and its number alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.io import fits

from lenspipe.catalogue.reading import read_batch, read_catalogue
from lenspipe.catalogue.stage import write_catalogue
from lenspipe.config import Config, load_config
from lenspipe.fit.model import LensModel
from lenspipe.galaxies.denoise import denoised
from lenspipe.mocks import draw_parameters, light_extent, write_mocks
from lenspipe.optics import read_optics
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from lenspipe.source.prior import read_source_prior
from lenspipe.source.stage import write_source


def blob(sd: float, n: int = 64) -> np.ndarray:
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    return np.exp(-(x**2 + y**2) / (2 * sd**2))


def test_denoising_removes_noise_and_keeps_the_galaxy() -> None:
    truth = blob(6.0)
    noisy = truth + 0.05 * np.random.default_rng(1).normal(size=truth.shape)
    clean = denoised(noisy, 0.05)
    assert clean.max() == 1
    assert clean.min() == 0
    assert np.sqrt(((clean - truth) ** 2).mean()) < 0.5 * np.sqrt(((noisy - truth) ** 2).mean())
    assert clean.sum() == pytest.approx(truth.sum(), rel=0.15)


def test_an_image_without_noise_is_left_as_it_is() -> None:
    flat = np.zeros((64, 64))
    flat[20:40, 20:40] = 3.0
    np.testing.assert_array_equal(denoised(flat, 0.0), flat / 3)


@pytest.mark.parametrize("sd", [3.0, 6.0])
def test_extent_of_a_gaussian(sd: float) -> None:
    """90 % of a round Gaussian is within sd sqrt(2 ln 10)."""
    assert light_extent(blob(sd)) == pytest.approx(2 * sd * np.sqrt(2 * np.log(10)) / 64, abs=1.5 / 64)


@pytest.fixture
def paths(tmp_path: Path) -> Results:
    """Results with a source that is not learned."""
    found = Results(tmp_path)
    write_source(settings(systems=1).source, found.vae, found.galaxies, found.source_prior, seed=1)
    return found


def settings(systems: int, seed: int = 1) -> Config:
    return load_config(
        {
            "seed": seed,
            "source": {"kind": "sersic"},
            "lens": {"deflection": "series"},
            "mocks": {
                "systems": systems,
                "source": "prior",
                "image_size": 24,
                "pixel_scale": 0.2,
                "psf_sd": 0.2,
                "noise_levels": [{"name": "loud", "sd": 0.5}, {"name": "quiet", "sd": 0.01}],
            },
        }
    )


def test_a_mock_has_the_psf_that_its_rays_are_blurred_by(paths: Results) -> None:
    """Twice as fine, where there are two rays a pixel side: the catalogue takes it in, and it makes the image."""
    base = settings(systems=1).model_dump(mode="json")
    base["lens"] |= {"supersampling": 2, "psf_supersampling": 2}
    config = load_config(base)
    write_mocks(config, paths)
    psf = fits.getdata(paths.mocks / "mock-0000-quiet/psf.fits")
    assert psf.shape == (17, 17)
    write_catalogue(config.catalogue, paths.mocks, paths.catalogue, psf_supersampling=2)
    (bucket,) = read_catalogue(paths.catalogue)["bucket"].unique()
    assert bucket == "image24x24_psf17x17"
    batch = read_batch(paths.catalogue, bucket, ["mock-0000-quiet"], torch.float32)
    source = read_source_prior(paths.source_prior)
    model = LensModel(batch, PriorMap(config.priors.expressions()), source, read_optics(config, Path(), torch.float32))
    w = torch.zeros(1, model.size)
    assert model.image(w).shape == (1, 24, 24)
    assert model.reach == 4


def test_what_shares_the_size_of_the_source_shares_that_of_the_galaxy() -> None:
    priors = PriorMap({name: parse_prior(text) for name, text in SHARING.items()})
    generator = torch.Generator().manual_seed(1)
    drawn = draw_parameters(priors, generator, {"source_size": 0.7})
    assert float(drawn["halo_Rs"]) == float(drawn["source_size"]) == 0.7
    assert float(drawn["halo_theta_E"]) == float(drawn["theta_E"]) == pytest.approx(float(drawn["q"]) ** 0.5)


SHARING = {"r_Ein": "1", "e1": "Laplace(0, 0.1)", "e2": "0.1", "source_size": "LogNormal(2, 0.4)"}
SHARING |= {"halo_Rs": "source_size", "halo_theta_E": "theta_E"}


def image(paths: Results, name: str) -> np.ndarray:
    return np.asarray(fits.getdata(paths.mocks / name / "image.fits"), dtype=float)


def test_a_system_depends_on_seed_and_number_alone(paths: Results) -> None:
    write_mocks(settings(systems=1), paths)
    one, first = pd.read_csv(paths.mocks / "lenses.csv"), image(paths, "mock-0000-loud")
    write_mocks(settings(systems=3), paths)
    three = pd.read_csv(paths.mocks / "lenses.csv")
    assert len(three) == 6
    pd.testing.assert_frame_equal(three.head(2), one)
    np.testing.assert_array_equal(image(paths, "mock-0000-loud"), first)
    write_mocks(settings(systems=1, seed=2), paths)
    assert not np.array_equal(image(paths, "mock-0000-loud"), first)


def test_noise_levels_share_the_lens_and_have_their_noise(paths: Results) -> None:
    write_mocks(settings(systems=1), paths)
    loud, quiet = (image(paths, f"mock-0000-{level}") for level in ("loud", "quiet"))
    assert np.std(loud - quiet) == pytest.approx(np.hypot(0.5, 0.01), rel=5 / np.sqrt(2 * loud.size))
    truths = pd.read_csv(paths.mocks / "lenses.csv").filter(like="true_")
    assert truths.nunique().max() == 1
    assert {"true_theta_E", "true_q", "true_phi", "true_e1", "true_source_flux"} <= set(truths)
    assert float(fits.getval(paths.mocks / "mock-0000-loud/image.fits", "PIXSCALE")) == 0.2


def test_lens_light_and_photon_noise_are_part_of_a_mock(paths: Results) -> None:
    """The noise map is that of the clean image, the truth has the light's parameters, the centre shines."""
    light = {"amplitude": "2", "sd": "0.3", "q": "0.8", "phi": "0.1", "center_x": "0", "center_y": "0"}
    changes = {
        "lens": {"deflection": "series", "light": {"bulge": "gaussian"}},
        "priors": {"background": "0.5", "light": {f"bulge_{name}": value for name, value in light.items()}},
    }
    base = settings(systems=1).model_dump(mode="json")
    base["mocks"]["noise_levels"] = [{"name": "photons", "sd": 0.01, "counts": 100}]
    base["lens"] |= changes["lens"]
    base["priors"] = changes["priors"]
    write_mocks(load_config(base), paths)
    place = paths.mocks / "mock-0000-photons"
    image, noise = (fits.getdata(place / f"{name}.fits").astype(float) for name in ("image", "noise"))
    assert image[11:13, 11:13].mean() > 1.5
    assert noise[12, 12] > 1.3 * noise[0, 0] > 1.3 * np.sqrt(0.01**2 + 0.4 / 100)
    assert np.std((image - 0.5)[0] / noise[0]) < 2
    table = pd.read_csv(paths.mocks / "lenses.csv")
    assert (table["true_bulge_amplitude"][0], table["true_background"][0]) == (2, 0.5)
