"""The sampler against Pyro's NUTS and against an exact distribution, and that these comparisons notice a wrong one.

Means and second moments of standardised draws are compared in units of their Monte Carlo error, from the effective
sample sizes of both sides. A right sampler exceeds five such units in any of 44 moments once in 4e4 runs, or, if
effective sizes are 20 % off, once in 1e3; the seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.ops.stats import effective_sample_size
from scipy import stats
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit import hmc, map_search, reference
from tests.lenses import easy_lenses

LIMIT = 5.0  # standard errors
Residuals = Callable[[Tensor], Tensor]  # w [n, size] to [n, k]; the log density is minus half their squares' sum


def moments(draws: Tensor, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moments [moment] of standardised draws [chain, draw, size], and their squared errors."""
    z = (draws - center) / width
    row, column = torch.triu_indices(z.shape[-1], z.shape[-1])
    functions = torch.cat([z, z[..., row] * z[..., column]], -1)
    flat = functions.flatten(0, 1)
    return flat.mean(0), flat.var(0) / effective_sample_size(functions, chain_dim=0, sample_dim=1)


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference of any moment of two sets of draws [chain, draw, size], in standard errors."""
    both = torch.cat([ours.flatten(0, 1), theirs.flatten(0, 1)])
    (a, error_a), (b, error_b) = (moments(draws, both.mean(0), both.std(0)) for draws in (ours, theirs))
    return float(((a - b).abs() / (error_a + error_b).sqrt()).max())


def gaussian(w: Tensor) -> Tensor:
    """Three unknowns with correlations up to 0.9."""
    root = torch.tensor([[2.0, 0, 0], [0.9, 1.0, 0], [-0.4, 0.3, 0.5]], dtype=torch.float64)
    return (w - torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)) @ root


def banana(w: Tensor) -> Tensor:
    """x from N(0, 1), y from N(x^2 - 1, 0.5)."""
    x, y = w.unbind(-1)
    return torch.stack([x, (y - x.square() + 1) / 0.5], -1)


MODES = {gaussian: [1.0, -2.0, 0.5], banana: [0.0, -1.0]}


def curvature(residuals: Residuals) -> Callable[[Tensor], Tensor]:
    """Gauss-Newton Hessian [n, size, size]."""

    def at(w: Tensor) -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacfwd(lambda one: residuals(one[None])[0]))(w)
        return jacobian.transpose(1, 2) @ jacobian

    return at


def target(residuals: Residuals, widened: float = 1.0) -> hmc.Target:
    """What the sampler is given; `widened` flattens the log density so that a Gaussian is that much too wide."""

    def value_and_gradient(w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach().requires_grad_()
        value = -0.5 * residuals(w).square().sum(-1) / widened**2
        return value.detach(), torch.autograd.grad(value.sum(), w)[0]

    return value_and_gradient


def ours(residuals: Residuals, widened: float = 1.0) -> Tensor:
    """Draws [chain, draw, size] of the sampler of lenspipe, with its metric refreshed."""
    mode = torch.tensor([MODES[residuals]], dtype=torch.float64)
    settings = Fit(chains=8, warmup=200, draws=1500)
    bent = curvature(residuals)
    generator = torch.Generator().manual_seed(3)
    return hmc.Run(target(residuals, widened), mode, bent(mode), settings, [generator], bent).finish().w[0]


def nuts(residuals: Residuals, chains: int, draws: int) -> Tensor:
    """Draws [chain, draw, size] of Pyro's NUTS, in coordinates whitened at the mode."""
    mode = torch.tensor(MODES[residuals], dtype=torch.float64)

    def model() -> None:
        flat = dist.Normal(torch.zeros(1, len(mode), dtype=torch.float64), 1).to_event(2).mask(False)
        w = pyro.sample("w", flat)
        pyro.factor("density", -0.5 * residuals(w).square().sum())

    scale = reference.inverse_root(curvature(residuals)(mode[None])[0])
    settings = Fit(chains=chains, warmup=150, draws=draws)
    with reference.isolated(torch.Generator().manual_seed(4)):
        begin = torch.randn(chains, len(mode), dtype=torch.float64)
        runs = [reference.run_chain(reference.rescaled(model, mode, scale), u, settings, "nuts") for u in begin]
    return reference.place(mode, scale, torch.stack([run.u for run in runs]))


@pytest.mark.parametrize(("residuals", "draws"), [(gaussian, 300), (banana, 400)], ids=["gaussian", "banana"])
def test_sampler_agrees_with_nuts(residuals: Residuals, draws: int) -> None:
    """In the unknowns and in the residuals; and a sampler whose posterior is 1.3 times too wide does not."""
    theirs = nuts(residuals, 2, draws)

    def seen(draws: Tensor) -> Tensor:
        return torch.cat([draws, residuals(draws)], -1)

    assert disagreement(seen(ours(residuals)), seen(theirs)) < LIMIT
    assert disagreement(seen(ours(residuals, widened=1.3)), seen(theirs)) > LIMIT


@pytest.mark.statistical
def test_sampler_agrees_with_nuts_on_a_lens() -> None:
    """24 x 24 pixels, eight unknowns; draws stretched 1.3 times about their mean do not agree."""
    model, truth = easy_lenses(1, 0.05)
    center, _, _ = map_search.climb(model, truth, 1.0, 40)
    settings = Fit(chains=4, warmup=100, draws=500)
    chains = model.take(torch.zeros(4, dtype=torch.long))
    generator = torch.Generator().manual_seed(1)
    hessian = model.hessian(center)
    run = hmc.Run(chains.value_and_gradient, center, hessian, settings, [generator], chains.hessian)
    drawn = run.finish()
    short = settings.model_copy(update={"chains": 2, "warmup": 60, "draws": 250})
    theirs = reference.pyro_mcmc(model, center, short, [torch.Generator().manual_seed(2)], "nuts")
    assert disagreement(drawn.w[0], theirs.w[0]) < LIMIT
    mean = drawn.w[0].mean((0, 1))
    assert disagreement(mean + 1.3 * (drawn.w[0] - mean), theirs.w[0]) > LIMIT


def gumbel(w: Tensor, rise: Callable[[], float]) -> tuple[Tensor, Tensor]:
    """Log density -x - exp(-x), of distribution function exp(-exp(-x)), and its gradient; `rise` is added to it."""
    fall = torch.exp(-w)
    return (-w - fall)[:, 0] + rise(), fall - 1


@pytest.mark.parametrize("accepts_all", [False, True])
def test_draws_of_an_asymmetric_density_have_its_distribution(accepts_all: bool) -> None:
    """By a Kolmogorov-Smirnov test at 1e-5 on every tenth draw.

    With a density that rises at every call each proposal is accepted, which is not reversible: it is found out.
    """
    calls = iter(range(10**9))
    settings = Fit(chains=8, warmup=100, draws=2500)
    drawn = hmc.Run(
        lambda w: gumbel(w, lambda: 1e4 * next(calls) if accepts_all else 0.0),
        torch.zeros(1, 1, dtype=torch.float64),
        torch.full((1, 1, 1), 9.0 if accepts_all else 1.0, dtype=torch.float64),
        settings,
        [torch.Generator().manual_seed(6)],
    ).finish()
    x = drawn.w[0, :, ::10, 0].flatten().numpy()
    assert np.isfinite(x).all()
    p = stats.kstest(x, "gumbel_r").pvalue
    assert (p < 1e-5) if accepts_all else (p > 1e-5)
