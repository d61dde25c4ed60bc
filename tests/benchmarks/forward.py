"""Speed of the forward model beside its peers, one JSON line a measurement: `python tests/benchmarks/forward.py`.

Images of an elliptical power law with shear, 256 x 256 pixels in single precision, one ray a pixel, a Gaussian PSF of
17 x 17 pixels, and either a Sersic source or an image of 64 x 64 pixels. `gradient` is the log-likelihood with its
gradient with respect to every parameter and, where the source is an image, to its pixels. Times are ms an image, the
fastest of several runs. Peers that are installed (`pip install ".[peers]"`) are run in turn on the same cores: compare
lines of one run only. `peak memory` is that of a process that does all of a package's measurements of one batch size.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from lenspipe.config import Config
from lenspipe.image import light
from lenspipe.image.psf import gaussian_kernel
from lenspipe.image.simulator import Optics, Simulator, canonical
from lenspipe.lens.epl import series_deflection, series_terms
from lenspipe.lens.table import DeflectionTable, build_table
from lenspipe.memory import keep_freed_memory

PIXELS, SCALE, RAYS, REPEATS = 256, 0.03, 1_000_000, 7
BATCHES = (1, 8, 32)
KERNEL = gaussian_kernel(2.0)
SOURCE = gaussian_kernel(7.0, 32)[:64, :64] / gaussian_kernel(7.0, 32).max()
MASS = {"theta_E": 1.2, "gamma": 2.1, "e1": 0.1, "e2": 0.05, "center_x": 0.01, "center_y": -0.02}
SHEAR = {"gamma1": 0.03, "gamma2": -0.02}
PLACE = {"source_x": 0.1, "source_y": 0.05, "source_size": 2.0, "source_flux": 1.0}
SERSIC = {"amplitude": 1.0, "R_sersic": 0.3, "n_sersic": 1.5, "q": 0.7, "phi": 0.4, "center_x": 0.1, "center_y": 0.05}
GALAXY = {"amp": 1.0, "R_sersic": 0.3, "n_sersic": 1.5, "e1": 0.12, "e2": 0.12, "center_x": 0.1, "center_y": 0.05}
Work = tuple[str, str, Callable[[], object]]


def varied(batch: int, number: int) -> np.ndarray:
    """Factors [batch, number] near 1: every lens of a batch is another."""
    return 1 + 0.05 * np.random.default_rng(0).normal(size=(batch, number))


def fastest(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Milliseconds of the fastest of several runs, after two that do not count."""
    work(), work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def shipped_table() -> DeflectionTable:
    s = Config().deflection_table
    nodes = s.eta_nodes, (s.q_nodes, s.q_min), (s.gamma_nodes, s.gamma_min, s.gamma_max)
    return build_table(*nodes).to(dtype=torch.float32)


def deflections(table: DeflectionTable) -> None:
    """Milliseconds for a million rays of one lens."""
    x, y = torch.randn(2, 1, RAYS, generator=torch.Generator().manual_seed(0))
    zero, one = torch.zeros(1), torch.ones(1)
    gamma, q = torch.tensor([2.1]), torch.tensor([0.5])
    ms = fastest(lambda: table.deflection(x, y, one, gamma, q, zero, zero, zero))
    say(package="lenspipe", what="deflection, table", ms=round(ms, 2))
    for axis_ratio in (0.8, 0.5, 0.1):
        q = torch.tensor([axis_ratio])
        ms = fastest(lambda q=q: series_deflection(x, y, gamma, q), 3)  # type: ignore[misc]
        say(package="lenspipe", what="deflection, series", ms=round(ms, 2), q=axis_ratio, terms=int(series_terms(q)))


def ours(batch: int, table: DeflectionTable) -> Iterator[Work]:
    """Our image and gradient, for either source."""
    psf = torch.from_numpy(KERNEL).float().expand(batch, -1, -1)
    optics = Optics(table, interpolation="bicubic")
    simulator = Simulator(optics, psf, torch.full((batch,), SCALE), (PIXELS, PIXELS))
    data = torch.zeros(batch, PIXELS, PIXELS)
    lens = MASS | SHEAR
    names = {"sersic": [*lens, *(f"s_{name}" for name in SERSIC)], "pixels": [*lens, *PLACE]}
    start = {"sersic": [*lens.values(), *SERSIC.values()], "pixels": [*lens.values(), *PLACE.values()]}
    stamp = torch.from_numpy(SOURCE).float().expand(batch, -1, -1).clone()
    for kind in ("sersic", "pixels"):
        values = torch.from_numpy(np.array(start[kind]) * varied(batch, len(names[kind]))).float()

        def image(values: torch.Tensor, stamp: torch.Tensor, kind: str = kind) -> torch.Tensor:
            p = canonical(dict(zip(names[kind], values.unbind(1), strict=True)))
            if kind == "pixels":
                return simulator.image(p, stamp)
            own = {name: p[f"s_{name}"][:, None, None] for name in SERSIC}
            return simulator.image(p, partial(light.sersic, **own))

        def value(values: torch.Tensor = values, stamp: torch.Tensor = stamp, image: Callable = image) -> torch.Tensor:
            with torch.no_grad():
                return image(values, stamp)

        def gradient(values: torch.Tensor = values, kind: str = kind, image: Callable = image) -> object:
            at = [values.clone().requires_grad_(), stamp.clone().requires_grad_()]
            loss = -0.5 * (image(*at) - data).square().sum()
            return torch.autograd.grad(loss, at if kind == "pixels" else at[:1])

        yield kind, "image", value
        yield kind, "gradient", gradient


def caustics_work(batch: int, psf_mode: str) -> Iterator[Work]:
    import caustics

    cosmology = caustics.FlatLambdaCDM()
    at = {"cosmology": cosmology, "z_l": 0.5, "z_s": 1.0}
    mass = caustics.EPL(x0=0.01, y0=-0.02, **at)
    mass.to_dynamic()
    shear = caustics.ExternalShear(x0=0.0, y0=0.0, **at)
    lens = caustics.SinglePlane(lenses=[mass, shear], **at)
    for kind in ("sersic", "pixels"):
        if kind == "sersic":
            source = caustics.Sersic()
            begin = [0.1, 0.05, 0.7, 0.4, 1.5, 0.3, 1.0]
        else:
            source = caustics.Pixelated(shape=(64, 64), pixelscale=2.0 / 64)
            begin = [0.1, 0.05, *SOURCE.ravel()]
        simulator = caustics.LensSource(
            lens, source, SCALE, PIXELS, psf=torch.from_numpy(KERNEL).float(), psf_shape=KERNEL.shape, psf_mode=psf_mode
        )
        simulator.to(dtype=torch.float32)
        start = np.array([0.01, -0.02, 0.8, 0.2, 1.2, 1.1, 0.03, -0.02, *begin])
        factors = np.ones((batch, len(start)))
        factors[:, :8] = varied(batch, 8)
        values = torch.from_numpy(start * factors).float()
        if values.shape[1] != sum(int(np.prod(p.shape)) for p in simulator.dynamic_params):
            raise RuntimeError(f"caustics has other parameters: {[p.name for p in simulator.dynamic_params]}")
        image = torch.vmap(simulator, chunk_size=1)

        def loss(one: torch.Tensor, simulator: Callable = simulator) -> torch.Tensor:
            return -0.5 * simulator(one).square().sum()

        def value(values: torch.Tensor = values, image: Callable = image) -> torch.Tensor:
            with torch.no_grad():
                return image(values)

        slope = torch.vmap(torch.func.grad_and_value(loss), chunk_size=1)
        yield kind, "image", value
        yield kind, "gradient", partial(slope, values)


def herculens_work(batch: int) -> Iterator[Work]:
    import jax
    import jax.numpy as jnp
    from herculens.Coordinates.pixel_grid import PixelGrid
    from herculens.Instrument.psf import PSF
    from herculens.LensImage.lens_image import LensImage
    from herculens.LightModel.light_model import LightModel
    from herculens.LightModel.Profiles.pixelated import Pixelated
    from herculens.MassModel.mass_model import MassModel

    clip = jnp.clip  # its interpolator names the bounds as JAX no longer does
    jnp.clip = lambda x, a_min=None, a_max=None, **names: clip(x, a_min, a_max, **names)
    corner = -(PIXELS - 1) / 2 * SCALE
    grid = PixelGrid(PIXELS, PIXELS, np.diag([SCALE, SCALE]), corner, corner)
    psf = PSF(psf_type="PIXEL", kernel_point_source=KERNEL)
    for kind in ("sersic", "pixels"):
        if kind == "sersic":
            source, galaxy = LightModel(["SERSIC_ELLIPSE"]), dict(GALAXY)
        else:
            stamp = Pixelated(interpolation_type="bilinear")
            source = LightModel([stamp], kwargs_pixelated={"num_pixels": 64, "grid_shape": (2.0, 2.0)})
            galaxy = {"pixels": SOURCE}
        model = LensImage(grid, psf, None, MassModel(["EPL", "SHEAR"]), source, None)
        kwargs = [dict(MASS), dict(SHEAR) | {"ra_0": 0.0, "dec_0": 0.0}], [galaxy]
        yield from jax_work(kind, kwargs, lambda lens, light, m=model: m.model(lens, light), batch, jax, jnp)


def lenstronomys_data() -> tuple[object, object]:
    """Its grid and PSF; JAXtronomy uses them too."""
    from lenstronomy.Data.pixel_grid import PixelGrid
    from lenstronomy.Data.psf import PSF

    corner = -(PIXELS - 1) / 2 * SCALE
    grid = PixelGrid(PIXELS, PIXELS, np.diag([SCALE, SCALE]), corner, corner)
    return grid, PSF("PIXEL", kernel_point_source=KERNEL)


def jaxtronomy_work(batch: int) -> Iterator[Work]:
    import jax
    import jax.numpy as jnp
    from jaxtronomy.ImSim.image_model import ImageModel
    from jaxtronomy.LensModel.lens_model import LensModel
    from jaxtronomy.LightModel.light_model import LightModel

    model = ImageModel(*lenstronomys_data(), LensModel(["EPL", "SHEAR"]), LightModel(["SERSIC_ELLIPSE"]))
    kwargs = [dict(MASS), dict(SHEAR) | {"ra_0": 0.0, "dec_0": 0.0}], [dict(GALAXY)]
    yield from jax_work("sersic", kwargs, lambda lens, light: model.image(lens, light), batch, jax, jnp)


def jax_work(kind: str, kwargs: object, image: Callable, batch: int, jax: object, jnp: object) -> Iterator[Work]:
    """Compiled and vectorised over lenses."""
    factors = iter(varied(batch, 1000).T)
    many = jax.tree.map(  # type: ignore[attr-defined]
        lambda v: jnp.asarray(np.multiply.outer(next(factors), v) if np.ndim(v) == 0 else np.tile(v, (batch, 1, 1))),  # type: ignore[attr-defined]
        kwargs,
    )
    many = jax.tree.map(lambda v: v.astype(jnp.float32), many)  # type: ignore[attr-defined]

    def loss(kwargs: tuple) -> object:
        return -0.5 * (image(*kwargs) ** 2).sum()

    value = jax.jit(jax.vmap(lambda kwargs: image(*kwargs)))  # type: ignore[attr-defined]
    slope = jax.jit(jax.vmap(jax.value_and_grad(loss)))  # type: ignore[attr-defined]
    yield kind, "image", lambda: jax.block_until_ready(value(many))  # type: ignore[attr-defined]
    yield kind, "gradient", lambda: jax.block_until_ready(slope(many))  # type: ignore[attr-defined]


def lenstronomy_work(batch: int) -> Iterator[Work]:
    from lenstronomy.ImSim.image_model import ImageModel
    from lenstronomy.LensModel.lens_model import LensModel
    from lenstronomy.LightModel.light_model import LightModel

    model = ImageModel(*lenstronomys_data(), LensModel(["EPL", "SHEAR"]), LightModel(["SERSIC_ELLIPSE"]))
    yield "sersic", "image", lambda: [model.image([MASS, SHEAR], [GALAXY]) for _ in range(batch)]


PEERS: dict[str, Callable[[int], Iterator[Work]]] = {
    "lenspipe": lambda batch: ours(batch, shipped_table()),
    "caustics, PSF by conv2d": partial(caustics_work, psf_mode="conv2d"),
    "caustics, PSF by FFT": partial(caustics_work, psf_mode="fft"),
    "herculens": herculens_work,
    "jaxtronomy": jaxtronomy_work,
    "lenstronomy": lenstronomy_work,
}


def measure(package: str, work: Iterator[Work], batch: int) -> None:
    for source, what, run in work:
        say(package=package, what=what, source=source, batch=batch, ms=round(fastest(run) / batch, 2))


def one(package: str, batch: int) -> None:
    """All measurements of one package at one batch size, and the peak memory of the process."""
    if package == "lenspipe":
        keep_freed_memory()
    measure(package, PEERS[package](batch), batch)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    say(package=package, what="peak memory", batch=batch, MB=round(megabytes))


def main() -> None:
    if len(sys.argv) > 1:
        one(sys.argv[1], int(sys.argv[2]))
        return
    say(threads=torch.get_num_threads(), pixels=PIXELS, kernel=list(KERNEL.shape))
    keep_freed_memory()
    deflections(shipped_table())
    for batch in BATCHES:
        for package in PEERS:  # each in a process of its own: one that runs out of memory ends alone
            command = [sys.executable, "-W", "ignore", __file__, package, str(batch)]
            ended = subprocess.run(command, text=True, stderr=subprocess.PIPE)
            if ended.returncode:
                last = ended.stderr.strip().splitlines()[-1:] or [f"killed by signal {-ended.returncode}"]
                say(package=package, batch=batch, failed=last[0][:200])


if __name__ == "__main__":
    main()
