"""Export to COOLEST, the lens-modelling community's standard: one template (JSON) and its images (FITS) for each lens.

COOLEST's own package is not needed for it; tests read the result with it. Conventions differ in three things: position
angles are in degrees, counter-clockwise from +y (East of North), in (-90, 90]; the shear has a strength and an angle;
light of analytic profiles is per square arcsec, that of pixels per pixel of the image. Einstein radii and axis ratios
are the same. SIE and SIS are written as power laws with a fixed slope of 2, Gaussians as Sersic profiles of index 1/2.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from astropy.io import fits
from numpy.typing import NDArray

from lenspipe import artefact
from lenspipe.errors import InputError
from lenspipe.lens.coordinates import coolest_from_phi
from lenspipe.lens.parameters import LIGHT_PROFILES, MASS_PROFILES, MGE_AMPLITUDES, qualified
from lenspipe.posteriors.reading import observed
from lenspipe.posteriors.shards import Group, find_lens, groups, manifests
from lenspipe.posteriors.store import parameter_names
from lenspipe.results import Results

Values = Mapping[str, NDArray]  # of each parameter: at the MAP, then of all draws
STAGE = "export-coolest"
ANGLES = ("phi", "phi_ext")
UNREAD = {
    "latent",
    "log_density",
    "acceptance",
    "energy",
    "diverging",
    "basin_w",
    "model_map",
    "model_mean",
    "model_sd",
    "light_map",
}
UNREAD |= {"source_mean", "source_sd"}
GAUSSIAN_HALF_LIGHT = math.sqrt(2 * math.log(2))  # half-light radius of a Gaussian over its standard deviation


def export(paths: Results, to: Path, names: Sequence[str] = ()) -> int:
    """Write the lenses `names`, or all that have a posterior, to a zip or, without that suffix, a folder; how many.

    Each lens is a folder of its own name with <name>.json. Raises InputError for a lens without a posterior, one that
    is not in the catalogue beside the fits, and a profile that is not converted.
    """
    if to.is_file() and to.suffix != ".zip":
        raise InputError(f"{to}: a file; name a folder, or a file that ends in .zip")
    if to.is_dir() and any(to.iterdir()) and not _is_export(to):
        raise InputError(f"{to}: a folder with other things in it; name a new one, or a file that ends in .zip")
    chosen = [find_lens(paths.fit, name) for name in dict.fromkeys(names)] or list(groups(paths.fit))
    if not chosen:
        raise InputError(f"{paths.fit}: no lens of this run has a posterior; its manifests shard-*.csv say why")
    inputs = [path for path in (paths.catalogue.with_name("lenses.csv"), *manifests(paths.fit)) if path.exists()]
    record = artefact.provenance(STAGE, {}, inputs, lenses=_count(chosen))
    about = json.dumps({artefact.KEY: record}, indent=2).encode()
    with artefact.written_whole(to) as target:
        write = _zip if to.suffix == ".zip" else _folder
        write(target, _all_files(chosen, paths.fit, about))
    return _count(chosen)


def template(lens: xr.Dataset, seen: xr.Dataset, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The template of a lens.

    lens: its variables in the store; seen: those in the catalogue; settings: the section `lens` it was fitted with.
    """
    own = {name: np.append(lens[f"{name}_map"], lens[name]).astype(float) for name in parameter_names(lens)}
    scale, (ny, nx) = float(seen["pixel_scale"]), seen["image"].shape
    image = {
        name: grid(f"{name}.fits", (0, 0), (nx * scale, ny * scale), (nx, ny)) for name in ("image", "noise", "mask")
    }
    ky, kx = seen["psf"].shape
    psf_scale = scale / settings.get("psf_supersampling", 1)
    return {
        "standard": "COOLEST",
        "mode": "MAP",
        "coordinates_origin": {"ra": "00h00m00s", "dec": "+00d00m00s"},
        "lensing_entities": _numbered(_entities(own, lens, settings, float(seen["light_unit"]), scale)),
        "observation": {
            "pixels": image["image"],
            "noise": {"type": "NoiseMap", "noise_map": image["noise"]},
            "exposure_time": None,
            "mag_zero_point": None,
            "mag_sky_brightness": None,
        },
        "instrument": {
            "name": "",
            "band": "",
            "pixel_size": scale,
            "readout_noise": 0.0,
            "psf": {
                "type": "PixelatedPSF",
                "description": None,
                "pixels": grid("psf.fits", (0, 0), (kx * psf_scale, ky * psf_scale), (kx, ky)),
            },
        },
        "likelihoods": [{"type": "ImagingDataLikelihood", "mask": image["mask"]}],
        "cosmology": None,
        "meta": {
            "lens": str(lens["name"].item()),
            "origin": "right ascension and declination are not known; x and y are those of the image",
            "fluxes": "in units of the image, not electrons per second",
            **({"background": float(lens["background_map"] * seen["flux_unit"])} if "background_map" in lens else {}),
        },
    }


def _entities(
    own: Values, lens: xr.Dataset, settings: Mapping[str, Any], light_unit: float, scale: float
) -> Iterator[dict[str, Any]]:
    """Shear, lens galaxy with its light, further deflectors and source."""
    components, redshift = settings.get("components", {}), settings.get("redshift")
    if apart := [name for name, component in components.items() if component.get("redshift") is not None]:
        raise InputError(f"component {', '.join(apart)}: lenses with several planes are not written as COOLEST yet")
    light = [
        profile(*one)
        for name, kind in settings.get("light", {}).items()
        for one in LIGHT[kind](_of(own, name, LIGHT_PROFILES[kind]), light_unit / scale**2)
    ]
    main = profile(*_power_law(_of(own, "", MASS_PROFILES["epl"])))
    field = profile(*_shear(_of(own, "", MASS_PROFILES["shear"])))
    yield {"type": "MassField", "name": "external shear", "redshift": redshift, "mass_model": [field]}
    yield {"type": "Galaxy", "name": "lens", "redshift": redshift, "mass_model": [main], "light_model": light}
    for name, component in components.items():
        kind = component["profile"]
        if kind not in MASS:
            raise InputError(f"component {name}: {kind} is not written as COOLEST, only {', '.join(MASS)} are")
        mass = profile(*MASS[kind](_of(own, name, MASS_PROFILES[kind])))
        entity = {"name": name, "redshift": redshift, "mass_model": [mass]}
        yield entity | ({"type": "MassField"} if kind in FIELDS else {"type": "Galaxy", "light_model": []})
    x, y, width = (float(number) for number in lens["source_frame"])
    rows, columns = lens["source_map"].shape
    pixels = grid("source.fits", (x, y), (width, width), (columns, rows))
    source = {"type": "PixelatedRegularGrid", "parameters": {"pixels": pixels}}
    place = {"name": "source", "redshift": settings.get("source_redshift")}
    yield place | {"type": "Galaxy", "mass_model": [], "light_model": [source]}


def _of(own: Values, component: str, names: Iterable[str]) -> dict[str, NDArray]:
    return {name: own[qualified(component, name)] for name in names}


def _power_law(p: Values) -> tuple[str, Values]:
    slope = {"gamma": p.get("gamma", np.full_like(p["theta_E"], 2.0))}
    shape = {"q": p.get("q", np.ones_like(p["theta_E"])), "phi": angle(p.get("phi", np.zeros_like(p["theta_E"])))}
    return "PEMD", slope | {"theta_E": p["theta_E"]} | shape | _centre(p)


def _shear(p: Values) -> tuple[str, Values]:
    strength, direction = np.hypot(p["gamma1"], p["gamma2"]), np.arctan2(p["gamma2"], p["gamma1"]) / 2
    return "ExternalShear", {"gamma_ext": strength, "phi_ext": angle(direction)}


def _sheet(p: Values) -> tuple[str, Values]:
    return "ConvergenceSheet", {"kappa_s": p["kappa"]}


def _sersic(p: Values, unit: float) -> list[tuple[str, Values]]:
    shape = {"theta_eff": p["R_sersic"], "n": p["n_sersic"], "q": p["q"], "phi": angle(p["phi"])}
    return [("Sersic", {"I_eff": unit * p["amplitude"]} | shape | _centre(p))]


def _mge(p: Values, unit: float) -> list[tuple[str, Values]]:
    """Each of its Gaussians."""
    steps = len(MGE_AMPLITUDES) - 1
    sds = [p["sd_min"] ** (1 - k / steps) * p["sd_max"] ** (k / steps) for k in range(steps + 1)]
    terms = zip(MGE_AMPLITUDES, sds, strict=True)
    return [one for name, sd in terms for one in _gaussian({**p, "amplitude": p[name], "sd": sd}, unit)]


def _gaussian(p: Values, unit: float) -> list[tuple[str, Values]]:
    """At its half-light radius a Gaussian has half of its central brightness."""
    same = {"R_sersic": GAUSSIAN_HALF_LIGHT * p["sd"], "n_sersic": np.full_like(p["sd"], 0.5)}
    return _sersic({**p, "amplitude": p["amplitude"] / 2, **same}, unit)


def _centre(p: Values) -> dict[str, NDArray]:
    return {name: p[name] for name in ("center_x", "center_y")}


MASS: dict[str, Callable[[Values], tuple[str, Values]]] = {
    "epl": _power_law,
    "sie": _power_law,
    "sis": _power_law,
    "shear": _shear,
    "sheet": _sheet,
}
FIELDS = ("shear", "sheet")
LIGHT: dict[str, Callable[[Values, float], list[tuple[str, Values]]]] = {
    "sersic": _sersic,
    "gaussian": _gaussian,
    "mge": _mge,
}


def angle(phi: NDArray) -> NDArray:
    """COOLEST's position angles [deg] of angles counter-clockwise from +x [rad]."""
    return coolest_from_phi(torch.from_numpy(np.asarray(phi, dtype=float))).numpy()


def profile(kind: str, values: Values) -> dict[str, Any]:
    """A profile with its parameters, each with its value at the MAP and the statistics of its draws."""
    return {"type": kind, "parameters": {name: parameter(v, name in ANGLES) for name, v in values.items()}}


def parameter(values: NDArray, is_angle: bool = False) -> dict[str, Any]:
    """A parameter from its value at the MAP and, after it, its draws.

    Draws of angles are taken on one side of the wrap: percentiles may lie beyond 90 degrees, the median does not.
    """
    at_map, draws = values[0], values[1:]
    if is_angle:
        middle = np.degrees(np.angle(np.exp(2j * np.radians(draws)).mean())) / 2
        draws = middle + (draws - middle + 90) % 180 - 90
        draws = draws - 180 * np.ceil((np.median(draws) - 90) / 180)
    p16, median, p84 = np.percentile(draws, [16, 50, 84])
    return {
        "fixed": bool(np.ptp(draws) == 0),
        "point_estimate": {"value": float(at_map)},
        "posterior_stats": {
            "mean": float(draws.mean()),
            "median": float(median),
            "percentile_16th": float(p16),
            "percentile_84th": float(p84),
        },
        "prior": {"type": None},
    }


def grid(
    file: str, centre: tuple[float, float], widths: tuple[float, float], pixels: tuple[int, int]
) -> dict[str, Any]:
    """An image in a file beside the template; centre and widths ["] and numbers of pixels along x and y."""
    (x, y), (width, height) = centre, widths
    return {
        "fits_file": {"path": file},
        "field_of_view_x": [x - width / 2, x + width / 2],
        "field_of_view_y": [y - height / 2, y + height / 2],
        "num_pix_x": pixels[0],
        "num_pix_y": pixels[1],
    }


def _numbered(entities: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entities with the identifiers that COOLEST gives profiles and parameters."""
    found = list(entities)
    for number, entity in enumerate(found):
        for model in ("mass", "light"):
            for place, one in enumerate(entity.get(f"{model}_model", [])):
                one["id"] = f"{number}-{entity['type'].lower()}-{model}-{place}-{one['type']}"
                for name, values in one["parameters"].items():
                    values["id"] = f"{one['id']}-{name}"
    return found


def _all_files(chosen: Iterable[Group], fit: Path, about: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and contents of every file, a block of lenses in memory at a time."""
    yield "provenance.json", about
    for group in chosen:
        settings = artefact.read_record(group.path.parent)["settings"]["lens"]
        for block in group.blocks():
            lenses = block.read([name for name in block.variables() if name not in UNREAD])
            catalogue = observed(fit, block.path.name, block.names)
            for row, name in enumerate(block.names):
                for file, contents in _files(lenses.isel(lens=row), catalogue.isel(lens=row), settings):
                    yield f"{name}/{file.format(name=name)}", contents


def _files(lens: xr.Dataset, seen: xr.Dataset, settings: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    text = json.dumps(template(lens, seen, settings), indent=2, sort_keys=True, allow_nan=False)
    yield "{name}.json", text.encode()
    images = {name: seen[name].to_numpy() for name in ("image", "noise", "psf")}
    images |= {"mask": seen["usable"].to_numpy().astype("uint8"), "source": lens["source_map"].to_numpy()}
    for name, pixels in images.items():
        buffer = io.BytesIO()
        fits.writeto(buffer, pixels)
        yield f"{name}.fits", buffer.getvalue()


def _is_export(folder: Path) -> bool:
    """Whether a folder holds what an export wrote, and nothing else that would go with it."""
    try:
        whole = (folder / "provenance.json").is_file() and artefact.read_record(folder)["stage"] == STAGE
    except InputError:
        return False
    found = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()} - {Path("provenance.json")}
    return whole and all(path in {Path(path.parts[0], name) for name in _names(path.parts[0])} for path in found)


def _names(lens: str) -> list[str]:
    """The files of a lens."""
    return [f"{lens}.json", *(f"{name}.fits" for name in ("image", "noise", "psf", "mask", "source"))]


def _count(chosen: Iterable[Group]) -> int:
    return sum(len(group.names) for group in chosen)


def _zip(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, contents in files:
            archive.writestr(zipfile.ZipInfo(path), contents, zipfile.ZIP_DEFLATED)


def _folder(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    for path, contents in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(contents)
