"""Checkpoints of a training: named tensors and a record in one safetensors file, never pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenspipe import artefact

Parts = dict[str, dict[str, Tensor]]


def write_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], record: dict[str, Any]) -> None:
    """Write the tensors of each part, and the record with its `key` and `curve`, whole."""
    tensors = {f"{part}/{name}": t.clone().contiguous() for part, own in parts.items() for name, t in own.items()}
    with artefact.written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={artefact.KEY: json.dumps(record)})


def read_checkpoint(path: Path, key: dict[str, Any]) -> tuple[Parts, list[dict[str, Any]]] | None:
    """Parts and curve of a checkpoint of this key; None where the file is absent, broken or of another key."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()[artefact.KEY])
            if record["key"] != key:
                return None
            parts: Parts = {"vae": {}, "average": {}, "best": {}, "adam": {}}
            for full in file.keys():  # noqa: SIM118
                part, _, name = full.partition("/")
                parts[part][name] = file.get_tensor(full)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return parts, record["curve"]
