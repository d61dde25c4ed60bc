"""Fits of mocks with known truth that others made: `python tests/benchmarks/others_mocks.py FOLDER [SET]...`.

Reads them in place, below the folder that LENSPIPE_DATA names (`mocks/gigalens40`, `mocks/tinylens_demo`,
`mocks/galan21_single`, `mocks/pyautolens`); sets whose name ends in `_light` have the light of the lens galaxy in and
go through the preparation and the priors of the preset for observed lenses. FOLDER, a scratch folder, gets the lenses
as FITS files, the settings and the results, which hold their pixels. The stages source, deflection_table, catalogue,
fit and summary run as they do from the command line. One JSON line a lens: truth, median and standard deviation of
theta_E, gamma and q, how far the median is off in per cent and in standard deviations, chi^2 per pixel, flags,
seconds; and one line a set, with the pulls of these parameters.

    --systems N     how many of gigalens40, from the first on (10)
    --fit JSON      settings of the section `fit` in place of those here, such as '{"rounds": 1, "draws": 20}'

The priors are wide and know nothing of the truth of a lens; those of gigalens40 do not have its own distributions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from astropy.io import fits
from lenstronomy.Util.kernel_util import subgrid_kernel
from numpy.typing import NDArray

from lenspipe import cli
from lenspipe.image.noise import noise_of_data
from lenspipe.lens.coordinates import theta_E_from_pyautolens

PARAMETERS = ("theta_E", "gamma", "q", "e1", "e2")
PRESET = Path(__file__).parents[2] / "workflow/presets/observed.yaml"
FIT = {"chains": 4, "warmup": 150, "draws": 200, "rounds": 2}
SERSIC = {"kind": "sersic", "R_sersic": 0.15, "n_sersic": "TruncatedNormal(2, 1.5, 0.5, 6)"}
WIDE = {
    "theta_E": "TruncatedNormal(1.2, 0.4, 0.4, 3)",
    "gamma": "TruncatedNormal(2, 0.25, 1.3, 2.7)",
    "e1": "TruncatedNormal(0, 0.15, -0.5, 0.5)",
    "e2": "TruncatedNormal(0, 0.15, -0.5, 0.5)",
    "center_x": "Normal(0, 0.1)",
    "center_y": "Normal(0, 0.1)",
    "gamma1": "Normal(0, 0.08)",
    "gamma2": "Normal(0, 0.08)",
    "source_x": "Normal(0, 0.3)",
    "source_y": "Normal(0, 0.3)",
    "source_size": "LogNormal(2, 0.5)",
    "source_flux": "LogNormal(1, 1)",
}
BULGE = {
    "bulge_amplitude": "LogNormal(0.3, 1)",
    "bulge_R_sersic": "LogNormal(1, 0.5)",
    "bulge_n_sersic": "TruncatedNormal(3, 1.5, 0.5, 8)",
    "bulge_e1": "TruncatedNormal(0, 0.12, -0.5, 0.5)",
    "bulge_e2": "TruncatedNormal(0, 0.12, -0.5, 0.5)",
    "bulge_center_x": "Normal(0, 0.1)",
    "bulge_center_y": "Normal(0, 0.1)",
}


@dataclass(frozen=True)
class Mock:
    """One lens; image, noise: [ny, nx], psf: [ky, kx]; flux_unit 0: from the image."""

    name: str
    pixel_scale: float
    image: NDArray
    noise: NDArray
    psf: NDArray
    truth: dict[str, float]
    flux_unit: float = 0.0


def gigalens(folder: Path, systems: int) -> Iterator[Mock]:
    """Elliptical power law, shear, Sersic lens light, Sersic source; noise estimated from the data.

    They were made on 2 x 2 rays a pixel, blurred by the PSF as lenstronomy refines it: chi^2 per pixel at the truth is
    0.96 to 1.03 (with the rays gathered first and blurred by the PSF of pixels 0.97 to 1.24).
    """
    with np.load(folder / "gigalens40/images.npz") as archive:
        images, psf, scale = archive["images"].astype(float), archive["psf"], float(archive["pixscale"])
        background, exposure = float(archive["background_rms"]), float(archive["exp_time"])
    fine = subgrid_kernel(psf.astype(float), 2, odd=True)
    truths = pd.read_csv(folder / "gigalens40/truth.csv")
    for number, row in truths.head(systems).iterrows():
        image = images[int(row["id"])]
        truth = {name: row[f"mass0_{name}"] for name in ("theta_E", "gamma", "e1", "e2", "center_x", "center_y")}
        truth |= {name: row[f"mass1_{name}"] for name in ("gamma1", "gamma2")}
        truth |= {"source_x": row["source0_center_x"], "source_y": row["source0_center_y"]}
        truth["q"] = axis_ratio(truth["e1"], truth["e2"])
        noise = noise_of_data(image, np.ones(image.shape, dtype=bool), background, exposure)
        unit = float(np.percentile(image, 95))  # arcs and the flanks of the lens galaxy, not its cusp
        yield Mock(f"gigalens-{number:02d}", scale, image, noise, fine, truth, unit)


def tinylens(folder: Path, _: int) -> Iterator[Mock]:
    """Isothermal ellipsoid, shear, Sersic source."""
    known = json.loads((folder / "tinylens_demo/truth.json").read_text())
    lens = known["lens"]
    truth = {name: lens[name] for name in ("theta_E", "q", "center_x", "center_y")} | known["shear"] | {"gamma": 2.0}
    images = (fits.getdata(folder / f"tinylens_demo/src_only/{kind}.fits") for kind in ("image", "noise", "psf"))
    image, noise, psf = (np.asarray(array, dtype=float) for array in images)
    yield Mock("tinylens", known["pixel_scale"], image, noise, psf, truth)


def galan(folder: Path, _: int) -> Iterator[Mock]:
    """Isothermal ellipsoid, shear, a real galaxy as the source."""
    at = folder / "galan21_single"
    known = json.loads((at / "truth.json").read_text())
    shear, angle = known["gamma_ext"], 2 * known["psi_ext_rad"]
    truth = {"theta_E": known["theta_E_from_sigma_v"], "q": known["q_lens"], "gamma": 2.0}
    truth |= {"gamma1": shear * np.cos(angle), "gamma2": shear * np.sin(angle)}
    images = (fits.getdata(at / f"{kind}.fits") for kind in ("image", "noise_map", "psf"))
    image, noise, psf = (np.asarray(array, dtype=float) for array in images)
    yield Mock("galan21", known["pixscale"], image, noise, psf, truth)


def tinylens_light(folder: Path, _: int) -> Iterator[Mock]:
    """The same with the light of the lens galaxy, of Sersic index 4."""
    (without,) = tinylens(folder, 1)
    yield replace(without, name="tinylens-light", **fits_images(folder / "tinylens_demo/lens_src", "image", "noise"))


def pyautolens(folder: Path, _: int) -> Iterator[Mock]:
    """Isothermal ellipsoid and shear, without lens light."""
    yield pyautolens_mock(folder / "pyautolens/no_lens_light", 0.1)


def pyautolens_clumps(folder: Path, _: int) -> Iterator[Mock]:
    """The same; the source is four galaxies, up to 1.3 arcsec apart."""
    yield pyautolens_mock(folder / "pyautolens/source_complex", 0.05)


def pyautolens_light(folder: Path, _: int) -> Iterator[Mock]:
    """The same with a Sersic lens galaxy of index 4 and 3."""
    for name in ("lens_sersic", "simple"):
        yield pyautolens_mock(folder / "pyautolens" / name, 0.1)


def pyautolens_mock(at: Path, scale: float) -> Mock:
    """PyAutoLens' Einstein radius and ellipticity (y first) in our conventions (`lenspipe.lens.coordinates`)."""
    mass = mass_of(json.loads((at / "tracer.json").read_text()))
    radius, gamma, q = (torch.tensor(v) for v in (mass["einstein_radius"], 2.0, axis_ratio(*mass["ell_comps"])))
    truth = {"theta_E": float(theta_E_from_pyautolens(radius, gamma, q)), "q": float(q), "gamma": 2.0}
    return Mock(at.name, scale, truth=truth, **fits_images(at, "data", "noise_map"))


def mass_of(record: Any) -> dict[str, Any]:
    """The numbers of the first mass profile with an Einstein radius in PyAutoLens' JSON."""
    if isinstance(record, dict):
        if "einstein_radius" in record:
            e = record["ell_comps"]
            return {
                "einstein_radius": record["einstein_radius"],
                "ell_comps": e["values"] if isinstance(e, dict) else e,
            }
        record = list(record.values())
    found = (mass_of(part) for part in record if isinstance(part, dict | list))
    return next((one for one in found if one), {})


def fits_images(at: Path, image: str, noise: str) -> dict[str, NDArray]:
    """Image, noise map and PSF of a folder."""
    files = {"image": image, "noise": noise, "psf": "psf"}
    return {kind: np.asarray(fits.getdata(at / f"{name}.fits"), dtype=float) for kind, name in files.items()}


def axis_ratio(e1: float, e2: float) -> float:
    return (1 - np.hypot(e1, e2)) / (1 + np.hypot(e1, e2))


def observed(**lens: Any) -> dict[str, Any]:
    """The settings of the preset for observed lenses, but for its tables, with a source that needs no galaxies."""
    settings = yaml.safe_load(PRESET.read_text())
    priors = settings["priors"] | {"source_size": "LogNormal(1, 0.6)", "source_flux": "LogNormal(4, 1)"}
    parts = {"source": {"kind": "shapelets", "R_sersic": 0.15, "order": 8}, "priors": priors, "fit": settings["fit"]}
    return parts | {"lens": settings["lens"] | lens, "catalogue": {"preparation": {}}}


SETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gigalens": (
        gigalens,
        {
            "source": SERSIC,
            "lens": {"light": {"bulge": "sersic"}, "supersampling": 2, "psf_supersampling": 2},
            "priors": WIDE | {"light": BULGE},
            "fit": {"steps_per_temperature": 8},
        },
    ),
    "tinylens": (tinylens, {"source": SERSIC, "priors": WIDE}),
    "galan": (galan, {"source": {"kind": "shapelets", "R_sersic": 0.12, "order": 14}, "priors": WIDE}),
    "pyautolens": (pyautolens, {"source": {"kind": "shapelets", "R_sersic": 0.12, "order": 8}, "priors": WIDE}),
    "pyautolens_clumps": (
        pyautolens_clumps,
        {
            "source": {"kind": "pixel_grid", "envelope": 0.2, "correlation": 0.04, "modes": 400},
            "priors": WIDE | {"source_size": "LogNormal(3, 0.3)"},
            "fit": {"scouts": 16},
        },
    ),
    "pyautolens_light": (pyautolens_light, observed(supersampling=2)),
    "tinylens_light": (tinylens_light, observed(supersampling=2)),
}


def write_lenses(mocks: list[Mock], folder: Path) -> Path:
    """The lenses as FITS files, and the table that lists them."""
    rows = []
    for mock in mocks:
        arrays = {"image": mock.image, "noise": mock.noise, "psf": mock.psf}
        files = {kind: f"{mock.name}-{kind}.fits" for kind in arrays}
        for kind, array in arrays.items():
            fits.writeto(folder / files[kind], array.astype("float32"), overwrite=True)
        truth = {f"true_{name}": value for name, value in mock.truth.items()}
        rows.append(
            {"name": mock.name, "pixel_scale": mock.pixel_scale, "flux_unit": mock.flux_unit or None} | files | truth
        )
    pd.DataFrame(rows).to_csv(folder / "lenses.csv", index=False)
    return folder / "lenses.csv"


def fitted(mocks: list[Mock], settings: dict[str, Any], folder: Path) -> pd.DataFrame:
    """The summary of their fits."""
    folder.mkdir(parents=True, exist_ok=True)
    table = write_lenses(mocks, folder)
    catalogue = settings.get("catalogue", {}) | {"tables": [str(table.resolve())]}
    common = {"mocks": {"systems": 0}, "catalogue": catalogue}
    config, results = folder / "config.yaml", folder / "results"
    config.write_text(yaml.safe_dump(settings | common, sort_keys=False))
    for stage in (cli.source, cli.deflection_table, cli.catalogue, cli.fit, cli.summary):
        stage(config=str(config), results=results)
    return pd.read_csv(results / "summary/lenses.csv", keep_default_na=False)


def compared(row: pd.Series, truth: dict[str, float]) -> dict[str, Any]:
    """What is said of one lens."""
    line: dict[str, Any] = {"name": row["name"], "status": row["status"], "flags": row["flags"]}
    if row["status"] == "failed":
        return line | {"reason": row["reason"]}
    for name in PARAMETERS:
        if name not in truth:
            continue
        median, sd = float(row[f"{name}_median"]), (float(row[f"{name}_p84"]) - float(row[f"{name}_p16"])) / 2
        off = median - truth[name]
        found = {"true": truth[name], "median": median, "sd": sd, "percent": 100 * off / truth[name], "sigma": off / sd}
        line[name] = {key: float(f"{value:.5g}") for key, value in found.items()}
    kept = ("chi2_per_pixel", "r_hat_max", "ess_bulk_min", "starts_agreeing", "evidence_lead", "seconds")
    return line | {name: float(f"{float(row[name]):.4g}") for name in kept}


def pulls(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of every parameter: mean and standard deviation of the errors over their own, and how many are below three."""
    found = {}
    for name in PARAMETERS:
        if len(sigmas := [line[name]["sigma"] for line in lines if name in line]):
            numbers = {"mean": np.mean(sigmas), "sd": np.std(sigmas), "within_3": np.sum(np.abs(sigmas) < 3)}
            found[name] = {key: round(float(value), 2) for key, value in numbers.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="*", metavar="SET", help=", ".join(SETS))
    parser.add_argument("--systems", type=int, default=10)
    parser.add_argument("--fit", type=json.loads, default={})
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.sets) - SETS.keys()):
        parser.error(f"no set {', '.join(unknown)}; there are {', '.join(SETS)}")
    data = Path(os.environ.get("LENSPIPE_DATA") or "") / "mocks"
    if not (data / "gigalens40").is_dir():
        sys.exit(f"{data.resolve()}: no mocks here; set LENSPIPE_DATA to the folder that has mocks/gigalens40")
    for name in arguments.sets or SETS:
        read, settings = SETS[name]
        mocks = list(read(data, arguments.systems))
        began = time.perf_counter()
        rows = fitted(mocks, settings | {"fit": settings.get("fit", {}) | FIT | arguments.fit}, arguments.folder / name)
        lines = [compared(row, mock.truth) for mock, (_, row) in zip(mocks, rows.iterrows(), strict=True)]
        for line in lines:
            print(json.dumps(line), flush=True)
        off = [line["theta_E"] for line in lines if "theta_E" in line]
        total = {"set": name, "lenses": len(lines), "within_1_percent": sum(abs(one["percent"]) < 1 for one in off)}
        total |= {"pulls": pulls(lines)}
        print(json.dumps(total | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
