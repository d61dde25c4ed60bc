"""The store of posteriors: what is written comes back, in few files, and damage is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from lenspipe.errors import InputError
from lenspipe.posterior import writing
from lenspipe.posterior.writing import write_shard
from tests.posteriors import posteriors


def test_lenses_of_all_parts_come_back_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in memory and on disk, over several blocks: every variable unchanged, also ones that are not known here."""
    monkeypatch.setattr(writing, "BLOCK", 4)
    parts = [posteriors(list(names), seed=seed) for seed, names in enumerate(("dhb", "a", "fgceij"))]
    parts = [part.assign(hash=("lens", [f"hash of {n}" for n in part["name"].values])) for part in parts]
    parts[2]["prior_depth_of"] = parts[2]["prior_depth_of"].astype(object)  # Zarr has no text of fixed length
    parts[2].to_zarr(tmp_path / "part.zarr", consolidated=False)
    parts[2] = xr.open_zarr(tmp_path / "part.zarr", consolidated=False)
    write_shard(tmp_path / "shard-0000.zarr", {"image16x16": parts, "none": []}, {"stage": "fit"})
    assert zarr.open_group(tmp_path / "shard-0000.zarr", mode="r").attrs["lenspipe"] == {"stage": "fit"}
    found = xr.open_zarr(tmp_path / "shard-0000.zarr", group="image16x16", consolidated=False).load()
    expected = xr.concat(parts, dim="lens").sortby("name").load()
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
