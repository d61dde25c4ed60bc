"""Better solutions than the search's, by annealing: hot, then cooler chains from the best ones, climbs from their ends.

The posterior of a detailed source has many local maxima. A climb ends in the nearest one, while chains leave a poor
one; from their ends climbs reach others, with far more evidence. From a search's runner-up they may reach the best.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit.evidence import laplace
from lenspipe.fit.hmc import Run, mean_over_chains
from lenspipe.fit.map_search import SAME_BASIN, MapFit, climb, named_sd, pairs, separation
from lenspipe.fit.model import LensModel

TEMPERATURES = (4.0, 2.0)  # factors on the noise at which chains move
LENGTH = 30  # draws of a chain at each
QUENCHED = 1.5, 8  # factor on the noise of the first climb from their ends, and its steps
LAST_STEPS = 200  # greatest number of steps with which the solution that is chosen in the end climbs on
RIVAL = 150.0  # how much less evidence a solution may have that is explored too: as much may be gained [nat]
GAIN = 5.0  # in log evidence below which an exploration of a lens is its last [nat]


@torch.no_grad()
def explored(model: LensModel, found: MapFit, settings: Fit, generators: list[torch.Generator]) -> MapFit:
    """The solutions after at most `settings.explorations` explorations of each lens; generators: one a lens."""
    rows = torch.arange(len(found.w), device=found.w.device)
    for _ in range(settings.explorations):
        if not len(rows):
            break
        part, before = model.take(rows), chosen(found, rows)
        better = compared(part, before, *ends(part, before, settings, [generators[row] for row in rows.tolist()]))
        found = replaced(found, rows, better)
        rows = rows[better.basins_log_evidence[:, 0] - before.basins_log_evidence[:, 0] > GAIN]
    return climbed_on(model, found) if settings.explorations else found


def ends(model: LensModel, found: MapFit, settings: Fit, generators: list[torch.Generator]) -> tuple[Tensor, ...]:
    """Ends of climbs from those of short chains from the solutions: of each lens, those from the first one first.

    w [lens, end, size], log posterior, evidence, Hessian, converged, and the solution they come from [lens, end]. Where
    chains begin at one solution alone, evidence is minus infinity at the other's.
    """
    known = found.basins_log_evidence
    lens, origin = (known > known[:, :1] - RIVAL).nonzero(as_tuple=True)
    chains = annealed(model.take(lens), found.basins_w[lens, origin], settings, [generators[i] for i in lens.tolist()])
    own, w = lens.repeat_interleave(settings.chains), chains.flatten(0, 1)
    w, _, _ = climb(model, w, *QUENCHED, own)
    w, value, done = climb(model, w, 1.0, settings.final_steps, own)
    hessian, evidence = laplace(model, w, value, own)

    def of_lens(field: Tensor, missing: float) -> Tensor:
        whole = field.new_full((*known.shape, settings.chains, *field.shape[1:]), missing)
        whole[lens, origin] = field.unflatten(0, (-1, settings.chains))
        return whole.flatten(1, 2)

    origins = origin.repeat_interleave(settings.chains)
    fields = (w, torch.nan), (value, -torch.inf), (evidence, -torch.inf), (hessian, 0.0), (done, False), (origins, 0)
    return tuple(of_lens(*field) for field in fields)


def annealed(model: LensModel, w: Tensor, settings: Fit, generators: list[torch.Generator]) -> Tensor:
    """Where chains from w [lens, size] are, [lens, chain, size], after some draws at each of falling temperatures.

    The metric is the mean over the chains where a temperature begins.
    """
    straight, center = model.straight(), model.to_straight(w)
    chains = straight.take(torch.arange(len(w), device=w.device).repeat_interleave(settings.chains))
    places, begin = center[:, None].repeat(1, settings.chains, 1), None
    for temperature in TEMPERATURES:
        run = Run(
            partial(chains.value_and_gradient, temperature=temperature),
            center,
            mean_over_chains(partial(chains.hessian, temperature=temperature), places),
            settings,
            generators,
            warmup=LENGTH,
            draws=0,
            begin=begin,
            walls=straight.priors.walls,
        )
        while not run.finished:
            run.advance()
        places = begin = run.w
    return model.from_straight(places.flatten(0, 1))[0].unflatten(0, places.shape[:2])


def compared(
    model: LensModel,
    found: MapFit,
    w: Tensor,
    value: Tensor,
    evidence: Tensor,
    hessian: Tensor,
    done: Tensor,
    origin: Tensor,
) -> MapFit:
    """What was found with new solutions [lens, end, ...]: first the best of these where it has more evidence.

    The second is that with the most evidence elsewhere, new or old. origin: the solution whose chains led to each.

    A start that found the origin of the new first solution has led to it; another is in no basin where its own is no
    longer among the two.
    """
    lenses, old = torch.arange(len(w), device=w.device), found.basins_w.shape[1]
    ended = torch.cat([found.basins_w, w], 1)
    reached = torch.cat([found.basins_log_density, value], 1)
    evidence = torch.cat([found.basins_log_evidence, evidence], 1).nan_to_num(nan=-torch.inf)
    at = evidence[:, old:].argmax(1)
    new = evidence[lenses, old + at] > evidence[:, 0]
    first = torch.where(new, old + at, 0)
    hessian = torch.where(new[:, None, None], hessian[lenses, at], found.hessian)
    distance = separation(model, ended, ended[lenses, first], named_sd(model, hessian))
    there = (distance < SAME_BASIN).scatter(1, first[:, None], True)
    rivals = torch.where(there, -torch.inf, evidence)
    second = rivals.argmax(1)
    alone = rivals.amax(1) == -torch.inf
    basins = pairs(first, second, alone, ended, reached, evidence)
    now = torch.full_like(ended[..., 0], -1, dtype=torch.long)  # [lens, solution], the basin each is in now
    now[lenses[~alone], second[~alone]] = 1
    now[there] = 0
    now[lenses, torch.where(new, origin[lenses, at], 0)] = 0  # from there the chains began
    start_basin = torch.where(found.start_basin < 0, -1, now.gather(1, found.start_basin.clamp(min=0)))
    return replace(
        found,
        w=ended[lenses, first],
        log_density=reached[lenses, first],
        hessian=hessian,
        converged=torch.where(new, done[lenses, at], found.converged),
        basins_w=basins[0],
        basins_log_density=basins[1],
        basins_log_evidence=basins[2],
        start_basin=start_basin,
    )


def climbed_on(model: LensModel, found: MapFit) -> MapFit:
    """What was found, with climbs that had not converged in the steps allowed for all gone on with for the best one."""
    rows = (~found.converged).nonzero()[:, 0]
    if not len(rows):
        return found
    before = chosen(found, rows)
    w, value, done = climb(model.take(rows), before.w, 1.0, LAST_STEPS)
    hessian, evidence = laplace(model, w, value, rows)
    first = torch.arange(2, device=w.device) == 0
    after = replace(
        before,
        w=w,
        log_density=value,
        hessian=hessian,
        converged=done,
        basins_w=torch.where(first[:, None], w[:, None], before.basins_w),
        basins_log_density=torch.where(first, value[:, None], before.basins_log_density),
        basins_log_evidence=torch.where(first, evidence[:, None], before.basins_log_evidence),
    )
    return replaced(found, rows, after)


def chosen(found: MapFit, rows: Tensor) -> MapFit:
    """What was found of the lenses at `rows`."""
    return MapFit(**{name: tensor[rows] for name, tensor in vars(found).items()})


def replaced(found: MapFit, rows: Tensor, by: MapFit) -> MapFit:
    """What was found, that of the lenses at `rows` replaced."""
    return MapFit(**{name: tensor.index_copy(0, rows, getattr(by, name)) for name, tensor in vars(found).items()})
