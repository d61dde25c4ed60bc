"""Maximum a posteriori: tempered Gauss-Newton with Marquardt damping, many starts a lens, all in one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit.model import LensModel

CONVERGED = 1e-2  # gain in log posterior below which a step at temperature 1 is the last [nat]
SAME_BASIN = 5.0  # nat that two ends differ by at most, in log posterior and along the quadric between them


@dataclass(frozen=True)
class MapFit:
    """The best point of every lens and what the search saw.

    w: [lens, size]; log_density: [lens]; hessian: [lens, size, size], Gauss-Newton, of minus the log posterior at w;
    start_log_density: [lens, survivor], where the surviving starts ended; converged: [lens].
    basins_w [lens, basin, size], basins_log_density and basins_log_evidence [lens, basin]: the distinct ends of starts,
    best first, padded with NaN; the evidence is Laplace's, log density - log det(Hessian) / 2; start_basin: [lens,
    survivor], the basin each start ended in.
    """

    w: Tensor
    log_density: Tensor
    hessian: Tensor
    start_log_density: Tensor
    converged: Tensor
    basins_w: Tensor
    basins_log_density: Tensor
    basins_log_evidence: Tensor
    start_basin: Tensor


def search(model: LensModel, settings: Fit, generators: list[torch.Generator]) -> MapFit:
    """Search from `settings.starts` points drawn from the prior of the named parameters, with the mean source.

    Every start climbs down the ladder of temperatures, but starts join it at different rungs: from a high temperature
    all of them would follow the same path. Temperatures above 1 see pixels twice as wide. Before the last rung,
    temperature 1 and all pixels, only the best `settings.survivors` starts of a lens are kept.

    generators: one a lens, so that a lens's starts do not depend on its neighbours in the batch.
    """
    lenses, starts = len(model.batch), settings.starts
    ladder = settings.temperatures[:-1]
    w = torch.stack([start_points(model, starts, generator) for generator in generators])
    value = torch.zeros(lenses, starts, dtype=torch.float64)
    coarse = model.coarse()
    for rung, temperature in enumerate(ladder):
        joined = torch.arange(starts) % len(ladder) <= rung
        wide = coarse.take(torch.arange(lenses).repeat_interleave(int(joined.sum())))
        climbed, reached, _ = climb(wide, w[:, joined].flatten(0, 1), temperature, settings.steps_per_temperature)
        w[:, joined], value[:, joined] = climbed.unflatten(0, (lenses, -1)), reached.unflatten(0, (lenses, -1))
    survivors = min(settings.survivors, starts)
    kept = value.topk(survivors).indices
    w = w.gather(1, kept[..., None].expand(-1, -1, model.size))
    wide = model.take(torch.arange(lenses).repeat_interleave(survivors))
    climbed, reached, _ = climb(wide, w.flatten(0, 1), 1.0, settings.steps_per_temperature)
    reached = reached.unflatten(0, (lenses, survivors))
    ends = climbed.unflatten(0, (lenses, survivors))
    hessians = wide.hessian(climbed).unflatten(0, (lenses, survivors))
    basins = [torch.stack(part) for part in zip(*map(_basins, ends, reached, hessians), strict=True)]
    best = ends[torch.arange(lenses), reached.argmax(1)]
    best, log_density, gain = climb(model, best, 1.0, settings.final_steps)
    return MapFit(best, log_density, model.hessian(best), reached, gain < CONVERGED, *basins)


def _basins(w: Tensor, log_density: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one lens: w, log density and log evidence of the basins [n, ...], and the basin of each start [n]."""
    belongs = torch.full((len(w),), -1)
    firsts: list[int] = []
    for end in log_density.argsort(descending=True).tolist():
        for basin, first in enumerate(firsts):
            step = (w[end] - w[first]).double()
            apart = 0.5 * step @ hessian[first] @ step
            if max(apart, log_density[first] - log_density[end]) < SAME_BASIN:
                belongs[end] = basin
                break
        else:
            belongs[end] = len(firsts)
            firsts.append(end)
    missing = len(w) - len(firsts)
    evidence = log_density[firsts] - 0.5 * torch.linalg.slogdet(hessian[firsts])[1]
    columns = (w[firsts], log_density[firsts], evidence)
    w, log_density, evidence = (torch.cat([c, c.new_full((missing, *c.shape[1:]), torch.nan)]) for c in columns)
    return w, log_density, evidence, belongs


def start_points(model: LensModel, starts: int, generator: torch.Generator) -> Tensor:
    """[start, size]: named parameters from the prior, the first at its median; latents at zero."""
    w = torch.zeros(starts, model.size, dtype=model.data.dtype)
    named = len(model.priors.free)
    w[1:, :named] = torch.randn(starts - 1, named, generator=generator)
    return w


def climb(model: LensModel, w: Tensor, temperature: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most `steps` damped Gauss-Newton steps with the noise multiplied by `temperature`.

    Every lens has its own damping: a step that does not raise its log posterior is undone and the damping grows
    fourfold, otherwise it shrinks threefold; one that has converged stays where it is. Returns w [lens, size], log
    posterior [lens] and the gain of the last step accepted [lens].
    """
    identity = torch.eye(model.size, dtype=torch.float64)
    w = w.clone()
    damping = torch.full((len(w),), 1e-2, dtype=torch.float64)
    value = torch.full((len(w),), -torch.inf, dtype=torch.float64)
    gain = torch.full((len(w),), torch.inf, dtype=torch.float64)
    gradient = torch.zeros(len(w), model.size, dtype=torch.float64)
    hessian = identity.expand(len(w), -1, -1).clone()
    proposal = w.clone()
    for _ in range(steps + 1):
        chi2, d_chi2, hessian_chi2 = model.normal_equations(proposal)
        proposed = -0.5 * (chi2 / temperature**2 + proposal.double().square().sum(-1))
        better = (proposed > value) & (gain >= CONVERGED)
        gain = torch.where(better, proposed - value, gain)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-6, 1e8)
        row = better[:, None]
        w, value = torch.where(row, proposal, w), torch.where(better, proposed, value)
        gradient = torch.where(row, d_chi2 / temperature**2 + proposal.double(), gradient)
        hessian = torch.where(row[..., None], hessian_chi2 / temperature**2 + identity, hessian)
        if bool((gain < CONVERGED).all()):
            break
        damped = hessian + damping[:, None, None] * torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
        step = torch.linalg.solve(damped, gradient)
        proposal = (w.double() - step).to(w.dtype).clamp(-8, 8)
    return w, value, gain
