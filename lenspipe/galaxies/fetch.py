"""The COSMOS training samples of GREAT3 and GalSim, fetched from their public record (DOI 10.5281/zenodo.3242143).

Length and checksum of an archive are those of the record. A download that breaks stays as `<archive>.part` and the next
one goes on behind it; the checksum tells where the file has changed meanwhile. A sample is unpacked under a temporary
name and renamed: its folder is whole or not there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path
from typing import get_args

import requests
import rich.progress
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from lenspipe.errors import InputError, LenspipeError
from lenspipe.galaxies.exclusion import Sample

RECORD = "https://zenodo.org/api/records/3242143"
UNPACKED_PER_PACKED = 1.6  # estimate: sample 25.2 has 4 GB packed and 6 GB unpacked
BLOCK = 1 << 16  # [bytes] written at once
TIMEOUT = (10.0, 60.0)  # [s] for the connection, for the next bytes
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # [s] before each further try
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Archive:
    """A packed sample, as the record describes it."""

    name: str
    url: str
    size: int  # [bytes]
    algorithm: str  # of the checksum, as hashlib calls it
    digest: str  # the checksum, hexadecimal


def fetch_sample(sample: str, folder: Path, record: str = RECORD, keep_archive: bool = False) -> Path:
    """Path of the catalogue of a COSMOS sample ("23.5", "25.2"); what is not in `folder` is downloaded and unpacked.

    record: its address in Zenodo's REST API. Raises InputError for an unknown sample, an address that does not answer
    and a file that is not the record's, LenspipeError where the disk has no room or cannot be written to.
    """
    if sample not in get_args(Sample):
        raise InputError(f"sample {sample}: no such COSMOS sample; give one of {', '.join(get_args(Sample))}")
    target = folder / f"COSMOS_{sample}_training_sample"
    catalogue = target / f"real_galaxy_catalog_{sample}.fits"
    with _plain_disk_errors(folder):
        if catalogue.is_file():
            return catalogue
        if target.exists():
            raise InputError(f"{target}: holds no {catalogue.name}; move it away, or give another folder")
        archive = _find_archive(record, f"{target.name}.tar.gz")
        _check_space(archive, folder)
        folder.mkdir(parents=True, exist_ok=True)
        packed = _download(archive, folder)
        _unpack(packed, catalogue)
        if not keep_archive:
            packed.unlink()
    return catalogue


@contextmanager
def _plain_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LenspipeError(
                f"{folder}: the disk is full; what has been downloaded stays: free some space and give the same "
                "command again, it goes on from there"
            ) from None
        raise LenspipeError(
            f"{error.filename or folder}: cannot write here ({error.strerror or error}); "
            "give another folder, or the right to write in this one"
        ) from None


def _find_archive(record: str, name: str) -> Archive:
    """The file of that name in a record. Raises InputError where the address has no such record or file."""
    answer = _read_record(record)
    try:
        files = {file["key"]: file for file in json.loads(answer)["files"]}
        if name not in files:
            raise InputError(f"{record}: has no file {name}; found {', '.join(files) or 'none'}; give another record")
        algorithm, digest = files[name]["checksum"].split(":")
        hashlib.new(algorithm, usedforsecurity=False)
        return Archive(name, files[name]["links"]["self"], int(files[name]["size"]), algorithm, digest)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{record}: expected a record of Zenodo's REST API, its answer is none ({error!r}); give another record"
        ) from None


def _read_record(record: str) -> bytes:
    try:
        with requests.get(record, headers={"Accept": "application/json"}, timeout=TIMEOUT) as response:
            _check_status(response)
            return response.content
    except requests.RequestException as error:
        raise InputError(f"{record}: no answer ({_reason(error)}); check the network and the address") from None


def _check_space(archive: Archive, folder: Path) -> None:
    """Raise LenspipeError where the disk has no room for the rest of an archive and, as estimated, its files."""
    there = max(_length(folder / archive.name), _length(folder / f"{archive.name}.part"))
    rest, unpacked = max(0, archive.size - there), round(UNPACKED_PER_PACKED * archive.size)
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < rest + unpacked:
        raise LenspipeError(
            f"{folder}: {decimal(free)} free, but {decimal(rest)} of {archive.name} are to come and its files take "
            f"about {decimal(unpacked)}; free some space, or give another folder"
        )


def _download(archive: Archive, folder: Path) -> Path:
    """Path of the archive, of the record's length and checksum; one that is there already is only checked."""
    packed, part = folder / archive.name, folder / f"{archive.name}.part"
    if packed.is_file():
        if fault := _fault(archive, packed):
            raise InputError(f"{packed}: {fault}; move it away, and it is fetched anew")
        return packed
    if _length(part) < archive.size:
        _fetch(archive, part)
    if fault := _fault(archive, part):
        part.unlink()
        raise InputError(f"{part}: {fault}; it has been removed: give the same command again to fetch it anew")
    return part.rename(packed)


def _fetch(archive: Archive, part: Path) -> None:
    """Bring `part` to an archive's length. Raises InputError where the transfer still breaks after all pauses."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console) as progress:
        task = progress.add_task(archive.name, total=archive.size, completed=_length(part))
        for pause in (*PAUSES, None):
            try:
                for length in _transfer(archive, part):
                    progress.update(task, completed=length)
                return
            except requests.RequestException as error:
                broken = f"{archive.url}: broke at byte {_length(part)} of {archive.size} ({_reason(error)})"
            if pause is None:
                raise InputError(f"{broken}; check the network and give the same command again, it goes on from there")
            console.print(f"{broken}; next try in {pause:g} s")
            time.sleep(pause)


def _transfer(archive: Archive, part: Path) -> Iterator[int]:
    """Write what `part` lacks, or everything over it where the server has no ranges; yields the length reached [bytes].

    `part` never gets shorter by a transfer, so that one that breaks early costs nothing.
    """
    begin = _length(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
    with requests.get(archive.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if begin and _lacks_range(response, begin):
            part.unlink()
            raise requests.ConnectionError(f"the server has no range from byte {begin} on; beginning anew")
        _check_status(response)
        part.touch()
        with part.open("r+b") as stream:
            stream.seek(begin if response.status_code == 206 else 0)
            for block in response.iter_content(BLOCK):
                stream.write(block)
                yield stream.tell()
    if _length(part) < archive.size:
        raise requests.ConnectionError("the server ended it")


def _lacks_range(response: requests.Response, begin: int) -> bool:
    elsewhere = not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
    return response.status_code == 416 or (response.status_code == 206 and elsewhere)


def _check_status(response: requests.Response) -> None:
    answer = f"{response.status_code} {response.reason}"
    if response.status_code >= 500 or response.status_code == 429:
        raise requests.ConnectionError(answer)
    if response.status_code not in (200, 206):
        raise InputError(f"{response.url}: the server answered {answer}; check the address of the record")


def _fault(archive: Archive, path: Path) -> str | None:
    """How a file differs from the record's, in length or checksum; None where it does not."""
    if _length(path) != archive.size:
        return f"expected {archive.size} bytes, found {_length(path)}"
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.new(archive.algorithm, usedforsecurity=False)).hexdigest()
    return None if found == archive.digest else f"expected {archive.algorithm} {archive.digest}, found {found}"


def _unpack(packed: Path, catalogue: Path) -> None:
    """Unpack an archive; the folder in it that holds the catalogue becomes that of `catalogue`, in one step."""
    temporary = catalogue.parent.with_name(f".{catalogue.parent.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _extract(packed, temporary)
        found = next(temporary.rglob(catalogue.name), None)
        if found is None:
            raise InputError(f"{packed}: holds no {catalogue.name}; give another record")
        found.parent.rename(catalogue.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(packed: Path, folder: Path) -> None:
    """Extract an archive. Raises InputError where it is damaged or has a member outside the folder or a link."""
    try:
        with (
            rich.progress.open(packed, "rb", description="unpacking", console=console) as stream,
            tarfile.open(fileobj=stream, mode="r:gz") as members,
        ):
            members.extraction_filter = getattr(tarfile, "data_filter", None)  # there from Python 3.11.4 on
            for member in members:
                if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
                    raise tarfile.TarError(f"{member.name} is outside of the folder")
                if not (member.isfile() or member.isdir()):
                    raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
                members.extract(member, folder, set_attrs=False)
    except (tarfile.TarError, BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{packed}: cannot be unpacked ({error}), though its checksum is the record's; give another record"
        ) from None


def _length(path: Path) -> int:
    """Length of a file [bytes]; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _reason(error: requests.RequestException) -> str:
    """What is behind an error, without the address that requests puts before it."""
    return str(getattr(error.args[0], "reason", error)) if error.args else type(error).__name__
