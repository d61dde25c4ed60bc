"""The forward model: PSF, source, whole images against an external reference, S/N."""

from __future__ import annotations

from functools import partial

import caustics
import numpy as np
import pytest
import torch
from astropy.cosmology import Planck15
from lenstronomy.Data.pixel_grid import PixelGrid
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from references import lenstronomys
from scipy.ndimage import map_coordinates
from scipy.signal import fftconvolve
from torch import Tensor

from lenspipe.config import Lens
from lenspipe.image import light
from lenspipe.image.light import Light
from lenspipe.image.noise import noise_map, noise_of_data, signal_to_noise
from lenspipe.image.psf import Convolution, gaussian_kernel, of_pixels
from lenspipe.image.simulator import Optics, Simulator, canonical
from lenspipe.image.source_plane import sample, sample_blocks
from lenspipe.lens.profiles import Composite
from lenspipe.lens.table import DeflectionTable
from lenspipe.optics import line_of_sight


@pytest.mark.parametrize("shape", [(7, 7), (5, 4), (1, 6), (6, 9), (31, 31)])
def test_convolution_equals_the_direct_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    image = torch.rand(2, 3, 20, 24, generator=generator, dtype=torch.float64)
    blurred = Convolution(kernel, (20, 24))(image)
    y, x = shape[0] // 2, shape[1] // 2
    for lens in range(2):
        expected = fftconvolve(image[lens, 1].numpy(), kernel[lens].numpy())[y : y + 20, x : x + 24]
        np.testing.assert_allclose(blurred[lens, 1].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 8), (5, 6)])
def test_derivatives_of_the_convolution(shape: tuple[int, int]) -> None:
    """By FFT and directly: both modes, twice, of kernels that are not symmetric, and a batch of directions."""
    generator = torch.Generator().manual_seed(0)
    blur = Convolution(torch.rand(2, *shape, generator=generator, dtype=torch.float64), (6, 7))
    image = torch.rand(2, 1, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)

    def energy(image: Tensor) -> Tensor:
        return blur(image).square()

    assert torch.autograd.gradcheck(energy, image, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(energy, image)
    ways = torch.rand(3, *image.shape, generator=generator, dtype=torch.float64)
    along = torch.func.vmap(lambda way: torch.func.jvp(blur, (image.detach(),), (way,))[1])(ways)
    torch.testing.assert_close(along, torch.stack([blur(way) for way in ways]))


@pytest.mark.parametrize("side", [5, 11])
def test_one_kernel_for_all_images_in_the_wider_precision(side: int) -> None:
    """Small kernels, applied directly, and large ones, by FFT, take the same input."""
    kernel = torch.from_numpy(gaussian_kernel(1.0, side // 2))[None]
    image = torch.rand(3, 12, 14, generator=torch.Generator().manual_seed(0))
    blurred = Convolution(kernel, (12, 14))(image)
    assert blurred.dtype == torch.float64
    each = Convolution(kernel.expand(3, -1, -1), (12, 14))(image.double())
    torch.testing.assert_close(blurred, each, rtol=0, atol=1e-6)


@pytest.mark.parametrize("supersampling", [2, 4])
@pytest.mark.parametrize("side", [7, 12, 25])
def test_psf_of_pixels_from_a_finer_one(supersampling: int, side: int) -> None:
    """All its light, and, of light spread along a line, what falls into each pixel, halves on the edges shared."""
    fine = np.random.default_rng(1).random((side, side + 6))
    kernel = of_pixels(fine, supersampling)
    assert kernel.sum() == pytest.approx(fine.sum())
    offset = np.arange(side + 6) - (side + 6) // 2
    ny, nx = kernel.shape
    for pixel in range(nx):
        distance = np.abs(offset - supersampling * (pixel - nx // 2)) - supersampling / 2
        share = np.where(distance < 0, 1.0, np.where(distance == 0, 0.5, 0.0))
        assert kernel[:, pixel].sum() == pytest.approx((fine * share).sum())
    smooth = of_pixels(gaussian_kernel(1.5 * supersampling), supersampling)
    np.testing.assert_allclose(smooth, gaussian_kernel(1.5, len(smooth) // 2), rtol=0, atol=0.03 * smooth.max())
    assert of_pixels(fine, 1) is fine
    assert ny % 2 == nx % 2 == 1


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
    simulator = Simulator(Optics(interpolation="bilinear"), torch.from_numpy(kernel)[None], pixel_scale, (n, n))
    ours = simulator.image(parameters, torch.from_numpy(source)[None])[0].numpy()

    y, x = (np.mgrid[:n, :n] - (n - 1) / 2) * scale
    epl = lenstronomys(dict(theta_E=1.1, gamma=2.1, q=q, phi=phi, center_x=0.03, center_y=-0.04))
    beta = LensModel(["EPL", "SHEAR"]).ray_shooting(x.ravel(), y.ravel(), [epl, dict(gamma1=0.04, gamma2=-0.02)])
    column, row = ((b - c) / 2.0 * 64 + 31.0 for b, c in zip(beta, (0.1, -0.05), strict=True))
    rays = map_coordinates(source, [row, column], order=1).reshape(n, n)
    reference = 1.7 * fftconvolve(rays, kernel, mode="same")
    assert np.abs(ours - reference).max() < 1e-4 * reference.max()


MASS = dict(theta_E=1.1, gamma=2.1, q=0.7, phi=0.5, center_x=0.03, center_y=-0.04)
GALAXY = dict(amplitude=1.4, R_sersic=0.25, n_sersic=1.5, q=0.6, phi=1.1, center_x=0.1, center_y=-0.05)
BULGE = dict(amplitude=0.8, R_sersic=0.5, n_sersic=3.0, q=0.8, phi=0.4, center_x=0.02, center_y=-0.03)
PIXELS, SCALE = 64, 0.07


def real(values: dict[str, float], prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


def whole_image(
    supersampling: int, kernel: np.ndarray, table: DeflectionTable | None = None, psf_supersampling: int = 1
) -> np.ndarray:
    """EPL and shear, a Sersic source, a Sersic lens galaxy and a background."""
    light_of = Light({"bulge": "sersic"})
    optics = Optics(table, supersampling, psf_supersampling=psf_supersampling, light=light_of)
    scale = torch.tensor([SCALE], dtype=torch.float64)
    simulator = Simulator(optics, torch.from_numpy(kernel)[None], scale, (PIXELS, PIXELS))
    p = real(MASS | dict(gamma1=0.04, gamma2=-0.02, background=0.3)) | real(BULGE, "bulge_")
    source = {name: value[:, None, None] for name, value in real(GALAXY).items()}
    return simulator.image(p, partial(light.sersic, **source))[0].numpy()


def with_lenstronomys_b(sersic: dict[str, float]) -> dict[str, float]:
    """The same profile with its b_n, 1.9992 n - 0.3271, and its names."""
    values = lenstronomys(sersic)
    n = values["n_sersic"]
    b, rough = float(light.sersic_b(torch.tensor(n, dtype=torch.float64))), 1.9992 * n - 0.3271
    values["R_sersic"] *= (rough / b) ** n
    values["amp"] = values.pop("amplitude") * np.exp(b - rough)
    return values


@pytest.mark.filterwarnings("ignore:`axes` should not be")
@pytest.mark.parametrize(("supersampling", "of_the_psf"), [(1, 1), (2, 1), (2, 2), (4, 4)])
def test_whole_image_against_lenstronomy(supersampling: int, of_the_psf: int) -> None:
    """Sersic source and lens light, through its own ImageModel: within 1e-4 of the peak."""
    kernel = gaussian_kernel(1.1 * of_the_psf, 5 * of_the_psf)
    numerics = dict(supersampling_factor=supersampling, supersampling_convolution=of_the_psf > 1)
    numerics["supersampling_kernel_size"] = None  # all of it finely, not its core alone
    start = -(PIXELS - 1) / 2 * SCALE
    grid = dict(ra_at_xy_0=start, dec_at_xy_0=start, transform_pix2angle=SCALE * np.eye(2))
    reference = ImageModel(
        PixelGrid(PIXELS, PIXELS, **grid),
        PSF("PIXEL", kernel_point_source=kernel, point_source_supersampling_factor=of_the_psf),
        LensModel(["EPL", "SHEAR"]),
        LightModel(["SERSIC_ELLIPSE"]),
        LightModel(["SERSIC_ELLIPSE"]),
        kwargs_numerics=numerics,
    ).image(
        [lenstronomys(MASS), dict(gamma1=0.04, gamma2=-0.02)],
        [with_lenstronomys_b(GALAXY)],
        [with_lenstronomys_b(BULGE)],
    )
    ours = whole_image(supersampling, kernel, psf_supersampling=of_the_psf) - 0.3
    reference = reference / SCALE**2  # its amplitudes are per square arcsec
    assert np.abs(ours - reference).max() < 1e-4 * reference.max()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_averaged_over_blocks_of_points(interpolation: str, dtype: torch.dtype) -> None:
    """As one by one, over two lenses, within, on and beyond the edge; without numbers nothing, nor infinitely far."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randn(2, 5, 16, 16, generator=generator, dtype=dtype)
    x, y = 0.6 * torch.rand(2, 2, 12, 18, generator=generator, dtype=dtype)
    x[0], y[1, :2], x[1, 3, 4:6] = -x[0], 0.5, 3e9
    for block in (1, 2, 3, 6):
        one_by_one = torch.nn.functional.avg_pool2d(sample(images, x, y, interpolation), block)
        averaged = sample_blocks(images, x, y, interpolation, block)
        torch.testing.assert_close(averaged, one_by_one, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-12)
    shared = sample_blocks(images[:1].expand(2, -1, -1, -1), x, y, interpolation, 2)
    torch.testing.assert_close(shared, sample_blocks(images[[0, 0]], x, y, interpolation, 2), rtol=0, atol=0)
    x[0], x[1] = torch.nan, torch.inf
    assert not bool(sample_blocks(images, x, y, interpolation, 1).any())


@pytest.mark.filterwarnings("ignore")
def test_whole_image_against_caustics() -> None:
    """Its simulator has rays beyond the frame to blur in, ours has not: compared where they do not reach."""
    kernel = gaussian_kernel(1.1, 5)
    cosmology = caustics.FlatLambdaCDM()
    epl = dict(x0=0.03, y0=-0.04, q=0.7, phi=0.5, Rein=1.1, t=1.1)
    lens = caustics.SinglePlane(
        cosmology=cosmology,
        lenses=[
            caustics.EPL(cosmology=cosmology, z_l=0.5, z_s=1.0, n_iter=60, **epl),
            caustics.ExternalShear(cosmology=cosmology, z_l=0.5, z_s=1.0, x0=0.0, y0=0.0, gamma_1=0.04, gamma_2=-0.02),
        ],
        z_l=0.5,
        z_s=1.0,
    )

    def sersic(values: dict[str, float]) -> object:
        n = torch.tensor(values["n_sersic"], dtype=torch.float64)
        names = dict(x0="center_x", y0="center_y", q="q", phi="phi", n="n_sersic", Ie="amplitude")
        major = values["R_sersic"] / np.sqrt(values["q"])
        own = caustics.Sersic(Re=major, **{name: values[key] for name, key in names.items()})
        own.k = float(light.sersic_b(n))  # its own: the lower terms of the same series
        return own

    simulator = caustics.LensSource(
        lens, sersic(GALAXY), SCALE, PIXELS, lens_light=sersic(BULGE), psf=kernel, psf_shape=kernel.shape
    )
    simulator.to(dtype=torch.float64)
    reference = simulator().numpy()
    ours, inner = whole_image(1, kernel) - 0.3, np.s_[5:-5, 5:-5]
    assert np.abs(ours - reference)[inner].max() < 1e-4 * reference.max()


def test_noise_of_background_and_photons() -> None:
    image = np.array([[0.0, 4.0, -1.0]])
    np.testing.assert_allclose(noise_map(image, 0.3, None), 0.3)
    np.testing.assert_allclose(noise_map(image, 0.3, 100), [[0.3, np.sqrt(0.09 + 0.04), 0.3]])


def test_noise_estimated_from_data_does_not_favour_what_is_low_by_chance() -> None:
    """A faint disc and a star: as from the data alone, every fit of the disc's flux is 3 sigma low."""
    y, x = np.mgrid[-50:51, -50:51]
    clean = 2 * np.exp(-np.hypot(x, y) / 30) + 200 * np.exp(-(np.hypot(x - 20.3, y) ** 2) / 2)
    true = noise_map(clean, 0.2, 100)
    usable = np.hypot(x + 30, y) > 4  # a hole without data
    generator = np.random.default_rng(1)
    image = np.where(usable, clean + true * generator.standard_normal(clean.shape), np.nan)

    def low(noise: np.ndarray) -> float:
        weight = noise[usable] ** -2
        return float(((image - clean)[usable] * weight).sum() / np.sqrt(weight.sum()))

    found = noise_of_data(image, usable, 0.2, 100)
    assert low(noise_map(image, 0.2, 100)) - low(true) < -3
    assert abs(low(found) - low(true)) < 0.5
    np.testing.assert_allclose(found[usable], true[usable], rtol=0.15)
    star = np.hypot(x - 20, y) < 1
    np.testing.assert_allclose(found[star], true[star], rtol=0.03)
    assert np.std((found / true)[usable]) < 0.012 < np.std((noise_map(image, 0.2, 100) / true)[usable])


@pytest.mark.filterwarnings("ignore:Cosmology is provided")
def test_a_plane_in_front_of_the_lens_and_one_behind() -> None:
    """As lenstronomy traces them, in the cosmology of the settings."""
    lens = Lens(
        components={"near": {"profile": "sis", "redshift": 0.2}, "far": {"profile": "sis", "redshift": 0.9}},
        redshift=0.5,
        source_redshift=2.0,
        cosmology="Planck15",
    )
    sight = line_of_sight(lens)
    assert sight.main == 1
    spheres = {
        "near": dict(theta_E=0.1, center_x=0.5, center_y=-0.6),
        "far": dict(theta_E=0.2, center_x=-0.4, center_y=0.7),
    }
    p = real(MASS | dict(gamma1=0.04, gamma2=-0.02))
    p |= {key: value for name, sphere in spheres.items() for key, value in real(sphere, f"{name}_").items()}
    none, scale = torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([SCALE], dtype=torch.float64)
    simulator = Simulator(Optics(line_of_sight=sight), none, scale, (PIXELS, PIXELS))
    theirs = LensModel(
        ["SIS", "EPL", "SHEAR", "SIS"],
        multi_plane=True,
        z_source=2.0,
        lens_redshift_list=[0.2, 0.5, 0.5, 0.9],
        cosmo=Planck15,
    ).alpha(
        simulator.x[0].numpy().ravel(),
        simulator.y[0].numpy().ravel(),
        [spheres["near"], lenstronomys(MASS), dict(gamma1=0.04, gamma2=-0.02), spheres["far"]],
    )
    for ours, reference in zip(simulator.deflection(p), theirs, strict=True):
        np.testing.assert_allclose(ours.numpy().ravel(), reference, atol=1e-9)


def test_planes_of_one_redshift_are_one_plane() -> None:
    """A subhalo with the lens's own redshift given, and without; one behind it bends less."""
    lens = dict(redshift=0.5, source_redshift=2.0)
    same = line_of_sight(Lens(components={"halo": {"profile": "sis", "redshift": 0.5}}, **lens))
    behind = line_of_sight(Lens(components={"halo": {"profile": "sis", "redshift": 0.9}}, **lens))
    assert (len(same.planes), same.main, len(behind.planes), behind.main) == (1, 0, 2, 0)
    assert 0 < behind.ratios[0, 1] < 1
    p = real(MASS | dict(gamma1=0.04, gamma2=-0.02)) | real(dict(theta_E=0.2, center_x=0.8, center_y=0.5), "halo_")
    none, scale = torch.ones(1, 1, 1, dtype=torch.float64), torch.tensor([SCALE], dtype=torch.float64)

    def deflection(optics: Optics) -> torch.Tensor:
        return torch.stack(Simulator(optics, none, scale, (PIXELS, PIXELS)).deflection(p))

    together = deflection(Optics(components=Composite({"halo": "sis"})))
    torch.testing.assert_close(deflection(Optics(line_of_sight=same)), together)
    assert float((deflection(Optics(line_of_sight=behind)) - together).abs().max()) > 0.02


def test_a_flipped_sign_is_noticed() -> None:
    """The same lens with its shear turned round gives another image: the comparison above can fail."""
    names = ("theta_E", "gamma", "q", "phi", "center_x", "center_y", "gamma1", "gamma2")
    values = dict(zip(names, (1.1, 2.1, 0.7, 0.5, 0.0, 0.0, 0.05, 0.0), strict=True))
    values |= dict(source_x=0.1, source_y=0.0, source_size=2.0, source_flux=1.0)
    p = {name: torch.tensor([value]) for name, value in values.items()}
    simulator = Simulator(Optics(), torch.ones(1, 1, 1), torch.tensor([0.1]), (40, 40))
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
        optics = Optics(supersampling=supersampling)
        return Simulator(optics, none, torch.tensor([0.1], dtype=torch.float64), (32, 32)).image(p, source)

    exact = image(32)
    errors = [float((image(s) - exact).abs().mean()) for s in (1, 2, 4)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)
