"""Hamiltonian Monte Carlo for many lenses at once, each with its own metric, step size and random numbers.

Coordinates are whitened by the Gauss-Newton Hessian H: w = w_map + L^-T u with H = L L^T; at first H is the one at the
maximum, then, four times during the warm-up, the mean over the places where the chains have been lately, some ten each
in the end: a trajectory meets the curvature of the whole posterior, not of its top or of the way from there. The step
size of a lens is tuned by dual averaging over its chains (Hoffman & Gelman 2014, algorithm 5). A trajectory's length is
drawn anew for every draw, the same for all chains of a lens; where the posterior is a bent valley, much longer than its
curvature tells, its mean is the standard deviation along the valley, as the chains have lately seen it.

Where the target ends at a wall, or is the same on its other side, trajectories are reflected, which changes neither
energies nor volumes (Afshar & Domke 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.posteriors.convergence import least_bfmi
from lenspipe.prior_map import Wall

Target = Callable[..., tuple[Tensor, Tensor]]  # of w [n, size] and, where it is not of all rows, of their numbers [n]
STEP_STATE = ("log_step", "anchor", "error", "averaged")  # tensors of a step size
OWN_STATE = ("hessian", "curved", "curved_before", "seen", "seen_before", "length", "u", "value", "gradient")  # a run's
ALL = slice(None)
PLACES = 18  # of each chain where Hessians are taken in the warm-up, half of them for the last metric; all, later
REFLECTIONS = 50  # in one leapfrog step; a trajectory that has more is not accepted
NEAR_WALL = 1.8  # mean distance over sd of draws that feel one: exponentials have 1, half Gaussians 1.3, even ones 1.7
DIVERGENT = 1000.0  # error of the energy beyond which a trajectory has diverged [nat]


@dataclass(frozen=True)
class Draws:
    """What the chains left behind: [lens, chain, draw], `w` [lens, chain, draw, size], `step_size` and `bfmi` [lens].

    bfmi: the least over chains, of all transitions; of draws that are thinned the energies say nothing any more.
    """

    w: Tensor
    log_density: Tensor
    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    step_size: Tensor
    bfmi: Tensor


def bfmi_of(energy: Tensor) -> Tensor:
    """Least E-BFMI over chains [lens] of the energy at the start of every transition [lens, chain, draw]."""
    return torch.from_numpy(least_bfmi(energy.cpu().numpy())).to(energy)


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
    """One whitening: u [lens, chain, size] in float64, w [lens * chain, size] as the model has it.

    walls: where trajectories are reflected.
    """

    def __init__(self, target: Target, center: Tensor, hessian: Tensor, chains: int, walls: Sequence[Wall] = ()):
        self.raw_target, self.center, self.chains, self.walls = target, center, chains, list(walls)
        self.columns = [wall.column for wall in self.walls]
        self.sides = torch.tensor([wall.side for wall in self.walls], dtype=torch.float64, device=center.device)
        self.offsets = torch.tensor([wall.offset for wall in self.walls], dtype=torch.float64, device=center.device)
        self.root = torch.linalg.cholesky(hessian)  # L
        self.inverse = torch.linalg.inv(self.root)

    def unwhitened(self, u: Tensor, lenses: Tensor | slice = ALL) -> Tensor:
        """w = center + L^-T u."""
        w = self.center[lenses].double()[:, None] + u @ self.inverse[lenses]
        return w.flatten(0, 1).to(self.center.dtype)

    def whitened(self, w: Tensor) -> Tensor:
        """u = L^T (w - center)."""
        return (w.double().unflatten(0, (-1, self.chains)) - self.center.double()[:, None]) @ self.root

    def target(self, u: Tensor, lenses: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log density [lens, chain] and its gradient [lens, chain, size] with respect to u, of all lenses or some."""
        if lenses is None:
            value, gradient = self.raw_target(self.unwhitened(u))
        else:
            rows = (lenses[:, None] * self.chains + torch.arange(self.chains, device=u.device)).flatten()
            value, gradient = self.raw_target(self.unwhitened(u, lenses), rows)
        inverse = self.inverse[ALL if lenses is None else lenses]
        chained = (-1, self.chains)
        return value.unflatten(0, chained), gradient.double().unflatten(0, chained) @ inverse.transpose(1, 2)

    def drift(self, u: Tensor, momentum: Tensor, time: Tensor, lenses: Tensor) -> tuple[Tensor, Tensor]:
        """Move u [n, chain, size] of `lenses` [n] straight on for a time [n, 1, 1], with reflections: u, momentum.

        The momentum of those that are reflected too often is not a number.
        """
        if not self.walls:
            return u + time * momentum, momentum
        walls = self.inverse[lenses][:, :, self.columns] * self.sides  # [n, size, wall]
        place = self.center[lenses][:, None, self.columns].double() * self.sides + self.offsets
        squares = walls.square().sum(1, keepdim=True)
        left = time.expand(*u.shape[:2], 1)
        for _ in range(REFLECTIONS):
            speed = momentum @ walls
            until = torch.where(speed < 0, (place + u @ walls) / -speed, torch.inf).clamp(min=0)
            first, wall = until.min(-1, keepdim=True)
            hit = first < left
            step = torch.minimum(first, left)
            u, left = u + step * momentum, left - step
            if not bool(hit.any()):
                return u, momentum
            normal = walls.mT.gather(1, wall.expand_as(u))
            along = speed.gather(-1, wall) / squares.expand_as(speed).gather(-1, wall)
            momentum = torch.where(hit, momentum - 2 * along * normal, momentum)
        return u, torch.where(left > 0, torch.nan, momentum)


class Run:
    """Chains of some lenses: `warmup` draws that tune, then `draws` that are kept; the settings' where none are given.

    target: log density and gradient of w [lens * chain, size], chains of a lens side by side; center: [lens, size];
    hessian: [lens, size, size], positive definite; generators: one a lens; curvature: Hessian [lens * chain, size,
    size] at w, for the refreshed metric; none keeps `hessian`; walls: `center` and `begin` are within. Chains begin at
    `begin` [lens, chain, size] and with `step` [lens], or at draws from the Gaussian of center and hessian, reflected,
    with a step that fits its dimension. seen: where the chains have been before, [lens, place, chain, size].
    """

    def __init__(
        self,
        target: Target,
        center: Tensor,
        hessian: Tensor,
        settings: Fit,
        generators: list[torch.Generator],
        curvature: Callable[[Tensor], Tensor] | None = None,
        *,
        warmup: int | None = None,
        draws: int | None = None,
        begin: Tensor | None = None,
        step: Tensor | None = None,
        seen: Tensor | None = None,
        walls: Sequence[Wall] = (),
    ):
        lenses, size = center.shape
        self.target, self.center, self.settings, self.generators = target, center, settings, generators
        self.curvature, self.iteration = curvature, 0
        self.warmup = settings.warmup if warmup is None else warmup
        self.draws = settings.draws if draws is None else draws
        self.curved = self.curved_before = torch.zeros_like(hessian)
        self.seen = self.seen_before = center.new_zeros(lenses, 0, settings.chains, size)
        self.walls = list(walls)
        if seen is None and self.walls:
            _, gradient = target(center.repeat_interleave(settings.chains, 0))
            hessian = pressed(hessian, center, gradient[:: settings.chains], self.walls)
        self._shape(hessian, self.seen if seen is None else seen)
        if begin is None:
            way, one = _normal(generators, center.device, settings.chains, size), center.new_ones(lenses, 1, 1).double()
            self.u, _ = self.metric.drift(torch.zeros_like(way), way, one, torch.arange(lenses, device=center.device))
        else:
            self.u = self.metric.whitened(begin.flatten(0, 1))
        self.value, self.gradient = self.metric.target(self.u)
        step = torch.full((lenses,), size**-0.25, dtype=torch.float64, device=center.device) if step is None else step
        self.step = StepSize.begin(step, settings.target_accept)
        self.kept: list[dict[str, Tensor]] = []

    @property
    def finished(self) -> bool:
        return self.iteration >= self.warmup + self.draws

    def finish(self) -> Draws:
        """All draws that are left to make; those kept."""
        while not self.finished:
            self.advance()
        return self.result()

    def advance(self) -> None:
        """One draw of every chain."""
        tuning = self.iteration < self.warmup
        if tuning and self.curvature:
            self._look_about()
        size = torch.exp(self.step.log_step if tuning else self.step.averaged)
        length = self.length * 2 * _uniform(self.generators, self.u.device, 1)[:, 0]
        leaps = torch.ceil(length / size).clamp(1, self.settings.max_leapfrog_steps)
        momentum = _normal(self.generators, self.u.device, *self.u.shape[1:])
        energy = 0.5 * momentum.square().sum(-1) - self.value
        moved, new_momentum, new_value, new_gradient = leapfrog(
            self.metric, self.u, momentum, self.value, self.gradient, size, leaps
        )
        error = torch.nan_to_num(0.5 * new_momentum.square().sum(-1) - new_value - energy, nan=torch.inf)
        acceptance = torch.exp(-error).clamp(max=1.0)
        accept = _uniform(self.generators, self.u.device, self.u.shape[1]) < acceptance
        self.u = torch.where(accept[..., None], moved, self.u)
        self.gradient = torch.where(accept[..., None], new_gradient, self.gradient)
        self.value = torch.where(accept, new_value, self.value)
        if tuning:
            self.step.update(acceptance.mean(1))
        else:
            kept = {"w": self.w, "log_density": self.value, "acceptance": acceptance, "energy": energy}
            self.kept.append(kept | {"diverging": error > DIVERGENT})
        self.iteration += 1

    @property
    def w(self) -> Tensor:
        """Where the chains are: [lens, chain, size]."""
        return self.metric.unwhitened(self.u).unflatten(0, self.u.shape[:2])

    def result(self) -> Draws:
        """The draws kept so far."""
        columns = {name: torch.stack([draw[name] for draw in self.kept], dim=2) for name in self.kept[0]}
        return Draws(**columns, step_size=torch.exp(self.step.averaged), bfmi=bfmi_of(columns["energy"]))

    def _look_about(self) -> None:
        """Note where the chains are, at some places with the Hessian; four times, take a metric from the last."""
        refreshed = sorted({self.warmup * part // 5 for part in range(5)})
        if not 0 < self.iteration <= refreshed[-1]:
            return
        every = max(1, refreshed[-1] // PLACES)
        looks = sorted({*range(every, refreshed[-1] + 1, every), *refreshed[1:]} - {0})
        self.seen = torch.cat([self.seen, self.w[:, None]], 1)
        if self.iteration in looks:
            assert self.curvature is not None
            self.curved = self.curved + mean_over_chains(self.curvature, self.w)
        if self.iteration in refreshed:
            since = refreshed[max(0, refreshed.index(self.iteration) - 2)]
            self._refresh(sum(since < look <= self.iteration for look in looks))

    def _refresh(self, looks: int) -> None:
        """Take a metric from where the chains were since the refresh before the last one; the step size begins anew.

        looks: how many Hessians there are of those places.
        """
        w, seen = self.w, torch.cat([self.seen_before, self.seen], 1)
        self._shape((self.curved_before + self.curved) / looks, seen)
        self.curved_before, self.seen_before = self.curved, self.seen
        self.curved, self.seen = torch.zeros_like(self.curved), self.seen[:, :0]
        self.u = self.metric.whitened(w.flatten(0, 1))
        self.value, self.gradient = self.metric.target(self.u)
        self.step = StepSize.begin(torch.exp(self.step.averaged), self.settings.target_accept)

    def _shape(self, hessian: Tensor, seen: Tensor) -> None:
        """Take a Hessian for the metric, and its room at walls and the reach from where chains were.

        seen: [lens, place, chain, size]; there may be none.
        """
        seen = seen.double().flatten(1, 2)
        if seen.shape[1]:
            hessian = narrowed(hessian, seen.mean(1), seen.var(1, correction=0), self.walls)
        self.hessian = hessian
        self.metric = Metric(self.target, self.center, hessian, self.settings.chains, self.walls)
        self.length = torch.full_like(self.center[:, 0], self.settings.path_length, dtype=torch.float64)
        if seen.shape[1]:
            self.length = torch.maximum(self.length, reach(self.metric, seen))

    def state(self) -> dict[str, Tensor]:
        """All that the run goes on from, as tensors."""
        steps = {f"step.{name}": getattr(self.step, name) for name in STEP_STATE}
        kept = (
            {f"kept.{name}": torch.stack([draw[name] for draw in self.kept]) for name in self.kept[0]}
            if self.kept
            else {}
        )
        own = {name: getattr(self, name) for name in OWN_STATE}
        counts = torch.tensor([self.iteration, self.step.count])
        return (
            own | steps | kept | {"counts": counts, "generators": torch.stack([g.get_state() for g in self.generators])}
        )

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of a run with the same settings, from aligned copies: others round sums differently."""
        state = {name: tensor.clone() for name, tensor in state.items()}
        for name in OWN_STATE:
            setattr(self, name, state[name])
        self.metric = Metric(self.target, self.center, self.hessian, self.settings.chains, self.walls)
        for name in STEP_STATE:
            setattr(self.step, name, state[f"step.{name}"])
        self.iteration, self.step.count = state["counts"].tolist()
        for generator, own in zip(self.generators, state["generators"], strict=True):
            generator.set_state(own.cpu().clone())  # each aligned
        names = [name.removeprefix("kept.") for name in state if name.startswith("kept.")]
        number = len(state["kept.w"]) if names else 0
        self.kept = [{name: state[f"kept.{name}"][draw] for name in names} for draw in range(number)]


def narrowed(hessian: Tensor, mean: Tensor, variance: Tensor, walls: Sequence[Wall]) -> Tensor:
    """Hessians [lens, size, size] whose Gaussians are no wider at the walls than draws are.

    mean, variance: of draws [lens, size]. A wall leaves less room than curvature knows, and a trajectory that rattles
    there needs small steps. Elsewhere few draws that have not been everywhere yet would be taken for all there is.
    """
    hessian = hessian.clone()
    for wall in walls:
        column, near = wall.column, wall.distance(mean) < NEAR_WALL * variance[:, wall.column].sqrt()
        if near.any():
            wide = torch.linalg.inv(hessian)[:, column, column]
            more = (1 / variance[:, column] - 1 / wide).clamp(min=0)
            hessian[:, column, column] += torch.where(near, more, 0.0)
    return hessian


def pressed(hessian: Tensor, center: Tensor, gradient: Tensor, walls: Sequence[Wall]) -> Tensor:
    """The same where there are no draws yet: where a maximum, `center`, is pressed against a wall, by its slope there.

    gradient: of the log density at it, [lens, size]. Draws are as far from such a wall as an exponential is, 1 / slope;
    in a wider metric a reflection is wrong by as much energy as a step falls.
    """
    place, variance = center.double().clone(), torch.full_like(center, torch.inf, dtype=torch.float64)
    for wall in walls:
        room = -1 / (wall.side * gradient[:, wall.column].double())
        near = (room > 0) & (wall.distance(place) < room)
        variance[:, wall.column] = torch.where(near, room.square(), variance[:, wall.column])
        place[:, wall.column] = torch.where(near, wall.side * (room - wall.offset), place[:, wall.column])
    return narrowed(hessian, place, variance, walls)


def reach(metric: Metric, seen: Tensor) -> Tensor:
    """Standard deviation [lens] of draws [lens, n, size] along their widest direction, whitened."""
    u = (seen - seen.mean(1, keepdim=True)) @ metric.root
    return torch.linalg.eigvalsh(u @ u.mT / u.shape[1])[:, -1].clamp(min=0).sqrt()


def mean_over_chains(curvature: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """The mean Hessian [lens, size, size] at places [lens, chain, size]."""
    return curvature(w.flatten(0, 1)).unflatten(0, w.shape[:2]).mean(1)


def leapfrog(
    metric: Metric, u: Tensor, momentum: Tensor, value: Tensor, gradient: Tensor, step: Tensor, leaps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integrate the motion of u [lens, chain, size] with unit mass.

    step, leaps: [lens], size and number of steps; a lens that has made its leaps costs nothing more.
    Returns position, momentum, log density [lens, chain] and its gradient at the end.
    """
    for leap in range(int(leaps.max())):
        moving = (leap < leaps).nonzero()[:, 0]
        some = moving if len(moving) < len(leaps) else None
        epsilon = step[moving][:, None, None]
        half = momentum[moving] + 0.5 * epsilon * gradient[moving]
        place, half = metric.drift(u[moving], half, epsilon, moving)
        at, slope = metric.target(place, some)
        new = place, half + 0.5 * epsilon * slope, at, slope
        u, momentum, value, gradient = (
            old.index_copy(0, moving, moved) for old, moved in zip((u, momentum, value, gradient), new, strict=True)
        )
    return u, momentum, value, gradient


def _normal(generators: list[torch.Generator], device: torch.device, *shape: int) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float64) for g in generators]).to(device)


def _uniform(generators: list[torch.Generator], device: torch.device, *shape: int) -> Tensor:
    return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators]).to(device)
