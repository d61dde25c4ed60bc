"""The posterior of a batch: rounds of chains, more of them only for the lenses that need more; saved on the way.

After a round, a lens whose R-hat or effective sample size misses its gate takes part in the next, with as many draws
again. They come beside those it has or, where R-hat still misses its gate and is less without those, in place of them.
What a lens keeps is thinned to the same number of draws for all, and the gates look at those. A chain that ended in
a solution of far less evidence than those of two others goes on from theirs.

Chains move in the unknowns of `LensModel.straight` and, where the source is learned, of `Following`; what `sample` is
given and returns is in the model's own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.errors import InputError
from lenspipe.fit.following import Following
from lenspipe.fit.hmc import PLACES, Draws, Run, bfmi_of
from lenspipe.fit.map_search import MapFit, as_tensors
from lenspipe.fit.model import LensModel
from lenspipe.posteriors.convergence import convergence
from lenspipe.source.learned import LearnedSource
from lenspipe.tensors import read_tensors, write_tensors

log = logging.getLogger("lenspipe")

CHECKPOINT_SECONDS = 60.0  # least time between checkpoints
PER_DRAW = [field.name for field in fields(Draws) if field.name not in ("step_size", "bfmi")]
LOST = 15.0  # how much less evidence a chain's solution has that counts for nothing [nat]; estimates scatter by 5 to 10
LATER_WARMUP = 4  # a later round, whose step size is nearly right, warms up for this fraction of the first's


@dataclass
class Checkpoint:
    """A file in which a batch leaves its tensors, and the key of the batch that may go on from them.

    searched: seconds that the search took; spent: those that earlier processes spent on the batch.
    """

    path: Path
    key: dict[str, Any]
    searched: float = 0.0
    spent: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """What the batch has taken, in this process and in those before."""
        return self.spent + time.perf_counter() - self.began

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write the tensors, whole, and the seconds."""
        seconds = torch.tensor([self.searched, self.seconds], dtype=torch.float64)
        whole = {name: tensor.cpu().clone() for name, tensor in tensors.items()} | {"seconds": seconds}
        write_tensors(self.path, whole, {"key": self.key})

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Count the seconds from where the process stopped that left these tensors."""
        self.searched, self.spent = tensors["seconds"].tolist()

    def load(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors, on a device; none where the file is absent, broken or of another key."""

        def build(tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Tensor]:
            return tensors if record["key"] == self.key else {}

        try:
            tensors = read_tensors(self.path, "a checkpoint", "fit", build)
        except InputError:
            return {}
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def sample(
    model: LensModel,
    found: MapFit,
    settings: Fit,
    generators: list[torch.Generator],
    monitored: list[int],
    checkpoint: Checkpoint | None = None,
    draws_factor: int = 1,
) -> Draws:
    """Draws of all lenses, `settings.draws` a chain, from at most `settings.rounds` rounds for each of them.

    monitored: columns of w that the gates look at; generators: one a lens; draws_factor: how many times as many draws
    a round makes. With a checkpoint, what an earlier process left is gone on from: its draws are those of a process
    that was never stopped.
    """
    saved = checkpoint.load(found.w.device) if checkpoint else {}
    kept = unpacked(saved)
    straight, start = straightened(model, found)
    for number in range(int(saved.get("round", torch.tensor(0))), settings.rounds):
        lenses = range(len(generators))
        rows = [row for row in lenses if row not in kept or not passes(kept[row], settings, monitored)]
        if not rows:
            break
        before = [kept[row] for row in rows if row in kept]
        longer = settings.model_copy(update={"draws": settings.draws * draws_factor})
        run = begun(straight, start, longer, [generators[row] for row in rows], rows, before, number)
        if state := {name.removeprefix("run."): t for name, t in saved.items() if name.startswith("run.")}:
            run.restore(state)
        log.info("round %d of chains, for %d of %d lenses", number + 1, len(rows), len(generators))
        saved, last = {}, time.monotonic()
        while not run.finished:
            run.advance()
            if checkpoint and time.monotonic() - last > CHECKPOINT_SECONDS:
                state = {f"run.{name}": tensor for name, tensor in run.state().items()}
                checkpoint.save(packed(kept) | as_tensors(found) | state | {"round": torch.tensor(number)})
                log.info("round %d: %d of %d draws", number + 1, run.iteration, run.warmup + run.draws)
                last = time.monotonic()
        draws = run.result()
        for place, row in enumerate(rows):
            kept[row] = joined(kept.get(row), of_lens(draws, place), settings, monitored)
            r_hat, ess = gauges(kept[row], settings, monitored)
            log.info("%s: R-hat %.3f, effective sample size %.0f", model.batch.names[row], r_hat, ess)
    draws = together([thinned(kept[row], settings.draws) for row in range(len(generators))])
    return bent(model, straight, draws)


@torch.no_grad()
def straightened(model: LensModel, found: MapFit) -> tuple[LensModel | Following, MapFit]:
    """The model, and what the search found, in the unknowns in which chains move."""
    straight, w, hessian = model.straight(), model.to_straight(found.w), found.hessian
    if straight is not model:
        hessian = straight.hessian(w)
    if not isinstance(straight.source, LearnedSource):
        return straight, replace(found, w=w, hessian=hessian)
    following = Following.at(straight, w, hessian)
    x = following.to_following(w)
    return following, replace(found, w=x, hessian=following.changed(x, hessian))


@torch.no_grad()
def bent(model: LensModel, straight: LensModel | Following, draws: Draws) -> Draws:
    """Draws made in those unknowns, in the model's own."""
    lenses, chains = draws.w.shape[:2]
    rows = torch.arange(lenses, device=draws.w.device).repeat_interleave(chains)
    own = []
    for w in draws.w.flatten(0, 1).unbind(1):  # all draws at once would be as many images
        own.append(model.from_straight(straight.from_following(w, rows) if isinstance(straight, Following) else w))
    w, log_volume = (torch.stack(field, 1).unflatten(0, (lenses, chains)) for field in zip(*own, strict=True))
    return replace(draws, w=w, log_density=draws.log_density - log_volume)


def begun(
    model: LensModel | Following,
    found: MapFit,
    settings: Fit,
    generators: list[torch.Generator],
    rows: list[int],
    before: list[Draws],
    number: int,
) -> Run:
    """Round `number` of the lenses `rows`: from the MAP at first, later from where their chains were `before`."""
    lenses = torch.tensor(rows)
    chains = model.take(lenses.repeat_interleave(settings.chains))
    target, center, walls = chains.value_and_gradient, found.w[lenses], model.priors.walls
    if number == 0:
        return Run(target, center, found.hessian[lenses], settings, generators, chains.hessian, walls=walls)
    some = [thinned(draws, PLACES) for draws in before]
    places = torch.cat([draws.w for draws in some])  # [lens, chain, place, size]
    curved = torch.stack([chains.hessian(w.flatten(0, 1)) for w in places.unbind(2)]).mean(0)
    value = torch.cat([draws.log_density for draws in some]).mean(2)
    places, curved, lost = rejoined(places, curved.unflatten(0, places.shape[:2]), value)
    for row, moved in zip(rows, lost.sum(1).tolist(), strict=True):
        if moved:
            name = model.batch.names[row]
            log.info(
                "%s: %d of %d chains were where there is less evidence, and begin anew", name, moved, value.shape[1]
            )
    return Run(
        target,
        center,
        curved.mean(1),
        settings,
        generators,
        warmup=settings.warmup // LATER_WARMUP,
        draws=settings.draws * 2 ** (number - 1),
        begin=places[:, :, -1],
        step=torch.cat([draws.step_size for draws in before]),
        seen=places.transpose(1, 2),
        walls=walls,
    )


def rejoined(places: Tensor, curved: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where chains go on: those in a solution of far less evidence than two others have, at places of the others.

    places: where they were, [lens, chain, place, size]; curved, value: the mean Hessian [lens, chain, size, size] and
    log density [lens, chain] there. The evidence of the solution that a chain is in is, but for a constant, its mean
    log density less half of the logarithm of the determinant of its Hessian. No chain finds its way from one to the
    other, so that what it draws would count for as much as what the others do. One chain that has more than all others
    may have it by chance. Returns places and Hessians, and which chains were lost [lens, chain].
    """
    evidence = value - 0.5 * torch.logdet(curved)
    second = evidence.topk(min(2, evidence.shape[1]), 1).values[:, -1:]
    lost = evidence < second - LOST
    places, curved = places.clone(), curved.clone()
    for row in lost.any(1).nonzero()[:, 0].tolist():
        good, bad = ((lost[row] == which).nonzero()[:, 0].tolist() for which in (False, True))
        for number, chain in enumerate(bad):
            other, later = good[number % len(good)], (number + 1) * places.shape[2] // (len(bad) + 1)
            places[row, chain], curved[row, chain] = places[row, other].roll(later, 0), curved[row, other]
    return places, curved, lost


def gauges(draws: Draws, settings: Fit, monitored: list[int]) -> tuple[float, float]:
    """Worst R-hat and least effective sample size, bulk or tail, of the draws of one lens as they would be stored."""
    if not monitored:
        return 1.0, math.inf
    w = thinned(draws, settings.draws).w.cpu().numpy()
    r_hat, bulk, tail = convergence([w[..., column] for column in monitored])
    return math.inf if math.isnan(r_hat[0]) else float(r_hat[0]), float(min(bulk[0], tail[0]))


def passes(draws: Draws, settings: Fit, monitored: list[int]) -> bool:
    """Whether the draws of one lens pass the gates of R-hat and of the sample size."""
    r_hat, ess = gauges(draws, settings, monitored)
    return r_hat <= settings.r_hat_max and ess >= settings.ess_min


def joined(old: Draws | None, new: Draws, settings: Fit, monitored: list[int]) -> Draws:
    """The new draws of a lens after its old ones, or alone where R-hat misses its gate and is less without those."""
    if old is None:
        return new
    both = replace(new, **{name: torch.cat([getattr(old, name), getattr(new, name)], 2) for name in PER_DRAW})
    both = replace(both, bfmi=bfmi_of(both.energy))
    together, apart = (gauges(draws, settings, monitored)[0] for draws in (both, new))
    return new if together > settings.r_hat_max and apart < together else both


def each(draws: Draws, change: Callable[[Tensor], Tensor]) -> Draws:
    """Every quantity of a draw [lens, chain, draw, ...] changed in the same way."""
    return replace(draws, **{name: change(getattr(draws, name)) for name in PER_DRAW})


def thinned(draws: Draws, number: int) -> Draws:
    """`number` draws a chain, spread evenly over those there are."""
    chosen = torch.linspace(0, draws.w.shape[2] - 1, min(number, draws.w.shape[2])).round().long()
    return each(draws, lambda tensor: tensor[:, :, chosen])


def of_lens(draws: Draws, place: int) -> Draws:
    """The draws of one of several lenses."""
    return Draws(**{field.name: getattr(draws, field.name)[place : place + 1] for field in fields(Draws)})


def together(lenses: list[Draws]) -> Draws:
    """Draws of several lenses that have the same number."""
    return Draws(**{field.name: torch.cat([getattr(lens, field.name) for lens in lenses]) for field in fields(Draws)})


def packed(kept: dict[int, Draws]) -> dict[str, Tensor]:
    """The draws of each lens as named tensors."""
    return {f"kept.{row}.{field.name}": getattr(d, field.name) for row, d in kept.items() for field in fields(Draws)}


def unpacked(tensors: dict[str, Tensor]) -> dict[int, Draws]:
    """The draws of each lens in what `packed` made, other tensors passed over."""
    rows = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("kept.")})
    return {row: Draws(**{f.name: tensors[f"kept.{row}.{f.name}"] for f in fields(Draws)}) for row in rows}
