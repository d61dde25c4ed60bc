"""The source prior that inference loads: one file, whatever the kind of source.

The file holds the tensors of the source and, in its record, the settings that it is built from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lenspipe import artefact
from lenspipe.config import LearnedSource as LearnedSettings
from lenspipe.config import SourceSettings
from lenspipe.errors import InputError
from lenspipe.source.base import Source
from lenspipe.source.learned import LearnedSource
from lenspipe.source.pixel_grid import PixelGridSource
from lenspipe.source.sersic import SersicSource
from lenspipe.source.shapelets import ShapeletSource

ANALYTIC = {"sersic": SersicSource, "shapelets": ShapeletSource, "pixel_grid": PixelGridSource}


def write_source_prior(source: Source, record: dict[str, Any], out: Path) -> None:
    """Write the tensors of a source and its record, with `settings.source` and, of a learned one, `facts.network`."""
    tensors = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    with artefact.written_whole(out) as temporary:
        save_file(tensors, temporary, metadata={artefact.KEY: json.dumps(record)})


def read_source_prior(path: Path) -> Source:
    """The source in a file that the stage `source` wrote. Raises InputError where it is missing or not one."""
    if not path.is_file():
        raise InputError(f"{path}: no such source prior; run the stage source first")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()[artefact.KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        source = blank(TypeAdapter(SourceSettings).validate_python(record["settings"]["source"]), record)
        source.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a source prior ({error}); remove it and run the stage again") from None
    return source.requires_grad_(False).eval()


def blank(settings: Any, record: dict[str, Any]) -> Source:
    """The source of these settings; a learned one has tensors still to be loaded."""
    if isinstance(settings, LearnedSettings):
        return LearnedSource.blank(settings, **record["facts"]["network"])
    return ANALYTIC[settings.kind](settings)
