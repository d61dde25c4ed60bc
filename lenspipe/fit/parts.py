"""Finished batches on disk until their shard is whole: a shard that is stopped goes on with what is not among them.

A part is one npz file with a name that nobody else gives, so that two jobs that fit the same shard, as happens where
the machine of the first is lost, do not take each other's away. Reading it checks the sums of its bytes.
"""

from __future__ import annotations

import json
import uuid
import zipfile
from pathlib import Path

import numpy as np
import xarray as xr

from lenspipe.artefact import written_whole

DIMENSIONS = "dimensions of"  # the entry that has those of all variables


def write_part(folder: Path, batch: xr.Dataset) -> Path:
    """Write the results of a batch into a new file of the folder; texts are read as objects."""
    arrays = {str(name): v.to_numpy() for name, v in batch.items()}
    arrays = {name: a.astype(object).astype(str) if a.dtype.kind in "OT" else a for name, a in arrays.items()}
    dimensions = json.dumps({str(name): list(v.dims) for name, v in batch.items()})
    path = folder / f"{uuid.uuid4().hex}.npz"
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{**arrays, DIMENSIONS: np.array(dimensions)})
    return path


def read_part(path: Path, names: list[str] | None = None) -> xr.Dataset | None:
    """The variables of a part, all or those named; None where it is cut short or damaged.

    Raises OSError where it is gone or the file system does not give it.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            dimensions = json.loads(str(file[DIMENSIONS]))
            arrays = {name: file[name] for name in names or dimensions}
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
    return xr.Dataset({n: (dimensions[n], a.astype(object) if a.dtype.kind == "U" else a) for n, a in arrays.items()})
