"""Fetching COSMOS samples, from a server of this process: whole, broken and resumed, refused, unpacked."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from lenspipe.cli import app
from lenspipe.config import RealGalaxyCatalogInput, load_config
from lenspipe.errors import InputError, LenspipeError
from lenspipe.galaxies import fetch
from lenspipe.galaxies.fetch import fetch_sample

NAME = "COSMOS_23.5_training_sample"
ARCHIVE, PART, CATALOGUE = f"{NAME}.tar.gz", f"{NAME}.tar.gz.part", "real_galaxy_catalog_23.5.fits"
STAMPS = "real_galaxy_images_23.5_n1.fits"
CONTENT = {
    f"{NAME}/{CATALOGUE}": b"catalogue" * 100,
    f"{NAME}/{STAMPS}": np.random.default_rng(3).bytes(60_000),  # not compressible: the archive is as large
}


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WHOLE = packed(CONTENT)


@dataclass
class Zenodo:
    """A record with one archive, and how its server behaves."""

    address: str
    archive: bytes = WHOLE
    entry: dict[str, Any] = field(default_factory=dict)  # replaces keys of the file's entry in the record
    page: bytes | None = None  # instead of the record
    breaks: list[int] = field(default_factory=list)  # bytes of the body after which the next answers are cut off
    statuses: list[int] = field(default_factory=list)  # of the next answers about the archive, without a body
    ranges: str = "kept"  # or "ignored", "refused" (416), "elsewhere" (206, from byte 0)
    asked: list[str | None] = field(default_factory=list)  # the Range header of every request for the archive
    sent: list[int] = field(default_factory=list)  # bytes of the archive sent in answer to each
    encodings: list[str | None] = field(default_factory=list)  # the Accept-Encoding header of each
    records: int = 0  # requests for the record

    @property
    def record(self) -> str:
        return f"{self.address}/api/records/1"

    def record_page(self) -> bytes:
        entry = {
            "key": ARCHIVE,
            "size": len(self.archive),
            "checksum": f"md5:{hashlib.md5(self.archive).hexdigest()}",
            "links": {"self": f"{self.address}/api/records/1/files/{ARCHIVE}/content"},
        }
        other = entry | {"key": "README.txt", "size": 1}
        return json.dumps({"id": 1, "files": [other, entry | self.entry]}).encode()

    def answer(self, asked: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request of the archive."""
        self.asked.append(asked)
        if self.statuses:
            return self.statuses.pop(0), {}, b""
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if not begin or self.ranges == "ignored":
            return 200, {}, self.archive
        if begin >= len(self.archive) or self.ranges == "refused":
            return 416, {}, b""
        begin = 0 if self.ranges == "elsewhere" else begin
        end = len(self.archive) - 1
        return 206, {"Content-Range": f"bytes {begin}-{end}/{end + 1}"}, self.archive[begin:]


@pytest.fixture
def zenodo() -> Iterator[Zenodo]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/records/1":
                record.records += 1
                self.reply(200, {}, record.page or record.record_page(), None)
            elif self.path == f"/api/records/1/files/{ARCHIVE}/content":
                record.encodings.append(self.headers["Accept-Encoding"])
                status, headers, body = record.answer(self.headers["Range"])
                cut = record.breaks.pop(0) if record.breaks and body else None
                record.sent.append(len(body[:cut]))
                self.reply(status, headers, body, cut)
            else:
                self.reply(404, {}, b"", None)

        def reply(self, status: int, headers: dict[str, str], body: bytes, cut: int | None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    record = Zenodo(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield record
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Small blocks, no proxies, no waiting: the pauses that were made are listed instead."""
    made: list[float] = []
    monkeypatch.setattr(fetch, "BLOCK", 1000)
    monkeypatch.setattr(fetch, "PAUSES", (1.0, 2.0, 4.0))
    monkeypatch.setattr(fetch.time, "sleep", made.append)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return made


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sample_is_fetched_whole(zenodo: Zenodo, tmp_path: Path) -> None:
    folder = tmp_path / "data/cosmos"
    assert fetch_sample("23.5", folder, zenodo.record) == folder / NAME / CATALOGUE
    assert files_below(folder) == CONTENT
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert (zenodo.asked, zenodo.sent) == ([None], [len(WHOLE)])
    assert zenodo.encodings == ["identity"]


def test_a_second_call_asks_for_nothing(zenodo: Zenodo, tmp_path: Path) -> None:
    first = fetch_sample("23.5", tmp_path, zenodo.record)
    before = (tmp_path / NAME / STAMPS).stat().st_mtime_ns
    assert fetch_sample("23.5", tmp_path, zenodo.record) == first
    assert (zenodo.records, len(zenodo.asked)) == (1, 1)
    assert (tmp_path / NAME / STAMPS).stat().st_mtime_ns == before


def test_a_kept_archive_is_unpacked_again_without_a_download(zenodo: Zenodo, tmp_path: Path) -> None:
    fetch_sample("23.5", tmp_path, zenodo.record, keep_archive=True)
    assert (tmp_path / ARCHIVE).read_bytes() == WHOLE
    shutil.rmtree(tmp_path / NAME)
    fetch_sample("23.5", tmp_path, zenodo.record, keep_archive=True)
    assert files_below(tmp_path) == {**CONTENT, ARCHIVE: WHOLE}
    assert len(zenodo.asked) == 1


def test_the_archive_may_have_no_folder_of_that_name(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.archive = packed({CATALOGUE: b"table", "deep/other.txt": b"other"})
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert files_below(tmp_path) == {f"{NAME}/{CATALOGUE}": b"table", f"{NAME}/deep/other.txt": b"other"}


def test_a_broken_transfer_goes_on_in_the_next_call(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PAUSES", ())
    zenodo.breaks = [25_000]
    message = rf"{ARCHIVE}/content: broke at byte 25000 of {len(WHOLE)} .* give the same command again"
    with pytest.raises(InputError, match=message):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert files_below(tmp_path) == {PART: WHOLE[:25_000]}
    fetch_sample("23.5", tmp_path, zenodo.record, keep_archive=True)
    assert zenodo.asked == [None, "bytes=25000-"]
    assert zenodo.sent == [25_000, len(WHOLE) - 25_000]
    assert files_below(tmp_path) == {**CONTENT, ARCHIVE: WHOLE}


def test_a_connection_that_drops_is_taken_up_in_the_same_call(
    zenodo: Zenodo, tmp_path: Path, pauses: list[float]
) -> None:
    zenodo.breaks = [10_000, 20_000]
    fetch_sample("23.5", tmp_path, zenodo.record, keep_archive=True)
    assert zenodo.asked == [None, "bytes=10000-", "bytes=30000-"]
    assert zenodo.sent == [10_000, 20_000, len(WHOLE) - 30_000]
    assert (tmp_path / ARCHIVE).read_bytes() == WHOLE
    assert pauses == [1.0, 2.0]


def test_tries_are_bounded(zenodo: Zenodo, tmp_path: Path, pauses: list[float]) -> None:
    zenodo.breaks = [1000] * 100
    with pytest.raises(InputError, match="broke at byte 4000 of"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert len(zenodo.asked) == 4
    assert pauses == [1.0, 2.0, 4.0]
    assert files_below(tmp_path) == {PART: WHOLE[:4000]}


def test_an_overloaded_server_is_asked_again(zenodo: Zenodo, tmp_path: Path, pauses: list[float]) -> None:
    zenodo.statuses = [503, 429]
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.sent == [0, 0, len(WHOLE)]
    assert pauses == [1.0, 2.0]
    assert files_below(tmp_path) == CONTENT


def test_a_server_without_ranges_sends_everything(zenodo: Zenodo, tmp_path: Path) -> None:
    """What is there is kept until it has been replaced, so that a second break, earlier on, does not shorten it."""
    zenodo.ranges, zenodo.breaks = "ignored", [30_000, 5000]
    fetch_sample("23.5", tmp_path, zenodo.record, keep_archive=True)
    assert zenodo.asked == [None, "bytes=30000-", "bytes=30000-"]
    assert zenodo.sent == [30_000, 5000, len(WHOLE)]
    assert (tmp_path / ARCHIVE).read_bytes() == WHOLE


@pytest.mark.parametrize("ranges", ["refused", "elsewhere"])
def test_a_range_that_is_not_given_begins_anew(zenodo: Zenodo, tmp_path: Path, ranges: str) -> None:
    zenodo.ranges, zenodo.breaks = ranges, [30_000]
    fetch_sample("23.5", tmp_path, zenodo.record, keep_archive=True)
    assert zenodo.asked == [None, "bytes=30000-", None]
    assert (tmp_path / ARCHIVE).read_bytes() == WHOLE


def test_a_whole_download_is_only_checked(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(WHOLE)
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.asked == []
    assert files_below(tmp_path) == CONTENT


def test_a_file_that_has_changed_meanwhile_is_found_by_its_checksum(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(b"older" * 1000)
    with pytest.raises(InputError, match=r"expected md5 .* it has been removed"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.asked == ["bytes=5000-"]
    assert files_below(tmp_path) == {}
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.asked == ["bytes=5000-", None]
    assert files_below(tmp_path) == CONTENT


def test_a_wrong_checksum_removes_the_download(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.entry = {"checksum": f"md5:{'0' * 32}"}
    found = hashlib.md5(WHOLE).hexdigest()
    with pytest.raises(InputError, match=rf"{PART}: expected md5 {'0' * 32}, found {found}; it has been removed"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.sent == [len(WHOLE)]
    assert files_below(tmp_path) == {}


def test_a_wrong_length_removes_the_download(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.entry = {"size": len(WHOLE) - 10}
    with pytest.raises(InputError, match=rf"expected {len(WHOLE) - 10} bytes, found {len(WHOLE)}; it has been removed"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert files_below(tmp_path) == {}


def test_an_archive_that_is_there_and_not_the_record_s_is_left_alone(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"mine")
    with pytest.raises(InputError, match=rf"{ARCHIVE}: expected {len(WHOLE)} bytes, found 4; move it away"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert files_below(tmp_path) == {ARCHIVE: b"mine"}
    assert zenodo.asked == []


def test_a_folder_of_that_name_without_a_catalogue_is_left_alone(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=rf"{NAME}: holds no {CATALOGUE}; move it away"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert files_below(tmp_path) == {f"{NAME}/mine.txt": b"mine"}
    assert zenodo.records == 0


def test_room_on_the_disk_is_checked_before_anything_is_written(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(WHOLE) + round(1.6 * len(WHOLE))
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(LenspipeError, match=r"below: .* kB free, but .* are to come and its files take about .* kB"):
        fetch_sample("23.5", tmp_path / "below", zenodo.record)
    assert zenodo.asked == []
    assert list(tmp_path.iterdir()) == []
    free = needed
    fetch_sample("23.5", tmp_path / "below", zenodo.record)
    assert files_below(tmp_path / "below") == CONTENT


def test_room_is_needed_for_the_rest_alone(zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PART).write_bytes(WHOLE[:40_000])
    needed = len(WHOLE) - 40_000 + round(1.6 * len(WHOLE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.asked == ["bytes=40000-"]
    assert files_below(tmp_path) == CONTENT


class FullDisk:
    """A file on a disk with room for so many bytes of it."""

    def __init__(self, stream: Any, room: int) -> None:
        self.stream, self.room = stream, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, block: bytes) -> int:
        if self.stream.tell() + len(block) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.stream.write(block))


def test_a_disk_that_fills_keeps_what_has_come(zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        stream = plain(path, mode, **options)
        return FullDisk(stream, 20_000) if path.name == PART and mode == "r+b" else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(LenspipeError, match=r"the disk is full; .* same command again"):
            fetch_sample("23.5", tmp_path, zenodo.record)
    assert len(zenodo.asked) == 1
    assert files_below(tmp_path) == {PART: WHOLE[:20_000]}
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.asked == [None, "bytes=20000-"]
    assert files_below(tmp_path) == CONTENT


def test_a_disk_that_fills_while_unpacking_keeps_the_archive(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", full)
        with pytest.raises(LenspipeError, match="the disk is full"):
            fetch_sample("23.5", tmp_path, zenodo.record)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert len(zenodo.asked) == 1
    assert files_below(tmp_path) == CONTENT


def test_a_killed_unpacking_leaves_no_half_sample(zenodo: Zenodo, tmp_path: Path) -> None:
    """What it left under the temporary name is swept away, and the archive unpacked again."""
    (tmp_path / ARCHIVE).write_bytes(WHOLE)
    half = tmp_path / f".{NAME}.unpacking" / NAME
    half.mkdir(parents=True)
    (half / "half.fits").write_bytes(b"half")
    fetch_sample("23.5", tmp_path, zenodo.record)
    assert files_below(tmp_path) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert zenodo.asked == []


@pytest.mark.parametrize("damaged", [WHOLE[:40_000], WHOLE[:20] + b"\xff" * 200 + WHOLE[220:], b"no archive"])
def test_a_damaged_archive_leaves_no_sample(zenodo: Zenodo, tmp_path: Path, damaged: bytes) -> None:
    zenodo.archive = damaged
    with pytest.raises(InputError, match=rf"{ARCHIVE}: cannot be unpacked \(.+\), though its checksum is the record's"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.sent == [len(damaged)]
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


def test_an_archive_without_the_catalogue_is_refused(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.archive = packed({f"{NAME}/{STAMPS}": b"stamps"})
    with pytest.raises(InputError, match=f"{ARCHIVE}: holds no {CATALOGUE}"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("outside", ["../stray.txt", f"{NAME}/../../../stray.txt"])
def test_a_member_outside_the_folder_is_refused(zenodo: Zenodo, tmp_path: Path, outside: str) -> None:
    zenodo.archive = packed({**CONTENT, outside: b"stray"})
    folder = tmp_path / "cosmos"
    with pytest.raises(InputError, match=r"cannot be unpacked \(.*stray.txt.* outside"):
        fetch_sample("23.5", folder, zenodo.record)
    assert files_below(tmp_path) == {f"cosmos/{ARCHIVE}": zenodo.archive}


def test_an_unknown_sample_is_refused(zenodo: Zenodo, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sample 24: no such COSMOS sample; give one of 23\.5, 25\.2"):
        fetch_sample("24", tmp_path, zenodo.record)
    assert zenodo.records == 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="tarfile itself needs its filters from Python 3.14 on")
@pytest.mark.filterwarnings("ignore:.*filter.*:DeprecationWarning")  # of Python 3.12 and 3.13
def test_a_python_without_filters_unpacks_as_safely(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    assert fetch_sample("23.5", tmp_path / "cosmos", zenodo.record).read_bytes() == CONTENT[f"{NAME}/{CATALOGUE}"]
    zenodo.archive = packed({**CONTENT, "../stray.txt": b"stray"})
    with pytest.raises(InputError, match=r"cannot be unpacked \(.*stray.txt is outside"):
        fetch_sample("23.5", tmp_path / "other", zenodo.record)
    assert not list(tmp_path.rglob("stray.txt"))


def test_a_link_is_refused(zenodo: Zenodo, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        link = tarfile.TarInfo(f"{NAME}/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/tmp"
        tar.addfile(link)
    zenodo.archive = buffer.getvalue()
    with pytest.raises(InputError, match="link is neither a file nor a folder"):
        fetch_sample("23.5", tmp_path / "cosmos", zenodo.record)
    assert files_below(tmp_path) == {f"cosmos/{ARCHIVE}": zenodo.archive}


def test_the_other_sample_is_another_file(zenodo: Zenodo, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"no file COSMOS_25\.2_training_sample\.tar\.gz; found README\.txt, {ARCHIVE}"
    ):
        fetch_sample("25.2", tmp_path, zenodo.record)
    assert zenodo.asked == []


@pytest.mark.parametrize("page", [b"<html>portal</html>", b"{}", b"[]", b'{"files": {"enabled": true}}'])
def test_an_address_that_is_no_record_is_refused(zenodo: Zenodo, tmp_path: Path, page: bytes) -> None:
    zenodo.page = page
    with pytest.raises(InputError, match=f"{zenodo.record}: expected a record of Zenodo's REST API"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.records == 1


@pytest.mark.parametrize("checksum", ["0" * 32, "md17:00", None])
def test_a_checksum_of_another_kind_is_refused(zenodo: Zenodo, tmp_path: Path, checksum: str | None) -> None:
    zenodo.entry = {"checksum": checksum}
    with pytest.raises(InputError, match="expected a record of Zenodo's REST API"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert zenodo.asked == []


def test_an_address_that_is_not_found_is_named(zenodo: Zenodo, tmp_path: Path, pauses: list[float]) -> None:
    absent = f"{zenodo.address}/api/records/2"
    with pytest.raises(InputError, match=f"{absent}: the server answered 404 Not Found"):
        fetch_sample("23.5", tmp_path, absent)
    zenodo.statuses = [404]
    with pytest.raises(InputError, match=f"{ARCHIVE}/content: the server answered 404 Not Found"):
        fetch_sample("23.5", tmp_path, zenodo.record)
    assert (len(zenodo.asked), pauses) == (1, [])
    assert files_below(tmp_path) == {}


def test_a_record_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/api/records/1"
    with pytest.raises(InputError, match=rf"{address}: no answer \(.*Connection refused\); check the network"):
        fetch_sample("23.5", tmp_path / "cosmos", address)
    with pytest.raises(InputError, match=r"zenodo: no answer .*No scheme"):
        fetch_sample("23.5", tmp_path / "cosmos", "zenodo")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LenspipeError, match=rf"{tmp_path}/file/below: cannot write here \(Not a directory\)"):
        fetch_sample("23.5", tmp_path / "file/below", zenodo.record)

    def forbidden(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(
        LenspipeError, match=rf"{tmp_path}/cosmos: cannot write here \(Permission denied\); give another"
    ):
        fetch_sample("23.5", tmp_path / "cosmos", zenodo.record)
    assert zenodo.asked == []


def test_the_command_says_what_to_write_into_the_config(zenodo: Zenodo, tmp_path: Path) -> None:
    folder = tmp_path / "COSMOS: [red] # é"
    command = ["fetch-galaxies", "--sample", "23.5", "--to", str(folder), "--record", zenodo.record]
    done = CliRunner().invoke(app, [*command, "--keep-archive"])
    assert done.exit_code == 0, done.output
    assert files_below(folder) == {**CONTENT, ARCHIVE: WHOLE}
    assert f"galaxies: {folder / NAME};" in done.stderr
    (given,) = load_config({"galaxies": {"inputs": yaml.safe_load(done.stdout)}}).galaxies.inputs
    assert isinstance(given, RealGalaxyCatalogInput)
    assert (given.catalogue, given.sample) == (str(folder / NAME / CATALOGUE), "23.5")


def test_the_command_prints_errors_as_one_message(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.entry = {"key": "other.tar.gz"}
    done = CliRunner().invoke(app, ["fetch-galaxies", "--to", str(tmp_path), "--record", zenodo.record])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"error: {zenodo.record}: has no file {ARCHIVE}; found README.txt, other.tar.gz; give another record"
    ]
    assert done.stdout == ""
