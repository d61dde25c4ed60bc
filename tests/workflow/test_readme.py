"""README and docs as a newcomer follows them: their commands, Python, settings, table and the files they name."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lenspipe.config import load_config
from tests.conftest import ROOT, TINY, environment
from tests.unit.test_preparation import write_lens

pytestmark = pytest.mark.workflow
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]


def blocks(language: str, *pages: str) -> list[str]:
    """Of these pages, or of all."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for page in pages or PAGES.values() for block in pattern.findall(page)]


LINES = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines() if line]
NAMED = r"`((?:workflow|lenspipe|envs|tests|docs)/[\w./]+)`"
SECTION = r"\]\(((?!http)[^)#]*)#([^)]+)\)"
COMMANDS = [line for line in LINES if not line.startswith("#")]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run that a command may change, with the tiny preset where the README has the default one."""
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(TINY, tmp_path / "run/config.yaml")
    for name in ("my_run", "smooth", "learned"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "results").symlink_to(tmp_path / "run/results")
    write_lens(tmp_path / "run/my_lenses/good")
    return tmp_path / "run"


def test_commands_are_known() -> None:
    assert COMMANDS[:2] == ["make run", "make test"]
    assert {command.split()[0] for command in COMMANDS} == {"make", "source", "snakemake", "lenspipe", "export"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] == "make"])
def test_make_target_is_there(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] == "lenspipe"])
def test_lenspipe_command(command: str, run: Path) -> None:
    words = shlex.split(command.replace("my.yaml", "config.yaml"))
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=run, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] == "snakemake"])
def test_snakemake_command(command: str, tmp_path: Path) -> None:
    words = shlex.split(command.replace("my.yaml", str(TINY)))
    words = [str(tmp_path) if word == "my_run" else word for word in words]
    (tmp_path / "a").mkdir()
    for name in ("image", "psf"):
        (tmp_path / f"a/{name}.fits").touch()
    expected = "Unlocked" if "--unlock" in words else "report"
    if "--directory" not in words:
        words += ["--directory", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--dry-run"],
        cwd=ROOT,
        env=environment() | {"LENSPIPE_LENSES": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout + done.stderr


def test_python(run: Path) -> None:
    (code,) = blocks("python", README)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "theta_E" in done.stdout


def test_settings_shown() -> None:
    """Every piece of settings is good by itself."""
    pieces = blocks("yaml")
    assert len(pieces) == 2
    for piece in pieces:
        load_config(yaml.safe_load(piece))


def test_page_on_lenses(tmp_path: Path) -> None:
    """The first program of docs/lensing.md draws its picture, the second renders whole images."""
    programs = blocks("python", PAGES[ROOT / "docs/lensing.md"])
    assert len(programs) == 2
    said = ""
    for code in programs:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment() | {"MPLBACKEND": "Agg"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "total magnification 17.3" in said
    assert (tmp_path / "lens.png").stat().st_size > 20_000


def test_table_of_stages(tiny_run: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(lenspipe/[\w./]+)` \| (.+?) \|", README, re.MULTILINE)
    rules = sorted(path.stem for path in (ROOT / "workflow/rules").glob("*.smk") if path.stem != "common")
    assert sorted(stage for stage, _, _ in rows) == rules
    for stage, module, output in rows:
        assert (ROOT / module).exists(), stage
        found = re.findall(r"`([\w./-]+)", output)
        assert found, stage
        assert (tiny_run / "results" / found[0]).exists(), found[0]


def test_files_that_are_named_exist() -> None:
    named = {ROOT / path for page in PAGES.values() for path in re.findall(NAMED, page)}
    named |= {path.parent / to for path, page in PAGES.items() for to in re.findall(r"\]\(((?!http)[^)#]+)", page)}
    assert len(named) > 20
    assert [path for path in sorted(named) if not path.exists()] == []


def test_sections_that_are_linked_exist() -> None:
    links = [(path, *link) for path, page in PAGES.items() for link in re.findall(SECTION, page)]
    assert len(links) >= 3
    for path, to, section in links:
        prose = re.sub(r"^```.*?^```$", "", PAGES[(path.parent / to).resolve() if to else path], flags=re.M | re.S)
        anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.+)$", prose, re.M)]
        assert section in anchors, f"{path}: {to}#{section}"
