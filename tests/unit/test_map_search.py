"""The search for the maximum: starts, basins, climbs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lenspipe.config import Config, Fit
from lenspipe.fit import map_search
from lenspipe.fit.model import LensModel
from lenspipe.image.light import Light
from lenspipe.image.simulator import Optics
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from tests.lenses import TABLE


def test_search_reaches_the_truth(model: tuple[LensModel, Tensor]) -> None:
    lens_model, truth = model
    settings = Fit(starts=6, survivors=2, scout_pixels=12, temperatures=(30.0, 10.0, 3.0), steps_per_temperature=6)
    found = map_search.search(lens_model, settings, [torch.Generator().manual_seed(i) for i in range(3)])
    assert bool((found.log_density > lens_model.log_density(truth) - 1).all())
    assert bool((torch.linalg.eigvalsh(found.hessian) > 0.99).all())
    assert found.starts.tolist() == [6, 6, 6]


def test_dropped_starts_count_with_the_one_they_are_like(model: tuple[LensModel, Tensor]) -> None:
    """A copy of a copy counts with the first; one that is like none, or not alive, with none."""
    lens_model, _ = model
    offsets = torch.tensor([0.08, 5.0, 0.0, 9.0, 0.16, 0.0])  # the fifth is like the first, the first like the third
    w = offsets[None, :, None].expand(3, -1, lens_model.size).double()
    value = torch.tensor([[2.0, 4.0, 3.0, 0.5, 1.0, 9.0]]).expand(3, -1).double()
    alive = torch.tensor([[True] * 5 + [False]]).expand(3, -1)
    ones = torch.ones(3, 6, dtype=torch.long)
    left, count = map_search.dropped(lens_model, w, value, alive, torch.tensor([[1, 2]]).expand(3, -1), ones)
    assert left.tolist() == [[False, True, True, False, False, False]] * 3
    assert count[:, [1, 2, 3, 5]].tolist() == [[1, 3, 1, 1]] * 3


def test_points_that_come_to_the_same_place_go_on_as_one(model: tuple[LensModel, Tensor]) -> None:
    """The best of those that are alike and as likely stands for them; all end where they would have ended alone."""
    lens_model, truth = model
    offsets = torch.tensor([0.05, 3.0, 0.0, 0.05, 0.13])  # the last is like the first, the first like the third
    w = offsets[None, :, None].expand(3, -1, lens_model.size).double()
    value = torch.tensor([[9.5, 8.0, 10.0, 4.0, 9.0]]).expand(3, -1).double()
    assert map_search.merged(lens_model, w, value).tolist() == [[2, 1, 2, 3, 2]] * 3
    begun = torch.stack([truth + 1e-3, truth, truth + 0.5], 1)
    ended, reached = map_search.settle(lens_model, begun, Fit(steps_per_temperature=20))
    torch.testing.assert_close(ended[:, 0], ended[:, 1], rtol=0, atol=0)
    alone = map_search.settle(lens_model, begun[:, 2:], Fit(steps_per_temperature=20))[1]
    assert bool((reached[:, 2:] >= alone - 0.1).all())


def test_a_start_agrees_where_its_coarse_maximum_is_elsewhere(model: tuple[LensModel, Tensor]) -> None:
    """Two starts end at one maximum of the coarse pixels, and so in one basin, however far that is from its own end."""
    lens_model, truth = model
    settled = lens_model.coarse()
    brighter = replace(settled.batch, image=1.2 * settled.batch.image)
    biased = LensModel(brighter, settled.priors, settled.source, settled.optics)
    ended, value, _ = map_search.climb(biased, truth, 1.0, 20)
    w = torch.stack([ended, ended], 1)
    found = map_search.finish(lens_model, biased, w, torch.stack([value, value - 1e-3], 1), Fit())
    assert found.start_basin.tolist() == [[0, 0]] * 3


def test_all_that_coarse_pixels_leave_open_climb_on_the_fine_ones(model: tuple[LensModel, Tensor]) -> None:
    """What was third there may be first in the end; a point at the place of a better one, or far behind, is left."""
    lens_model, truth = model
    ended, reached, _ = map_search.climb(lens_model, truth, 1.0, 20)
    w = torch.stack([truth + 1.5, truth - 1.5, ended, ended, truth + 3], 1)
    behind = torch.tensor([0.0, 10.0, 20.0, 30.0, 60.0], dtype=torch.float64)
    value = reached[:, None] - behind
    chosen, spread = map_search.apart(lens_model, w, value, 50)
    assert chosen.tolist() == [[True, True, True, False, False]] * 3
    assert torch.isfinite(spread).all(-1).tolist() == chosen.tolist()
    found = map_search.finish(lens_model, lens_model, w, value, Fit(final_steps=1))
    torch.testing.assert_close(found.log_density, reached, rtol=0, atol=0.1)
    assert found.start_basin[:, 2:4].tolist() == [[0, 0]] * 3
    assert bool((found.basins_log_density[:, 1] < reached - 50).all())


def test_a_lens_turned_by_half_a_turn_is_the_same_solution(model: tuple[LensModel, Tensor]) -> None:
    """Where the prior of phi reaches further than half a turn, a start may end at either of two names of one lens."""
    given = {name: prior for name, prior in model[0].priors.priors.items() if name not in ("e1", "e2")}
    given |= {"q": parse_prior("TruncatedNormal(0.7, 0.2, 0.1, 1)"), "phi": parse_prior("Normal(0, 1)")}
    turned = LensModel(model[0].batch, PriorMap(given), model[0].source, model[0].optics)
    w, value, _ = map_search.climb(turned, torch.zeros(3, turned.size, dtype=torch.float64), 1.0, 20)
    half = torch.zeros(turned.size, dtype=torch.float64)
    half[turned.priors.free.index("phi")] = math.pi
    both = torch.stack([w, w - half], 1)
    torch.testing.assert_close(turned.image(both[:, 1]), turned.image(w))
    reached = torch.stack([value, value - 0.5], 1)
    assert map_search.merged(turned, both, reached).tolist() == [[0, 0]] * 3
    assert map_search.apart(turned, both, reached, 50)[0].tolist() == [[True, False]] * 3
    found = map_search.finish(turned, turned, both, reached, Fit(final_steps=1))
    assert found.start_basin.tolist() == [[0, 0]] * 3
    assert bool(found.basins_w[:, 1].isnan().all())


def test_a_start_without_numbers_does_not_take_the_others_with_it(model: tuple[LensModel, Tensor]) -> None:
    """The best of the others is climbed from; a lens that has none ends without a finite log posterior."""
    lens_model, truth = model
    w = torch.stack([truth, torch.full_like(truth, torch.nan)], 1)
    value = torch.stack([lens_model.log_density(truth), torch.full_like(truth[:, 0], torch.nan)], 1)
    found = map_search.finish(lens_model, lens_model, w, value, Fit(final_steps=3))
    assert bool((found.log_density > value[:, 0] - 1).all())
    _, reached, done = map_search.climb(lens_model, w[:, 1], 1.0, 2)
    assert (reached == -torch.inf).all(), "what is no number would be ranked first"
    assert not done.any()
    none = map_search.finish(lens_model, lens_model, w[:, 1:], value[:, 1:], Fit(final_steps=3))
    assert not torch.isfinite(none.log_density).any()


def test_light_that_is_not_there_is_exactly_none(model: tuple[LensModel, Tensor]) -> None:
    """Of two Gaussians of the lens galaxy's light one is dark: the search ends at its wall, a maximum all the same."""
    lens_model, truth = model
    shape = {"amplitude": "HalfNormal(3)", "q": "0.8", "phi": "0.3", "center_x": "0", "center_y": "0"}
    further = {f"{name}_{key}": text for name in ("bulge", "halo") for key, text in shape.items()}
    further |= {"bulge_sd": "0.3", "halo_sd": "0.9"}
    own = {name: parse_prior(text) for name, text in further.items()}
    priors = PriorMap(Config().priors.expressions() | own)
    optics = Optics(TABLE, light=Light({"bulge": "gaussian", "halo": "gaussian"}))
    wider = LensModel(lens_model.batch, priors, lens_model.source, optics)
    dark, lit = (wider.priors.free.index(f"{name}_amplitude") for name in ("bulge", "halo"))
    assert wider.priors.folded == [dark, lit]
    named, latent = lens_model.split(truth)
    w = torch.zeros(3, wider.size, dtype=torch.float64)
    w[:, : named.shape[1]], w[:, -latent.shape[1] :] = named, latent
    w[:, lit] = 0.5
    hole = wider.image(w) - wider.image(w.index_fill(1, torch.tensor([dark]), 0.05))
    batch = replace(lens_model.batch, image=(wider.image(w) + hole) * lens_model.batch.flux_unit[:, None, None])
    searched = LensModel(batch, priors, lens_model.source, optics)
    begun = w.clone()
    begun[:, [dark, lit]] = 0.3
    ended, _, done = map_search.climb(searched, begun, 1.0, 40)
    assert bool(done.all())
    assert ended[:, dark].tolist() == [0.0] * 3
    assert float((ended[:, lit] - 0.5).abs().max()) < 0.1
    _, slope = searched.value_and_gradient(ended)
    assert bool((slope[:, dark] < 0).all())
    free = torch.arange(searched.size) != dark
    hessian = searched.hessian(ended)[:, free][:, :, free]
    step = torch.linalg.solve(hessian, slope[:, free, None])[..., 0]
    assert float((step * slope[:, free]).sum(-1).max()) < 0.05
    mirrored = begun.clone()
    mirrored[:, [dark, lit]] *= -1
    torch.testing.assert_close(searched.log_density(mirrored), searched.log_density(begun))
    torch.testing.assert_close(searched.unfolded(mirrored), begun)


def test_a_lens_that_has_converged_stays(model: tuple[LensModel, Tensor]) -> None:
    """However long its neighbour climbs: the steps of a lens are its own."""
    lens_model, truth = model
    near, _, _ = map_search.climb(lens_model, truth, 1.0, 40)
    far = near.clone()
    far[0] += 0.5
    beside, _, _ = map_search.climb(lens_model, far, 1.0, 12)
    alone, _, _ = map_search.climb(lens_model.take(torch.tensor([1])), near[1:2], 1.0, 12)
    torch.testing.assert_close(beside[1], alone[0], rtol=1e-9, atol=1e-9)
