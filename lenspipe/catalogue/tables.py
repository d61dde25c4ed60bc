"""The lenses that config names: rows of tables, and lenses written in config."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lenspipe.config import NAME, Catalogue, Config, ObservedLens, expand_path
from lenspipe.errors import ConfigError, InputError

REQUIRED = ("name", "pixel_scale", "image", "noise", "psf")


@dataclass(frozen=True)
class Entry:
    """A lens before its files are opened."""

    name: str
    pixel_scale: float
    image: Path
    noise: Path
    psf: Path
    mask: Path | None
    flux_unit: float | None
    origin: str
    truth: dict[str, float] = field(default_factory=dict)


def count_lenses(config: Config) -> int:
    """Number of lenses the catalogue will have, known before any stage has run."""
    mocks = config.mocks.systems * len(config.mocks.noise_levels) if config.catalogue.mocks else 0
    tables = sum(len(_read_table(expand_path(table))) for table in config.catalogue.tables)
    return mocks + tables + len(config.catalogue.lenses)


def count_shards(config: Config) -> int:
    """Number of shards the catalogue is cut into."""
    return -(-count_lenses(config) // config.fit.shard_size)


def outside_files(config: Config) -> list[Path]:
    """Files that the settings name: galaxies, tables of lenses, lenses written in config; not those that tables name.

    Raises ConfigError where a path has a variable of the environment that is not set.
    """
    named = (path for entry in (*config.galaxies.inputs, *config.catalogue.lenses) for path in entry.files)
    return [expand_path(path) for path in (*named, *config.catalogue.tables)]


def read_entries(settings: Catalogue, mocks: Path | None) -> list[Entry]:
    """All lenses of the catalogue; `mocks` is the folder of the stage `mocks`, where they are taken in.

    Raises InputError for a missing table or column and for a name that occurs twice.
    """
    entries = list(_entries(settings, mocks))
    _refuse_duplicates(entries)
    return entries


def _entries(settings: Catalogue, mocks: Path | None) -> Iterator[Entry]:
    if mocks is not None:
        yield from _table_entries(mocks / "lenses.csv", "mock")
    for table in settings.tables:
        yield from _table_entries(expand_path(table), table)
    for lens in settings.lenses:
        yield _config_entry(lens)


def _table_entries(path: Path, origin: str) -> Iterator[Entry]:
    for row in _read_table(path).to_dict("records"):
        filled = {str(key): str(value) for key, value in row.items() if str(value) != ""}
        image, noise, psf = (expand_path(filled.get(kind, ""), path.parent) for kind in ("image", "noise", "psf"))
        mask = filled.get("mask")
        truths = {key: value for key, value in filled.items() if key.startswith("true_")}
        yield Entry(
            filled["name"],
            float(filled["pixel_scale"]),
            image,
            noise,
            psf,
            mask=expand_path(mask, path.parent) if mask else None,
            flux_unit=float(filled["flux_unit"]) if "flux_unit" in filled else None,
            origin=origin,
            truth={key.removeprefix("true_"): float(value) for key, value in truths.items()},
        )


def _config_entry(lens: ObservedLens) -> Entry:
    image, noise, psf = (expand_path(text) for text in (lens.image, lens.noise, lens.psf))
    mask = expand_path(lens.mask) if lens.mask else None
    return Entry(lens.name, lens.pixel_scale, image, noise, psf, mask, lens.flux_unit, "config", lens.truth)


def _read_table(path: Path) -> pd.DataFrame:
    """A CSV or ECSV table of lenses, all cells as text, empty ones as "".

    Raises InputError for a missing file or column, a bad name and a cell that should be a number and is none.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such table of lenses")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
        text = io.StringIO("\n".join(lines))
        table = pd.read_csv(text, dtype=str, keep_default_na=False, sep=None, engine="python", skipinitialspace=True)
    except (UnicodeDecodeError, csv.Error, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path}: not a table of lenses in UTF-8 text with a line of column names ({error})") from None
    missing = [column for column in REQUIRED if column not in table.columns]
    if missing:
        raise InputError(f"{path}: missing column(s) {', '.join(missing)}; found {', '.join(table.columns)}")
    for line, name in enumerate(table["name"], 1):
        if not re.fullmatch(NAME, name):
            raise InputError(f"{path}: lens {line} has the name {name!r}; use letters, digits and _ . + - alone")
    for column in table.columns:
        if column in ("pixel_scale", "flux_unit") or column.startswith("true_"):
            number = pd.to_numeric(table[column], errors="coerce")
            bad = number.isna() & (table[column] != "")
            if column == "pixel_scale":
                bad |= ~(number > 0)
            if column == "flux_unit":
                bad |= number <= 0
            if bad.any():
                name, found = table.loc[bad.idxmax(), ["name", column]]
                above = "" if column.startswith("true_") else " above zero"
                raise InputError(f"{path}: lens {name}: {column} must be a number{above}, found {found!r}")
    return table


def _refuse_duplicates(entries: list[Entry]) -> None:
    if not entries:
        raise ConfigError("catalogue: no lenses; take in the mocks, or give tables or lenses")
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise InputError(f"lens {entry.name} occurs twice, in {seen[entry.name]} and in {entry.origin}; rename one")
        seen[entry.name] = entry.origin
