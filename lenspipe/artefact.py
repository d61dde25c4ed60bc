"""What every output of a stage carries: its stage, settings, versions, git commit and the hashes of its inputs.

Outputs are written whole under a temporary name and then renamed, so that a killed or doubled job
leaves either the old output or the new one; of a folder, which cannot be replaced in one step, it may leave neither,
and `restore` brings back the old one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lenspipe.errors import InputError, LenspipeError

KEY = "lenspipe"
RETIRED = ".retired"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
UMASK = os.umask(0o022)
os.umask(UMASK)
PACKAGES = (
    "lenspipe",
    "torch",
    "pyro-ppl",
    "numpy",
    "astropy",
    "zarr",
    "arviz",
    "snakemake",
    "scipy",
    "scikit-image",
    "zuko",
)


def provenance(
    stage: str, settings: Mapping[str, Any], inputs: Iterable[Path] = (), seed: int | None = None, **facts: Any
) -> dict[str, Any]:
    """The record that goes into an artefact.

    `settings` maps section names to sections (pydantic models or plain values), `inputs` are the files and folders
    read, `facts` anything the stage measured and wants shown.
    """
    return {
        "stage": stage,
        "seed": seed,
        "settings": {
            name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            for name, value in settings.items()
        },
        "inputs": {str(path): content_hash(Path(path)) for path in inputs},
        "versions": versions(),
        "commit": git_commit(),
        "facts": facts,
    }


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """The commit of the checkout the package is run from, `+changes` where the package is another; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty.strip() else "")


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's file names and bytes. Raises InputError where it is missing."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def partial(target: Path, mark: str) -> Path:
    """Where `target` is while it is being written."""
    return target.with_name(f".{target.name}.{mark}.partial")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block ends without an error.

    The block may write a file or make a folder at the path. An existing target is replaced; of two jobs that write the
    same one, the later wins. Raises LenspipeError where the folder cannot be written to, or has no space left.
    """
    target = Path(target)
    temporary = partial(target, uuid.uuid4().hex[:8])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            temporary.chmod(0o666 & ~UMASK)  # some writers make files for their owner alone
            temporary.replace(target)
        else:
            _replace_folder(temporary, target)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise LenspipeError(
                f"{target}: no space left to write it; make space and run again, what is finished is kept"
            ) from None
        if not isinstance(error, REFUSED) and error.errno != errno.EROFS:
            raise
        raise LenspipeError(
            f"{error.filename2 or error.filename or target}: cannot write here ({error.strerror}); "
            "give another name or folder, or the right to write in this one"
        ) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def _replace_folder(temporary: Path, target: Path) -> None:
    """Move a folder to where another one may be, also while another job does the same."""
    while True:
        retired = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{RETIRED}")
        with suppress(FileNotFoundError):
            target.rename(retired)
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            break
    for old in target.parent.glob(f".{target.name}.*{RETIRED}"):
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Let jobs that would write the same target do so one after the other, where the file system has locks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def restore(target: Path) -> None:
    """Bring back the folder that was to be replaced where a killed job has left neither the old one nor the new."""
    for retired in target.parent.glob(f".{target.name}.*{RETIRED}"):
        if not target.exists():
            with suppress(FileNotFoundError):  # another job does the same
                retired.rename(target)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `provenance.json` into a folder of plain files."""
    write_json(Path(folder) / "provenance.json", record)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as a file of its own."""
    path.write_text(json.dumps({KEY: record}, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """The record of an artefact: a Zarr folder, a safetensors or HTML file, or what has a provenance.json beside it.

    Raises InputError where there is none or it cannot be read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    try:
        found = _found_record(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its record cannot be read ({error}); it is damaged, or not lenspipe's") from None
    if found is None:
        raise InputError(f"{path}: carries no record of lenspipe, nor does its folder")
    return found


def _found_record(path: Path) -> Any:
    """The record of what is there, None where it has none."""
    found: Any = None
    if (path / "zarr.json").is_file():
        found = json.loads((path / "zarr.json").read_text()).get("attributes", {}).get(KEY)
    elif path.suffix == ".safetensors":
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, path.stat().st_size)))
        found = json.loads(header.get("__metadata__", {}).get(KEY, "null"))
    elif path.suffix == ".html":
        match = re.search(r'<script type="application/json" id="lenspipe">(.*?)</script>', path.read_text(), re.DOTALL)
        found = json.loads(match.group(1)) if match else None
    if found is None:
        for folder in (path, path.parent, path.parent.parent):
            if (folder / "provenance.json").is_file():
                found = json.loads((folder / "provenance.json").read_text())[KEY]
                break
    return found
