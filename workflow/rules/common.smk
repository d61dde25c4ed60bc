"""Settings, checked before any job, and what the rules need to know of them."""

import json
import sys

sys.path.insert(0, workflow.basedir)

from lenspipe.catalogue.tables import count_shards
from lenspipe.config import load_config
from lenspipe.errors import LenspipeError
from snakemake.exceptions import WorkflowError

shell.prefix(f'export PYTHONPATH="{workflow.basedir}:${{{{PYTHONPATH:-}}}}"; ')

try:
    settings = load_config(dict(config))
    shards = [f"{number:04d}" for number in range(count_shards(settings))]
except LenspipeError as error:
    raise WorkflowError(str(error))

environment = f"{workflow.basedir}/envs/cpu.yaml"


def sections(*names):
    """The named sections of the settings as JSON: a rule sees these alone, and runs again only when they change."""
    chosen = settings.model_dump(mode="json", include={"seed", *names})
    return json.dumps(chosen, separators=(",", ":"))


def galaxy_inputs():
    """What the stage `galaxies` waits for: the synthetic survey, where it is taken in."""
    return ["results/survey/provenance.json"] if settings.has_survey else []


def mock_inputs():
    """What the mocks are made of."""
    table = (
        ["results/deflection_table/deflection_table.safetensors"]
        if settings.lens.deflection == "table"
        else []
    )
    if settings.mocks.source == "prior":
        return ["results/source/source_prior.safetensors", *table]
    return ["results/galaxies/galaxies.zarr/zarr.json", *table]


def catalogue_inputs():
    """What the lens catalogue takes in besides observed lenses."""
    return ["results/mocks/lenses.csv"] if settings.has_mocks else []
