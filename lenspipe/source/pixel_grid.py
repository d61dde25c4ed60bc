"""Free pixels with a smoothness prior as the source: a Gaussian random field below an envelope."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lenspipe.config import PixelGridSource as Settings
from lenspipe.source.base import Source, pixel_axis


class PixelGridSource(Source):
    """envelope (1 + sum_k w_k b_k): the leading modes b of a field whose correlation is a Gaussian of the distance.

    On the grid that correlation is a product of one along x and one along y, and so are its modes.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        axis = pixel_axis().double()
        envelope = torch.exp(-(axis.square() + axis[:, None].square()) / (2 * settings.envelope**2))
        distance = axis - axis[:, None]
        values, vectors = torch.linalg.eigh(torch.exp(-distance.square() / (2 * settings.correlation**2)))
        power = values.clip(min=0)[:, None] * values.clip(min=0)
        strongest = power.flatten().argsort(descending=True, stable=True)[: settings.modes]
        row, column = strongest // len(axis), strongest % len(axis)
        modes = vectors.T[row][:, :, None] * vectors.T[column][:, None, :]
        field = settings.sd * power.flatten()[strongest].sqrt()[:, None, None] * modes
        self.size = self.unmoving = settings.modes
        self.envelope = nn.Buffer(envelope.float(), persistent=False)
        self.basis = nn.Buffer((envelope * field).float(), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        return self.envelope + torch.einsum("nk,kyx->nyx", w, self.basis)

    def led(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the envelope that they are placed by."""
        return self(w), self.envelope.expand(len(w), -1, -1)

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and their derivatives [n, size, 64, 64]: the modes, whatever w is."""
        return self(w), self.basis.expand(len(w), -1, -1, -1)
