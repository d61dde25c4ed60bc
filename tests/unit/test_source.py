"""The autoencoder: its training, its checkpoints, its ELBO against quadrature; and where the light of a source is."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import xarray as xr
from pyro.infer import TraceMeanField_ELBO
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

from lenspipe import artefact
from lenspipe.config import Vae
from lenspipe.errors import InputError, TrainingError
from lenspipe.image.source_plane import light_centre
from lenspipe.source import training
from lenspipe.source.checkpoint import read_checkpoint, write_checkpoint
from lenspipe.source.latent import divergence
from lenspipe.source.stage import read_vae
from lenspipe.source.training import Epoch, TrainingState, augmented, train
from lenspipe.source.vae import LOG_SD, VAE, bounded

SMALL = Vae(latents=3, channels=4, dense=16, epochs=6, batch_size=16, augment=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Round galaxies [64, 64, 64] of peak 1, of different widths."""
    axis = torch.arange(64) - 31.5
    radius = axis**2 + axis[:, None] ** 2
    widths = torch.linspace(3, 12, 64)[:, None, None]
    return torch.exp(-radius / (2 * widths**2))


def fitted(settings: Vae, images: Tensor, seed: int = 1) -> tuple[VAE, list[Epoch]]:
    return train(settings, images[::2], images[1::2], seed, lambda epoch: None)


@pytest.fixture(scope="module")
def learnt(images: Tensor) -> tuple[VAE, list[Epoch]]:
    return fitted(SMALL.model_copy(update={"epochs": 30, "batch_size": 4}), images)


def test_training_learns(images: Tensor, learnt: tuple[VAE, list[Epoch]]) -> None:
    vae, curve = learnt
    assert len(curve) == 30
    assert curve[-1].validation_elbo > curve[0].validation_elbo
    with torch.no_grad():
        assert float((vae.reconstruct(images) - images).std()) < 0.5 * float(images.std())


def test_training_follows_its_seed_and_leaves_the_global_one_alone(images: Tensor) -> None:
    state = torch.random.get_rng_state()
    (first, _), (again, _), (other, _) = (fitted(SMALL, images, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    weight = "encoder.mean.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_early_stop_keeps_the_best_weights(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation ELBOs 1, 3, 2, 2, ...: two epochs without a better one end it, and epoch 1 is given back."""
    seen: list[Tensor] = []

    def evaluate(vae: VAE, images: Tensor, batch_size: int) -> float:
        seen.append(vae.encoder.mean.weight.detach().clone())
        vae.eval()
        return [1.0, 3.0, 2.0, 2.0, 2.0, 2.0][len(seen) - 1]

    monkeypatch.setattr(training, "held_out_elbo", evaluate)
    vae, curve = fitted(SMALL.model_copy(update={"patience": 2}), images)
    assert [epoch.validation_elbo for epoch in curve] == [1.0, 3.0, 2.0, 2.0]
    assert torch.equal(vae.encoder.mean.weight, seen[1])


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_is_an_error(images: Tensor) -> None:
    broken = images.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"lower vae\.learning_rate"):
        fitted(SMALL, broken)


def test_augmentation_leaves_the_light_in_the_middle() -> None:
    """Of a flattened galaxy, that it turns."""
    torch.manual_seed(0)
    axis = torch.arange(64) - 31.5
    image = torch.exp(-0.5 * ((axis / 8) ** 2 + (axis[:, None] / 3) ** 2))
    changed = augmented(image.expand(8, -1, -1))
    assert float(torch.stack(light_centre(changed), -1).abs().max()) * 64 < 0.01
    assert float((changed - image).abs().amax((1, 2)).median()) > 0.3


class StraightVAE(VAE):
    """p(x | z) = N(a z + b, s) of one pixel and one latent, e(z | x) = N(c x, t): all that an ELBO needs is known."""

    a, b, c, t = 0.7, 0.2, 0.9, 0.4

    def __init__(self, sd: float):
        super().__init__(1, 1, 1, sd)
        self.encoder.forward = lambda image: (self.c * image[:, 0], torch.full_like(image[:, 0], self.t))  # type: ignore[method-assign]
        self.decoder.forward = lambda latent: (self.a * latent + self.b)[:, None]  # type: ignore[method-assign]

    def exact(self, x: float) -> tuple[float, float]:
        """The ELBO of a pixel x and its KL divergence, by quadrature."""
        posterior = norm(self.c * x, self.t)

        def integral(term: object) -> float:
            return quad(lambda z: posterior.pdf(z) * term(z), -8, 8, epsabs=1e-10)[0]  # type: ignore[operator]

        kl = integral(lambda z: posterior.logpdf(z) - norm.logpdf(z))
        return integral(lambda z: norm.logpdf(x, self.a * z + self.b, self.decoder_sd)) - kl, kl


@pytest.mark.parametrize("samples", [1, 10])
def test_elbo_agrees_with_quadrature(samples: int) -> None:
    """Of a linear Gaussian model, within four standard errors of 20,000 draws; they fall with the number of samples."""
    vae, x = StraightVAE(0.3), 0.8
    exact, _ = vae.exact(x)
    elbo = TraceMeanField_ELBO(num_particles=samples, max_plate_nesting=1, vectorize_particles=samples > 1)
    with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(samples)
        values = [
            -float(elbo.loss(vae.model, vae.guide, torch.full((200, 1, 1), x))) / 200 for _ in range(100 // samples)
        ]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - exact) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("x", [-1.0, 0.0, 0.8, 3.0])
def test_divergence_agrees_with_quadrature(x: float) -> None:
    vae = StraightVAE(0.3)
    formula = divergence(torch.tensor(vae.c * x), torch.tensor(vae.t))
    assert float(formula) == pytest.approx(vae.exact(x)[1], abs=1e-6)


def test_elbo_is_the_evidence_where_the_encoder_is_exact() -> None:
    vae, x = StraightVAE(0.3), 0.8
    precision = 1 + vae.a**2 / 0.3**2
    vae.t = precision**-0.5
    vae.c = vae.a * (x - vae.b) / 0.3**2 / precision / x
    assert vae.exact(x)[0] == pytest.approx(norm.logpdf(x, vae.b, math.hypot(vae.a, 0.3)), abs=1e-6)


def test_latents_keep_their_bounds() -> None:
    raw = torch.tensor([-1e4, -3.0, 0.0, 1e4], dtype=torch.float64)
    low, high = LOG_SD
    value = bounded(raw)
    assert value[0] == pytest.approx(low, abs=1e-3)
    assert value[3] == pytest.approx(high, abs=1e-3)
    assert value[1] == pytest.approx(-3.0, abs=0.03)


def test_a_learned_noise_is_that_of_the_images(images: Tensor) -> None:
    """With a decoder that cannot move, sigma_d ends at the scatter of the pixels."""
    torch.manual_seed(0)
    settings = SMALL.model_copy(update={"decoder_sd": "learned", "learning_rate": 0.05, "epochs": 40})
    state = TrainingState(settings, torch.device("cpu"))
    state.vae.decoder = Still()
    state.average.module.decoder = Still()
    for _ in range(40):
        state.advance(images, images)
    assert state.trained().decoder_sd == pytest.approx(float(images.square().mean().sqrt()), rel=0.05)


class Still(nn.Module):
    """A decoder that gives empty images."""

    def forward(self, latent: Tensor) -> Tensor:
        return latent.new_zeros(len(latent), 64, 64)


def test_moving_average_follows_the_weights(images: Tensor) -> None:
    """ema = 0: the judged weights are the trained ones. 0.75: a quarter of each step's weights, after the first."""
    torch.manual_seed(0)
    state = TrainingState(SMALL, torch.device("cpu"))
    state.advance(images, images)
    assert state.judged is state.vae
    torch.manual_seed(0)
    state = TrainingState(SMALL.model_copy(update={"ema": 0.75}), torch.device("cpu"))
    expected, update = None, state.average.update_parameters

    def followed(vae: VAE) -> None:
        nonlocal expected
        weight = vae.encoder.mean.weight.detach().clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
        update(vae)

    state.average.update_parameters = followed  # type: ignore[method-assign]
    state.advance(images, images)
    torch.testing.assert_close(state.judged.encoder.mean.weight.detach(), expected)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_galaxies_are_an_error(count: int, images: Tensor) -> None:
    with pytest.raises(TrainingError, match=f"expected two at least, found {count}"):
        train(SMALL, images[:count], images, 1, lambda epoch: None)


def test_a_last_batch_of_one_counts_for_nothing(images: Tensor) -> None:
    """17 images in batches of 16: the ELBO is the mean over those that were seen."""
    torch.manual_seed(0)
    state = TrainingState(SMALL.model_copy(update={"learning_rate": 1e-12}), torch.device("cpu"))
    alike = images[:1].expand(17, -1, -1)
    state.advance(alike, alike)
    other = TrainingState(SMALL.model_copy(update={"learning_rate": 1e-12}), torch.device("cpu"))
    other.vae.load_state_dict(state.vae.state_dict())
    other.advance(alike[:16], alike[:16])
    assert state.curve[0].train_elbo == pytest.approx(other.curve[0].train_elbo, rel=0.02)


def test_low_precision_trains_too(images: Tensor) -> None:
    """Its losses are near those of float32, and not the same."""
    exact, rounded = (fitted(SMALL.model_copy(update={"precision": p}), images)[1] for p in ("float32", "bfloat16"))
    assert rounded[-1].validation_elbo > rounded[0].validation_elbo
    assert rounded[0].train_elbo == pytest.approx(exact[0].train_elbo, rel=0.05)
    assert rounded[0].train_elbo != exact[0].train_elbo


class Stop(Exception):
    """Ends a training from outside."""


def losses(curve: list[Epoch]) -> list[tuple[float, float]]:
    return [(epoch.train_elbo, epoch.validation_elbo) for epoch in curve]


def stopped_after(epochs: int, settings: Vae, images: Tensor, checkpoint: Path) -> None:
    def report(epoch: Epoch) -> None:
        if epoch.epoch == epochs:
            raise Stop

    with pytest.raises(Stop):
        train(settings, images[::2], images[1::2], 1, report, checkpoint)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    settings = SMALL.model_copy(update={"augment": True, "noise": 0.01, "ema": 0.5})
    whole, curve = fitted(settings, images)
    stopped_after(3, settings, images, tmp_path / "checkpoint")
    advanced = counted(monkeypatch)
    seen: list[int] = []
    again, rest = train(
        settings, images[::2], images[1::2], 1, lambda epoch: seen.append(epoch.epoch), tmp_path / "checkpoint"
    )
    assert losses(rest) == losses(curve)
    assert len(advanced) == 3, "the first epochs are those of the checkpoint"
    assert seen == [0, 1, 2, 3, 4, 5]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def counted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that gets an entry for every epoch trained from now on."""
    advanced: list[None] = []
    advance = TrainingState.advance

    def counting(state: TrainingState, train_images: Tensor, validation_images: Tensor) -> None:
        advanced.append(None)
        advance(state, train_images, validation_images)

    monkeypatch.setattr(TrainingState, "advance", counting)
    return advanced


@pytest.mark.parametrize("change", ["settings", "images", "validation", "seed", "broken"])
def test_a_checkpoint_of_another_training_is_left_alone(
    change: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    path = tmp_path / "checkpoint"
    stopped_after(3, SMALL, images, path)
    settings, changed, seed = SMALL, images, 1
    if change == "settings":
        settings = SMALL.model_copy(update={"latents": 2})
    elif change in ("images", "validation"):
        rows = slice(0, None, 2) if change == "images" else slice(1, None, 2)
        changed = images.clone()
        changed[rows] *= 0.9
    elif change == "seed":
        seed = 2
    else:
        path.write_bytes(path.read_bytes()[:1000])
    expected = fitted(settings, changed, seed)[1]
    advanced = counted(monkeypatch)
    _, curve = train(settings, changed[::2], changed[1::2], seed, lambda epoch: None, path)
    assert losses(curve) == losses(expected)
    assert len(advanced) == len(curve), "nothing is taken from the checkpoint"


def test_checkpoints_keep_every_number(tmp_path: Path) -> None:
    parts = {"vae": {"a.b": torch.randn(3, 2)}, "average": {}, "best": {"n": torch.tensor(3)}, "adam": {}}
    write_checkpoint(tmp_path / "c", parts, {"key": {"seed": 1}, "curve": [{"epoch": 0, "x": 0.1 + 0.2}]})
    found = read_checkpoint(tmp_path / "c", {"seed": 1})
    assert found is not None
    assert torch.equal(found[0]["vae"]["a.b"], parts["vae"]["a.b"])
    assert found[0]["best"]["n"] == 3
    assert found[1] == [{"epoch": 0, "x": 0.1 + 0.2}]
    assert read_checkpoint(tmp_path / "c", {"seed": 2}) is None


STAGE = """
import sys
from lenspipe.cli import app
from lenspipe.source import training
training.CHECKPOINT_SECONDS = 0
app(["vae", "--config", sys.argv[1], "--results", sys.argv[2]])
"""


def test_a_killed_stage_goes_on(images: Tensor, tmp_path: Path) -> None:
    """kill -9 after the first checkpoint; the next call ends with the curve of a run that nobody killed."""
    config = '{"vae": {"latents": 3, "channels": 4, "dense": 16, "epochs": 40, "batch_size": 4}}'
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in runs.values():
        write_galaxies(images, folder / "galaxies/galaxies.zarr")
    command = {name: [sys.executable, "-c", STAGE, config, str(folder)] for name, folder in runs.items()}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command["whole"], check=True, env=environment, capture_output=True)
    checkpoint = runs["killed"] / "vae/checkpoint.safetensors"
    first = subprocess.Popen(command["killed"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not (runs["killed"] / "vae/vae.safetensors").exists()
    with safe_open(checkpoint, framework="pt") as file:
        before = [row["seconds"] for row in json.loads(file.metadata()[artefact.KEY])["curve"]]
    subprocess.run(command["killed"], check=True, env=environment, capture_output=True)
    curves = [pd.read_csv(folder / "vae/training.csv") for folder in runs.values()]
    assert curves[1]["seconds"].tolist()[: len(before)] == before, "the epochs of the checkpoint are not done again"
    pd.testing.assert_frame_equal(curves[0].drop(columns="seconds"), curves[1].drop(columns="seconds"))
    weights = [read_vae(folder / "vae/vae.safetensors")[0].state_dict() for folder in runs.values()]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not checkpoint.exists()


def write_galaxies(images: Tensor, path: Path) -> None:
    """Images as the stage `galaxies` leaves them: half to train on, half for validation."""
    split = np.array(["train", "validation"] * (len(images) // 2), dtype=object)
    data = xr.Dataset({"image": (("galaxy", "y", "x"), images.numpy()), "split": ("galaxy", split)})
    data.to_zarr(path, zarr_format=3, consolidated=False)


def test_bad_files_of_an_autoencoder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.safetensors: no such autoencoder; run the stage vae"):
        read_vae(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    record = {"settings": {"vae": SMALL.model_dump(mode="json")}}
    metadata = {artefact.KEY: json.dumps(record)}
    save_file(VAE(2, 4, 16, 0.02).state_dict(), tmp_path / "other.safetensors", metadata=metadata)
    for name in ("cut", "other"):
        with pytest.raises(InputError, match=rf"{name}\.safetensors: not an autoencoder"):
            read_vae(tmp_path / f"{name}.safetensors")


def test_light_centre_is_where_the_light_is() -> None:
    axis = (torch.arange(64, dtype=torch.float64) - 31.5) / 64
    image = torch.exp(-((axis - 0.1) ** 2 + (axis[:, None] + 0.05) ** 2) / (2 * 0.06**2))[None]
    x, y = light_centre(image)
    assert x.item() == pytest.approx(0.1, abs=1e-6)
    assert y.item() == pytest.approx(-0.05, abs=1e-6)
