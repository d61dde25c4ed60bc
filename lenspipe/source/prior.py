"""The source prior that inference loads: a map from a standard normal vector to an image of a galaxy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lenspipe import artefact
from lenspipe.errors import InputError
from lenspipe.source.vae import VAE


class SourcePrior(nn.Module):
    """w ~ N(0, I) to latents z = mean + scale w to the decoded image mu_d(z).

    mean: [latents]; scale: [latents, latents], lower triangular, a square root of the prior covariance.
    """

    def __init__(self, vae: VAE, mean: Tensor, scale: Tensor):
        super().__init__()
        self.vae = vae
        self.mean = nn.Buffer(mean)
        self.scale = nn.Buffer(scale)
        self.requires_grad_(False).eval()

    @property
    def size(self) -> int:
        """Number of entries of w."""
        return len(self.mean)

    def forward(self, w: Tensor) -> Tensor:
        """Images [n, 64, 64] of w [n, size]."""
        return self.vae.decoder(self.mean + w @ self.scale.T)


@torch.no_grad()
def gaussian_latent_prior(vae: VAE, images: Tensor, covariance_scale: float) -> tuple[Tensor, Tensor]:
    """Mean and scale of the paper's prior (section 2.1): a Gaussian on the encoded means, its covariance rescaled."""
    encoded = torch.cat([vae.encoder(batch)[0] for batch in images.split(256)]).double()
    centred = encoded - encoded.mean(0)
    covariance = centred.T @ centred / max(len(encoded) - 1, 1)
    ridge = 1e-6 * torch.eye(len(covariance), dtype=torch.float64)
    scale = torch.linalg.cholesky(covariance_scale * (covariance + ridge))
    return encoded.mean(0).float(), scale.float()


def write_source_prior(prior: SourcePrior, record: dict[str, Any], out: Path) -> None:
    """Write weights, latent prior and provenance as safetensors."""
    tensors = {name: tensor.contiguous() for name, tensor in prior.state_dict().items()}
    with artefact.written_whole(out) as temporary:
        save_file(tensors, temporary, metadata={artefact.KEY: json.dumps(record)})


def read_source_prior(path: Path) -> SourcePrior:
    """The prior in a file that the stage `source` wrote. Raises InputError where it is missing or not one."""
    if not path.is_file():
        raise InputError(f"{path}: no such source prior; run the stage source first")
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()[artefact.KEY])["settings"]["source"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a source prior ({error}); remove it and run the stage again") from None
    vae = VAE(settings["latents"], settings["channels"], settings["dense"], settings["decoder_sd"])
    prior = SourcePrior(vae, torch.zeros(settings["latents"]), torch.eye(settings["latents"]))
    prior.load_state_dict(tensors)
    return prior
