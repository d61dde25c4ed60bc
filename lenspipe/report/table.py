"""Tables of the report, and numbers in their cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Table:
    """Heads and cells of an HTML table, as text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(row: dict[str, Any], key: str, form: str) -> str:
    """A number of a row, or a dash where it is absent."""
    value = row.get(key, math.nan)
    return f"{value:{form}}" if value is not None and math.isfinite(value) else "–"


def within_error(row: dict[str, Any], name: str) -> str:
    """Median and half the width of the central 68 %, to the digits that the width allows."""
    low, median, high = (row.get(f"{name}_{key}", math.nan) for key in ("p16", "median", "p84"))
    if not all(math.isfinite(value) for value in (low, median, high)):
        return "–"
    error = (high - low) / 2
    digits = decimals(error)
    return f"{median:z.{digits}f} ± {error:.{digits}f}" if error > 0 else f"{median:.4g}"


def decimals(error: float) -> int:
    """Decimals that show two digits of an error."""
    return int(np.clip(1 - math.floor(math.log10(error)), 0, 6)) if error > 0 and math.isfinite(error) else 3
