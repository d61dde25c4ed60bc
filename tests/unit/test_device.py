"""Fits on a device that is not the processor, pretended where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xarray as xr

from lenspipe.config import Config
from lenspipe.fit import batch, chains, exploration, hmc
from lenspipe.fit.batch import Task
from lenspipe.fit.model import LensModel
from lenspipe.image.light import Light
from lenspipe.image.simulator import Optics
from lenspipe.prior_expression import parse_prior
from lenspipe.prior_map import PriorMap
from lenspipe.results import Results
from tests.lenses import FIXED, NOISE, TABLE, lens_batch
from tests.pretended_device import DEVICE, derivative_along, one_by_one, pretended
from tests.unit.test_sources import made

Fitting = Callable[[torch.device, str], xr.Dataset]
FIT = {
    **{"starts": 2, "scouts": 1, "survivors": 2, "scout_pixels": 12, "scout_components": 3, "explorations": 1},
    **{"temperatures": [10.0], "settling_temperatures": [1.0], "steps_per_temperature": 1, "final_steps": 2},
    **{"chains": 2, "warmup": 20, "draws": 20, "rounds": 2, "ess_min": 1e9, "max_leapfrog_steps": 1},
}


def test_operations_across_devices_fail() -> None:
    """What the other test is worth: as on a GPU, tensors do not meet, and none is an array."""
    with pretended():
        there, here = torch.ones(3).to(DEVICE), torch.ones(3)
        assert (2 * there[torch.tensor([0, 2])]).sum().cpu() == 4
        assert torch.tensor([1.0], device=DEVICE).device == torch.zeros(2, device=DEVICE).device == DEVICE
        for operation in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="two devices"):
                operation()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()


def fitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Fitting:
    """Fits of two lenses on a device, with results in a folder; walls and the light of the galaxy are in."""
    shape = {"amplitude": "HalfNormal(3)", "sd": "0.3", "q": "0.8", "phi": "0.3", "center_x": "0", "center_y": "0"}
    own = {f"bulge_{name}": text for name, text in shape.items()} | {"theta_E": "TruncatedNormal(1.2, 0.3, 0.5, 2)"}
    expressions = {name: parse_prior(str(text)) for name, text in (FIXED | own).items()}
    priors, source = PriorMap(Config().priors.expressions() | expressions), made("residual").float()
    for name, tensor in source.state_dict().items():
        if name.endswith("bias"):  # the mean galaxy, where the search begins, is not dark
            tensor.copy_(0.3 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    table = TABLE.to(dtype=torch.float32)
    optics = Optics(table, light=Light({"bulge": "gaussian"}))
    lenses = lens_batch().take(torch.arange(2)).to(dtype=torch.float32)
    blank = LensModel(lenses, priors, source, optics)
    generator = torch.Generator().manual_seed(5)
    truth = blank.unfolded(0.3 * torch.randn(2, blank.size, generator=generator))
    noise = NOISE * torch.randn(lenses.image.shape, generator=generator)
    lenses = replace(lenses, image=blank.image(truth) * lenses.flux_unit[:, None, None] + noise)
    config = Config.model_validate({"fit": FIT | settings})

    def fitted(device: torch.device, folder: str) -> xr.Dataset:
        there = replace(optics, deflection=table.to(device=device))
        model = LensModel(lenses.to(device=device), priors, source.to(device), there)
        monkeypatch.setattr(batch, "build_model", lambda *_: model)
        paths = Results(tmp_path / folder)
        return batch.fit_lenses(Task(config.model_dump_json(), paths, "24x24", lenses.names, ("1", "2")))

    return fitted


def test_a_fit_on_a_device_is_that_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, exploration, two rounds of chains that a kill interrupts, results; with walls and the galaxy's light."""
    fitted = fitting(tmp_path, monkeypatch)
    monkeypatch.setattr(exploration, "LENGTH", 4)
    for module in (hmc, chains):
        monkeypatch.setattr(module, "PLACES", 3)
    monkeypatch.setattr(torch.func, "jvp", derivative_along)
    monkeypatch.setattr(torch.func, "vmap", one_by_one)
    expected = fitted(torch.device("cpu"), "here")
    advance, count = hmc.Run.advance, 0

    def until_killed(run: hmc.Run) -> None:
        nonlocal count
        count += 1
        if count == 58:  # in the second round, after 8 draws of the exploration and 40 of the first
            raise KeyboardInterrupt
        advance(run)

    monkeypatch.setattr(chains, "CHECKPOINT_SECONDS", 0.0)
    with pretended() as device:
        monkeypatch.setattr(hmc.Run, "advance", until_killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(device, "there")
        assert len(list((tmp_path / "there").rglob("*.safetensors"))) == 1
        found = fitted(device, "there")
    assert count == 58 + 25 - 9, "it began anew"  # the second round has 25 draws, 9 of which were made before
    assert not list((tmp_path / "there").rglob("*.safetensors"))
    xr.testing.assert_allclose(
        found.drop_vars(["seconds", "seconds_map"]), expected.drop_vars(["seconds", "seconds_map"])
    )


def test_pyro_draws_off_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"sampler": "svi_low_rank", "svi_steps": 4, "svi_rank": 2, "explorations": 0}
    fitted = fitting(tmp_path, monkeypatch, **chosen)
    monkeypatch.setattr(torch.func, "jvp", derivative_along)
    monkeypatch.setattr(torch.func, "vmap", one_by_one)
    expected = fitted(torch.device("cpu"), "here")
    with pretended() as device:
        found = fitted(device, "there")
    xr.testing.assert_allclose(found["theta_E"], expected["theta_E"])


def test_a_search_that_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process is killed before the first minute of chains is over."""
    fitted, here = fitting(tmp_path, monkeypatch, explorations=0), torch.device("cpu")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as at_first:
        at_first.setattr(hmc.Run, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(here, "killed")
    whole = fitted(here, "whole")
    monkeypatch.setitem(batch.SEARCHES, "gauss_newton", killed)
    again = fitted(here, "killed")
    seconds = ["seconds", "seconds_map"]
    xr.testing.assert_identical(again.drop_vars(seconds), whole.drop_vars(seconds))
