"""The store of posteriors: what is written comes back, in few files, and damage is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import arviz
import arviz_stats
import numpy as np
import pytest
import xarray as xr
import zarr

import lenspipe
from lenspipe.errors import InputError
from lenspipe.posteriors import writing
from lenspipe.posteriors.rows import read_rows, unreadable_rows
from lenspipe.posteriors.shards import damaged
from lenspipe.posteriors.store import parameter_names
from lenspipe.posteriors.writing import write_shard
from tests.conftest import environment
from tests.posteriors import posteriors, write_catalogue, write_store


def test_lenses_of_all_parts_come_back_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in memory and on disk, over several blocks: every variable unchanged, also ones that are not known here."""
    monkeypatch.setattr(writing, "BLOCK", 4)
    parts = [posteriors(list(names), seed=seed) for seed, names in enumerate(("dhb", "a", "fgceij"))]
    parts = [part.assign(hash="hash of " + part["name"]) for part in parts]
    parts[2]["prior_depth_of"] = parts[2]["prior_depth_of"].astype(object)  # Zarr has no text of fixed length
    parts[2].to_zarr(tmp_path / "part.zarr", consolidated=False)
    parts[2] = xr.open_zarr(tmp_path / "part.zarr", consolidated=False)
    write_shard(tmp_path / "shard-0000.zarr", {"image16x16": parts, "none": []}, {"stage": "fit"})
    assert zarr.open_group(tmp_path / "shard-0000.zarr", mode="r").attrs["lenspipe"] == {"stage": "fit"}
    found = xr.open_zarr(tmp_path / "shard-0000.zarr", group="image16x16", consolidated=False).load()
    expected = xr.concat([part.load() for part in parts], dim="lens").sortby("name")
    assert found["name"].values.tolist() == list("abcdefghij")
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dims == expected[name].dims
        np.testing.assert_array_equal(found[name].values, expected[name].values, err_msg=str(name))
        if expected[name].dtype.kind not in "OUT":
            assert found[name].dtype == expected[name].dtype, name


def test_few_files_each_checked(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.zarr", {"b": [posteriors([f"{i:03}" for i in range(500)], draws=2)]}, {})
    assert sum(path.is_file() for path in (tmp_path / "s.zarr").rglob("*")) < 500
    for name, array in zarr.open_group(tmp_path / "s.zarr", mode="r")["b"].arrays():  # type: ignore[union-attr]
        assert "checksum=True" in repr(array.compressors), name


def test_lenses_that_were_fitted_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b and a differ in .* latent.*with different settings"):
        write_shard(tmp_path / "s.zarr", {"k": [posteriors(["a"], latents=3), posteriors(["b"], latents=4)]}, {})
    with pytest.raises(InputError, match="lenses of k: a twice"):
        write_shard(tmp_path / "s.zarr", {"k": [posteriors(["a"]), posteriors(["b", "a"])]}, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two shards of two shapes of image; the first has a guest, and a lens that failed."""
    results = tmp_path_factory.mktemp("results")
    small, large = posteriors(["a", 'b "1"', "guest"], seed=1), posteriors(["c"], pixels=24, seed=2)
    write_store(results / "fit/shard-0000.zarr", {"small": [small], "large": [large]}, {"lost": "no memory"})
    write_store(results / "fit/shard-0001.zarr", {"small": [posteriors(["d", "e"], seed=3)]})
    manifest = results / "fit/shard-0000.csv"
    manifest.write_text(manifest.read_text().replace("guest,fitted,\n", ""))
    write_catalogue(results / "catalogue", {"small": ["e", "a", 'b "1"', "d"], "large": ["c"]}, ["lost"])
    return results


def test_a_run_is_one_lazy_dataset(run: Path) -> None:
    """Every lens of the manifests, of any shape of image, without what is of the image's size."""
    found = lenspipe.open_posteriors(run / "fit")
    assert found["lens"].values.tolist() == ["c", "a", 'b "1"', "d", "e"]
    assert found["theta_E"].dims == ("lens", "chain", "draw")
    assert found["latent"].chunks is not None
    assert {"energy", "chi2_per_pixel", "prior_depth_of", "start_basin", "source_mean"} <= set(found)
    assert not {"model_mean", "name"} & set(found)
    expected = posteriors(["d", "e"], seed=3)
    for name in ("theta_E", "latent", "diverging", "chi2_per_pixel", "prior_depth_of"):
        np.testing.assert_array_equal(found[name].sel(lens=["e", "d"]).values, expected[name].values[::-1])
        assert found[name].dtype.kind == expected[name].dtype.kind or found[name].dtype == object
    assert arviz_stats.rhat(found["theta_E"].compute()).shape == (5,)


def test_one_lens_is_an_arviz_object(run: Path) -> None:
    lens = lenspipe.posterior(run / "fit", 'b "1"')
    expected = posteriors(["a", 'b "1"', "guest"], seed=1).isel(lens=1)
    assert set(lens.children) == {
        *("posterior", "sample_stats", "observed_data", "posterior_predictive", "map", "basins", "diagnostics")
    }
    table = arviz_stats.summary(lens, var_names=["theta_E", "gamma"])
    assert list(table.index) == ["theta_E", "gamma"]
    np.testing.assert_array_equal(lens["sample_stats"]["lp"], expected["log_density"])
    np.testing.assert_array_equal(lens["posterior_predictive"]["image_sd"], expected["model_sd"])
    np.testing.assert_array_equal(lens["map"]["source"], expected["source_map"])
    assert float(lens["map"]["theta_E"]) == float(expected["theta_E_map"])
    place = parameter_names(expected).index("gamma")
    np.testing.assert_array_equal(lens["basins"]["gamma"], expected["basin_parameters"][:, place])
    np.testing.assert_array_equal(lens["basins"]["log_evidence"], expected["basin_log_evidence"])
    assert (lens["observed_data"]["image"].values == 3).all()
    assert lens["observed_data"]["x"].values[[0, -1]] == pytest.approx([-0.75, 0.75])
    x, _, width = expected["source_frame"].values
    columns = lens["map"]["source_column"].values
    assert columns[[0, -1]] == pytest.approx([x - width * 63 / 128, x + width * 63 / 128])
    everything = {str(name) for group in lens.children.values() for name in group.data_vars}
    assert {"starts_agreeing", "predictive_p", "magnification", "source_frame"} <= everything
    assert {"draws_above_map", "seconds_map"} <= set(lens["diagnostics"].data_vars)
    assert not {"draws_above", "seconds"} & set(lens["map"].data_vars)


def test_classic_arviz_takes_it_too(run: Path) -> None:
    lens = lenspipe.posterior(run / "fit", "a")
    data = arviz.from_datatree(lens) if hasattr(arviz, "from_datatree") else lens
    assert float(arviz.summary(data, var_names=["theta_E"], round_to="none")["mean"].iloc[0]) == pytest.approx(
        float(lens["posterior"]["theta_E"].mean()), rel=1e-4
    )


def test_a_lens_without_a_posterior_is_told_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lens lost has no posterior: it failed: no memory"):
        lenspipe.posterior(run / "fit", "lost")
    with pytest.raises(InputError, match=r"no lens guest in .*; the first of its 6 lenses is a"):
        lenspipe.posterior(run / "fit", "guest")
    with pytest.raises(InputError, match="run the stage fit first"):
        lenspipe.posterior(tmp_path, "a")


def test_one_lens_needs_one_shard(run: Path, tmp_path: Path) -> None:
    """The other shards' stores are not looked at, nor is there need of a catalogue."""
    shutil.copytree(run / "fit", tmp_path / "fit")
    shutil.rmtree(tmp_path / "fit/shard-0000.zarr")
    lens = lenspipe.posterior(tmp_path / "fit", "e")
    assert lens["posterior"].sizes["draw"] == 20
    assert "observed_data" not in lens


def test_importing_lenspipe_reads_nothing_heavy() -> None:
    code = "import sys, lenspipe; sys.exit(bool({'xarray', 'zarr', 'numpy', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == 0


NAMES = [f"lens-{i:02}" for i in range(20)]
STORED_IN_CHUNKS = {"latent": 1, "source_mean": 4, "chi2_per_pixel": 20, "name": 20}  # lenses: 64 kB a chunk


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A store of twenty lenses whose latents are a chunk each."""
    parts = [posteriors(NAMES[i : i + 5], chains=2, draws=20, latents=500, seed=i) for i in range(0, 20, 5)]
    write_store(tmp_path / "shard-0000.zarr", {"small": parts})
    return tmp_path / "shard-0000.zarr"


def middle_of_first_chunk(file: Path) -> int:
    """A place in what comes first in a file, the chunk of the first lenses."""
    return 40 if file.stat().st_size > 80 else file.stat().st_size // 2


@pytest.mark.parametrize("variable", STORED_IN_CHUNKS)
@pytest.mark.parametrize("how", ["cut", "emptied", "flipped", "gone", "metadata cut"])
def test_damage_is_noticed(shard: Path, variable: str, how: str) -> None:
    assert damaged(shard) == []
    (file,) = [path for path in (shard / "small" / variable / "c").rglob("*") if path.is_file()]
    whole = file.read_bytes()
    lost = NAMES
    if how == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "gone":
        file.unlink()
    elif how == "flipped":
        place = middle_of_first_chunk(file)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        lost = NAMES[: STORED_IN_CHUNKS[variable]]
    else:
        metadata = shard / "small" / variable / "zarr.json"
        metadata.write_text(metadata.read_text()[:100])
    assert damaged(shard) == lost
    with pytest.raises(InputError, match=r"shard-0000\.zarr.*run the stage fit again for shard-0000") as raised:
        lenspipe.posterior(shard.parent, NAMES[0])
    if how != "metadata cut" and variable != "name":
        assert f"shard-0000.zarr/small/{variable}: lens" in str(raised.value)
        assert NAMES[0] in str(raised.value)
    with pytest.raises(InputError, match=r"shard-0000\.zarr"):
        lenspipe.open_posteriors(shard.parent)[variable].compute()
    if how == "flipped" and variable == "latent":
        assert lenspipe.posterior(shard.parent, NAMES[1])["posterior"].sizes["draw"] == 20


def test_a_lost_variable_or_group_is_noticed(shard: Path) -> None:
    shutil.move(shard / "small/energy", shard.parent / "energy")
    assert damaged(shard) == NAMES
    shutil.move(shard.parent / "energy", shard / "small/energy")
    assert damaged(shard) == []
    shutil.rmtree(shard / "small")
    assert damaged(shard) == NAMES
    with pytest.raises(InputError, match=r"lens-00, .* and 15 more of its manifest not in it"):
        lenspipe.posterior(shard.parent, NAMES[3])
    shutil.rmtree(shard)
    assert damaged(shard) == NAMES


def test_a_shard_written_anew_is_read_anew(shard: Path) -> None:
    """Metadata are kept in memory as long as they stand."""
    assert lenspipe.posterior(shard.parent, NAMES[3])["posterior"]["latent"].shape == (2, 20, 500)
    shutil.rmtree(shard)
    write_store(shard, {"small": [posteriors(NAMES[2:7], chains=3, draws=30, latents=4)]})
    assert lenspipe.posterior(shard.parent, NAMES[3])["posterior"]["latent"].shape == (3, 30, 4)
    assert read_rows(shard / "small", variables=["name"])["name"].values.tolist() == NAMES[2:7]


def test_no_flipped_bit_goes_unnoticed(shard: Path) -> None:
    """Bits anywhere in the files of values: either it is found, or the values are what they were."""
    rng = np.random.default_rng(4)
    files = sorted(path for path in (shard / "small").rglob("c/*") if path.is_file())
    files += sorted(path for path in (shard / "small").rglob("c/*/*") if path.is_file())
    unnoticed = []
    for file in rng.permutation(np.array(files, dtype=object))[:40]:
        group = file.relative_to(shard / "small").parts[0]
        before, expected = file.read_bytes(), read_rows(shard / "small", variables=[group])[group].values
        place, bit = int(rng.integers(len(before))), int(rng.integers(8))
        file.write_bytes(before[:place] + bytes([before[place] ^ (1 << bit)]) + before[place + 1 :])
        if not unreadable_rows(shard / "small", [group]):
            after = read_rows(shard / "small", variables=[group])[group].values
            unnoticed += [] if np.array_equal(after, expected) else [(file, place, bit)]
        file.write_bytes(before)
    assert unnoticed == []
