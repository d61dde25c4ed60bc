"""The residual field: second moments in eight orientations, noise taken out, and its two kinds of components."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lenspipe.source.residual import modes, principal_components, stationary_components, without_noise

N = 16
NONE = torch.zeros(2000)  # noise of every residual


@pytest.fixture(scope="module")
def field() -> Tensor:
    """Residuals [2000, 16, 16] of one spot that is brighter or fainter, in one of eight orientations."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.arange(N) - (N - 1) / 2] * 2, indexing="ij")
    spot = torch.exp(-((x - 3) ** 2 + (y - 1) ** 2) / 4)
    images = 0.1 * torch.randn(2000, generator=generator)[:, None, None] * spot
    turns = torch.randint(8, (2000,), generator=generator)
    return torch.stack([oriented(image, int(turn)) for image, turn in zip(images, turns, strict=True)])


def oriented(image: Tensor, number: int) -> Tensor:
    turned = torch.rot90(image, number % 4)
    return turned.T if number >= 4 else turned


def moments(residuals: Tensor) -> Tensor:
    """Mean product of every two pixels over all eight orientations, the long way."""
    every = torch.stack([oriented(image, number) for image in residuals for number in range(8)]).flatten(1).double()
    return every.T @ every / len(every)


def test_modes_are_those_of_all_eight_orientations(field: Tensor) -> None:
    residuals = field[:40] + 0.01 * torch.randn(40, N, N, generator=torch.Generator().manual_seed(9))
    values, images = modes(residuals)
    flat = images.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(N * N, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(flat.T @ (values[:, None] * flat), moments(residuals), rtol=1e-8, atol=1e-12)
    assert (values.diff() <= 0).all()


def test_draws_have_the_moments_of_the_residuals(field: Tensor) -> None:
    basis, explained = principal_components(field, NONE, None, 1.0, 0)
    assert explained == pytest.approx(1)
    assert len(basis) == 8, "one for each orientation"
    flat = basis.flatten(1).double()
    torch.testing.assert_close(flat.T @ flat, moments(field), rtol=0, atol=1e-4 * float(field.square().mean()))


def test_noise_is_taken_out(field: Tensor) -> None:
    """White noise three times weaker than the spot adds no component and no variance; alone it leaves none."""
    generator = torch.Generator().manual_seed(1)
    equal = torch.full((2000,), 0.03)
    noise = 0.03 * torch.randn(field.shape, generator=generator)
    clean, _ = principal_components(field, NONE, None, 1.0, 0)
    basis, _ = principal_components(field + noise, equal, None, 1.0, 0)
    assert len(clean) <= len(basis) <= len(clean) + 2
    assert float(basis.square().sum()) == pytest.approx(float(clean.square().sum()), rel=0.03)
    assert len(principal_components(noise, equal, None, 1.0, 0)[0]) <= 2


def test_unequal_noise_is_taken_out(field: Tensor) -> None:
    """A tenth of the galaxies with most of the noise: its greatest eigenvalue is beyond that of equal noise."""
    generator = torch.Generator().manual_seed(4)
    noise_sd = torch.where(torch.arange(2000) % 10 == 0, 0.09, 0.005)
    noise = noise_sd[:, None, None] * torch.randn(field.shape, generator=generator)
    assert len(principal_components(noise, noise_sd, None, 1.0, 0)[0]) <= 2
    equal = noise_sd.square().mean().sqrt().expand(2000)
    assert len(principal_components(noise, equal, None, 1.0, 0)[0]) > 10
    basis, _ = principal_components(field + noise, noise_sd, None, 1.0, 0)
    assert 8 <= len(basis) <= 10


def test_spiked_covariance() -> None:
    """Eigenvalues of 4000 draws in 400 dimensions, noise 1 and one direction of variance 3 more."""
    draws = torch.randn(4000, 400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draws[:, 0] *= 2
    values = torch.linalg.eigvalsh(draws.T @ draws / 4000).flip(0)
    freed = without_noise(values, 1.0, 0.1)
    assert float(values[0]) > 4.1, "too great, as it is"
    assert float(freed[0]) == pytest.approx(3, rel=0.1)


def test_a_field_that_noise_hides_has_no_waves() -> None:
    residuals = 0.1 * torch.randn(50, N, N, generator=torch.Generator().manual_seed(6))
    basis, explained = stationary_components(residuals, torch.ones(50), 5)
    assert basis.shape == (0, N, N)
    assert explained == 0


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.9, None), (1.0, 8)])
def test_number_of_components(field: Tensor, share: float, count: int | None) -> None:
    basis, explained = principal_components(field, NONE, None, share, 0)
    assert count is None or len(basis) == count
    assert explained >= share - 1e-9
    fewer, less = principal_components(field, NONE, len(basis) - 1, 1.0, 0)
    assert len(fewer) == len(basis) - 1
    assert less < share


def test_plane_waves_have_the_power_of_the_residuals() -> None:
    generator = torch.Generator().manual_seed(3)
    white = torch.fft.fft2(torch.randn(4000, N, N, generator=generator, dtype=torch.float64))
    frequency = torch.fft.fftfreq(N, 1 / N)
    falling = torch.exp(-torch.hypot(frequency, frequency[:, None]).round() / 3)
    residuals = torch.fft.ifft2(white * falling).real
    basis, explained = stationary_components(residuals, torch.zeros(4000), N * N)
    assert explained == pytest.approx(1)
    variance = basis.square().sum(0)
    torch.testing.assert_close(variance, variance.mean().expand(N, N), rtol=1e-4, atol=0)
    assert float(variance.mean()) == pytest.approx(float(residuals.square().mean()), rel=0.01)
    flat = basis.flatten(1)
    products = flat @ flat.T
    torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-4 * float(products.max()))
    assert stationary_components(residuals, torch.zeros(4000), 5)[1] < 1
    assert float(stationary_components(residuals, torch.full((4000,), 0.03), 1)[0].square().sum()) < float(
        basis[:1].square().sum()
    )
