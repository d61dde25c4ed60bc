"""Batches: what fits into the memory, what fails, what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.ndimage import convolve
from torch import Tensor

from lenspipe import memory
from lenspipe.config import Config, Fit
from lenspipe.errors import DeviceError
from lenspipe.fit import batch, chains, hmc, map_search, stage
from lenspipe.fit.batch import Task
from lenspipe.fit.model import LensModel
from lenspipe.fit.parts import read_part
from lenspipe.image.light import Light
from lenspipe.image.simulator import Optics, Simulator, canonical
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from tests.lenses import NOISE, TABLE, Blobs


def test_a_lens_does_not_depend_on_its_batch(model: tuple[LensModel, Tensor]) -> None:
    """Search and chains, the metric refreshed on the way, in double precision: alone, or in batches of 3, 8 and 64."""
    lens_model, truth = model
    settings = Fit(
        starts=4,
        survivors=2,
        scout_pixels=12,
        temperatures=(10.0,),
        settling_temperatures=(3.0, 1.0),
        steps_per_temperature=4,
        final_steps=6,
        chains=2,
        warmup=20,
        draws=20,
        max_leapfrog_steps=2,
    )

    def fit(rows: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(rows)
        found = map_search.search(
            lens_model.take(chosen), settings, [torch.Generator().manual_seed(row) for row in rows]
        )
        doubled = lens_model.take(chosen.repeat_interleave(2))
        center, hessian = truth[chosen], lens_model.take(chosen).hessian(truth[chosen])
        generators = [torch.Generator().manual_seed(row) for row in rows]
        run = hmc.Run(doubled.value_and_gradient, center, hessian, settings, generators, doubled.hessian)
        return found.w, run.finish().w

    alone = fit([1])
    for rows in ([2, 0, 1], [0, 2, 2, 1, 0, 0, 2, 0], [0, 2] * 31 + [1, 0]):
        for one, several in zip(alone, fit(rows), strict=True):
            torch.testing.assert_close(one[0], several[rows.index(1)], rtol=1e-5, atol=1e-5)


def starved(task: Task) -> xr.Dataset:
    """A fit for which the memory holds two lenses."""
    if len(task.names) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return xr.Dataset({"name": ("lens", list(task.names)), "hash": ("lens", list(task.hashes))})


def test_a_batch_too_large_for_the_memory_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "fit_lenses", starved)
    task = Task("{}", Results(tmp_path), "b", tuple("abcdefg"), tuple("1234567"))
    _, parts, failures = batch.fit_task(task)
    assert failures == {}
    datasets = [read_part(part) for part in parts]
    assert all(dataset is not None for dataset in datasets)
    assert [list(dataset["name"].to_numpy()) for dataset in datasets] == [["a"], ["b", "c"], ["d", "e"], ["f", "g"]]
    assert [list(dataset["hash"].to_numpy()) for dataset in datasets] == [["1"], ["2", "3"], ["4", "5"], ["6", "7"]]


def test_a_gpu_that_failed_is_no_fault_of_a_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["CUDA error: an illegal memory access was encountered", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: x"])

    def fit(task: Task) -> xr.Dataset:
        raise RuntimeError(next(said))

    monkeypatch.setattr(batch, "fit_lenses", fit)
    task = Task("{}", Results(tmp_path), "b", ("one",), ("1",))
    with pytest.raises(DeviceError, match="the GPU has failed: RuntimeError: CUDA error: an illegal"):
        batch.fit_task(task)
    assert batch.fit_task(task)[2]["one"].startswith(batch.NO_MEMORY)
    with pytest.raises(DeviceError):
        batch.fit_task(task)


def test_a_lens_that_cannot_be_fitted_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch fails as a whole; then each of its lenses is fitted alone, those before and behind it too."""

    def fit(task: Task) -> xr.Dataset:
        if "hopeless" in task.names:
            raise ArithmeticError("no start\nreached anything")
        return starved(task)

    monkeypatch.setattr(batch, "fit_lenses", fit)
    task = Task("{}", Results(tmp_path), "b", ("good", "hopeless", "better"), ("1", "2", "3"), 4, 3)
    returned, parts, failures = batch.fit_task(task)
    assert returned == task
    assert failures == {"hopeless": "ArithmeticError: no start reached anything"}
    datasets = [dataset for dataset in map(read_part, parts) if dataset is not None]
    assert [(str(d["name"][0].item()), str(d["hash"][0].item())) for d in datasets] == [("good", "1"), ("better", "3")]
    assert {part.parent for part in parts} == {Results(tmp_path).parts(4)}


LIGHT = {"amplitude": "HalfNormal(3)", "sd": "0.3", "q": "0.8", "phi": "0.3", "center_x": "0.1", "center_y": "0"}
QUICK = Fit(
    **{"starts": 2, "survivors": 1, "scouts": 1, "scout_pixels": 24, "scout_components": 3, "explorations": 0},
    **{"temperatures": (10.0,), "settling_temperatures": (1.0,), "steps_per_temperature": 4, "final_steps": 4},
    **{"chains": 2, "warmup": 20, "draws": 20, "rounds": 1, "max_leapfrog_steps": 2},
)


def test_what_is_stored_is_in_image_units(
    model: tuple[LensModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and fluxes of lenses whose flux and light units differ, from the parameters and latents stored with them.

    The source and the lens galaxy are drawn here by hand, on the pixels' middles, and blurred by scipy.
    """
    batch_of, units = model[0].batch, {"flux": [1.0, 1.0, 2.0], "light": [1.0, 3.0, 2.0]}
    assert batch_of.flux_unit.tolist() == units["flux"]
    assert batch_of.light_unit.tolist() == units["light"]
    priors = PriorMap(
        Config().priors.expressions() | {f"bulge_{name}": parse_prior(text) for name, text in LIGHT.items()}
    )
    middles = (np.arange(24) - 11.5) * 0.2
    a, b = (middles - 0.1) * np.cos(0.3), middles[:, None] * np.sin(0.3)
    along, across = a + b, middles[:, None] * np.cos(0.3) - (middles - 0.1) * np.sin(0.3)
    shape = np.exp(-(0.8 * along**2 + across**2 / 0.8) / (2 * 0.3**2))

    def blurred(picture: np.ndarray) -> np.ndarray:
        return convolve(picture, batch_of.psf[0].numpy(), mode="constant")

    galaxy = torch.tensor(units["light"])[:, None, None] * torch.from_numpy(blurred(shape))
    batch_of = replace(batch_of, image=batch_of.image + galaxy)
    lit = LensModel(batch_of, priors, model[0].source, Optics(TABLE, light=Light({"bulge": "gaussian"})))
    monkeypatch.setattr(batch, "build_model", lambda *_: lit)
    task = Task(Config(fit=QUICK).model_dump_json(), Results(tmp_path), "b", batch_of.names, ("1", "2", "3"))
    found = batch.fit_lenses(task).stack(sample=("chain", "draw")).transpose("lens", "sample", ...)
    assert (found["bulge_amplitude_map"] > 0.1).all()
    for lens, (flux_unit, light_unit) in enumerate(zip(*units.values(), strict=True)):
        row = found.isel(lens=lens)
        light = light_unit * float(row["bulge_amplitude_map"]) * blurred(shape)
        np.testing.assert_allclose(row["light_map"], light, rtol=1e-5, atol=1e-9)
        residual = (batch_of.image[lens].numpy() - row["model_map"]) / NOISE
        usable = batch_of.usable[lens].numpy()
        chi2 = float((residual.to_numpy()[usable] ** 2).sum())
        assert float(row["pixels"]) == usable.sum()
        assert float(row["chi2_per_pixel"]) == pytest.approx(chi2 / usable.sum(), rel=1e-5)
        images = Blobs()(torch.from_numpy(row["latent"].to_numpy()).double())
        total = images.mean((1, 2)).numpy() * row["source_flux"] * (row["source_size"] / 0.2) ** 2
        np.testing.assert_allclose(row["source_total_flux"], flux_unit * total, rtol=1e-4)
        np.testing.assert_allclose(
            row["magnification"], row["source_lensed_flux"] / row["source_total_flux"], rtol=1e-5
        )
        p = {name: torch.from_numpy(row[name].to_numpy()).double() for name in lit.priors.free if name in row}
        psf, scale = batch_of.psf[:1].expand(40, -1, -1), batch_of.pixel_scale[:1].expand(40)
        lensed = Simulator(Optics(TABLE), psf, scale, (24, 24)).image(canonical(p), images).numpy()
        of_light = [light_unit * amplitude * blurred(shape) for amplitude in row["bulge_amplitude"].to_numpy()]
        pictures = flux_unit * lensed + np.stack(of_light)
        np.testing.assert_allclose(row["model_mean"], pictures.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(row["model_sd"], pictures.std(0, ddof=1), rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("sampler", ["hmc", "svi_full_rank"])
def test_a_refit_draws_more_and_keeps_as_many(
    sampler: str, model: tuple[LensModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def thinned(draws: hmc.Draws, number: int, own: Callable[..., hmc.Draws] = chains.thinned) -> hmc.Draws:
        kept.append(draws.w.shape[2])
        return own(draws, number)

    monkeypatch.setattr(chains, "thinned", thinned)
    monkeypatch.setattr(batch, "build_model", lambda *_: model[0].take(torch.tensor([0])))
    settings = QUICK.model_copy(update={"sampler": sampler, "svi_steps": 20})
    task = Task(Config(fit=settings).model_dump_json(), Results(tmp_path), "b", ("a",), ("1",), draws_factor=3)
    found = batch.fit_lenses(task)
    assert set(kept) == {3 * QUICK.draws}
    assert found.sizes["draw"] == QUICK.draws
    assert found["draws_factor"].to_numpy().tolist() == [3]


def test_mean_and_spread_of_pictures_one_at_a_time() -> None:
    pictures = 1e3 + torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(1))
    mean, sd = batch.mean_and_sd(iter(pictures))
    torch.testing.assert_close(mean, pictures.double().mean(0).float())
    torch.testing.assert_close(sd, pictures.double().std(0).float())


def test_automatic_batches_fit_into_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory, an even share for every worker, no more than there are lenses; one at least."""
    lens = stage.BYTES_PER_RAY * Config().fit.chains * 100 * 100
    monkeypatch.setattr(memory, "free_memory", lambda: 20 * lens)

    def sizes(side: int, lenses: int, workers: int, explorations: int = 0) -> list[int]:
        names = [f"lens-{number}" for number in range(lenses)]
        table = pd.DataFrame({"name": names, "bucket": f"image{side}x{side}_psf3x3"})
        config = Config(fit=Fit(explorations=explorations))
        tasks = stage.plan(config, Results(tmp_path), 0, table, dict.fromkeys(names, ""), workers)
        assert [name for task in tasks for name in task.names] == names
        return [len(task.names) for task in tasks]

    assert sizes(100, 45, 1) == [10, 10, 10, 10, 5]
    assert sizes(100, 12, 2) == [5, 5, 2]
    assert sizes(100, 7, 2) == [4, 3]
    assert sizes(1000, 3, 2) == [1, 1, 1]
    assert sizes(10, 100, 1) == [64, 36]
    assert sizes(100, 12, 1, explorations=1) == [5, 5, 2]  # chains begin at two solutions then


def test_gates_look_at_the_lens_parameters(model: tuple[LensModel, Tensor]) -> None:
    names = [model[0].priors.free[column] for column in batch.monitored(model[0])]
    assert names == ["theta_E", "gamma", "e1", "e2", "center_x", "center_y", "gamma1", "gamma2"]
