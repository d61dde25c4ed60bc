"""Preparation of observed images: deflector, arcs, companions, mask and noise found on an image with known contents."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from astropy.units import Unit, mas, minute, pix
from astropy.wcs import WCS
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from lenspipe.catalogue.entry import LensFiles, Wishes
from lenspipe.catalogue.observed import read_lens
from lenspipe.catalogue.preparation import Prepared, cut, prepare
from lenspipe.catalogue.tables import read_table, unused
from lenspipe.cli import app
from lenspipe.config import Preparation
from lenspipe.errors import InputError
from lenspipe.image.psf import gaussian_kernel

SCALE, NOISE = 0.05, 0.01
COLUMN, ROW = 83.3, 74.6
RADIUS = 1.1
PSF = np.asarray(gaussian_kernel(1.2))


def scene(companion: bool = True, arcs: bool = True, correlated: float = 0.0, noise_sd: float = NOISE) -> np.ndarray:
    """An elliptical de Vaucouleurs galaxy off the middle, two arcs at 1.1 arcsec, a companion at 2.9 arcsec."""
    rows, columns = np.mgrid[:161, :161]
    x, y = SCALE * (columns - COLUMN), SCALE * (rows - ROW)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    image = 2.0 * np.exp(-7.67 * ((np.hypot(x * 0.85, y / 0.85) ** 2 + 0.03**2) ** 0.125 / 1.2**0.25 - 1)) * 0.05
    if arcs:
        for middle, height in ((0.6, 0.25), (3.6, 0.12)):
            away = np.angle(np.exp(1j * (angle - middle)))
            image = image + height * np.exp(-((radius - RADIUS) ** 2) / (2 * 0.1**2) - away**2 / (2 * 0.5**2))
    if companion:
        image = image + 0.5 * np.exp(-((x + 2.0) ** 2 + (y - 2.1) ** 2) / (2 * 0.15**2))
    noise = np.random.default_rng(1).normal(size=image.shape)
    if correlated:
        noise = gaussian_filter(noise, correlated)
        noise /= noise.std()
    return gaussian_filter(image, 1.2) + noise_sd * noise


def write_lens(place: Path, header: fits.Header | None = None) -> None:
    """The scene as FITS files in a folder of its own."""
    place.mkdir(parents=True)
    fits.PrimaryHDU(scene().astype("float32"), header or wcs(30.0).to_header()).writeto(place / "image.fits")
    fits.writeto(place / "noise_map.fits", np.full((161, 161), NOISE, "float32"))
    fits.writeto(place / "psf.fits", (7 * PSF).astype("float32"))


def prepared(image: np.ndarray, wishes: Wishes | None = None, **settings: float) -> Prepared:
    noise, usable = np.full(image.shape, NOISE), np.ones(image.shape, dtype=bool)
    return prepare(image, noise, usable, PSF, SCALE, Preparation(**settings), wishes or Wishes())


def test_what_is_on_an_image_is_found() -> None:
    found = prepared(scene())
    assert (found.center_column, found.center_row) == pytest.approx((COLUMN, ROW), abs=0.3)
    assert found.arc_radius == pytest.approx(RADIUS, rel=0.08)
    assert 1.3 < found.fit_radius < 2.4
    assert found.first_arc_snr > 30
    assert found.noise_inflation == pytest.approx(1, abs=0.15)
    assert found.chi2_expected == pytest.approx(1, abs=0.1)
    assert abs(found.noise_correlation) < 0.05
    assert found.arcs.sum() > 100


def test_the_deflector_is_in_the_middle_of_the_cut_out() -> None:
    found = prepared(scene())
    side = found.image.shape[0]
    assert side % 16 == 0
    brightest = np.unravel_index(gaussian_filter(found.image, 1.0).argmax(), found.image.shape)
    assert np.abs(np.array(brightest) - (side - 1) / 2).max() <= 1.5
    y, x = np.indices(found.image.shape) - (side - 1) / 2
    assert not found.usable[np.hypot(x, y) * SCALE > found.fit_radius + 2 * SCALE].any()


def test_the_light_of_the_first_look_leaves_little_beside_the_arcs() -> None:
    found = prepared(scene())
    side = found.image.shape[0]
    y, x = (np.indices(found.image.shape) - (side - 1) / 2) * SCALE
    elsewhere = found.usable & ~found.arcs & (np.hypot(x, y) > 0.4)
    assert np.median(np.abs((found.image - found.light)[elsewhere])) < 1.5 * NOISE


def test_companions_are_masked() -> None:
    """One at 2.9 arcsec lies in a disc of 3.2; without it nothing is masked there."""
    with_it, without = (prepared(scene(companion), Wishes(fit_radius=3.2)) for companion in (True, False))
    assert (with_it.companions, without.companions) == (1, 0)
    assert with_it.masked > without.masked
    nothing = prepared(scene(companion=False), Wishes(fit_radius=2.5))
    assert nothing.usable.sum() > np.pi * (2.5 / SCALE) ** 2, "a disc of pixels may be larger than the circle"
    assert nothing.masked == 0
    side = with_it.image.shape[0]
    row, column = (round((side - 1) / 2 + at / SCALE) for at in (2.1, -2.0))
    assert not with_it.usable[row, column]
    assert without.usable[row, column]


def test_cosmic_rays_are_masked_and_what_has_the_width_of_the_psf_is_not() -> None:
    """Hits of one to three pixels on the arcs and beside them, a knot as sharp as the PSF on an arc."""
    clean = scene()
    at = [(80, 105), (92, 99), (60, 83), (75, 60), (55, 95), (85, 70)]
    hit = np.zeros(clean.shape, dtype=bool)
    for number, (row, column) in enumerate(at):
        for step in range(1 + number % 3):
            hit[row + step, column + step] = True
    knot = np.zeros(clean.shape)
    knot[86, 101] = 40 * NOISE / PSF.max()
    knot = clean + gaussian_filter(knot, 1.2)
    found = prepared(np.where(hit, clean + 40 * NOISE, clean))
    assert found.cosmic_rays == pytest.approx(hit.sum(), abs=3)
    seen = cut(hit, found.corner, found.image.shape[0], False)
    assert (seen & ~found.usable).sum() >= 0.8 * hit.sum()
    assert [prepared(image).cosmic_rays for image in (clean, knot)] == [0, 0]
    assert prepared(np.where(hit, clean + 40 * NOISE, clean), mask_cosmic_rays=False).cosmic_rays == 0


def test_an_image_without_arcs_has_none() -> None:
    found = prepared(scene(companion=False, arcs=False))
    assert found.first_arc_snr < 15
    assert found.fit_radius == Preparation().fit_radius_max


def test_correlated_noise_is_measured_and_the_noise_map_inflated() -> None:
    """Smoothed by 0.7 px, blocks of 4 x 4 px scatter 1.9 times as much as those of white noise."""
    found, plain = (prepared(scene(correlated=0.7), inflate_noise=inflate) for inflate in (True, False))
    assert found.noise_correlation > 0.4
    assert found.noise_inflation == pytest.approx(1.9, rel=0.2)
    inside = found.usable
    np.testing.assert_allclose(found.noise[inside] / plain.noise[inside], found.noise_inflation, rtol=1e-6)
    assert found.chi2_expected == pytest.approx(plain.chi2_expected / found.noise_inflation**2, rel=1e-6)


def test_wishes_of_the_table_come_first() -> None:
    found = prepared(scene(), Wishes(column=70.0, row=80.0, fit_radius=1.5))
    assert (found.center_column, found.center_row, found.fit_radius) == (70.0, 80.0, 1.5)


def test_the_core_is_left_out_where_the_settings_say_so() -> None:
    found = prepared(scene(), core_radius=0.2)
    side = found.image.shape[0]
    y, x = (np.indices(found.image.shape) - (side - 1) / 2) * SCALE
    assert not found.usable[np.hypot(x, y) < 0.12].any()
    assert found.usable[(np.hypot(x, y) > 0.3) & (np.hypot(x, y) < 0.5)].all()


def test_an_empty_image_is_refused() -> None:
    empty = NOISE * np.random.default_rng(2).normal(size=(120, 120))
    with pytest.raises(InputError, match=r"no deflector within 1.2 arcsec.*center_column"):
        prepared(empty)


def test_half_a_centre_is_refused() -> None:
    with pytest.raises(InputError, match="one of center_column and center_row is given"):
        prepared(scene(), Wishes(column=70.0))


def test_a_cut_out_beyond_the_edge_is_blank_there() -> None:
    out = cut(np.ones((10, 12)), (-2, 5), 8, 0.0)
    assert out.sum() == 6 * 5
    assert out[:5, 2:].all()


# --- reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders of FITS files: one lens with a WCS, north 30 degrees from +y to the left, and one without."""
    write_lens(tmp_path / "a")
    write_lens(tmp_path / "b", fits.Header({"PIXSCALE": SCALE}))
    return tmp_path


def wcs(turned: float) -> WCS:
    """A header of an image whose +y is `turned` degrees East of North."""
    found = WCS(naxis=2)
    angle = np.radians(turned)
    found.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    found.wcs.crval = [150.0, 2.0]
    found.wcs.crpix = [81, 81]
    # intermediate coordinates are to the East and to the North; East is to the left where North is up
    x_east, x_north = -np.cos(angle), np.sin(angle)
    y_east, y_north = np.sin(angle), np.cos(angle)
    found.wcs.cd = SCALE / 3600 * np.array([[x_east, y_east], [x_north, y_north]])
    return found


def test_scale_and_north_come_from_the_header(folder: Path) -> None:
    a, b = (read_lens(LensFiles(folder / n / "image.fits", folder / n / "psf.fits", folder / n / "noise_map.fits"))
            for n in "ab")  # fmt: skip
    assert (a.pixel_scale, b.pixel_scale) == pytest.approx((SCALE, SCALE), rel=1e-4)
    # +y is 30 degrees East of North and East is counter-clockwise: North is 30 degrees clockwise of +y
    assert (np.degrees(a.north), a.parity) == pytest.approx((60.0, 1.0), abs=0.1)
    assert np.isnan(b.north)
    assert a.psf.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("projection", "place"),
    [
        (("RA---TAN", "DEC--TAN"), (150.0, 2.0)),
        (("DEC--TAN", "RA---TAN"), (2.0, 150.0)),
        (("GLON-TAN", "GLAT-TAN"), (150.0, 40.0)),
        (("RA---TAN-SIP", "DEC--TAN-SIP"), (150.0, 60.0)),
    ],
)
def test_north_is_where_astropy_has_it(folder: Path, projection: tuple[str, str], place: tuple[float, float]) -> None:
    """The position angle of the image's x axis, of an image a degree from where its projection touches the sky."""
    found = wcs(30.0)
    found.wcs.ctype, found.wcs.crval, found.wcs.crpix = list(projection), list(place), [81 + 3600 / SCALE, 81]
    header = found.to_header()
    header["CPDIS1"] = "Lookup"  # left of the whole exposure, with nothing it refers to
    fits.PrimaryHDU(fits.getdata(folder / "a/image.fits"), header).writeto(folder / "a/image.fits", overwrite=True)
    lens = read_lens(LensFiles(*(folder / "a" / f"{kind}.fits" for kind in ("image", "psf", "noise_map"))))
    at, right, up = (found.pixel_to_world(x, y).icrs for x, y in ((80, 80), (81, 80), (80, 81)))
    for step, angle in ((right, 0.0), (up, np.pi / 2)):
        error = lens.parity * (angle - lens.north) - at.position_angle(step).rad
        assert np.angle(np.exp(1j * error)) == pytest.approx(0, abs=1e-3)


def test_a_folder_is_a_table(folder: Path) -> None:
    entries = read_table(folder)
    assert [entry.name for entry in entries] == ["a", "b"]
    assert entries[0].files.noise == folder / "a/noise_map.fits"
    with pytest.raises(InputError, match="no lenses in this folder"):
        read_table(folder / "a")


def test_files_of_a_folder_are_found_however_they_are_compressed_or_told_of(folder: Path) -> None:
    """A lens without an image is one that is not usable, not one that is not there; no mask is passed over."""
    for old, new in (("image.fits", "image.fits.gz"), ("psf.fits", "PSF.FIT"), ("noise_map.fits", "Noise.fits")):
        data = fits.getdata(folder / "b" / old)
        (folder / "b" / old).unlink()
        fits.PrimaryHDU(data, fits.Header({"PIXSCALE": SCALE})).writeto(folder / "b" / new)
    fits.PrimaryHDU(np.zeros((161, 161))).writeto(folder / "b/Mask.fits")
    fits.PrimaryHDU(np.zeros((161, 161))).writeto(folder / "c_segments.fits")
    for name, file in (("c", "drizzled.fits"), ("plots", "a.png"), (".git", "image.fits")):
        (folder / name).mkdir()
        (folder / name / file).write_bytes(b"")
    _, b, c = read_table(folder)
    files = (b.files.image, b.files.psf, b.files.noise, b.files.mask)
    assert files == tuple(folder / "b" / n for n in ("image.fits.gz", "PSF.FIT", "Noise.fits", "Mask.fits"))
    assert c.files.image == folder / "c/image.fits"
    assert unused(folder) == ["c/drizzled.fits"]
    output = CliRunner().invoke(app, ["check-lenses", str(folder)]).output
    assert "c: unusable:" in output
    assert "not used: c/drizzled.fits" in output
    assert "2 of 3 lenses can be used" in output
    (folder / "b/mask.fits.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"Mask.fits and mask.fits.gz may both be the mask of this lens"):
        read_table(folder)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffname,image,psf,pixel_scale,survey\nx,i.fits,p.fits,0.05,a\n",
        "\n# made by hand\n name , image, psf ,pixel_scale,survey\n x , i.fits , p.fits ,0.05,\n\n",
        "name;image;psf;pixel_scale;survey\nx;i.fits;p.fits;0.05;a\n",
        "name|image|psf|pixel_scale|survey\nx|i.fits|p.fits|0.05|a\n",
        "name\timage\tpsf\tpixel_scale\tsurvey\nx\ti.fits\tp.fits\t0.05\ta\n",
        "name  image  psf  pixel_scale  survey\nx  i.fits  p.fits  0.05  a\n",
        "name,image,psf,pixel_scale,survey\nx,i.fits,p.fits,0.05,a,,\n",
        "name,image,psf,pixel_scale,survey\nx,i.fits,p.fits,0.05\n",
    ],
)
def test_text_as_programs_and_people_write_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    (entry,) = read_table(tmp_path / "t.csv")
    assert (entry.name, entry.files.image, entry.files.psf) == ("x", tmp_path / "i.fits", tmp_path / "p.fits")
    assert (entry.files.pixel_scale, entry.files.mask, entry.problem) == (0.05, None, "")
    assert unused(tmp_path / "t.csv") == ["survey"]


@pytest.mark.filterwarnings("ignore::astropy.units.UnitsWarning")
@pytest.mark.parametrize("suffix", ["ecsv", "fits"])
def test_columns_in_another_unit_are_converted(folder: Path, suffix: str) -> None:
    columns = {"name": ["a"], "image": ["a/image.fits"], "psf": ["a/psf.fits"], "background_rms": [0.1]}
    table = Table(columns | {"pixel_scale": [50.0] * mas, "exposure_time": [30.0] * minute})
    path = folder / f"t.{suffix}"
    table.write(path, format={"ecsv": "ascii.ecsv", "fits": "fits"}[suffix])
    (entry,) = read_table(path)
    assert (entry.files.pixel_scale, entry.files.exposure_time) == pytest.approx((0.05, 1800.0))
    for unit in ("s", "nonsense"):
        table["pixel_scale"].unit = Unit(unit, parse_strict="silent")
        table.write(path, format={"ecsv": "ascii.ecsv", "fits": "fits"}[suffix], overwrite=True)
        with pytest.raises(InputError, match=rf"the column pixel_scale is in {unit}; give it in arcsec"):
            read_table(path)


@pytest.mark.parametrize("suffix", ["ecsv", "fits"])
def test_empty_cells_of_a_column_with_a_unit_are_empty(folder: Path, suffix: str) -> None:
    columns = {"name": ["a", "b"], "image": ["a/image.fits", "b/image.fits"], "psf": ["a/psf.fits", "b/psf.fits"]}
    table = Table(columns)
    for name, values, unit in (
        ("pixel_scale", [50.0, 7.0], mas),
        ("center_row", [3, 4], pix),
        ("fit_radius", [2, 1], ""),
    ):
        table[name] = MaskedColumn(values, mask=[False, True], unit=unit or None)
    path = folder / f"t.{suffix}"
    table.write(path, format={"ecsv": "ascii.ecsv", "fits": "fits"}[suffix])
    a, b = read_table(path)
    assert (a.files.pixel_scale, a.files.wishes.row, a.files.wishes.fit_radius) == pytest.approx((0.05, 3.0, 2.0))
    assert (b.files.pixel_scale, b.files.wishes.row, b.files.wishes.fit_radius) == (None, None, None)
    assert (a.problem, b.problem) == ("", "")


def test_an_image_is_no_table(folder: Path) -> None:
    with pytest.raises(InputError, match=r"image.fits: not a readable table of lenses"):
        read_table(folder / "a/image.fits")


def test_places_and_discs_outside_of_the_image_are_refused(folder: Path) -> None:
    files = LensFiles(*(folder / "a" / f"{kind}.fits" for kind in ("image", "psf", "noise_map")))
    for wishes, reason in (
        (Wishes(1000.0, 80.0), "center_column 1000, center_row 80 are outside of the image of 161 x 161 px"),
        (Wishes(fit_radius=100.0), "fit_radius 100 arcsec is more than the image has"),
        (Wishes(fit_radius=0.1), "pixels of 0.05 arcsec are left to fit"),
    ):
        with pytest.raises(InputError, match=reason):
            read_lens(replace(files, wishes=wishes), Preparation())


def test_a_variance_for_a_noise_map_and_a_sky_are_noted(folder: Path) -> None:
    files = LensFiles(*(folder / "a" / f"{kind}.fits" for kind in ("image", "psf", "noise_map")))
    image, header = fits.getdata(files.image, header=True)
    fits.writeto(files.noise, np.full((161, 161), NOISE**2), overwrite=True)
    with pytest.raises(InputError, match=r"noise_map.fits: \d+ pixels of the image are more than 50 times this noise"):
        read_lens(files, Preparation())
    fits.writeto(files.noise, np.full((161, 161), NOISE / 5), overwrite=True)
    scatter, *_ = read_lens(files, Preparation()).notes
    assert re.fullmatch(r"empty sky scatters 4\.\d+ times as much as the noise says", scatter)
    fits.writeto(files.noise, np.full((161, 161), NOISE), overwrite=True)
    assert read_lens(files, Preparation()).notes == ()
    fits.PrimaryHDU(image + 1, header).writeto(files.image, overwrite=True)
    (sky,) = read_lens(files, Preparation()).notes
    assert re.match(r"1\.\d+ of sky is left in the image, 10\d times the noise of a pixel", sky)


@pytest.mark.parametrize("suffix", ["csv", "ecsv", "fits"])
def test_formats_of_tables(folder: Path, suffix: str) -> None:
    columns = {"name": ["a"], "image": ["a/image.fits"], "psf": ["a/psf.fits"], "noise": ["a/noise_map.fits"]}
    table = Table(columns | {"pixel_scale": [0.06], "zero_point": [25.9], "fit_radius": [1.7]})
    table.write(folder / f"t.{suffix}", format={"csv": "ascii.csv", "ecsv": "ascii.ecsv", "fits": "fits"}[suffix])
    (entry,) = read_table(folder / f"t.{suffix}")
    assert entry.files.pixel_scale == pytest.approx(0.06)
    assert entry.files.wishes.fit_radius == pytest.approx(1.7)
    assert entry.facts == {"zero_point": 25.9}


def test_a_name_that_occurs_twice_is_told_before_anything_runs(folder: Path) -> None:
    (folder / "t.csv").write_text("name,image,psf\na,a/image.fits,a/psf.fits\na,b/image.fits,b/psf.fits\n")
    with pytest.raises(InputError, match="lens a occurs twice"):
        read_table(folder / "t.csv")


def test_noise_from_background_and_exposure(folder: Path) -> None:
    files = LensFiles(
        folder / "a/image.fits", folder / "a/psf.fits", background_rms=0.01, exposure_time=500.0, gain=2.0
    )
    lens = read_lens(files)
    own = np.sqrt(0.01**2 + np.clip(lens.image, 0, None) / 1000)
    scatter = 1 / (2 * 1000)  # of what a pixel's own value says
    np.testing.assert_allclose(lens.noise, own, rtol=0, atol=4 * scatter)
    true = np.sqrt(0.01**2 + scene(noise_sd=0) / 1000)
    assert np.sqrt(np.mean((lens.noise - true) ** 2)) < 0.5 * np.sqrt(np.mean((own - true) ** 2))
    with pytest.raises(InputError, match="its noise is not known; give a noise map"):
        read_lens(replace(files, exposure_time=None))


def test_a_psf_finer_than_the_pixels(folder: Path) -> None:
    """Kept as it is for the fit; what looks at pixels sees it as they do."""
    fine = gaussian_kernel(2 * 1.2, 16)
    fits.writeto(folder / "fine.fits", fine.astype("float32"))
    files = LensFiles(folder / "a/image.fits", folder / "fine.fits", folder / "a/noise_map.fits")
    lens = read_lens(files, Preparation(), psf_supersampling=2)
    usual = read_lens(replace(files, psf=folder / "a/psf.fits"), Preparation())
    assert lens.psf.shape == (33, 33) != usual.psf.shape
    assert lens.prepared is not None
    assert usual.prepared is not None
    assert lens.prepared.arc_radius == pytest.approx(usual.prepared.arc_radius, rel=0.05)
    assert lens.prepared.fit_radius == pytest.approx(usual.prepared.fit_radius, rel=0.05)
    assert (lens.usable == usual.usable).mean() > 0.98


def test_masks_in_either_sense(folder: Path) -> None:
    good = np.ones((161, 161), "float32")
    good[:, :5] = 0
    fits.writeto(folder / "good.fits", good)
    fits.writeto(folder / "bad.fits", 1 - good)
    files = LensFiles(folder / "a/image.fits", folder / "a/psf.fits", folder / "a/noise_map.fits")
    masked = [
        read_lens(replace(files, mask=folder / f"{n}.fits", mask_bad=b)).usable for n, b in (("good", 0), ("bad", 1))
    ]
    np.testing.assert_array_equal(masked[0], good == 1)
    np.testing.assert_array_equal(masked[1], good == 1)
    fits.writeto(folder / "strange.fits", 3 * good)
    with pytest.raises(InputError, match="0 and 1 alone"):
        read_lens(replace(files, mask=folder / "strange.fits", mask_bad=0))


def test_a_psf_larger_than_the_image_is_cropped_and_said_so(folder: Path) -> None:
    fits.writeto(folder / "wide.fits", np.asarray(np.pad(PSF, 100), "float32"))
    lens = read_lens(LensFiles(folder / "a/image.fits", folder / "wide.fits", folder / "a/noise_map.fits"))
    assert max(lens.psf.shape) <= 161
    assert lens.psf.sum() == pytest.approx(1)
    assert "cropped" in lens.notes[0]


def test_the_command_says_what_can_be_used(folder: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["check-lenses", str(folder)])
    assert good.exit_code == 0
    assert "a: usable: " in good.output
    assert "2 of 2 lenses can be used" in good.output
    config = folder.parent / "config.yaml"
    config.write_text("catalogue: {preparation: {centre_within: 0.1}}\n")
    strict = runner.invoke(app, ["check-lenses", str(folder), "--config", str(config)])
    assert "deflector at column 83." in good.output
    assert "deflector at column 8" in strict.output
    assert "deflector at column 83." not in strict.output
    (folder / "b/psf.fits").unlink()
    bad = runner.invoke(app, ["check-lenses", str(folder)])
    assert bad.exit_code == 1
    assert "b: unusable:" in bad.output
    assert "psf.fits: no such file" in bad.output
