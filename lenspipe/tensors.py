"""Tensors and their record in one safetensors file, never pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lenspipe.artefact import KEY, written_whole
from lenspipe.errors import InputError
from lenspipe.memory import out_of_memory

T = TypeVar("T")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write named tensors and their record, whole."""
    alone = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        temporary.write_bytes(save(alone, metadata={KEY: json.dumps(record)}))  # `save_file` raises no OSError


def read_tensors(path: Path, what: str, stage: str, build: Callable[[dict[str, Tensor], Any], T]) -> T:
    """What `build` makes of the tensors and the record in a file of the stage.

    `what` is what errors call it, with its article. Raises InputError where the file is missing, is not one of
    safetensors, or `build` cannot use what is in it; MemoryError where there is no room to read it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such {what.partition(' ')[2]}; run the stage {stage} first")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return build(tensors, record)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise MemoryError(f"{path}: {error}") from None
        raise InputError(f"{path}: not {what} ({error}); remove it and run the stage again") from None


def hash_of_tensors(path: Path) -> str:
    """SHA-256 of the tensors in a file of a stage and of that stage's settings: not of when and by what it was made.

    Raises what `read_tensors` does.
    """

    def build(tensors: dict[str, Tensor], record: dict[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps(record["settings"], sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    stage = path.parent.name
    return read_tensors(path, f"an output of the stage {stage}", stage, build)
