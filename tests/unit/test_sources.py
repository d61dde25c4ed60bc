"""The contract of a source, for every kind of it; and fits of sources to images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from lenspipe.config import Config, Fit, LearnedSource, SourceSettings, load_config
from lenspipe.errors import ConfigError, InputError
from lenspipe.fit import chains, map_search
from lenspipe.fit.batch import source_of
from lenspipe.fit.derived import half_light_radius, source_fluxes
from lenspipe.fit.model import LensModel
from lenspipe.image import light
from lenspipe.image.simulator import Optics
from lenspipe.image.source_plane import light_centre
from lenspipe.lens.coordinates import axis_ratio
from lenspipe.prior_map import PriorMap
from lenspipe.source import learned
from lenspipe.source.base import Source, pixel_axis
from lenspipe.source.prior import blank, read_source_prior, write_source_prior
from lenspipe.source.reconstruction import misfit, reconstruct
from lenspipe.source.sersic import UNIT
from lenspipe.source.shapelets import hermite_functions
from lenspipe.source.sketch import LinearSource, principal_source
from lenspipe.source.vae import Decoder
from tests.lenses import NOISE, lens_batch

KINDS: dict[str, dict[str, Any]] = {
    "sersic": {"kind": "sersic"},
    "fine": {"kind": "sersic", "pixels": 96},
    "shapelets": {"kind": "shapelets", "order": 4},
    "pixel_grid": {"kind": "pixel_grid", "modes": 9},
    "gaussian": {"latent_density": "gaussian", "residual": {"components": 0}},
    "flow": {"latent_density": "flow", "flow": {"transforms": 2, "hidden": 8}, "residual": {"components": 0}},
    "residual": {"latent_density": "gaussian", "residual": {"components": 3}},
}
ANALYTIC = ("sersic", "fine", "shapelets", "pixel_grid")
LATENTS = 4


def parsed(kind: str) -> Any:
    return TypeAdapter(SourceSettings).validate_python(KINDS[kind])


def record(kind: str) -> dict[str, Any]:
    """What the file of a source says of it."""
    components = 3 if kind == "residual" else 0
    network = {"latents": LATENTS, "channels": 2, "components": components}
    settings = parsed(kind).model_dump(mode="json")
    return {"stage": "source", "settings": {"source": settings}, "facts": {"network": network}}


def made(kind: str) -> Source:
    """A source of each kind; learned ones have weights that nobody trained."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        source = blank(parsed(kind), record(kind))
        for name, tensor in source.state_dict().items():
            if name.endswith("weight") or name == "basis":
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return source.requires_grad_(False).eval().double()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def side(kind: str) -> int:
    """Of the images of this kind [px]."""
    return KINDS[kind].get("pixels", 64)


def unknowns(source: Source, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, source.size, generator=generator, dtype=torch.float64)


def test_images_are_finite_everywhere(kind: str) -> None:
    source = made(kind)
    for w in (torch.zeros(2, source.size).double(), unknowns(source), 4 * unknowns(source), -4 * unknowns(source)):
        images = source(w)
        assert images.shape == (len(w), side(kind), side(kind))
        assert torch.isfinite(images).all()


def test_a_search_goes_on_from_the_sketch(kind: str) -> None:
    """With all unknowns of the source; where both are analytic, with the image that the sketch had."""
    source = made(kind).float()
    sketch = source.sketch(4)
    w = unknowns(sketch).float()
    begun = source.from_sketch(w)
    assert begun.shape == (len(w), source.size)
    if kind in ANALYTIC:
        torch.testing.assert_close(source(begun), sketch(w))
    else:
        assert not begun.any()


def test_a_sketch_has_the_principal_components() -> None:
    """Of a linear source with a few modes of known sizes: the largest of them."""
    modes = torch.linalg.qr(torch.randn(64 * 64, 5, generator=torch.Generator().manual_seed(1)))[0].T
    sizes = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.1])
    mean = torch.rand(64, 64, generator=torch.Generator().manual_seed(2))
    source = LinearSource(mean, (sizes[:, None] * modes).unflatten(1, (64, 64)))
    sketch = principal_source(source, 3, draws=4000)
    overlap = sketch.basis.flatten(1) @ modes.T
    torch.testing.assert_close(overlap.norm(dim=1), sizes[:3], rtol=0.05, atol=0)
    assert (overlap.diagonal().abs() > 0.99 * overlap.norm(dim=1)).all()
    torch.testing.assert_close(sketch.mean, mean, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ANALYTIC)
def test_the_middle_of_the_prior_has_brightness_one(kind: str) -> None:
    source = made(kind)
    (image,) = source(torch.zeros(1, source.size).double())
    assert float(image.max()) == pytest.approx(1, abs=0.25)
    middle = slice(side(kind) // 2 - 1, side(kind) // 2 + 1)
    assert float(image.max()) == float(image[middle, middle].max())


def test_a_galaxy_does_not_depend_on_the_others(kind: str) -> None:
    source = made(kind)
    w = unknowns(source)
    for row in range(3):
        torch.testing.assert_close(source(w)[row], source(w[row : row + 1])[0], rtol=1e-12, atol=1e-12)


def test_every_unknown_moves_the_image(kind: str) -> None:
    source = made(kind)
    _, derivatives = source.linearise(unknowns(source))
    assert (derivatives.abs().amax((2, 3)) > 1e-6).all()


def test_derivatives_equal_finite_differences(kind: str) -> None:
    source = made(kind)
    w, step = unknowns(source), 1e-5
    images, derivatives = source.linearise(w)
    torch.testing.assert_close(images, source(w))
    for entry, direction in enumerate(torch.eye(source.size, dtype=torch.float64)):
        expected = (source(w + step * direction) - source(w - step * direction)) / (2 * step)
        torch.testing.assert_close(derivatives[:, entry], expected, rtol=1e-5, atol=1e-7)


def test_a_source_is_read_back(kind: str, tmp_path: Path) -> None:
    source = made(kind).float()
    write_source_prior(source, record(kind), tmp_path / "prior.safetensors")
    again = read_source_prior(tmp_path / "prior.safetensors")
    w = unknowns(source).float()
    assert torch.equal(again(w), source(w))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_process_reads_a_source_once(tmp_path: Path) -> None:
    """With its sketch; one that is written anew is another."""
    path, at = tmp_path / "prior.safetensors", torch.device("cpu")
    write_source_prior(made("gaussian").float(), record("gaussian"), path)
    first = source_of(path, at)
    assert source_of(path, at).sketch(2) is first.sketch(2)
    write_source_prior(made("residual").float(), record("residual"), path)
    assert source_of(path, at).size == first.size + 3
    path.unlink()
    with pytest.raises(InputError, match=r"prior\.safetensors: .*run the stage source first"):
        source_of(path, at)


def test_lenses_are_fitted_with_it(kind: str) -> None:
    """The gradient of the log density by reverse mode is that of the residuals' Jacobian."""
    batch = lens_batch()
    model = LensModel(batch, PriorMap(Config().priors.expressions()), made(kind), Optics())
    w = 0.3 * torch.randn(3, model.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    residuals, jacobian = model.linearise(w)
    _, gradient = model.value_and_gradient(w)
    expected = -(jacobian.transpose(1, 2) @ residuals[..., None])[..., 0] - w
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 / NOISE**2)


def test_straight_unknowns_are_the_same_source(kind: str) -> None:
    """The same images, the same prior in other unknowns, and the curvature of their squares."""
    source = made(kind)
    straight, w = source.straight(), unknowns(source)
    x = source.to_straight(w)
    back, log_volume = source.from_straight(x)
    torch.testing.assert_close(back, w)
    torch.testing.assert_close(straight(x), source(w))
    slopes = torch.stack([torch.autograd.functional.jacobian(partial(bent_alone, source), at) for at in x])
    torch.testing.assert_close(log_volume, torch.linalg.slogdet(slopes)[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(straight.log_prior(x), source.log_prior(w) + log_volume)
    torch.testing.assert_close(straight.prior_curvature(x), slopes.mT @ slopes)
    assert (straight is source) == (kind != "flow")


def bent_alone(source: Source, x: Tensor) -> Tensor:
    """w [size] of straight unknowns x [size]."""
    return source.from_straight(x[None])[0][0]


def test_chains_in_straight_unknowns_end_in_those_of_the_model() -> None:
    """Log densities are those of the model at the draws; the gradient that chains follow is that of theirs."""
    batch = lens_batch()
    model = LensModel(batch, PriorMap(Config().priors.expressions()), made("flow"), Optics())
    start = 0.3 * torch.randn(3, model.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w, value, converged = map_search.climb(model, start, 1.0, 30)
    found = map_search.MapFit.of_one_start(model, w, value, converged)
    settings = Fit(
        chains=2, warmup=20, draws=20, rounds=2, r_hat_max=1.0001, ess_min=1e9, path_length=1.0, max_leapfrog_steps=4
    )
    draws = chains.sample(model, found, settings, [torch.Generator().manual_seed(row) for row in range(3)], [0])
    assert draws.w.shape == (3, 2, 20, model.size)
    flat = draws.w.flatten(1, 2)
    expected = torch.stack([model.log_density(at) for at in flat.unbind(1)], 1)
    torch.testing.assert_close(draws.log_density.flatten(1), expected)
    assert float(draws.acceptance.mean()) > 0.3
    straight, x = model.straight(), model.to_straight(w)
    assert straight is not model
    step = 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rise = straight.log_density(x + step) - straight.log_density(x - step)
    torch.testing.assert_close(rise / 2, (straight.value_and_gradient(x)[1] * step).sum(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["residual", "pixel_grid"])
def test_weights_do_not_move_a_source(kind: str) -> None:
    """They are the lead's alone to move: the image of a lens is linear in them, with all else as it is."""
    model = LensModel(lens_batch(), PriorMap(Config().priors.expressions()), made(kind), Optics())
    w = 0.3 * torch.randn(3, model.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steps = torch.randn(2, 3, model.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps[..., : -model.source.unmoving] = 0
    there, one, other, both = (model.image(w + step) for step in (0 * steps[0], *steps, steps.sum(0)))
    assert float((one - there).abs().max()) > 0.1
    torch.testing.assert_close(both - there, (one - there) + (other - there))
    torch.testing.assert_close(model.source_frame(w + steps[0]), model.source_frame(w))
    centres = [light_centre(model.view(at).images)[0] for at in (w, w + steps[0])]
    assert float((centres[1] - centres[0]).abs().max()) > 1e-3


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors: no such source prior; run the stage source"):
        read_source_prior(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(InputError, match=r"cut\.safetensors: not a source prior"):
        read_source_prior(tmp_path / "cut.safetensors")
    wrong = record("gaussian") | {"facts": {"network": {"latents": 7, "channels": 2, "components": 0}}}
    write_source_prior(made("gaussian"), wrong, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors: not a source prior"):
        read_source_prior(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "sersic", "n_sersic": "Normal(1, 1)"}, "n_sersic"),
        ({"kind": "spiral"}, "spiral"),
        ({"kind": "sersic", "latent_density": "flow"}, "latent_density: unknown key"),
        ({"residual": {"kind": "stationary", "components": None}}, "needs a number of components"),
    ],
)
def test_bad_settings_are_named(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"source": source})


def test_hermite_functions_are_orthogonal() -> None:
    """With the norm sqrt(pi) of Refregier's functions times pi^(1/4)."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    waves = hermite_functions(x[None], 8)[0]
    products = waves @ waves.T * (x[1] - x[0])
    torch.testing.assert_close(products, np.pi**0.5 * torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_fit_of_a_linear_source_is_ridge_regression() -> None:
    source = made("pixel_grid")
    noise = 0.05
    truth = unknowns(source)
    images = source(truth) + noise * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(4)).double()
    fitted = reconstruct(source, images, noise, torch.zeros_like(truth), steps=8)
    basis = source.basis.flatten(1) / noise
    offset = ((images - source.envelope) / noise).flatten(1)
    exact = torch.linalg.solve(basis @ basis.T + torch.eye(9, dtype=torch.float64), basis @ offset.T).T
    torch.testing.assert_close(fitted, exact, rtol=1e-4, atol=1e-4)
    assert (misfit(source, images, noise, fitted) - 1).abs().max() < 5 * (2 / 64**2) ** 0.5


def test_a_fit_never_ends_higher_than_it_began() -> None:
    source = made("shapelets")
    images = source(2 * unknowns(source))
    for start in (torch.zeros(3, source.size).double(), 3 * unknowns(source).flip(0)):
        before, after = (
            misfit(source, images, 0.02, w) * 64**2 + w.square().sum(1)
            for w in (start, reconstruct(source, images, 0.02, start))
        )
        assert (after <= before).all()
        assert after.sum() < 0.1 * before.sum()


def test_without_its_residual_field_a_source_is_its_decoder() -> None:
    source = made("residual")
    assert isinstance(source, learned.LearnedSource)
    w = unknowns(source)
    alone = source.without_residual()
    assert alone.size == LATENTS
    torch.testing.assert_close(alone(w[:, :LATENTS]), source.decoded(w))
    field = torch.einsum("nk,kyx->nyx", w[:, LATENTS:], source.basis)
    torch.testing.assert_close(source(w) - source.decoded(w), field)
    assert isinstance(source.decoder, Decoder)
    assert isinstance(parsed("residual"), LearnedSource)


def test_no_decoded_image_is_faint() -> None:
    """Those of a peak of 1 stay as they are; a decoder that nobody trained draws faint ones."""
    axis = pixel_axis().double()
    galaxy = torch.exp(-(axis[:, None].square() + axis.square()) / (2 * 0.1**2))
    images = torch.tensor([2e-3, 0.05, 0.3, 0.5, 1.0], dtype=torch.float64)[:, None, None] * galaxy
    seen = learned.lifted(images)
    peaks = seen.amax((1, 2))
    torch.testing.assert_close(seen / peaks[:, None, None], images / images.amax((1, 2), keepdim=True))
    assert bool(((peaks > 0.35) & (peaks.diff(prepend=peaks[:1]) >= 0)).all())
    torch.testing.assert_close(seen[-1], images[-1], rtol=1e-3, atol=0)
    assert bool((learned.lifted(torch.zeros(1, 64, 64)) == 0).all())
    source = made("residual")
    assert isinstance(source, learned.LearnedSource)
    w = unknowns(source)
    assert float(source.decoder(source.latent(w[:, :LATENTS])).amax((1, 2)).max()) < 0.2
    assert float(source.decoded(w).amax((1, 2)).min()) > 0.3


def test_rays_see_a_function_as_it_is() -> None:
    """A cusp at its centre and wings beyond its image: the model's image is that of the profile itself."""
    shape = {"n_sersic": "4", "R_sersic": "0.15", "e1": "0.1", "e2": "Uniform(-0.3, 0.3)"}
    place = {"source_x": "0.02", "source_y": "-0.03", "source_size": "1.5", "source_flux": "0.7", "theta_E": "0.5"}
    config = load_config({"source": {"kind": "sersic"} | shape, "priors": place})
    source = blank(config.source, {}).double()
    model = LensModel(lens_batch(), PriorMap(config.priors.expressions()), source, Optics(supersampling=2))
    w = 0.3 * torch.randn(3, model.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    e2 = source.priors(model.split(w)[1])["e2"]
    q, phi = axis_ratio(torch.full_like(e2, 0.1), e2)
    fall = 1 - (UNIT / 0.15) ** 0.25
    numbers = {"amplitude": 0.7 * np.exp(-float(light.sersic_b(torch.tensor(4.0))) * fall), "R_sersic": 0.15 * 1.5}
    numbers |= {"n_sersic": 4.0, "center_x": 0.02, "center_y": -0.03}
    known = {name: torch.full((3,), value).double() for name, value in numbers.items()} | {"q": q, "phi": phi}
    profile = partial(light.sersic, **{name: value[:, None, None] for name, value in known.items()})
    expected = model.simulator.image(model.parameters(w), profile)
    torch.testing.assert_close(model.image(w), expected, rtol=2e-3, atol=0)
    total, _ = source_fluxes(model, w)
    fine = source.drawn(model.split(w)[1], 3000).mean((1, 2)) * 0.7 * 1.5**2 / 0.2**2
    torch.testing.assert_close(total, fine, rtol=0.01, atol=0)


def test_half_of_the_light_of_a_function_is_within_its_radius() -> None:
    """Not on the pixels of its image: an exponential disc of R_sersic 1.3 of them, in an image as wide as 2 arcsec."""
    shape = {"n_sersic": "1", "R_sersic": "0.02", "e1": "0", "e2": "Uniform(-0.01, 0.01)"}
    config = load_config({"source": {"kind": "sersic"} | shape, "priors": {"source_size": "2"}})
    priors = PriorMap(config.priors.expressions())
    model = LensModel(lens_batch(), priors, blank(config.source, {}).double(), Optics())
    radius = half_light_radius(model, torch.zeros(3, model.size).double())
    np.testing.assert_allclose(radius.numpy(), 0.04, rtol=0.03)
