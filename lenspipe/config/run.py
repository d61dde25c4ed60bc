"""All settings of a run, read from a file and held against each other."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from lenspipe.config.fields import Section
from lenspipe.config.fit import Cluster, Fit
from lenspipe.config.galaxies import Galaxies, Survey, SurveyInput
from lenspipe.config.images import Catalogue, Mocks
from lenspipe.config.lens import LARGEST_E, DeflectionTable, Lens, Priors
from lenspipe.config.outcome import Report, Summary
from lenspipe.config.source import LearnedSource, SourceSettings, Vae, Validation
from lenspipe.errors import ConfigError
from lenspipe.lens.parameters import LIGHT_PROFILES, SERIES_Q_MIN, component_parameters, ellipses, with_axis_ratios


class Config(Section):
    """All settings of a run."""

    seed: int = Field(1, ge=0, lt=2**63, description="seed of everything random")
    survey: Survey = Survey()
    galaxies: Galaxies = Galaxies()
    vae: Vae = Vae()
    source: SourceSettings = LearnedSource()
    validation: Validation = Validation()
    deflection_table: DeflectionTable = DeflectionTable()
    lens: Lens = Lens()
    priors: Priors = Priors()
    mocks: Mocks = Mocks()
    catalogue: Catalogue = Catalogue()
    fit: Fit = Fit()
    cluster: Cluster = Cluster()
    summary: Summary = Summary()
    report: Report = Report()

    def conflicts(self) -> list[str]:
        """What is wrong between sections that are each good by themselves."""
        found = []
        mass = component_parameters(self.lens.mass_profiles)
        light = component_parameters(self.lens.light, LIGHT_PROFILES)
        for kind, needed, priors in (("components", mass, self.priors.components), ("light", light, self.priors.light)):
            if missing := sorted(set(needed) - with_axis_ratios(priors)):
                found.append(f"priors.{kind}: no prior of {', '.join(missing)}, which lens.{kind} needs")
            if unknown := sorted(with_axis_ratios(priors) - set(needed)):
                found.append(f"priors.{kind}: {', '.join(unknown)}: no such parameter of lens.{kind}")
            for name in [f"{component}_{e}" for component in ellipses(priors) for e in ("e1", "e2")]:
                if max(map(abs, self.priors.support(name))) > LARGEST_E:
                    found.append(f"priors.{kind}.{name} ({priors[name]}) reaches beyond {LARGEST_E}; truncate it")
        if both := sorted(set(mass) & set(light)):
            found.append(f"lens.components and lens.light both have {', '.join(both)}; give one of them another name")
        if self.lens.psf_supersampling not in (1, self.lens.supersampling):
            found.append(
                f"lens.psf_supersampling = {self.lens.psf_supersampling}: give 1 or lens.supersampling, "
                f"{self.lens.supersampling}"
            )
        if self.lens.deflection == "table":
            table, gamma = self.deflection_table, self.priors.support("gamma")
            if gamma[0] < table.gamma_min or gamma[1] > table.gamma_max:
                found.append(
                    f"priors.gamma ({self.priors.gamma}) reaches outside the deflection table "
                    f"[{table.gamma_min}, {table.gamma_max}]; truncate the prior or widen deflection_table"
                )
        for name, component in self.lens.components.items():
            axis_ratio = self.priors.components.get(f"{name}_q")
            if (
                component.profile == "epl"
                and axis_ratio is not None
                and self.priors.support(f"{name}_q")[0] < SERIES_Q_MIN
            ):
                found.append(
                    f"priors.components.{name}_q ({axis_ratio}) reaches below {SERIES_Q_MIN}, the least axis ratio of "
                    "the series that components are computed by; truncate it"
                )
        scaled = not self.lens.light or self.catalogue.preparation is not None
        if unscaled := [lens.name for lens in self.catalogue.lenses if not (scaled or lens.flux_unit)]:
            found.append(
                f"catalogue.lenses: {', '.join(unscaled)}: give flux_unit, the brightness of the source at "
                "source_flux = 1; with lens.light the brightest pixel of the image does not tell it"
            )
        least = self.deflection_table.q_min if self.lens.deflection == "table" else SERIES_Q_MIN
        if self.priors.q is not None and self.priors.support("q")[0] < least:
            remedy = " or lower deflection_table.q_min" if self.lens.deflection == "table" else ""
            reach = f"the deflection {self.lens.deflection} [{least}, 1]"
            found.append(f"priors.q ({self.priors.q}) reaches outside {reach}; truncate the prior{remedy}")
        if self.priors.e1 is not None and self.priors.e2 is not None:
            corner = self.priors.greatest_ellipticity()
            if not corner <= (1 - least) / (1 + least):
                found.append(
                    f"priors.e1 ({self.priors.e1}) and priors.e2 ({self.priors.e2}) reach an ellipticity of "
                    f"{corner:.3g}, beyond {(1 - least) / (1 + least):.3g}, the axis ratio {least}; truncate them"
                )
        if not self.has_mocks and not (self.catalogue.tables or self.catalogue.lenses):
            found.append("there is nothing to fit: no mocks are taken in, and no tables or lenses are given")
        return found

    @property
    def has_mocks(self) -> bool:
        """Whether the lens catalogue takes in mocks."""
        return self.catalogue.mocks and self.mocks.systems > 0

    @property
    def has_galaxies(self) -> bool:
        """Whether unlensed galaxies are needed: to learn the source from, or to be lensed as mocks."""
        return self.source.kind == "vae" or (self.has_mocks and self.mocks.source == "galaxies")

    @property
    def has_survey(self) -> bool:
        """Whether the galaxies come, at least in part, from the embedded synthetic survey."""
        return any(isinstance(source, SurveyInput) for source in self.galaxies.inputs)


def load_config(source: str | Path | dict[str, Any]) -> Config:
    """Read settings from a YAML file, from inline YAML or JSON that starts with `{`, or from a dict.

    Inline text may be a part of a run's settings, what one stage needs: sections are then not held against each other.
    Raises ConfigError naming every bad key, what was found and what was expected.
    """
    if isinstance(source, dict):
        return _validated(source, "config", whole=True)
    text = str(source)
    if text.lstrip().startswith("{"):
        return _validated(_parsed(text, "config"), "config", whole=False)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    return _validated(read_settings(path), str(path), whole=True)


def read_settings(path: Path) -> dict[str, Any]:
    """What a settings file says, not yet checked. Raises ConfigError where it is not YAML or gives a key twice."""
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8: {error}") from None


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key may be given once; of two sections of one name PyYAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _OnceLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: expected sections with keys, found {type(data).__name__}")
    return data


def _validated(data: dict[str, Any], origin: str, *, whole: bool) -> Config:
    try:
        config = Config.model_validate(data)
        problems = config.conflicts() if whole else []
    except ValidationError as error:
        problems = [_explain(e, data) for e in _own(error.errors())]
    if problems:
        raise ConfigError("\n".join([f"{origin}: {len(problems)} bad setting(s)", *(f"  {p}" for p in problems)]))
    return config


def _own(errors: list[Any]) -> list[Any]:
    """Errors without those of a list that is too short because its members are wrong."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short" or not any(p[: len(error["loc"])] == error["loc"] != p for p in places)
    ]


def _sort(section: dict[str, Any]) -> tuple[Any, Any]:
    """What says of which sort a section is."""
    return section.get("layout"), section.get("kind", "vae")


def _key(place: tuple[str | int, ...], data: Any) -> str:
    """A key as it is in the settings: pydantic's places have also the `kind` or `layout` by which a section is told."""
    parts: list[str] = []
    for part in place:
        if parts and isinstance(data, dict) and part not in data and part in _sort(data):
            continue
        parts.append(str(part))
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return ".".join(parts) or "config"


def _explain(error: Any, data: Any) -> str:
    key = _key(error["loc"], data)
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        close = difflib.get_close_matches(name, _known_keys(), n=1)
        if close == [name]:
            return f"{key}: unknown key; {name} is one of another section"
        return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    found = error.get("input")
    return f"{key}: {message}" + (f" (found {found!r})" if isinstance(found, str | int | float) else "")


def _known_keys() -> list[str]:
    schema = Config.model_json_schema()
    parts = [schema, *schema["$defs"].values()]
    return sorted({name for part in parts for name in part.get("properties", {})})


def json_schema() -> str:
    """The JSON schema of a config file, as text."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def expand_path(text: str, base: Path | None = None) -> Path:
    """A path from config or a table: `${VARIABLE}` and `~` expanded, relative ones taken from `base`.

    Raises ConfigError where a variable is not set.
    """
    for name in re.findall(r"\$\{(\w+)\}", text):
        if not os.environ.get(name):
            raise ConfigError(f"{text}: the environment variable {name} is not set; set it to the folder meant")
    try:
        path = Path(os.path.expandvars(text)).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text}: {error}") from None
    return path if path.is_absolute() or base is None else base / path
