"""Random numbers that depend on the run's seed and on what they are for, never on order or neighbours."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `("fit", lens name)`."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
