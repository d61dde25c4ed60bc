"""Settings, checked before any job, and what the rules need to know of them."""

import json
import sys
from pathlib import Path
from shlex import quote

sys.path.insert(0, workflow.basedir)

from lenspipe.catalogue.fits_images import file_of
from lenspipe.catalogue.tables import count_shards, stamp
from lenspipe.config import expand_path, load_config, read_settings
from lenspipe.errors import LenspipeError
from lenspipe.running import note_run, refuse_second_run
from snakemake.exceptions import WorkflowError

try:
    for path in map(Path, workflow.configfiles):
        read_settings(path)  # Snakemake drops the first of two sections of one name
    settings = load_config(dict(config))
    shards = [f"{number:04d}" for number in range(count_shards(settings))]
    files_of_tables = stamp(settings)
    # Snakemake is in the folder of the run by now
    if workflow.is_main_process and not workflow.dryrun:
        refuse_second_run(Path("results"))
except LenspipeError as error:
    raise WorkflowError(str(error))

# Where fits run is no parameter of theirs: in the environment of every command, it reruns nothing when it changes.
cluster = (
    quote(settings.cluster.model_dump_json()).replace("{", "{{").replace("}", "}}")
)
shell.prefix(
    f'export PYTHONPATH="{workflow.basedir}:${{{{PYTHONPATH:-}}}}" LENSPIPE_CLUSTER={cluster}; '
)
fitted_elsewhere = settings.cluster.kind != "local"

environment = f"{workflow.basedir}/envs/cpu.yaml"


onstart:
    note_run(Path("results"))


def sections(*names, **parts):
    """The named sections of the settings as JSON: a rule sees these alone, and runs again only when they change.

    parts: sections of which only these keys count.

    A function, because Snakemake would take the braces of ${VARIABLE} in a text for a wildcard.
    """
    chosen = settings.model_dump(
        mode="json", include=dict.fromkeys(("seed", *names), True) | parts
    )
    text = json.dumps(chosen, separators=(",", ":"))
    return lambda wildcards: text


def present(paths):
    """Those of the files from outside that are there: a newer one reruns its stage, a missing one is the stage's to tell."""
    files = [file_of(expand_path(path)) for path in paths]
    return [str(file) for file in files if file.is_file()]


def galaxy_inputs():
    """What the stage `galaxies` waits for: the synthetic survey, where it is taken in, and catalogues from outside."""
    survey = ["results/survey/provenance.json"] if settings.has_survey else []
    return survey + present(
        path
        for source in settings.galaxies.inputs
        for path in (*source.files, *source.read_where_there)
    )


def source_inputs():
    """What the source prior is made of: nothing, where it is not learned."""
    if settings.source.kind != "vae":
        return []
    return ["results/vae/vae.safetensors", "results/galaxies/galaxies.zarr/zarr.json"]


def table_inputs():
    """The deflection table, where deflections are taken from it."""
    if settings.lens.deflection != "table":
        return []
    return ["results/deflection_table/deflection_table.safetensors"]


def mock_inputs():
    """What the mocks are made of."""
    if settings.mocks.source == "prior":
        return ["results/source/source_prior.safetensors", *table_inputs()]
    return ["results/galaxies/galaxies.zarr/zarr.json", *table_inputs()]


def report_inputs():
    """What the report says of galaxies, where the run needs any."""
    if not settings.has_galaxies:
        return []
    return ["results/galaxies/cuts.csv", "results/validation/provenance.json"]


def catalogue_inputs():
    """What the lens catalogue takes in: mocks, tables and the lenses written in the settings.

    Not the images that a table names: they may be hundreds of thousands. Those of few lenses are in `files_of_tables`.
    """
    # the one may be the same where images are others, and Snakemake goes by the contents of small files
    mocks = (
        ["results/mocks/lenses.csv", "results/mocks/provenance.json"]
        if settings.has_mocks
        else []
    )
    images = [path for lens in settings.catalogue.lenses for path in lens.files]
    return mocks + present([*settings.catalogue.tables, *images])
