"""The table of a run's lenses for a paper (LaTeX) or for the virtual observatory (VOTable)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from astropy.table import Table

from lenspipe import artefact
from lenspipe.errors import InputError
from lenspipe.results import Results, read_summary
from lenspipe.summary import unit_of

COLUMNS = {
    "theta_E": r"$\theta_\mathrm{E}$ [$''$]",
    "einstein_radius": r"$R_\mathrm{E}$ [$''$]",
    "gamma": r"$\gamma$",
    "q": r"$q$",
    "position_angle": r"PA [deg]",
    "phi": r"$\phi$ [rad]",
    "gamma1": r"$\gamma_1$",
    "gamma2": r"$\gamma_2$",
    "source_magnitude": r"$m_\mathrm{source}$",
    "source_half_light_radius": r"$r_\mathrm{source}$ [$''$]",
    "magnification": r"$\mu$",
}  # of the LaTeX table, where the summary has them; theta_E is on the intermediate axis, R_E of the critical curve


def export_table(paths: Results, to: Path, names: Sequence[str] = ()) -> int:
    """Write the summary as LaTeX (.tex: medians with the ends of the central 68 %) or VOTable (.vot, .xml: all of it).

    names: of the lenses, all where there are none. Returns how many there are. Raises InputError for another suffix, an
    unknown lens, and where there is no summary.
    """
    lenses = read_summary(paths.summary)
    if unknown := sorted(set(names) - set(lenses["name"])):
        raise InputError(f"{', '.join(unknown)}: no such lens in {paths.summary}")
    chosen = lenses[lenses["name"].isin(names)] if names else lenses
    writers = {".tex": _latex, ".vot": _votable, ".xml": _votable}
    if to.suffix not in writers:
        raise InputError(f"{to}: a table is written as {', '.join(writers)}; name the file so")
    with artefact.written_whole(to) as temporary:
        writers[to.suffix](chosen, temporary)
    return len(chosen)


def _votable(lenses: pd.DataFrame, path: Path) -> None:
    table = Table.from_pandas(lenses)
    for name in table.colnames:
        table[name].unit = unit_of(name)
    table.write(path, format="votable")


def _latex(lenses: pd.DataFrame, path: Path) -> None:
    known = [name for name in COLUMNS if f"{name}_median" in lenses and lenses[f"{name}_median"].notna().any()]
    if "position_angle" in known:
        known.remove("phi")
    rows = [
        [_escaped(row["name"]), *(quantiles(row, name) for name in known), _escaped(row["flags"] or row["status"])]
        for row in lenses.to_dict("records")
    ]
    heads = ["Lens", *(COLUMNS[name] for name in known), "Flags"]
    lines = [r"\begin{tabular}{l" + "r" * len(known) + "l}", r"\hline", " & ".join(heads) + r" \\", r"\hline"]
    lines += [" & ".join(cells) + r" \\" for cells in rows]
    path.write_text("\n".join([*lines, r"\hline", r"\end{tabular}", ""]), encoding="utf-8")


def quantiles(row: Mapping[Any, Any], name: str) -> str:
    """Median with what the central 68 % reach above and below it, to two digits of the smaller; a dash without them."""
    low, median, high = (float(row.get(f"{name}_{key}", math.nan)) for key in ("p16", "median", "p84"))
    if not all(map(math.isfinite, (low, median, high))):
        return r"\ldots"
    up, down = high - median, median - low
    least = min((size for size in (up, down) if size > 0), default=0.0)
    digits = int(np.clip(1 - math.floor(math.log10(least)), 0, 6)) if least else 4
    return f"${median:.{digits}f}^{{+{up:.{digits}f}}}_{{-{down:.{digits}f}}}$"


def _escaped(text: str) -> str:
    return text.replace("_", r"\_")
