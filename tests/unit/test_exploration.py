"""Explorations: what becomes of the solutions of a search where chains find others."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit import exploration, map_search
from lenspipe.fit.map_search import MapFit
from lenspipe.fit.model import LensModel
from tests.lenses import small_lenses

TWO: Any = SimpleNamespace(  # a model with one named unknown and one other
    split=lambda w: (w[..., :1], w[..., 1:]),
    priors=SimpleNamespace(folded=[], offset=lambda offset: offset),
    normal_equations=lambda w, _: (0.0, torch.zeros_like(w), torch.zeros(len(w), 2, 2).double()),
)


def at(*places: float) -> Tensor:
    """Points [1, n, 2] of one lens with these values of the named unknown."""
    return torch.tensor([[[place, 0.0] for place in places]], dtype=torch.float64)


def searched(first: float, second: float | None, starts: list[int]) -> MapFit:
    """What a search of one lens found: two basins, of log posterior 0 and -50; sd of the named unknown 1."""
    found = MapFit.of_one_start(TWO, at(first)[:, 0], torch.zeros(1).double(), torch.ones(1, dtype=torch.bool))
    start = torch.tensor([starts])
    found = replace(found, start_basin=start, start_count=torch.ones_like(start), start_log_density=start.double())
    if second is None:
        return found
    evidence = torch.tensor([[0.0, -50.0]], dtype=torch.float64)
    return replace(found, basins_w=at(first, second), basins_log_density=evidence, basins_log_evidence=evidence)


def ended(*ends: tuple[float, float], origin: int = 0) -> tuple[Tensor, ...]:
    """Climbs that ended at places with log posteriors, all from one solution; sd of the named unknown 1."""
    places, values = zip(*ends, strict=True)
    hessian = torch.eye(2, dtype=torch.float64).expand(1, len(ends), -1, -1)
    value = torch.tensor([values], dtype=torch.float64)
    done, origins = torch.tensor([[False] * len(ends)]), torch.full((1, len(ends)), origin)
    return at(*places), value, value, hessian, done, origins


@pytest.mark.parametrize(
    ("ends", "first", "second", "starts"),
    [
        ([(0.5, -1.0), (1.0, -2.0)], (0.0, 0.0), (20.0, -50.0), [0, 1, -1]),  # none is better: all as it was
        ([(0.5, 9.0), (1.0, -2.0)], (0.5, 9.0), (20.0, -50.0), [0, 1, -1]),  # a better one in the same basin
        ([(9.0, 9.0), (8.0, -2.0)], (9.0, 9.0), (0.0, 0.0), [0, -1, -1]),  # elsewhere: the old one is its rival
        ([(19.0, 9.0), (40.0, 8.0)], (19.0, 9.0), (40.0, 8.0), [0, 0, -1]),  # and where the second was, a new rival
    ],
)
def test_solutions_are_compared_by_their_evidence(
    ends: list[tuple[float, float]], first: tuple[float, float], second: tuple[float, float], starts: list[int]
) -> None:
    """The hessians are alike, so evidence is the log posterior; a basin is five standard deviations wide."""
    found = searched(0.0, 20.0, [0, 1, -1])
    better = exploration.compared(TWO, found, *ended(*ends))
    assert better.w[0, 0] == better.basins_w[0, 0, 0] == first[0]
    assert better.log_density[0] == better.basins_log_density[0, 0] == better.basins_log_evidence[0, 0] == first[1]
    assert (better.basins_w[0, 1, 0], better.basins_log_evidence[0, 1]) == second
    assert better.start_basin[0].tolist() == starts
    assert bool(better.converged[0]) == (first[0] == 0.0)


def test_the_runner_up_may_become_the_best() -> None:
    """By chains that began there: the start that had found it has found the best, that of the old best its rival."""
    better = exploration.compared(TWO, searched(0.0, 20.0, [0, 1, -1]), *ended((23.0, 9.0), (40.0, -9.0), origin=1))
    assert better.basins_w[0, :, 0].tolist() == [23.0, 0.0]
    assert better.basins_log_evidence[0].tolist() == [9.0, 0.0]
    assert better.start_basin[0].tolist() == [1, 0, -1]


def test_a_second_solution_stays_second() -> None:
    """Though it has more evidence: the first is the highest point of the basin that has the most."""
    found = replace(searched(0.0, 20.0, [0, 1]), basins_log_evidence=torch.tensor([[0.0, 3.0]], dtype=torch.float64))
    better = exploration.compared(TWO, found, *ended((0.5, -1.0), (1.0, -2.0)))
    for field in fields(MapFit):
        torch.testing.assert_close(getattr(better, field.name), getattr(found, field.name))


def test_a_lone_basin_has_no_rival() -> None:
    better = exploration.compared(TWO, searched(0.0, None, [0, 0, -1]), *ended((2.0, 3.0), (1.0, -2.0)))
    assert better.w[0, 0] == 2.0
    assert bool(better.basins_w[0, 1].isnan().all())
    assert bool(better.basins_log_evidence[0, 1].isnan())
    assert better.start_basin[0].tolist() == [0, 0, -1]


SETTINGS = Fit(chains=2, explorations=2, path_length=1.5)


@pytest.fixture(scope="module")
def stopped() -> tuple[LensModel, MapFit]:
    """Three small lenses, the first at its maximum; the search of the others was stopped on its way."""
    (model, truth), generator = small_lenses(), torch.Generator().manual_seed(6)
    w, value, converged = map_search.climb(model, truth, 1.0, 40)
    off = torch.tensor([0.0, 0.5, 0.5])[:, None] * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    value = torch.where(off[:, 0] == 0, value, model.log_density(w + off))
    return model, MapFit.of_one_start(model, w + off, value, converged & (off[:, 0] == 0))


def generators(*lenses: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(lens) for lens in lenses]


def test_chains_lead_out_of_where_a_search_stopped(stopped: tuple[LensModel, MapFit]) -> None:
    """To the maximum, where climbs from the ends of chains all end; the lens that was there stays there."""
    model, found = stopped
    better = exploration.explored(model, found, SETTINGS, generators(0, 1, 2))
    gain = better.basins_log_evidence[:, 0] - found.basins_log_evidence[:, 0]
    assert float(gain[0].abs()) < 0.1
    assert float(gain[1:].min()) > exploration.GAIN
    assert bool(better.converged.all())
    torch.testing.assert_close(better.log_density, model.log_density(better.w))
    torch.testing.assert_close(better.hessian, model.hessian(better.w))
    torch.testing.assert_close(better.w[0], found.w[0], rtol=0, atol=0.02)
    assert (better.start_basin[0] == 0).all()


def test_chains_begin_at_both_solutions(stopped: tuple[LensModel, MapFit], monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner-up is explored where it has not far less evidence; here chains stay where they begin."""
    model, found = stopped
    rival = found.w + 0.2
    evidence = found.basins_log_evidence[:, :1] - torch.tensor([[1.0], [exploration.RIVAL + 1], [torch.nan]])
    both = torch.cat([found.basins_log_evidence[:, :1], evidence], 1)
    found = replace(found, basins_w=torch.stack([found.w, rival], 1), basins_log_evidence=both)
    monkeypatch.setattr(exploration, "annealed", lambda _, w, settings, __: w[:, None].repeat(1, settings.chains, 1))
    monkeypatch.setattr(exploration, "climb", lambda model, w, *_: (w, w[:, 0], torch.ones(len(w), dtype=torch.bool)))
    w, _, evidence, hessian, done, origin = exploration.ends(model, found, SETTINGS, generators(0, 1, 2))
    torch.testing.assert_close(w[:, :2], found.w[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(w[0, 2:], rival[:1].expand(2, -1))
    assert origin.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert evidence.isfinite().tolist() == done.tolist() == [[True] * 4] + [[True, True, False, False]] * 2
    torch.testing.assert_close(hessian[0, 3], model.hessian(w[:, 3])[0])


def test_the_chosen_solution_climbs_to_the_end(stopped: tuple[LensModel, MapFit]) -> None:
    """Though climbs from the ends of chains have too few steps, and its evidence is that of where it ends."""
    model, found = stopped
    few = SETTINGS.model_copy(update={"final_steps": 1, "explorations": 1})
    better = exploration.explored(model, found, few, generators(0, 1, 2))
    assert bool(better.converged.all())
    torch.testing.assert_close(better.w, better.basins_w[:, 0])
    torch.testing.assert_close(better.log_density, model.log_density(better.w))
    torch.testing.assert_close(better.hessian, model.hessian(better.w))
    evidence = better.log_density - 0.5 * torch.logdet(better.hessian)
    torch.testing.assert_close(better.basins_log_evidence[:, 0], evidence)
    full = exploration.explored(model, found, SETTINGS, generators(0, 1, 2))
    torch.testing.assert_close(better.log_density, full.log_density, rtol=0, atol=0.1)


def test_an_exploration_does_not_depend_on_the_batch(
    stopped: tuple[LensModel, MapFit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lens alone, and beside one that is done after fewer explorations; so short that rounding does not grow."""
    monkeypatch.setattr(exploration, "LENGTH", 5)
    model, found = stopped
    together = exploration.explored(model, found, SETTINGS, generators(0, 1, 2))
    row = torch.tensor([1])
    alone = exploration.explored(model.take(row), exploration.chosen(found, row), SETTINGS, generators(1))
    for field in fields(MapFit):
        one, beside = getattr(alone, field.name), getattr(together, field.name)[row]
        torch.testing.assert_close(one, beside, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_no_exploration_changes_nothing(stopped: tuple[LensModel, MapFit]) -> None:
    model, found = stopped
    assert exploration.explored(model, found, Fit(), generators(0, 1, 2)) is found
