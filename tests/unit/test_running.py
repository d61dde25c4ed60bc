"""A second run in the same folder is refused as long as the first one lives."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil
import pytest

from lenspipe.errors import LenspipeError
from lenspipe.running import note_run, refuse_second_run


def noted(results: Path, pid: int, began: float, host: str | None = None) -> None:
    record = {"host": host or socket.gethostname(), "pid": pid, "began": began}
    (results / ".run.json").write_text(json.dumps(record))


def test_a_run_may_go_on_itself(tmp_path: Path) -> None:
    note_run(tmp_path / "results")
    refuse_second_run(tmp_path / "results")


@pytest.mark.parametrize("off", [0.0, 1.0, -20.0])
def test_a_run_that_lives_is_named(off: float, tmp_path: Path) -> None:
    """Also where the clock was set in the meantime: the start of a process is reckoned back from now."""
    parent = psutil.Process().ppid()
    noted(tmp_path, parent, psutil.Process(parent).create_time() + off)
    with pytest.raises(LenspipeError, match=f"process {parent} is running lenspipe here already"):
        refuse_second_run(tmp_path)


@pytest.mark.parametrize("ended", ["number of another process now", "no process", "on another machine"])
def test_one_that_has_ended_or_is_elsewhere_is_not(ended: str, tmp_path: Path) -> None:
    parent = psutil.Process().ppid()
    began = psutil.Process(parent).create_time()
    if ended == "no process":
        noted(tmp_path, 2**22 + 1, began)
    elif ended == "on another machine":
        noted(tmp_path, parent, began, host="elsewhere")
    else:
        noted(tmp_path, parent, began - 3600)
    refuse_second_run(tmp_path)
