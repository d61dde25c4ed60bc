"""Galaxies of an npz archive of stamps."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lenspipe.errors import InputError
from lenspipe.galaxies.catalogue import GalaxyStamp

BROKEN = (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # what a broken npz file raises


@dataclass(frozen=True)
class StampArchive:
    """The array `key` [galaxy, y, x] of an npz archive."""

    path: Path
    key: str
    pixel_scale: float  # ["]
    noise_sd: float = 0.0  # pixel noise [image units]; 0: not known
    exclude: tuple[int, ...] = ()  # rows left out by hand

    @property
    def files(self) -> tuple[Path, ...]:
        """The archive."""
        return (self.path,)

    def stamps(self) -> Iterator[GalaxyStamp]:
        """Its galaxies; the one array is held in memory.

        They are named by archive and row, so that the bands of one galaxy share a name.
        Raises InputError where the archive, the key or an excluded row is not there.
        """
        images = self._array()
        if beyond := [row for row in self.exclude if not 0 <= row < len(images)]:
            raise InputError(
                f"{self.path}: exclude names rows {beyond}, but {self.key} has {len(images)} galaxies; correct exclude"
            )
        for row, image in enumerate(images):
            name, pixels = f"{self.path.stem}_{row}", image.astype(np.float64)
            excluded = row in self.exclude
            yield GalaxyStamp(name, pixels, self.pixel_scale, self.noise_sd, zero_outside=True, excluded=excluded)

    def _array(self) -> NDArray[Any]:
        path, key = self.path, self.key
        if not path.is_file():
            raise InputError(f"{path}: no such stamp archive; correct galaxies.inputs.archive or fetch the file")
        try:
            with path.open("rb") as stream, np.load(stream) as arrays:
                if key not in arrays:
                    raise InputError(f"{path}: no array {key!r}; found {', '.join(arrays.files)}; correct the key")
                images = arrays[key]
        except BROKEN as error:
            raise InputError(f"{path}: not an npz archive, or cut short ({error}); fetch it again") from None
        if images.ndim != 3 or images.dtype.kind not in "fiu":
            found = f"{key} has shape {images.shape} of {images.dtype}"
            raise InputError(f"{path}: {found}; expected stamps [galaxy, y, x] of numbers")
        return np.asarray(images)
