"""Ingestion of many image files: workers, kills, parts that hold and parts that do not; neighbours; widths of PSFs."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr
from astropy.io import fits
from astropy.table import Table

from lenspipe.config import Config, Galaxies, Survey
from lenspipe.errors import InputError, LenspipeError
from lenspipe.galaxies import parts
from lenspipe.galaxies.catalogue import GalaxyStamp, PsfImage, image_files
from lenspipe.galaxies.ingest import ingest
from lenspipe.galaxies.neighbours import neighbours, without_neighbours
from lenspipe.galaxies.psf import psf_fwhm, psf_fwhms
from lenspipe.galaxies.selection import CUTS, Tally
from lenspipe.survey import CATALOGUE, write_survey
from tests.conftest import ROOT, environment

EVEN = Galaxies(validation_fraction=0.3, test_fraction=0.3)
FILES = 12


@pytest.fixture(scope="session")
def shared_survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("survey") / "survey"
    write_survey(Survey(galaxies=20 * FILES, galaxies_per_file=20), out, seed=2)
    return out


@pytest.fixture
def survey(shared_survey: Path, tmp_path: Path) -> Path:
    """A copy of the survey, to be broken."""
    return Path(shutil.copytree(shared_survey, tmp_path / "survey"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "galaxies/galaxies.zarr"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image files that this process reads, as they are read."""
    names: list[str] = []
    cut = parts.cut

    def recorded(images: parts.Images, *others: object) -> parts.Part:
        names.append(images.path.name)
        return cut(images, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(parts, "cut", recorded)
    return names


def image_file(survey: Path, number: int) -> Path:
    return survey / f"real_galaxy_images_synthetic_n{number}.fits"


def names_of_files(*numbers: int) -> list[str]:
    return sorted(f"real_galaxy_images_synthetic_n{number}.fits" for number in numbers)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts_of(out: Path) -> dict[str, int]:
    """When the parts were written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in out.with_name("galaxies.zarr.parts").glob("*.npz")}


def ingested(survey: Path, out: Path, settings: Galaxies = EVEN) -> dict[str, bytes]:
    """The bytes of a run without interruption; it leaves nothing."""
    ingest(settings, survey, out, seed=1)
    found = contents(out.parent)
    shutil.rmtree(out.parent)
    return found


def interrupted(survey: Path, out: Path, workers: int = 1, settings: Galaxies = EVEN) -> None:
    """A run that fails at the last image file by name (n9), which is mended afterwards."""
    path = image_file(survey, 9)
    whole, times = path.read_bytes(), path.stat()
    os.truncate(path, len(whole) // 2)
    with pytest.raises(InputError, match=r"images_synthetic_n9.fits: .*cut short"):
        ingest(settings, survey, out, seed=1, workers=workers)
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# --- workers and parts


def test_any_number_of_workers_writes_the_same_bytes(shared_survey: Path, out: Path) -> None:
    alone = ingested(shared_survey, out)
    assert len(alone) > 10
    for workers in (2, 3):
        ingest(EVEN, shared_survey, out, seed=1, workers=workers)
        assert contents(out.parent) == alone, "and no part is left"
        shutil.rmtree(out.parent)


def test_rows_are_in_the_order_of_image_files_and_hdus(shared_survey: Path, out: Path) -> None:
    ingest(EVEN, shared_survey, out, seed=1, workers=2)
    order = [stamp.name for file in image_files(shared_survey / CATALOGUE) for stamp in file.stamps()]
    written = xr.open_zarr(out, consolidated=False).name.values.tolist()
    assert written == [name for name in order if name in set(written)]
    assert len(written) > 100


@pytest.mark.parametrize("workers", [1, 2])
def test_goes_on_after_kill_9(shared_survey: Path, tmp_path: Path, workers: int, read: list[str]) -> None:
    """Killed once some parts are there: the workers end too, and a new run reads the other image files alone."""
    (tmp_path / "survey").symlink_to(shared_survey)
    out = tmp_path / "galaxies/galaxies.zarr"
    whole = ingested(tmp_path / "survey", out)
    settings = Config(galaxies=EVEN).model_dump_json(include={"seed", "galaxies"})
    command = [sys.executable, "-m", "lenspipe", "galaxies", "--config", settings, "--results", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not parts_of(out) and time.monotonic() < deadline:
        time.sleep(0.001)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert not out.exists()
    assert len(children) >= workers if workers > 1 else not children
    assert not psutil.wait_procs(children, timeout=30)[1], "workers outlive the run that started them"
    done = {name.rsplit("-", 1)[0] + ".fits" for name in parts_of(out)}
    assert 0 < len(done) < FILES
    read.clear()
    ingest(EVEN, tmp_path / "survey", out, seed=1)
    assert sorted(read) == sorted(set(names_of_files(*range(1, FILES + 1))) - done)
    assert contents(out.parent) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_image_files_are_not_read_again(survey: Path, out: Path, workers: int, read: list[str]) -> None:
    whole = ingested(survey, out)
    interrupted(survey, out, workers)
    assert not out.exists()
    there = parts_of(out)
    assert len(there) == FILES - 1 if workers == 1 else there
    read.clear()
    ingest(EVEN, survey, out, seed=1)
    assert len(read) == FILES - len(there)
    assert contents(out.parent) == whole


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def brighten(path: Path) -> None:
    with fits.open(path, mode="update") as hdus:
        hdus[3].data *= 2
    touch(path)


def set_noise(path: Path) -> None:
    table = Table.read(path)
    table["NOISE_VARIANCE"][table["IDENT"] == 45] *= 2
    table.write(path, overwrite=True)


@pytest.mark.parametrize(
    ("change", "settings", "again"),
    [
        (lambda survey: None, EVEN, (9,)),
        (lambda survey: None, EVEN.model_copy(update={"test_fraction": 0.4}), (9,)),
        (lambda survey: None, EVEN.model_copy(update={"signal_to_noise_min": 20.0}), range(1, FILES + 1)),
        (lambda survey: touch(image_file(survey, 4)), EVEN, (4, 9)),
        (lambda survey: brighten(image_file(survey, 5)), EVEN, (5, 9)),
        (lambda survey: (survey / "real_galaxy_PSF_images_synthetic_n2.fits").unlink(), EVEN, (2, 9)),
        (lambda survey: set_noise(survey / CATALOGUE), EVEN, (3, 9)),
    ],
    ids=["nothing", "only the split", "a cut", "time of a file", "a galaxy", "no PSF", "a row of the catalogue"],
)
def test_stale_parts_are_made_again(
    survey: Path,
    out: Path,
    read: list[str],
    change: Callable[[Path], object],
    settings: Galaxies,
    again: tuple[int, ...],
) -> None:
    interrupted(survey, out)
    before = read.copy()
    change(survey)
    ingest(settings, survey, out, seed=1)
    assert sorted(read[len(before) :]) == names_of_files(*again)
    resumed = contents(out.parent)
    shutil.rmtree(out.parent)
    assert resumed == ingested(survey, out, settings)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [cut_short, flip_a_bit, lambda path: path.write_bytes(b"")])
def test_broken_part_is_made_again(survey: Path, out: Path, read: list[str], spoil: Callable[[Path], object]) -> None:
    whole = ingested(survey, out)
    interrupted(survey, out)
    (part,) = out.with_name("galaxies.zarr.parts").glob("real_galaxy_images_synthetic_n3-*.npz")
    spoil(part)
    read.clear()
    ingest(EVEN, survey, out, seed=1)
    assert read == names_of_files(3, 9)
    assert contents(out.parent) == whole


def test_what_others_left_in_the_folder_of_parts_is_removed(survey: Path, out: Path) -> None:
    interrupted(survey, out)
    folder = out.with_name("galaxies.zarr.parts")
    (folder / ".real_galaxy_images_synthetic_n9.npz.0123abcd.partial").write_bytes(b"half")
    before = parts_of(out)
    interrupted(survey, out, settings=EVEN.model_copy(update={"edge_feather": 2}))
    assert len(parts_of(out)) == FILES - 1
    assert not set(parts_of(out)) & set(before)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_worker_is_that_of_its_image_file(survey: Path, out: Path, workers: int) -> None:
    table = Table.read(survey / CATALOGUE)
    table["GAL_HDU"][table["IDENT"] == 60] = 77
    table.write(survey / CATALOGUE, overwrite=True)
    message = r"^\S*images_synthetic_n3.fits: row 59 of \S* has GAL_HDU 77, but the file has 20 HDUs \(0 to 19\)"
    with pytest.raises(InputError, match=message):
        ingest(EVEN, survey, out, seed=1, workers=workers)
    assert not out.exists()


def test_missing_image_file_is_told_before_any_work(survey: Path, out: Path) -> None:
    image_file(survey, 3).unlink()
    with pytest.raises(InputError, match=r"synthetic_n3.fits: no such image file; row 40 \(IDENT 41\)"):
        ingest(EVEN, survey, out, seed=1)
    assert not out.parent.exists()


def test_killed_worker_is_a_clear_error(survey: Path, out: Path) -> None:
    whole = ingested(survey, out)
    killed = threading.Event()

    def kill_one() -> None:
        while not killed.is_set():
            if parts_of(out) and (workers := multiprocessing.active_children()):
                os.kill(workers[0].pid or 0, signal.SIGKILL)
                killed.set()

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        with pytest.raises(LenspipeError, match=r"a worker was killed, most often for want of memory; start again"):
            ingest(EVEN, survey, out, seed=1, workers=2)
    finally:
        killed.set()
        thread.join()
    assert parts_of(out)
    ingest(EVEN, survey, out, seed=1, workers=2)
    assert contents(out.parent) == whole


def test_input_named_twice_is_read_once(shared_survey: Path, out: Path, read: list[str]) -> None:
    inputs = tuple({"layout": "survey", "split": split} for split in ("train", "validation", "test"))
    ingest(Galaxies.model_validate({"inputs": inputs}), shared_survey, out, seed=1)
    assert len(read) == FILES
    galaxies = xr.open_zarr(out, consolidated=False).load()
    names = [galaxies.name.values[galaxies.split.values == split].tolist() for split in ("train", "validation", "test")]
    assert names[0] == names[1] == names[2] != []


def test_image_file_of_which_nothing_is_kept(survey: Path, out: Path) -> None:
    table = Table.read(survey / CATALOGUE)
    table["NOISE_VARIANCE"][:20] = 1.0
    table.write(survey / CATALOGUE, overwrite=True)
    ingest(EVEN, survey, out, seed=1)
    names = xr.open_zarr(out, consolidated=False).name.values.astype(int)
    assert names.min() > 20
    assert len(set(names)) == len(names) > 100


# --- cuts of the settings


def stamp_of(image: np.ndarray, **changes: object) -> GalaxyStamp:
    return replace(GalaxyStamp("galaxy", image, 0.03, noise_sd=0.02), **changes)  # type: ignore[arg-type]


def blob(y: float, x: float, sd: float, peak: float = 1.0, side: int = 100) -> np.ndarray:
    rows, columns = np.indices((side, side))
    return peak * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sd**2))


def noisy(image: np.ndarray) -> np.ndarray:
    return image + np.random.default_rng(0).normal(0, 0.02, image.shape)


def removed(stamp: GalaxyStamp, settings: Galaxies) -> list[str]:
    tally = Tally("x")
    tally.keeps(stamp, settings)
    return [name for name, count in tally.removed.items() if count]


PAIR = noisy(blob(50, 45, 6) + blob(80, 85, 4, peak=0.4))


def test_neighbour_is_rejected_where_the_settings_say_so() -> None:
    pair, single = stamp_of(PAIR), stamp_of(noisy(blob(50, 45, 6)))
    reject = Galaxies(neighbours="reject")
    assert CUTS[-1].__name__ == "has_neighbour"
    assert removed(pair, reject) == ["has_neighbour"]
    assert removed(single, reject) == []
    assert removed(pair, Galaxies()) == removed(pair, Galaxies(neighbours="mask")) == []


def test_neighbour_is_replaced_by_noise_of_the_stamp() -> None:
    stamp = stamp_of(PAIR)
    clean = without_neighbours(stamp, Galaxies(), seed=1)
    where = neighbours(stamp, Galaxies())
    y, x = np.nonzero(where)
    assert (y.mean(), x.mean()) == pytest.approx((80, 85), abs=1)
    assert where.sum() > np.pi * 8**2  # beyond two standard deviations of its light
    changed = clean.image != PAIR
    assert changed[where].all()
    assert np.sqrt(changed.sum() / np.pi) == pytest.approx(np.sqrt(where.sum() / np.pi) + 3, abs=0.3)
    assert clean.image[where].std() == pytest.approx(0.02, rel=0.15)
    assert abs(clean.image[where].mean()) < 0.005
    assert not neighbours(clean, Galaxies()).any()


def test_noise_in_the_neighbours_place_hangs_on_seed_and_name_alone() -> None:
    first = without_neighbours(stamp_of(PAIR), Galaxies(), seed=1).image
    np.testing.assert_array_equal(first, without_neighbours(stamp_of(PAIR), Galaxies(), seed=1).image)
    assert (first != without_neighbours(stamp_of(PAIR), Galaxies(), seed=2).image).any()
    assert (first != without_neighbours(stamp_of(PAIR, name="other"), Galaxies(), seed=1).image).any()


def test_neighbour_becomes_zero_where_the_noise_is_not_known() -> None:
    image = np.where(PAIR > 0.1, PAIR, 0)
    stamp = stamp_of(image, noise_sd=0.0, zero_outside=True)
    clean = without_neighbours(stamp, Galaxies(), seed=1).image
    assert image[80, 85] > 0.3
    assert (clean[60:, 70:] == 0).all()
    np.testing.assert_array_equal(clean[:70, :65], image[:70, :65])
    assert not neighbours(stamp, Galaxies(neighbour_peak=0.5)).any()


@pytest.mark.parametrize(
    ("image", "settings", "found"),
    [
        (noisy(blob(50, 45, 6) + blob(80, 85, 2, peak=0.2)), {}, False),  # a hundredth of the flux
        (noisy(blob(50, 45, 6) + blob(80, 85, 2, peak=0.2)), {"neighbour_flux_ratio": 0.005}, True),
        (noisy(blob(50, 45, 6) + blob(50, 63, 5, peak=0.5)), {}, False),  # touches the galaxy
        (noisy(blob(50, 30, 6) + blob(50, 72, 6)), {}, True),  # the centre of the light is between them
        (PAIR, {"neighbour_noise": 30.0}, False),
        (np.full((100, 100), np.nan), {}, False),
        (np.zeros((100, 100)), {}, False),
    ],
)
def test_what_counts_as_a_neighbour(image: np.ndarray, settings: dict[str, object], found: bool) -> None:
    assert neighbours(stamp_of(image), Galaxies.model_validate(settings)).any() == found


@pytest.mark.parametrize("mode", ["keep", "mask", "reject"])
def test_neighbours_on_the_way_through_the_stage(mode: str, tmp_path: Path, out: Path) -> None:
    """Fifteen galaxies alone, fifteen with a neighbour on the side."""
    alone = np.where(blob(100, 100, 8, side=200) > 0.05, blob(100, 100, 8, side=200), 0)
    beside = np.where(blob(120, 130, 5, side=200) > 0.05, 0.45 * blob(120, 130, 5, side=200), 0)
    np.savez(tmp_path / "stamps.npz", images=np.stack([alone, alone + beside] * 15))
    source = {"layout": "stamp_archive", "archive": str(tmp_path / "stamps.npz"), "key": "images", "pixel_scale": 0.03}
    settings = {"inputs": (source,), "neighbours": mode, "validation_fraction": 0.3, "test_fraction": 0.3}
    ingest(Galaxies.model_validate(settings | {"side_per_half_light_radius": 12.0}), None, out, seed=1)
    galaxies = xr.open_zarr(out, consolidated=False).load()
    rows = [int(name.split("_")[1]) % 2 for name in galaxies.name.values]
    assert rows == ([0] * 15 if mode == "reject" else [0, 1] * 15)
    assert f"has_neighbour,{15 if mode == 'reject' else 0}," in out.with_name("cuts.csv").read_text()
    if mode != "reject":
        single, pair = galaxies.image.values[0], galaxies.image.values[1]
        assert (np.abs(pair - single).max() < 1e-6) == (mode == "mask")


def test_range_of_the_sersic_index_is_a_setting(shared_survey: Path) -> None:
    stamps = [stamp for file in image_files(shared_survey / CATALOGUE) for stamp in file.stamps()]
    wide, narrow = (
        sum("sersic_unphysical" in removed(stamp, settings) for stamp in stamps)
        for settings in (Galaxies(), Galaxies(sersic_index_min=1.0, sersic_index_max=2.0))
    )
    inside = [1 <= stamp.sersic.n <= 2 for stamp in stamps if stamp.sersic and 1 <= stamp.sersic.status <= 4]
    assert wide < 20 < narrow
    assert narrow >= inside.count(False)


def test_side_of_squares_of_an_archive_is_a_setting() -> None:
    stamp = stamp_of(blob(150, 150, 10, side=300), zero_outside=True, noise_sd=0.0)
    radius = 10 * np.sqrt(2 * np.log(2))
    for sides in (7.0, 10.0):
        galaxy = parts.learnable(Galaxies(side_per_half_light_radius=sides), stamp)
        assert galaxy.pixel_scale * 64 / 0.03 == pytest.approx(sides * radius, abs=5)


# --- widths of PSFs


@pytest.mark.parametrize("fwhm", [2.5, 3.5, 8.0, 15.0])
@pytest.mark.parametrize("place", [(19, 19), (19.3, 18.6), (18.5, 19.5)])
def test_fwhm_of_a_gaussian(fwhm: float, place: tuple[float, float]) -> None:
    psf = blob(*place, fwhm / 2.3548, side=39)
    assert psf_fwhm(psf) == pytest.approx(fwhm, rel=0.03)
    assert psf_fwhm(1e-3 * psf) == pytest.approx(psf_fwhm(psf))


def test_fwhm_is_of_the_core_not_of_wings_or_ghosts() -> None:
    core = blob(19, 19, 2, side=39)
    assert psf_fwhm(core + blob(19, 19, 12, peak=0.02, side=39)) == pytest.approx(psf_fwhm(core), rel=0.03)
    assert psf_fwhm(core + blob(32, 33, 1.5, peak=0.8, side=39)) == pytest.approx(psf_fwhm(core), rel=0.001)
    rows, columns = np.indices((39, 39)) - 19
    oblong = np.exp(-(rows**2 / (2 * 1.5**2) + columns**2 / (2 * 3.0**2)))
    assert psf_fwhm(oblong) == pytest.approx(2.3548 * np.sqrt(1.5 * 3.0), rel=0.02)


@pytest.mark.parametrize("psf", [np.zeros((9, 9)), -np.ones((9, 9)), np.full((9, 9), np.nan)])
def test_fwhm_of_no_light_is_not_known(psf: np.ndarray) -> None:
    assert np.isnan(psf_fwhm(psf))


def test_each_galaxy_has_the_width_of_its_own_psf(tmp_path: Path) -> None:
    for name, widths in (("a.fits", (2.0, 3.0)), ("b.fits", (4.0, 5.0))):
        first, second = (blob(19, 19, sd, side=39).astype(np.float32) for sd in widths)
        fits.HDUList([fits.PrimaryHDU(first), fits.ImageHDU(second)]).writeto(tmp_path / name)
    wanted = [("b.fits", 1), ("a.fits", 0), None, ("none.fits", 0), ("b.fits", 0), ("a.fits", 1)]
    psfs = [PsfImage(tmp_path / at[0], at[1], 0.05, "row") if at else None for at in wanted]
    expected = 0.05 * 2.3548 * np.array([5.0, 2.0, np.nan, np.nan, 4.0, 3.0])
    np.testing.assert_allclose(psf_fwhms(psfs), expected, rtol=0.02)
    with pytest.raises(InputError, match=r"a.fits: row 7 of c has PSF_HDU 2, but the file has 2 HDUs \(0 to 1\)"):
        psf_fwhms([PsfImage(tmp_path / "a.fits", 2, 0.05, "row 7 of c")])


def test_width_of_the_psf_is_stored(survey: Path, out: Path) -> None:
    """The survey's Moffat PSF of 0.09 arcsec; not known where its file is not there."""
    (survey / "real_galaxy_PSF_images_synthetic_n2.fits").unlink()
    ingest(EVEN, survey, out, seed=1)
    galaxies = xr.open_zarr(out, consolidated=False).load()
    unknown = [20 < int(name) <= 40 for name in galaxies.name.values]
    assert sum(unknown) > 3
    np.testing.assert_array_equal(np.isnan(galaxies.psf_fwhm), unknown)
    assert galaxies.psf_fwhm.values[~np.array(unknown)] == pytest.approx(0.09, rel=0.03)


@pytest.mark.parametrize("columns", [("PSF_FILENAME",), ("PSF_FILENAME", "PSF_HDU")])
def test_catalogue_without_psfs(survey: Path, out: Path, columns: tuple[str, ...]) -> None:
    table = Table.read(survey / CATALOGUE)
    table.remove_columns(columns)
    table.write(survey / CATALOGUE, overwrite=True)
    ingest(EVEN, survey, out, seed=1)
    assert np.isnan(xr.open_zarr(out, consolidated=False).psf_fwhm.values).all()
