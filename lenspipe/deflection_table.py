"""Stage `deflection_table`: compute the table, measure its error against the independent series, keep both together."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from lenspipe import artefact
from lenspipe.config import DeflectionTable as Settings
from lenspipe.lens.epl import series_deflection
from lenspipe.lens.table import DeflectionTable, build_table
from lenspipe.tensors import read_tensors, write_tensors

TENSORS = ("q", "gamma", "values", "slopes")  # of a table, in the order it takes them


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
    write_tensors(out, {name: getattr(table, name) for name in TENSORS}, record)


def read_deflection_table(path: Path) -> DeflectionTable:
    """The table in a file that the stage wrote. Raises InputError where it is missing or not one."""

    def build(tensors: dict[str, Tensor], record: object) -> DeflectionTable:
        return DeflectionTable(*(tensors[name] for name in TENSORS))

    return read_tensors(path, "a deflection table", "deflection_table", build)


def measure_error(table: DeflectionTable, points: int = 400) -> dict[str, float]:
    """Greatest errors at random points between the nodes, in float64, for theta_E = 1.

    `max_error`: of the deflection on the unit circle; `max_error_any_radius`: at radii from 1e-3 to 10;
    `max_gradient_error`: at those, of its derivatives with respect to x, y, q and gamma, each relative to its own
    length at that point, or to a thousandth of its greatest length at that radius where it is shorter.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = table.bounds
    q, gamma = (
        low + (high - low) * torch.rand(points, generator=generator, dtype=torch.float64)
        for low, high in (bounds["q"], bounds["gamma"])
    )
    angle = 2 * torch.pi * torch.rand(points, 200, generator=generator, dtype=torch.float64)
    radius = 10 ** (4 * torch.rand(points, 1, generator=generator, dtype=torch.float64) - 3)
    one, zero = torch.ones_like(q), torch.zeros_like(q)

    def tabulated(x: torch.Tensor, y: torch.Tensor, q: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return torch.stack(table.deflection(x, y, one, gamma, q, zero, zero, zero))

    def exact(x: torch.Tensor, y: torch.Tensor, q: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return torch.stack(series_deflection(x, y, gamma[:, None], q[:, None]))

    unit = torch.cos(angle), torch.sin(angle), q, gamma
    at = radius * unit[0], radius * unit[1], q, gamma
    on_circle, anywhere = (float((tabulated(*points) - exact(*points)).abs().max()) for points in (unit, at))
    errors = []
    for index in range(4):
        direction = tuple(torch.full_like(v, float(i == index)) for i, v in enumerate(at))
        a, b = (torch.func.jvp(f, at, direction)[1] for f in (tabulated, exact))
        length = b.norm(dim=0)
        scale = torch.maximum(length, 1e-3 * length.amax(1, keepdim=True))
        errors.append(float(((a - b).norm(dim=0) / scale).max()))
    return {"max_error": on_circle, "max_error_any_radius": anywhere, "max_gradient_error": max(errors)}
