"""Simulation-based calibration of the whole engine: search and sampler on lenses drawn from the model.

The search starts from the prior and knows nothing of the truth. All lenses are judged, those that miss a gate too. The
whole form, 100 lenses, is marked `statistical`; a small one runs with every other test. Both fail a right engine with a
chance of at most 1e-3. With 24 lenses a posterior must be more than about 1.6 times too narrow, or a standard deviation
off, to be found out: the small form is there for what is plainly broken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenspipe import calibration
from lenspipe.catalogue.batch import LensBatch
from lenspipe.config import Config, Fit
from lenspipe.fit import chains, map_search
from lenspipe.fit.batch import monitored
from lenspipe.fit.model import LensModel
from lenspipe.image.psf import gaussian_kernel
from lenspipe.image.simulator import Optics
from lenspipe.prior_map import PriorMap
from lenspipe.seeds import seed_for
from lenspipe.source.base import Source, pixel_axis
from tests.lenses import NOISE, TABLE

PARAMETERS = ("theta_E", "gamma", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2")
FALSE_ALARM = 1e-3  # chance that a right engine fails, over all quantities (Bonferroni)
MOST_FAILED = 0.1  # share of lenses that may miss a gate
SETTINGS = Fit(
    starts=12,
    scouts=6,
    survivors=3,
    scout_pixels=24,
    temperatures=(25.0, 10.0, 4.0, 1.5),
    settling_temperatures=(3.0, 1.0),
    steps_per_temperature=6,
    chains=2,
    warmup=80,
    draws=150,
    target_accept=0.7,
    path_length=1.5,
    max_leapfrog_steps=6,
    rounds=3,
    ess_min=60,
)


@dataclass(frozen=True)
class Size:
    """How large a test is, and how wrong a posterior it finds out.

    side [px] and scale ["] of the images; ranked: draws of a lens among which the truth is ranked, nearly independent,
    since the gate asks for as many; squeezed: how many times too narrow; shifted: how far off [sd].
    """

    lenses: int
    side: int
    scale: float
    ranked: int
    settings: Fit
    squeezed: float
    shifted: float


WHOLE = Size(100, 48, 0.12, 59, SETTINGS, 1.3, 0.5)
SHORT = {"starts": 6, "scouts": 4, "survivors": 2, "scout_pixels": 16, "warmup": 40, "draws": 60}
SHORT |= {"ess_min": 20, "r_hat_max": 1.15}
SMALL = Size(24, 32, 0.18, 19, SETTINGS.model_copy(update=SHORT), 2.0, 1.2)


class Blobs(Source):
    """A Gaussian of brightness 1 and two smaller ones beside it, whose brightness the unknowns set."""

    size = 2

    def forward(self, w: Tensor) -> Tensor:
        axis = pixel_axis().to(w)
        places = ((0.0, 0.0, 0.12), (0.16, 0.06, 0.06), (-0.1, 0.14, 0.06))
        main, *others = (torch.exp(-((axis - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * sd**2)) for x, y, sd in places)
        return main + torch.einsum("lk,kyx->lyx", 0.2 + 0.2 * w, torch.stack(others))


@dataclass(frozen=True)
class Fitted:
    """truth: [lens, parameter]; draws: [lens, chain, draw, parameter], of the lens parameters and the log posterior;
    failed: [lens], whether a gate is missed."""

    size: Size
    truth: NDArray
    draws: NDArray
    failed: NDArray


def drawn(size: Size) -> tuple[LensModel, Tensor]:
    """Lenses drawn from the model and their true unknowns [lens, size], in single precision as fits are run."""
    lenses = size.lenses
    names = tuple(str(lens) for lens in range(lenses))
    blank = torch.zeros(lenses, size.side, size.side)
    psf = torch.from_numpy(gaussian_kernel(0.12 / size.scale)).float().expand(lenses, -1, -1)
    scale, unit = torch.full((lenses,), size.scale), torch.ones(lenses)
    batch = LensBatch(names, blank, blank + NOISE, blank == 0, psf, scale, unit, unit)
    optics = Optics(TABLE.to(dtype=torch.float32))
    model = LensModel(batch, PriorMap(Config().priors.expressions()), Blobs(), optics)
    generator = torch.Generator().manual_seed(12)
    truth = torch.randn(lenses, model.size, generator=generator)
    image = model.image(truth) + NOISE * torch.randn(blank.shape, generator=generator)
    return LensModel(replace(batch, image=image), model.priors, model.source, optics), truth


@pytest.fixture(
    scope="module", params=[SMALL, pytest.param(WHOLE, marks=pytest.mark.statistical)], ids=["small", "whole"]
)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    size: Size = request.param
    model, truth = drawn(size)
    found = map_search.search(model, size.settings, generators("map", size))
    draws = chains.sample(model, found, size.settings, generators("hmc", size), monitored(model))
    each = [chains.of_lens(draws, lens) for lens in range(size.lenses)]
    passed = [chains.passes(one, size.settings, monitored(model)) for one in each]
    seen = [model.priors.free.index(name) for name in PARAMETERS]
    return Fitted(
        size,
        torch.cat([truth[:, seen].double(), model.log_density(truth)[:, None]], -1).numpy(),
        torch.cat([draws.w[..., seen].double(), draws.log_density[..., None]], -1).numpy(),
        ~np.array(passed),
    )


def generators(purpose: str, size: Size) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed_for(1, purpose, lens)) for lens in range(size.lenses)]


def p_values(fitted: Fitted, draws: NDArray) -> dict[str, float]:
    rng, ranked = np.random.default_rng(7), fitted.size.ranked
    ranks = calibration.ranks(fitted.truth, calibration.spread(draws, ranked), rng)
    return dict(zip((*PARAMETERS, "log_density"), calibration.uniformity(ranks, ranked, rng).tolist(), strict=True))


def test_posteriors_of_lenses_drawn_from_the_model_are_calibrated(fitted: Fitted) -> None:
    p = p_values(fitted, fitted.draws)
    print({name: round(value, 4) for name, value in p.items()}, "gates missed:", int(fitted.failed.sum()))
    assert fitted.failed.mean() <= MOST_FAILED
    assert min(p.values()) * len(p) > FALSE_ALARM, p


@pytest.mark.parametrize("wrong", ["squeezed", "shifted"])
def test_wrong_posteriors_are_found_out(fitted: Fitted, wrong: str) -> None:
    """The same draws squeezed towards their mean, or shifted."""
    mean, sd = (moment(fitted.draws, axis=(1, 2), keepdims=True) for moment in (np.mean, np.std))
    size = fitted.size
    changed = {"squeezed": mean + (fitted.draws - mean) / size.squeezed, "shifted": fitted.draws + size.shifted * sd}
    p = p_values(fitted, changed[wrong])
    print({name: f"{value:.1e}" for name, value in p.items()})
    assert min(p[name] for name in PARAMETERS) * len(p) < FALSE_ALARM
