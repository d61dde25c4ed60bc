"""The fit: its model against Pyro and autograd, its search and its sampler on known targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from lenspipe import memory
from lenspipe.catalogue.batch import LensBatch
from lenspipe.config import Config, Fit
from lenspipe.fit import batch, chains, derived, diagnostics, hmc, map_search, stage
from lenspipe.fit.batch import Task
from lenspipe.fit.model import LensModel
from lenspipe.fit.parts import read_part
from lenspipe.image.light import Light
from lenspipe.image.psf import Convolution, gaussian_kernel
from lenspipe.image.simulator import LineOfSight, Optics, Simulator, canonical
from lenspipe.image.source_plane import light_centre
from lenspipe.image.window import STEP, Window, windows
from lenspipe.lens.profiles import Composite
from lenspipe.lens.table import build_table
from lenspipe.posteriors.convergence import convergence
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap, Wall
from lenspipe.results import Results
from lenspipe.source.base import Source

NOISE = 0.05
TABLE = build_table(65, (16, 0.1), (10, 1.1, 2.9))
HALO = {
    "halo_Rs": "0.3",
    "halo_r_trunc": "1",
    "halo_center_x": "0.8",
    "halo_center_y": "0.4",
    "halo_alpha_Rs": "Normal(0.1, 0.05)",
}


class Blobs(Source):
    """Three Gaussians whose brightness the unknowns set."""

    size = 3

    def forward(self, w: Tensor) -> Tensor:
        y, x = torch.meshgrid(*[torch.arange(64, dtype=w.dtype) - 31.5] * 2, indexing="ij")
        places = ((0, 0, 8.0), (9, 4, 4.0), (-6, 7, 3.0))
        blobs = torch.stack([torch.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * sd**2)) for a, b, sd in places])
        return torch.einsum("lk,kyx->lyx", 0.4 + 0.2 * torch.tanh(w), blobs)


def lens_batch() -> LensBatch:
    """Three small empty images, in float64; one has a masked strip."""
    n, lenses = 24, 3
    usable = torch.ones(lenses, n, n, dtype=torch.bool)
    usable[1, :4] = False
    return LensBatch(
        ("a", "b", "c"),
        torch.zeros(lenses, n, n).double(),
        torch.full((lenses, n, n), NOISE).double(),
        usable,
        torch.from_numpy(gaussian_kernel(1.0)).expand(lenses, -1, -1),
        torch.full((lenses,), 0.2).double(),
        torch.tensor([1.0, 1.0, 2.0]).double(),
        torch.tensor([1.0, 3.0, 2.0]).double(),
    )


@pytest.fixture(scope="module")
def model() -> tuple[LensModel, Tensor]:
    """Three small lenses drawn from the model, in float64, and their true unknowns; deflections by a table."""
    generator = torch.Generator().manual_seed(5)
    source = Blobs()
    batch = lens_batch()
    priors = PriorMap(Config().priors.expressions())
    blank = LensModel(batch, priors, source, Optics(TABLE))
    truth = 0.5 * torch.randn(len(batch), blank.size, generator=generator, dtype=torch.float64)
    noise = NOISE * torch.randn(batch.image.shape, generator=generator, dtype=torch.float64)
    image = blank.image(truth) * batch.flux_unit[:, None, None] + noise
    return LensModel(replace(batch, image=image), priors, source, Optics(TABLE)), truth


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
    """1.177 standard deviations, here of 8 of the 64 pixels; and the signal-to-noise goes as the brightness."""

    class Round(Source):
        size = 1

        def forward(self, w: Tensor) -> Tensor:
            axis = torch.arange(64, dtype=w.dtype) - 31.5
            return (1 + 0 * w)[..., None] * torch.exp(-(axis.square() + axis[:, None].square()) / (2 * 8**2))

    def fixed(flux: str) -> LensModel:
        priors = Config().priors.expressions() | {"source_size": parse_prior("2.0"), "source_flux": parse_prior(flux)}
        return LensModel(model[0].batch, PriorMap(priors), Round(), model[0].optics)

    w = torch.zeros(3, fixed("1").size, dtype=torch.float64)
    radius = derived.half_light_radius(fixed("1"), w)
    np.testing.assert_allclose(radius.numpy(), 1.177 * 8 / 64 * 2.0, atol=0.5 * 2.0 / 64)
    bright, dim = (derived.lensed_signal_to_noise(fixed(flux), w) for flux in ("2", "1"))
    np.testing.assert_allclose(bright, 2 * dim)
    assert (dim > 10).all()


def test_search_reaches_the_truth(model: tuple[LensModel, Tensor]) -> None:
    lens_model, truth = model
    settings = Fit(starts=6, survivors=2, scout_pixels=12, temperatures=(30.0, 10.0, 3.0), steps_per_temperature=6)
    found = map_search.search(lens_model, settings, [torch.Generator().manual_seed(i) for i in range(3)])
    assert bool((found.log_density > lens_model.log_density(truth) - 1).all())
    assert bool((torch.linalg.eigvalsh(found.hessian) > 0.99).all())


def test_dropped_starts_count_with_the_one_they_are_like(model: tuple[LensModel, Tensor]) -> None:
    """A copy of a copy counts with the first; one that is like none, or not alive, with none."""
    lens_model, _ = model
    offsets = torch.tensor([0.08, 5.0, 0.0, 9.0, 0.16, 0.0])  # the fifth is like the first, the first like the third
    w = offsets[None, :, None].expand(3, -1, lens_model.size).double()
    value = torch.tensor([[2.0, 4.0, 3.0, 0.5, 1.0, 9.0]]).expand(3, -1).double()
    alive = torch.tensor([[True] * 5 + [False]]).expand(3, -1)
    ones = torch.ones(3, 6, dtype=torch.long)
    left, count = map_search.dropped(lens_model, w, value, alive, torch.tensor([[1, 2]]).expand(3, -1), ones)
    assert left.tolist() == [[False, True, True, False, False, False]] * 3
    assert count[:, [1, 2, 3, 5]].tolist() == [[1, 3, 1, 1]] * 3


def test_points_that_come_to_the_same_place_go_on_as_one(model: tuple[LensModel, Tensor]) -> None:
    """The best of those that are alike and as likely stands for them; all end where they would have ended alone."""
    lens_model, truth = model
    offsets = torch.tensor([0.05, 3.0, 0.0, 0.05, 0.13])  # the last is like the first, the first like the third
    w = offsets[None, :, None].expand(3, -1, lens_model.size).double()
    value = torch.tensor([[9.5, 8.0, 10.0, 4.0, 9.0]]).expand(3, -1).double()
    assert map_search.merged(lens_model, w, value).tolist() == [[2, 1, 2, 3, 2]] * 3
    begun = torch.stack([truth + 1e-3, truth, truth + 0.5], 1)
    ended, reached = map_search.settle(lens_model, begun, Fit(steps_per_temperature=20))
    torch.testing.assert_close(ended[:, 0], ended[:, 1], rtol=0, atol=0)
    alone = map_search.settle(lens_model, begun[:, 2:], Fit(steps_per_temperature=20))[1]
    assert bool((reached[:, 2:] >= alone - 0.1).all())


def test_a_start_agrees_where_its_coarse_maximum_is_elsewhere(model: tuple[LensModel, Tensor]) -> None:
    """Two starts end at one maximum of the coarse pixels, and so in one basin, however far that is from its own end."""
    lens_model, truth = model
    settled = lens_model.coarse()
    brighter = replace(settled.batch, image=1.2 * settled.batch.image)
    biased = LensModel(brighter, settled.priors, settled.source, settled.optics)
    ended, value, _ = map_search.climb(biased, truth, 1.0, 20)
    w = torch.stack([ended, ended], 1)
    found = map_search.finish(lens_model, biased, w, torch.stack([value, value - 1e-3], 1), Fit())
    assert found.start_basin.tolist() == [[0, 0]] * 3


def test_all_that_coarse_pixels_leave_open_climb_on_the_fine_ones(model: tuple[LensModel, Tensor]) -> None:
    """What was third there may be first in the end; a point at the place of a better one, or far behind, is left."""
    lens_model, truth = model
    ended, reached, _ = map_search.climb(lens_model, truth, 1.0, 20)
    w = torch.stack([truth + 1.5, truth - 1.5, ended, ended, truth + 3], 1)
    behind = torch.tensor([0.0, 10.0, 20.0, 30.0, 60.0], dtype=torch.float64)
    value = reached[:, None] - behind
    chosen, spread = map_search.apart(lens_model, w, value, 50)
    assert chosen.tolist() == [[True, True, True, False, False]] * 3
    assert torch.isfinite(spread).all(-1).tolist() == chosen.tolist()
    found = map_search.finish(lens_model, lens_model, w, value, Fit(final_steps=1))
    torch.testing.assert_close(found.log_density, reached, rtol=0, atol=0.1)
    assert found.start_basin[:, 2:4].tolist() == [[0, 0]] * 3
    assert bool((found.basins_log_density[:, 1] < reached - 50).all())


def test_a_start_without_numbers_does_not_take_the_others_with_it(model: tuple[LensModel, Tensor]) -> None:
    """The best of the others is climbed from; a lens that has none ends without a finite log posterior."""
    lens_model, truth = model
    w = torch.stack([truth, torch.full_like(truth, torch.nan)], 1)
    value = torch.stack([lens_model.log_density(truth), torch.full_like(truth[:, 0], torch.nan)], 1)
    found = map_search.finish(lens_model, lens_model, w, value, Fit(final_steps=3))
    assert bool((found.log_density > value[:, 0] - 1).all())
    _, reached, done = map_search.climb(lens_model, w[:, 1], 1.0, 2)
    assert (reached == -torch.inf).all(), "what is no number would be ranked first"
    assert not done.any()
    none = map_search.finish(lens_model, lens_model, w[:, 1:], value[:, 1:], Fit(final_steps=3))
    assert not torch.isfinite(none.log_density).any()


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


def gaussian_target(precision: Tensor, mean: Tensor) -> hmc.Target:
    def target(w: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        offset = w - mean
        pull = -(precision @ offset[..., None])[..., 0]
        return 0.5 * (offset * pull).sum(-1), pull

    return target


@pytest.fixture
def correlated() -> tuple[Tensor, Tensor]:
    """Precision and mean of a correlated Gaussian in three dimensions."""
    root = torch.tensor([[2.0, 0, 0], [0.9, 1.0, 0], [-0.4, 0.3, 0.5]], dtype=torch.float64)
    return root @ root.T, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_sampler_draws_a_gaussian_it_was_given_the_wrong_metric_for(correlated: tuple[Tensor, Tensor]) -> None:
    """Mean and covariance within five standard errors; false alarms below 1e-5."""
    precision, mean = correlated
    settings = Fit(chains=8, warmup=300, draws=2000)
    center = torch.zeros(2, 3, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    target = gaussian_target(precision, mean)
    run = hmc.Run(target, center, 2 * torch.eye(3).double().expand(2, -1, -1), settings, generators)
    draws = run.finish()
    covariance = np.linalg.inv(precision.numpy())
    for lens in range(2):
        w = draws.w[lens].flatten(0, 1).numpy()
        error = 5 * np.sqrt(np.diag(covariance) / 2000)
        assert np.all(np.abs(w.mean(0) - mean.numpy()) < error)
        spread = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        assert np.all(np.abs(np.cov(w.T) - covariance) < 0.15 * spread)
    assert abs(float(draws.acceptance.mean()) - settings.target_accept) < 0.1


def test_trajectories_grow_to_the_length_of_a_valley(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the draws are wide where curvature does not tell; else a few draws are hardly independent."""
    precision = torch.diag(torch.tensor([1.0, 1.0, 1 / 400]).double())
    target, center = gaussian_target(precision, torch.zeros(3).double()), torch.zeros(1, 3).double()
    settings, metric = Fit(chains=4, warmup=100, draws=100, max_leapfrog_steps=256), torch.eye(3)[None].double()

    def drawn() -> tuple[hmc.Run, float]:
        generators = [torch.Generator().manual_seed(3)]
        run = hmc.Run(target, center, metric, settings, generators, lambda w: metric.expand(len(w), -1, -1))
        draws = run.finish().w[..., 2]
        return run, float(convergence([draws.numpy()])[1][0])

    run, size = drawn()
    assert 8 < float(run.length) < 30
    assert size > 100
    monkeypatch.setattr(hmc, "reach", lambda metric, seen: torch.zeros(1).double())
    assert drawn()[1] < size / 4


def test_the_way_to_the_posterior_is_forgotten() -> None:
    """Chains that begin far off come to know how wide it is, and not how far they came; their metric neither."""
    target, center = gaussian_target(torch.eye(3).double(), torch.zeros(3).double()), torch.zeros(1, 3).double()
    metric = torch.eye(3)[None].double()

    def curvature(w: Tensor) -> Tensor:
        return torch.where(w.abs().amax(1) > 10, 100.0, 1.0)[:, None, None] * metric

    settings = Fit(chains=4, warmup=100, draws=20, path_length=1.0, max_leapfrog_steps=256)
    far = torch.full((1, 4, 3), 60.0).double()
    run = hmc.Run(target, center, metric, settings, [torch.Generator().manual_seed(3)], curvature, begin=far)
    while run.iteration < 25:
        run.advance()
    assert float(run.length) > 5
    run.finish()
    assert float(run.length) < 2.5
    torch.testing.assert_close(run.hessian, metric)


def test_leapfrog_is_reversible_and_keeps_the_energy(correlated: tuple[Tensor, Tensor]) -> None:
    precision, mean = correlated
    metric = hmc.Metric(gaussian_target(precision, mean), torch.zeros(1, 3).double(), torch.eye(3)[None].double(), 4)
    generator = torch.Generator().manual_seed(0)
    u, momentum = torch.randn(2, 1, 4, 3, generator=generator, dtype=torch.float64)
    value, gradient = metric.target(u)
    leaps = torch.tensor([20.0])

    def run(step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return hmc.leapfrog(metric, u, momentum, value, gradient, torch.tensor([step]).double(), leaps)

    end, p, end_value, end_gradient = run(0.05)
    back, minus_p, _, _ = hmc.leapfrog(metric, end, -p, end_value, end_gradient, torch.tensor([0.05]).double(), leaps)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(minus_p, -momentum)

    def energy_error(step: float) -> float:
        _, p, v, _ = run(step)
        before = 0.5 * momentum.square().sum(-1) - value
        return float((0.5 * p.square().sum(-1) - v - before).abs().max())

    assert energy_error(0.01) < energy_error(0.05) / 10  # second order


ABOVE_ZERO = [Wall(0, 1.0, 0.0), Wall(2, 1.0, 0.0)]


def folded_target(precision: Tensor, mean: Tensor) -> hmc.Target:
    """A Gaussian of which only w_0 >= 0 is left, and its mirror image."""
    whole = gaussian_target(precision, mean)

    def target(w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sign = torch.ones_like(w)
        sign[:, 0] = torch.where(w[:, 0] < 0, -1.0, 1.0)
        value, gradient = whole(sign * w, rows)
        return value, sign * gradient

    return target


def test_reflected_trajectories_come_back_and_stay_inside(correlated: tuple[Tensor, Tensor]) -> None:
    """In any whitening: no unknown falls below 0, momenta keep their lengths, and reversed they go the same way."""
    hessian = torch.stack([correlated[0], torch.eye(3).double()])
    metric = hmc.Metric(gaussian_target(*correlated), torch.full((2, 3), 0.2).double(), hessian, 4, ABOVE_ZERO)
    generator = torch.Generator().manual_seed(0)
    begun, momentum = torch.randn(2, 2, 4, 3, generator=generator, dtype=torch.float64)
    u = metric.whitened(metric.unwhitened(begun).abs())
    time, lenses = torch.full((2, 1, 1), 6.0).double(), torch.arange(2)
    end, turned = metric.drift(u, momentum, time, lenses)
    assert float(metric.unwhitened(end)[:, [0, 2]].min()) > -1e-12
    torch.testing.assert_close(turned.square().sum(-1), momentum.square().sum(-1))
    assert int(((end - u - 6 * momentum).abs().amax(-1) > 1).sum()) == 4  # so many were reflected
    back, minus = metric.drift(end, -turned, time, lenses)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(minus, -momentum)
    straight = torch.where(metric.unwhitened(u + 6 * momentum)[:, [0, 2]].amin(-1).unflatten(0, (2, 4)) > 0, 1.0, 0.0)
    torch.testing.assert_close(end * straight[..., None], (u + 6 * momentum) * straight[..., None])


def test_a_metric_is_no_wider_than_a_wall_leaves_room(correlated: tuple[Tensor, Tensor]) -> None:
    """Along folded unknowns near 0, one after the other, and no other; where there is room for all nothing changes."""
    hessian = correlated[0].expand(2, -1, -1)
    wide = torch.linalg.inv(hessian).diagonal(dim1=1, dim2=2)
    room = wide * torch.tensor([[0.1, 0.1, 2.0], [3.0, 1e-3, 1.5]]).double()
    near = room.sqrt()
    left = torch.linalg.inv(hmc.narrowed(hessian, near, room, ABOVE_ZERO)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(left[0, 0], room[0, 0])
    assert bool((left[0] <= wide[0]).all())
    torch.testing.assert_close(left[1], wide[1])
    torch.testing.assert_close(hmc.narrowed(hessian, 2 * near, room, ABOVE_ZERO), hessian)
    torch.testing.assert_close(torch.linalg.inv(hessian).diagonal(dim1=1, dim2=2), wide, rtol=0, atol=0)


def test_a_metric_is_narrow_where_a_maximum_is_pressed_against_a_wall() -> None:
    """By the slope there, whichever side the wall is on; one that is free, or far from a wall, changes nothing."""
    hessian = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 1.0]]).double().expand(3, -1, -1)
    center = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.4, 0.5, 0.0]]).double()
    gradient = torch.tensor([[-20.0, 0.0, 5.0], [20.0, 30.0, 0.0], [-20.0, 0.0, 0.0]]).double()
    walls = [Wall(0, 1.0, 0.0), Wall(1, -1.0, 0.51), Wall(2, 1.0, 0.0)]
    found = hmc.pressed(hessian, center, gradient, walls)
    wide, narrow = (torch.linalg.inv(of).diagonal(dim1=1, dim2=2) for of in (hessian, found))
    torch.testing.assert_close(narrow[0, 0], torch.tensor(20.0).double() ** -2)
    torch.testing.assert_close(narrow[1, 1], torch.tensor(30.0).double() ** -2)
    torch.testing.assert_close(found[2], hessian[2])
    assert bool((narrow <= wide + 1e-12).all())
    changed = (found - hessian).abs().amax(2) > 1e-9
    assert changed.tolist() == [[True, False, False], [False, True, False], [False, False, False]]


def test_sampler_draws_what_is_left_of_a_gaussian(correlated: tuple[Tensor, Tensor]) -> None:
    """Folded at 0 where half of it or most is cut off: moments within five standard errors of draws by rejection."""
    precision, mean = correlated
    settings = Fit(chains=8, warmup=300, draws=2000)
    rng = np.random.default_rng(1)
    for middle in (0.0, -0.7):
        shifted = torch.cat([torch.tensor([middle]).double(), mean[1:]])
        center = torch.zeros(1, 3, dtype=torch.float64)
        generators = [torch.Generator().manual_seed(3)]
        target = folded_target(precision, shifted)

        def curvature(w: Tensor) -> Tensor:
            return precision.expand(len(w), -1, -1)

        run = hmc.Run(target, center, precision[None], settings, generators, curvature, walls=ABOVE_ZERO[:1])
        assert float(run.w[..., 0].min()) >= 0
        w = run.finish().w[0].flatten(0, 1).numpy()
        every = rng.multivariate_normal(shifted.numpy(), np.linalg.inv(precision.numpy()), 2_000_000)
        left = every[every[:, 0] >= 0]
        assert w[:, 0].min() >= -1e-12
        error = 5 * left.std(0) / np.sqrt(2000)
        np.testing.assert_array_less(np.abs(w.mean(0) - left.mean(0)), error)
        np.testing.assert_allclose(np.cov(w.T), np.cov(left.T), atol=0.15 * float(np.outer(*2 * [left.std(0)]).max()))


def test_light_that_is_not_there_is_exactly_none(model: tuple[LensModel, Tensor]) -> None:
    """Of two Gaussians of the lens galaxy's light one is dark: the search ends at its wall, a maximum all the same."""
    lens_model, truth = model
    shape = {"amplitude": "HalfNormal(3)", "q": "0.8", "phi": "0.3", "center_x": "0", "center_y": "0"}
    further = {f"{name}_{key}": text for name in ("bulge", "halo") for key, text in shape.items()}
    further |= {"bulge_sd": "0.3", "halo_sd": "0.9"}
    own = {name: parse_prior(text) for name, text in further.items()}
    priors = PriorMap(Config().priors.expressions() | own)
    optics = Optics(TABLE, light=Light({"bulge": "gaussian", "halo": "gaussian"}))
    wider = LensModel(lens_model.batch, priors, lens_model.source, optics)
    dark, lit = (wider.priors.free.index(f"{name}_amplitude") for name in ("bulge", "halo"))
    assert wider.priors.folded == [dark, lit]
    named, latent = lens_model.split(truth)
    w = torch.zeros(3, wider.size, dtype=torch.float64)
    w[:, : named.shape[1]], w[:, -latent.shape[1] :] = named, latent
    w[:, lit] = 0.5
    hole = wider.image(w) - wider.image(w.index_fill(1, torch.tensor([dark]), 0.05))
    batch = replace(lens_model.batch, image=(wider.image(w) + hole) * lens_model.batch.flux_unit[:, None, None])
    searched = LensModel(batch, priors, lens_model.source, optics)
    begun = w.clone()
    begun[:, [dark, lit]] = 0.3
    ended, _, done = map_search.climb(searched, begun, 1.0, 40)
    assert bool(done.all())
    assert ended[:, dark].tolist() == [0.0] * 3
    assert float((ended[:, lit] - 0.5).abs().max()) < 0.1
    _, slope = searched.value_and_gradient(ended)
    assert bool((slope[:, dark] < 0).all())
    free = torch.arange(searched.size) != dark
    hessian = searched.hessian(ended)[:, free][:, :, free]
    step = torch.linalg.solve(hessian, slope[:, free, None])[..., 0]
    assert float((step * slope[:, free]).sum(-1).max()) < 0.05
    mirrored = begun.clone()
    mirrored[:, [dark, lit]] *= -1
    torch.testing.assert_close(searched.log_density(mirrored), searched.log_density(begun))
    torch.testing.assert_close(searched.unfolded(mirrored), begun)


def test_a_lens_does_not_depend_on_its_batch(model: tuple[LensModel, Tensor]) -> None:
    """Search and chains, the metric refreshed on the way, in double precision: alone, or in batches of 3, 8 and 64."""
    lens_model, truth = model
    settings = Fit(
        starts=4,
        survivors=2,
        scout_pixels=12,
        temperatures=(10.0,),
        settling_temperatures=(3.0, 1.0),
        steps_per_temperature=4,
        final_steps=6,
        chains=2,
        warmup=20,
        draws=20,
        max_leapfrog_steps=2,
    )

    def fit(rows: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(rows)
        found = map_search.search(
            lens_model.take(chosen), settings, [torch.Generator().manual_seed(row) for row in rows]
        )
        chains = lens_model.take(chosen.repeat_interleave(2))
        center, hessian = truth[chosen], lens_model.take(chosen).hessian(truth[chosen])
        generators = [torch.Generator().manual_seed(row) for row in rows]
        run = hmc.Run(chains.value_and_gradient, center, hessian, settings, generators, chains.hessian)
        return found.w, run.finish().w

    alone = fit([1])
    for rows in ([2, 0, 1], [0, 2, 2, 1, 0, 0, 2, 0], [0, 2] * 31 + [1, 0]):
        for one, several in zip(alone, fit(rows), strict=True):
            torch.testing.assert_close(one[0], several[rows.index(1)], rtol=1e-5, atol=1e-5)


def test_a_lens_that_has_converged_stays(model: tuple[LensModel, Tensor]) -> None:
    """However long its neighbour climbs: the steps of a lens are its own."""
    lens_model, truth = model
    near, _, _ = map_search.climb(lens_model, truth, 1.0, 40)
    far = near.clone()
    far[0] += 0.5
    beside, _, _ = map_search.climb(lens_model, far, 1.0, 12)
    alone, _, _ = map_search.climb(lens_model.take(torch.tensor([1])), near[1:2], 1.0, 12)
    torch.testing.assert_close(beside[1], alone[0], rtol=1e-9, atol=1e-9)


PROCESSOR = torch.device("cpu")
GATED = Fit(
    chains=2, warmup=20, draws=20, rounds=3, r_hat_max=1.0001, ess_min=1e9, path_length=0.5, max_leapfrog_steps=2
)


@pytest.fixture(scope="module")
def found(model: tuple[LensModel, Tensor]) -> map_search.MapFit:
    lens_model, truth = model
    w, value, converged = map_search.climb(lens_model, truth, 1.0, 40)
    return map_search.MapFit.of_one_start(lens_model, w, value, converged)


def seeded(lenses: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(lenses)]


COLUMNS = list(range(8))


@pytest.fixture(scope="module")
def never_stopped(model: tuple[LensModel, Tensor], found: map_search.MapFit) -> hmc.Draws:
    return chains.sample(model[0], found, GATED, seeded(), COLUMNS)


def test_longer_rounds_are_judged_by_what_is_kept_of_them(
    model: tuple[LensModel, Tensor], found: map_search.MapFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a refit: with three times the draws, of which every third stays."""
    judged: list[int] = []
    made: list[int] = []

    def convergence(values: list[np.ndarray]) -> tuple[list[float], ...]:
        judged.append(values[0].shape[-1])
        return [1.0], [99.0], [99.0]

    def result(run: hmc.Run, own: Callable[[hmc.Run], hmc.Draws] = hmc.Run.result) -> hmc.Draws:
        made.append(run.draws)
        return own(run)

    monkeypatch.setattr(chains, "convergence", convergence)
    monkeypatch.setattr(hmc.Run, "result", result)
    once = GATED.model_copy(update={"rounds": 1})
    draws = chains.sample(model[0], found, once, seeded(), COLUMNS, draws_factor=3)
    assert made == [3 * GATED.draws]
    assert set(judged) == {GATED.draws} == {draws.w.shape[2]}


class Killed(Exception):
    """What a test kills a run with."""


@pytest.mark.parametrize("after", [10, 30, 55])
def test_chains_of_a_killed_batch_go_on(
    model: tuple[LensModel, Tensor],
    found: map_search.MapFit,
    never_stopped: hmc.Draws,
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the warm-up, in the first draws or in the second round: the draws are those of a run never stopped."""
    lens_model, _ = model
    checkpoint = chains.Checkpoint(tmp_path / "c.safetensors", {"batch": 1}, searched=3.0, spent=1000.0)
    monkeypatch.setattr(chains, "CHECKPOINT_SECONDS", 0.0)
    advance, count = hmc.Run.advance, 0

    def until_killed(run: hmc.Run) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        advance(run)

    monkeypatch.setattr(hmc.Run, "advance", until_killed)
    with pytest.raises(Killed):
        chains.sample(lens_model, found, GATED, seeded(), COLUMNS, checkpoint)
    monkeypatch.setattr(hmc.Run, "advance", advance)
    again = map_search.restored(checkpoint.load(PROCESSOR))
    assert again is not None
    torch.testing.assert_close(again.basins_w, found.basins_w, equal_nan=True)
    resumed = chains.sample(lens_model, again, GATED, seeded(), COLUMNS, checkpoint)
    torch.testing.assert_close(resumed.w, never_stopped.w)
    torch.testing.assert_close(resumed.log_density, never_stopped.log_density)
    assert chains.Checkpoint(checkpoint.path, {"batch": 2}).load(PROCESSOR) == {}
    later = chains.Checkpoint(checkpoint.path, {"batch": 1})
    later.resume(later.load(PROCESSOR))
    assert later.searched == 3.0
    assert 1000.0 < later.seconds < 2000.0


def test_only_lenses_that_miss_a_gate_go_on(
    model: tuple[LensModel, Tensor],
    found: map_search.MapFit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second of three misses its gate in the first round: it alone has a second one, whose draws it keeps too.

    The batch's log says so.
    """
    caplog.set_level("INFO", "lenspipe")
    lens_model, _ = model
    rounds: list[list[int]] = []
    begun = chains.begun

    def noted(*arguments: object) -> hmc.Run:
        rounds.append(list(arguments[4]))  # type: ignore[call-overload]
        return begun(*arguments)  # type: ignore[arg-type]

    def verdict(draws: hmc.Draws, *_: object) -> tuple[float, float]:
        second = bool(draws.energy[0, 0, 0] == first.energy[1, 0, 0])  # draws are in the unknowns of chains here
        return 1.0, 0.0 if second and draws.w.shape[2] == GATED.draws else math.inf

    first = chains.sample(lens_model, found, GATED.model_copy(update={"rounds": 1}), seeded(), [0])
    caplog.clear()
    monkeypatch.setattr(chains, "begun", noted)
    monkeypatch.setattr(chains, "gauges", verdict)
    draws = chains.sample(lens_model, found, GATED, seeded(), [0])
    assert rounds == [[0, 1, 2], [1]]
    assert draws.w.shape == first.w.shape
    torch.testing.assert_close(draws.w[[0, 2]], first.w[[0, 2]])
    torch.testing.assert_close(draws.w[1, :, :10], first.w[1][:, ::2], atol=1, rtol=0)
    assert not torch.equal(draws.w[1], first.w[1])
    names = lens_model.batch.names
    assert caplog.messages == [
        "round 1 of chains, for 3 of 3 lenses",
        f"{names[0]}: R-hat 1.000, effective sample size inf",
        f"{names[1]}: R-hat 1.000, effective sample size 0",
        f"{names[2]}: R-hat 1.000, effective sample size inf",
        "round 2 of chains, for 1 of 3 lenses",
        f"{names[1]}: R-hat 1.000, effective sample size inf",
    ]


def test_lost_chains_go_on_where_the_others_are() -> None:
    """Height and width of a chain's solution count, chains of alike evidence stay, lenses do not mix."""
    places = torch.arange(5.0)[:, None].expand(2, 4, 5, 1) + 10 * torch.arange(8.0).reshape(2, 4, 1, 1)
    wide, narrow = torch.tensor([[[1.0]]]), torch.tensor([[[math.exp(40.0)]]])  # 20 nat less room
    curved = torch.cat([wide, wide, wide, narrow, wide, wide, narrow, wide]).reshape(2, 4, 1, 1).double()
    value = torch.tensor([[-100.0, -101.0, -117.0, -90.0], [-80.0, -105.0, -85.0, -95.0]])
    went_on, hessians, lost = chains.rejoined(places, curved, value)
    assert lost.tolist() == [[False, False, True, False], [False] * 4]
    assert torch.equal(went_on[0, [0, 1, 3]], places[0, [0, 1, 3]])
    assert torch.equal(went_on[1], places[1])
    assert went_on[0, 2, :, 0].tolist() == [3, 4, 0, 1, 2]  # those of the first chain, at the end another one
    assert hessians.flatten().tolist() == curved.flatten().tolist()
    value[0, 3], value[0, 1] = -117.0, -140.0
    went_on, hessians, lost = chains.rejoined(places, curved, value)
    assert lost.tolist()[0] == [False, True, False, True]
    assert went_on[0, 1, :, 0].tolist() == [4, 0, 1, 2, 3]
    assert went_on[0, 3, :, 0].tolist() == [22, 23, 24, 20, 21]
    assert (hessians[0] == 1).all()


def test_a_later_round_begins_where_there_is_evidence(
    model: tuple[LensModel, Tensor],
    found: map_search.MapFit,
    never_stopped: hmc.Draws,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A chain that was at a place far off is moved, and does not widen the reach of the others."""
    caplog.set_level("INFO", "lenspipe")
    lens_model = model[0]
    settings = GATED.model_copy(update={"chains": 3})
    good = chains.each(chains.of_lens(never_stopped, 1), lambda two: torch.cat([two, two[:, :1].roll(7, 2)], 1))
    w, log_density = good.w.clone(), good.log_density.clone()
    w[0, 1, :, 0] += 0.3
    rows = torch.ones(w.shape[2], dtype=torch.long)
    log_density[0, 1] = lens_model.log_density(w[0, 1], rows=rows)
    assert (log_density[0, 1] < log_density[0, 0] - 100).all()
    far = replace(good, w=w, log_density=log_density)
    runs = [chains.begun(lens_model, found, settings, seeded(1), [1], [before], 1) for before in (good, far)]
    assert caplog.messages == [
        f"{lens_model.batch.names[1]}: 1 of 3 chains were where there is less evidence, and begin anew"
    ]
    begin = runs[1].w[0]
    torch.testing.assert_close(begin[0], runs[0].w[0, 0])
    nearest = (begin[1] - good.w[0, 0]).abs().amax(-1).min()
    assert float(nearest) < 1e-6
    assert not torch.allclose(begin[0], begin[1])
    assert float(runs[1].length) < 2 * float(runs[0].length)


def of_one_lens(w: Tensor) -> hmc.Draws:
    """Draws [1, chain, draw, size] of which only the unknowns matter."""
    blank = torch.zeros(w.shape[:3])
    return hmc.Draws(w, blank, blank, blank, blank, *[blank[:, 0, 0]] * 2)


def test_gates() -> None:
    """White chains pass; chains apart fail the first gate, stuck ones too; slow ones fail the second."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(1, 4, 200, 1, generator=generator, dtype=torch.float64)
    apart = white + 3 * torch.arange(4)[:, None, None]
    stuck = torch.arange(4.0)[None, :, None, None].expand(1, 4, 200, 1)
    slow = white.cumsum(2)[:, :1].expand(-1, 4, -1, -1) + 0.1 * white
    settings = Fit(chains=4, draws=200, r_hat_max=1.05, ess_min=300)

    def gauges(w: Tensor) -> tuple[float, float]:
        assert chains.passes(of_one_lens(w), settings, [0]) == (w is white)
        return chains.gauges(of_one_lens(w), settings, [0])

    assert gauges(white)[0] < 1.05
    assert gauges(white)[1] > 300
    assert gauges(apart)[0] > 1.5
    assert gauges(stuck)[0] > 1.5
    assert gauges(slow)[1] < 300


def test_earlier_draws_stay_unless_chains_do_not_agree_with_them() -> None:
    """Also where R-hat misses its gate by chance alone, or is less without them and passes with them."""
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 1, 4, 100, 1, generator=generator, dtype=torch.float64)
    near, apart = (old + shift * torch.arange(4)[:, None, None] for shift in (0.2, 3))

    def kept(old: Tensor, r_hat_max: float) -> Tensor:
        settings = Fit(chains=4, draws=200, r_hat_max=r_hat_max)
        return chains.joined(of_one_lens(old), of_one_lens(new), settings, [0]).w

    torch.testing.assert_close(kept(old, 1.0001), torch.cat([old, new], 2))
    torch.testing.assert_close(kept(near, 1.1), torch.cat([near, new], 2))
    assert kept(near, 1.0001) is new
    assert kept(apart, 1.1) is new


def starved(task: Task) -> xr.Dataset:
    """A fit for which the memory holds two lenses."""
    if len(task.names) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return xr.Dataset({"name": ("lens", list(task.names)), "hash": ("lens", list(task.hashes))})


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "fit_lenses", starved)
    task = Task("{}", Results(tmp_path), "b", tuple("abcdefg"), tuple("1234567"))
    _, parts, failures = batch.fit_task(task)
    assert failures == {}
    datasets = [read_part(part) for part in parts]
    assert all(dataset is not None for dataset in datasets)
    assert [list(dataset["name"].to_numpy()) for dataset in datasets] == [["a"], ["b", "c"], ["d", "e"], ["f", "g"]]
    assert [list(dataset["hash"].to_numpy()) for dataset in datasets] == [["1"], ["2", "3"], ["4", "5"], ["6", "7"]]


def test_automatic_batches_fit_into_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory, an even share for every worker, no more than there are lenses; one at least."""
    lens = stage.BYTES_PER_RAY * Config().fit.chains * 100 * 100
    monkeypatch.setattr(memory, "free_memory", lambda: 20 * lens)

    def sizes(side: int, lenses: int, workers: int, explorations: int = 0) -> list[int]:
        names = [f"lens-{number}" for number in range(lenses)]
        table = pd.DataFrame({"name": names, "bucket": f"image{side}x{side}_psf3x3"})
        config = Config(fit=Fit(explorations=explorations))
        tasks = stage.plan(config, Results(tmp_path), 0, table, dict.fromkeys(names, ""), workers)
        assert [name for task in tasks for name in task.names] == names
        return [len(task.names) for task in tasks]

    assert sizes(100, 45, 1) == [10, 10, 10, 10, 5]
    assert sizes(100, 12, 2) == [5, 5, 2]
    assert sizes(100, 7, 2) == [4, 3]
    assert sizes(1000, 3, 2) == [1, 1, 1]
    assert sizes(10, 100, 1) == [64, 36]
    assert sizes(100, 12, 1, explorations=1) == [5, 5, 2]  # chains begin at two solutions then


def test_gates_look_at_the_lens_parameters(model: tuple[LensModel, Tensor]) -> None:
    names = [model[0].priors.free[column] for column in batch.monitored(model[0])]
    assert names == ["theta_E", "gamma", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2"]
