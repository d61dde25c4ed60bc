"""Lenses whose sources are galaxies that the prior has not seen, with and without the residual field.

`LENSPIPE_DATA=... python tests/benchmarks/unseen.py FOLDER` takes the preset `real.yaml`: the autoencoder is trained on
UDF and CANDELS stamps, the sources are COSMOS and CANDELS galaxies of the test split, denoised. Twenty systems at two
noise levels are fitted by the same decoder without residual field, with the default one and with as many components as
explain 99 % of the variance. One JSON line for each of them and each noise level: S/N of images (paper, eqs. 24-25),
share in the right basin (theta_E within 5 %, q within 0.15), and for theta_E, gamma and q the mean and the standard
deviation of the pulls and the mean error; how many lenses beyond three sigma in one of the three are flagged. What
FOLDER has already is not made again.

    --systems N     how many (20)
    --fit JSON      settings of the section `fit`, such as '{"rounds": 1, "warmup": 100, "draws": 100}'
    --workers N     processes side by side (1)
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lenspipe import cli
from lenspipe.results import Results

PRESET = Path(__file__).parents[2] / "workflow/presets/real.yaml"
NOISE = [{"name": "snr100", "sd": 0.036}, {"name": "snr400", "sd": 0.0075}]
RESIDUALS: dict[str, dict[str, Any]] = {
    "none": {"components": 0},
    "default": {},
    "99 %": {"components": None, "explained_variance": 0.99},
}
MADE_ONCE = ("galaxies", "vae", "deflection_table", "mocks")
JUDGED = ("theta_E", "gamma", "q")


def fitted(name: str, options: argparse.Namespace) -> pd.DataFrame:
    """The summary of the mocks' fits with one residual field; what does not depend on it is taken from the first."""
    folder = options.folder / name.replace(" %", "")
    config, results = folder / "config.yaml", folder / "results"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in yaml.safe_load(PRESET.read_text()).items() if key != "catalogue"}
    settings |= {"mocks": {"systems": options.systems, "noise_levels": NOISE}, "fit": options.fit}
    settings |= {"source": {"residual": RESIDUALS[name]}}
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    first = options.folder / next(iter(RESIDUALS)).replace(" %", "") / "results"
    where = {"config": str(config), "results": results}
    for stage in ("galaxies", "vae", "deflection_table", "source", "mocks", "catalogue"):
        if getattr(Results(results), "source_prior" if stage == "source" else stage).exists():
            continue
        if stage in MADE_ONCE and results != first:
            shutil.copytree(first / stage, results / stage)
        else:
            getattr(cli, stage)(**where)
    cli.fit(**where, workers=options.workers)
    cli.summary(**where)
    return pd.read_csv(results / "summary/lenses.csv", keep_default_na=False)


def judged(rows: pd.DataFrame) -> dict[str, Any]:
    """What is said of the fits of one noise level; failed ones count as in a wrong basin."""
    done = rows[rows["status"] != "failed"].astype(
        {f"{name}_{kind}": float for name in JUDGED for kind in ("median", "sd")}
    )
    error = {name: done[f"{name}_median"] - done[f"true_{name}"].astype(float) for name in JUDGED}
    relative = error["theta_E"] / done["true_theta_E"].astype(float)
    right = (relative.abs() < 0.05) & (error["q"].abs() < 0.15)
    pulls = {name: error[name] / done[f"{name}_sd"] for name in JUDGED}
    far = np.any([pull.abs() > 3 for pull in pulls.values()], axis=0)
    flagged = done["status"] == "flagged"
    line = {
        "lenses": len(rows),
        "snr_median": float(done["snr"].astype(float).median()),
        "right_basin": int(right.sum()),
    }
    line |= {"theta_E_bias_percent": 100 * float(relative[right].mean()), "flagged": int(flagged.sum())}
    line |= {"beyond_3_sigma": int(far.sum()), "of_these_flagged": int((far & flagged).sum())}
    line |= {"wrong_basin_flagged": int((~right & flagged).sum())}
    for name, pull in pulls.items():
        line[f"{name}_pulls"] = [round(float(value), 2) for value in (pull[right].mean(), pull[right].std())]
    line["gamma_error"] = [round(float(v), 4) for v in (error["gamma"][right].mean(), error["gamma"][right].std())]
    return line | {"seconds": float(done["seconds"].astype(float).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--systems", type=int, default=20)
    parser.add_argument("--fit", type=json.loads, default={})
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    for name in RESIDUALS:
        rows = fitted(name, options)
        for level in NOISE:
            chosen = rows[rows["name"].str.endswith(f"-{level['name']}")]
            print(json.dumps({"residual": name, "noise": level["name"], **judged(chosen)}), flush=True)


if __name__ == "__main__":
    main()
