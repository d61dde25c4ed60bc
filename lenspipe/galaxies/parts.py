"""Image files cut into parts: one part file holds what is kept of one image file, so that a killed run goes on.

A part's name has a hash of everything that decides its content: a part that is there and whole is never made again, one
of other settings or of another version of its image file is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lenspipe.artefact import git_commit, versions, written_whole
from lenspipe.config import Galaxies
from lenspipe.galaxies.archive import BROKEN, StampArchive
from lenspipe.galaxies.catalogue import GalaxyStamp, ImageFile
from lenspipe.galaxies.denoise import estimated_noise
from lenspipe.galaxies.neighbours import without_neighbours
from lenspipe.galaxies.psf import psf_fwhms
from lenspipe.galaxies.selection import Tally, square
from lenspipe.galaxies.stamps import centred, downscale, feather, noise_factor, normalised
from lenspipe.processes import pool_of

Images = ImageFile | StampArchive
AFTERWARDS = {"inputs", "validation_fraction", "test_fraction"}  # settings that no part depends on


@dataclass(frozen=True)
class Galaxy:
    """One galaxy as the source model sees it."""

    name: str
    image: NDArray[np.float32]  # [64, 64], peak 1
    noise_sd: float  # pixel noise [peak flux], estimated where the catalogue does not know it
    pixel_scale: float  # ["]


@dataclass(frozen=True)
class Part:
    """What is kept of one image file: an entry of every array for each galaxy, and how many were read and removed."""

    name: NDArray[np.str_]
    image: NDArray[np.float32]  # [galaxy, 64, 64], peak 1
    noise_sd: NDArray[np.float64]  # [peak flux]
    pixel_scale: NDArray[np.float64]  # ["]
    psf_fwhm: NDArray[np.float64]  # of the original stamp ["]; NaN: not known
    read: NDArray[np.int64]  # []
    removed: NDArray[np.int64]  # by each cut, in order


@dataclass(frozen=True)
class Unit:
    """One image file, what is to become of it, and the path of its part."""

    images: Images
    settings: Galaxies
    seed: int
    path: Path


def unit_of(images: Images, settings: Galaxies, seed: int, folder: Path) -> Unit:
    """The unit of work whose part lies in `folder` under the hash of what decides its content."""
    chosen = settings.model_dump_json(exclude=AFTERWARDS)
    code = (versions(), git_commit())
    states = [_state(path) for path in images.files]
    digest = hashlib.sha256(repr((images, states, chosen, seed, code)).encode()).hexdigest()
    return Unit(images, settings, seed, folder / f"{images.path.stem}-{digest[:32]}.npz")


def make_parts(units: list[Unit], workers: int) -> Iterator[Unit]:
    """Make the parts that are not there yet, `workers` processes side by side; yields each unit once its part is there.

    One worker is this process. Raises the first error of a worker, and LenspipeError where one was killed; the parts
    that are done stay.
    """
    if workers == 1 or len(units) < 2:
        yield from map(make_part, units)
        return
    with pool_of(min(workers, len(units)), "galaxies") as pool:
        for done in as_completed([pool.submit(make_part, unit) for unit in units]):
            yield done.result()


def make_part(unit: Unit) -> Unit:
    """Write the part of a unit, unless it is there and whole. Raises InputError for images that are broken."""
    if read_part(unit.path) is None:
        part = cut(unit.images, unit.settings, unit.seed)
        with written_whole(unit.path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **{field.name: getattr(part, field.name) for field in fields(Part)})
    return unit


def read_part(path: Path) -> Part | None:
    """A part; None where it is not there or broken."""
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:
            return Part(**{field.name: arrays[field.name] for field in fields(Part)})
    except (KeyError, *BROKEN):
        return None


def remove_others(units: Iterable[Unit], folder: Path) -> None:
    """Remove parts of other settings or image files, and what a killed run left half written."""
    wanted = {unit.path for unit in units}
    for path in [path for path in folder.glob("*") if path not in wanted]:
        path.unlink(missing_ok=True)


def cut(images: Images, settings: Galaxies, seed: int) -> Part:
    """The galaxies of an image file that pass all cuts; their images alone are held in memory."""
    tally, galaxies, psfs = Tally(str(images.path)), [], []
    for stamp in images.stamps():
        if settings.neighbours == "mask":
            stamp = without_neighbours(stamp, settings, seed)
        if tally.keeps(stamp, settings):
            galaxies.append(learnable(settings, stamp))
            psfs.append(stamp.psf)
    side = settings.stamp_size
    return Part(
        name=np.array([galaxy.name for galaxy in galaxies], dtype=np.str_),
        image=np.array([galaxy.image for galaxy in galaxies], dtype=np.float32).reshape(-1, side, side),
        noise_sd=np.array([galaxy.noise_sd for galaxy in galaxies], dtype=float),
        pixel_scale=np.array([galaxy.pixel_scale for galaxy in galaxies], dtype=float),
        psf_fwhm=psf_fwhms(psfs),
        read=np.array(tally.read),
        removed=np.array(list(tally.removed.values())),
    )


def learnable(settings: Galaxies, stamp: GalaxyStamp) -> Galaxy:
    """The square image of peak 1, with the noise and pixel scale that it has then."""
    cutout, side = square(stamp, settings), settings.stamp_size
    image, peak = normalised(centred(feather(downscale(cutout, side), settings.edge_feather)))
    noise_sd = (stamp.noise_sd or estimated_noise(cutout)) * noise_factor(len(cutout), side) / peak
    return Galaxy(stamp.name, image.astype(np.float32), noise_sd, stamp.pixel_scale * len(cutout) / side)


def _state(path: Path) -> tuple[str, int, int] | None:
    """Path, size and time of the last change; None where there is no such file."""
    if not path.is_file():
        return None
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns
