"""Other people's methods on the same model, to compare the default ones with: Adam, Pyro's NUTS and HMC, Pyro's SVI.

Adam is the MAP search of Chianese et al. 2019 (section 5.2), batched over lenses. Pyro's methods take one lens and one
chain at a time. They see unknowns u with w = center + A u: for NUTS, HMC and the full-rank guide A A^T is the inverse
of the Gauss-Newton Hessian, the metric that `hmc` begins with; for the low-rank guide A is diagonal, which keeps its
family of distributions what it is. A is constant, so that the posterior is the same in u as in w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, init_to_value
from pyro.optim import ClippedAdam
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit.hmc import Draws, bfmi_of
from lenspipe.fit.map_search import MapFit, start_points
from lenspipe.fit.model import LensModel

CONVERGED = 1e-2  # what a Gauss-Newton step would gain where Adam has converged, at most [nat]
LAST_RATE = 0.01  # of SVI, in units of its first learning rate

Sampler = Callable[[LensModel, MapFit, Fit, list[torch.Generator]], Draws]


def adam_search(model: LensModel, settings: Fit, generators: list[torch.Generator]) -> MapFit:
    """Climb by Adam from the median of the priors; no random numbers are used.

    The paper gives the number of steps and neither learning rate nor starting point: the rate falls to zero along half
    a cosine, the start is the one that the default search has first. Adam is elementwise, so lenses do not meet.
    """
    w = torch.cat([start_points(model, 1, generator) for generator in generators]).to(model.data)
    optimiser = torch.optim.Adam([w], settings.adam_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.adam_steps)
    for _ in range(settings.adam_steps):
        w.grad = -model.value_and_gradient(w)[1]
        optimiser.step()
        schedule.step()
    w = model.unfolded(w.detach())
    value, gradient = model.value_and_gradient(w)
    found = MapFit.of_one_start(model, w, value, torch.zeros_like(value, dtype=torch.bool))
    column = gradient.double()[..., None]
    gain = 0.5 * (column * torch.linalg.solve(found.hessian, column)).sum((1, 2))
    return replace(found, converged=gain < CONVERGED)


def pyro_mcmc(
    model: LensModel,
    center: Tensor,
    settings: Fit,
    generators: list[torch.Generator],
    kernel: Literal["nuts", "hmc"],
) -> Draws:
    """Draws by Pyro's sampler; every chain begins at a draw from the Laplace approximation at center [lens, size].

    Step sizes are those in u, the mean over a lens's chains.
    """
    lenses = []
    for lens, generator in enumerate(generators):
        one = model.take(torch.tensor([lens]))
        scale = inverse_root(one.hessian(center[lens : lens + 1])[0])
        target = rescaled(one.pyro_model, center[lens], scale)
        with isolated(generator):
            begin = torch.randn(settings.chains, model.size, dtype=torch.float64)
            chains = [run_chain(target, u, settings, kernel) for u in begin]
        lenses.append((place(center[lens], scale, torch.stack([c.u for c in chains])), chains))
    w = torch.stack([w for w, _ in lenses])
    log_density = log_densities(model, w)

    def collected(field: str) -> Tensor:
        return torch.stack([torch.stack([getattr(chain, field) for chain in chains]) for _, chains in lenses])

    constant = collected("potential") + log_density  # of Pyro's log density
    energy = collected("energy") - constant
    step_size, bfmi = collected("step_size").mean(1), bfmi_of(energy)
    return Draws(w, log_density, collected("acceptance"), collected("diverging"), energy, step_size, bfmi)


def svi(
    model: LensModel, found: MapFit, settings: Fit, generators: list[torch.Generator], rank: int | None = None
) -> Draws:
    """Independent draws from a Gaussian fitted by Pyro's SVI; begun at the MAP with the widths of the Hessian there.

    rank: of the guide's covariance beside its diagonal; None is full rank. Step size and energy have no meaning here
    and are NaN, the E-BFMI is that of independent draws; every draw is accepted.
    """
    lenses = []
    for lens, generator in enumerate(generators):
        hessian = found.hessian[lens]
        scale = inverse_root(hessian) if rank is None else torch.diag(hessian.diagonal() ** -0.5)
        target = rescaled(model.take(torch.tensor([lens])).pyro_model, found.w[lens], scale)
        with isolated(generator):
            u = fitted_guide(target, model.size, settings, rank).sample((settings.chains, settings.draws))
        lenses.append(place(found.w[lens], scale, u))
    w = torch.stack(lenses)
    if not bool(torch.isfinite(w).all()):
        raise ArithmeticError("variational inference diverged; a lower svi_learning_rate may help")
    density = log_densities(model, w)
    nan, bfmi = torch.full_like(density, torch.nan), torch.full_like(density[:, 0, 0], 2.0)
    accepted, diverging = torch.ones_like(density), torch.zeros_like(density, dtype=torch.bool)
    return Draws(w, density, accepted, diverging, nan, nan[:, 0, 0], bfmi)


@torch.no_grad()
def log_densities(model: LensModel, w: Tensor) -> Tensor:
    """Log posterior [lens, chain, draw] of w [lens, chain, draw, size], without its constant."""
    lenses, chains = w.shape[:2]
    rows = model.take(torch.arange(lenses).repeat_interleave(chains))
    values = [rows.log_density(draw.flatten(0, 1)) for draw in w.unbind(2)]
    return torch.stack(values, -1).unflatten(0, (lenses, chains))


def inverse_root(hessian: Tensor) -> Tensor:
    """A = L^-T, where the Hessian [size, size] is L L^T: A A^T is its inverse."""
    return torch.linalg.inv(torch.linalg.cholesky(hessian)).T


def place(center: Tensor, scale: Tensor, u: Tensor) -> Tensor:
    """w = center + A u, computed in float64, for u [..., size]; in the precision of `center`."""
    return (center.double() + u @ scale.T).to(center.dtype)


def rescaled(model: Callable[[], None], center: Tensor, scale: Tensor) -> Callable[[], None]:
    """The Pyro model of one lens, with site `w` [1, size], as one of `u` [size]; the constant |det A| is left out."""

    def of_u() -> None:
        anything = dist.Normal(torch.zeros(len(center), dtype=torch.float64), 1).to_event(1).mask(False)
        u = pyro.sample("u", anything)
        poutine.condition(model, {"w": place(center, scale, u)[None]})()

    return of_u


@contextmanager
def isolated(generator: torch.Generator) -> Iterator[None]:
    """Torch's random numbers seeded from `generator` and an empty parameter store of Pyro; both are put back after."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


@dataclass(frozen=True)
class Chain:
    """One chain of Pyro's: u [draw, size], potential at it, acceptance, divergence and energy of its trajectory [draw].

    The energy is that at which the trajectory begins; step_size is a scalar.
    """

    u: Tensor
    potential: Tensor
    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    step_size: Tensor


class _KeepsEnergy:
    """For Pyro's kernels, which throw away the energy at which a trajectory begins."""

    energy = float("nan")

    def _sample_r(self: Any, name: str) -> Any:
        momentum = super()._sample_r(name)  # type: ignore[misc]
        self.energy = float(self._kinetic_energy(momentum[1]) + self._potential_energy_last)
        return momentum


class _Nuts(_KeepsEnergy, NUTS):
    pass


class _Hmc(_KeepsEnergy, HMC):
    pass


def run_chain(target: Callable[[], None], begin: Tensor, settings: Fit, kernel: Literal["nuts", "hmc"]) -> Chain:
    """One chain of Pyro's on a Pyro model of `u` [size]; step size and a diagonal metric are tuned in the warm-up."""
    sampler: Any
    if kernel == "nuts":
        sampler = _Nuts(target, target_accept_prob=settings.target_accept)
    else:
        sampler = _Hmc(target, trajectory_length=settings.path_length, target_accept_prob=settings.target_accept)
    kept: list[tuple[float, float, bool, float]] = []

    def keep(kernel: Any, _: object, stage: str, draw: int) -> None:
        if stage == "Sample":
            potential, diverged = float(kernel._potential_energy_last), draw in kernel._divergences
            kept.append((potential, kernel._mean_accept_prob, diverged, kernel.energy))

    mcmc = MCMC(sampler, settings.draws, settings.warmup, {"u": begin.clone()}, hook_fn=keep, disable_progbar=True)
    mcmc.run()
    potential, mean, diverging, energy = (torch.tensor(column) for column in zip(*kept, strict=True))
    counts = torch.arange(len(mean) + 1)
    totals = counts * torch.cat([torch.zeros(1), mean])
    return Chain(mcmc.get_samples()["u"], potential, totals.diff(), diverging, energy, torch.tensor(sampler.step_size))


def fitted_guide(target: Callable[[], None], size: int, settings: Fit, rank: int | None) -> Any:
    """The Gaussian of `u` [size] that SVI ends at, begun at zero with unit widths; the rate falls exponentially."""
    begin = {"init_loc_fn": init_to_value(values={"u": torch.zeros(size, dtype=torch.float64)}), "init_scale": 1.0}
    guide: Any
    if rank is None:
        guide = AutoMultivariateNormal(target, **begin)
    else:
        guide = AutoLowRankMultivariateNormal(target, rank=rank, **begin)
    optimiser = ClippedAdam({"lr": settings.svi_learning_rate, "lrd": LAST_RATE ** (1 / settings.svi_steps)})
    inference = SVI(target, guide, optimiser, Trace_ELBO())
    for _ in range(settings.svi_steps):
        inference.step()
    with torch.no_grad():
        return guide.get_posterior()


def _nuts(model: LensModel, found: MapFit, settings: Fit, generators: list[torch.Generator]) -> Draws:
    return pyro_mcmc(model, found.w, settings, generators, "nuts")


def _hmc(model: LensModel, found: MapFit, settings: Fit, generators: list[torch.Generator]) -> Draws:
    return pyro_mcmc(model, found.w, settings, generators, "hmc")


def _svi_low_rank(model: LensModel, found: MapFit, settings: Fit, generators: list[torch.Generator]) -> Draws:
    return svi(model, found, settings, generators, settings.svi_rank)


SAMPLERS: dict[str, Sampler] = {
    "pyro_nuts": _nuts,
    "pyro_hmc": _hmc,
    "svi_full_rank": svi,
    "svi_low_rank": _svi_low_rank,
}
