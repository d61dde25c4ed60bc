"""The source prior that inference loads: one file, whatever the kind of source.

The file holds the tensors of the source and, in its record, the settings that it is built from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from lenspipe.config import LearnedSource as LearnedSettings
from lenspipe.config import SourceSettings
from lenspipe.source.base import Source
from lenspipe.source.learned import LearnedSource
from lenspipe.source.pixel_grid import PixelGridSource
from lenspipe.source.sersic import SersicSource
from lenspipe.source.shapelets import ShapeletSource
from lenspipe.tensors import read_tensors, write_tensors

ANALYTIC = {"sersic": SersicSource, "shapelets": ShapeletSource, "pixel_grid": PixelGridSource}


def write_source_prior(source: Source, record: dict[str, Any], out: Path) -> None:
    """Write the tensors of a source and its record, with `settings.source` and, of a learned one, `facts.network`."""
    write_tensors(out, source.state_dict(), record)


def read_source_prior(path: Path) -> Source:
    """The source in a file that the stage `source` wrote. Raises InputError where it is missing or not one."""

    def build(tensors: dict[str, Tensor], record: dict[str, Any]) -> Source:
        source = blank(TypeAdapter(SourceSettings).validate_python(record["settings"]["source"]), record)
        source.load_state_dict(tensors)
        return source.requires_grad_(False).eval()

    return read_tensors(path, "a source prior", "source", build)


def blank(settings: Any, record: dict[str, Any]) -> Source:
    """The source of these settings; a learned one has tensors still to be loaded."""
    if isinstance(settings, LearnedSettings):
        return LearnedSource.blank(settings, **record["facts"]["network"])
    return ANALYTIC[settings.kind](settings)
