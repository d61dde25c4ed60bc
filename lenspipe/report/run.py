"""What a run took, and the record of each of its stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lenspipe import artefact
from lenspipe.errors import InputError
from lenspipe.report.table import Table
from lenspipe.results import Results


def run_section(paths: Results) -> dict[str, Any]:
    """Time and memory of the stages, and the record of each."""
    shards = sorted(paths.fit.glob("shard-*.zarr"))
    places = {
        "survey": paths.survey,
        "galaxies": paths.galaxies,
        "vae": paths.vae,
        "source": paths.source_prior,
        "validation": paths.validation,
        "deflection_table": paths.deflection_table,
        "mocks": paths.mocks,
        "catalogue": paths.catalogue,
        **({"fit": shards[0]} if shards else {}),
        "summary": paths.summary,
    }
    records = {stage: record for stage, place in places.items() if (record := record_of(place)) is not None}
    stages = [
        [s, str(r["commit"] or "–")[:19], "–" if r["seed"] is None else str(r["seed"])] for s, r in records.items()
    ]
    dumped = {
        stage: yaml.safe_dump(record["settings"], sort_keys=False, allow_unicode=True)
        for stage, record in records.items()
    }
    return {
        "benchmarks": benchmark_table(paths.root / "benchmarks", list(places)),
        "records": Table(["stage", "commit", "seed"], stages),
        "settings": dumped,
    }


def record_of(place: Path) -> dict[str, Any] | None:
    """The record of an artefact, None where there is none."""
    try:
        return artefact.read_record(place)
    except InputError:
        return None


def benchmark_table(folder: Path, stages: Sequence[str]) -> Table | None:
    """Wall time and peak memory of every stage from Snakemake's benchmark files; None where there are none."""
    files: dict[str, list[pd.Series]] = {}
    for path in sorted(folder.glob("*.tsv")):
        table = pd.read_csv(path, sep="\t", na_values=["-", "NA"])
        if len(table):
            files.setdefault(path.stem.split("-")[0], []).append(table.iloc[-1])
    rows = [benchmark_row(stage, files[stage]) for stage in stages if stage in files]
    heads = ["stage", "jobs", "wall time, all jobs [s]", "longest job [s]", "peak memory [MB]", "processor time [s]"]
    return Table(heads, rows) if rows else None


def benchmark_row(stage: str, jobs: list[pd.Series]) -> list[str]:
    """Time and memory over the jobs of one stage."""
    measured = {
        key: pd.to_numeric(pd.Series([job.get(key) for job in jobs]), errors="coerce").dropna()
        for key in ("s", "max_rss", "cpu_time")
    }
    values = (measured["s"].sum(), measured["s"].max(), measured["max_rss"].max(), measured["cpu_time"].sum())
    return [stage, str(len(jobs)), *(f"{value:.1f}" if math.isfinite(value) else "–" for value in values)]
