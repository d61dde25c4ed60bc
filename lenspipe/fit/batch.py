"""The work on one batch of lenses of one shape: MAP, posterior, diagnostics and pictures; it is a part of its shard.

A lens that cannot be fitted is a failure with its reason; the rest of its batch is fitted without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from lenspipe import artefact
from lenspipe.catalogue.reading import read_batch
from lenspipe.config import Config, load_config
from lenspipe.errors import DeviceError, in_one_line
from lenspipe.fit import chains, derived, diagnostics, exploration, hmc, map_search, reference
from lenspipe.fit.model import LensModel
from lenspipe.fit.parts import write_part
from lenspipe.lens.coordinates import ellipticity
from lenspipe.memory import device_failed, give_back_memory, keep_freed_memory, out_of_memory
from lenspipe.optics import read_optics
from lenspipe.posteriors.store import interchangeable, parameter_names
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from lenspipe.seeds import seed_for
from lenspipe.source.base import Source
from lenspipe.source.prior import read_source_prior

log = logging.getLogger("lenspipe")

PRECISION = torch.float32  # of images and products of Jacobians; chi^2 and all linear algebra are in float64
NO_MEMORY = "there was not memory enough for it alone: "  # begins the reason of a lens that another machine may fit
PICTURE_DRAWS = 100  # draws that go into the posterior mean and spread of images


@dataclass(frozen=True)
class Task:
    """One batch: everything a worker needs, small enough to send."""

    config: str
    paths: Results
    bucket: str
    names: tuple[str, ...]
    hashes: tuple[str, ...] = ()  # of what decides the result of each lens
    shard: int = 0
    draws_factor: int = 1  # how many times the draws of the settings are made, of which as many as always are kept

    def of(self, names: tuple[str, ...]) -> Task:
        """The same task for some of its lenses."""
        hashes = dict(zip(self.names, self.hashes, strict=False))
        return replace(self, names=names, hashes=tuple(hashes[name] for name in names if name in hashes))


Result = tuple[Task, list[Path], dict[str, str]]  # with the parts that were written, and failures with their reasons


def device() -> torch.device:
    """The GPU that this process may use, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit_task(task: Task) -> Result:
    """Fit one batch; where it fails, every lens alone, so that one bad lens does not take the others with it.

    Only numerical errors are a lens's own; others, of files and settings, are raised, as is that of a GPU that failed.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        return task, [write_part(task.paths.parts(task.shard), fit_lenses(task))], {}
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        log.warning("failed: %s", " ".join(task.names), exc_info=True)
        if device_failed(error) and not out_of_memory(error):
            raise DeviceError(f"the GPU has failed: {in_one_line(error)}; run again: what is done is kept") from error
        if len(task.names) == 1:
            return task, [], {task.names[0]: NO_MEMORY * out_of_memory(error) + in_one_line(error)}
        pieces = halves(task) if out_of_memory(error) else one_by_one(task)
    give_back_memory()
    again = [fit_task(piece) for piece in pieces]
    failures = {name: reason for _, _, failed in again for name, reason in failed.items()}
    return task, [part for _, parts, _ in again for part in parts], failures


def halves(task: Task) -> list[Task]:
    """Two tasks with half of the lenses each."""
    middle = len(task.names) // 2
    return [task.of(task.names[:middle]), task.of(task.names[middle:])]


def one_by_one(task: Task) -> list[Task]:
    """A task for every lens."""
    return [task.of((name,)) for name in task.names]


def build_model(config: Config, paths: Results, bucket: str, names: list[str]) -> LensModel:
    """The model of the named lenses of one bucket, from the files of the earlier stages, on this process's device."""
    at = device()
    batch = read_batch(paths.catalogue, bucket, names, PRECISION).to(device=at)
    optics = read_optics(config, paths.deflection_table, PRECISION, at)
    return LensModel(batch, PriorMap(config.priors.expressions()), source_of(paths.source_prior, at), optics)


def source_of(path: Path, at: torch.device) -> Source:
    """The source prior of a run, read once by a process: making its sketch takes as long as searching a small lens."""
    found = path.stat() if path.is_file() else None
    source = _source(path, (found.st_mtime_ns, found.st_ino, found.st_size) if found else None)
    return source.to(at)  # each time: what is done on the processor at the end of a batch takes it there


@lru_cache(maxsize=1)
def _source(path: Path, stamp: tuple[int, int, int] | None) -> Source:
    return read_source_prior(path)


def fit_lenses(task: Task) -> xr.Dataset:
    """MAP and posterior of the lenses of one batch, as a dataset in the layout of `lenspipe.posteriors.store`.

    What the search found is kept with the chains in a checkpoint, from which a killed batch goes on.
    """
    config = load_config(json.loads(task.config))
    model = build_model(config, task.paths, task.bucket, list(task.names))
    settings = config.fit
    checkpoint = batch_checkpoint(task)
    saved = checkpoint.load(model.data.device)
    found = map_search.restored(saved)
    if found is None:
        found = SEARCHES[settings.search](model, settings, _generators(config.seed, "map", task.names))
        if not bool(torch.isfinite(found.log_density).all()):
            raise ArithmeticError("no start of the MAP search reached a finite log posterior")
        found = exploration.explored(model, found, settings, _generators(config.seed, "explore", task.names))
        for name, value in zip(task.names, found.log_density.tolist(), strict=True):
            log.info("%s: maximum found, log posterior %.1f", name, value)
        checkpoint.searched = checkpoint.seconds
        checkpoint.save(map_search.as_tensors(found))
    else:
        checkpoint.resume(saved)
        log.info("goes on from its checkpoint")
    generators = _generators(config.seed, "hmc", task.names)
    if settings.sampler == "hmc":
        draws = chains.sample(model, found, settings, generators, monitored(model), checkpoint, task.draws_factor)
    else:
        longer = settings.model_copy(update={"draws": settings.draws * task.draws_factor})
        draws = reference.SAMPLERS[settings.sampler](*on_processor(model, found), longer, generators)
        draws = chains.thinned(draws, settings.draws)
    checkpoint.path.unlink(missing_ok=True)
    seconds, seconds_map = (value / len(task.names) for value in (checkpoint.seconds, checkpoint.searched))
    result = _dataset(*on_processor(model, found), hmc.Draws(**tensors_of(draws)))
    return result.assign(
        hash=("lens", np.array(task.hashes, dtype=object)),
        draws_factor=("lens", np.full(len(task.names), task.draws_factor)),
        seconds_map=("lens", np.full(len(task.names), seconds_map)),
        seconds=("lens", np.full(len(task.names), seconds)),
    )


def batch_checkpoint(task: Task) -> chains.Checkpoint:
    """The checkpoint of a batch: of its lenses, all that decides their results, and the code."""
    key = {
        "names": list(task.names),
        "hashes": list(task.hashes),
        "draws_factor": task.draws_factor,
        "versions": artefact.versions(),
        "commit": artefact.git_commit(),
    }
    name = hashlib.sha256(json.dumps([task.bucket, key["names"]]).encode()).hexdigest()[:16]
    return chains.Checkpoint(task.paths.checkpoints / f"{name}.safetensors", key)


def monitored(model: LensModel) -> list[int]:
    """Columns of w whose chains must agree: all named parameters but those that others can stand in for."""
    return [column for column, name in enumerate(model.priors.free) if not interchangeable(name)]


def on_processor(model: LensModel, found: map_search.MapFit) -> tuple[LensModel, map_search.MapFit]:
    """Model and maximum off the GPU, for what is done once a lens, and for Pyro."""
    at = torch.device("cpu")
    optics = replace(model.optics, deflection=model.optics.deflection and model.optics.deflection.to(device=at))
    moved = LensModel(model.batch.to(device=at), model.priors, model.source.to(at), optics)
    return moved, map_search.MapFit(**tensors_of(found))


def tensors_of(record: map_search.MapFit | hmc.Draws) -> dict[str, torch.Tensor]:
    """The fields of a record of tensors, off the GPU."""
    return {field.name: getattr(record, field.name).cpu() for field in fields(record)}


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
    data["latent"] = ((*chain_draw, "source_unknown"), model.split(draws.w)[1].numpy().astype("float32"))
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
    data["bfmi_min"] = ("lens", draws.bfmi.numpy())
    data |= {f"{name}_map": ("lens", values) for name, values in derived.geometry(model, found.w).items()}
    data["arc_snr"] = ("lens", derived.lensed_signal_to_noise(model, found.w))
    data |= _critical_curves(model, found.w, draws.w)
    data |= diagnostics.variables(model, found, draws)
    data["basin_parameters"] = (("lens", "basin", "parameter"), _of_basins(model, found, xr.Dataset(data)))
    return xr.Dataset(data | _pictures(model, found.w, draws.w))


def _critical_curves(
    model: LensModel, w_map: torch.Tensor, draws: torch.Tensor
) -> dict[str, tuple[object, np.ndarray]]:
    """Critical curve and caustic at the MAP, and the Einstein radius that follows from the curves of spread draws."""
    chosen = diagnostics.spread(draws, PICTURE_DRAWS)
    found = [derived.critical_curves(model, i, torch.cat([w_map[i : i + 1], chosen[i]])) for i in range(len(w_map))]
    curves, caustics = (np.stack([both[i] for both in found]) for i in (0, 1))
    lens, point = curves.shape[0], ("lens", "curve_point", "axis")
    radii = derived.equal_area_radius(curves.reshape(-1, *curves.shape[2:])).reshape(lens, -1)
    return {
        "critical_curve": (point, curves[:, 0]),
        "caustic": (point, caustics[:, 0]),
        "einstein_radius": (("lens", "sample"), radii[:, 1:]),
    }


def _of_basins(model: LensModel, found: map_search.MapFit, data: xr.Dataset) -> np.ndarray:
    """Parameters [lens, basin, parameter] of the search's solutions, in the order of `parameter_names`."""
    reported = _reported(model, found.basins_w.flatten(0, 1))
    columns = torch.stack([reported[name] for name in parameter_names(data)], -1)
    return columns.unflatten(0, found.basins_w.shape[:2]).numpy().astype("float64")


def _reported(model: LensModel, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Named parameters of config and canonical ones, e1 and e2 always among them; w: [n, size]."""
    p = model.parameters(w)
    if "e1" not in p:
        p["e1"], p["e2"] = ellipticity(p["q"], p["phi"])
    return p


def mean_and_sd(pictures: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of two or more pictures, held one at a time (Welford 1962), in their precision."""
    mean = squares = torch.zeros((), dtype=torch.float64)
    for number, picture in enumerate(pictures, 1):
        step = picture.double() - mean
        mean = mean + step / number
        squares = squares + step * (picture.double() - mean)
    return mean.to(picture.dtype), (squares / (number - 1)).sqrt().to(picture.dtype)


def _pictures(model: LensModel, w_map: torch.Tensor, draws: torch.Tensor) -> dict[str, tuple[object, np.ndarray]]:
    """Model and source at the MAP, their mean and spread over draws spread evenly, and fluxes; in image units.

    All pictures of a source are in the frame of its MAP.
    """
    image, source = ("lens", "y", "x"), ("lens", "source_row", "source_column")
    unit = model.batch.flux_unit[:, None, None]
    chosen = diagnostics.spread(draws, PICTURE_DRAWS).unbind(1)
    model_mean, model_sd = mean_and_sd(model.image(w) for w in chosen)
    total, lensed = (torch.stack(f, 1) for f in zip(*(derived.source_fluxes(model, w) for w in chosen), strict=True))
    radius = torch.stack([derived.half_light_radius(model, w) for w in chosen], 1)
    frame = model.source_frame(w_map)
    source_mean, source_sd = mean_and_sd(model.source_plane(w, frame) for w in chosen)
    return {
        "model_map": (image, (unit * model.image(w_map)).numpy()),
        "light_map": (image, (unit * derived.lens_light(model, w_map)).numpy()),
        "model_mean": (image, (unit * model_mean).numpy()),
        "model_sd": (image, (unit * model_sd).numpy()),
        "source_map": (source, (unit * model.source_plane(w_map, frame)).numpy()),
        "source_mean": (source, (unit * source_mean).numpy()),
        "source_sd": (source, (unit * source_sd).numpy()),
        "source_frame": (("lens", "frame"), frame.numpy()),
        "source_total_flux": (("lens", "sample"), (unit[:, 0] * total).numpy()),
        "source_lensed_flux": (("lens", "sample"), (unit[:, 0] * lensed).numpy()),
        "magnification": (("lens", "sample"), (lensed / total).numpy()),
        "source_half_light_radius": (("lens", "sample"), radius.numpy()),
    }
