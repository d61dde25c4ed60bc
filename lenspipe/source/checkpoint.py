"""Checkpoints of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lenspipe.errors import InputError
from lenspipe.tensors import read_tensors, write_tensors

Parts = dict[str, dict[str, Tensor]]


def write_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], record: dict[str, Any]) -> None:
    """Write the tensors of each part, and the record with its `key` and `curve`, whole."""
    tensors = {f"{part}/{name}": t.clone() for part, own in parts.items() for name, t in own.items()}
    write_tensors(path, tensors, record)


def read_checkpoint(path: Path, key: dict[str, Any]) -> tuple[Parts, list[dict[str, Any]]] | None:
    """Parts and curve of a checkpoint of this key; None where the file is absent, broken or of another key."""

    def build(tensors: dict[str, Tensor], record: dict[str, Any]) -> tuple[Parts, list[dict[str, Any]]] | None:
        if record["key"] != key:
            return None
        parts: Parts = {"vae": {}, "average": {}, "best": {}, "adam": {}}
        for full, tensor in tensors.items():
            part, _, name = full.partition("/")
            parts[part][name] = tensor
        return parts, record["curve"]

    try:
        return read_tensors(path, "a checkpoint", "vae", build)
    except InputError:
        return None
