"""Settings: the shipped files are good, and bad ones are refused with a message that helps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import numpy as np
import pytest
import yaml

from lenspipe.config import Config, MassProfile, expand_path, json_schema, load_config
from lenspipe.errors import ConfigError
from lenspipe.lens.parameters import MASS_PROFILES
from lenspipe.prior_expression import parse_prior

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "workflow/presets").glob("*.yaml"))]


def test_config_yaml_spells_out_the_defaults() -> None:
    assert load_config(ROOT / "config.yaml") == Config()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_fit_the_schema(path: Path) -> None:
    schema = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    load_config(path)


def test_schema_is_the_generated_one() -> None:
    assert (ROOT / "workflow/schemas/config.schema.json").read_text() == json_schema()


def test_names_of_mass_profiles_are_those_there_are() -> None:
    assert get_args(MassProfile) == tuple(MASS_PROFILES)


def test_components_have_their_priors_after_the_others() -> None:
    halo = {"halo_alpha_Rs": "Uniform(0, 0.1)", "halo_Rs": 0.2, "halo_center_x": 0.5, "halo_center_y": "Normal(0, 1)"}
    config = load_config({"lens": {"components": {"halo": "nfw"}}, "priors": {"components": halo}})
    assert list(config.priors.expressions())[-4:] == list(halo)
    assert load_config(config.model_dump(mode="json")) == config


def test_one_stage_may_have_its_own_sections_alone() -> None:
    """As the rules hand them on: sections that suit each other only together."""
    settings = {"deflection_table": {"gamma_max": 2.5}, "priors": {"gamma": "Uniform(1.5, 2.4)"}}
    part = {"deflection_table": load_config(settings).model_dump(mode="json")["deflection_table"]}
    assert load_config(json.dumps(part)).deflection_table.gamma_max == 2.5
    with pytest.raises(ConfigError, match="reaches outside the deflection table"):
        load_config(part)


def test_inline_text_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match="config: not valid YAML"):
        load_config("{fit: [}")


def test_settings_survive_json() -> None:
    exact = "TruncatedNormal(1.23456789012, 0.1, 0.5, 2)"
    assert str(parse_prior(exact)) == exact
    config = load_config(ROOT / "workflow/presets/paper.yaml")
    assert load_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"galaxies": {"signal_to_noise_mim": 3}},
            "signal_to_noise_mim: unknown key; did you mean signal_to_noise_min?",
        ),
        ({"source": {"kind": "sersic", "residual": None}}, "residual: unknown key; residual is one of another section"),
        ({"fit": {"draws": 3}}, r"fit.draws: Input should be greater than or equal to 20 \(found 3\)"),
        (
            {"galaxies": {"signal_to_noise_min": 60}},
            r"signal_to_noise_min \(60\) must be below signal_to_noise_max \(50\)",
        ),
        (
            {"galaxies": {"sersic_index_max": 0.1}},
            r"sersic_index_min \(0.1\) must be below sersic_index_max \(0.1\)",
        ),
        ({"survey": {"magnitude_bright": 25}}, "magnitude_bright .* must be below magnitude_faint"),
        ({"deflection_table": {"gamma_min": 2.5, "gamma_max": 2.0}}, "gamma_min .* must be below gamma_max"),
        ({"priors": {"gamma": "Normal(2, 0.5)"}}, r"gamma = Normal\(2, 0.5\) reaches outside \[1, 3\]; truncate it"),
        ({"priors": {"gamma": "Uniform(1.05, 2)"}}, "reaches outside the deflection table"),
        ({"lens": {"supersampling": 2, "psf_supersampling": 4}}, "psf_supersampling = 4: give 1 or .*supersampling, 2"),
        ({"priors": {"source_size": "Normal(1, 1)"}}, r"source_size = .* reaches outside \[0, inf\]"),
        (
            {"priors": {"q": "Uniform(0.05, 1)", "phi": 0}},
            r"priors.q .* reaches outside the deflection table \[0.1, 1\]",
        ),
        ({"priors": {"e1": "Normal(0, 0.1)"}}, "reach an ellipticity of inf, beyond 0.818"),
        (
            {"priors": {"e1": "Uniform(-0.9, 0.9)"}, "lens": {"deflection": "series"}},
            "of 1.01, beyond 0.98, the axis ratio 0.01",
        ),
        ({"priors": {"gamma": "Gauss(2, 0.5)"}}, "unknown distribution 'Gauss'"),
        ({"priors": {"gamma1": "Normal(0)"}}, r"has 1 arguments; expected Normal\(mean, sd\)"),
        ({"priors": {"gamma1": "Normal(0, 1e999)"}}, r"'Normal\(0, 1e999\)': every number must be finite"),
        ({"priors": {"gamma1": math.nan}}, "or a finite number, found nan"),
        (
            {"priors": {"gamma": "TruncatedNormal(1, 0.1, 2.1, 2.7)"}},
            r"what is left begins 11 sd from the mean, 6 at most; give a nearer mean, or Uniform\(2.1, 2.7\)",
        ),
        ({"lens": {"light": {"model": "sersic"}}}, "'model' is the beginning of other names in the results"),
        ({"lens": {"components": {"true": "sis"}}}, "'true' is the beginning of other names in the results"),
        ({"lens": {"components": {"source": "sis"}}}, "'source' is the beginning of other names in the results"),
        ({"priors": {"gamma1": "Uniform(1, 0)"}}, r"low \(1\) must be below high \(0\)"),
        ({"priors": {"q": "Uniform(0.2, 1)"}}, "give either e1 and e2, or q and phi"),
        ({"fit": {"settling_temperatures": [10, 3]}}, "last of settling_temperatures must be 1"),
        (
            {"priors": {"gamma": "Laplace(2, 0.1)"}},
            r"gamma = Laplace\(2, 0.1\) reaches outside \[1, 3\]; truncate it",
        ),
        ({"priors": {"theta_E": "Gumbel(1, 0.1)"}}, r"theta_E = Gumbel\(1, 0.1\) reaches outside \[0, inf\]"),
        ({"priors": {"gamma1": "Laplace(0)"}}, r"missing a required argument: 'scale'; expected Laplace\(loc, scale\)"),
        ({"priors": {"gamma1": "Laplace(0, -1)"}}, r"'Laplace\(0, -1\)': Pyro refuses .* GreaterThan\(lower_bound=0"),
        ({"priors": {"gamma1": "HalfNormal(1, 1)"}}, r"too many positional arguments; expected HalfNormal\(scale\)"),
        ({"priors": {"gamma1": "Laplace(0, 1e999)"}}, "expected finite numbers"),
        ({"priors": {"gamma1": "Laplace(0, scale=1, scale=2)"}}, "cannot read the prior"),
        *(
            ({"priors": {"gamma1": text}}, r"gamma1: .* has no continuous inverse CDF .*; known are those .* Laplace")
            for text in (
                "Beta(2, 3)",
                "Gamma(2, 1)",
                "StudentT(3)",
                "InverseGamma(2, 1)",
                "Poisson(3)",
                "VonMises(0, 1)",
            )
        ),
        ({"priors": {"gamma1": "LogisticNormal(0, 1)"}}, "not a distribution of one number"),
        ({"priors": {"gamma1": "Dirichlet(1)"}}, "Pyro refuses the arguments of Dirichlet"),
        ({"priors": {"gamma1": "gamma3"}}, r"gamma1 = gamma3: no parameter gamma3; did you mean gamma"),
        ({"priors": {"gamma1": "xxxxxx"}}, r"no parameter xxxxxx; there are theta_E, .*, q, phi"),
        ({"priors": {"center_x": "e1", "e1": "e2", "e2": "e1"}}, "e1 = e2 = e1: share each other's value"),
        ({"priors": {"source_x": "source_x"}}, "source_x = source_x: share each other's value"),
        ({"priors": {"e1": "phi"}}, "e1 = phi: phi is derived itself"),
        ({"priors": {"theta_E": "q", "source_x": "r_Ein"}}, "no parameter r_Ein"),
        (
            {"priors": {"source_size": "source_x"}},
            r"source_size = source_x, in \[-inf, inf\], reaches outside \[0, inf\]",
        ),
        (
            {"priors": {"light": {"bulge_n_sersic": "q"}}},
            r"bulge_n_sersic = q, in \[0.222198, 1\], reaches outside \[0.36, inf\]",
        ),
        (
            {"priors": {"gamma": "source_size", "source_size": "Uniform(1.05, 2)"}},
            "reaches outside the deflection table",
        ),
        ({"source": {"kind": "sersic", "e1": "e2"}}, "e1 = e2: expected a prior or a number"),
        ({"mocks": {"systems": 0}}, "nothing to fit"),
        ({"lens": {"components": {"halo": "nfv"}}}, r"lens.components.halo.profile: Input should be 'epl', 'sie'"),
        (
            {"lens": {"components": {"far": {"profile": "nfw", "redshift": 0.8}}}},
            "redshift and source_redshift are needed, since far has a redshift",
        ),
        (
            {
                "lens": {
                    "components": {"far": {"profile": "nfw", "redshift": 2.5}},
                    "redshift": 0.5,
                    "source_redshift": 2,
                }
            },
            r"far \(2.5\) is not in front of source_redshift \(2\)",
        ),
        (
            {"lens": {"components": {"far": "sis"}}, "priors": {"components": {"far_theta_E": "Normal(0.1, 0.1)"}}},
            r"far_theta_E = Normal\(0.1, 0.1\) reaches outside \[0, inf\]; truncate it",
        ),
        (
            {"priors": {"light": {"bulge_n_sersic": "Uniform(0.2, 8)"}}},
            r"bulge_n_sersic = Uniform\(0.2, 8\) reaches outside \[0.36, inf\]",
        ),
        (
            {"lens": {"deflection": "series"}, "priors": {"q": "Uniform(0, 1)", "phi": 0}},
            r"priors.q .* reaches outside the deflection series \[0.01, 1\]; truncate the prior$",
        ),
        (
            {
                "lens": {"components": {"far": "epl"}},
                "priors": {
                    "components": {
                        **{f"far_{name}": 0.5 for name in ("theta_E", "phi", "center_x", "center_y")},
                        "far_q": "Uniform(0, 1)",
                        "far_gamma": 2,
                    }
                },
            },
            r"far_q \(Uniform\(0, 1\)\) reaches below 0.01",
        ),
        ({"lens": {"redshift": 0.5, "source_redshift": 0.3}}, r"redshift \(0.5\) is not below source_redshift \(0.3\)"),
        ({"lens": {"light": {"bulge": "sersik"}}}, r"lens.light.bulge: Input should be 'sersic', 'gaussian' or 'mge'"),
        (
            {
                "lens": {"light": {"bulge": "gaussian"}},
                "priors": {"light": {"bulge_e1": "0", "bulge_e2": "Normal(0, 1)"}},
            },
            r"priors.light.bulge_e2 \(Normal\(0, 1\)\) reaches beyond 0.69",
        ),
        (
            {"lens": {"light": {"bulge": "gaussian"}}, "priors": {"light": {"bulge_e1": "0"}}},
            "bulge_e1: no such parameter",
        ),
        ({"lens": {"light": {"bulge": "gaussian"}}}, "no prior of bulge_amplitude, .* which lens.light needs"),
        (
            {
                "lens": {"light": {"a": "gaussian"}, "components": {"a": "sie"}},
            },
            "both have a_center_x, a_center_y, a_phi, a_q; give one of them another name",
        ),
        ({"lens": {"components": {"Halo 1": "nfw"}}}, "lens.components.Halo 1"),
        ({"lens": {"components": {"far": "sheet"}}}, "no prior of far_kappa, which lens.components needs"),
        ({"priors": {"components": {"far_kappa": 0.1}}}, "far_kappa: no such parameter of lens.components"),
        (
            {"lens": {"components": {"theta": "sis"}}, "priors": {"components": {"theta_theta_E": 1}}},
            "no prior of theta_center_x, theta_center_y",
        ),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(settings)


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("seed: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"seed: 1  # \xe9")
    with pytest.raises(ConfigError, match=r"latin.yaml: not a text file in UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_key_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("fit: {draws: 50}\nseed: 1\nfit: {warmup: 30}\n")
    with pytest.raises(ConfigError, match=r"twice.yaml: not valid YAML: fit given twice"):
        load_config(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text("fit: &fit {draws: 50}\nvae: {<<: {epochs: 3}, epochs: 4}\n")
    assert load_config(tmp_path / "merged.yaml").vae.epochs == 4


def test_keys_are_those_of_the_settings_and_nothing_is_told_twice() -> None:
    stamps = {"layout": "stamp_archive", "archive": "y", "key": "a", "pixel_scale": 1, "noise_sd": -1}
    settings = {"source": {"latent_densty": 1}, "galaxies": {"inputs": [stamps]}, "seed": 2**63}
    with pytest.raises(ConfigError) as caught:
        load_config(settings)
    found = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert found == ["config", "  seed", "  galaxies.inputs.0.noise_sd", "  source.latent_densty"]


def test_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LENSPIPE_DATA", raising=False)
    with pytest.raises(ConfigError, match="LENSPIPE_DATA is not set"):
        expand_path("${LENSPIPE_DATA}/lenses")


def test_shared_parameters_have_the_support_of_the_other() -> None:
    """Of another prior, through a chain, and of what the model derives."""
    light = {"bulge_q": "q", "bulge_phi": "phi", "bulge_sd": "theta_E", "bulge_amplitude": "bulge_sd"}
    own = {"r_Ein": "Uniform(1, 2)", "e1": "Uniform(-0.3, 0.3)", "e2": "Uniform(-0.4, 0.4)"}
    light |= {"bulge_center_x": "center_x", "bulge_center_y": "0"}
    config = load_config(
        {
            "lens": {"light": {"bulge": "gaussian"}},
            "priors": {**own, "light": light},
        }
    )
    supports = [config.priors.support(name) for name in light]
    assert supports[0] == pytest.approx((1 / 3, 1))
    assert supports[1] == pytest.approx((-np.pi / 2, np.pi / 2))
    assert supports[2] == supports[3] == pytest.approx((3**-0.5, 2))
    assert supports[4] == (-np.inf, np.inf)
    assert load_config(config.model_dump(mode="json")) == config


def test_priors_of_ones_own_need_neither_torch_nor_pyro() -> None:
    code = "import sys, lenspipe.config as c; c.load_config({}); assert not {'torch', 'pyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "text",
    [
        "Normal(0, 0.1)",
        "TruncatedNormal(2, 0.2, 1.3, 2.7)",
        "LogNormal(2, 0.4)",
        "1.5",
        "Laplace(0, 0.1)",
        "Weibull(1, concentration=2)",
        "LogNormal(loc=0, scale=1)",
        "center_x",
    ],
)
def test_priors_survive_their_text(text: str) -> None:
    assert str(parse_prior(text)) == text
    assert parse_prior(str(parse_prior(text))) == parse_prior(text)


def test_a_prior_is_never_evaluated() -> None:
    with pytest.raises(ValueError, match="cannot read the prior"):
        parse_prior("__import__('os').getcwd()")
