"""Hamiltonian Monte Carlo for many lenses at once, each with its own metric, step size and random numbers.

Coordinates are whitened by the Gauss-Newton Hessian H: w = w_map + L^-T u with H = L L^T; at first H is the one at the
maximum, then, three times during the warm-up, the mean over where the chains are: a trajectory meets the curvature of
the whole posterior, not of its top. The step size of a lens is tuned by dual averaging over its chains (Hoffman &
Gelman 2014, algorithm 5); a trajectory's length is drawn anew for every draw, the same for all chains of a lens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lenspipe.config import Fit

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
DIVERGENT = 1000.0  # error of the energy beyond which a trajectory has diverged [nat]


@dataclass(frozen=True)
class Draws:
    """What the chains left behind, all [lens, chain, draw] but `w` [lens, chain, draw, size] and `step_size` [lens]."""

    w: Tensor
    log_density: Tensor
    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    step_size: Tensor


@dataclass
class StepSize:
    """Dual averaging of the logarithm of one step size per lens, towards a mean acceptance."""

    log_step: Tensor
    target: float
    anchor: Tensor
    error: Tensor
    averaged: Tensor
    count: int = 0

    @classmethod
    def begin(cls, step: Tensor, target: float) -> StepSize:
        log_step = torch.log(step)
        zero = torch.zeros_like(log_step)
        return cls(log_step, target, math.log(2.0) + log_step, zero, log_step.clone())

    def update(self, acceptance: Tensor) -> None:
        """Take in the mean acceptance [lens] of one draw."""
        self.count += 1
        weight = 1 / (self.count + 10)
        self.error = (1 - weight) * self.error + weight * (self.target - acceptance)
        self.log_step = self.anchor - math.sqrt(self.count) / 0.05 * self.error
        fade = self.count**-0.75
        self.averaged = fade * self.log_step + (1 - fade) * self.averaged


class Metric:
    """One whitening: u [lens, chain, size] in float64, w [lens * chain, size] as the model has it."""

    def __init__(self, target: Target, center: Tensor, hessian: Tensor, chains: int):
        self.raw_target, self.center, self.chains = target, center, chains
        self.root = torch.linalg.cholesky(hessian)  # L
        self.inverse = torch.linalg.inv(self.root)

    def unwhitened(self, u: Tensor) -> Tensor:
        """w = center + L^-T u."""
        w = self.center.double()[:, None] + u @ self.inverse
        return w.flatten(0, 1).to(self.center.dtype)

    def whitened(self, w: Tensor) -> Tensor:
        """u = L^T (w - center)."""
        return (w.double().unflatten(0, (-1, self.chains)) - self.center.double()[:, None]) @ self.root

    def target(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density [lens, chain] and its gradient [lens, chain, size] with respect to u."""
        value, gradient = self.raw_target(self.unwhitened(u))
        chained = (-1, self.chains)
        return value.unflatten(0, chained), gradient.double().unflatten(0, chained) @ self.inverse.transpose(1, 2)


def sample(
    target: Target,
    center: Tensor,
    hessian: Tensor,
    settings: Fit,
    generators: list[torch.Generator],
    curvature: Callable[[Tensor], Tensor] | None = None,
) -> Draws:
    """Draw `settings.draws` from every chain after `settings.warmup`.

    target: log density and gradient of w [lens * chain, size], chains of a lens side by side; center: [lens, size];
    hessian: [lens, size, size], positive definite; generators: one a lens; curvature: Hessian [lens * chain, size,
    size] at w, for the refreshed metric; none keeps `hessian`.
    """
    lenses, size = center.shape
    chains = settings.chains
    metric = Metric(target, center, hessian, chains)
    u = _normal(generators, chains, size)
    value, gradient = metric.target(u)
    step = StepSize.begin(torch.full((lenses,), size**-0.25, dtype=torch.float64), settings.target_accept)
    refreshes = [settings.warmup * part // 5 for part in (1, 2, 3)] if curvature else []
    kept: list[tuple[Tensor, ...]] = []
    for iteration in range(settings.warmup + settings.draws):
        tuning = iteration < settings.warmup
        if curvature and iteration in refreshes:
            w = metric.unwhitened(u)
            metric = Metric(target, center, curvature(w).unflatten(0, (lenses, chains)).mean(1), chains)
            u = metric.whitened(w)
            value, gradient = metric.target(u)
            step = StepSize.begin(torch.exp(step.averaged), settings.target_accept)
        size_now = torch.exp(step.log_step if tuning else step.averaged)
        length = settings.path_length * 2 * _uniform(generators, 1)[:, 0]
        leaps = torch.ceil(length / size_now).clamp(1, settings.max_leapfrog_steps)
        momentum = _normal(generators, chains, size)
        energy = 0.5 * momentum.square().sum(-1) - value
        moved, new_momentum, new_value, new_gradient = leapfrog(
            metric.target, u, momentum, value, gradient, size_now, leaps
        )
        error = torch.nan_to_num(0.5 * new_momentum.square().sum(-1) - new_value - energy, nan=torch.inf)
        acceptance = torch.exp(-error).clamp(max=1.0)
        accept = _uniform(generators, chains) < acceptance
        u = torch.where(accept[..., None], moved, u)
        gradient = torch.where(accept[..., None], new_gradient, gradient)
        value = torch.where(accept, new_value, value)
        if tuning:
            step.update(acceptance.mean(1))
        else:
            w = metric.unwhitened(u).unflatten(0, (lenses, chains))
            kept.append((w, value, acceptance, error > DIVERGENT, energy))
    w, log_density, accepted, diverging, energies = (torch.stack(column, dim=2) for column in zip(*kept, strict=True))
    return Draws(w, log_density, accepted, diverging, energies, torch.exp(step.averaged))


def leapfrog(
    target: Target, u: Tensor, momentum: Tensor, value: Tensor, gradient: Tensor, step: Tensor, leaps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integrate the motion of u [lens, chain, size] with unit mass.

    step, leaps: [lens], size and number of steps; a lens that has made its leaps waits for the others unchanged.
    Returns position, momentum, log density [lens, chain] and its gradient at the end.
    """
    epsilon = step[:, None, None]
    for leap in range(int(leaps.max())):
        moving = (leap < leaps)[:, None, None]
        half = momentum + 0.5 * epsilon * gradient
        new_u = u + epsilon * half
        new_value, new_gradient = target(torch.where(moving, new_u, u))
        u = torch.where(moving, new_u, u)
        momentum = torch.where(moving, half + 0.5 * epsilon * new_gradient, momentum)
        value = torch.where(moving[..., 0], new_value, value)
        gradient = torch.where(moving, new_gradient, gradient)
    return u, momentum, value, gradient


def _normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float64) for g in generators])


def _uniform(generators: list[torch.Generator], *shape: int) -> Tensor:
    return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators])
