"""Search and posterior of mocks drawn from the model, one JSON line a lens: `python tests/benchmarks/fit.py RESULTS`.

RESULTS is the folder of a run, with its source prior and deflection table. Images of 256 x 256 pixels over 10 arcsec at
the paper's three noise levels, the default priors, the source without its residual field: with 64 latents these are the
paper's 76 unknowns. `gap` is the log posterior at the MAP above that at the truth, `gap_climbed` above where a climb
from the truth ends; `flags` are those that a search can raise by itself. One thread; seconds are of the processor, a
lens.

Options: `--first 0`, `--systems 20`, `--pixels 256`, `--batch 4`, `--noise 0.0333` (may be repeated), `--posterior`
(also draws: R-hat 1.01 and ESS 400 asked for), `--adam` (the paper's 10^4 steps on the same lenses), `--nuts 1500`
(Pyro's NUTS for so many seconds on the first lens of each batch, as Pyro has it: in the model's own unknowns, begun at
the MAP; the rate at which it gains effective draws of the lens parameters is that after its warm-up of 60), `--to FILE`
(lines are added to this file; lenses that it has are passed over).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value

from lenspipe.catalogue.batch import LensBatch
from lenspipe.config import Config, Fit, Summary
from lenspipe.fit import chains, diagnostics, map_search, reference
from lenspipe.fit.batch import monitored
from lenspipe.fit.model import LensModel
from lenspipe.image.psf import gaussian_kernel
from lenspipe.memory import keep_freed_memory
from lenspipe.optics import read_optics
from lenspipe.posteriors.convergence import convergence
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from lenspipe.seeds import seed_for
from lenspipe.source.base import Source
from lenspipe.source.learned import LearnedSource
from lenspipe.source.prior import read_source_prior

FIELD, PSF_SD = 10.0, 0.05  # ["]
NOISE = (0.0333, 0.1, 0.333)
ASKED = Fit(warmup=150, draws=400, rounds=3, r_hat_max=1.01, ess_min=400)


def mocks(
    paths: Results, systems: range, sd: float, pixels: int, residual: bool = False
) -> tuple[LensModel, torch.Tensor]:
    """Lenses drawn from the model with white noise, and their true unknowns; a system is the same at every noise."""
    number, scale = len(systems), FIELD / pixels
    source = source_of(paths, residual)
    kernel = torch.from_numpy(gaussian_kernel(PSF_SD / scale)).float().expand(number, -1, -1)
    blank = torch.zeros(number, pixels, pixels)
    names = tuple(f"system-{system}" for system in systems)
    unit = torch.ones(number)
    batch = LensBatch(names, blank, blank + sd, blank == 0, kernel, torch.full((number,), scale), unit, unit)
    parts = (
        PriorMap(Config().priors.expressions()),
        source,
        read_optics(Config(), paths.deflection_table, torch.float32),
    )
    model = LensModel(batch, *parts)
    random = [torch.Generator().manual_seed(seed_for(1, "benchmark", system)) for system in systems]
    truth = torch.stack([torch.randn(model.size, generator=generator) for generator in random])
    noise = torch.stack([torch.randn(pixels, pixels, generator=generator) for generator in random])
    with torch.no_grad():
        return LensModel(replace(batch, image=model.image(truth) + sd * noise), *parts), truth


@lru_cache
def source_of(paths: Results, residual: bool) -> Source:
    """Once a process, as in a run: the first search makes its sketch."""
    source = read_source_prior(paths.source_prior)
    return source.without_residual() if isinstance(source, LearnedSource) and not residual else source


def generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(lens) for lens in range(number)]


def doubts(model: LensModel, found: map_search.MapFit) -> list[dict[str, object]]:
    """What the search says against each of its fits, by the thresholds of the summary."""
    limits = Summary()
    chi2 = model.residuals(found.w).double().square().sum((-2, -1)) / model.batch.usable.sum((-2, -1))
    agreeing = diagnostics.starts_agreeing(found.start_basin.numpy(), found.start_count.numpy())
    lead = diagnostics.evidence_lead(found.basins_log_evidence.numpy())
    rows = []
    for lens in range(len(chi2)):
        raised = {
            "chi2_high": bool(chi2[lens] > 1 + limits.chi2_floor),
            "map_not_converged": not bool(found.converged[lens]),
            "lone_start": bool(agreeing[lens] < limits.starts_agreeing_min),
            "rival_basin": bool(lead[lens] < limits.evidence_lead_min),
        }
        flags = ",".join(name for name, is_raised in raised.items() if is_raised)
        rows.append({"chi2_per_pixel": float(chi2[lens]), "agreeing": int(agreeing[lens]), "flags": flags})
    return rows


class CapReached(Exception):
    """Ends a run of Pyro's from its hook."""


def nuts(model: LensModel, w: torch.Tensor, cap: float) -> dict[str, object]:
    """What Pyro's NUTS makes of one lens in `cap` seconds; w: [1, size] where it begins."""
    draws, began, ready = [], time.process_time(), float("nan")

    def keep(_: object, samples: dict[str, torch.Tensor], stage: str, __: int) -> None:
        nonlocal ready
        if stage == "Sample":
            draws.append(samples["w"].flatten().clone())
        else:
            ready = time.process_time()
        if time.process_time() - began > cap:
            raise CapReached

    kernel = NUTS(model.pyro_model, init_strategy=init_to_value(values={"w": w}))
    pyro.set_rng_seed(1)
    with contextlib.suppress(CapReached):
        MCMC(kernel, 1_000_000, 60, hook_fn=keep, disable_progbar=True).run()
    seconds = time.process_time() - ready
    facts: dict[str, object] = {"nuts_warmup_s": round(ready - began, 1), "nuts_draws": len(draws)}
    if len(draws) < 8:
        return facts
    kept = torch.stack(draws)[None, None]
    _, bulk, tail = convergence([kept[..., column].numpy() for column in monitored(model)])
    return facts | {"nuts_s": round(seconds, 1), "nuts_ess_bulk": float(bulk[0]), "nuts_ess_tail": float(tail[0])}


def measure(model: LensModel, truth: torch.Tensor, options: argparse.Namespace) -> list[dict[str, object]]:
    """What is printed of each lens of a batch."""
    number = len(truth)
    began = time.process_time()
    found = map_search.search(model, Fit(), generators(number))
    seconds = (time.process_time() - began) / number
    climbed = map_search.climb(model, truth, 1.0, 60)[1]
    gaps = found.log_density - model.log_density(truth), found.log_density - climbed
    rows: list[dict[str, object]] = [
        {"unknowns": model.size, "gap": float(gap), "gap_climbed": float(other), "map_s": round(seconds, 1), **said}
        for gap, other, said in zip(*gaps, doubts(model, found), strict=True)
    ]
    if options.adam:
        began = time.process_time()
        adam = reference.adam_search(model, Fit(), generators(number))
        for row, below in zip(rows, found.log_density - adam.log_density, strict=True):
            row |= {"adam_s": round((time.process_time() - began) / number, 1), "adam_below": float(below)}
    if options.nuts:
        rows[0] |= nuts(model.take(torch.tensor([0])), found.w[:1], options.nuts)
    if options.posterior:
        began, began_wall = time.process_time(), time.monotonic()
        draws = chains.sample(model, found, ASKED, generators(number), monitored(model))
        seconds, wall = (time.process_time() - began) / number, (time.monotonic() - began_wall) / number
        r_hat, bulk, tail = convergence([draws.w[..., column].numpy() for column in monitored(model)])
        for lens, row in enumerate(rows):
            row |= {"posterior_s": round(seconds, 1), "posterior_wall_s": round(wall, 1), "r_hat": float(r_hat[lens])}
            row |= {"ess_bulk": float(bulk[lens]), "ess_tail": float(tail[lens])}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--systems", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--noise", type=float, action="append")
    parser.add_argument("--posterior", action="store_true")
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--nuts", type=float, metavar="SECONDS")
    parser.add_argument("--to", type=Path, default=Path("/dev/stdout"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = options.to.read_text().splitlines() if options.to.is_file() else []
    done = {(row["system"], row["noise"]) for row in map(json.loads, lines)}
    end = options.first + options.systems
    for first in range(options.first, end, options.batch):
        systems = range(first, min(first + options.batch, end))
        for sd in options.noise or NOISE:
            if all((system, sd) in done for system in systems):
                continue
            rows = measure(*mocks(Results(options.results), systems, sd, options.pixels), options)
            with options.to.open("a") as out:
                for system, row in zip(systems, rows, strict=True):
                    print(json.dumps({"system": system, "noise": sd, "pixels": options.pixels, **row}), file=out)


if __name__ == "__main__":
    main()
