"""The command `lenspipe`: one sub-command a stage, of the same name as its rule, its config section and its results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lenspipe import artefact
from lenspipe.config import Config, json_schema, load_config
from lenspipe.errors import ConfigError, InputError, LenspipeError
from lenspipe.results import Results

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False, soft_wrap=True)  # for what is said on the way
output = Console(highlight=False, soft_wrap=True)  # for what was asked for

Settings = Annotated[str, typer.Option("--config", "-c", help="config file, or settings as inline JSON")]
Folder = Annotated[Path, typer.Option("--results", "-r", help="folder of the results")]
WhereItRuns = Annotated[
    str | None,
    typer.Option(
        "--cluster", envvar="LENSPIPE_CLUSTER", help="where they run, as inline JSON in place of the section `cluster`"
    ),
]
SideBySide = Annotated[
    int | None,
    typer.Option(
        min=1, help="processes that fit batches side by side; one for each GPU or, without any, each processor"
    ),
]
SPINS = "3000"  # turns in which a thread waits for the others before it sleeps
DEFAULT_CONFIG = "config.yaml"
DEFAULT_RESULTS = Path("results")


def print_version(asked: bool) -> None:
    """Print the version and stop, where it was asked for."""
    if asked:
        typer.echo(f"lenspipe {artefact.versions()['lenspipe']}")
        raise typer.Exit


@app.callback(help=__doc__)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """What comes before the sub-commands.

    Threads that wait for each other spin for milliseconds before they sleep: where other work wanted the processors
    too, a stage of many small steps took 18 times as long. PyTorch reads the number of turns when it is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error that the user can mend as one message, and exit with status 1."""
    try:
        yield
    except LenspipeError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(1) from None


def with_cluster(settings: Config, cluster: str | None) -> Config:
    """The settings with another section `cluster`, of inline JSON, where one is given."""
    if cluster is None:
        return settings
    try:
        chosen = load_config(f'{{"cluster": {cluster}}}').cluster
    except ConfigError as error:
        raise ConfigError(
            f'--cluster or LENSPIPE_CLUSTER: expected JSON such as {{"kind": "slurm"}}, found {cluster}: {error}'
        ) from None
    return settings.model_copy(update={"cluster": chosen})


@app.command()
def survey(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Write the embedded synthetic galaxy survey, in the RealGalaxyCatalog layout."""
    from lenspipe.survey import write_survey

    with plain_errors():
        settings = load_config(config)
        write_survey(settings.survey, Results(results).survey, settings.seed)


@app.command()
def galaxies(
    config: Settings = DEFAULT_CONFIG,
    results: Folder = DEFAULT_RESULTS,
    workers: Annotated[int, typer.Option(min=1, help="processes that read image files side by side")] = 1,
) -> None:
    """Read the galaxies, apply the cuts, split them."""
    from lenspipe.galaxies.ingest import ingest

    with plain_errors():
        settings = load_config(config)
        paths = Results(results)
        ingest(settings.galaxies, paths.survey, paths.galaxies, settings.seed, workers)


@app.command()
def vae(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Train the autoencoder; a training that was stopped goes on."""
    from lenspipe.source.stage import write_vae

    with plain_errors():
        settings = load_config(config)
        paths = Results(results)
        write_vae(settings.vae, paths.galaxies, paths.vae, settings.seed)


@app.command()
def source(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Write the source prior: decoder, density of its latents and residual field, or an analytic source."""
    from lenspipe.source.stage import write_source

    with plain_errors():
        settings = load_config(config)
        paths = Results(results)
        write_source(settings.source, paths.vae, paths.galaxies, paths.source_prior, settings.seed)


@app.command()
def validation(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Test the source on galaxies that it was not made from."""
    from lenspipe.source.validation import write_validation

    with plain_errors():
        settings = load_config(config)
        paths = Results(results)
        inputs = paths.vae, paths.source_prior, paths.galaxies
        write_validation(settings.validation, *inputs, paths.validation, settings.seed)


@app.command("deflection_table")
def deflection_table(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Compute the table of deflections and measure its error."""
    from lenspipe.deflection_table import write_deflection_table

    with plain_errors():
        settings = load_config(config).deflection_table
        write_deflection_table(settings, Results(results).deflection_table)


@app.command()
def mocks(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Make mock lenses from test galaxies."""
    from lenspipe.mocks import write_mocks

    with plain_errors():
        write_mocks(load_config(config), Results(results))


@app.command()
def catalogue(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Check all lenses, mocks and observed, and bring them into one format."""
    from lenspipe.catalogue.stage import write_catalogue

    with plain_errors():
        settings = load_config(config)
        paths = Results(results)
        mocks = paths.mocks if settings.has_mocks else None
        write_catalogue(settings.catalogue, mocks, paths.catalogue, settings.lens.psf_supersampling)


@app.command()
def fit(
    config: Settings = DEFAULT_CONFIG,
    results: Folder = DEFAULT_RESULTS,
    shard: Annotated[
        int | None, typer.Option(min=0, help="number of the shard; all of them where none is given")
    ] = None,
    workers: SideBySide = None,
    cluster: WhereItRuns = None,
) -> None:
    """Fit every lens of a shard of the catalogue: MAP, then posterior."""
    from lenspipe.catalogue.tables import count_shards
    from lenspipe.fit.stage import fit_shard

    with plain_errors():
        settings = with_cluster(load_config(config), cluster)
        shards = range(count_shards(settings)) if shard is None else [shard]
        for number in shards:
            fit_shard(settings, Results(results), number, workers)


@app.command()
def refit(
    names: Annotated[list[str] | None, typer.Argument(help="lenses by name")] = None,
    where: Annotated[
        str | None, typer.Option(help="or a condition on columns of the summary: 'r_hat_max > 1.05'")
    ] = None,
    draws_factor: Annotated[
        int, typer.Option(min=1, help="how many times the usual number of draws; thinned to that number")
    ] = 4,
    config: Settings = DEFAULT_CONFIG,
    results: Folder = DEFAULT_RESULTS,
    workers: SideBySide = None,
    cluster: WhereItRuns = None,
) -> None:
    """Fit chosen lenses again, failed ones too, with more draws.

    Give the settings and the results of their run, then its snakemake command again for the summary and the report.
    """
    from lenspipe.fit.refit import refit_lenses

    with plain_errors():
        settings = with_cluster(load_config(config), cluster)
        chosen, failures = refit_lenses(settings, Results(results), names or [], where, draws_factor, workers)
    for name, reason in failures.items():
        console.print(f"{escape(name)}: [red]not fitted:[/red] {escape(reason)}")
    if fitted := [name for name in chosen if name not in failures]:
        console.print(f"fitted again: {escape(', '.join(fitted))}")
    if failures:
        raise typer.Exit(1)


@app.command()
def summary(
    config: Settings = DEFAULT_CONFIG,
    results: Folder = DEFAULT_RESULTS,
    workers: Annotated[int, typer.Option(min=1, help="processes that work on lenses side by side")] = 1,
) -> None:
    """Summarise the posteriors: one row a lens, with flags."""
    from lenspipe.summary import write_summary

    with plain_errors():
        write_summary(load_config(config).summary, Results(results), workers)


@app.command()
def report(config: Settings = DEFAULT_CONFIG, results: Folder = DEFAULT_RESULTS) -> None:
    """Draw the report of the run as one HTML page."""
    from lenspipe.report.page import write_report

    with plain_errors():
        paths = Results(results)
        write_report(load_config(config).report, paths)
    console.print(f"report: {paths.report.resolve()}")


@app.command("fetch-galaxies")
def fetch_galaxies(
    to: Annotated[Path, typer.Option(help="folder that gets the sample, in a folder of its own")],
    sample: Annotated[str, typer.Option(help="COSMOS sample by its faintest magnitude, 23.5 or 25.2")] = "23.5",
    record: Annotated[
        str | None,
        typer.Option(help="address of the record in Zenodo's REST API; DOI 10.5281/zenodo.3242143's if none"),
    ] = None,
    keep_archive: Annotated[bool, typer.Option("--keep-archive", help="keep the packed sample too")] = False,
) -> None:
    """Download a COSMOS sample of GREAT3 and GalSim (4 GB); a download that broke goes on."""
    from lenspipe.galaxies.fetch import RECORD, fetch_sample

    with plain_errors():
        catalogue = fetch_sample(sample, to, record or RECORD, keep_archive).resolve()
    console.print(f"galaxies: {escape(str(catalogue.parent))}; an entry of galaxies.inputs:")
    entry = {"layout": "real_galaxy_catalog", "catalogue": str(catalogue), "sample": sample}
    typer.echo(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000), nl=False)


@app.command("export-coolest")
def export_coolest(
    to: Annotated[Path, typer.Option(help="a zip to write, or a folder where it does not end in .zip")],
    lens: Annotated[list[str] | None, typer.Option(help="name of a lens; again for others; all without it")] = None,
    results: Folder = DEFAULT_RESULTS,
) -> None:
    """Write lens models with the statistics of their posteriors in the COOLEST standard."""
    from lenspipe.coolest import export

    with plain_errors():
        count = export(Results(results), to, lens or [])
    console.print(f"{escape(str(to))}: {count} lens{'' if count == 1 else 'es'}")


@app.command("export-table")
def export_the_table(
    to: Annotated[Path, typer.Option(help="file to write: .tex (LaTeX), .vot or .xml (VOTable)")],
    lens: Annotated[list[str] | None, typer.Option(help="name of a lens; again for others; all without it")] = None,
    results: Folder = DEFAULT_RESULTS,
) -> None:
    """Write the table of lenses for a paper or for the virtual observatory."""
    from lenspipe.export_table import export_table

    with plain_errors():
        count = export_table(Results(results), to, lens or [])
    console.print(f"{escape(str(to))}: {count} lens{'' if count == 1 else 'es'}")


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="folders of results of runs with different models")],
    to: Annotated[Path | None, typer.Option(help="write the table here too, as CSV")] = None,
) -> None:
    """Compare runs of the same lenses, such as with other sources, by the evidence of each lens."""
    from lenspipe.compare import compare as compared

    with plain_errors():
        rows = compared({str(path): Results(path) for path in results})
        if to:
            with artefact.written_whole(to) as temporary:
                rows.to_csv(temporary, index=False)
    title = "log evidence, from that of the preferred run [nat]"
    table = Table("lens", *(escape(str(path)) for path in results), "preferred", "by [nat]", box=None, title=title)
    for row in rows.to_dict("records"):
        evidences = (f"{row[f'log_evidence:{path}']:.1f}" for path in results)
        table.add_row(escape(str(row["name"])), *evidences, escape(str(row["preferred"])), f"{row['lead']:.1f}")
    output.print(table)


@app.command("check-lenses")
def check_lenses(
    table: Annotated[Path, typer.Argument(help="CSV, ECSV or FITS table of lenses, or a folder with one for each")],
    prepare: Annotated[
        bool, typer.Option(help="look for deflector and arcs too, as with catalogue.preparation")
    ] = True,
    config: Annotated[
        Path | None, typer.Option(help="settings: catalogue.preparation and lens.psf_supersampling are taken")
    ] = None,
) -> None:
    """Check every lens of a table or folder before a run: usable, or why not."""
    from lenspipe.catalogue.observed import read_entry
    from lenspipe.catalogue.tables import read_table, unused
    from lenspipe.config import Config, Preparation

    unusable = 0
    with plain_errors():
        entries, left = read_table(table), unused(table)
        own = load_config(config) if config else Config()
        preparation = (own.catalogue.preparation or Preparation()) if prepare else None
    for entry in entries:
        try:
            lens = read_entry(entry, preparation, own.lens.psf_supersampling)
        except InputError as error:
            unusable += 1
            output.print(f"{entry.name}: [red]unusable:[/red] {escape(str(error))}")
        else:
            output.print(f"{entry.name}: [green]usable:[/green] {escape(lens.in_words())}")
    if left:
        output.print(escape(f"not used: {', '.join(left)}"))
    output.print(f"{len(entries) - unusable} of {len(entries)} lenses can be used")
    if unusable:
        raise typer.Exit(1)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="file or folder that a stage has written")]) -> None:
    """Say what a file of the results is: its stage, settings, versions and inputs."""
    with plain_errors():
        record = artefact.read_record(path)
        if "stage" not in record:
            raise InputError(f"{path}: a checkpoint, which is of no stage; what a stage has written says more")
    table = Table(show_header=False, box=None, title=escape(str(path)), title_justify="left")
    for key in ("stage", "seed", "commit"):
        table.add_row(key, escape(str(record[key])))
    for key in ("facts", "settings", "inputs", "versions"):
        table.add_row(key, escape(json.dumps(record[key], indent=1)))
    output.print(table)


@app.command("check-config")
def check_config(
    config: Annotated[str, typer.Argument(help="config file, or settings as inline JSON")] = DEFAULT_CONFIG,
    write_schema: Annotated[Path | None, typer.Option(help="write the JSON schema of config files here")] = None,
) -> None:
    """Check a config file, and that the files it names are there, before any job; say how many lenses it would fit."""
    from lenspipe.catalogue.tables import count_lenses, outside_files

    with plain_errors():
        if write_schema:
            write_schema.write_text(json_schema())
        settings = load_config(config)
        lenses = count_lenses(settings)
        if absent := [path for path in outside_files(settings) if not path.exists()]:
            raise InputError("\n".join(f"{path}: no such file" for path in absent))
    console.print(f"{escape(config) if os.path.exists(config) else 'config'}: good; {lenses} lenses to fit")
