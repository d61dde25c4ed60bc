"""Every setting of lenspipe: one frozen class a section, with unit, range, default and meaning at each field.

A config file holds only what differs from these defaults. Unknown keys are errors. The JSON schema in
`workflow/schemas/config.schema.json` is generated from these classes (`lenspipe check-config --write-schema`).
Science is here; machines and partitions are in `workflow/profiles/`.
"""

from lenspipe.config.fields import Section
from lenspipe.config.fit import Cluster, Fit
from lenspipe.config.galaxies import (
    Galaxies,
    GalaxyInput,
    RealGalaxyCatalogInput,
    StampArchiveInput,
    Survey,
    SurveyInput,
)
from lenspipe.config.images import NAME, Catalogue, Mocks, ObservedLens, Preparation
from lenspipe.config.lens import DeflectionTable, Lens, MassProfile, Priors
from lenspipe.config.outcome import Report, Summary
from lenspipe.config.run import Config, expand_path, json_schema, load_config, read_settings
from lenspipe.config.source import (
    Flow,
    LearnedSource,
    PixelGridSource,
    ResidualField,
    SersicSource,
    ShapeletSource,
    SourceSettings,
    Vae,
    Validation,
)

__all__ = [
    "NAME",
    "Catalogue",
    "Cluster",
    "Config",
    "DeflectionTable",
    "Fit",
    "Flow",
    "Galaxies",
    "GalaxyInput",
    "LearnedSource",
    "Lens",
    "MassProfile",
    "Mocks",
    "ObservedLens",
    "PixelGridSource",
    "Preparation",
    "Priors",
    "RealGalaxyCatalogInput",
    "Report",
    "ResidualField",
    "Section",
    "SersicSource",
    "ShapeletSource",
    "SourceSettings",
    "StampArchiveInput",
    "Summary",
    "Survey",
    "SurveyInput",
    "Vae",
    "Validation",
    "expand_path",
    "json_schema",
    "load_config",
    "read_settings",
]
