"""The lenses that config names: rows of tables, and lenses written in config."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from astropy.table import Table

from lenspipe.catalogue.observed import LensFiles
from lenspipe.catalogue.preparation import Wishes
from lenspipe.config import NAME, Catalogue, Config, ObservedLens, expand_path
from lenspipe.errors import ConfigError, InputError

REQUIRED = ("name", "image", "psf")
WISHES = ("center_column", "center_row", "fit_radius")
POSITIVE = ("pixel_scale", "flux_unit", "background_rms", "exposure_time", "gain", "fit_radius")
NUMBERS = (*POSITIVE, "mask_bad", "center_column", "center_row", "zero_point", "z_lens", "z_source")
FITS_TABLES = (".fits", ".fit", ".fits.gz")
NOISE_NAMES = ("noise.fits", "noise_map.fits")  # of a lens in a folder of its own


@dataclass(frozen=True)
class Entry:
    """A lens before its files are opened.

    facts: what else the table says of it that goes into the summary: zero_point [AB magnitude of one image unit],
    z_lens, z_source.
    """

    name: str
    files: LensFiles
    origin: str
    truth: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


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
    base = path if path.is_dir() else path.parent
    for row in _read_table(path).to_dict("records"):
        filled = {str(key): str(value) for key, value in row.items() if str(value) != ""}
        paths = {kind: expand_path(filled[kind], base) for kind in ("noise", "mask") if kind in filled}
        image, psf = (expand_path(filled.get(kind, ""), base) for kind in ("image", "psf"))
        numbers = {key: float(filled[key]) for key in NUMBERS if key in filled}
        wishes = Wishes(*(numbers.get(name) for name in WISHES))
        given = {key: value for key, value in numbers.items() if key in POSITIVE and key not in WISHES}
        mask_bad = int(numbers.get("mask_bad", 1))
        yield Entry(
            filled["name"],
            LensFiles(image, psf, **paths, **given, mask_bad=mask_bad, wishes=wishes),  # type: ignore[arg-type]
            origin,
            {key.removeprefix("true_"): float(value) for key, value in filled.items() if key.startswith("true_")},
            {key: numbers[key] for key in ("zero_point", "z_lens", "z_source") if key in numbers},
        )


def _config_entry(lens: ObservedLens) -> Entry:
    image, psf = expand_path(lens.image), expand_path(lens.psf)
    noise, mask = (expand_path(text) if text else None for text in (lens.noise, lens.mask))
    numbers = {key: getattr(lens, key) for key in (*POSITIVE, "mask_bad") if key not in WISHES}
    files = LensFiles(image, psf, noise, mask, **numbers, wishes=Wishes(*(getattr(lens, key) for key in WISHES)))
    facts = {} if lens.zero_point is None else {"zero_point": lens.zero_point}
    return Entry(lens.name, files, "config", lens.truth, facts)


def _folder_table(folder: Path) -> pd.DataFrame:
    """A lens for every folder within that has image.fits and psf.fits, with the noise map and mask that are there."""
    rows = []
    for image in sorted(folder.glob("*/image.fits")):
        lens = image.parent
        noise = next((name for name in NOISE_NAMES if (lens / name).is_file()), "")
        row = {kind: f"{lens.name}/{kind}.fits" for kind in ("image", "psf", "mask")}
        row = {kind: text for kind, text in row.items() if kind != "mask" or (folder / text).is_file()}
        rows.append({"name": lens.name, **row, "noise": noise and f"{lens.name}/{noise}"})
    if not rows:
        raise InputError(f"{folder}: no lenses in this folder; each has a folder of its own with image.fits")
    return pd.DataFrame(rows).fillna("")


def _cells(path: Path) -> pd.DataFrame:
    """A table as text, whatever its format."""
    if path.name.endswith(FITS_TABLES):
        columns = Table.read(path)
        text = {str(name): [_text(cell) for cell in columns[name]] for name in columns.colnames}
        return pd.DataFrame(text, dtype=str)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    stream = io.StringIO("\n".join(lines))
    return pd.read_csv(stream, dtype=str, keep_default_na=False, sep=None, engine="python", skipinitialspace=True)


def _text(cell: object) -> str:
    text = cell.decode() if isinstance(cell, bytes) else str(cell)
    return "" if text in ("--", "nan", "masked") else text.strip()


def read_table(path: Path) -> list[Entry]:
    """The lenses of a table, CSV, ECSV or FITS, or of a folder of lenses.

    Raises InputError where it is none, and for a name that occurs twice.
    """
    entries = list(_table_entries(path, str(path)))
    _refuse_duplicates(entries)
    return entries


def _read_table(path: Path) -> pd.DataFrame:
    """A table of lenses or a folder of them, all cells as text, empty ones as "".

    Raises InputError for a missing file or column, a bad name and a cell that should be a number and is none.
    """
    if path.is_dir():
        return _checked(path, _folder_table(path))
    if not path.is_file():
        raise InputError(f"{path}: no such table of lenses")
    try:
        return _checked(path, _cells(path))
    except (UnicodeDecodeError, csv.Error, pd.errors.ParserError, pd.errors.EmptyDataError, OSError) as error:
        raise InputError(f"{path}: not a table of lenses in UTF-8 text with a line of column names ({error})") from None


def _checked(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    missing = [column for column in REQUIRED if column not in table.columns]
    if missing:
        raise InputError(f"{path}: missing column(s) {', '.join(missing)}; found {', '.join(table.columns)}")
    for line, name in enumerate(table["name"], 1):
        if not re.fullmatch(NAME, name):
            raise InputError(f"{path}: lens {line} has the name {name!r}; use letters, digits and _ . + - alone")
    for column in table.columns:
        if column in NUMBERS or column.startswith("true_"):
            number = pd.to_numeric(table[column], errors="coerce")
            bad = number.isna() & (table[column] != "")
            if column in POSITIVE:
                bad |= number <= 0
            if column == "mask_bad":
                bad |= (table[column] != "") & ~number.isin([0, 1])
            if bad.any():
                name, found = table.loc[bad.idxmax(), ["name", column]]
                kind = {"mask_bad": "0 or 1"}.get(column, "a number" + (" above zero" if column in POSITIVE else ""))
                raise InputError(f"{path}: lens {name}: {column} must be {kind}, found {found!r}")
    return table


def _refuse_duplicates(entries: list[Entry]) -> None:
    if not entries:
        raise ConfigError("catalogue: no lenses; take in the mocks, or give tables or lenses")
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise InputError(f"lens {entry.name} occurs twice, in {seen[entry.name]} and in {entry.origin}; rename one")
        seen[entry.name] = entry.origin
