"""Fixtures of several modules."""

from __future__ import annotations

import pytest
from torch import Tensor

from lenspipe.fit.model import LensModel
from tests.lenses import small_lenses


@pytest.fixture(scope="module")
def model() -> tuple[LensModel, Tensor]:
    """Three small lenses and their true unknowns."""
    return small_lenses()
