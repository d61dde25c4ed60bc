"""GalSim's exclusion levels (`galsim.COSMOSCatalog`) for catalogues in the RealGalaxyCatalog layout.

| level | removes |
|---|---|
| `none` | nothing |
| `bad_stamp` | likely deblending failures and sky-subtraction errors (the cuts of GREAT3) |
| `bad_fits` | galaxies whose Sersic fit and bulge + disc fit have both failed |
| `marginal` | both of those, any failed fit, wide galaxies of high index, magnitudes unlike the catalogue's |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lenspipe.config.galaxies import TABLES, table_beside
from lenspipe.errors import InputError
from lenspipe.galaxies.fits_files import Table, read_table, require, require_width

Level = Literal["none", "bad_stamp", "bad_fits", "marginal"]
Sample = Literal["23.5", "25.2"]
LIMITS: dict[Sample, tuple[float, float]] = {"23.5": (20.0, 0.2), "25.2": (12.0, 0.8)}  # least S/N, greatest mask ratio
MASK_DISTANCE = 11.0  # [px]: a mask farther away than this does no harm
SELECTION = (
    "dmag",
    "sn_ellip_gauss",
    "min_mask_dist_pixels",
    "average_mask_adjacent_pixel_count",
    "peak_image_pixel_count",
)
WIDTHS = {"fit_status": 5, "sersicfit": 3, "hlr": 1}  # numbers a row that are looked at
Rows = NDArray[np.bool_]


def excluded_rows(catalogue: Path, level: Level, sample: Sample, fits: Path | None, selection: Path | None) -> Rows:
    """Which rows of a catalogue a level removes.

    fits, selection: the `_fits` and `_selection` tables; none: those beside the catalogue. A galaxy that has no row in
    a table that the level needs is removed. Raises InputError for tables and columns that are missing.
    """
    table = read_table(catalogue)
    require(table, ("IDENT",), catalogue)
    kept = np.ones(len(table["IDENT"]), dtype=bool)
    if "selection" in TABLES[level]:
        require(table, ("stamp_flux",), catalogue)
        chosen, present = _joined(table, catalogue, selection, "selection", SELECTION, level)
        kept &= present & _good_stamp(chosen, *LIMITS[sample]) & (table["stamp_flux"] > 0)
        if level == "marginal":
            kept &= np.abs(chosen["dmag"]) < 0.8
    if "fits" in TABLES[level]:
        columns = ("fit_status", "sersicfit", "hlr") if level == "marginal" else ("fit_status",)
        fitted, present = _joined(table, catalogue, fits, "fits", columns, level)
        sersic, bulge = (((status > 0) & (status < 5)) for status in fitted["fit_status"][:, [4, 0]].T)
        kept &= present & ((sersic & bulge) if level == "marginal" else (sersic | bulge))
        if level == "marginal":
            kept &= (fitted["sersicfit"][:, 2] < 5) | (fitted["hlr"][:, 0] < 1)
    return ~kept


def _good_stamp(selection: Table, sn_limit: float, mask_ratio: float) -> Rows:
    peak = np.where(selection["peak_image_pixel_count"] == 0, 1e-5, selection["peak_image_pixel_count"])
    clear = selection["min_mask_dist_pixels"] > MASK_DISTANCE
    faint = selection["average_mask_adjacent_pixel_count"] / peak < mask_ratio
    return np.asarray((selection["sn_ellip_gauss"] >= sn_limit) & (clear | faint))


def _joined(
    table: Table, catalogue: Path, given: Path | None, kind: str, columns: tuple[str, ...], level: str
) -> tuple[Table, Rows]:
    """Columns of a table in the order of the catalogue's rows, by IDENT, and which of these have a row there."""
    path = given or table_beside(catalogue, kind)
    if not path.is_file():
        raise InputError(
            f"{path}: no such table; exclusion level {level} of {catalogue} needs it: give its path as `{kind}`, "
            "or choose another level"
        )
    other = read_table(path)
    require(other, ("IDENT", *columns), path)
    require_width(other, {name: width for name, width in WIDTHS.items() if name in columns}, path)
    if not len(other["IDENT"]):
        raise InputError(f"{path}: no rows; fetch it again")
    rows = {int(ident): row for row, ident in enumerate(other["IDENT"])}
    found = np.array([rows.get(int(ident), -1) for ident in table["IDENT"]])
    picked: dict[str, NDArray[Any]] = {name: other[name][found] for name in columns}
    return picked, found >= 0
