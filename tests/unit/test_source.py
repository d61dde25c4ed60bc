"""The source prior: training, its latent prior, its file; and where its light is placed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lenspipe.config import Source
from lenspipe.errors import InputError, TrainingError
from lenspipe.image.source_plane import light_centre
from lenspipe.source import training
from lenspipe.source.prior import SourcePrior, gaussian_latent_prior, read_source_prior, write_source_prior
from lenspipe.source.training import Epoch, augmented, train
from lenspipe.source.vae import VAE

SMALL = Source(latents=3, channels=4, dense=16, epochs=6, batch_size=16, augment=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Round galaxies [64, 64, 64] of peak 1, of different widths."""
    axis = torch.arange(64) - 31.5
    radius = axis**2 + axis[:, None] ** 2
    widths = torch.linspace(3, 12, 64)[:, None, None]
    return torch.exp(-radius / (2 * widths**2))


def fitted(settings: Source, images: Tensor, seed: int = 1) -> tuple[VAE, list[Epoch]]:
    return train(settings, images[::2], images[1::2], seed, lambda epoch: None)


@pytest.fixture(scope="module")
def learnt(images: Tensor) -> tuple[VAE, list[Epoch]]:
    return fitted(SMALL.model_copy(update={"epochs": 30, "batch_size": 4}), images)


def test_training_learns(images: Tensor, learnt: tuple[VAE, list[Epoch]]) -> None:
    vae, curve = learnt
    assert len(curve) == 30
    assert curve[-1].validation_elbo > curve[0].validation_elbo
    with torch.no_grad():
        assert float((vae.reconstruct(images) - images).std()) < 0.5 * float(images.std())


def test_training_follows_its_seed_and_leaves_the_global_one_alone(images: Tensor) -> None:
    state = torch.random.get_rng_state()
    (first, _), (again, _), (other, _) = (fitted(SMALL, images, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    weight = next(iter(first.state_dict()))
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_early_stop_keeps_the_best_weights(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation ELBOs 1, 3, 2, 2, ...: two epochs without a better one end it, and epoch 1 is given back."""
    seen: list[Tensor] = []

    def evaluate(vae: VAE, images: Tensor, batch_size: int) -> float:
        seen.append(vae.encoder.mean.weight.detach().clone())
        vae.eval()
        return [1.0, 3.0, 2.0, 2.0, 2.0, 2.0][len(seen) - 1]

    monkeypatch.setattr(training, "_evaluate", evaluate)
    vae, curve = fitted(SMALL.model_copy(update={"patience": 2}), images)
    assert [epoch.validation_elbo for epoch in curve] == [1.0, 3.0, 2.0, 2.0]
    assert torch.equal(vae.encoder.mean.weight, seen[1])


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_is_an_error(images: Tensor) -> None:
    broken = images.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"lower source\.learning_rate"):
        fitted(SMALL, broken)


def test_augmentation_moves_the_light_by_half_a_pixel_a_side(images: Tensor) -> None:
    torch.manual_seed(0)
    moved = torch.stack(light_centre(augmented(images)), -1) * 64
    assert 0.3 < float(moved.norm(dim=-1).max()) < 0.75


def test_latent_prior_is_that_of_the_encoded_means(images: Tensor, learnt: tuple[VAE, list[Epoch]]) -> None:
    vae = learnt[0]
    mean, scale = gaussian_latent_prior(vae, images, 9.0)
    with torch.no_grad():
        encoded = vae.encoder(images)[0].numpy()
    np.testing.assert_allclose(mean, encoded.mean(0), rtol=1e-4, atol=1e-6)
    covariance = (scale @ scale.T).numpy()
    np.testing.assert_allclose(covariance, 9 * np.cov(encoded.T), rtol=1e-3, atol=1e-4 * covariance.max())


def test_prior_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prior = SourcePrior(VAE(3, 4, 16, 0.02), torch.ones(3), 2 * torch.eye(3))
    record = {"stage": "source", "settings": {"source": SMALL.model_dump(mode="json")}}
    write_source_prior(prior, record, tmp_path / "prior.safetensors")
    again = read_source_prior(tmp_path / "prior.safetensors")
    w = torch.randn(2, 3)
    assert torch.equal(again(w), prior(w))


def test_bad_prior_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors: no such source prior; run the stage source"):
        read_source_prior(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(InputError, match=r"cut\.safetensors: not a source prior"):
        read_source_prior(tmp_path / "cut.safetensors")


def test_light_centre_is_where_the_light_is() -> None:
    axis = (torch.arange(64, dtype=torch.float64) - 31.5) / 64
    image = torch.exp(-((axis - 0.1) ** 2 + (axis[:, None] + 0.05) ** 2) / (2 * 0.06**2))[None]
    x, y = light_centre(image)
    assert x.item() == pytest.approx(0.1, abs=1e-6)
    assert y.item() == pytest.approx(-0.05, abs=1e-6)
