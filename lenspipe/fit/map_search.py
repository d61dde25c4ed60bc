"""Maximum a posteriori: tempered Gauss-Newton with Marquardt damping, many starts a lens, all in one batch.

The search goes from cheap to dear. Scouts, many starts of a lens on coarse pixels, climb with the noise multiplied by
falling temperatures; after every rung the best that differ go on. Those that are left climb with the whole source on
finer pixels, and the best of them and its rivals to the end on all pixels: the basins.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit.evidence import laplace
from lenspipe.fit.model import LensModel

CONVERGED = 1e-2  # gain in log posterior below which a step at temperature 1 is the last [nat]
ON_THE_WAY = 0.3  # the same at higher temperatures
TRIALS = (0.1, 1.0, 10.0)  # factors on the damping that are tried at every step
DAMPING = (1e-6, 1e8)  # its bounds
ALIKE = 0.1  # difference of the named unknowns below which two points are one [standard deviations of the prior]
AS_LIKELY = 1.0  # difference of their log posteriors below which such points go on as one [nat]
SAME_BASIN = 5.0  # difference of every named unknown below which two points are in one basin [posterior sd]
MEDIAN = 0.6745  # of the half of a standard normal
FURTHEST = 8.0  # bound of every unknown, in standard deviations of its prior


@dataclass(frozen=True)
class MapFit:
    """The best point of every lens, the highest of the basin with the most evidence, and what the search saw.

    After an exploration the best is the one with the most evidence itself.

    w: [lens, size]; log_density: [lens]; hessian: [lens, size, size], Gauss-Newton, of minus the log posterior at w;
    converged: [lens]. basins_w, basins_log_density, basins_log_evidence: [lens, basin, size] and [lens, basin], the
    distinct solutions by falling evidence, which is Laplace's approximation; NaN where there are fewer.
    start_log_density: [lens, survivor], where the surviving scouts ended before the last climb; start_basin: [lens,
    survivor], the basin each ended in or where the climb or the exploration to it began, -1 for those left behind;
    start_count: [lens, survivor], how many scouts were dropped on the way because they were like this one, and itself;
    starts: [lens], how many there were at first.
    """

    w: Tensor
    log_density: Tensor
    hessian: Tensor
    converged: Tensor
    basins_w: Tensor
    basins_log_density: Tensor
    basins_log_evidence: Tensor
    start_log_density: Tensor
    start_basin: Tensor
    start_count: Tensor
    starts: Tensor

    @classmethod
    def of_one_start(cls, model: LensModel, w: Tensor, log_density: Tensor, converged: Tensor) -> MapFit:
        """Of a search with one start a lens: the one basin is where it ended."""
        hessian, evidence = laplace(model, w, log_density)
        basins = w[:, None], log_density[:, None], evidence[:, None]
        points, density, evidence = (torch.cat([b, torch.full_like(b, torch.nan)], 1) for b in basins)
        start_basin = torch.zeros(len(w), 1, dtype=torch.long, device=w.device)
        return cls(
            w,
            log_density,
            hessian,
            converged,
            points,
            density,
            evidence,
            log_density[:, None],
            start_basin,
            start_basin + 1,
            start_basin[:, 0] + 1,
        )


def as_tensors(found: MapFit) -> dict[str, Tensor]:
    """What a search found as named tensors, for a checkpoint."""
    return {f"map.{field.name}": getattr(found, field.name) for field in fields(found)}


def restored(tensors: dict[str, Tensor]) -> MapFit | None:
    """What a search found, from the checkpoint that `chains` left it in; None where it is not there."""
    names = [field.name for field in fields(MapFit)]
    if not all(f"map.{name}" in tensors for name in names):
        return None
    return MapFit(**{name: tensors[f"map.{name}"] for name in names})


@torch.no_grad()
def search(model: LensModel, settings: Fit, generators: list[torch.Generator]) -> MapFit:
    """Search from `settings.starts` points drawn from the prior of the named parameters, with the mean source.

    generators: one a lens, so that a lens's starts do not depend on its neighbours in the batch.
    """
    levels = [model]
    while min(levels[-1].simulator.shape) >= 2 * settings.scout_pixels:
        coarser = levels[-1].coarse()
        if coarser is levels[-1]:
            break
        levels.append(coarser)
    w, count = scout(levels[-1], settings, generators)
    middle = levels[min(1, len(levels) - 1)]
    w, value = settle(middle, w, settings)
    found = finish(model, middle, w, value, settings)
    return replace(found, start_count=count, starts=torch.full_like(found.starts, settings.starts))


def scout(model: LensModel, settings: Fit, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The best `settings.survivors` different points [lens, survivor, size] that scouts reach on coarse pixels.

    And for how many scouts each of them stands [lens, survivor].

    Scouts join the ladder at different rungs: from a high temperature all of them would follow the same path. They see
    the source's sketch.
    """
    sketch = model.sketched(settings.scout_components)
    lenses, starts, ladder = len(model.batch), settings.starts, settings.temperatures
    w = torch.stack([start_points(sketch, starts, generator) for generator in generators]).to(model.data)
    value = torch.full((lenses, starts), -torch.inf, dtype=torch.float64, device=w.device)
    alive = torch.zeros(lenses, starts, dtype=torch.bool, device=w.device)
    count = torch.ones(lenses, starts, dtype=torch.long, device=w.device)
    for rung, temperature in enumerate(ladder):
        alive |= torch.arange(starts, device=w.device) % len(ladder) == rung
        lens, start = alive.nonzero(as_tuple=True)
        w[lens, start], value[lens, start], _ = climb(
            sketch, w[lens, start], temperature, settings.steps_per_temperature, lens
        )
        kept = ranked(sketch, w, torch.where(alive, value, -torch.inf))[:, : settings.scouts]
        alive, count = dropped(sketch, w, value, alive, kept, count)
    kept = ranked(sketch, w, torch.where(alive, value, -torch.inf))[:, : min(settings.survivors, starts)]
    _, count = dropped(sketch, w, value, alive, kept, count)
    w, count = w.gather(1, kept[..., None].expand(-1, -1, w.shape[-1])), count.gather(1, kept)
    named, of_source = model.split(w)
    return torch.cat([named, model.source.from_sketch(of_source)], -1), count


def settle(model: LensModel, w: Tensor, settings: Fit) -> tuple[Tensor, Tensor]:
    """Climb from points [lens, start, size] with the whole source, down to the true noise: points, log posteriors.

    Points that have come to the same place go on as one.
    """
    own = torch.arange(w.shape[1], device=w.device)
    stands, w = own.expand(w.shape[:2]), w.clone()
    value = torch.empty(w.shape[:2], dtype=torch.float64, device=w.device)
    for temperature in settings.settling_temperatures:
        lens, start = (stands == own).nonzero(as_tuple=True)
        w[lens, start], value[lens, start], _ = climb(
            model, w[lens, start], temperature, settings.steps_per_temperature, lens
        )
        w, value = w.gather(1, stands[..., None].expand_as(w)), value.gather(1, stands)
        stands = merged(model, w, value)
    return w, value


def merged(model: LensModel, w: Tensor, value: Tensor) -> Tensor:
    """Which point [lens, start] stands for each of the points [lens, start, size]: the best at the same place."""
    order, alike = likeness(model, w, value)
    falling = value.gather(1, order)
    alike &= (falling[:, :, None] - falling[:, None]).abs() < AS_LIKELY
    stands = torch.empty_like(order).scatter(1, order, order.gather(1, alike.to(torch.uint8).argmax(-1)))
    for _ in range(w.shape[1]):  # what stands for another may be like a third
        stands = stands.gather(1, stands)
    return stands


def start_points(model: LensModel, starts: int, generator: torch.Generator) -> Tensor:
    """[start, size]: named parameters from the prior, the first at its median; latents at zero."""
    w = torch.zeros(starts, model.size, dtype=model.data.dtype)
    named = len(model.priors.free)
    w[1:, :named] = torch.randn(starts - 1, named, generator=generator)
    w[0, model.priors.folded] = MEDIAN
    return model.unfolded(w)


def ranked(model: LensModel, w: Tensor, value: Tensor) -> Tensor:
    """Indices [lens, start] of points [lens, start, size] by falling value, those like a better one last."""
    order, alike = likeness(model, w, value)
    copy = alike.tril(-1).any(-1)
    return order.gather(1, copy.to(torch.uint8).argsort(dim=1, stable=True))


def likeness(model: LensModel, w: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [lens, start] by falling value, and which of those so ordered are alike [lens, start, start]."""
    order = value.argsort(dim=1, descending=True, stable=True)
    named = model.split(w.gather(1, order[..., None].expand_as(w)))[0]
    return order, model.priors.offset(named[:, :, None] - named[:, None]).abs().amax(-1) < ALIKE


def dropped(
    model: LensModel, w: Tensor, value: Tensor, alive: Tensor, kept: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Which starts are alive once all but `kept` [lens, n] are dropped, and for how many each stands [lens, start].

    One that is dropped is counted with the best one that is like it.
    """
    left = alive & torch.zeros_like(alive).scatter(1, kept, True)
    order, alike = likeness(model, w, torch.where(alive, value, -torch.inf))
    original = alike.to(torch.uint8).argmax(-1)  # the best that is like it, itself where there is none
    count, gone = count.gather(1, order), (alive & ~left).gather(1, order)
    for place in reversed(range(alive.shape[1])):
        moved = torch.where(gone[:, place] & (original[:, place] < place), count[:, place], 0)
        count = count.scatter_add(1, original[:, place, None], moved[:, None])
        count[:, place] -= moved
    return left, torch.empty_like(count).scatter(1, order, count)


def finish(model: LensModel, settled: LensModel, w: Tensor, value: Tensor, settings: Fit) -> MapFit:
    """Climb to the end on all pixels from the best points [lens, start, size] and their rivals; compare the basins.

    value: [lens, start], log posteriors under the model `settled`. A rival is a point that is elsewhere than all better
    ones and not more than `settings.rival_gap` below the best. The first basin is that with the most evidence, which
    tells how much of the posterior is there: a source that draws the arcs itself may reach a higher maximum.
    """
    lenses = torch.arange(len(value), device=w.device)
    value = _number(value)
    climbed, origin_sd = apart(settled, w, value, settings.rival_gap)
    lens, start = climbed.nonzero(as_tuple=True)
    ended, sd = w.clone(), torch.full_like(origin_sd, torch.nan)
    reached, evidence = torch.full_like(value, -torch.inf), torch.full_like(value, -torch.inf)
    done, place = torch.zeros_like(climbed), torch.zeros_like(climbed, dtype=torch.long)
    ended[lens, start], reached[lens, start], done[lens, start] = climb(
        model, w[lens, start], 1.0, settings.final_steps, lens
    )
    hessian, evidence[lens, start] = laplace(model, ended[lens, start], reached[lens, start], lens)
    sd[lens, start] = named_sd(model, hessian)
    place[lens, start] = torch.arange(len(lens), device=w.device)

    most = evidence.argmax(1)
    there = separation(model, ended, ended[lenses, most], sd[lenses, most]) < SAME_BASIN
    first = torch.where(there & climbed, reached, -torch.inf).argmax(1)
    second = torch.where(there, -torch.inf, evidence).argmax(1)
    alone = ~(climbed & ~there).any(1)
    basins = pairs(first, second, alone, ended, reached, evidence)
    (spreads,) = pairs(first, second, alone, sd)
    return MapFit(
        w=ended[lenses, first],
        log_density=reached[lenses, first],
        hessian=hessian[place[lenses, first]],
        converged=done[lenses, first],
        basins_w=basins[0],
        basins_log_density=basins[1],
        basins_log_evidence=basins[2],
        start_log_density=value,
        start_basin=basin_of(model, w, origin_sd, ended, climbed, basins[0], spreads),
        start_count=torch.ones_like(value, dtype=torch.long),
        starts=torch.full_like(lenses, value.shape[1]),
    )


def pairs(first: Tensor, second: Tensor, alone: Tensor, *fields: Tensor) -> list[Tensor]:
    """Of fields [lens, solution, ...] what the first and the second solution have; NaN for the second where `alone`."""
    both = torch.arange(len(first), device=first.device)[:, None], torch.stack([first, second], 1)
    chosen = [field[both] for field in fields]
    for field in chosen:
        field[alone, 1] = torch.nan
    return chosen


def apart(model: LensModel, w: Tensor, value: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Which of the points [lens, start, size] are the best of their lens or rivals of it: [lens, start].

    And Laplace's standard deviations of the named unknowns at those [lens, start, named], not numbers at the others.
    """
    chosen, left = torch.zeros_like(value, dtype=torch.bool), value >= value.amax(1, keepdim=True) - gap
    spread = torch.full_like(model.split(w)[0], torch.nan, dtype=torch.float64)
    while left.any():
        lens = left.any(1).nonzero()[:, 0]
        best = torch.where(left, value, -torch.inf).argmax(1)[lens]
        chosen[lens, best] = True
        spread[lens, best] = named_sd(model, model.hessian(w[lens, best], lens))
        left[lens] &= separation(model, w[lens], w[lens, best], spread[lens, best]) > SAME_BASIN
        left[lens, best] = False
    return chosen, spread


def basin_of(
    model: LensModel, w: Tensor, origin_sd: Tensor, ended: Tensor, climbed: Tensor, basins: Tensor, sd: Tensor
) -> Tensor:
    """The basin [lens, start] that points [lens, start, size] are in, of `basins` [lens, basin, size]; -1 for none.

    sd: [lens, basin, named], in the basins. A maximum on fine pixels may be far from the same one on coarse ones, so a
    point is also in the basin in which a climb from near it ended: of the points those that `climbed` [lens, start]
    ended at `ended` [lens, start, size]; origin_sd: [lens, start, named], where they began.
    """
    named = model.split(w)[0]
    offset = model.priors.offset(named[:, :, None] - named[:, None]).double()
    begun = (offset.abs() / origin_sd[:, None]).amax(-1)  # [lens, point, climb]
    far = []
    for i in range(basins.shape[1]):
        came = climbed & (separation(model, ended, basins[:, i], sd[:, i]) < SAME_BASIN)
        by_climb = torch.where(came[:, None], begun, torch.inf).amin(-1)
        far.append(torch.minimum(separation(model, w, basins[:, i], sd[:, i]).nan_to_num(nan=torch.inf), by_climb))
    distance = torch.stack(far, -1)
    return torch.where(distance.amin(-1) < SAME_BASIN, distance.argmin(-1), -1)


def named_sd(model: LensModel, hessian: Tensor) -> Tensor:
    """Laplace's standard deviations of the named unknowns [n, named] from Hessians [n, size, size]."""
    return model.split(torch.linalg.inv(hessian).diagonal(dim1=1, dim2=2).sqrt())[0]


def separation(model: LensModel, w: Tensor, centre: Tensor, sd: Tensor) -> Tensor:
    """How far points [n, start, size] are from `centre` [n, size] in any named unknown, in units of `sd` [n, named]."""
    offset = model.priors.offset(model.split(w)[0] - model.split(centre)[0][:, None])
    return (offset.double().abs() / sd[:, None]).amax(-1)


def climb(
    model: LensModel, w: Tensor, temperature: float, steps: int, lenses: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """At most `steps` damped Gauss-Newton steps with the noise multiplied by `temperature`.

    lenses: [n], the lens of the model that each row is of; none: one row a lens.

    Every row has its own damping. A step tries three dampings, by the log posterior alone, and takes the best; where
    none raises it the damping grows and the same derivatives serve again. Rows that have converged cost nothing more.
    Folded unknowns stay at or above 0: a step leaves out those that are there and would go on.
    Returns w [n, size], the log posterior at that temperature [n], minus infinity where it is not a number, and whether
    it has converged [n].
    """
    identity = torch.eye(model.size, dtype=torch.float64, device=w.device)
    least_w = torch.full((model.size,), -FURTHEST, dtype=torch.float64, device=w.device)
    least_w[model.priors.folded] = 0.0
    w = w.clone()
    lenses = (torch.arange(len(w)) if lenses is None else lenses).to(w.device)
    value = _number(model.log_density(w, temperature, lenses))
    gradient = torch.zeros(len(w), model.size, dtype=torch.float64, device=w.device)
    hessian = identity.repeat(len(w), 1, 1)
    damping = torch.full_like(value, 1e-2)
    stale, active = torch.isfinite(value), torch.isfinite(value)
    least = CONVERGED if temperature == 1 else ON_THE_WAY
    for _ in range(steps):
        rows = (stale & active).nonzero()[:, 0]
        if len(rows):
            _, d_chi2, hessian_chi2 = model.normal_equations(w[rows], lenses[rows])
            gradient[rows] = d_chi2 / temperature**2 + w[rows].double()
            hessian[rows] = hessian_chi2 / temperature**2 + identity
        rows = active.nonzero()[:, 0]
        if not len(rows):
            break
        trials = torch.tensor(TRIALS, dtype=torch.float64, device=w.device)[:, None] * damping[rows]
        held = (w[rows] <= least_w) & (gradient[rows] > 0)
        curvature = torch.where(held[:, None] | held[..., None], identity, hessian[rows])
        diagonal = torch.diag_embed(curvature.diagonal(dim1=1, dim2=2))
        damped = curvature + trials[..., None, None] * diagonal
        moves = torch.linalg.solve(damped, torch.where(held, 0.0, gradient[rows]).expand(len(TRIALS), -1, -1))
        proposals = (w[rows] - moves).clamp(max=FURTHEST).maximum(least_w).to(w.dtype)
        tried = lenses[rows].repeat(len(TRIALS))
        reached = model.log_density(proposals.flatten(0, 1), temperature, tried)
        best, which = _number(reached.unflatten(0, (len(TRIALS), -1))).max(0)
        better = best > value[rows]
        gain = torch.where(better, best - value[rows], torch.inf)
        w[rows] = torch.where(better[:, None], proposals[which, torch.arange(len(rows), device=w.device)], w[rows])
        damping[rows] = torch.where(
            better, trials[which, torch.arange(len(rows), device=w.device)], 30 * damping[rows]
        ).clamp(*DAMPING)
        value[rows] = torch.where(better, best, value[rows])
        stale[rows] = better
        active[rows] = (gain >= least) & (damping[rows] < DAMPING[1])
    return w, value, ~active & torch.isfinite(value)


def _number(log_density: Tensor) -> Tensor:
    """Log densities that can be ranked: what is not a number would come before all that are."""
    return torch.where(log_density.isnan(), -torch.inf, log_density)
