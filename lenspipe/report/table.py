"""Tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Heads and cells of an HTML table, as text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
