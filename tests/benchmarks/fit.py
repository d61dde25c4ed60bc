"""Search and posterior of mocks drawn from the model, one JSON line a lens: `python tests/benchmarks/fit.py RESULTS`.

RESULTS is the folder of a run, with its source prior and deflection table. Images of 256 x 256 pixels over 10 arcsec at
the paper's three noise levels, the default priors, the source without its residual field: with 64 latents these are the
paper's 76 unknowns. `gap` is the log posterior at the MAP above that at the truth, `gap_climbed` above where a climb
from the truth ends; `flags` are those that a search can raise by itself. One thread; seconds are of the processor, a
lens.

Options: `--systems 20`, `--pixels 256`, `--batch 4`, `--noise 0.0333` (may be repeated), `--posterior` (also draws:
R-hat 1.01 and ESS 400 asked for), `--adam` (the paper's 10^4 steps on the same lenses), `--to FILE` (lines are added
to this file; lenses that it has are passed over).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

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
from lenspipe.source.learned import LearnedSource
from lenspipe.source.prior import read_source_prior

FIELD, PSF_SD = 10.0, 0.05  # ["]
NOISE = (0.0333, 0.1, 0.333)
ASKED = Fit(warmup=150, draws=250, r_hat_max=1.01, ess_min=400)


def mocks(
    paths: Results, systems: range, sd: float, pixels: int, residual: bool = False
) -> tuple[LensModel, torch.Tensor]:
    """Lenses drawn from the model with white noise, and their true unknowns; a system is the same at every noise."""
    number, scale = len(systems), FIELD / pixels
    source = read_source_prior(paths.source_prior)
    source = source.without_residual() if isinstance(source, LearnedSource) and not residual else source
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
    if options.posterior:
        began = time.process_time()
        draws = chains.sample(model, found, ASKED, generators(number), monitored(model))
        seconds = (time.process_time() - began) / number
        r_hat, bulk, tail = convergence([draws.w[..., column].numpy() for column in monitored(model)])
        for lens, row in enumerate(rows):
            row |= {"posterior_s": round(seconds, 1), "r_hat": float(r_hat[lens])}
            row |= {"ess_bulk": float(bulk[lens]), "ess_tail": float(tail[lens])}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--systems", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--noise", type=float, action="append")
    parser.add_argument("--posterior", action="store_true")
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--to", type=Path, default=Path("/dev/stdout"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = options.to.read_text().splitlines() if options.to.is_file() else []
    done = {(row["system"], row["noise"]) for row in map(json.loads, lines)}
    for first in range(0, options.systems, options.batch):
        systems = range(first, min(first + options.batch, options.systems))
        for sd in options.noise or NOISE:
            if all((system, sd) in done for system in systems):
                continue
            rows = measure(*mocks(Results(options.results), systems, sd, options.pixels), options)
            with options.to.open("a") as out:
                for system, row in zip(systems, rows, strict=True):
                    print(json.dumps({"system": system, "noise": sd, "pixels": options.pixels, **row}), file=out)


if __name__ == "__main__":
    main()
