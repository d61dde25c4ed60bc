"""The lens catalogue: a bad lens is a row with its reason, a bad table an error that names the column."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from astropy.io import fits

from lenspipe.catalogue import stage, tables
from lenspipe.catalogue.entry import LensFiles
from lenspipe.catalogue.fits_images import file_of, read_image
from lenspipe.catalogue.observed import read_entry, read_lens
from lenspipe.catalogue.point_images import point_images
from lenspipe.catalogue.reading import read_batch, read_catalogue
from lenspipe.catalogue.stage import completed, data_hash, write_catalogue
from lenspipe.catalogue.tables import outside_files, read_table, stamp
from lenspipe.config import Catalogue, Config, Mocks
from lenspipe.errors import InputError
from lenspipe.fit.batch import Task, fit_task
from lenspipe.image.psf import gaussian_kernel
from lenspipe.results import Results

HEADER = "name,pixel_scale,image,noise,psf,mask\n"


def write(path: Path, image: np.ndarray) -> None:
    fits.PrimaryHDU(image.astype("float32")).writeto(path, overwrite=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good lens."""
    image = np.full((20, 24), 0.1)
    image[8:12, 8:12] = 5
    write(tmp_path / "image.fits", image)
    write(tmp_path / "noise.fits", np.ones((20, 24)))
    write(tmp_path / "psf.fits", 3 * gaussian_kernel(0.6, 2))
    return tmp_path


def catalogue_of(folder: Path, row: str) -> tuple[str, str]:
    (folder / "lenses.csv").write_text(HEADER + f"good,0.05,image.fits,noise.fits,psf.fits,\n{row}\n")
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    table = read_catalogue(out).set_index("name")
    assert table.loc["good", "status"] == "usable"
    return table.loc["bad", "status"], table.loc["bad", "reason"]


def test_good_lens_is_read_back(folder: Path) -> None:
    (folder / "lenses.csv").write_text(HEADER + "good,0.05,image.fits,noise.fits,psf.fits,\n")
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    batch = read_batch(out, read_catalogue(out)["bucket"][0], ["good"], torch.float32)
    assert batch.image.shape == (1, 20, 24)
    assert batch.psf.sum().item() == pytest.approx(1)
    assert bool(batch.usable.all())


def test_a_catalogue_that_does_not_answer_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the file system leaves as it is: who fans batches out tries them again."""

    def silent(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(xr, "open_zarr", silent)
    with pytest.raises(OSError, match="Input/output error"):
        read_batch(folder, "bucket", ["good"], torch.float32)


def test_changes_of_files_that_tables_name_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sizes and times, whether they are there, of few lenses; a cell that is no path is the stage's to tell."""
    table = folder / "lenses.csv"
    table.write_text(HEADER + f"good,0.05,image.fits,noise.fits,psf.fits,\nbad,0.05,{'x' * 300},n.fits,p.fits,\n")
    config = Config(catalogue=Catalogue(tables=(str(table),)), mocks=Mocks(systems=3000))
    first = stamp(config)
    assert first == stamp(config) != ""
    os.utime(folder / "noise.fits", ns=(1, 1))
    second = stamp(config)
    (folder / "p.fits").touch()
    assert len({first, second, stamp(config)}) == 3
    monkeypatch.setattr(tables, "STAMPED", 1)
    assert stamp(config) == ""
    assert stamp(Config()) == ""


def test_further_lenses_in_a_folder_are_noticed(folder: Path) -> None:
    config = Config(catalogue=Catalogue(tables=(str(folder / "lenses"),)))
    stamps = set()
    for name in ("one", "another"):
        (folder / "lenses" / name).mkdir(parents=True)
        for kind in ("image", "psf"):
            (folder / "lenses" / name / f"{kind}.fits").touch()
        stamps.add(stamp(config))
    assert len(stamps) == 2


def test_the_hash_of_a_lens_is_of_all_that_a_fit_sees() -> None:
    """Each of its images and numbers changes it; name, place and what was found on the way do not."""
    image = np.ones((4, 6))
    lens = SimpleNamespace(
        image=image, noise=image, usable=image > 0, psf=np.ones((3, 3)), pixel_scale=0.1, flux_unit=1.0, light_unit=1.0
    )
    seen = {data_hash(lens)}  # type: ignore[arg-type]
    for name, value in vars(lens).items():
        other = value * 2 if name in ("pixel_scale", "flux_unit", "light_unit") else np.array(value)
        if name not in ("pixel_scale", "flux_unit", "light_unit"):
            other[1, 2] = 0
        seen.add(data_hash(SimpleNamespace(**vars(lens) | {name: other})))  # type: ignore[arg-type]
    seen.add(data_hash(SimpleNamespace(**vars(lens) | {"image": np.ones((6, 4))})))  # type: ignore[arg-type]
    assert len(seen) == 9
    assert data_hash(SimpleNamespace(**vars(lens), name="x", notes=("y",))) in seen  # type: ignore[arg-type]


def test_more_lenses_than_one_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are there, each with its own image, under its own name."""
    monkeypatch.setattr(stage, "BLOCK", 2)
    image = fits.getdata(folder / "image.fits")
    rows = []
    for number in range(5):
        fits.writeto(folder / f"image{number}.fits", image + number)
        rows.append(f"lens{number},0.05,image{number}.fits,noise.fits,psf.fits,\n")
    (folder / "lenses.csv").write_text(HEADER + "".join(rows))
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    table = read_catalogue(out)
    assert table["status"].tolist() == ["usable"] * 5
    names = [f"lens{number}" for number in (3, 0, 4, 1, 2)]
    batch = read_batch(out, table["bucket"][0], names, torch.float64)
    above = (batch.image - torch.from_numpy(image.astype(float))).mean((1, 2))
    torch.testing.assert_close(above, torch.tensor([3.0, 0, 4, 1, 2], dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lost", ["image/c", "noise/zarr.json", ""])
def test_a_damaged_catalogue_is_no_failure_of_its_lenses(lost: str, folder: Path) -> None:
    """A batch that cannot be read ends the stage, which says what to do; it is not recorded as a lens that failed."""
    (folder / "lenses.csv").write_text(HEADER + "good,0.05,image.fits,noise.fits,psf.fits,\n")
    paths = Results(folder / "out")
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, paths.catalogue)
    bucket = read_catalogue(paths.catalogue)["bucket"][0]
    if lost.endswith("/c"):
        chunk = next(path for path in (paths.catalogue / bucket / lost).rglob("*") if path.is_file())
        chunk.write_bytes(chunk.read_bytes()[:7])
    elif lost:
        (paths.catalogue / bucket / lost).write_text("{")
    name = "good" if lost else "nobody"
    with pytest.raises(InputError, match=f"{bucket}: {name}: cannot be read .*; run the stage catalogue again"):
        fit_task(Task(Config().model_dump_json(), paths, bucket, (name,), ("1",)))


@pytest.mark.parametrize(
    ("of_image", "of_noise", "note"),
    [
        ("ELECTRONS/S", "electron s-1", ""),
        ("ELECTRONS/S", "ELECTRONS", "noise map in ELECTRONS, image in ELECTRONS/S"),
        ("MJy/sr", "mJy/sr", "noise map in mJy/sr, image in MJy/sr"),
        ("nmgy", "NMGY", ""),
        ("nmgy", "", ""),
    ],
)
def test_units_are_carried_and_compared(folder: Path, of_image: str, of_noise: str, note: str) -> None:
    for name, unit in (("image", of_image), ("noise", of_noise)):
        fits.setval(folder / f"{name}.fits", "BUNIT", value=unit)
    (folder / "lenses.csv").write_text(HEADER + "good,0.05,image.fits,noise.fits,psf.fits,\n")
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    row = read_catalogue(out).iloc[0]
    assert (row["status"], row["image_unit"], row["notes"]) == ("usable", of_image, note)


def test_names_and_paths_are_taken_as_they_are(folder: Path) -> None:
    """A lens named NA, a path with # in it, lines of comment, and an empty cell of an optional column."""
    (folder / "image.fits").rename(folder / "im#1.fits")
    text = "# made by hand\n" + HEADER.replace("\n", ",flux_unit\n") + "NA,0.05,im#1.fits,noise.fits,psf.fits,,\n"
    (folder / "lenses.csv").write_text(text)
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    table = read_catalogue(out)
    assert table[["name", "status"]].to_numpy().tolist() == [["NA", "usable"]]


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_wide_pixels_of_any_unit(folder: Path, unit: float) -> None:
    """Noise of independent pixels: half, whatever the unit of the image."""
    write(folder / "image.fits", unit * fits.getdata(folder / "image.fits"))
    write(folder / "noise.fits", np.full((20, 24), unit))
    (folder / "lenses.csv").write_text(HEADER + "a,0.05,image.fits,noise.fits,psf.fits,\n")
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    noise = read_batch(out, read_catalogue(out)["bucket"][0], ["a"], torch.float32).coarse().noise
    torch.testing.assert_close(noise / unit, torch.full_like(noise, 0.5))


def spoil(folder: Path, what: str) -> str:
    image = np.ones((20, 24))
    match what:
        case "nan":
            image[3, 4] = np.nan
            write(folder / "bad.fits", image)
            return "bad,0.05,bad.fits,noise.fits,psf.fits,"
        case "size":
            write(folder / "bad.fits", np.ones((21, 24)))
            return "bad,0.05,image.fits,bad.fits,psf.fits,"
        case "zero":
            image[0, 0] = 0
            write(folder / "bad.fits", image)
            return "bad,0.05,image.fits,bad.fits,psf.fits,"
        case "negative":
            image[0, 0] = -1
            write(folder / "bad.fits", image)
            return "bad,0.05,image.fits,bad.fits,psf.fits,"
        case "missing":
            return "bad,0.05,image.fits,noise.fits,absent.fits,"
        case "truncated":
            whole = (folder / "image.fits").read_bytes()
            (folder / "bad.fits").write_bytes(whole[:3000])
            return "bad,0.05,bad.fits,noise.fits,psf.fits,"
        case "masked":
            write(folder / "bad.fits", image)
            return "bad,0.05,image.fits,noise.fits,psf.fits,bad.fits"
        case "hardly any noise":
            image[2, 3] = 1e-12
            write(folder / "bad.fits", image)
            return "bad,0.05,image.fits,bad.fits,psf.fits,"
        case "tiny":
            write(folder / "bad.fits", np.ones((3, 24)))
            return "bad,0.05,bad.fits,bad.fits,psf.fits,"
        case "cube":
            fits.PrimaryHDU(np.ones((2, 20, 24))).writeto(folder / "bad.fits")
            return "bad,0.05,bad.fits,noise.fits,psf.fits,"
        case "psf off its middle":
            write(folder / "bad.fits", np.pad(gaussian_kernel(1.0, 3), ((0, 2), (0, 0))))
            return "bad,0.05,image.fits,noise.fits,bad.fits,"
        case "psf of finer pixels":
            fits.PrimaryHDU(gaussian_kernel(1.0), fits.Header({"PIXSCALE": 0.0125})).writeto(folder / "bad.fits")
            return "bad,0.05,image.fits,noise.fits,bad.fits,"
        case "few":
            image[5:8, 5:8] = 0
            write(folder / "bad.fits", image)
            return "bad,0.05,image.fits,noise.fits,psf.fits,bad.fits"
        case "wcs":
            header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "RA---TAN", "CDELT1": 1e-5, "CDELT2": 1e-5})
            fits.PrimaryHDU(image, header).writeto(folder / "bad.fits")
            return "bad,,bad.fits,noise.fits,psf.fits,"
        case "wcs without a scale":
            fits.PrimaryHDU(image, fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"})).writeto(
                folder / "bad.fits"
            )
            return "bad,,bad.fits,noise.fits,psf.fits,"
        case "scale below zero":
            fits.PrimaryHDU(image, fits.Header({"PIXSCALE": -0.05})).writeto(folder / "bad.fits")
            return "bad,,bad.fits,noise.fits,psf.fits,"
    raise ValueError(what)


@pytest.mark.filterwarnings("ignore:File may have been truncated")
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nan", "bad.fits: 1 pixels with not a number, the first at x = 4, y = 3"),
        ("size", "the noise map is 24 x 21 px, the image"),
        ("zero", "bad.fits: 1 pixels with zero or negative noise"),
        ("negative", "bad.fits: 1 pixels with zero or negative noise"),
        ("missing", "absent.fits: no such file"),
        ("truncated", "bad.fits: not a readable FITS file"),
        ("masked", "every pixel is masked; if it has 0 where pixels are bad, set mask_bad to 0"),
        ("hardly any noise", "bad.fits: 1 pixels with a noise below 0.001 times its median, the first at x = 3, y = 2"),
        ("tiny", "bad.fits: the image is 24 x 3 px; its sides must be at least 16"),
        ("cube", "no two-dimensional image in this FITS file, found 24 x 20 x 2"),
        ("psf off its middle", "bad.fits: the PSF of 7 x 9 px has its centre at column 3.0, row 3.0"),
        ("psf of finer pixels", "bad.fits: the header says 0.0125 arcsec a pixel, the image 0.05"),
        ("few", "image.fits: only 9 pixels of 0.05 arcsec are left to fit"),
        ("wcs", "bad.fits: its WCS cannot be read"),
        ("wcs without a scale", "bad.fits: the header has no WCS; give the pixel scale"),
        ("scale below zero", "bad.fits: the header says -0.05 arcsec a pixel"),
    ],
)
def test_bad_lens_is_a_row(folder: Path, what: str, reason: str) -> None:
    status, found = catalogue_of(folder, spoil(folder, what))
    assert status == "failed"
    assert reason in found


@pytest.mark.parametrize("what", ["nan where the noise is infinite", "cube of one", "wcs"])
def test_strange_but_good(folder: Path, what: str) -> None:
    image = fits.getdata(folder / "image.fits").astype(float)
    header, noise, note = fits.Header(), np.ones((20, 24)), ()
    if what == "nan where the noise is infinite":
        image[0, 3], noise[0, 3] = np.nan, np.inf
    elif what == "cube of one":
        image = image[None]
    else:
        header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "RA---TAN", "CDELT1": 1e-5, "CDELT2": 1e-5})
        note = ("its WCS cannot be read: North is not known",)
    fits.PrimaryHDU(image, header).writeto(folder / "image.fits", overwrite=True)
    write(folder / "noise.fits", noise)
    lens = read_lens(LensFiles(*(folder / f"{kind}.fits" for kind in ("image", "psf", "noise")), pixel_scale=0.05))
    assert lens.usable.sum() == 20 * 24 - (what == "nan where the noise is infinite")
    assert lens.notes == note


def test_pixels_that_are_no_measurement(folder: Path) -> None:
    image = fits.getdata(folder / "image.fits")
    image[1, 2], image[:, -1] = -9999, 0
    write(folder / "image.fits", image)
    fits.setval(folder / "image.fits", "PIXSCALE", value=0.04)
    lens = read_lens(LensFiles(*(folder / f"{kind}.fits" for kind in ("image", "psf", "noise")), pixel_scale=0.05))
    assert lens.usable.sum() == 20 * 24 - 1
    assert not lens.usable[1, 2]
    assert lens.notes == (
        "1 px more than 50 times the noise below zero masked",
        "20 px are exactly 0; mask them if there is no image there",
        "pixels of 0.05 arcsec by the table, 0.04 by the header",
    )


@pytest.mark.parametrize("huge", [np.inf, 1e9, 1e8])
def test_a_noise_map_may_mask_most_of_an_image(folder: Path, huge: float) -> None:
    """By a noise that is not finite or huge: what is left is measured by its own median."""
    noise = np.full((20, 24), huge)
    noise[5:14, 6:16] = 0.1
    write(folder / "noise.fits", noise)
    lens = read_lens(LensFiles(*(folder / f"{kind}.fits" for kind in ("image", "psf", "noise")), pixel_scale=0.05))
    np.testing.assert_array_equal(lens.usable, noise == 0.1)


def test_a_psf_without_a_peak_is_told_of(folder: Path) -> None:
    files = LensFiles(*(folder / f"{kind}.fits" for kind in ("image", "psf", "noise")), pixel_scale=0.05)
    assert read_lens(files).notes == ()
    write(folder / "psf.fits", gaussian_kernel(3.0, 2))
    assert read_lens(files).notes == ("PSF with 0.74 of its peak at its border: it is cut too small, or is none",)


def field(points: list[tuple[int, int]], blobs: list[tuple[int, int]]) -> np.ndarray:
    """Point images and smooth blobs, blurred by a PSF of 1.2 px, with noise of 0.05."""
    y, x = np.mgrid[:60, :60]
    image = 0.05 * np.random.default_rng(1).normal(size=(60, 60))
    for column, row in points:
        image += 5 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * 1.2**2))
    for column, row in blobs:
        image += 5 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * 2.2**2))
    return image


def test_a_lensed_quasar_is_refused_and_galaxies_are_not(folder: Path) -> None:
    write(folder / "wide_noise.fits", np.full((60, 60), 0.05))
    write(folder / "blur.fits", gaussian_kernel(1.2))
    write(folder / "quasar.fits", field([(15, 20), (44, 40)], [(30, 30)]))
    write(folder / "star.fits", field([(15, 20)], [(30, 30), (44, 40)]))
    rows = [f"{name},0.05,{name}.fits,wide_noise.fits,blur.fits," for name in ("quasar", "star")]
    (folder / "lenses.csv").write_text(HEADER + "\n".join(rows) + "\n")
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    table = read_catalogue(out).set_index("name")
    assert table["status"].tolist() == ["failed", "usable"]
    assert "quasar.fits: 2 point images at pixels (x, y) = " in table.loc["quasar", "reason"]
    assert "(15, 20)" in table.loc["quasar", "reason"]


def test_a_star_between_four_pixels_is_one_point() -> None:
    """Without noise its four pixels are equally bright; a masked pixel may have no noise at all."""
    y, x = np.mgrid[:41, :41]
    star = 100 * np.exp(-((x - 20.5) ** 2 + (y - 20.5) ** 2) / (2 * 1.5**2))
    noise, usable = np.ones_like(star), np.ones(star.shape, dtype=bool)
    noise[3, 3], usable[3, 3] = 0.0, False
    assert len(point_images(star, noise, usable, gaussian_kernel(1.5))) == 1


@pytest.mark.skipif("LENSPIPE_DATA" not in os.environ, reason="needs real lenses: set LENSPIPE_DATA")
def test_point_images_of_others_mocks_and_of_real_lenses() -> None:
    """Both lensed quasars of the time-delay challenge are refused; none of the observed galaxy lenses is."""
    data = Path(os.environ["LENSPIPE_DATA"])
    places = sorted((data / "mocks/tdlmc_quasars").glob("*/*/drizzled_image"))
    assert len(places) == 2
    for place in places:
        with pytest.raises(InputError, match="point images at pixels"):
            read_lens(
                LensFiles(place / "lens-image.fits", place / "psf.fits", place / "noise_map.fits", pixel_scale=0.08)
            )
    table = pd.read_csv(data / "lenses/lenses.csv")
    for row in table.itertuples():
        files = [data / "lenses" / name for name in (row.image, row.noise, row.psf)]
        images = [read_image(path) for path in files]
        usable = np.isfinite(images[0]) & (images[1] > 0) & (images[1] < 1e6 * np.median(images[1]))
        clean = np.where(usable, images[0], 0), np.where(usable, images[1], 1)
        assert len(point_images(*clean, usable, images[2])) < 2, row.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,pixel_scale,image,noise\n", r"lenses.csv: missing column\(s\) psf"),
        (HEADER + "a,0.1,i,n,p,\na,0.1,i,n,p,\n", "lens a occurs twice"),
        (HEADER + ",0.1,i,n,p,\n", r"lenses.csv: lens 1 has the name ''; use letters"),
        (HEADER + "a/b,0.1,i,n,p,\n", r"lens 1 has the name 'a/b'"),
        (HEADER, "lenses.csv: no lenses below the line of column names"),
        (HEADER + "a,0.1,i,n,p,,7\n", "lens 1 has 7 cells for 6 columns"),
        (HEADER.replace("mask", "psf"), r"column\(s\) psf occur twice"),
        (HEADER.replace("pixel_scale", "pixelscale"), "no column is called pixelscale; give it the name pixel_scale"),
        (HEADER.replace("mask", "Mask") + "a,0.1,i,n,p,m\n", "no column is called Mask; give it the name mask"),
        (HEADER.replace("mask", "true_thetaE") + "a,0.1,i,n,p,1\n", "give it the name true_theta_E if it is that"),
        ("", "lenses.csv: not a table of lenses"),
        (HEADER + "caf\xe9,0.1,i,n,p,\n", "not a table of lenses in UTF-8"),
    ],
)
def test_bad_table_stops(folder: Path, text: str, message: str) -> None:
    (folder / "lenses.csv").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, folder / "out/c.zarr")


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("flux_unit", "abc", "lenses.csv: flux_unit must be a number above zero, found 'abc'"),
        ("flux_unit", "0", "flux_unit must be a number above zero, found '0'"),
        ("fit_radius", "inf", "fit_radius must be a number above zero, found 'inf'"),
        ("center_row", "nan?", "center_row must be a number, found 'nan?'"),
        ("mask_bad", "2", "mask_bad must be 0 or 1, found '2'"),
        ("true_q", "?", "true_q must be a number, found '?'"),
        ("z_lens", "-0.4", "z_lens must be a number above zero"),
        ("z_source", "0.2", "z_source must be beyond z_lens = 0.3, found '0.2'"),
        ("psf", "", "lenses.csv: the column psf is empty"),
        ("noise", "image.fits", "image.fits: the noise map is the image itself"),
        ("noise", "image.fits[0]", "the noise map is the image itself"),
        ("image", "image.fits[SCI]", "image.fits[SCI]: no such extension; this file has [0] PRIMARY"),
        ("image", "image.fits[1]", "image.fits[1]: no such extension"),
        ("psf", "absent.fits[SCI]", "absent.fits: no such file"),
    ],
)
def test_a_bad_cell_is_of_its_lens_alone(folder: Path, column: str, cell: str, reason: str) -> None:
    good = {"image": "image.fits", "psf": "psf.fits", "noise": "noise.fits", "pixel_scale": "0.05", "z_lens": "0.3"}
    rows = [{"name": "good"} | good, {"name": "bad"} | good | {column: cell}]
    pd.DataFrame(rows).to_csv(folder / "lenses.csv", index=False)
    out = folder / "out/catalogue.zarr"
    write_catalogue(Catalogue(mocks=False, tables=(str(folder / "lenses.csv"),)), None, out)
    table = read_catalogue(out).set_index("name")
    assert table["status"].to_dict() == {"good": "usable", "bad": "failed"}
    assert reason in table.loc["bad", "reason"]


@pytest.fixture
def one_file(folder: Path) -> Path:
    """All images of the good lens in one file, as pipelines write them; twice, the second ten times as bright."""
    images = {name: fits.getdata(folder / f"{name}.fits") for name in ("image", "noise", "psf")}
    bad = np.zeros((20, 24), dtype="int16")
    bad[:2] = 1024
    hdus = [fits.PrimaryHDU()]
    for version, brightness in ((1, 1), (2, 10)):
        hdus += [fits.ImageHDU(brightness * images["image"], name="SCI", ver=version)]
        hdus += [fits.ImageHDU(brightness * images["noise"], name="ERR", ver=version)]
        hdus += [fits.ImageHDU(bad, name="DQ", ver=version)]
    hdus += [fits.ImageHDU(images["psf"], name="PSF")]
    fits.HDUList(hdus).writeto(folder / "lens.fits")
    return folder / "lens.fits"


@pytest.mark.parametrize(
    ("image", "noise", "mask", "brightness"),
    [("SCI", "ERR", "DQ", 1), ("sci,2", "err,2", "DQ , 2", 10), ("1", "2", "3", 1), ("4", "ERR,2", "6", 10)],
)
def test_extensions_are_named_in_brackets(
    one_file: Path, image: str, noise: str, mask: str, brightness: int, tmp_path: Path
) -> None:
    """By name, name and version, or number."""
    cells = {"name": "lens", "pixel_scale": "0.05", "image": f"lens.fits[{image}]", "psf": "lens.fits[PSF]"}
    cells |= {"noise": f"lens.fits[{noise}]", "mask": f"lens.fits[{mask}]"}
    pd.DataFrame([cells]).to_csv(tmp_path / "lenses.csv", index=False)
    (entry,) = read_table(tmp_path / "lenses.csv")
    lens = read_entry(entry, None, 1)
    assert lens.image.max() == pytest.approx(5 * brightness)
    assert lens.noise[lens.usable].tolist() == [brightness] * (18 * 24)
    assert not lens.usable[:2].any()


def test_a_file_with_brackets_in_its_name(folder: Path) -> None:
    (folder / "image.fits").rename(folder / "image[1].fits[SCI]")
    assert read_image(folder / "image[1].fits[SCI]").max() == 5
    assert file_of(folder / "image[1].fits[SCI]") == folder / "image[1].fits[SCI]"


def test_files_with_extensions_are_looked_at(one_file: Path) -> None:
    """Those in config are inputs, those in tables are stamped."""
    cells = {key: f"{one_file}[{name}]" for key, name in (("image", "SCI"), ("noise", "ERR"), ("psf", "PSF"))}
    pd.DataFrame([{"name": "lens", **cells}]).to_csv(one_file.with_name("lenses.csv"), index=False)
    config = Config(
        catalogue=Catalogue(tables=(str(one_file.with_name("lenses.csv")),), lenses=({"name": "other", **cells},))
    )
    assert outside_files(config)[-4:] == [one_file] * 3 + [one_file.with_name("lenses.csv")]
    before = stamp(config)
    assert stamp(config) == before
    os.utime(one_file, (0, 0))
    assert stamp(config) != before


def test_what_is_not_foreseen_is_of_its_lens_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenspipe.catalogue.observed.point_images", lambda *_: None)
    (folder / "lenses.csv").write_text(HEADER + "bad,0.05,image.fits,noise.fits,psf.fits,\n")
    (entry,) = read_table(folder / "lenses.csv")
    with pytest.raises(InputError, match=r"image.fits: cannot be used for a reason not foreseen: TypeError"):
        read_entry(entry, None, 1)


def test_missing_table(folder: Path) -> None:
    with pytest.raises(InputError, match=r"absent.csv: no such table"):
        write_catalogue(Catalogue(mocks=False, tables=(str(folder / "absent.csv"),)), None, folder / "out/c.zarr")


@pytest.mark.parametrize(
    ("given", "follows"),
    [
        ({"q": 0.5, "phi": 0.0}, {"e1": 1 / 3, "e2": 0.0}),
        ({"e1": 0.0, "e2": -1 / 3}, {"q": 0.5, "phi": -np.pi / 4}),
        ({"r_Ein": 2.0, "q": 0.25}, {"theta_E": 1.0}),
        ({"theta_E": 1.3}, {}),
    ],
)
def test_truth_is_completed(given: dict[str, float], follows: dict[str, float]) -> None:
    assert completed(given) == pytest.approx(given | follows)
