"""The sampler on targets that are known: metrics, trajectories, walls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lenspipe.config import Fit
from lenspipe.fit import hmc
from lenspipe.posteriors.convergence import convergence
from lenspipe.prior_map import Wall


def gaussian_target(precision: Tensor, mean: Tensor) -> hmc.Target:
    def target(w: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        offset = w - mean
        pull = -(precision @ offset[..., None])[..., 0]
        return 0.5 * (offset * pull).sum(-1), pull

    return target


@pytest.fixture
def correlated() -> tuple[Tensor, Tensor]:
    """Precision and mean of a correlated Gaussian in three dimensions."""
    root = torch.tensor([[2.0, 0, 0], [0.9, 1.0, 0], [-0.4, 0.3, 0.5]], dtype=torch.float64)
    return root @ root.T, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_sampler_draws_a_gaussian_it_was_given_the_wrong_metric_for(correlated: tuple[Tensor, Tensor]) -> None:
    """Mean and covariance within five standard errors; false alarms below 1e-5."""
    precision, mean = correlated
    settings = Fit(chains=8, warmup=300, draws=2000)
    center = torch.zeros(2, 3, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    target = gaussian_target(precision, mean)
    run = hmc.Run(target, center, 2 * torch.eye(3).double().expand(2, -1, -1), settings, generators)
    draws = run.finish()
    covariance = np.linalg.inv(precision.numpy())
    for lens in range(2):
        w = draws.w[lens].flatten(0, 1).numpy()
        error = 5 * np.sqrt(np.diag(covariance) / 2000)
        assert np.all(np.abs(w.mean(0) - mean.numpy()) < error)
        spread = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        assert np.all(np.abs(np.cov(w.T) - covariance) < 0.15 * spread)
    assert abs(float(draws.acceptance.mean()) - settings.target_accept) < 0.1


def test_energies_are_those_where_a_trajectory_begins(correlated: tuple[Tensor, Tensor]) -> None:
    """Of a Gaussian in three dimensions half a chi^2 of six, of which 3 is mean and variance; steps that are too long
    diverge."""
    center, settings = correlated[1][None], Fit(chains=8, warmup=100, draws=500)
    hessian, target = correlated[0][None], gaussian_target(*correlated)
    draws = hmc.Run(target, center, hessian, settings, [torch.Generator().manual_seed(1)]).finish()
    assert float(draws.energy.mean()) == pytest.approx(3, abs=0.2)
    assert float(draws.energy.var()) == pytest.approx(3, abs=0.5)
    assert not bool(draws.diverging.any())
    again = [torch.Generator().manual_seed(1)]
    far = hmc.Run(target, center, hessian, settings, again, warmup=0, step=torch.tensor([90.0]))
    draws = far.finish()
    assert bool(draws.diverging.any())
    assert float(draws.energy.mean()) == pytest.approx(3, abs=1.5)
    assert bool((draws.acceptance[draws.diverging] == 0).all())


def test_trajectories_grow_to_the_length_of_a_valley(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the draws are wide where curvature does not tell; else a few draws are hardly independent."""
    precision = torch.diag(torch.tensor([1.0, 1.0, 1 / 400]).double())
    target, center = gaussian_target(precision, torch.zeros(3).double()), torch.zeros(1, 3).double()
    settings, metric = Fit(chains=4, warmup=100, draws=100, max_leapfrog_steps=256), torch.eye(3)[None].double()

    def drawn() -> tuple[hmc.Run, float]:
        generators = [torch.Generator().manual_seed(3)]
        run = hmc.Run(target, center, metric, settings, generators, lambda w: metric.expand(len(w), -1, -1))
        draws = run.finish().w[..., 2]
        return run, float(convergence([draws.numpy()])[1][0])

    run, size = drawn()
    assert 8 < float(run.length) < 30
    assert size > 100
    monkeypatch.setattr(hmc, "reach", lambda metric, seen: torch.zeros(1).double())
    assert drawn()[1] < size / 4


def test_the_way_to_the_posterior_is_forgotten() -> None:
    """Chains that begin far off come to know how wide it is, and not how far they came; their metric neither."""
    target, center = gaussian_target(torch.eye(3).double(), torch.zeros(3).double()), torch.zeros(1, 3).double()
    metric = torch.eye(3)[None].double()

    def curvature(w: Tensor) -> Tensor:
        return torch.where(w.abs().amax(1) > 10, 100.0, 1.0)[:, None, None] * metric

    settings = Fit(chains=4, warmup=100, draws=20, path_length=1.0, max_leapfrog_steps=256)
    far = torch.full((1, 4, 3), 60.0).double()
    run = hmc.Run(target, center, metric, settings, [torch.Generator().manual_seed(3)], curvature, begin=far)
    while run.iteration < 25:
        run.advance()
    assert float(run.length) > 5
    run.finish()
    assert float(run.length) < 2.5
    torch.testing.assert_close(run.hessian, metric)


def test_leapfrog_is_reversible_and_keeps_the_energy(correlated: tuple[Tensor, Tensor]) -> None:
    precision, mean = correlated
    metric = hmc.Metric(gaussian_target(precision, mean), torch.zeros(1, 3).double(), torch.eye(3)[None].double(), 4)
    generator = torch.Generator().manual_seed(0)
    u, momentum = torch.randn(2, 1, 4, 3, generator=generator, dtype=torch.float64)
    value, gradient = metric.target(u)
    leaps = torch.tensor([20.0])

    def run(step: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return hmc.leapfrog(metric, u, momentum, value, gradient, torch.tensor([step]).double(), leaps)

    end, p, end_value, end_gradient = run(0.05)
    back, minus_p, _, _ = hmc.leapfrog(metric, end, -p, end_value, end_gradient, torch.tensor([0.05]).double(), leaps)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(minus_p, -momentum)

    def energy_error(step: float) -> float:
        _, p, v, _ = run(step)
        before = 0.5 * momentum.square().sum(-1) - value
        return float((0.5 * p.square().sum(-1) - v - before).abs().max())

    assert energy_error(0.01) < energy_error(0.05) / 10  # second order


ABOVE_ZERO = [Wall(0, 1.0, 0.0), Wall(2, 1.0, 0.0)]


def folded_target(precision: Tensor, mean: Tensor) -> hmc.Target:
    """A Gaussian of which only w_0 >= 0 is left, and its mirror image."""
    whole = gaussian_target(precision, mean)

    def target(w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sign = torch.ones_like(w)
        sign[:, 0] = torch.where(w[:, 0] < 0, -1.0, 1.0)
        value, gradient = whole(sign * w, rows)
        return value, sign * gradient

    return target


@pytest.mark.parametrize(
    ("walls", "reflected"), [(ABOVE_ZERO, 4), ([Wall(0, -1.0, 0.5), Wall(1, 1.0, 0.7), Wall(2, -1.0, 0.0)], 5)]
)
def test_reflected_trajectories_come_back_and_stay_inside(
    correlated: tuple[Tensor, Tensor], walls: list[Wall], reflected: int
) -> None:
    """In any whitening: no unknown passes a wall, momenta keep their lengths, and reversed they go the same way."""
    hessian = torch.stack([correlated[0], torch.eye(3).double()])
    metric = hmc.Metric(gaussian_target(*correlated), torch.full((2, 3), 0.2).double(), hessian, 4, walls)
    generator = torch.Generator().manual_seed(0)
    begun, momentum = torch.randn(2, 2, 4, 3, generator=generator, dtype=torch.float64)

    def inside(w: Tensor) -> Tensor:
        return torch.stack([wall.distance(w) for wall in walls]).amin(0)

    w = metric.unwhitened(begun)
    for wall in walls:
        w[:, wall.column] -= 2 * wall.side * wall.distance(w).clamp(max=0)
    u = metric.whitened(w)
    time, lenses = torch.full((2, 1, 1), 6.0).double(), torch.arange(2)
    end, turned = metric.drift(u, momentum, time, lenses)
    assert float(inside(metric.unwhitened(end)).min()) > -1e-12
    torch.testing.assert_close(turned.square().sum(-1), momentum.square().sum(-1))
    assert int(((end - u - 6 * momentum).abs().amax(-1) > 1).sum()) == reflected
    back, minus = metric.drift(end, -turned, time, lenses)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(minus, -momentum)
    straight = torch.where(inside(metric.unwhitened(u + 6 * momentum)).unflatten(0, (2, 4)) > 0, 1.0, 0.0)
    torch.testing.assert_close(end * straight[..., None], (u + 6 * momentum) * straight[..., None])


def test_a_trajectory_between_close_walls_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is reflected more often than is followed, its momentum is no number: the draw is rejected."""
    mean, precision = torch.zeros(1).double(), torch.eye(1).double()
    walls = [Wall(0, 1.0, 0.05), Wall(0, -1.0, 0.05)]
    metric = hmc.Metric(gaussian_target(precision, mean), mean[None], precision[None], 2, walls)
    begun, momentum = torch.zeros(1, 2, 1).double(), torch.tensor([[[0.01], [1.0]]]).double()
    monkeypatch.setattr(hmc, "REFLECTIONS", 3)
    end, turned = metric.drift(begun, momentum, torch.ones(1, 1, 1).double(), torch.tensor([0]))
    assert float(end[0, 0]) == pytest.approx(0.01)
    assert turned.isfinite().flatten().tolist() == [True, False]
    settings, generators = Fit(chains=2, draws=20), [torch.Generator().manual_seed(1)]
    begin, step = torch.zeros(1, 2, 1).double(), torch.full((1,), 100.0).double()
    run = hmc.Run(
        *(metric.raw_target, mean[None], precision[None], settings, generators),
        **{"warmup": 0, "begin": begin, "step": step, "walls": walls},
    )
    draws = run.finish()
    assert bool((draws.w == 0).all())
    assert bool((draws.acceptance == 0).all())


def test_a_metric_is_no_wider_than_a_wall_leaves_room(correlated: tuple[Tensor, Tensor]) -> None:
    """Along folded unknowns near 0, one after the other, and no other; where there is room for all nothing changes."""
    hessian = correlated[0].expand(2, -1, -1)
    wide = torch.linalg.inv(hessian).diagonal(dim1=1, dim2=2)
    room = wide * torch.tensor([[0.1, 0.1, 2.0], [3.0, 1e-3, 1.5]]).double()
    near = room.sqrt()
    left = torch.linalg.inv(hmc.narrowed(hessian, near, room, ABOVE_ZERO)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(left[0, 0], room[0, 0])
    assert bool((left[0] <= wide[0]).all())
    torch.testing.assert_close(left[1], wide[1])
    torch.testing.assert_close(hmc.narrowed(hessian, 2 * near, room, ABOVE_ZERO), hessian)
    torch.testing.assert_close(torch.linalg.inv(hessian).diagonal(dim1=1, dim2=2), wide, rtol=0, atol=0)


def test_a_metric_is_narrow_where_a_maximum_is_pressed_against_a_wall() -> None:
    """By the slope there, whichever side the wall is on; one that is free, or far from a wall, changes nothing."""
    hessian = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 1.0]]).double().expand(3, -1, -1)
    center = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.4, 0.5, 0.0]]).double()
    gradient = torch.tensor([[-20.0, 0.0, 5.0], [20.0, 30.0, 0.0], [-20.0, 0.0, 0.0]]).double()
    walls = [Wall(0, 1.0, 0.0), Wall(1, -1.0, 0.51), Wall(2, 1.0, 0.0)]
    found = hmc.pressed(hessian, center, gradient, walls)
    wide, narrow = (torch.linalg.inv(of).diagonal(dim1=1, dim2=2) for of in (hessian, found))
    torch.testing.assert_close(narrow[0, 0], torch.tensor(20.0).double() ** -2)
    torch.testing.assert_close(narrow[1, 1], torch.tensor(30.0).double() ** -2)
    torch.testing.assert_close(found[2], hessian[2])
    assert bool((narrow <= wide + 1e-12).all())
    changed = (found - hessian).abs().amax(2) > 1e-9
    assert changed.tolist() == [[True, False, False], [False, True, False], [False, False, False]]


def test_sampler_draws_what_is_left_of_a_gaussian(correlated: tuple[Tensor, Tensor]) -> None:
    """Folded at 0 where half of it or most is cut off: moments within five standard errors of draws by rejection."""
    precision, mean = correlated
    settings = Fit(chains=8, warmup=300, draws=2000)
    rng = np.random.default_rng(1)
    for middle in (0.0, -0.7):
        shifted = torch.cat([torch.tensor([middle]).double(), mean[1:]])
        center = torch.zeros(1, 3, dtype=torch.float64)
        generators = [torch.Generator().manual_seed(3)]
        target = folded_target(precision, shifted)

        def curvature(w: Tensor) -> Tensor:
            return precision.expand(len(w), -1, -1)

        run = hmc.Run(target, center, precision[None], settings, generators, curvature, walls=ABOVE_ZERO[:1])
        assert float(run.w[..., 0].min()) >= 0
        w = run.finish().w[0].flatten(0, 1).numpy()
        every = rng.multivariate_normal(shifted.numpy(), np.linalg.inv(precision.numpy()), 2_000_000)
        left = every[every[:, 0] >= 0]
        assert w[:, 0].min() >= -1e-12
        error = 5 * left.std(0) / np.sqrt(2000)
        np.testing.assert_array_less(np.abs(w.mean(0) - left.mean(0)), error)
        np.testing.assert_allclose(np.cov(w.T), np.cov(left.T), atol=0.15 * float(np.outer(*2 * [left.std(0)]).max()))
