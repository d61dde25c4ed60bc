"""Speed of the forward model: `python tests/benchmarks/forward.py`. One JSON line a measurement, all in one run.

Deflections in ms per million rays, table and series; images of 256 x 256 pixels (EPL and shear, 64 x 64 source,
Gaussian PSF) and value with gradient of the log-likelihood, in ms an image, for batches of 1, 8 and 32 different lenses
in float32; beside them lenstronomy's image of one lens, which has no gradient. Compare within one run: machines are
noisy.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from lenstronomy.LensModel.lens_model import LensModel
from scipy.ndimage import map_coordinates
from scipy.signal import fftconvolve

from lenspipe.config import Config
from lenspipe.image.psf import gaussian_kernel
from lenspipe.image.simulator import Optics, Simulator, canonical
from lenspipe.lens.epl import series_deflection, series_terms
from lenspipe.lens.table import build_table
from lenspipe.memory import keep_freed_memory
from lenspipe.prior_map import PriorMap

PIXELS = 256
SCALE = 0.03  # ["]
RAYS = 1_000_000


def fastest(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def report(what: str, milliseconds: float, **facts: object) -> None:
    print(
        json.dumps({"what": what, "ms": round(milliseconds, 3), "threads": torch.get_num_threads(), **facts}),
        flush=True,
    )


def main() -> None:
    keep_freed_memory()
    settings = Config().deflection_table
    table = build_table(
        settings.eta_nodes,
        (settings.q_nodes, settings.q_min),
        (settings.gamma_nodes, settings.gamma_min, settings.gamma_max),
    ).to(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, RAYS, generator=generator)
    gamma, q = torch.tensor([2.1]), torch.tensor([0.5])
    report("deflection, table, per million rays", 1e3 * fastest(lambda: table.deflection(x, y, gamma, q)))
    for least in (0.5, 0.1):
        terms = series_terms(least)
        seconds = fastest(lambda n=terms: series_deflection(x, y, gamma[:, None], q[:, None], n), 3)  # type: ignore[misc]
        report("deflection, series, per million rays", 1e3 * seconds, terms=terms)

    priors = PriorMap(Config().priors.expressions())
    kernel = torch.from_numpy(gaussian_kernel(2.0)).float()
    source = torch.from_numpy(gaussian_kernel(7.0, 32)[:64, :64]).float()
    source /= source.max()
    for batch in (1, 8, 32):
        w = 0.5 * torch.randn(batch, len(priors.free), generator=generator)
        simulator = Simulator(
            Optics(table), kernel.expand(batch, -1, -1), torch.full((batch,), SCALE), (PIXELS, PIXELS)
        )
        sources = source.expand(batch, -1, -1)
        data = torch.zeros(batch, PIXELS, PIXELS)

        def image(
            w: torch.Tensor = w, simulator: Simulator = simulator, sources: torch.Tensor = sources
        ) -> torch.Tensor:
            return simulator.image(canonical(priors(w)), sources)

        def gradient(w: torch.Tensor = w, data: torch.Tensor = data, image: Callable = image) -> torch.Tensor:
            at = w.clone().requires_grad_()
            return torch.autograd.grad(-0.5 * (image(at) - data).square().sum(), at)[0]

        with torch.no_grad():
            forward = fastest(image)
        both = fastest(gradient)
        report("image", 1e3 * forward / batch, batch=batch)
        report("value and gradient", 1e3 * both / batch, batch=batch, times_the_image=round(both / forward, 2))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    report("peak memory", 0.0, MB=round(memory))

    model = LensModel(["EPL", "SHEAR"])
    keywords = [
        {"theta_E": 1.2, "gamma": 2.1, "e1": 0.1, "e2": 0.05, "center_x": 0.0, "center_y": 0.0},
        {"gamma1": 0.02, "gamma2": 0.01},
    ]
    axis = (np.arange(PIXELS) - (PIXELS - 1) / 2) * SCALE
    grid_x, grid_y = (grid.ravel() for grid in np.meshgrid(axis, axis))

    def theirs() -> np.ndarray:
        beta = model.ray_shooting(grid_x, grid_y, keywords)
        rays = map_coordinates(source.numpy(), [b / 2.0 * 64 + 31.5 for b in beta[::-1]], order=1)
        return fftconvolve(rays.reshape(PIXELS, PIXELS), kernel.numpy(), mode="same")

    report("image, lenstronomy rays and SciPy", 1e3 * fastest(theirs), batch=1)


if __name__ == "__main__":
    main()
