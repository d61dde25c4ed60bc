"""Rounds of chains, their gates and their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit import chains, hmc, map_search
from lenspipe.fit.model import LensModel

PROCESSOR = torch.device("cpu")


GATED = Fit(
    chains=2, warmup=20, draws=20, rounds=3, r_hat_max=1.0001, ess_min=1e9, path_length=0.5, max_leapfrog_steps=2
)


@pytest.fixture(scope="module")
def found(model: tuple[LensModel, Tensor]) -> map_search.MapFit:
    lens_model, truth = model
    w, value, converged = map_search.climb(lens_model, truth, 1.0, 40)
    return map_search.MapFit.of_one_start(lens_model, w, value, converged)


def seeded(lenses: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(lenses)]


COLUMNS = list(range(8))


@pytest.fixture(scope="module")
def never_stopped(model: tuple[LensModel, Tensor], found: map_search.MapFit) -> hmc.Draws:
    return chains.sample(model[0], found, GATED, seeded(), COLUMNS)


def test_longer_rounds_are_judged_by_what_is_kept_of_them(
    model: tuple[LensModel, Tensor], found: map_search.MapFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a refit: with three times the draws, of which every third stays."""
    judged: list[int] = []
    made: list[int] = []

    def convergence(values: list[np.ndarray]) -> tuple[list[float], ...]:
        judged.append(values[0].shape[-1])
        return [1.0], [99.0], [99.0]

    def result(run: hmc.Run, own: Callable[[hmc.Run], hmc.Draws] = hmc.Run.result) -> hmc.Draws:
        made.append(run.draws)
        return own(run)

    monkeypatch.setattr(chains, "convergence", convergence)
    monkeypatch.setattr(hmc.Run, "result", result)
    once = GATED.model_copy(update={"rounds": 1})
    draws = chains.sample(model[0], found, once, seeded(), COLUMNS, draws_factor=3)
    assert made == [3 * GATED.draws]
    assert set(judged) == {GATED.draws} == {draws.w.shape[2]}


class Killed(Exception):
    """What a test kills a run with."""


@pytest.mark.parametrize("after", [10, 30, 55])
def test_chains_of_a_killed_batch_go_on(
    model: tuple[LensModel, Tensor],
    found: map_search.MapFit,
    never_stopped: hmc.Draws,
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the warm-up, in the first draws or in the second round: the draws are those of a run never stopped."""
    lens_model, _ = model
    checkpoint = chains.Checkpoint(tmp_path / "c.safetensors", {"batch": 1}, searched=3.0, spent=1000.0)
    monkeypatch.setattr(chains, "CHECKPOINT_SECONDS", 0.0)
    advance, count = hmc.Run.advance, 0

    def until_killed(run: hmc.Run) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        advance(run)

    monkeypatch.setattr(hmc.Run, "advance", until_killed)
    with pytest.raises(Killed):
        chains.sample(lens_model, found, GATED, seeded(), COLUMNS, checkpoint)
    monkeypatch.setattr(hmc.Run, "advance", advance)
    again = map_search.restored(checkpoint.load(PROCESSOR))
    assert again is not None
    torch.testing.assert_close(again.basins_w, found.basins_w, equal_nan=True)
    resumed = chains.sample(lens_model, again, GATED, seeded(), COLUMNS, checkpoint)
    torch.testing.assert_close(resumed.w, never_stopped.w)
    torch.testing.assert_close(resumed.log_density, never_stopped.log_density)
    assert chains.Checkpoint(checkpoint.path, {"batch": 2}).load(PROCESSOR) == {}
    later = chains.Checkpoint(checkpoint.path, {"batch": 1})
    later.resume(later.load(PROCESSOR))
    assert later.searched == 3.0
    assert 1000.0 < later.seconds < 2000.0


def test_only_lenses_that_miss_a_gate_go_on(
    model: tuple[LensModel, Tensor],
    found: map_search.MapFit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second of three misses its gate in the first round: it alone has a second one, whose draws it keeps too.

    The batch's log says so.
    """
    caplog.set_level("INFO", "lenspipe")
    lens_model, _ = model
    rounds: list[list[int]] = []
    begun = chains.begun

    def noted(*arguments: object) -> hmc.Run:
        rounds.append(list(arguments[4]))  # type: ignore[call-overload]
        return begun(*arguments)  # type: ignore[arg-type]

    def verdict(draws: hmc.Draws, *_: object) -> tuple[float, float]:
        second = bool(draws.energy[0, 0, 0] == first.energy[1, 0, 0])  # draws are in the unknowns of chains here
        return 1.0, 0.0 if second and draws.w.shape[2] == GATED.draws else math.inf

    first = chains.sample(lens_model, found, GATED.model_copy(update={"rounds": 1}), seeded(), [0])
    caplog.clear()
    monkeypatch.setattr(chains, "begun", noted)
    monkeypatch.setattr(chains, "gauges", verdict)
    draws = chains.sample(lens_model, found, GATED, seeded(), [0])
    assert rounds == [[0, 1, 2], [1]]
    assert draws.w.shape == first.w.shape
    torch.testing.assert_close(draws.w[[0, 2]], first.w[[0, 2]])
    torch.testing.assert_close(draws.w[1, :, :10], first.w[1][:, ::2], atol=1, rtol=0)
    assert not torch.equal(draws.w[1], first.w[1])
    names = lens_model.batch.names
    assert caplog.messages == [
        "round 1 of chains, for 3 of 3 lenses",
        f"{names[0]}: R-hat 1.000, effective sample size inf",
        f"{names[1]}: R-hat 1.000, effective sample size 0",
        f"{names[2]}: R-hat 1.000, effective sample size inf",
        "round 2 of chains, for 1 of 3 lenses",
        f"{names[1]}: R-hat 1.000, effective sample size inf",
    ]


def test_lost_chains_go_on_where_the_others_are() -> None:
    """Height and width of a chain's solution count, chains of alike evidence stay, lenses do not mix."""
    places = torch.arange(5.0)[:, None].expand(2, 4, 5, 1) + 10 * torch.arange(8.0).reshape(2, 4, 1, 1)
    wide, narrow = torch.tensor([[[1.0]]]), torch.tensor([[[math.exp(40.0)]]])  # 20 nat less room
    curved = torch.cat([wide, wide, wide, narrow, wide, wide, narrow, wide]).reshape(2, 4, 1, 1).double()
    value = torch.tensor([[-100.0, -101.0, -117.0, -90.0], [-80.0, -105.0, -85.0, -95.0]])
    went_on, hessians, lost = chains.rejoined(places, curved, value)
    assert lost.tolist() == [[False, False, True, False], [False] * 4]
    assert torch.equal(went_on[0, [0, 1, 3]], places[0, [0, 1, 3]])
    assert torch.equal(went_on[1], places[1])
    assert went_on[0, 2, :, 0].tolist() == [3, 4, 0, 1, 2]  # those of the first chain, at the end another one
    assert hessians.flatten().tolist() == curved.flatten().tolist()
    value[0, 3], value[0, 1] = -117.0, -140.0
    went_on, hessians, lost = chains.rejoined(places, curved, value)
    assert lost.tolist()[0] == [False, True, False, True]
    assert went_on[0, 1, :, 0].tolist() == [4, 0, 1, 2, 3]
    assert went_on[0, 3, :, 0].tolist() == [22, 23, 24, 20, 21]
    assert (hessians[0] == 1).all()


def test_a_later_round_begins_where_there_is_evidence(
    model: tuple[LensModel, Tensor],
    found: map_search.MapFit,
    never_stopped: hmc.Draws,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A chain that was at a place far off is moved, and does not widen the reach of the others."""
    caplog.set_level("INFO", "lenspipe")
    lens_model = model[0]
    settings = GATED.model_copy(update={"chains": 3})
    good = chains.each(chains.of_lens(never_stopped, 1), lambda two: torch.cat([two, two[:, :1].roll(7, 2)], 1))
    w, log_density = good.w.clone(), good.log_density.clone()
    w[0, 1, :, 0] += 0.3
    rows = torch.ones(w.shape[2], dtype=torch.long)
    log_density[0, 1] = lens_model.log_density(w[0, 1], rows=rows)
    assert (log_density[0, 1] < log_density[0, 0] - 100).all()
    far = replace(good, w=w, log_density=log_density)
    runs = [chains.begun(lens_model, found, settings, seeded(1), [1], [before], 1) for before in (good, far)]
    assert caplog.messages == [
        f"{lens_model.batch.names[1]}: 1 of 3 chains were where there is less evidence, and begin anew"
    ]
    begin = runs[1].w[0]
    torch.testing.assert_close(begin[0], runs[0].w[0, 0])
    nearest = (begin[1] - good.w[0, 0]).abs().amax(-1).min()
    assert float(nearest) < 1e-6
    assert not torch.allclose(begin[0], begin[1])
    assert float(runs[1].length) < 2 * float(runs[0].length)


def of_one_lens(w: Tensor) -> hmc.Draws:
    """Draws [1, chain, draw, size] of which only the unknowns matter."""
    blank = torch.zeros(w.shape[:3])
    return hmc.Draws(w, blank, blank, blank, blank, *[blank[:, 0, 0]] * 2)


def test_gates() -> None:
    """White chains pass; chains apart fail the first gate, stuck ones too; slow ones fail the second."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(1, 4, 200, 1, generator=generator, dtype=torch.float64)
    apart = white + 3 * torch.arange(4)[:, None, None]
    stuck = torch.arange(4.0)[None, :, None, None].expand(1, 4, 200, 1)
    slow = white.cumsum(2)[:, :1].expand(-1, 4, -1, -1) + 0.1 * white
    settings = Fit(chains=4, draws=200, r_hat_max=1.05, ess_min=300)

    def gauges(w: Tensor) -> tuple[float, float]:
        assert chains.passes(of_one_lens(w), settings, [0]) == (w is white)
        return chains.gauges(of_one_lens(w), settings, [0])

    assert gauges(white)[0] < 1.05
    assert gauges(white)[1] > 300
    assert gauges(apart)[0] > 1.5
    assert gauges(stuck)[0] > 1.5
    assert gauges(slow)[1] < 300


def test_earlier_draws_stay_unless_chains_do_not_agree_with_them() -> None:
    """Also where R-hat misses its gate by chance alone, or is less without them and passes with them."""
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 1, 4, 100, 1, generator=generator, dtype=torch.float64)
    near, apart = (old + shift * torch.arange(4)[:, None, None] for shift in (0.2, 3))

    def kept(old: Tensor, r_hat_max: float) -> Tensor:
        settings = Fit(chains=4, draws=200, r_hat_max=r_hat_max)
        return chains.joined(of_one_lens(old), of_one_lens(new), settings, [0]).w

    torch.testing.assert_close(kept(old, 1.0001), torch.cat([old, new], 2))
    torch.testing.assert_close(kept(near, 1.1), torch.cat([near, new], 2))
    assert kept(near, 1.0001) is new
    assert kept(apart, 1.1) is new
