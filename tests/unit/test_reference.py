"""The methods to compare with: they see the same posterior, and find on an easy one what they should."""

from __future__ import annotations

from typing import get_args

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit import map_search, reference
from lenspipe.fit.batch import SEARCHES
from lenspipe.fit.model import LensModel
from lenspipe.image.simulator import Optics
from tests.lenses import TABLE, easy_lenses


def generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


@pytest.fixture(scope="module")
def found() -> tuple[LensModel, map_search.MapFit]:
    """Two easy lenses and their maxima by Gauss-Newton from the truth."""
    model, truth = easy_lenses(2, 0.02)
    w, value, converged = map_search.climb(model, truth, 1.0, 40)
    return model, map_search.MapFit.of_one_start(model, w, value, converged)


def test_every_choice_of_the_settings_is_there() -> None:
    assert set(SEARCHES) == set(get_args(Fit.model_fields["search"].annotation))
    assert {"hmc", *reference.SAMPLERS} == set(get_args(Fit.model_fields["sampler"].annotation))


@pytest.mark.parametrize("sampler", ["pyro_hmc", "svi_full_rank", "svi_low_rank"])
def test_samplers_in_single_precision(sampler: str) -> None:
    """As the stage runs them, after the search by Adam."""
    model, _ = easy_lenses(2, 0.05)
    optics = Optics(TABLE.to(dtype=torch.float32))
    single = LensModel(model.batch.to(torch.float32), model.priors, model.source, optics)
    settings = Fit(adam_steps=20, chains=2, warmup=20, draws=20, svi_steps=5, svi_rank=2, path_length=0.5)
    found = SEARCHES["adam"](single, settings, generators(2))
    draws = reference.SAMPLERS[sampler](single, found, settings, generators(2))
    assert draws.w.shape == (2, 2, 20, model.size)
    assert draws.w.dtype == torch.float32
    assert bool(torch.isfinite(draws.w).all() and torch.isfinite(draws.log_density).all())
    assert draws.diverging.dtype == torch.bool


def test_gradient_equals_pyros() -> None:
    """Of each lens, through the trace of the Pyro model; and of one lens in the rescaled unknowns."""
    model, truth = easy_lenses(3, 0.05)
    w = (0.8 * truth).requires_grad_()
    trace = poutine.trace(poutine.condition(model.pyro_model, {"w": w})).get_trace()
    (pyros,) = torch.autograd.grad(trace.log_prob_sum(), w)
    _, gradient = model.value_and_gradient(w)
    torch.testing.assert_close(gradient, pyros, rtol=1e-9, atol=1e-8)

    one = model.take(torch.tensor([1]))
    scale = reference.inverse_root(one.hessian(truth[1:2])[0])
    u = torch.linspace(-1, 1, model.size, dtype=torch.float64).requires_grad_()
    rescaled = poutine.condition(reference.rescaled(one.pyro_model, truth[1], scale), {"u": u})
    (of_u,) = torch.autograd.grad(poutine.trace(rescaled).get_trace().log_prob_sum(), u)
    _, gradient = one.value_and_gradient(reference.place(truth[1], scale, u)[None])
    torch.testing.assert_close(of_u, (gradient @ scale)[0], rtol=1e-8, atol=1e-8)


def test_gauss_newton_hessian_is_exact_without_residuals() -> None:
    """Of noise-free images at the truth it is the whole Hessian, by differences of the gradient by autograd."""
    model, truth = easy_lenses(3, 0.05, noise_drawn=0)
    assert float(model.residuals(truth).abs().max()) < 1e-12
    step = 1e-4

    def column(direction: Tensor) -> Tensor:
        ahead, behind = (model.value_and_gradient(truth + sign * step * direction)[1] for sign in (1, -1))
        return -(ahead - behind) / (2 * step)

    exact = torch.stack([column(direction) for direction in torch.eye(model.size, dtype=torch.float64)], -1)
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    error = (model.hessian(truth) - exact) / (size[:, :, None] * size[:, None, :])
    assert float(error.abs().max()) < 1e-5


def test_adam_reaches_the_maximum(found: tuple[LensModel, map_search.MapFit]) -> None:
    """Within 0.1 in log posterior of Gauss-Newton's; each lens as it would alone."""
    model, best = found
    settings = Fit(adam_steps=300, adam_learning_rate=0.05)
    adam = reference.adam_search(model, settings, generators(2))
    assert float((adam.log_density - best.log_density).abs().max()) < 0.1
    short = Fit(adam_steps=10, adam_learning_rate=0.1)
    together = reference.adam_search(model, short, generators(2))
    alone = reference.adam_search(model.take(torch.tensor([1])), short, generators(1))
    torch.testing.assert_close(together.w[1], alone.w[0], rtol=1e-7, atol=1e-7)
    assert adam.start_log_density.shape == (2, 1)
    assert adam.converged.tolist() == [True, True]
    assert not together.converged.any()


@pytest.mark.parametrize("rank", [None, 6])
def test_variational_inference_finds_a_gaussian(found: tuple[LensModel, map_search.MapFit], rank: int | None) -> None:
    """Mean within 0.3 standard deviations of the MAP; with full rank widths within 30 % of the Laplace ones."""
    model, best = found
    settings = Fit(svi_steps=200, svi_learning_rate=0.03, chains=2, draws=1000)
    random_before = torch.get_rng_state()
    draws = reference.svi(model, best, settings, generators(2), rank)
    assert torch.equal(random_before, torch.get_rng_state())
    assert not pyro.get_param_store()
    assert draws.w.shape == (2, 2, 1000, model.size)
    width = torch.linalg.inv(best.hessian).diagonal(dim1=1, dim2=2).sqrt()
    flat = draws.w.flatten(1, 2)
    assert float(((flat.mean(1) - best.w) / width).abs().max()) < 0.3
    ratio = flat.std(1) / width
    assert float(ratio.max()) < 1.3
    assert rank or float(ratio.min()) > 0.7
    torch.testing.assert_close(
        draws.log_density[0, 1, :3], model.take(torch.zeros(3).long()).log_density(draws.w[0, 1, :3])
    )


@pytest.mark.parametrize("kernel", ["nuts", "hmc"])
def test_pyros_chains(found: tuple[LensModel, map_search.MapFit], kernel: str) -> None:
    """Shapes, statistics, what each chain began with, and that nothing global is left changed."""
    model, best = found
    one, center = model.take(torch.tensor([1])), best.w[1:]
    settings = Fit(chains=2, warmup=50, draws=20)
    random_before = torch.get_rng_state()
    draws = reference.pyro_mcmc(one, center, settings, generators(1), kernel)  # type: ignore[arg-type]
    assert torch.equal(random_before, torch.get_rng_state())
    assert not pyro.get_param_store()
    assert draws.w.shape == (1, 2, 20, model.size)
    for field in (draws.log_density, draws.acceptance, draws.diverging, draws.energy):
        assert field.shape == (1, 2, 20)
        assert bool(torch.isfinite(field).all())
    assert draws.step_size.shape == (1,)
    assert -1e-5 < float(draws.acceptance.min()) <= float(draws.acceptance.max()) < 1 + 1e-5
    assert float(draws.acceptance.mean()) > 0.4
    kinetic = draws.energy[..., 1:] + draws.log_density[..., :-1]
    assert float(kinetic.min()) > 0
    assert 0.5 * model.size == pytest.approx(float(kinetic.mean()), rel=0.5)
    width = torch.linalg.inv(best.hessian[1]).diagonal().sqrt()
    assert float(((draws.w[0].mean((0, 1)) - center[0]) / width).abs().max()) < 2
    assert not torch.equal(draws.w[0, 0], draws.w[0, 1])
