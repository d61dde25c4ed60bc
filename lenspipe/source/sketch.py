"""A linear source in place of another: cheap, and with fewer basins, for the first look of a search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lenspipe.source.base import Source


class LinearSource(Source):
    """mean + sum_k w_k b_k; mean: [64, 64], basis: [component, 64, 64]."""

    def __init__(self, mean: Tensor, basis: Tensor):
        super().__init__()
        self.mean, self.basis = nn.Buffer(mean), nn.Buffer(basis)
        self.size = len(basis)

    def forward(self, w: Tensor) -> Tensor:
        return self.mean.to(w) + torch.einsum("nk,kyx->nyx", w, self.basis.to(w))

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and their derivatives [n, size, 64, 64]: the basis."""
        return self(w), self.basis.to(w).expand(len(w), -1, -1, -1)


@torch.no_grad()
def principal_source(source: Source, components: int, draws: int = 1000, seed: int = 0) -> LinearSource:
    """The source whose images have the mean and the leading principal components of draws from `source`.

    From the products of the draws with each other: their singular value decomposition takes four times as long.
    """
    generator, device = torch.Generator().manual_seed(seed), next(source.buffers()).device
    w = torch.randn(draws, source.size, generator=generator).to(device)
    images = torch.cat([source(part) for part in w.split(100)])
    mean = images.mean(0)
    spread = (images - mean).flatten(1).double()
    modes = torch.linalg.eigh(spread @ spread.T)[1][:, -components:].flip(1)
    basis = (modes.T @ spread / len(images) ** 0.5).to(mean).unflatten(1, mean.shape)
    return LinearSource(mean, basis)
