"""Stage `fit`: MAP and posterior of every lens of a shard of the catalogue.

The lenses of one shape are cut into batches; each batch is one Dask task. A lens that cannot be fitted is a row of the
shard's manifest with its reason; the rest of its batch is fitted without it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr

from lenspipe import artefact
from lenspipe.artefact import content_hash
from lenspipe.catalogue.stage import read_batch, read_catalogue
from lenspipe.config import Config, load_config
from lenspipe.errors import InputError
from lenspipe.fit import chains, cluster, derived, diagnostics, hmc, map_search, reference
from lenspipe.fit.model import LensModel
from lenspipe.fit.progress import progress
from lenspipe.lens.coordinates import ellipticity
from lenspipe.memory import free_memory, keep_freed_memory
from lenspipe.optics import read_optics
from lenspipe.posterior.store import SOURCE_PARAMETERS
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from lenspipe.seeds import seed_for
from lenspipe.source.prior import read_source_prior

PRECISION = torch.float32  # of images; sums over pixels and all linear algebra are in float64
BYTES_PER_RAY = 250  # that a chain takes for its gradient
LARGEST_BATCH = 64  # lenses
PICTURE_DRAWS = 100  # draws that go into the posterior mean and spread of images


@dataclass(frozen=True)
class Task:
    """One batch: everything a worker needs, small enough to send."""

    config: str
    paths: Results
    bucket: str
    names: tuple[str, ...]


def fit_shard(config: Config, paths: Results, shard: int, workers: int | None = 1) -> None:
    """Fit the lenses of one shard; write its manifest (shard-0000.csv) and `shard-0000.zarr` beside it.

    workers: greatest number of processes on this machine that fit batches side by side, one thread each; 1 fits in this
    process, None is one for each GPU or processor. With a cluster elsewhere it has no meaning.
    """
    size, catalogue = config.fit.shard_size, read_catalogue(paths.catalogue)
    shards = -(-len(catalogue) // size)
    if not 0 <= shard < shards:
        raise InputError(f"no shard {shard}: the catalogue {paths.catalogue} has {shards}, the first is 0")
    lenses = catalogue.iloc[shard * size : (shard + 1) * size]
    workers = cluster.side_by_side(config.cluster, workers)
    tasks = list(_tasks(config, paths, lenses, workers))
    fitted: dict[str, list[xr.Dataset]] = {}
    reasons = dict(zip(lenses["name"], lenses["reason"], strict=True))
    logs = paths.fit_logs / f"shard-{shard:04d}"
    with progress(sum(len(task.names) for task in tasks)) as advance:
        for task, result, reason in cluster.run(tasks, fit_task, config.cluster, _halves, workers, logs):
            _, datasets, failures = result or (task, [], dict.fromkeys(task.names, reason))
            fitted.setdefault(task.bucket, []).extend(datasets)
            reasons |= failures
            advance(len(task.names), len(failures))
    used = {name: getattr(config, name) for name in ("lens", "priors", "fit")}
    files = [paths.catalogue, paths.source_prior, paths.deflection_table]
    out = paths.manifest(shard)
    record = artefact.provenance("fit", used, files, config.seed, shard=shard, lenses=len(lenses))
    with artefact.written_whole(out.with_suffix(".zarr")) as store, artefact.written_whole(out) as manifest:
        _write_store(store, fitted, record)
        rows = [
            {"name": n, "status": "failed" if reason else "fitted", "reason": reason} for n, reason in reasons.items()
        ]
        pd.DataFrame(rows).to_csv(manifest, index=False)
    _remove_shards_beyond(shards, out.parent)


def _remove_shards_beyond(shards: int, folder: Path) -> None:
    """Remove what an earlier run of more lenses or smaller shards left: it would be read with the new ones."""
    for path in folder.glob("shard-*"):
        if int(path.stem.split("-")[1]) >= shards:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _tasks(config: Config, paths: Results, lenses: pd.DataFrame, workers: int) -> Iterator[Task]:
    text = config.model_dump_json()
    for bucket, members in lenses[lenses["status"] == "usable"].groupby("bucket", sort=True):
        names = members["name"].tolist()
        size = config.fit.batch_size
        if size == "auto":
            shape = tuple(int(side) for side in re.findall(r"\d+", str(bucket))[:2])
            size = automatic_batch(config, shape, len(names), workers)  # type: ignore[arg-type]
        for first in range(0, len(names), size):
            yield Task(text, paths, str(bucket), tuple(names[first : first + size]))


def automatic_batch(config: Config, shape: tuple[int, int], lenses: int, workers: int) -> int:
    """How many lenses of images of this shape to fit together: an even share for each worker, half the free memory."""
    rays = shape[0] * shape[1] * config.lens.supersampling**2
    held = free_memory() / 2 / workers / (BYTES_PER_RAY * config.fit.chains * rays)
    return int(max(1, min(held, -(-lenses // workers), LARGEST_BATCH)))


def device() -> torch.device:
    """The GPU that this process may use, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


Result = tuple[Task, list[xr.Dataset], dict[str, str]]


def _one_by_one(task: Task) -> list[Task]:
    return [replace(task, names=(name,)) for name in task.names]


def fit_task(task: Task) -> Result:
    """Fit one batch; where it fails, every lens alone, so that one bad lens does not take the others with it.

    Only numerical errors are a lens's own; others, of files and settings, are raised.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        return task, [fit_lenses(task)], {}
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        cluster.log.warning("failed: %s", " ".join(task.names), exc_info=True)
        if len(task.names) == 1:
            return task, [], {task.names[0]: f"{type(error).__name__}: {' '.join(str(error).split())}"}
        parts = _halves(task) if out_of_memory(error) else _one_by_one(task)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    again = [fit_task(part) for part in parts]
    failures = {name: reason for _, _, failed in again for name, reason in failed.items()}
    return task, [dataset for _, datasets, _ in again for dataset in datasets], failures


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory was too small, of a GPU or of the machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _halves(task: Task) -> list[Task]:
    middle = len(task.names) // 2
    return [replace(task, names=task.names[:middle]), replace(task, names=task.names[middle:])]


def build_model(config: Config, paths: Results, bucket: str, names: list[str]) -> LensModel:
    """The model of the named lenses of one bucket, from the files of the earlier stages, on this process's device."""
    at = device()
    batch = read_batch(paths.catalogue, bucket, names, PRECISION).to(device=at)
    optics = read_optics(config, paths.deflection_table, PRECISION, at)
    return LensModel(batch, PriorMap(config.priors.expressions()), read_source_prior(paths.source_prior).to(at), optics)


def fit_lenses(task: Task) -> xr.Dataset:
    """MAP and posterior of the lenses of one batch, as a dataset in the layout of `lenspipe.posterior.store`.

    What the search found is kept with the chains in a checkpoint, from which a killed batch goes on.
    """
    config = load_config(json.loads(task.config))
    model = build_model(config, task.paths, task.bucket, list(task.names))
    checkpoint = batch_checkpoint(config, task)
    began = time.perf_counter()
    found = map_search.restored(checkpoint.load(), model.data.device)
    if found is None:
        found = SEARCHES[config.fit.search](model, config.fit, _generators(config.seed, "map", task.names))
        if not bool(torch.isfinite(found.log_density).all()):
            raise ArithmeticError("no start of the MAP search reached a finite log posterior")
    seconds_map = (time.perf_counter() - began) / len(task.names)
    generators = _generators(config.seed, "hmc", task.names)
    if config.fit.sampler == "hmc":
        draws = chains.sample(model, found, config.fit, generators, monitored(model), checkpoint)
    else:
        draws = reference.SAMPLERS[config.fit.sampler](model, found, config.fit, generators)
    seconds = (time.perf_counter() - began) / len(task.names)
    checkpoint.path.unlink(missing_ok=True)
    result = _dataset(*on_processor(model, found, draws))
    return result.assign(
        seconds_map=("lens", np.full(len(task.names), seconds_map)), seconds=("lens", np.full(len(task.names), seconds))
    )


def batch_checkpoint(config: Config, task: Task) -> chains.Checkpoint:
    """The checkpoint of a batch: of its lenses, the settings that fits depend on, and the files of earlier stages."""
    files = [task.paths.catalogue, task.paths.source_prior, task.paths.deflection_table]
    key = {
        "names": list(task.names),
        "settings": config.model_dump(mode="json", include={"seed", "lens", "priors", "fit"}),
        "files": {str(path): content_hash(path) for path in files if path.exists()},
        "versions": artefact.versions(),
        "commit": artefact.git_commit(),
    }
    name = hashlib.sha256(json.dumps([task.bucket, key["names"]]).encode()).hexdigest()[:16]
    return chains.Checkpoint(task.paths.fit / "checkpoints" / f"{name}.safetensors", key)


def monitored(model: LensModel) -> list[int]:
    """Columns of w whose chains must agree: all named parameters but the source's, which its latents can stand for."""
    return [column for column, name in enumerate(model.priors.free) if name not in SOURCE_PARAMETERS]


def on_processor(
    model: LensModel, found: map_search.MapFit, draws: hmc.Draws
) -> tuple[LensModel, map_search.MapFit, hmc.Draws]:
    """Model and results off the GPU, for what is done once a lens."""
    at = torch.device("cpu")
    optics = replace(model.optics, deflection=model.optics.deflection and model.optics.deflection.to(device=at))
    moved = LensModel(model.batch.to(device=at), model.priors, model.source.to(at), optics)
    return moved, map_search.MapFit(**tensors_of(found, at)), hmc.Draws(**tensors_of(draws, at))


def tensors_of(record: map_search.MapFit | hmc.Draws, at: torch.device) -> dict[str, torch.Tensor]:
    """The fields of a record of tensors, on a device."""
    return {field.name: getattr(record, field.name).to(at) for field in fields(record)}


SEARCHES = {"gauss_newton": map_search.search, "adam": reference.adam_search}


def _generators(seed: int, purpose: str, names: tuple[str, ...]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed_for(seed, purpose, name)) for name in names]


@torch.no_grad()
def _dataset(model: LensModel, found: map_search.MapFit, draws: hmc.Draws) -> xr.Dataset:
    lenses, number_of_chains, number = draws.w.shape[:3]
    chain_draw = ("lens", "chain", "draw")
    flat = draws.w.flatten(0, 2)
    data: dict[str, tuple[object, np.ndarray]] = {"name": ("lens", np.array(model.batch.names, dtype=object))}
    for name, value in _reported(model, flat).items():
        data[name] = (chain_draw, value.reshape(lenses, number_of_chains, number).numpy().astype("float32"))
    data["latent"] = ((*chain_draw, "latent"), model.split(draws.w)[1].numpy().astype("float32"))
    for name in ("log_density", "acceptance", "diverging", "energy"):
        data[name] = (chain_draw, getattr(draws, name).numpy())
    for name, value in _reported(model, found.w).items():
        data[f"{name}_map"] = ("lens", value.numpy().astype("float64"))
    usable = model.batch.usable.sum((-2, -1))
    data["pixels"] = ("lens", usable.numpy())
    data["chi2_per_pixel"] = ("lens", (model.residuals(found.w).double().square().sum((-2, -1)) / usable).numpy())
    data["log_density_map"] = ("lens", found.log_density.numpy())
    data["start_log_density"] = (("lens", "start"), found.start_log_density.numpy())
    data["converged"] = ("lens", found.converged.numpy())
    data["step_size"] = ("lens", draws.step_size.numpy())
    data |= {f"{name}_map": ("lens", values) for name, values in derived.geometry(model, found.w).items()}
    data |= diagnostics.variables(model, found, draws)
    return xr.Dataset(data | _pictures(model, found.w, draws.w))


def _reported(model: LensModel, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Named parameters of config and canonical ones, e1 and e2 always among them; w: [n, size]."""
    p = model.parameters(w)
    if "e1" not in p:
        p["e1"], p["e2"] = ellipticity(p["q"], p["phi"])
    return p


def _pictures(model: LensModel, w_map: torch.Tensor, draws: torch.Tensor) -> dict[str, tuple[object, np.ndarray]]:
    """Model and source at the MAP, their mean and spread over draws spread evenly, and fluxes; in image units.

    All pictures of a source are in the frame of its MAP.
    """
    image, source = ("lens", "y", "x"), ("lens", "source_row", "source_column")
    unit = model.batch.flux_unit[:, None, None]
    flat = draws.flatten(1, 2)
    chosen = flat[:, torch.linspace(0, flat.shape[1] - 1, min(PICTURE_DRAWS, flat.shape[1])).long()].unbind(1)
    models = torch.stack([model.image(w) for w in chosen])
    total, lensed = (torch.stack(f, 1) for f in zip(*(derived.source_fluxes(model, w) for w in chosen), strict=True))
    frame = model.source_frame(w_map)
    sources = torch.stack([model.source_plane(w, frame) for w in chosen])
    return {
        "model_map": (image, (unit * model.image(w_map)).numpy()),
        "model_mean": (image, (unit * models.mean(0)).numpy()),
        "source_map": (source, (unit * model.source_plane(w_map, frame)).numpy()),
        "source_mean": (source, (unit * sources.mean(0)).numpy()),
        "source_sd": (source, (unit * sources.std(0)).numpy()),
        "source_frame": (("lens", "frame"), frame.numpy()),
        "source_total_flux": (("lens", "sample"), (unit[:, 0] * total).numpy()),
        "source_lensed_flux": (("lens", "sample"), (unit[:, 0] * lensed).numpy()),
        "magnification": (("lens", "sample"), (lensed / total).numpy()),
    }


def _write_store(store: Path, fitted: dict[str, list[xr.Dataset]], record: dict[str, Any]) -> None:
    zarr.open_group(store, mode="w").attrs[artefact.KEY] = record
    for bucket, datasets in fitted.items():
        if datasets:
            group = xr.concat(datasets, dim="lens").sortby("name")
            chunks = {n: {"chunks": (min(10, v.shape[0]), *v.shape[1:])} for n, v in group.items()}
            group.to_zarr(store, group=bucket, mode="a", zarr_format=3, consolidated=False, encoding=chunks)
