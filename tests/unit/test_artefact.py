"""Outputs are whole or not there, whoever else writes them at the same time."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import pytest

from lenspipe import artefact
from lenspipe.errors import LenspipeError


def folder(at: Path, text: str) -> Path:
    """A folder with one file that says so."""
    at.mkdir()
    (at / "file").write_text(text)
    return at


def names(at: Path) -> list[str]:
    return sorted(path.name for path in at.iterdir())


def test_a_file_or_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old")
    folder(tmp_path / "several", "old")
    with artefact.written_whole(tmp_path / "one") as new:
        new.write_text("new")
        assert (tmp_path / "one").read_text() == "old"
    with artefact.written_whole(tmp_path / "several") as new:
        folder(new, "new")
        assert (tmp_path / "several/file").read_text() == "old"
    assert (tmp_path / "one").read_text() == (tmp_path / "several/file").read_text() == "new"
    assert names(tmp_path) == ["one", "several"]


def test_what_was_not_finished_leaves_the_older_one(tmp_path: Path) -> None:
    folder(tmp_path / "several", "old")
    with suppress(ZeroDivisionError), artefact.written_whole(tmp_path / "several") as new:
        folder(new, "half")
        raise ZeroDivisionError
    assert (tmp_path / "several/file").read_text() == "old"
    assert names(tmp_path) == ["several"]


def fill_the_disk(target: Path) -> None:
    with artefact.written_whole(target) as new:
        new.mkdir()
        Path("/dev/full").write_bytes(b"a byte too many")


def test_a_folder_in_the_place_of_a_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "table.tex").mkdir()
    with (
        pytest.raises(LenspipeError, match=r"/table\.tex: cannot write here \(Is a directory\); give another name"),
        artefact.written_whole(tmp_path / "table.tex") as new,
    ):
        new.write_text("a table")
    assert [path.name for path in tmp_path.iterdir()] == ["table.tex"]


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    """And what was there stays."""
    target = tmp_path / "shard-0000.zarr"
    target.mkdir()
    with pytest.raises(LenspipeError, match=r"shard-0000\.zarr: no space left"):
        fill_the_disk(target)
    assert list(tmp_path.iterdir()) == [target]


def test_another_job_puts_its_folder_there_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the removal of the old folder and the arrival of the new one, twice: the later wins, nothing is left."""
    target, own, others = folder(tmp_path / "several", "old"), Path.rename, iter(["theirs", "theirs again"])

    def rename(path: Path, to: Path) -> Path:
        if to == target and (text := next(others, "")):
            folder(target, text)
        return own(path, to)

    with artefact.written_whole(target) as new:
        folder(new, "ours")
        monkeypatch.setattr(Path, "rename", rename)
    assert (target / "file").read_text() == "ours"
    assert names(tmp_path) == ["several"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_job_killed_between_two_folders_loses_neither(tmp_path: Path, replaced: bool) -> None:
    """What it had moved away comes back, but not in the place of what is there."""
    target = tmp_path / "several"
    folder(tmp_path / f".several.12345678{artefact.RETIRED}", "old")
    if replaced:
        folder(target, "new")
    artefact.restore(target)
    assert (target / "file").read_text() == ("new" if replaced else "old")


def test_one_job_at_a_time(tmp_path: Path) -> None:
    target, inside, entered = tmp_path / "store", threading.Event(), threading.Event()

    def second() -> None:
        inside.set()
        with artefact.alone(target):
            entered.set()

    other = threading.Thread(target=second)
    with artefact.alone(target):
        other.start()
        assert inside.wait(10)
        assert not entered.wait(0.3)
    assert entered.wait(10)
    other.join()
