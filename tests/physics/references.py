"""Parameters under the names of the external references."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def lenstronomys(values: Mapping[str, float]) -> dict[str, float]:
    """Parameters under lenstronomy's names: q and phi become e1 and e2, where there are any."""
    theirs = dict(values)
    if "q" in theirs:
        q, phi = theirs.pop("q"), theirs.pop("phi")
        theirs |= {"e1": (1 - q) / (1 + q) * np.cos(2 * phi), "e2": (1 - q) / (1 + q) * np.sin(2 * phi)}
    return theirs
