"""Files of tensors: read back whole, readable by others, and named where they are not what they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lenspipe.deflection_table import read_deflection_table
from lenspipe.errors import InputError
from lenspipe.source.prior import read_source_prior
from lenspipe.source.stage import read_vae
from lenspipe.tensors import read_tensors, write_tensors


def test_tensors_and_record_are_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).T, "n": torch.tensor(7)}
    write_tensors(tmp_path / "t", tensors, {"x": 0.1 + 0.2})
    found, record = read_tensors(tmp_path / "t", "a file", "vae", lambda tensors, record: (tensors, record))
    assert record == {"x": 0.1 + 0.2}
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in tensors.items()}


def test_others_may_read_what_they_may_read_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_tensors(tmp_path / "t", {"a": torch.zeros(1)}, {})
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("read", "name", "stage"),
    [
        (read_deflection_table, "a deflection table", "deflection_table"),
        (read_source_prior, "a source prior", "source"),
        (read_vae, "an autoencoder", "vae"),
    ],
)
def test_bad_files_are_named(read: Callable[[Path], Any], name: str, stage: str, tmp_path: Path) -> None:
    """Absent, cut short, and of another stage."""
    with pytest.raises(InputError, match=rf"absent: no such {name.split(' ', 1)[1]}; run the stage {stage} first"):
        read(tmp_path / "absent")
    (tmp_path / "cut").write_bytes(b"\x10\x00")
    write_tensors(tmp_path / "other", {"other": torch.zeros(2)}, {"settings": {}})
    for file in ("cut", "other"):
        with pytest.raises(InputError, match=rf"{file}: not {name} \("):
            read(tmp_path / file)


def test_too_little_memory_is_no_fault_of_a_file(tmp_path: Path) -> None:
    """As PyTorch says it where a file cannot be mapped."""

    def build(*_: object) -> None:
        raise RuntimeError("unable to mmap 51904 bytes from file <t>: Cannot allocate memory (12)")

    write_tensors(tmp_path / "t", {"a": torch.zeros(1)}, {})
    with pytest.raises(MemoryError, match="unable to mmap"):
        read_tensors(tmp_path / "t", "a file", "vae", build)
