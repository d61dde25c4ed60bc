"""Stage `deflection_table`: compute the table, measure its error against the independent series, keep both together."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lenspipe import artefact
from lenspipe.config import Config
from lenspipe.config import DeflectionTable as Settings
from lenspipe.errors import InputError
from lenspipe.image.simulator import Optics
from lenspipe.lens.epl import series_deflection, series_terms
from lenspipe.lens.profiles import Composite
from lenspipe.lens.table import DeflectionTable, build_table


def write_deflection_table(settings: Settings, out: Path) -> None:
    """Compute the table of `settings` and write it to `out` (safetensors), with its measured error."""
    table = build_table(
        settings.eta_nodes,
        (settings.q_nodes, settings.q_min),
        (settings.gamma_nodes, settings.gamma_min, settings.gamma_max),
        lambda nodes: track(list(nodes), description="deflection table"),
    )
    record = artefact.provenance(
        "deflection_table", {"deflection_table": settings}, bounds=table.bounds, errors=measure_error(table)
    )
    tensors = {name: getattr(table, name).contiguous() for name in ("q", "gamma", "values", "slopes")}
    with artefact.written_whole(out) as temporary:
        save_file(tensors, temporary, metadata={artefact.KEY: json.dumps(record)})


def read_deflection_table(path: Path) -> DeflectionTable:
    """The table in a file that the stage wrote. Raises InputError where it is missing or not one."""
    if not path.is_file():
        raise InputError(f"{path}: no such deflection table; run the stage deflection_table first")
    try:
        with safe_open(path, framework="pt") as file:
            return DeflectionTable(*(file.get_tensor(name) for name in ("q", "gamma", "values", "slopes")))
    except SafetensorError as error:
        raise InputError(f"{path}: not a deflection table ({error}); remove it and run the stage again") from None


def read_optics(config: Config, path: Path, dtype: torch.dtype) -> Optics:
    """The forward model that config asks for; the table at `path` is read only where it is wanted."""
    if config.lens.deflection == "table":
        deflection: DeflectionTable | int = read_deflection_table(path).to(dtype=dtype)
    else:
        deflection = series_terms(config.deflection_table.q_min)
    components = Composite(config.lens.components) if config.lens.components else None
    return Optics(deflection, config.lens.supersampling, config.lens.source_interpolation, components)


def measure_error(table: DeflectionTable, points: int = 400) -> dict[str, float]:
    """Greatest error of the deflection and of its derivatives, at random points between the nodes, in float64.

    `max_error` is absolute, for theta_E = 1 and radii from 0.1 to 3; `max_gradient_error` that of the derivatives with
    respect to q and gamma on the same points, relative to the greatest of them.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = table.bounds
    q, gamma = (
        low + (high - low) * torch.rand(points, generator=generator, dtype=torch.float64)
        for low, high in (bounds["q"], bounds["gamma"])
    )
    angle = 2 * torch.pi * torch.rand(points, 200, generator=generator, dtype=torch.float64)
    radius = 0.1 + 2.9 * torch.rand(points, 200, generator=generator, dtype=torch.float64)
    x, y = radius * torch.cos(angle), radius * torch.sin(angle)
    terms = series_terms(bounds["q"][0])

    def tabulated(q: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return torch.stack(table.deflection(x, y, gamma, q))

    def exact(q: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return torch.stack(series_deflection(x, y, gamma[:, None], q[:, None], terms))

    errors = [float((tabulated(q, gamma) - exact(q, gamma)).abs().max())]
    for direction in ((torch.ones_like(q), torch.zeros_like(q)), (torch.zeros_like(q), torch.ones_like(q))):
        a, b = (torch.func.jvp(f, (q, gamma), direction)[1] for f in (tabulated, exact))
        errors.append(float((a - b).abs().max() / b.abs().max()))
    return {"max_error": errors[0], "max_gradient_error": max(errors[1:])}
