"""The COOLEST export, read back with COOLEST's own package: the same deflections, light and places."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from coolest.api.composable_models import ComposableLightModel, ComposableMassModel
from coolest.template.json import JSONSerializer
from coolest.template.standard import COOLEST

from lenspipe import artefact
from lenspipe.config import Lens
from lenspipe.coolest import export, parameter
from lenspipe.errors import InputError
from lenspipe.image.light import Light
from lenspipe.lens.coordinates import ellipticity
from lenspipe.lens.profiles import Composite, epl_deflection, shear_deflection
from lenspipe.posteriors.store import PARAMETERS
from lenspipe.results import Results
from tests.posteriors import posteriors, write_catalogue, write_store

NAMES = ["a", "b"]
SIE = {"far_theta_E": 0.3, "far_q": 0.7, "far_phi": -0.4, "far_center_x": 1.1, "far_center_y": -0.6}
SHEET = {"sheet_kappa": 0.05}
BULGE = {"bulge_amplitude": 2.0, "bulge_R_sersic": 0.6, "bulge_n_sersic": 3.0, "bulge_q": 0.75, "bulge_phi": 1.2}
BULGE |= {"bulge_center_x": 0.05, "bulge_center_y": -0.02}
DISC = {
    "disc_amplitude": 1.0,
    "disc_sd": 0.9,
    "disc_q": 0.6,
    "disc_phi": 1.5,
    "disc_center_x": 0.0,
    "disc_center_y": 0.1,
}
SETTINGS = Lens.model_validate(
    {"components": {"far": "sie", "sheet": "sheet"}, "light": {"bulge": "sersic", "disc": "gaussian"}, "redshift": 0.5}
)


def lenses(**fixed: float) -> xr.Dataset:
    """Posteriors about e = 0.1, -0.2 and with further parameters as given; e, q and phi belong together."""
    data = posteriors(NAMES, draws=50, seed=6)
    for kind in ("", "_map"):
        e1, e2 = data[f"e1{kind}"] * 0.1 + 0.1, data[f"e2{kind}"] * 0.1 - 0.2
        q, phi = (1 - np.hypot(e1, e2)) / (1 + np.hypot(e1, e2)), np.arctan2(e2, e1) / 2
        data = data.assign({f"e1{kind}": e1, f"e2{kind}": e2, f"q{kind}": q, f"phi{kind}": phi})
    data = data.assign({name: xr.full_like(data["theta_E"], value) for name, value in fixed.items()})
    data = data.assign({f"{name}_map": xr.full_like(data["theta_E_map"], value) for name, value in fixed.items()})
    x = np.linspace(0, 1, 64)
    lopsided = np.exp(-30 * ((x[None] - 0.3) ** 2 + (x[:, None] - 0.6) ** 2)).astype("float32")  # column 19, row 38
    frame = np.array([[0.1, -0.2, 1.5], [0.0, 0.3, 2.0]], "float32")
    return data.assign(source_map=data["source_map"] * 0 + lopsided, source_frame=(("lens", "frame"), frame)).assign(
        basin_parameters=(("lens", "basin", "parameter"), np.zeros((2, 2, len(PARAMETERS) + len(fixed))))
    )


def exported(folder: Path, data: xr.Dataset, settings: Lens, to: str = "coolest") -> Path:
    """The export of a run with these posteriors."""
    write_catalogue(folder / "catalogue", {"small": NAMES[::-1]})
    record = artefact.provenance("fit", {"lens": settings})
    write_store(folder / "fit/shard-0000.zarr", {"small": [data]}, {"lost": "no memory"}, record)
    assert export(Results(folder), folder / to) == len(NAMES)
    return folder / to


def read(folder: Path, name: str) -> COOLEST:
    return JSONSerializer(str(folder / name / name)).load(verbose=False)


def tensors(data: xr.Dataset, name: str, names: Any) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(float(data[f"{key}_map"].values[NAMES.index(name)])).double() for key in names}


POINTS = np.random.default_rng(2).uniform(-2, 2, (2, 40))


@pytest.mark.parametrize("name", NAMES)
def test_deflections_are_the_same(name: str, tmp_path: Path) -> None:
    """Power law, shear, an isothermal ellipsoid and a sheet, by COOLEST's own functions."""
    data = lenses(**SIE, **SHEET, **BULGE, **DISC)
    read_back = read(exported(tmp_path, data, SETTINGS), name)
    entities = [entity.name for entity in read_back.lensing_entities]
    assert entities == ["external shear", "lens", "far", "sheet", "source"]
    assert [entity.redshift for entity in read_back.lensing_entities] == [0.5] * 4 + [None]
    mass = ComposableMassModel(read_back, str(tmp_path / "coolest" / name), entity_selection=[0, 1, 2, 3])
    theirs = mass.evaluate_deflection(*POINTS)
    x, y = torch.from_numpy(POINTS)
    main = tensors(data, name, ("theta_E", "gamma", "q", "phi", "center_x", "center_y"))
    ours = np.array(epl_deflection(x, y, **main)) + np.array(
        shear_deflection(x, y, **tensors(data, name, ("gamma1", "gamma2")))
    )
    further = Composite({"far": "sie", "sheet": "sheet"})
    ours = ours + np.array(further.deflection(x, y, tensors(data, name, (*SIE, *SHEET))))
    np.testing.assert_allclose(np.array(theirs), ours, rtol=0, atol=1e-6)


def test_light_of_the_lens_is_the_same(tmp_path: Path) -> None:
    """By COOLEST's functions, whose Sersic profiles have their width to 1e-3 (for n = 1/2 only to 3 %)."""
    data = lenses(**SIE, **SHEET, **BULGE, **DISC)
    folder = exported(tmp_path, data, SETTINGS)
    x, y = torch.from_numpy(POINTS)
    for place, (kind, own) in enumerate({"sersic": BULGE, "gaussian": DISC}.items()):
        component = next(iter(own)).split("_")[0]
        model = ComposableLightModel(
            read(folder, "a"), str(folder / "a"), entity_selection=[1], profile_selection=[place]
        )
        ours = Light({component: kind}).brightness(x, y, tensors(data, "a", own)).numpy()
        theirs = model.evaluate_surface_brightness(*POINTS)
        near = np.hypot(*POINTS) < 1.5
        np.testing.assert_allclose(theirs[near], ours[near], rtol=0.005 if kind == "sersic" else 0.06)


def test_source_lies_where_it_did(tmp_path: Path) -> None:
    """The brightest pixel of a lopsided source, at the places that COOLEST gives the pixels."""
    folder = exported(tmp_path, lenses(), Lens())
    for name, (x, y, width) in {"a": (0.1, -0.2, 1.5), "b": (0.0, 0.3, 2.0)}.items():
        model = ComposableLightModel(read(folder, name), str(folder / name), entity_selection=[2])
        pixels, _, coordinates = model.surface_brightness(return_extra=True)
        row, column = np.unravel_index(pixels.argmax(), pixels.shape)
        along_x, along_y = coordinates.pixel_axes
        assert along_x[column] == pytest.approx(x + width * (0.3 - 0.5), abs=width / 64)
        assert along_y[row] == pytest.approx(y + width * (0.6 - 0.5), abs=width / 64)
        assert along_x[1] - along_x[0] == pytest.approx(width / 64)


def test_template_has_point_estimates_and_posteriors(tmp_path: Path) -> None:
    data = lenses(**SIE, **SHEET, **BULGE, **DISC)
    folder = exported(tmp_path, data, SETTINGS)
    found = read(folder, "b")
    shear, lens, far = (entity.mass_model[0].parameters for entity in found.lensing_entities[:3])
    draws = data.isel(lens=1)
    for name in ("theta_E", "gamma", "q", "center_x"):
        assert lens[name].point_estimate.value == pytest.approx(float(draws[f"{name}_map"]), rel=1e-6)
        statistics, values = lens[name].posterior_stats, draws[name].values.astype(float)
        assert statistics.mean == pytest.approx(values.mean())
        assert statistics.median == pytest.approx(np.median(values))
        assert statistics.percentile_16th == pytest.approx(np.percentile(values, 16))
        assert statistics.percentile_84th == pytest.approx(np.percentile(values, 84))
    assert lens["phi"].posterior_stats.median == pytest.approx(
        np.degrees(np.median(draws["phi"].values)) + 90, abs=1e-4
    )  # phi is negative here
    strength = np.hypot(draws["gamma1"], draws["gamma2"])
    assert shear["gamma_ext"].posterior_stats.mean == pytest.approx(float(strength.mean()))
    assert far["gamma"].point_estimate.value == 2
    text = json.loads((folder / "b/b.json").read_text())
    entity = text["lensing_entities"][2]["mass_model"][0]
    assert entity["parameters"]["theta_E"]["fixed"] is True
    assert entity["parameters"]["q"]["id"] == found.lensing_entities[2].mass_model[0].parameters["q"].id
    assert found.observation.pixels.shape == (16, 16)
    assert found.observation.pixels.pixel_size == pytest.approx(0.1)
    np.testing.assert_array_equal(
        found.observation.pixels.get_pixels(), np.ones((16, 16))
    )  # the first in the catalogue
    np.testing.assert_array_equal(found.likelihoods[0].get_mask_pixels(), np.ones((16, 16)))
    assert found.instrument.psf.pixels.get_pixels().sum() == pytest.approx(1)


def test_a_background_is_in_units_of_the_image(tmp_path: Path) -> None:
    folder = exported(tmp_path, lenses(background=0.2), Lens())
    assert json.loads((folder / "b/b.json").read_text())["meta"]["background"] == pytest.approx(0.4)


def test_angles_stay_on_one_side_of_the_wrap() -> None:
    """Around phi = 0, which is 90 degrees East of North, the edge of COOLEST's range."""
    degrees = np.array([89.0, 88.0, 89.0, -89.0, -88.0, 90.0, 89.5])
    found = parameter(degrees, is_angle=True)
    assert found["point_estimate"]["value"] == 89
    statistics = found["posterior_stats"]
    assert statistics["median"] == pytest.approx(89.75)
    assert statistics["mean"] == pytest.approx(np.mean([88, 89, 91, 92, 90, 89.5]))
    assert statistics["percentile_84th"] == pytest.approx(np.percentile([88, 89, 91, 92, 90, 89.5], 84))
    e1, e2 = ellipticity(torch.tensor(0.5), torch.tensor(0.0))
    assert (float(e1), float(e2)) == pytest.approx((1 / 3, 0))


def test_a_zip_has_every_lens(tmp_path: Path) -> None:
    archive = exported(tmp_path, lenses(), Lens(), "coolest.zip")
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        file.extractall(tmp_path / "unpacked")
    files = [f"{name}/{part}" for name in NAMES for part in (f"{name}.json", *IMAGES)]
    assert sorted(names) == sorted(["provenance.json", *files])
    assert read(tmp_path / "unpacked", "a").mode == "MAP"
    assert artefact.read_record(tmp_path / "unpacked")["facts"] == {"lenses": 2}
    assert export(Results(tmp_path), tmp_path / "one", ["b"]) == 1
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"b", "provenance.json"}
    assert export(Results(tmp_path), tmp_path / "one", ["a", "a"]) == 1, "an earlier export is replaced"
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"a", "provenance.json"}


def test_an_export_takes_nothing_of_the_users_away(tmp_path: Path) -> None:
    exported(tmp_path, lenses(), Lens())
    one = tmp_path / "one"
    export(Results(tmp_path), one, ["a"])
    (one / "notes").mkdir()
    (one / "notes/mine.txt").write_text("mine")
    for to in (one, one / "notes"):
        with pytest.raises(InputError, match="a folder with other things in it"):
            export(Results(tmp_path), to, ["a"])
    with pytest.raises(InputError, match=r"mine.txt: a file; name a folder, or a file that ends in .zip"):
        export(Results(tmp_path), one / "notes/mine.txt", ["a"])
    assert (one / "notes/mine.txt").read_text() == "mine"


IMAGES = ("image.fits", "noise.fits", "mask.fits", "psf.fits", "source.fits")


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    halo = {f"halo_{key}": 0.1 for key in ("alpha_Rs", "Rs", "center_x", "center_y")}
    with pytest.raises(InputError, match="component halo: nfw is not written as COOLEST"):
        exported(tmp_path, lenses(**halo), Lens.model_validate({"components": {"halo": "nfw"}}))
    assert not (tmp_path / "coolest").exists()
    with pytest.raises(InputError, match="lens lost has no posterior"):
        export(Results(tmp_path), tmp_path / "coolest", ["lost"])
    with pytest.raises(InputError, match="a folder with other things in it"):
        export(Results(tmp_path), tmp_path / "fit")
    (tmp_path / "catalogue/lenses.csv").unlink()
    (tmp_path / "catalogue/catalogue.zarr").rename(tmp_path / "catalogue/elsewhere.zarr")
    with pytest.raises(InputError, match=r"catalogue\.zarr"):
        export(Results(tmp_path), tmp_path / "coolest", ["a"])
