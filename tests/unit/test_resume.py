"""What is fitted is not fitted again: by hash, from stores, parts and other shards; damage and doubled jobs.

The fits are made-up posteriors that say how often each lens was asked for; planning, parts, stores, manifests are real.
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from lenspipe.catalogue.reading import read_catalogue
from lenspipe.cli import app
from lenspipe.config import Config, Fit, Lens, Priors
from lenspipe.errors import InputError
from lenspipe.fit import batch, cluster, resume
from lenspipe.fit.batch import Result, Task, batch_checkpoint
from lenspipe.fit.parts import read_part, write_part
from lenspipe.fit.refit import chosen_where, refit_lenses
from lenspipe.fit.stage import fit_shard, plan
from lenspipe.posteriors import writing
from lenspipe.posteriors.reading import open_posteriors
from lenspipe.posteriors.shards import damaged, read_manifests
from lenspipe.results import Results
from lenspipe.seeds import seed_for
from lenspipe.tensors import write_tensors
from tests.posteriors import posteriors

NAMES = tuple("abcdefg")
BUCKET = "image16x16_psf3x3"
SOME = ["name", "theta_E", "latent", "diverging", "prior_depth_of", "model_map"]  # variables of every kind, for speed


def catalogue(paths: Results, names: tuple[str, ...], changed: str = "") -> None:
    """A catalogue of usable lenses, the data of one of them changed."""
    paths.catalogue.mkdir(parents=True, exist_ok=True)
    rows = [
        {"name": n, "origin": "", "status": "usable", "reason": "", "bucket": BUCKET, "hash": n + "!" * (n == changed)}
        for n in names
    ]
    pd.DataFrame(rows).to_csv(paths.catalogue.with_name("lenses.csv"), index=False)


def made(path: Path, value: float = 0.0, width: float = 1.0, **facts: object) -> None:
    """What an earlier stage has written: a tensor, a setting, and how it was made."""
    write_tensors(path, {"value": torch.tensor([value])}, {"settings": {"width": width}, **facts})


@pytest.fixture
def paths(tmp_path: Path) -> Results:
    paths = Results(tmp_path)
    for path in (paths.source_prior, paths.deflection_table):
        made(path)
    catalogue(paths, NAMES)
    return paths


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each lens was fitted; the result depends on its name and the factor of its draws alone."""
    count: Counter[str] = Counter()

    def fit_lenses(task: Task) -> xr.Dataset:
        count.update(task.names)
        if "hopeless" in task.names:
            raise ArithmeticError("no numbers")
        if "large" in task.names and count["large"] < 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        alone = [posteriors([name], seed=seed_for(task.draws_factor, "made up", name) % 2**31) for name in task.names]
        made = xr.concat(alone, "lens")[SOME].assign(hash=("lens", np.array(task.hashes, dtype=object)))
        return made.assign(draws_factor=("lens", [task.draws_factor] * len(task.names)))

    monkeypatch.setattr(batch, "fit_lenses", fit_lenses)
    return count


def config(shard_size: int = 5, draws: int = 20) -> Config:
    return Config(fit=Fit(shard_size=shard_size, batch_size=2, draws=draws))


def run(settings: Config, paths: Results, shards: tuple[int, ...]) -> xr.Dataset:
    """Fit the shards in the order given; what is stored afterwards, by lens."""
    for shard in shards:
        fit_shard(settings, paths, shard)
    return open_posteriors(paths.fit).sortby("lens").load()


def test_a_finished_lens_is_not_fitted_again(paths: Results, asked: Counter[str]) -> None:
    """Nor is its store written again."""
    first = run(config(), paths, (0, 1))
    assert asked == Counter(NAMES)
    written = {store: store.stat().st_mtime_ns for store in resume.stores(paths.fit)}
    for shard in (0, 1):
        paths.manifest(shard).unlink()  # as Snakemake does before a rerun
    xr.testing.assert_identical(run(config(), paths, (0, 1)), first)
    assert asked == Counter(NAMES)
    assert {store: store.stat().st_mtime_ns for store in resume.stores(paths.fit)} == written
    assert read_manifests(paths.fit)["name"].tolist() == list(NAMES)
    assert not list(paths.fit.glob("parts/*/*"))


@pytest.mark.parametrize("what", ["settings", "source", "table", "kind of source", "data", "priors", "lens", "seed"])
def test_what_decides_a_result_has_it_fitted_again(what: str, paths: Results, asked: Counter[str]) -> None:
    first = run(config(), paths, (0, 1))
    if what in ("source", "table"):
        made(paths.source_prior if what == "source" else paths.deflection_table, value=1.0)
    elif what == "kind of source":
        made(paths.source_prior, width=2.0)
    elif what == "data":
        catalogue(paths, NAMES, changed="c")
    other = config(draws=21 if what == "settings" else 20)
    changes: dict[str, dict[str, object]] = {
        "priors": {"priors": Priors(gamma="TruncatedNormal(2, 0.2, 1.4, 2.6)")},
        "lens": {"lens": Lens(source_interpolation="bilinear")},
        "seed": {"seed": 2},
    }
    run(other.model_copy(update=changes.get(what, {})), paths, (0, 1))
    assert asked == Counter(NAMES) + Counter("c" if what == "data" else NAMES)
    assert first.sizes["lens"] == len(NAMES)


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"shard_size": 7, "batch_size": 3}, False),
        ({"svi_rank": 5, "adam_steps": 7}, False),
        ({"svi_rank": 5, "sampler": "svi_low_rank"}, True),
        ({"adam_steps": 7, "search": "adam"}, True),
        ({"starts": 7}, True),
    ],
)
def test_settings_that_decide_no_result(settings: dict[str, object], counts: bool, paths: Results) -> None:
    chosen = {key: value for key, value in settings.items() if key in ("search", "sampler")}
    before, after = (
        resume.lens_hashes(Config(fit=Fit(**given)), paths, read_catalogue(paths.catalogue))  # type: ignore[arg-type]
        for given in (chosen, settings)
    )
    assert (before != after) is counts


def test_the_same_source_made_again_has_nothing_fitted_again(paths: Results, asked: Counter[str]) -> None:
    """At another time, from files that lie elsewhere, by another commit."""
    run(config(), paths, (0, 1))
    made(paths.source_prior, commit="another", facts={"images_per_second": 930.1}, inputs={"elsewhere/vae": "1"})
    run(config(), paths, (0, 1))
    assert asked == Counter(NAMES)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_new_lenses_alone_are_fitted(order: tuple[int, ...], paths: Results, asked: Counter[str]) -> None:
    """Even where they come first, so that others move to the next shard; in whatever order shards are done."""
    first = run(config(), paths, (0, 1))
    catalogue(paths, ("new", "newer", "newest", *NAMES, "last"))
    grown = run(config(), paths, order)
    assert asked == Counter((*NAMES, "new", "newer", "newest", "last"))
    assert sorted(grown["lens"].to_numpy()) == sorted(asked)
    xr.testing.assert_identical(grown.sel(lens=list(NAMES)), first)


def test_a_damaged_lens_is_not_taken_over_but_its_neighbours_are(
    paths: Results, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHUNK_BYTES", 1)  # every lens by itself
    run(config(shard_size=4), paths, (0, 1))
    file = paths.store(0) / BUCKET / "model_map/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[20] ^= 1  # in the picture of one of the four lenses
    file.write_bytes(bytes(content))
    (broken,) = damaged(paths.store(0))
    run(config(shard_size=2), paths, (0, 1, 2, 3))
    assert asked == Counter(NAMES) + Counter([broken])


def test_shards_of_another_size_take_results_over(paths: Results, asked: Counter[str]) -> None:
    """And those beyond the last are removed once nobody needs them, so that no lens is read twice."""
    first = run(config(shard_size=2), paths, (0, 1, 2, 3))
    second = run(config(shard_size=4), paths, (0, 1))
    assert asked == Counter(NAMES)
    xr.testing.assert_identical(second, first)
    left = sorted(path.name for path in paths.fit.glob("shard-*"))
    assert left == ["shard-0000.csv", "shard-0000.zarr", "shard-0001.csv", "shard-0001.zarr"]


def test_batches_of_a_killed_job_are_kept(paths: Results, asked: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    fit = batch.fit_lenses

    def until_killed(task: Task) -> xr.Dataset:
        if "e" in task.names:
            raise Killed
        return fit(task)

    monkeypatch.setattr(batch, "fit_lenses", until_killed)
    with pytest.raises(Killed):
        fit_shard(config(), paths, 0)
    assert not paths.manifest(0).exists()
    monkeypatch.setattr(batch, "fit_lenses", fit)
    run(config(), paths, (0, 1))
    assert asked == Counter(NAMES)


def test_a_part_that_was_cut_short_is_fitted_again(paths: Results, asked: Counter[str]) -> None:
    """Also one with a flipped byte; and no other."""
    hashes = resume.lens_hashes(config(), paths, resume_catalogue(paths))
    parts = [
        write_part(paths.parts(0), posteriors([n])[SOME].assign(hash=("lens", [hashes[n]]), draws_factor=("lens", [1])))
        for n in "abc"
    ]
    parts[0].write_bytes(parts[0].read_bytes()[:5000])
    bytes_of = bytearray(parts[1].read_bytes())
    bytes_of[len(bytes_of) // 2] ^= 1
    parts[1].write_bytes(bytes(bytes_of))
    assert [read_part(part) is None for part in parts] == [True, True, False]
    for part in parts[:2]:
        with pytest.raises(InputError, match="is damaged"):
            resume.opened(part, "", [])
        assert not part.exists()
    run(config(), paths, (0, 1))
    assert asked == Counter(NAMES) - Counter("c")


def test_a_part_that_the_file_system_does_not_give_stays(paths: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be there again for the next run; a part that is damaged will not."""
    part = write_part(paths.parts(0), posteriors(["a"]))

    def stale(*_: object) -> NoReturn:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", stale)
        with pytest.raises(InputError, match=rf"{part}: cannot be read \(.*Stale file handle\); run the stage"):
            resume.opened(part, "", [resume.Place(part, 0, "a")])
        assert resume.index_of_parts([part]) == {}
    assert read_part(part) is not None


def test_a_part_with_a_flipped_bit_is_fitted_again(paths: Results, asked: Counter[str]) -> None:
    """One that is found by its names and hashes, which are sound: the run says so and the next one is not held up."""
    hashes = resume.lens_hashes(config(), paths, resume_catalogue(paths))
    for name in "ab":
        whole = posteriors([name])[SOME].assign(hash=("lens", [hashes[name]]), draws_factor=("lens", [1]))
        part = write_part(paths.parts(0), whole)
    with zipfile.ZipFile(part) as file:
        at = file.getinfo("latent.npy").header_offset + 200
    flipped = bytearray(part.read_bytes())
    flipped[at] ^= 1
    part.write_bytes(bytes(flipped))
    assert read_part(part, ["name", "hash"]) is not None
    with pytest.raises(InputError, match="run the stage fit again"):
        run(config(), paths, (0, 1))
    found = run(config(), paths, (0, 1))
    assert found["lens"].to_numpy().tolist() == list(NAMES)
    assert asked["a"] == 0
    assert asked["b"] == 1
    assert list(paths.parts(0).iterdir()) == []


def test_a_part_whose_index_is_damaged_is_fitted_again(paths: Results, asked: Counter[str]) -> None:
    """By a bit that makes it a file of a later kind of zip, which is no error of reading."""
    hashes = resume.lens_hashes(config(), paths, resume_catalogue(paths))
    whole = posteriors(["a"])[SOME].assign(hash=("lens", [hashes["a"]]), draws_factor=("lens", [1]))
    part = write_part(paths.parts(0), whole)
    flipped = bytearray(part.read_bytes())
    flipped[flipped.index(b"PK\x01\x02") + 6] |= 0x80  # the version that is needed to read the first entry
    part.write_bytes(bytes(flipped))
    with pytest.raises(NotImplementedError), zipfile.ZipFile(part) as file:
        file.read(file.namelist()[0])
    assert read_part(part) is None
    found = run(config(), paths, (0, 1))
    assert found["lens"].to_numpy().tolist() == list(NAMES)
    assert asked == Counter(NAMES)
    assert list(paths.parts(0).iterdir()) == []


def resume_catalogue(paths: Results) -> pd.DataFrame:
    return pd.read_csv(paths.catalogue.with_name("lenses.csv"))


def test_a_damaged_store_is_fitted_again_where_it_is_damaged(paths: Results, asked: Counter[str]) -> None:
    first = run(config(), paths, (0, 1))
    file = paths.store(1) / BUCKET / "theta_E/c/0/0/0"
    file.write_bytes(file.read_bytes()[:10])
    xr.testing.assert_identical(run(config(), paths, (0, 1)), first)
    assert asked == Counter(NAMES) + Counter("fg")


def test_a_damaged_guest_is_fitted_again(paths: Results, asked: Counter[str]) -> None:
    """A lens that has moved to a shard that is not done yet, and whose old result can no longer be read."""
    run(config(), paths, (0, 1))
    catalogue(paths, ("new", *NAMES))  # e moves from the first shard to the second
    (paths.store(0) / BUCKET / "theta_E/c/0/0/0").write_bytes(b"short")
    grown = run(config(), paths, (0, 1))
    assert sorted(grown["lens"].to_numpy()) == sorted(("new", *NAMES))
    assert asked == Counter(NAMES) + Counter("abcde") + Counter(["new"])


def test_a_lens_that_failed_is_not_tried_again_but_when_told(paths: Results, asked: Counter[str]) -> None:
    catalogue(paths, (*NAMES, "hopeless"))
    run(config(), paths, (0, 1))
    before = asked["hopeless"]
    paths.manifest(1).unlink()
    run(config(), paths, (0, 1))
    assert asked["hopeless"] == before
    reasons = read_manifests(paths.fit).set_index("name")["reason"]
    assert reasons["hopeless"] == "ArithmeticError: no numbers"
    assert set(reasons.drop("hopeless")) == {""}
    chosen, failures = refit_lenses(config(), paths, ["hopeless", "a"], None, 1)
    assert asked["hopeless"] > before
    assert chosen == ["a", "hopeless"]
    assert failures == {"hopeless": "ArithmeticError: no numbers"}


def test_a_lens_too_large_for_the_memory_is_tried_again(paths: Results, asked: Counter[str]) -> None:
    """By the next run, which may have another machine."""
    catalogue(paths, (*NAMES[:5], "large"))
    run(config(), paths, (0, 1))
    reasons = read_manifests(paths.fit).set_index("name")["reason"]
    assert reasons["large"].startswith("there was not memory enough for it alone: RuntimeError: [enforce fail]")
    assert set(reasons.drop("large")) == {""}
    found = run(config(), paths, (0, 1))
    assert found["lens"].to_numpy().tolist() == [*NAMES[:5], "large"]
    assert asked == Counter(NAMES[:5]) + Counter({"large": 2})


def test_a_lens_whose_workers_died_is_tried_again(
    paths: Results, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the next run: it may have been the machine's fault."""

    def deadly(
        tasks: Sequence[Task], work: Callable[[Task], Result], *_: object
    ) -> Iterator[tuple[Task, Result | None, str]]:
        for task in tasks:
            yield (task, None, "every worker died") if "f" in task.names else (task, work(task), "")

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "run", deadly)
        fit_shard(config(), paths, 0)
        fit_shard(config(), paths, 1)
    reasons = read_manifests(paths.fit).set_index("name")["reason"]
    assert reasons[reasons != ""].to_dict() == dict.fromkeys("fg", "every worker died")
    run(config(), paths, (0, 1))
    assert set(read_manifests(paths.fit)["reason"]) == {""}
    assert asked == Counter(NAMES)


def test_two_jobs_of_the_same_shard(paths: Results, asked: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one begins and ends while the first is on its last batch: both end well, each lens is there once."""
    fit = batch.fit_lenses

    def while_another_works(task: Task) -> xr.Dataset:
        if "e" in task.names:
            monkeypatch.setattr(batch, "fit_lenses", fit)
            fit_shard(config(), paths, 0)
        return fit(task)

    monkeypatch.setattr(batch, "fit_lenses", while_another_works)
    stored = run(config(), paths, (0, 1))
    assert stored["lens"].to_numpy().tolist() == list(NAMES)
    assert not list(paths.fit.glob("parts/*/*"))


def test_a_store_is_brought_back_after_a_kill_between_its_two_renames(paths: Results, asked: Counter[str]) -> None:
    first = run(config(), paths, (0, 1))
    store = paths.store(0)
    store.rename(store.with_name(f".{store.name}.12345678.retired"))
    xr.testing.assert_identical(run(config(), paths, (0, 1)), first)
    assert asked == Counter(NAMES)
    assert not list(paths.fit.glob(".*.retired"))


def test_refit_by_a_condition(paths: Results, asked: Counter[str]) -> None:
    """The chosen lens has its new draws, also after later runs; the others keep theirs."""
    first = run(config(), paths, (0, 1))
    paths.summary.parent.mkdir()
    table = pd.DataFrame({"name": NAMES, "status": "ok", "flags": "", "ess_bulk_min": [500, 300, *[500] * 5]})
    table.to_csv(paths.summary, index=False)
    manifests = {shard: paths.manifest(shard).read_bytes() for shard in (0, 1)}
    assert refit_lenses(config(), paths, [], "ess_bulk_min < 400", 4) == (["b"], {})
    assert paths.manifest(0).read_bytes() != manifests[0], "Snakemake would not see that there is a new result"
    assert paths.manifest(1).read_bytes() == manifests[1]
    refitted = paths.manifest(0).read_bytes()
    again = run(config(), paths, (0, 1))
    assert paths.manifest(0).read_bytes() == refitted
    assert asked == Counter(NAMES) + Counter("b")
    assert again["draws_factor"].to_numpy().tolist() == [1, 4, 1, 1, 1, 1, 1]
    assert not np.array_equal(again["theta_E"].sel(lens="b"), first["theta_E"].sel(lens="b"))
    xr.testing.assert_identical(again.drop_sel(lens="b"), first.drop_sel(lens="b"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no lens to fit again"),
        (["nobody"], "nobody: no such lens"),
        (["--where", "ess_bulk < 400"], "name 'ess_bulk' is not defined"),
        (["--where", "ess_bulk_min < 4"], "no lens to fit again"),
    ],
)
def test_refit_says_what_is_wrong(arguments: list[str], said: str, paths: Results) -> None:
    paths.summary.parent.mkdir()
    pd.DataFrame({"name": NAMES, "status": "ok", "ess_bulk_min": 500}).to_csv(paths.summary, index=False)
    done = CliRunner().invoke(app, ["refit", *arguments, "--config", "{}", "--results", str(paths.root)])
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())


def test_a_refit_of_what_cannot_be_fitted_says_so(paths: Results, asked: Counter[str]) -> None:
    """The command names the lens and the reason; a result that there was stays."""
    table = pd.read_csv(paths.catalogue.with_name("lenses.csv"), keep_default_na=False)
    table.loc[table["name"] == "c", ["status", "reason", "bucket"]] = ["unusable", "no PSF", ""]
    table.to_csv(paths.catalogue.with_name("lenses.csv"), index=False)
    run(config(), paths, (0, 1))
    done = CliRunner().invoke(
        app, ["refit", "c", "a", "--config", config().model_dump_json(), "-r", str(paths.root), "--workers", "1"]
    )
    assert done.exit_code == 1
    assert "c: not fitted: no PSF" in done.output
    assert "fitted again: a" in done.output
    assert asked == Counter("abdefg") + Counter("a")


def test_batches_go_on_as_they_were_begun(paths: Results, asked: Counter[str]) -> None:
    """From their checkpoints, whatever batches would be made now; not those of other settings, nor twice."""
    lenses = read_catalogue(paths.catalogue)
    hashes = resume.lens_hashes(config(), paths, lenses)

    def planned(size: int, of: Config) -> list[Task]:
        own = of.model_copy(update={"fit": of.fit.model_copy(update={"batch_size": size})})
        return plan(own, paths, 0, lenses, hashes, 1)

    first, second, third = (batch_checkpoint(task) for task in planned(3, config()))
    second.save({})
    third.save({})
    names = [task.names for task in planned(5, config())]
    assert names == [("g",), ("d", "e", "f"), ("a", "b", "c")]
    assert [batch_checkpoint(task).path for task in planned(5, config())[:2]] == [third.path, second.path]
    assert [task.names for task in planned(2, config())] == [("g",), ("a", "b"), ("c", "d"), ("e", "f")], (
        "too large now"
    )
    first.key["hashes"] = ["other"] * 3
    first.save({})
    second.path.write_text("broken")
    assert [task.names for task in planned(5, config())] == [("g",), ("a", "b", "c", "d", "e"), ("f",)]
    run(config(shard_size=7), paths, (0,))
    assert list(paths.checkpoints.iterdir()) == [second.path]  # of which none can say whose it is; others are removed


def test_what_a_killed_process_left_of_a_store_goes(paths: Results, asked: Counter[str]) -> None:
    half = paths.fit / ".shard-0000.zarr.0123abcd.partial"
    half.mkdir(parents=True)
    run(config(), paths, (0, 1))
    assert not half.exists()


def test_a_store_that_cannot_be_read_now_is_not_removed(paths: Results, asked: Counter[str]) -> None:
    """One beyond the shards of this run, whose results were not taken over yet."""
    run(config(shard_size=2), paths, (0, 1, 2, 3))
    record = paths.store(3) / "zarr.json"
    whole = record.read_bytes()
    record.write_bytes(b"")
    run(config(), paths, (0, 1))
    assert paths.store(3).exists()
    record.write_bytes(whole)
    run(config(), paths, (0, 1))
    assert not paths.store(3).exists()


def test_a_lens_in_two_manifests_is_named(paths: Results, asked: Counter[str]) -> None:
    """As where shards got another size and only some of them were fitted again."""
    run(config(), paths, (0, 1))
    run(config(shard_size=6), paths, (0,))
    with pytest.raises(InputError, match=r"the lens f is in shard-0000.csv and shard-0001.csv; run the stage fit"):
        read_manifests(paths.fit)


def test_a_condition_on_texts_that_are_all_empty(tmp_path: Path) -> None:
    paths = Results(tmp_path)
    paths.summary.parent.mkdir()
    pd.DataFrame({"name": ["a", "b"], "notes": ["", ""], "r_hat_max": [1.2, 1.0]}).to_csv(paths.summary, index=False)
    assert chosen_where(paths, "notes.str.contains('sky')") == []
    assert chosen_where(paths, "r_hat_max > 1.05") == ["a"]


def test_a_refit_with_other_settings_is_refused(paths: Results, asked: Counter[str]) -> None:
    """Such as the defaults, where --config was forgotten: all results would be replaced."""
    first = run(config(), paths, (0, 1))
    with pytest.raises(InputError, match=r"shard-0000.zarr: none of its 5 results is of these settings, .*--config"):
        refit_lenses(config(draws=30), paths, ["a"], None, 4)
    xr.testing.assert_identical(run(config(), paths, (0, 1)), first)
    assert asked == Counter(NAMES)


def test_checkpoints_of_lenses_that_are_tried_again_stay(
    paths: Results, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of lenses whose workers died; one of lenses that shards no longer have together goes."""
    hashes = resume.lens_hashes(config(), paths, read_catalogue(paths.catalogue))

    def begun(*names: str) -> Path:
        own = tuple(hashes.get(name, "") for name in names)
        checkpoint = batch_checkpoint(Task(config().model_dump_json(), paths, BUCKET, names, own))
        checkpoint.save({})
        return checkpoint.path

    died, done, apart, gone, other = begun("a"), begun("b"), begun("e", "f"), begun("a", "nobody"), begun("g")

    def deadly(
        tasks: Sequence[Task], work: Callable[[Task], Result], *_: object
    ) -> Iterator[tuple[Task, Result | None, str]]:
        for task in tasks:
            yield (task, None, "every worker died") if "a" in task.names else (task, work(task), "")

    monkeypatch.setattr(cluster, "run", deadly)
    fit_shard(config(), paths, 0)
    assert sorted(paths.checkpoints.iterdir()) == sorted([died, other])
    assert not any(path.exists() for path in (done, apart, gone))


def test_a_refit_leaves_lenses_alone_that_are_not_fitted_yet(paths: Results, asked: Counter[str]) -> None:
    """They are fitted with it, as the shard is not done without them, but with as many draws as always."""
    refit_lenses(config(), paths, ["b"], None, 4)
    found = open_posteriors(paths.fit).sortby("lens").load()
    assert found["draws_factor"].to_numpy().tolist() == [1, 4, 1, 1, 1]
