"""The lenses that config names: rows of tables, and lenses written in config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lenspipe.config import Catalogue, Config, ObservedLens, expand_path
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
        filled = {key: value for key, value in row.items() if value == value and value != ""}
        image, noise, psf = (expand_path(str(filled.get(kind, "")), path.parent) for kind in ("image", "noise", "psf"))
        mask = filled.get("mask")
        yield Entry(
            str(filled["name"]),
            float(filled["pixel_scale"]),
            image,
            noise,
            psf,
            mask=expand_path(str(mask), path.parent) if mask else None,
            flux_unit=float(filled["flux_unit"]) if "flux_unit" in filled else None,
            origin=origin,
            truth={k.removeprefix("true_"): float(v) for k, v in filled.items() if k.startswith("true_")},
        )


def _config_entry(lens: ObservedLens) -> Entry:
    image, noise, psf = (expand_path(text) for text in (lens.image, lens.noise, lens.psf))
    mask = expand_path(lens.mask) if lens.mask else None
    return Entry(lens.name, lens.pixel_scale, image, noise, psf, mask, lens.flux_unit, "config", lens.truth)


def _read_table(path: Path) -> pd.DataFrame:
    """A CSV or ECSV table of lenses. Raises InputError for a missing file or column, or a bad pixel scale."""
    if not path.is_file():
        raise InputError(f"{path}: no such table of lenses")
    table = pd.read_csv(path, comment="#", dtype={"name": str}, sep=None, engine="python")
    missing = [column for column in REQUIRED if column not in table.columns]
    if missing:
        raise InputError(f"{path}: missing column(s) {', '.join(missing)}; found {', '.join(table.columns)}")
    scale = pd.to_numeric(table["pixel_scale"], errors="coerce")
    if not (scale > 0).all():
        bad = table["name"][~(scale > 0)].iloc[0]
        raise InputError(f"{path}: lens {bad}: pixel_scale must be a number of arcsec above zero")
    return table


def _refuse_duplicates(entries: list[Entry]) -> None:
    if not entries:
        raise ConfigError("catalogue: no lenses; take in the mocks, or give tables or lenses")
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise InputError(f"lens {entry.name} occurs twice, in {seen[entry.name]} and in {entry.origin}; rename one")
        seen[entry.name] = entry.origin
