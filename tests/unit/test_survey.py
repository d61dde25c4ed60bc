"""The embedded synthetic survey: its layout, its galaxies and what the paper's cuts leave of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from lenspipe.config import Galaxies, Survey
from lenspipe.galaxies.catalogue import image_files
from lenspipe.galaxies.selection import Tally
from lenspipe.survey import (
    CATALOGUE,
    COUNTS_SLOPE,
    FORMS,
    PAINTERS,
    draw_form,
    draw_galaxy,
    draw_light,
    draw_stamp_shape,
    half_light_radius,
    moffat,
    sersic,
    write_survey,
)

SETTINGS = Survey(galaxies=45, galaxies_per_file=20)

# What the tables of COSMOS 23.5 hold, from the GalSim example catalogue; string widths are free.
CATALOGUE_COLUMNS = {
    "IDENT": "J", "RA": "D", "DEC": "D", "MAG": "D", "BAND": "A", "WEIGHT": "D", "GAL_FILENAME": "A",
    "PSF_FILENAME": "A", "GAL_HDU": "J", "PSF_HDU": "J", "PIXEL_SCALE": "D", "NOISE_MEAN": "D", "NOISE_VARIANCE": "D",
    "stamp_flux": "D",
}  # fmt: skip
FITS_COLUMNS = {
    "IDENT": "J", "mag_auto": "D", "flux_radius": "D", "zphot": "D", "sersicfit": "8D", "bulgefit": "16D",
    "fit_status": "5J", "fit_mad_s": "D", "fit_mad_b": "D", "fit_dvc_btt": "D", "use_bulgefit": "J",
    "viable_sersic": "J", "hlr": "3D", "flux": "4D",
}  # fmt: skip
SELECTION_COLUMNS = {
    "IDENT": "J", "dmag": "D", "sn_ellip_gauss": "D", "min_mask_dist_pixels": "D",
    "average_mask_adjacent_pixel_count": "D", "peak_image_pixel_count": "D",
}  # fmt: skip


@pytest.fixture(scope="session")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("survey") / "survey"
    write_survey(SETTINGS, out, seed=3)
    return out


def test_files_are_those_of_the_layout(survey: Path) -> None:
    images = [f"real_galaxy_{kind}images_synthetic_n{k}.fits" for kind in ("", "PSF_") for k in (1, 2, 3)]
    tables = [CATALOGUE, "real_galaxy_catalog_synthetic_fits.fits", "real_galaxy_catalog_synthetic_selection.fits"]
    assert sorted(path.name for path in survey.iterdir()) == sorted([*images, *tables, "provenance.json"])


@pytest.mark.parametrize(
    ("suffix", "columns"), [("", CATALOGUE_COLUMNS), ("_fits", FITS_COLUMNS), ("_selection", SELECTION_COLUMNS)]
)
def test_tables_have_the_columns_of_cosmos(survey: Path, suffix: str, columns: dict[str, str]) -> None:
    with fits.open(survey / f"real_galaxy_catalog_synthetic{suffix}.fits") as hdus:
        found = {c.name: "A" if c.format.endswith("A") else c.format for c in hdus[1].columns}
        assert found == columns
        assert hdus[1].data["IDENT"].tolist() == list(range(1, 46))


def test_every_row_points_at_its_stamp_and_psf(survey: Path) -> None:
    rows = fits.getdata(survey / CATALOGUE, 1)
    assert rows["GAL_HDU"].tolist() == [*range(20), *range(20), *range(5)]
    for row in rows[[0, 19, 20, 44]]:
        image = fits.getdata(survey / row["GAL_FILENAME"], row["GAL_HDU"])
        psf = fits.getdata(survey / row["PSF_FILENAME"], row["PSF_HDU"])
        assert image.sum(dtype=float) == pytest.approx(row["stamp_flux"], rel=1e-4)
        assert psf.sum(dtype=float) == pytest.approx(1, abs=1e-5)


def test_image_file_begins_with_an_image_and_holds_no_more_than_told(survey: Path) -> None:
    with fits.open(survey / "real_galaxy_images_synthetic_n3.fits") as hdus:
        assert len(hdus) == 5
        assert all(hdu.data.ndim == 2 and hdu.data.dtype == ">f4" for hdu in hdus)


def test_provenance_says_synthetic(survey: Path) -> None:
    record = json.loads((survey / "provenance.json").read_text())["lenspipe"]
    assert record["stage"] == "survey"
    assert record["seed"] == 3
    assert "synthetic" in record["facts"]["about"]
    assert sum(record["facts"]["forms"].values()) == 45


def test_galaxy_is_the_same_however_many_others_are_drawn(survey: Path) -> None:
    image, row = draw_galaxy(Survey(galaxies=7), 33, moffat(3.0), seed=3)
    written = fits.getdata(survey / "real_galaxy_images_synthetic_n2.fits", 12)
    np.testing.assert_array_equal(written, image.astype(np.float32))
    assert row["MAG"] == fits.getdata(survey / CATALOGUE, 1)["MAG"][32]


def test_seed_and_ident_both_change_the_galaxy() -> None:
    rows = [draw_galaxy(SETTINGS, ident, moffat(3.0), seed)[1] for ident, seed in ((1, 1), (2, 1), (1, 2))]
    assert len({row["MAG"] for row in rows}) == 3


def test_flux_and_noise_are_those_of_the_settings() -> None:
    quiet, loud = (Survey(noise_sd=sd) for sd in (1e-9, 0.01))
    image, row = draw_galaxy(quiet, 5, moffat(3.0), seed=1)
    assert image.sum() == pytest.approx(10 ** (0.4 * (25.94 - row["MAG"])), rel=1e-6)
    noise = draw_galaxy(loud, 5, moffat(3.0), seed=1)[0] - image
    assert noise.std() == pytest.approx(0.01, rel=4 / np.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 * 0.01 / np.sqrt(noise.size)


def test_magnitudes_rise_to_the_faint_end_as_told() -> None:
    settings = Survey(magnitude_bright=20, magnitude_faint=23)
    magnitudes = np.array([draw_form(settings, np.random.default_rng([9, i])).magnitude for i in range(2000)])
    assert 20 <= magnitudes.min() <= magnitudes.max() <= 23
    share = (10**COUNTS_SLOPE - 1) / (10 ** (3 * COUNTS_SLOPE) - 1)  # of the brightest magnitude
    assert (magnitudes < 21).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 2000))


def test_sizes_and_stamps_stay_within_their_bounds() -> None:
    settings = Survey(stamp_size_max=100)
    for ident in range(300):
        rng = np.random.default_rng([4, ident])
        form = draw_form(settings, rng)
        assert 0.15 <= form.hlr * settings.pixel_scale <= 0.9
        assert 0 < form.q <= 1
        assert max(draw_stamp_shape(settings, form, rng)) <= 100


@pytest.mark.parametrize("kind", list(PAINTERS))
def test_light_of_every_form_is_positive_and_inside_its_stamp(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        form = draw_form(SETTINGS, rng)
        while form.kind != kind:
            form = draw_form(SETTINGS, rng)
        light = draw_light(form, (160, 160), rng)
        assert light.min() > -1e-12 * light.max()
        assert light[40:120, 40:120].sum() > 0.5 * light.sum()
    assert PAINTERS.keys() == FORMS.keys()


def test_sersic_holds_half_its_light_within_one_half_light_radius() -> None:
    y, x = np.indices((801, 801)) - 400.0
    light = sersic(np.hypot(x, y) / 25, 1.0)
    assert half_light_radius(light) == pytest.approx(25, abs=0.5)


def test_moffat_has_the_width_asked_for() -> None:
    psf = moffat(6.0)
    assert psf.sum() == pytest.approx(1)
    assert psf[19, 19 + 3] == pytest.approx(psf[19, 19] / 2)


def test_cuts_keep_most_galaxies_and_each_has_something_to_remove(tmp_path: Path) -> None:
    """300 galaxies; the share kept of many is 0.59, four standard deviations of it here are 0.11."""
    write_survey(Survey(galaxies=300), tmp_path / "survey", seed=11)
    tally = Tally("survey")
    for stamp in (one for file in image_files(tmp_path / "survey" / CATALOGUE) for one in file.stamps()):
        tally.keeps(stamp, Galaxies())
    assert tally.read == 300
    assert tally.rows()[-1][3] / 300 == pytest.approx(0.59, abs=0.11)
    cuts = ("sersic_fit_failed", "sersic_unphysical", "stamp_too_small", "signal_to_noise_low", "signal_to_noise_high")
    assert all(tally.removed[cut] > 0 for cut in cuts), tally.in_words()
