"""Ingestion of galaxies: readers, cuts, stamps, galaxies.zarr and the errors of broken inputs."""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from astropy.io import fits
from astropy.table import Table
from skimage.transform import resize_local_mean

from lenspipe.config import Galaxies, RealGalaxyCatalogInput, StampArchiveInput, Survey, SurveyInput
from lenspipe.errors import InputError
from lenspipe.galaxies import ingest as ingestion
from lenspipe.galaxies.archive import StampArchive
from lenspipe.galaxies.catalogue import GalaxyStamp, SersicFit, image_files
from lenspipe.galaxies.dataset import open_galaxies
from lenspipe.galaxies.exclusion import Level, Sample, excluded_rows
from lenspipe.galaxies.ingest import ingest, random_split, tables_read
from lenspipe.galaxies.parts import learnable
from lenspipe.galaxies.selection import CUTS, Tally, signal_to_noise
from lenspipe.galaxies.stamps import (
    centred,
    downscale,
    feather,
    half_light_radius,
    light_centre,
    noise_factor,
    square_stamp,
)
from lenspipe.image import source_plane
from lenspipe.survey import CATALOGUE, write_survey

EVEN = Galaxies(validation_fraction=0.3, test_fraction=0.3)
GOOD_FIT = SersicFit(status=1, hlr=10.0, n=1.0, q=0.8)


def blob(shape: tuple[int, int] = (64, 64), y: float = 31.5, x: float = 31.5, sd: float = 6.0) -> np.ndarray:
    rows, columns = np.indices(shape)
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sd**2))


@pytest.fixture(scope="session")
def shared_survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("survey") / "survey"
    write_survey(Survey(galaxies=60, galaxies_per_file=25), out, seed=2)
    return out


@pytest.fixture
def survey(shared_survey: Path, tmp_path: Path) -> Path:
    """A copy of the survey, to be broken."""
    return Path(shutil.copytree(shared_survey, tmp_path / "survey"))


@pytest.fixture(scope="session")
def ingested(shared_survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("galaxies") / "galaxies.zarr"
    ingest(EVEN, shared_survey, out, seed=1)
    return out


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Thirty galaxies of 120 pixels, zero outside; the fourth holds a NaN and the fifth no light."""
    sizes = np.linspace(3, 8, 30)
    images = np.stack(
        [np.where(blob((120, 120), 59.5, 59.5, sd) > 0.02, blob((120, 120), 59.5, 59.5, sd), 0) for sd in sizes]
    )
    images[3, 60, 60] = np.nan
    images[4] = 0
    np.savez(tmp_path / "stamps.npz", f814w=images.astype(np.float32), redshift=np.ones(30))
    return tmp_path / "stamps.npz"


def change_table(path: Path, **columns: object) -> None:
    """Set columns of a table to given values, or drop those given as None."""
    table = Table.read(path)
    for name, value in columns.items():
        if value is None:
            table.remove_column(name)
        else:
            table[name] = value
    table.write(path, overwrite=True)


def read_all(survey: Path) -> list[GalaxyStamp]:
    return stamps_of(survey / CATALOGUE)


def stamps_of(catalogue: Path, sersic_table: Path | None = None) -> list[GalaxyStamp]:
    return [stamp for file in image_files(catalogue, sersic_table) for stamp in file.stamps()]


# --- galaxies.zarr and cuts.csv


def test_galaxies_are_as_described(ingested: Path) -> None:
    galaxies = xr.open_zarr(ingested, consolidated=False).load()
    assert galaxies.image.dims == ("galaxy", "y", "x")
    assert galaxies.image.shape[1:] == (64, 64)
    assert galaxies.image.dtype == np.float32
    np.testing.assert_array_equal(galaxies.image.max(("y", "x")), 1)
    assert set(galaxies.split.values) == {"train", "validation", "test"}
    assert set(galaxies.input.values) == {"survey"}
    assert len(set(galaxies.name.values)) == galaxies.sizes["galaxy"]
    assert ((galaxies.pixel_scale >= 0.03) & (galaxies.pixel_scale <= 0.03 * 160 / 64)).all()


def test_cuts_add_up_to_the_galaxies_written(ingested: Path) -> None:
    with ingested.with_name("cuts.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["cut"] for row in rows] == ["read", *(cut.__name__ for cut in CUTS)]
    assert rows[0] == {"input": "survey", "cut": "read", "removed": "0", "left": "60"}
    left = [int(row["left"]) for row in rows]
    assert [int(row["removed"]) for row in rows[1:]] == [before - after for before, after in pairwise(left)]
    assert left[-1] == xr.open_zarr(ingested, consolidated=False).sizes["galaxy"]


def test_galaxies_carry_their_provenance(ingested: Path, shared_survey: Path) -> None:
    record = xr.open_zarr(ingested, consolidated=False).attrs["lenspipe"]
    assert record["stage"] == "galaxies"
    assert record["seed"] == 1
    assert list(record["inputs"]) == [str(shared_survey / CATALOGUE)]
    assert record["facts"]["cuts"][0] == ["survey", "read", 0, 60]
    assert record["settings"]["galaxies"]["test_fraction"] == 0.3


def test_noise_written_is_the_noise_in_the_images(ingested: Path) -> None:
    """In the corners, behind the feather, there is next to no galaxy."""
    galaxies = xr.open_zarr(ingested, consolidated=False).load()
    corners = galaxies.image.values[:, 5:13, 5:13] - galaxies.image.values[:, 5:13, 5:13].mean((1, 2), keepdims=True)
    measured = np.sqrt((corners**2).sum((1, 2)) / 63)
    assert np.median(measured / galaxies.noise_sd) == pytest.approx(1, abs=0.1)


def test_blocks_do_not_change_what_is_written(
    ingested: Path, shared_survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestion, "BLOCK", 7)
    ingest(EVEN, shared_survey, tmp_path / "galaxies.zarr", seed=1)
    written = [xr.open_zarr(path, consolidated=False).load() for path in (ingested, tmp_path / "galaxies.zarr")]
    xr.testing.assert_equal(*written)


def test_split_of_an_input_can_be_given(shared_survey: Path, archive: Path, tmp_path: Path) -> None:
    stamps = {"layout": "stamp_archive", "archive": str(archive), "key": "f814w", "pixel_scale": 0.06, "split": "test"}
    settings = Galaxies(inputs=({"layout": "survey", "split": "train"}, stamps, stamps | {"split": "validation"}))
    ingest(settings, shared_survey, tmp_path / "galaxies.zarr", seed=1)
    galaxies = xr.open_zarr(tmp_path / "galaxies.zarr", consolidated=False).load()
    label = f"{tmp_path.name}/stamps.npz:f814w"
    assert set(galaxies.split.values[galaxies.input.values == "survey"]) == {"train"}
    assert galaxies.split.values[galaxies.input.values == label].tolist() == ["test"] * 28
    assert galaxies.split.values[galaxies.input.values == f"{label} (2)"].tolist() == ["validation"] * 28


def test_random_split_follows_the_fractions_and_only_seed_and_name() -> None:
    splits = [random_split(EVEN, 1, str(i)) for i in range(4000)]
    for name, share in (("train", 0.4), ("validation", 0.3), ("test", 0.3)):
        assert splits.count(name) / 4000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 4000))
    assert splits != [random_split(EVEN, 2, str(i)) for i in range(4000)]
    assert splits[::-1] == [random_split(EVEN, 1, str(i)) for i in reversed(range(4000))]


# --- readers


def test_stamps_are_those_of_the_image_files(shared_survey: Path) -> None:
    stamps, rows = read_all(shared_survey), fits.getdata(shared_survey / CATALOGUE, 1)
    assert [stamp.name for stamp in stamps] == [str(ident) for ident in rows["IDENT"]]
    for stamp, row in list(zip(stamps, rows, strict=True))[::13]:
        np.testing.assert_array_equal(stamp.image, fits.getdata(shared_survey / row["GAL_FILENAME"], row["GAL_HDU"]))
        assert stamp.image.dtype == np.dtype(np.float64)
        assert stamp.noise_sd == pytest.approx(0.0026)
        assert stamp.pixel_scale == 0.03


def test_reader_goes_by_name_not_by_width_or_order(survey: Path) -> None:
    before = read_all(survey)
    table = Table.read(survey / CATALOGUE)
    table["IDENT"] = table["IDENT"].astype(np.int64)
    table["GAL_FILENAME"] = [f"{name:<200}" for name in table["GAL_FILENAME"]]
    table = table[list(reversed(table.colnames))][np.random.default_rng(0).permutation(60)]
    table.remove_columns(["RA", "DEC", "stamp_flux", "WEIGHT"])
    table.write(survey / CATALOGUE, overwrite=True)
    after = read_all(survey)
    assert [stamp.name for stamp in after] == [stamp.name for stamp in before]
    np.testing.assert_array_equal(after[17].image, before[17].image)


def test_sersic_fits_are_joined_by_ident(survey: Path) -> None:
    before = {stamp.name: stamp.sersic for stamp in read_all(survey)}
    path = survey / CATALOGUE.replace(".fits", "_fits.fits")
    Table.read(path)[::-1][:-1].write(path, overwrite=True)
    after = {stamp.name: stamp.sersic for stamp in read_all(survey)}
    assert after["1"] == SersicFit(status=0, hlr=0, n=0, q=0)
    assert {name: fit for name, fit in after.items() if name != "1"} == {n: f for n, f in before.items() if n != "1"}


@pytest.mark.parametrize("how", ["absent", "other columns"])
def test_sersic_cuts_do_not_apply_without_sersic_fits(survey: Path, how: str) -> None:
    path = survey / CATALOGUE.replace(".fits", "_fits.fits")
    if how == "absent":
        path.unlink()
    else:
        change_table(path, sersicfit=None)
    tally = Tally("survey")
    for stamp in read_all(survey):
        assert stamp.sersic is None
        tally.keeps(stamp, Galaxies())
    assert tally.removed["sersic_fit_failed"] == tally.removed["sersic_unphysical"] == 0


def test_archive_rows_are_named_alike_in_every_band(archive: Path) -> None:
    stamps = list(StampArchive(archive, "f814w", 0.06, exclude=(2,)).stamps())
    assert [stamp.name for stamp in stamps[:3]] == ["stamps_0", "stamps_1", "stamps_2"]
    assert [stamp.excluded for stamp in stamps[:4]] == [False, False, True, False]
    assert all(stamp.zero_outside and stamp.sersic is None and stamp.noise_sd == 0 for stamp in stamps)


def test_nan_and_empty_stamps_are_counted_not_crashed_on(archive: Path) -> None:
    tally = Tally("stamps")
    kept = [tally.keeps(stamp, Galaxies()) for stamp in StampArchive(archive, "f814w", 0.06, exclude=(0,)).stamps()]
    assert tally.removed == {
        cut.__name__: {"bad_pixels": 2, "excluded_by_hand": 1}.get(cut.__name__, 0) for cut in CUTS
    }
    assert [row for row, keep in enumerate(kept) if not keep] == [0, 3, 4]


# --- cuts


def stamp_of(**changes: object) -> GalaxyStamp:
    """A galaxy that passes all cuts: its 4x4 means peak at 0.9 to 1, so signal to noise is about 30."""
    good = GalaxyStamp("good", blob(), 0.03, noise_sd=1 / 30, sersic=GOOD_FIT)
    return replace(good, **changes)  # type: ignore[arg-type]


def test_good_galaxy_passes() -> None:
    assert Tally("x").keeps(stamp_of(), Galaxies())


@pytest.mark.parametrize(
    ("cut", "changes"),
    [
        ("excluded_by_hand", {"excluded": True}),
        ("sersic_fit_failed", {"sersic": replace(GOOD_FIT, status=0)}),
        ("sersic_fit_failed", {"sersic": replace(GOOD_FIT, status=5)}),
        ("sersic_unphysical", {"sersic": replace(GOOD_FIT, hlr=-1.0)}),
        ("sersic_unphysical", {"sersic": replace(GOOD_FIT, n=9.0)}),
        ("sersic_unphysical", {"sersic": replace(GOOD_FIT, n=float("nan"))}),
        ("sersic_unphysical", {"sersic": replace(GOOD_FIT, q=0.0)}),
        ("stamp_too_small", {"image": blob((63, 80))}),
        ("bad_pixels", {"image": np.where(np.eye(64) > 0, np.nan, 1.0)}),
        ("bad_pixels", {"image": -blob()}),
        ("bad_pixels", {"image": np.zeros((64, 64)), "noise_sd": 0.0, "zero_outside": True}),
        ("signal_to_noise_low", {"noise_sd": 1 / 10}),
        ("signal_to_noise_high", {"noise_sd": 1 / 90}),
    ],
)
def test_each_cut_removes_what_it_names(cut: str, changes: dict[str, object]) -> None:
    tally = Tally("x")
    assert not tally.keeps(stamp_of(**changes), Galaxies())
    assert {name for name, count in tally.removed.items() if count} == {cut}


def test_signal_to_noise_is_the_brightest_4x4_mean_over_the_pixel_noise() -> None:
    image = np.zeros((64, 64))
    image[24:28, 36:40] = 3.0
    image[10, 10] = 40.0
    assert signal_to_noise(stamp_of(image=image, noise_sd=0.1), Galaxies()) == pytest.approx(30)
    doubled = np.kron(image, np.ones((2, 2)))
    assert signal_to_noise(stamp_of(image=doubled, noise_sd=0.1), Galaxies()) == pytest.approx(30)


def test_signal_to_noise_does_not_apply_where_the_noise_is_unknown() -> None:
    assert Tally("x").keeps(stamp_of(noise_sd=0.0), Galaxies(signal_to_noise_min=1e6, signal_to_noise_max=2e6))


# --- stamps


@pytest.mark.parametrize("side", [64, 65, 97, 128, 200])
def test_downscaling_is_the_area_mean(side: int) -> None:
    image = np.random.default_rng(1).normal(size=(side, side))
    np.testing.assert_allclose(downscale(image, 64), resize_local_mean(image, (64, 64)), atol=1e-12)


@pytest.mark.parametrize("side", [64, 71, 127, 160, 301])
def test_downscaling_keeps_the_mean(side: int) -> None:
    image = np.random.default_rng(side).uniform(size=(side, side))
    assert downscale(image, 64).mean() == pytest.approx(image.mean(), rel=1e-12)


@pytest.mark.parametrize("side", [64, 81, 128])
def test_noise_factor_is_that_of_white_noise(side: int) -> None:
    rng = np.random.default_rng(1)
    measured = np.sqrt(np.mean([(downscale(rng.normal(size=(side, side)), 64) ** 2).mean() for _ in range(40)]))
    assert noise_factor(side, 64) == pytest.approx(measured, rel=0.03)
    assert noise_factor(128, 64) == pytest.approx(0.5)


def test_centre_is_the_light_not_a_hot_pixel() -> None:
    image = blob((90, 140), 40.0, 99.0)
    image[5, 5] = 5.0
    assert light_centre(image) == pytest.approx((40, 99), abs=0.2)


@pytest.mark.parametrize(("shape", "at"), [((64, 150), (31.5, 100.0)), ((150, 70), (40.0, 34.5))])
def test_square_follows_the_light_along_the_longer_side(shape: tuple[int, int], at: tuple[float, float]) -> None:
    square = square_stamp(blob(shape, *at), 64)
    assert square.shape == (min(shape), min(shape))
    assert light_centre(square) == pytest.approx(((min(shape) - 1) / 2,) * 2, abs=1)


def test_square_of_a_stamp_that_is_zero_outside_is_seven_half_light_radii() -> None:
    image = blob((300, 300), 140.0, 160.0, sd=12.0)
    square = square_stamp(image, 64, 7.0)
    radius = half_light_radius(image, (140.0, 160.0))
    assert radius == pytest.approx(12 * np.sqrt(2 * np.log(2)), abs=0.5)
    assert len(square) == np.ceil(7 * radius)
    assert square_stamp(blob((300, 300), 150, 150, sd=2.0), 64, 7.0).shape == (64, 64)
    assert square_stamp(image, 64).shape == (300, 300)


def test_feather_fades_frame_and_mask_and_leaves_the_inside() -> None:
    image = np.ones((64, 64))
    image[40:, 40:] = 0
    image[20, 20] = 0
    faded = feather(image, 4)
    assert faded[0].max() == pytest.approx(np.sin(np.pi / 10) ** 2)
    assert faded[50, 39] == pytest.approx(np.sin(np.pi / 10) ** 2)
    np.testing.assert_array_equal(faded[6:34, 6:34], image[6:34, 6:34])
    np.testing.assert_array_equal(feather(image, 0), image)


def test_learnable_image_has_peak_one_and_the_scale_of_its_pixels() -> None:
    galaxy = learnable(Galaxies(), stamp_of(image=7 * blob((128, 128), 63.5, 63.5, 12.0), noise_sd=0.1))
    assert galaxy.image.max() == 1
    assert galaxy.pixel_scale == pytest.approx(0.06)
    assert galaxy.noise_sd == pytest.approx(0.1 / 2 / 7, rel=0.01)


@pytest.mark.parametrize("side", [64, 100, 160])
def test_noise_that_is_not_known_is_estimated(side: int) -> None:
    """Of a stamp that is zero outside the galaxy, before it is resampled: what is taken out of it later is its own."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    light = blob((side, side), (side - 1) / 2, (side - 1) / 2, side / 12)
    image = light + 0.02 * np.random.default_rng(1).normal(size=light.shape)
    image[np.hypot(x, y) > 0.4 * side] = 0
    known, unknown = (
        learnable(Galaxies(), stamp_of(image=image, zero_outside=True, noise_sd=sd)) for sd in (0.02, 0.0)
    )
    np.testing.assert_array_equal(known.image, unknown.image)
    assert unknown.noise_sd == pytest.approx(known.noise_sd, rel=0.15)
    quiet = learnable(Galaxies(), stamp_of(image=np.where(image == 0, 0, 1.0), zero_outside=True, noise_sd=0.0))
    assert quiet.noise_sd == 0


# --- errors


def test_missing_catalogue_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.fits: no such catalogue; expected a FITS"):
        stamps_of(tmp_path / "nowhere.fits")


def test_an_hdu_below_zero_is_not_counted_from_the_end(survey: Path) -> None:
    change_table(survey / CATALOGUE, GAL_HDU=-1)
    with pytest.raises(InputError, match=r"has GAL_HDU -1, but the file has \d+ HDUs"):
        read_all(survey)


def test_images_may_be_whole_numbers_and_packed(survey: Path) -> None:
    plain = read_all(survey)
    names = {str(name) for name in Table.read(survey / CATALOGUE)["GAL_FILENAME"]}
    for name in names:
        with fits.open(survey / name) as hdus:
            for hdu in hdus:
                if hdu.data is not None:
                    hdu.data = (1000 * (hdu.data - hdu.data.min())).astype("uint16")
            hdus.writeto(survey / f"{name}.gz")
    change_table(survey / CATALOGUE, GAL_FILENAME=[f"{n}.gz" for n in Table.read(survey / CATALOGUE)["GAL_FILENAME"]])
    packed = read_all(survey)
    assert [stamp.name for stamp in packed] == [stamp.name for stamp in plain]
    for one, other in zip(packed, plain, strict=True):
        np.testing.assert_allclose(one.image, 1000 * (other.image - other.image.min()), atol=1)
    cut = survey / f"{min(names)}.gz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(InputError, match=r"fits.gz: .*cut short"):
        read_all(survey)


def test_columns_that_are_too_narrow_are_named(survey: Path) -> None:
    path = survey / CATALOGUE.replace(".fits", "_fits.fits")
    change_table(path, fit_status=np.ones(len(Table.read(path))))
    with pytest.raises(InputError, match=r"_fits.fits: column fit_status has shape \(\d+,\); expected rows of 5"):
        read_all(survey)


def test_galaxies_that_were_not_written_whole_are_named(ingested: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(ingested, tmp_path / "galaxies.zarr"))
    (half / "zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"galaxies.zarr: unfinished or damaged .*run the stage galaxies again"):
        open_galaxies(half, "train")
    (half / "zarr.json").unlink()
    with pytest.raises(InputError, match="unfinished or damaged"):
        open_galaxies(half, "train")


def test_tables_beside_a_catalogue_are_among_its_files(tmp_path: Path) -> None:
    given: dict[str, object] = {"layout": "real_galaxy_catalog", "catalogue": "a/b.fits"}
    plain, strict = (RealGalaxyCatalogInput.model_validate(given | {"exclusion": e}) for e in ("none", "marginal"))
    assert (plain.files, plain.read_where_there) == (("a/b.fits",), ("a/b_fits.fits",))
    assert (strict.files, strict.read_where_there) == (("a/b.fits", "a/b_fits.fits", "a/b_selection.fits"), ())
    assert RealGalaxyCatalogInput.model_validate(given | {"fits": "c.fits"}).files == ("a/b.fits", "c.fits")
    (tmp_path / "b_fits.fits").touch()
    here = RealGalaxyCatalogInput.model_validate(given | {"catalogue": str(tmp_path / "b.fits")})
    assert tables_read([here]) == [tmp_path / "b_fits.fits"]


def test_a_survey_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/real_galaxy_.*: no survey here; run the stage survey first"):
        ingest(EVEN, tmp_path / "nowhere", tmp_path / "galaxies.zarr", seed=1)


def test_missing_image_file_is_named_with_the_row_that_names_it(survey: Path) -> None:
    (survey / "real_galaxy_images_synthetic_n2.fits").unlink()
    with pytest.raises(
        InputError, match=r"images_synthetic_n2.fits: no such image file; row 25 \(IDENT 26\) of .*catalog"
    ):
        read_all(survey)


@pytest.mark.parametrize("column", ["IDENT", "GAL_FILENAME", "GAL_HDU", "PIXEL_SCALE", "NOISE_VARIANCE"])
def test_missing_column_is_named(survey: Path, column: str) -> None:
    change_table(survey / CATALOGUE, **{column: None})
    with pytest.raises(InputError, match=rf"catalog_synthetic.fits: column\(s\) {column} missing; found .*BAND"):
        read_all(survey)


def test_missing_column_of_a_fits_table_that_was_given_is_named(survey: Path) -> None:
    path = survey / CATALOGUE.replace(".fits", "_fits.fits")
    change_table(path, fit_status=None)
    with pytest.raises(InputError, match=r"_fits.fits: column\(s\) fit_status missing"):
        stamps_of(survey / CATALOGUE, path)


def test_missing_fits_table_that_was_given_is_named(survey: Path) -> None:
    with pytest.raises(InputError, match=r"other_fits.fits: no such catalogue"):
        stamps_of(survey / CATALOGUE, survey / "other_fits.fits")


def test_hdu_beyond_the_file_is_named(survey: Path) -> None:
    change_table(survey / CATALOGUE, GAL_HDU=[*range(59), 77])
    with pytest.raises(InputError, match=r"n2.fits: row 25 of .* has GAL_HDU 25, but the file has 25 HDUs \(0 to 24\)"):
        read_all(survey)


def test_hdu_without_an_image_is_named(survey: Path) -> None:
    path = survey / "real_galaxy_images_synthetic_n1.fits"
    with fits.open(path) as hdus:
        images = [hdu.data.copy() for hdu in hdus]
    fits.HDUList([fits.PrimaryHDU(), *map(fits.ImageHDU, images[1:])]).writeto(path, overwrite=True)
    with pytest.raises(InputError, match=r"n1.fits: row 0 of .* has GAL_HDU 0, which holds no image"):
        read_all(survey)


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
def test_truncated_image_file_is_an_error(survey: Path, share: float) -> None:
    path = survey / "real_galaxy_images_synthetic_n2.fits"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match=r"n2.fits: .*cut short"):
        read_all(survey)


@pytest.mark.parametrize("size", [0, 1000, 9000])
def test_truncated_catalogue_is_an_error(survey: Path, size: int) -> None:
    os.truncate(survey / CATALOGUE, size)
    with pytest.raises(InputError, match=r"catalog_synthetic.fits: .*cut short"):
        read_all(survey)


def test_catalogue_without_a_table_is_an_error(survey: Path) -> None:
    fits.PrimaryHDU(np.zeros((4, 4))).writeto(survey / CATALOGUE, overwrite=True)
    with pytest.raises(InputError, match=r"expected a catalogue table, found 1 HDU\(s\) and none a table"):
        read_all(survey)


def test_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.npz: no such stamp archive"):
        list(StampArchive(tmp_path / "none.npz", "f814w", 0.06).stamps())


def test_array_that_is_not_in_an_archive_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "stamps.npy", np.ones((2, 64, 64)))
    with pytest.raises(InputError, match=r"stamps.npy: not an npz archive"):
        list(StampArchive(tmp_path / "stamps.npy", "f814w", 0.06).stamps())


def test_missing_key_is_named_with_those_found(archive: Path) -> None:
    with pytest.raises(InputError, match=r"stamps.npz: no array 'f606w'; found f814w, redshift; correct the key"):
        list(StampArchive(archive, "f606w", 0.06).stamps())


def test_array_that_holds_no_stamps_is_an_error(archive: Path) -> None:
    with pytest.raises(InputError, match=r"redshift has shape \(30,\) of float64; expected stamps \[galaxy, y, x\]"):
        list(StampArchive(archive, "redshift", 0.06).stamps())


def test_excluded_row_beyond_the_archive_is_an_error(archive: Path) -> None:
    with pytest.raises(InputError, match=r"exclude names rows \[30\], but f814w has 30 galaxies"):
        list(StampArchive(archive, "f814w", 0.06, exclude=(1, 30)).stamps())


@pytest.mark.parametrize("size", [0, 500, 30000])
def test_truncated_archive_is_an_error(archive: Path, size: int) -> None:
    os.truncate(archive, size)
    with pytest.raises(InputError, match=r"stamps.npz: not an npz archive, or cut short"):
        list(StampArchive(archive, "f814w", 0.06).stamps())


def test_empty_selection_says_which_cut_removed_the_last(shared_survey: Path, tmp_path: Path) -> None:
    settings = Galaxies(signal_to_noise_min=1e5, signal_to_noise_max=1e6)
    match = (
        r"(?s)no galaxy is left.*survey: 60 read, removed: .*signal_to_noise_low \d+, and the last of them went at sig"
    )
    with pytest.raises(InputError, match=match):
        ingest(settings, shared_survey, tmp_path / "galaxies.zarr", seed=1)
    assert not (tmp_path / "cuts.csv").exists()


@pytest.mark.parametrize(
    ("changes", "empty"),
    [
        ({"test_fraction": 0}, "test"),
        ({"validation_fraction": 0}, "validation"),
        ({"inputs": ({"layout": "survey", "split": "validation"},)}, "train, test"),
    ],
)
def test_empty_split_is_named(shared_survey: Path, tmp_path: Path, changes: dict[str, object], empty: str) -> None:
    settings = Galaxies.model_validate({"validation_fraction": 0.3, "test_fraction": 0.3} | changes)
    with pytest.raises(
        InputError, match=rf"no galaxy in the split\(s\) {empty} \(found train \d+.*or raise galaxies.valid"
    ):
        ingest(settings, shared_survey, tmp_path / "galaxies.zarr", seed=1)


# --- exclusion levels


def exclusion_tables(folder: Path) -> Path:
    """Ten galaxies, the first good, each of the others odd in one way; the sixth has no row in the other tables.

    The last four: a magnitude unlike the catalogue's; wide with a high index; a high index alone; a mask close by, and
    an image without a peak.
    """
    others = np.array([5, 4, 3, 2, 1, 7, 8, 9, 10])
    columns = {"IDENT": np.arange(1, 11), "stamp_flux": np.array([1.0, 1, 1, 1, -1, 1, 1, 1, 1, 1])}
    selection = {"IDENT": others, "dmag": np.array([0.0, 0, 0, 0, 0, -0.9, 0, 0, 0])}
    selection |= {"sn_ellip_gauss": np.array([50.0, 50, 50, 15, 50, 50, 50, 50, 50])}
    selection |= {"min_mask_dist_pixels": np.array([20.0, 20, 5, 20, 20, 20, 20, 20, 5])}
    selection |= {"average_mask_adjacent_pixel_count": np.array([0.5] * 8 + [0.1])}
    selection |= {"peak_image_pixel_count": np.array([1.0] * 8 + [0.0])}
    status, radius = np.full((9, 5), 1), np.full((9, 3), 0.5)
    sersic = np.tile([1.0, 10, 2, 0.5, 0, 0, 0, 0], (9, 1))
    status[4, 0], sersic[[6, 7], 2], radius[6, 0] = 5, 6, 1.5
    fitted = {"IDENT": others, "fit_status": status, "sersicfit": sersic, "hlr": radius}
    catalogue = folder / "catalogue.fits"
    for path, table in (("", columns), ("_selection", selection), ("_fits", fitted)):
        Table(table).write(folder / f"catalogue{path}.fits")
    return catalogue


@pytest.mark.parametrize(
    ("level", "sample", "kept"),
    [
        ("none", "23.5", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("bad_fits", "23.5", [1, 2, 3, 4, 5, 7, 8, 9, 10]),  # one good fit of two is enough
        ("bad_stamp", "23.5", [1, 4, 7, 8, 9]),  # 2: signal-to-noise; 3, 10: a mask close by; 5: flux
        ("bad_stamp", "25.2", [1, 2, 3, 4, 7, 8, 9]),
        ("marginal", "25.2", [2, 3, 4, 9]),
    ],
)
def test_exclusion_levels(tmp_path: Path, level: Level, sample: Sample, kept: list[int]) -> None:
    excluded = excluded_rows(exclusion_tables(tmp_path), level, sample, None, None)
    assert (np.nonzero(~excluded)[0] + 1).tolist() == kept


def test_level_whose_table_is_missing_says_so(tmp_path: Path) -> None:
    catalogue = exclusion_tables(tmp_path)
    catalogue.with_name("catalogue_selection.fits").unlink()
    with pytest.raises(InputError, match=r"catalogue_selection.fits: no such table; exclusion level marginal of"):
        excluded_rows(catalogue, "marginal", "23.5", None, None)


# --- real galaxies, where LENSPIPE_DATA names a folder that holds them


@pytest.fixture
def real_galaxies() -> Path:
    folder = Path(os.environ.get("LENSPIPE_DATA", "")) / "galaxies"
    if not os.environ.get("LENSPIPE_DATA") or not folder.is_dir():
        pytest.skip("needs real galaxies: set LENSPIPE_DATA to a folder that holds galaxies/")
    return folder


@pytest.mark.parametrize(
    ("catalogue", "read", "kept", "sersic"),
    [
        ("btk_cosmos/real_galaxy_catalog_26_extension_example.fits", 100, 6, False),
        ("paltas_cosmos_test/real_galaxy_catalog_23.5.fits", 10, 3, True),
        ("slsim_test/real_galaxy_catalog_23.5.fits", 2, 0, True),
        ("aegis_test/AEGIS_F606w_catalog.fits", 5, 1, False),
        ("aegis_test/AEGIS_F814w_catalog.fits", 5, 2, False),
        ("aegis_test/test_catalog.fits", 2, 0, False),
    ],
)
def test_real_catalogues_are_read(real_galaxies: Path, catalogue: str, read: int, kept: int, sersic: bool) -> None:
    tally, stamps = Tally(catalogue), stamps_of(real_galaxies / catalogue)
    assert sum(tally.keeps(stamp, Galaxies()) for stamp in stamps) == kept
    assert tally.read == read
    assert all((stamp.sersic is not None) == sersic for stamp in stamps)
    assert all(stamp.noise_sd > 0 and stamp.pixel_scale == pytest.approx(0.03) for stamp in stamps)


@pytest.mark.parametrize(("level", "kept"), [("none", 100), ("bad_fits", 100), ("bad_stamp", 97), ("marginal", 96)])
def test_exclusion_levels_of_galsims_example(real_galaxies: Path, level: Level, kept: int) -> None:
    catalogue = real_galaxies / "galsim_example_catalog/real_galaxy_catalog_23.5_example.fits"
    assert (~excluded_rows(catalogue, level, "23.5", None, None)).sum() == kept


def test_catalogue_whose_image_file_is_missing_says_so(real_galaxies: Path) -> None:
    with pytest.raises(InputError, match=r"real_galaxy_images.fits: no such image file; row 0 \(IDENT 100027\)"):
        stamps_of(real_galaxies / "btk_cosmos/real_galaxy_catalog_23.5_example.fits")


def test_real_archives_and_catalogues_are_ingested(real_galaxies: Path, tmp_path: Path) -> None:
    candels = {"archive": str(real_galaxies / "candels/candels_stamps_192.npz"), "pixel_scale": 0.06}
    inputs = (
        *(StampArchiveInput(layout="stamp_archive", key=key, **candels) for key in ("f606w", "f814w")),
        StampArchiveInput(
            layout="stamp_archive",
            archive="${LENSPIPE_DATA}/galaxies/udf/udf_stamps_384.npz",
            key="images",
            pixel_scale=0.03,
            exclude=(9, 17),
            split="train",
        ),
        RealGalaxyCatalogInput(
            layout="real_galaxy_catalog", catalogue=str(real_galaxies / "aegis_test/AEGIS_F814w_catalog.fits")
        ),
    )
    ingest(Galaxies(inputs=inputs, test_fraction=0.1), None, tmp_path / "galaxies.zarr", seed=1)
    galaxies = xr.open_zarr(tmp_path / "galaxies.zarr", consolidated=False).load()
    assert galaxies.sizes["galaxy"] == 161 + 161 + 123 + 2
    np.testing.assert_array_equal(galaxies.image.max(("y", "x")), 1)
    blue, red = (galaxies.split.values[i * 161 : (i + 1) * 161] for i in (0, 1))
    np.testing.assert_array_equal(blue, red)
    assert set(galaxies.split.values[322:445]) == {"train"}
    assert np.isnan(galaxies.psf_fwhm.values[:445]).all()
    assert galaxies.psf_fwhm.values[445:] == pytest.approx(0.108, abs=0.004)


def test_default_input_is_the_survey() -> None:
    assert Galaxies().inputs == (SurveyInput(),)


def test_light_is_centred_where_sources_have_their_place() -> None:
    """By fractions of a pixel, and without a change of its shape or of the noise."""
    rng = np.random.default_rng(1)
    noise = 0.02 * rng.normal(size=(64, 64))
    lopsided = blob((64, 64), 33.3, 29.6, sd=5.0) + 0.5 * blob((64, 64), 40.0, 36.0, sd=3.0)
    moved = centred(feather(lopsided + noise, 4))
    centre = torch.stack(source_plane.light_centre(torch.from_numpy(moved)[None]))
    assert float(centre.abs().max()) * 64 < 0.1
    assert moved.max() == pytest.approx((lopsided + noise).max(), abs=0.05)
    assert moved.sum() == pytest.approx(feather(lopsided + noise, 4).sum(), rel=0.01)
    speckle = np.pad(rng.normal(size=(48, 48)), 8)
    assert np.linalg.norm(centred(speckle)) == pytest.approx(np.linalg.norm(speckle), rel=0.01)


def test_light_that_leaves_the_frame_does_not_come_back() -> None:
    moved = centred(blob((64, 64), 31.5, 40.0, sd=3.0) + 0.2 * blob((64, 64), 31.5, 4.0, sd=1.5))
    assert np.abs(moved[:, -8:]).max() < 0.01
