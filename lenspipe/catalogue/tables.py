"""The lenses that config names: rows of tables, and lenses written in config."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd

from lenspipe.catalogue.entry import Entry, LensFiles, Wishes
from lenspipe.catalogue.fits_images import file_of
from lenspipe.config import NAME, Catalogue, Config, ObservedLens, Priors, expand_path
from lenspipe.errors import ConfigError, InputError, in_one_line

REQUIRED = ("name", "image", "psf")
WISHES = ("center_column", "center_row", "fit_radius")
POSITIVE = ("pixel_scale", "flux_unit", "background_rms", "exposure_time", "gain", "fit_radius", "z_lens", "z_source")
NUMBERS = (*POSITIVE, "mask_bad", "center_column", "center_row", "zero_point")
LENS_NUMBERS = ("pixel_scale", "flux_unit", "background_rms", "exposure_time", "gain")  # of `LensFiles`
COLUMNS = (*REQUIRED, "noise", "mask", *NUMBERS)
TRUE = "true_"  # begins the name of a column with true values of a parameter
TRUTHS = tuple(Priors.model_fields)  # those of every lens
ALIKE = 0.75  # how much the name of a column that is not known may be like one that is, of 1
UNITS = {"pixel_scale": "arcsec", "fit_radius": "arcsec", "exposure_time": "s"}  # of columns that may say another
UNITS |= {"center_column": "pix", "center_row": "pix"}
FITS_TABLES = (".fits", ".fit", ".fits.gz")
SEPARATORS = (",", ";", "\t", "|")  # of the cells of text; blanks where the line of names has none of them
STAMPED = 2000  # lenses of tables, at most, whose files are looked at before every run
IMAGES = (".fits", ".fits.gz", ".fits.fz", ".fit")  # how the files of a lens in a folder of its own end
KINDS = {"image": ("image",), "psf": ("psf",), "noise": ("noise", "noise_map"), "mask": ("mask",)}  # their names


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
    return [file_of(expand_path(path)) for path in (*named, *config.catalogue.tables)]


def stamp(config: Config) -> str:
    """A hash of names, sizes and times of the files that tables name, to notice changes; empty for many lenses."""
    entries = [entry for table in config.catalogue.tables for entry in _table_entries(expand_path(table), table)]
    if not 0 < len(entries) <= STAMPED:
        return ""
    digest = hashlib.sha256()
    for entry in entries:
        for path in (entry.files.image, entry.files.psf, entry.files.noise, entry.files.mask):
            try:
                found = file_of(path).stat() if path else None
            except OSError:  # it is not there, or no path
                found = None
            digest.update(f"{entry.name} {path} {found and (found.st_size, found.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


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
        problem = _problem(filled)
        numbers = {} if problem else {key: float(filled[key]) for key in filled if _is_number(key)}
        paths = {kind: expand_path(filled[kind], base) for kind in ("noise", "mask") if kind in filled}
        image, psf = (expand_path(filled.get(kind, ""), base) for kind in ("image", "psf"))
        wishes = Wishes(*(numbers.get(name) for name in WISHES))
        given = {key: numbers[key] for key in LENS_NUMBERS if key in numbers}
        mask_bad = int(numbers.get("mask_bad", 1))
        yield Entry(
            filled["name"],
            LensFiles(image, psf, **paths, **given, mask_bad=mask_bad, wishes=wishes),  # type: ignore[arg-type]
            origin,
            {key.removeprefix(TRUE): value for key, value in numbers.items() if key.startswith(TRUE)},
            {key: numbers[key] for key in ("zero_point", "z_lens", "z_source") if key in numbers},
            f"{path}: {problem}" if problem else "",
        )


def _problem(row: dict[str, str]) -> str:
    """What is wrong with the cells of a lens; nothing where they can be used."""
    for column in REQUIRED:
        if column not in row:
            return f"the column {column} is empty"
    for column in filter(_is_number, row):
        try:
            number = float(row[column])
        except ValueError:
            number = math.nan
        good = math.isfinite(number) and (number > 0 or column not in POSITIVE)
        if column == "mask_bad" and number not in (0, 1):
            return f"mask_bad must be 0 or 1, found {row[column]!r}"
        if not good:
            return f"{column} must be a number{' above zero' * (column in POSITIVE)}, found {row[column]!r}"
    if {"z_lens", "z_source"} <= row.keys() and not float(row["z_lens"]) < float(row["z_source"]):
        return f"z_source must be beyond z_lens = {row['z_lens']}, found {row['z_source']!r}"
    return ""


def _is_number(column: str) -> bool:
    return column in NUMBERS or column.startswith(TRUE)


def _config_entry(lens: ObservedLens) -> Entry:
    image, psf = expand_path(lens.image), expand_path(lens.psf)
    noise, mask = (expand_path(text) if text else None for text in (lens.noise, lens.mask))
    numbers = {key: getattr(lens, key) for key in (*LENS_NUMBERS, "mask_bad")}
    files = LensFiles(image, psf, noise, mask, **numbers, wishes=Wishes(*(getattr(lens, key) for key in WISHES)))
    facts = {} if lens.zero_point is None else {"zero_point": lens.zero_point}
    return Entry(lens.name, files, "config", lens.truth, facts)


def _folder_table(folder: Path) -> pd.DataFrame:
    """A lens for every folder within that has FITS files, with those that have the names of `KINDS`."""
    rows = []
    for lens, files in _fits_files(folder).items():
        named = {kind: [file for file in files if _is_called(file, names)] for kind, names in KINDS.items()}
        for kind, found in named.items():
            if len(found) > 1:
                raise InputError(f"{lens}: {' and '.join(found)} may both be the {kind} of this lens; keep one")
        needed = {kind: f"{lens.name}/{kind}.fits" for kind in ("image", "psf")}
        rows.append({"name": lens.name} | needed | {k: f"{lens.name}/{f[0]}" for k, f in named.items() if f})
    if not rows:
        raise InputError(f"{folder}: no lenses in this folder; each has a folder of its own with image.fits")
    return pd.DataFrame(rows).fillna("")


def _fits_files(folder: Path) -> dict[Path, list[str]]:
    """The names of the FITS files in each folder within that has any; hidden ones are passed over."""
    within = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {lens: sorted(f.name for f in lens.iterdir() if f.name.casefold().endswith(IMAGES)) for lens in within}
    return {lens: names for lens, names in files.items() if names}


def _is_called(file: str, names: Iterable[str]) -> bool:
    return file.casefold() in {name + ending for name in names for ending in IMAGES}


def unused(path: Path) -> list[str]:
    """What a table or a folder of lenses has that nothing reads: names of columns, or paths of FITS files."""
    if not path.is_dir():
        return [c for c in _read_table(path).columns if c not in COLUMNS and not c.startswith(TRUE)]
    known = [name for names in KINDS.values() for name in names]
    found = ((lens.name, file) for lens, files in _fits_files(path).items() for file in files)
    return [f"{lens}/{file}" for lens, file in found if not _is_called(file, known)]


def _cells(path: Path) -> pd.DataFrame:
    """A table as text, whatever its format."""
    if path.name.endswith((*FITS_TABLES, ".ecsv")):
        from astropy.table import Table  # takes its time, and every run of Snakemake would wait for it

        try:
            columns = Table.read(path)
        except Exception as error:  # astropy's readers raise what they like
            raise InputError(f"{path}: not a readable table of lenses ({in_one_line(error)})") from None
        found = {str(name): columns[name] for name in columns.colnames}
        cells = {name: [_text(cell) for cell in _in_our_unit(path, name, column)] for name, column in found.items()}
        return pd.DataFrame(cells, dtype=str)
    text = path.read_text(encoding="utf-8-sig").splitlines()
    lines = [line for line in text if line.strip() and not line.lstrip().startswith("#")]
    separator = next((mark for mark in SEPARATORS if lines and mark in lines[0]), " ")
    header, *rows = [_stripped(row) for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)] or [[]]
    if not header:
        raise csv.Error("it is empty")
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise InputError(f"{path}: lens {number} has {len(row)} cells for {len(header)} columns: {row}")
    return pd.DataFrame([row + [""] * (len(header) - len(row)) for row in rows], columns=header, dtype=str)


def _stripped(row: list[str]) -> list[str]:
    """Cells without blanks about them, and without empty ones at the end."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _in_our_unit(path: Path, name: str, column: Any) -> Any:
    """A column in the unit that it has here; as it is where it has none."""
    if name not in UNITS or getattr(column, "unit", None) is None:
        return column
    try:
        return column * column.unit.to(UNITS[name])  # masked where it was: a Quantity would not be
    except ValueError:  # another kind of unit, or one that astropy does not know
        raise InputError(f"{path}: the column {name} is in {column.unit}; give it in {UNITS[name]}") from None


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

    Raises InputError for a missing file, a missing column or one with a name that is nearly right, and bad names.
    """
    if not path.exists():
        raise InputError(f"{path}: no such table of lenses")
    try:
        return _checked(path, _folder_table(path) if path.is_dir() else _cells(path))
    except PermissionError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{path}: not a table of lenses in UTF-8 text with a line of column names ({error})") from None


def _checked(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    columns = list(table.columns)
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise InputError(f"{path}: column(s) {', '.join(twice)} occur twice; keep one of each")
    if missing := [column for column in REQUIRED if column not in columns]:
        raise InputError(f"{path}: missing column(s) {', '.join(missing)}; found {', '.join(columns)}")
    for column in columns:
        prefix, known = (TRUE, TRUTHS) if column.startswith(TRUE) else ("", COLUMNS)
        own = column.removeprefix(prefix)
        left = {name.casefold(): name for name in known if prefix + name not in columns}
        if own not in known and (like := get_close_matches(own.casefold(), left, 1, ALIKE)):
            meant = prefix + left[like[0]]
            raise InputError(f"{path}: no column is called {column}; give it the name {meant} if it is that")
    if table.empty:
        raise InputError(f"{path}: no lenses below the line of column names")
    names = enumerate(table["name"], 1)
    if bad := [f"lens {line} has the name {name!r}" for line, name in names if not re.fullmatch(NAME, name)]:
        raise InputError(f"{path}: {'; '.join(bad[:10])}; use letters, digits and _ . + - alone")
    return table


def _refuse_duplicates(entries: list[Entry]) -> None:
    if not entries:
        raise ConfigError("catalogue: no lenses; take in the mocks, or give tables or lenses")
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise InputError(f"lens {entry.name} occurs twice, in {seen[entry.name]} and in {entry.origin}; rename one")
        seen[entry.name] = entry.origin
