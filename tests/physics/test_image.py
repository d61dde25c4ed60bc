"""The forward model: PSF, source, whole images against an external reference, S/N."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lenstronomy.LensModel.lens_model import LensModel
from scipy.ndimage import map_coordinates
from scipy.signal import fftconvolve

from lenspipe.image.noise import signal_to_noise
from lenspipe.image.psf import Convolution, gaussian_kernel
from lenspipe.image.simulator import Optics, Simulator, canonical
from lenspipe.lens.epl import series_terms


@pytest.mark.parametrize("shape", [(7, 7), (6, 9), (31, 31)])
def test_convolution_equals_the_direct_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    image = torch.rand(2, 3, 20, 24, generator=generator, dtype=torch.float64)
    blurred = Convolution(kernel, (20, 24))(image)
    y, x = shape[0] // 2, shape[1] // 2
    for lens in range(2):
        expected = fftconvolve(image[lens, 1].numpy(), kernel[lens].numpy())[y : y + 20, x : x + 24]
        np.testing.assert_allclose(blurred[lens, 1].numpy(), expected, atol=1e-10)


def test_psf_conserves_flux_and_commutes_with_shifts() -> None:
    kernel = torch.from_numpy(gaussian_kernel(1.3))[None]
    assert kernel.sum().item() == pytest.approx(1)
    image = torch.zeros(1, 40, 40, dtype=torch.float64)
    image[0, 18, 22] = 5.0
    blur = Convolution(kernel, (40, 40))
    assert blur(image).sum().item() == pytest.approx(5)
    torch.testing.assert_close(blur(torch.roll(image, (2, -3), (1, 2))), torch.roll(blur(image), (2, -3), (1, 2)))


def test_whole_image_against_lenstronomy_rays() -> None:
    """EPL and shear, a pixel source, a Gaussian PSF: within 1e-4 of the peak."""
    n, scale, q, phi = 48, 0.08, 0.7, 0.5
    source = gaussian_kernel(6.0, 31)
    source = np.pad(source / source.max(), ((0, 1), (0, 1)))
    values = dict(theta_E=1.1, gamma=2.1, q=q, phi=phi, center_x=0.03, center_y=-0.04, gamma1=0.04, gamma2=-0.02)
    values |= dict(source_x=0.1, source_y=-0.05, source_size=2.0, source_flux=1.7)
    parameters = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    kernel = gaussian_kernel(1.1)
    pixel_scale = torch.tensor([scale], dtype=torch.float64)
    simulator = Simulator(
        Optics(series_terms(q), interpolation="bilinear"), torch.from_numpy(kernel)[None], pixel_scale, (n, n)
    )
    ours = simulator.image(parameters, torch.from_numpy(source)[None])[0].numpy()

    y, x = (np.mgrid[:n, :n] - (n - 1) / 2) * scale
    e = (1 - q) / (1 + q)
    epl = dict(theta_E=1.1, gamma=2.1, e1=e * np.cos(2 * phi), e2=e * np.sin(2 * phi), center_x=0.03, center_y=-0.04)
    beta = LensModel(["EPL", "SHEAR"]).ray_shooting(x.ravel(), y.ravel(), [epl, dict(gamma1=0.04, gamma2=-0.02)])
    column, row = ((b - c) / 2.0 * 64 + 31.0 for b, c in zip(beta, (0.1, -0.05), strict=True))
    rays = map_coordinates(source, [row, column], order=1).reshape(n, n)
    reference = 1.7 * fftconvolve(rays, kernel, mode="same")
    assert np.abs(ours - reference).max() < 1e-4 * reference.max()


def test_a_flipped_sign_is_noticed() -> None:
    """The same lens with its shear turned round gives another image: the comparison above can fail."""
    names = ("theta_E", "gamma", "q", "phi", "center_x", "center_y", "gamma1", "gamma2")
    values = dict(zip(names, (1.1, 2.1, 0.7, 0.5, 0.0, 0.0, 0.05, 0.0), strict=True))
    values |= dict(source_x=0.1, source_y=0.0, source_size=2.0, source_flux=1.0)
    p = {name: torch.tensor([value]) for name, value in values.items()}
    simulator = Simulator(Optics(40), torch.ones(1, 1, 1), torch.tensor([0.1]), (40, 40))
    source = torch.from_numpy(gaussian_kernel(6.0, 32)).float()[None]
    image = simulator.image(p, source)
    flipped = simulator.image({**p, "gamma1": -p["gamma1"]}, source)
    assert float((image - flipped).abs().max()) > 0.1 * float(image.max())


def test_signal_to_noise_of_a_square() -> None:
    """Eqs. 24-25: a bright square of known pixels, all of them and none else above the threshold."""
    image = np.zeros((60, 60))
    image[20:40, 20:40] = 100.0
    usable = np.ones_like(image, dtype=bool)
    snr = signal_to_noise(image, np.full_like(image, 50.0), usable, smoothing=1e-6)
    assert snr == pytest.approx(100 / 50 * 400 / 20)
    assert signal_to_noise(0 * image, np.ones_like(image), usable) == 0


def test_canonical_parameters() -> None:
    one = torch.ones(1, dtype=torch.float64)
    filled = canonical({"r_Ein": 2 * one, "e1": 0 * one, "e2": one / 3})
    assert filled["q"].item() == pytest.approx(0.5)
    assert filled["phi"].item() == pytest.approx(np.pi / 4)
    assert filled["theta_E"].item() == pytest.approx(2 * np.sqrt(0.5))


def test_supersampling_converges_at_second_order() -> None:
    """The mean over a pixel, by midpoints: twice the rays a side, a quarter of the mean error."""
    names = ("theta_E", "gamma", "q", "phi", "center_x", "center_y", "gamma1", "gamma2")
    values = dict(zip(names, (1.1, 2.0, 0.7, 0.5, 0.0, 0.0, 0.05, 0.0), strict=True))
    values |= dict(source_x=0.1, source_y=0.05, source_size=2.0, source_flux=1.0)
    p = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    source = torch.from_numpy(gaussian_kernel(9.0, 32)[:64, :64])[None]
    none = torch.ones(1, 1, 1, dtype=torch.float64)

    def image(supersampling: int) -> torch.Tensor:
        optics = Optics(series_terms(0.7), supersampling)
        return Simulator(optics, none, torch.tensor([0.1], dtype=torch.float64), (32, 32)).image(p, source)

    exact = image(32)
    errors = [float((image(s) - exact).abs().mean()) for s in (1, 2, 4)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)
