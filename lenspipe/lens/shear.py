"""External shear."""

from torch import Tensor


def shear_deflection(x: Tensor, y: Tensor, gamma1: Tensor, gamma2: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = (gamma1 x + gamma2 y, gamma2 x - gamma1 y), about the origin (paper, eq. 13); broadcastable."""
    return gamma1 * x + gamma2 * y, gamma2 * x - gamma1 * y
