"""The model of a batch against Pyro and autograd, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from lenspipe.config import Config, Fit
from lenspipe.fit import derived, diagnostics, hmc, map_search
from lenspipe.fit.model import LensModel
from lenspipe.image.light import Light
from lenspipe.image.psf import Convolution, gaussian_kernel
from lenspipe.image.simulator import LineOfSight, Optics, Simulator, canonical
from lenspipe.image.source_plane import light_centre
from lenspipe.image.window import STEP, Window, windows
from lenspipe.lens.profiles import Composite
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from lenspipe.source.base import Source
from tests.lenses import NOISE, TABLE

HALO = {
    "halo_Rs": "0.3",
    "halo_r_trunc": "1",
    "halo_center_x": "0.8",
    "halo_center_y": "0.4",
    "halo_alpha_Rs": "Normal(0.1, 0.05)",
}


def test_log_density_equals_pyros(model: tuple[LensModel, Tensor]) -> None:
    """Up to a constant of each lens: the difference between two points is the same to rounding."""
    lens_model, truth = model

    def pyros(w: Tensor) -> Tensor:
        trace = poutine.trace(poutine.condition(lens_model.pyro_model, {"w": w})).get_trace()
        trace.compute_log_prob()
        return trace.nodes["w"]["log_prob"] + trace.nodes["image"]["log_prob"]

    ours = lens_model.log_density(truth) - lens_model.log_density(0.3 * truth)
    torch.testing.assert_close(ours, pyros(truth) - pyros(0.3 * truth), rtol=1e-10, atol=1e-8)
    pyro.clear_param_store()


def check_jacobian(model: LensModel, w: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals and Jacobian of a model, both compared with its own; a Jacobian by its products with random vectors.

    A wrong entry anywhere changes all of the products, each of which is one reverse pass.
    """
    residuals, jacobian = model.linearise(w)
    w = w.clone().requires_grad_()
    own = model.residuals(w).flatten(1)
    torch.testing.assert_close(residuals, own.detach())
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        vector = torch.randn(own.shape, generator=generator, dtype=own.dtype)
        (product,) = torch.autograd.grad(own, w, vector, retain_graph=True)
        found = (jacobian.transpose(1, 2) @ vector[..., None])[..., 0]
        torch.testing.assert_close(found, product, rtol=1e-8, atol=1e-8 * float(product.abs().max()))
    return residuals, jacobian


def test_jacobian_equals_autograd(model: tuple[LensModel, Tensor]) -> None:
    check_jacobian(*model)


def test_components_are_part_of_the_model(model: tuple[LensModel, Tensor]) -> None:
    """A subhalo beside the main lens: the Jacobian has its columns, and without mass it changes nothing."""
    lens_model, truth = model
    halo = {name: parse_prior(text) for name, text in HALO.items()}
    priors = PriorMap(Config().priors.expressions() | halo)
    optics = replace(lens_model.optics, components=Composite({"halo": "tnfw"}))
    wider = LensModel(lens_model.batch, priors, lens_model.source, optics)
    w = torch.zeros(3, wider.size, dtype=torch.float64)
    named, latent = lens_model.split(truth)
    w[:, : named.shape[1]], w[:, -latent.shape[1] :] = named, latent
    assert wider.priors.free[-1] == "halo_alpha_Rs"
    residuals, _ = check_jacobian(wider, w)
    assert float((residuals - lens_model.residuals(truth).flatten(1)).abs().max()) > 0.1
    massless = PriorMap(priors.priors | {"halo_alpha_Rs": parse_prior(0.0)})
    same = LensModel(lens_model.batch, massless, lens_model.source, optics)
    torch.testing.assert_close(same.residuals(truth), lens_model.residuals(truth))


SPHERE = {"far_theta_E": "Normal(0.1, 0.02)", "far_center_x": "0.8", "far_center_y": "0.4"}


BULGE = {"bulge_amplitude": "LogNormal(0.5, 0.3)", "bulge_sd": "LogNormal(0.4, 0.2)", "bulge_q": "0.8"}
BULGE |= {"bulge_phi": "0.3", "bulge_center_x": "Normal(0, 0.1)", "bulge_center_y": "0"}


FIXED = {"bulge_amplitude": "0.5", "bulge_sd": "0.4", "bulge_center_x": "0.1"}


WITH_THE_MASS = {"bulge_phi": "phi", "bulge_q": "q", "bulge_center_x": "center_x", "background": "bulge_center_x"}


@pytest.mark.parametrize(
    ("optics", "further"),
    [
        (Optics(TABLE, supersampling=2), {}),
        (Optics(TABLE, supersampling=2, psf_supersampling=2), {}),
        (Optics(light=Light({"bulge": "gaussian"})), BULGE | {"background": "Normal(0, 0.1)"}),
        (Optics(light=Light({"bulge": "gaussian"})), BULGE | FIXED),
        (Optics(light=Light({"bulge": "gaussian"})), BULGE | WITH_THE_MASS | {"gamma2": "Laplace(0, 0.05)"}),
        (
            Optics(
                line_of_sight=LineOfSight(
                    (Composite({}), Composite({"far": "sis"})), 0, torch.tensor([[0, 0.4], [0, 0]]).double()
                )
            ),
            SPHERE,
        ),
    ],
    ids=["table", "fine psf", "light", "fixed", "shared", "planes"],
)
def test_every_part_of_the_forward_model_has_its_derivatives(
    model: tuple[LensModel, Tensor], optics: Optics, further: dict[str, str]
) -> None:
    """Jacobian and gradient equal those by autograd, for the table, lens light with a background, its own, given or
    with the centre, axis ratio and angle of the mass, and two planes."""
    own = {name: parse_prior(text) for name, text in further.items()}
    wider = LensModel(model[0].batch, PriorMap(Config().priors.expressions() | own), model[0].source, optics)
    w = 0.4 * torch.randn(3, wider.size, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    _, jacobian = check_jacobian(wider, w)
    moved = [name for name in further if name in wider.priors.free]
    columns = [wider.priors.free.index(name) for name in moved]
    assert bool((jacobian[0, :, columns].abs().amax(0) > 1e-3).all())
    for name, other in wider.priors.shared.items():
        torch.testing.assert_close(wider.parameters(w)[name], wider.parameters(w)[other], rtol=0, atol=0)


def test_flux_and_background_can_be_fixed(model: tuple[LensModel, Tensor]) -> None:
    """Where they are numbers the rest of the Jacobian is as it should be."""
    fixed = {name: parse_prior(value) for name, value in (("source_flux", 1.0), ("background", 0.1))}
    smaller = LensModel(model[0].batch, PriorMap(Config().priors.expressions() | fixed), model[0].source, Optics())
    w = 0.4 * torch.randn(3, smaller.size, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    _, half_d_chi2, _ = smaller.normal_equations(w)
    torch.testing.assert_close(smaller.value_and_gradient(w)[1], -half_d_chi2 - w, rtol=1e-8, atol=1e-8)


def test_gradient_follows_from_the_jacobian(model: tuple[LensModel, Tensor]) -> None:
    lens_model, truth = model
    _, gradient = lens_model.value_and_gradient(truth)
    _, half_d_chi2, _ = lens_model.normal_equations(truth)
    torch.testing.assert_close(gradient, -half_d_chi2 - truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_at_the_median_of_the_priors(model: tuple[LensModel, Tensor], dtype: torch.dtype) -> None:
    """The lens is round there, its angle undefined; the gradient is that of a lens which is not quite round."""
    whole = LensModel(model[0].batch.to(dtype), model[0].priors, model[0].source, Optics())
    median = torch.zeros(3, whole.size, dtype=dtype)
    (_, at), (_, beside) = whole.value_and_gradient(median), whole.value_and_gradient(median + 1e-3)
    assert float((at - beside).norm() / beside.norm()) < 0.02
    _, half_d_chi2, _ = whole.normal_equations(median)
    torch.testing.assert_close(at.double(), -half_d_chi2, rtol=1e-3, atol=1e-3 * float(at.abs().max()))
    for name in ("e1", "e2"):
        column = whole.priors.free.index(name)
        torch.testing.assert_close(at[:, column], beside[:, column], rtol=0.1, atol=0.01 * float(at.abs().max()))


def test_masked_pixels_do_not_count(model: tuple[LensModel, Tensor]) -> None:
    lens_model, truth = model
    image = lens_model.batch.image.clone()
    image[1, :4] = 1e6
    changed = LensModel(replace(lens_model.batch, image=image), lens_model.priors, lens_model.source, lens_model.optics)
    torch.testing.assert_close(changed.log_density(truth), lens_model.log_density(truth))


def with_round_mask(model: LensModel, share: float, side: int = 64, rays: int = 1) -> LensModel:
    """The lenses in a frame twice as wide, the last one with all masked but a disc of `share` of half the side."""
    batch, optics = model.batch, Optics(TABLE, rays, psf_supersampling=rays)
    axis = (torch.arange(side) - (side - 1) / 2) / (side / 2)
    usable = torch.ones(len(batch), side, side, dtype=torch.bool)
    usable[-1] = (axis - 0.2).square() + axis[:, None].square() < share**2
    blank = torch.zeros(len(batch), side, side).double()
    scale = 2 * batch.pixel_scale * batch.image.shape[-1] / side
    finer = replace(batch, image=blank, noise=blank + NOISE, usable=usable, pixel_scale=scale)
    empty = LensModel(finer, model.priors, model.source, optics)
    generator = torch.Generator().manual_seed(7)
    w = 0.5 * torch.randn(len(batch), empty.size, generator=generator, dtype=torch.float64)
    image = empty.image(w) + NOISE * torch.randn(blank.shape, generator=generator, dtype=torch.float64)
    image = torch.where(usable, image, 1e3) * batch.flux_unit[:, None, None]
    return LensModel(replace(finer, image=image), model.priors, model.source, optics)


def on_the_whole_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is computed in a window."""

    def whole(_: object, frame: tuple[int, int], *__: object) -> Iterator[tuple[Tensor, Window]]:
        corner = torch.zeros(len(_), dtype=torch.long)  # type: ignore[arg-type]
        yield torch.arange(len(corner)), Window(corner, corner, frame)

    monkeypatch.setattr("lenspipe.fit.model.windows", whole)


@pytest.mark.parametrize("rays", [1, 2])
def test_pixels_that_are_masked_or_dark_are_left_out(
    model: tuple[LensModel, Tensor], rays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Density, gradient, Gauss-Newton equations and the maximum are those of the whole frame, to rounding."""
    masked = with_round_mask(model[0], 0.3, rays=rays)
    w = 0.4 * torch.randn(3, masked.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def seen() -> list[Tensor]:
        climbed = map_search.climb(masked, w, 3.0, 3)[:2]
        return [masked.log_density(w), *masked.value_and_gradient(w), *masked.normal_equations(w), *climbed]

    parts = list(masked.parts(masked.parameters(w), masked.view(w)))
    sizes = {int(place): part.simulator.shape for part in parts for place in part.places}
    assert max(sizes[2]) <= 0.3 * 64 + 2 * masked.reach + STEP
    assert any(max(sizes[lens]) < 64 for lens in (0, 1))
    in_windows = seen()
    chi2 = masked.residuals(w).square().sum((1, 2))
    torch.testing.assert_close(in_windows[0], -0.5 * (chi2 + w.square().sum(1)), rtol=1e-12, atol=0)
    on_the_whole_frame(monkeypatch)
    for windowed, whole in zip(in_windows, seen(), strict=True):
        torch.testing.assert_close(windowed, whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))


def test_no_light_is_outside_of_a_window() -> None:
    """For lenses and sources of all shapes, sizes and places, four rays a pixel and a wide PSF."""
    lenses, side = 200, 48
    generator = torch.Generator().manual_seed(6)

    def within(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(lenses, generator=generator, dtype=torch.float64)

    p = {"theta_E": within(0.2, 3), "gamma": within(1.15, 2.85), "q": within(0.15, 1), "phi": within(-1.6, 1.6)}
    p |= {name: within(-0.3, 0.3) for name in ("center_x", "center_y", "gamma1", "gamma2", "source_x", "source_y")}
    p |= {"source_size": within(0.05, 3), "source_flux": within(1, 1)}
    psf = torch.rand(lenses, 9, 9, generator=generator, dtype=torch.float64)
    psf = psf / psf.sum((1, 2), keepdim=True)
    simulator = Simulator(Optics(TABLE, supersampling=2), psf, within(0.2, 0.4), (side, side + 8))
    source = torch.rand(lenses, 64, 64, generator=generator, dtype=torch.float64)
    image = simulator.image(p, source)
    left = image.clone()
    everywhere = tuple((torch.full((lenses,), -4), torch.full((lenses,), n + 4)) for n in (side, side + 8))
    rows = torch.arange(lenses)
    area = 0
    for places, window in windows(simulator.lit(p, light_centre(source), rows), simulator.shape, 4, everywhere):
        part = simulator.within(window, places)
        own = part.image({name: value[places] for name, value in p.items()}, source[places])
        torch.testing.assert_close(own, window.cut(image, places))
        up, across = (torch.arange(n) for n in window.size)
        left[places[:, None, None], window.row[:, None, None] + up[:, None], window.column[:, None, None] + across] = 0
        area += len(places) * window.size[0] * window.size[1]
    assert float(left.abs().max()) < 1e-12
    assert area < 0.75 * image.numel()


def test_wide_pixels_blur_as_narrow_ones_do(model: tuple[LensModel, Tensor]) -> None:
    """Of an image that is constant over wide pixels, averaging the blurred image is blurring the averaged one."""
    batch = model[0].batch
    for size in (5, 6, 7, 8, 9):
        kernel = torch.rand(3, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        wide = replace(batch, psf=kernel / kernel.sum((1, 2), keepdim=True)).coarse()
        image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        narrow = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
        blurred = Convolution(kernel / kernel.sum((1, 2), keepdim=True), (24, 24))(narrow)
        torch.testing.assert_close(Convolution(wide.psf, (12, 12))(image), torch.nn.functional.avg_pool2d(blurred, 2))
        assert wide.pixel_scale.tolist() == pytest.approx([0.4] * 3)


def test_magnification_and_images(model: tuple[LensModel, Tensor]) -> None:
    """Without a lens the source is seen once and not magnified; with one, the critical curve has the radius theta_E."""
    lens_model = model[0].take(torch.tensor([0, 2]))
    flat = {"theta_E": "1e-4", "gamma": "2", "e1": "0", "e2": "0", "gamma1": "0", "gamma2": "0"}
    flat |= {"source_size": "2.0", "center_x": "0.3", "center_y": "0.3"}

    def fixed(changes: dict[str, str]) -> LensModel:
        priors = Config().priors.expressions() | {name: parse_prior(text) for name, text in changes.items()}
        return LensModel(lens_model.batch, PriorMap(priors), lens_model.source, lens_model.optics)

    nothing = fixed(flat)
    w = torch.zeros(2, nothing.size, dtype=torch.float64)
    total, lensed = derived.source_fluxes(nothing, w)
    torch.testing.assert_close(lensed, total, rtol=0.01, atol=0)
    assert derived.geometry(nothing, w)["images"].tolist() == [1, 1]
    lens = fixed(flat | {"theta_E": "1.1", "e1": "0.1", "center_x": "0", "center_y": "0", "source_size": "1.0"})
    total, lensed = derived.source_fluxes(lens, w)
    assert bool((lensed > 5 * total).all())
    found = derived.geometry(lens, w)
    np.testing.assert_allclose(found["einstein_radius"], 1.1, rtol=1e-3)
    assert found["images"].tolist() == [4, 4]
    curves, caustics = derived.critical_curves(lens, 1, w)
    np.testing.assert_allclose(derived.equal_area_radius(curves), 1.1, rtol=1e-3)
    assert np.abs(caustics).max() < 0.3 < np.abs(curves).max()  # an astroid of some e theta_E about the lens


def test_half_of_the_light_of_a_gaussian_is_within_its_radius(model: tuple[LensModel, Tensor]) -> None:
    """1.177 standard deviations, here of 2.7 of the 64 pixels; and the signal-to-noise goes as the brightness."""

    class Round(Source):
        size = 1

        def forward(self, w: Tensor) -> Tensor:
            axis = torch.arange(64, dtype=w.dtype) - 31.5
            return (1 + 0 * w)[..., None] * torch.exp(-(axis.square() + axis[:, None].square()) / (2 * 2.7**2))

    def fixed(flux: str) -> LensModel:
        priors = Config().priors.expressions() | {"source_size": parse_prior("2.0"), "source_flux": parse_prior(flux)}
        return LensModel(model[0].batch, PriorMap(priors), Round(), model[0].optics)

    w = torch.zeros(3, fixed("1").size, dtype=torch.float64)
    radius = derived.half_light_radius(fixed("1"), w)
    np.testing.assert_allclose(radius.numpy(), 1.1774 * 2.7 / 64 * 2.0, rtol=0.01)
    bright, dim = (derived.lensed_signal_to_noise(fixed(flux), w) for flux in ("2", "1"))
    np.testing.assert_allclose(bright, 2 * dim)
    assert (dim > 10).all()


def test_ellipticity_of_a_component_is_its_axis_ratio_and_angle() -> None:
    given = {"bulge_e1": torch.tensor([0.0, -0.2]), "bulge_e2": torch.tensor([0.25, 0.0])}
    main = {name: torch.tensor([0.5]) for name in ("q", "phi", "theta_E")}
    filled = canonical(given | main)
    torch.testing.assert_close(filled["bulge_q"], torch.tensor([0.6, 2 / 3]))
    torch.testing.assert_close(filled["bulge_phi"].abs(), torch.tensor([torch.pi / 4, torch.pi / 2]))


def test_diagnostics_of_a_fit(model: tuple[LensModel, Tensor]) -> None:
    """Of lenses drawn from the model, at the MAP and at the truth: one variable a lens, and no doubt raised."""
    lens_model, truth = model
    settings = Fit(starts=6, survivors=3, scout_pixels=12, temperatures=(30.0, 10.0, 3.0), steps_per_temperature=6)
    found = map_search.search(lens_model, settings, [torch.Generator().manual_seed(i) for i in range(3)])
    w = truth[:, None, None].expand(-1, 2, 4, -1)
    value = lens_model.log_density(truth)[:, None, None].expand(-1, 2, 4)
    variables = diagnostics.variables(
        lens_model, found, hmc.Draws(w, value, value, value > 0, value, *[value[:, 0, 0]] * 2)
    )
    assert all(len(values) == 3 for _, values in variables.values())
    assert variables["basin_log_evidence"][1].shape == (3, 2)
    assert variables["basin_w"][1].shape == (3, 2, lens_model.size)
    assert variables["start_basin"][1].shape == (3, 3)
    assert bool((variables["starts_agreeing"][1] >= 1).all())
    chi2 = lens_model.residuals(truth).square().sum((1, 2)).numpy()
    np.testing.assert_allclose(diagnostics.chi2_of_draws(hmc.Draws(w, *[value] * 6))[:, 0, 0], chi2, rtol=1e-9)
    assert (np.abs(variables["predictive_p"][1] - 0.5) < 0.4999).all()
    excess, error = (variables[name][1] for name in ("residual_excess", "residual_excess_error"))
    assert (np.abs(excess) < 4 * error).all()
    depth, parameter = (variables[name][1] for name in ("prior_depth", "prior_depth_of"))
    named = truth[:, : len(lens_model.priors.free)].abs()
    np.testing.assert_allclose(depth, named.amax(1))
    assert parameter.tolist() == [lens_model.priors.free[i] for i in named.argmax(1)]


def test_what_twice_the_rays_change(model: tuple[LensModel, Tensor]) -> None:
    """As whole images do; a quarter of it in brightness where there are twice as many already, PSF fine or coarse."""
    lens_model, truth = model

    def with_rays(rays: int, of_the_psf: int = 1) -> LensModel:
        psf = torch.from_numpy(gaussian_kernel(1.0 * of_the_psf)).expand(3, -1, -1)
        optics = Optics(TABLE, supersampling=rays, psf_supersampling=of_the_psf)
        return LensModel(replace(lens_model.batch, psf=psf), lens_model.priors, lens_model.source, optics)

    one, two, fine = (diagnostics.ray_chi2(with_rays(*rays), truth) for rays in ((1,), (2,), (2, 2)))
    change = with_rays(2).residuals(truth) - with_rays(1).residuals(truth)
    np.testing.assert_allclose(one, change.square().sum((1, 2)).numpy(), rtol=1e-9)
    np.testing.assert_allclose(two, one / 16, rtol=0.3)
    np.testing.assert_allclose(fine, two, rtol=0.3)
