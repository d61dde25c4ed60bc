"""The run that is under way in a folder of results, so that a second one can name it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from textwrap import shorten

import psutil

from lenspipe.errors import LenspipeError

CLOCK = 60.0  # how far the start of one process may be off that of the same one: it moves when the clock is set [s]


def note_run(results: Path) -> None:
    """Leave word of this process, which begins a run."""
    results.mkdir(parents=True, exist_ok=True)
    began = psutil.Process().create_time()
    _note(results).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": began}))


def refuse_second_run(results: Path) -> None:
    """Raise LenspipeError where a run that was begun on this machine still lives; others Snakemake's lock holds off."""
    try:
        first = json.loads(_note(results).read_text())
        off = psutil.Process(first["pid"]).create_time() - first["began"]
        lives = first["host"] == socket.gethostname() and abs(off) < CLOCK
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        return
    if lives and first["pid"] != os.getpid():
        raise LenspipeError(
            f"{results.resolve()}: process {first['pid']} is running lenspipe here already ({_command(first['pid'])}); "
            "wait until it has ended, stop it, or give this run another --directory"
        )


def _note(results: Path) -> Path:
    return results / ".run.json"


def _command(pid: int) -> str:
    try:
        return shorten(" ".join(psutil.Process(pid).cmdline()), 200, placeholder=" ...")
    except psutil.Error:
        return "whose command is not known"
