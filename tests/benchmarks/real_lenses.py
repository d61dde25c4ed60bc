"""The observed lenses below LENSPIPE_DATA, fitted unattended, beside what is in print.

`python tests/benchmarks/real_lenses.py FOLDER` runs the workflow in FOLDER with the preset `observed.yaml` on
`lenses/lenses.csv` (18 HST lenses of SLACS and BELLS) and prints a table: theta_E, its published values (Bolton 2008,
Shajib 2021, Tan 2024), the difference to their mean in per cent, gamma beside those of Tan and Shajib, chi^2 per pixel
over what it is where the image is empty, flags, seconds. What FOLDER has already is not fitted again.

    --set JSON      settings in place of the preset's, such as '{"fit": {"rounds": 1, "warmup": 100, "draws": 100}}'
    --cores N       processes side by side (1)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "workflow/presets/observed.yaml"
PUBLISHED = {"theta_E": ("thetaE_bolton08_SIE", "thetaE_shajib21", "thetaE_dinos24_EPL")}
PUBLISHED["gamma"] = ("gamma_dinos24", "gamma_shajib21")


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with the changes, key by key; the source, whose keys depend on its kind, as a whole."""
    for key, value in changes.items():
        inside = isinstance(value, dict) and isinstance(settings.get(key), dict) and key != "source"
        settings = settings | {key: merged(settings[key], value) if inside else value}
    return settings


def fitted(folder: Path, changes: dict[str, Any], cores: int) -> pd.DataFrame:
    """The summary of the lenses, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(merged(yaml.safe_load(PRESET.read_text()), changes), sort_keys=False))
    command = ["snakemake", "--cores", str(cores), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    subprocess.run([sys.executable, "-m", *command, "--configfile", str(config)], check=True)
    summary = folder / "results/summary/lenses.csv"
    return pd.read_csv(summary, keep_default_na=False, na_values=[""]).set_index("name")


def compared(found: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One row a lens."""
    print_of = published.reindex(found.index)
    theta_E = print_of[list(PUBLISHED["theta_E"])]
    table = pd.DataFrame(index=found.index)
    table["theta_E"] = found["theta_E_median"]
    table["sd"] = (found["theta_E_p84"] - found["theta_E_p16"]) / 2
    for name, label in zip(PUBLISHED["theta_E"], ("Bolton", "Shajib", "Dinos"), strict=True):
        table[label] = theta_E[name]
    table["off %"] = 100 * (found["theta_E_median"] / theta_E.mean(axis=1) - 1)
    table["gamma"] = found["gamma_median"]
    for name, label in zip(PUBLISHED["gamma"], ("g Dinos", "g Shajib"), strict=True):
        table[label] = print_of[name]
    table["chi2"] = found["chi2_per_pixel"] / found["chi2_expected"]
    return table.assign(seconds=found["seconds"], flags=found["flags"].fillna(found["status"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", type=json.loads, default={})
    parser.add_argument("--cores", type=int, default=1)
    arguments = parser.parse_args()
    lenses = Path(os.environ.get("LENSPIPE_DATA") or "") / "lenses"
    if not (lenses / "lenses.csv").is_file():
        sys.exit(f"{lenses.resolve()}: no lenses here; set LENSPIPE_DATA to the folder that has lenses/lenses.csv")
    os.environ["LENSPIPE_LENSES"] = str((lenses / "lenses.csv").resolve())
    found = fitted(arguments.folder, arguments.set, arguments.cores)
    table = compared(found, pd.read_csv(lenses / "published_values.csv").set_index("name"))
    digits = dict.fromkeys(("gamma", "g Dinos", "g Shajib", "chi2", "off %"), 2) | {"seconds": 0}
    print(table.round({name: digits.get(name, 4) for name in table}).to_string())
    off = table["off %"].abs()
    beyond = table[~(off <= 5)]
    total = {"lenses": len(table), "median_off_percent": round(float(np.nanmedian(off)), 2)}
    total |= {"within_5_percent": int((off <= 5).sum()), "beyond_and_flagged": int((beyond["flags"] != "ok").sum())}
    print(json.dumps(total | {"status": found["status"].value_counts().to_dict()}))


if __name__ == "__main__":
    main()
