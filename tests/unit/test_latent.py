"""Densities of the latents: maps that invert, densities that integrate to one, a flow that fits a banana."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, multivariate_normal
from torch import Tensor, nn

from lenspipe.source.latent import FlowLatent, GaussianLatent, encoded, flow_latent, gaussian_latent
from lenspipe.source.vae import VAE
from lenspipe.source.validation import normal_distance

DIRECTIONS = torch.randn(2, 50, generator=torch.Generator().manual_seed(8))


class BananaVAE(nn.Module):
    """An encoder that reads two latents, on a banana, from the corner of an image; they have hardly any width."""

    def encoder(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = images[:, 0, :2]
        return z, torch.full_like(z, 0.05)


def banana(count: int, seed: int) -> Tensor:
    """Images [n, 64, 64] that hold z = (a, b + a^2 / 2) of normal a, b."""
    a, b = torch.randn(2, count, generator=torch.Generator().manual_seed(seed))
    images = torch.zeros(count, 64, 64)
    images[:, 0, 0], images[:, 0, 1] = a, 0.5 * b + 0.5 * a**2
    return images


@pytest.fixture(scope="module")
def flow() -> FlowLatent:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lenspipe.source.latent.augmented", lambda images: images)
        return flow_latent(BananaVAE(), banana(3000, 1), banana(500, 2), (4, 32), 25, 1, lambda value: None)  # type: ignore[arg-type]


def density_on_a_grid(latent: GaussianLatent | FlowLatent) -> tuple[Tensor, float]:
    """Densities at the nodes of a grid [n n], and the area that a node stands for."""
    x = torch.linspace(-8, 8, 401)
    y = torch.linspace(-4, 16, 501)
    nodes = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    return latent.log_density(nodes).exp().double(), float((x[1] - x[0]) * (y[1] - y[0]))


def test_the_flow_is_a_density(flow: FlowLatent) -> None:
    density, area = density_on_a_grid(flow)
    assert float(density.sum() * area) == pytest.approx(1, abs=2e-3)


def test_the_flow_is_smooth(flow: FlowLatent) -> None:
    """Its slope along a line changes by little between close points: chains cross no kinks."""
    at = torch.linspace(-2, 2, 4001)[:, None] * torch.tensor([1.0, 0.6])
    slope = flow.double()(at.double()).diff(dim=0) / 1e-3
    flow.float()
    assert float(slope.diff(dim=0).norm(dim=1).max()) < 0.02 * float(slope.norm(dim=1).max())


def test_the_flow_inverts(flow: FlowLatent) -> None:
    w = torch.randn(500, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(flow.normal(flow(w)), w, rtol=1e-3, atol=1e-4)


def test_draws_have_the_density_of_the_flow(flow: FlowLatent) -> None:
    """The share of draws in each of 16 boxes, within four standard errors of the integral over it."""
    draws = flow(torch.randn(20000, 2, generator=torch.Generator().manual_seed(4)))
    density, area = density_on_a_grid(flow)
    mass = (density * area).reshape(401, 501)
    for i in range(100, 300, 50):
        for j in range(50, 250, 50):
            low, high = (-8 + 0.04 * (i - 0.5), -4 + 0.04 * (j - 0.5)), (-8 + 0.04 * (i + 49.5), -4 + 0.04 * (j + 49.5))
            inside = (draws > torch.tensor(low)).all(1) & (draws < torch.tensor(high)).all(1)
            share = float(mass[i : i + 50, j : j + 50].sum())
            assert abs(float(inside.double().mean()) - share) < 4 * (share / 20000) ** 0.5 + 1e-3


def test_the_flow_fits_what_a_gaussian_does_not(flow: FlowLatent) -> None:
    """Nearly as likely as the truth, whose entropy is known; the Gaussian is not. Its w are normal."""
    held_out = banana(4000, 5)[:, 0, :2]
    gaussian = gaussian_latent(banana(3000, 1)[:, 0, :2], 1.0)
    entropy = np.log(2 * np.pi * np.e) + np.log(0.5)
    assert float(flow.log_density(held_out).mean()) > -entropy - 0.1
    assert float(gaussian.log_density(held_out).mean()) < -entropy - 0.25
    assert normal_distance(flow.normal(held_out), DIRECTIONS) < 0.5 * normal_distance(
        gaussian.normal(held_out), DIRECTIONS
    )
    assert normal_distance(flow.normal(held_out), DIRECTIONS) < 0.03


def test_the_gaussian_is_scipys() -> None:
    latent = GaussianLatent(2)
    latent.mean.copy_(torch.tensor([1.0, -2.0]))
    latent.scale.copy_(torch.tensor([[1.5, 0.0], [0.7, 0.4]]))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(6))
    expected = multivariate_normal(latent.mean.numpy(), (latent.scale @ latent.scale.T).numpy()).logpdf(z.numpy())
    np.testing.assert_allclose(latent.log_density(z).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(latent(latent.normal(z)), z)


def test_the_papers_gaussian_is_that_of_the_encoded_means() -> None:
    means = torch.randn(40, 3, generator=torch.Generator().manual_seed(7)) @ torch.tensor(
        [[1.0, 2, 0], [0, 1, 1], [0, 0, 3]]
    )
    latent = gaussian_latent(means, 9.0)
    np.testing.assert_allclose(latent.mean, means.numpy().mean(0), rtol=1e-4, atol=1e-6)
    covariance = (latent.scale @ latent.scale.T).numpy()
    np.testing.assert_allclose(covariance, 9 * np.cov(means.numpy().T), rtol=1e-3, atol=1e-4 * covariance.max())


def test_encoded_galaxies_do_not_depend_on_their_batch() -> None:
    torch.manual_seed(0)
    vae = VAE(3, 4, 16, 0.02).eval()
    images = torch.rand(300, 64, 64)
    for whole, own in zip(encoded(vae, images), vae.encoder(images[290:291]), strict=True):
        assert whole.shape == (300, 3)
        torch.testing.assert_close(whole[290:291], own.detach())


def test_distance_from_a_normal_distribution() -> None:
    """Of normal draws it is what kstest finds in one dimension; of draws twice as wide it is the known maximum."""
    torch.manual_seed(0)
    w = torch.randn(20000, 1)
    assert normal_distance(w, torch.ones(1, 3)) == pytest.approx(kstest(w[:, 0].numpy(), "norm").statistic, abs=2e-3)
    assert normal_distance(2 * w, torch.ones(1, 3)) == pytest.approx(0.1608, abs=0.01)
