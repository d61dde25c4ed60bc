"""Fits made again for chosen lenses, with more draws."""

from __future__ import annotations

from collections.abc import Sequence

from lenspipe.catalogue.reading import read_catalogue
from lenspipe.config import Config
from lenspipe.errors import InputError
from lenspipe.fit import resume
from lenspipe.fit.stage import fit_shard
from lenspipe.results import Results, read_summary


def refit_lenses(
    config: Config, paths: Results, names: Sequence[str], where: str | None, draws_factor: int, workers: int | None = 1
) -> tuple[list[str], dict[str, str]]:
    """Fit the lenses named, and those whose row of the summary meets a condition, again.

    Returns their names, and why some of them were not fitted. New results take the place of the old ones, also in later
    runs of the same settings. Raises InputError for unknown names, a condition that cannot be read, where no lens is
    chosen, and where all that is there was fitted with other settings: it would all be fitted again.
    """
    chosen = [*names, *(chosen_where(paths, where) if where else [])]
    if not chosen:
        raise InputError(f"no lens to fit again; name some, or give a condition that some meet (found: {where})")
    catalogue = read_catalogue(paths.catalogue)
    places = {name: row for row, name in enumerate(catalogue["name"])}
    if unknown := [name for name in chosen if name not in places]:
        raise InputError(f"{', '.join(unknown)}: no such lens in the catalogue {paths.catalogue}")
    failures: dict[str, str] = {}
    shards = sorted({places[name] // config.fit.shard_size for name in chosen})
    hashes = set(resume.lens_hashes(config, paths, catalogue).values())
    for store in map(paths.store, shards):
        if (there := resume.index_of_store(store)) and not there.keys() & hashes:
            raise InputError(
                f"{store}: none of its {len(there)} results is of these settings, this source prior, this catalogue "
                "and this version; give --config the settings of that run, or run the stage fit, which fits all again"
            )
    for shard in shards:
        failures |= fit_shard(config, paths, shard, workers, again=chosen, draws_factor=draws_factor)
    return sorted(set(chosen), key=places.__getitem__), {n: why for n, why in failures.items() if n in chosen}


def chosen_where(paths: Results, where: str) -> list[str]:
    """Names of the lenses whose row of the summary meets a condition in pandas' language."""
    table = read_summary(paths.summary)
    try:
        return table.query(where)["name"].tolist()
    except Exception as error:  # whatever pandas raises for what it cannot read
        raise InputError(
            f"--where {where!r}: {error}; a condition is like \"r_hat_max > 1.05 and status == 'flagged'\", its "
            f"columns are those of {paths.summary}"
        ) from None
