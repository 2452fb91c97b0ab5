"""The I/O path touches no Python object: Cython's annotation of it has no yellow line.

Cython marks every line of a .pyx that calls into Python with a score; a line of the I/O path that
has one is where a queue would wait for the interpreter.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cython" / "ublk_ubi"

IO_PATH = ("_format", "_hydrator", "_lifecycle", "_queue", "_ring", "_threads")
# What the control plane calls: Python on one side.
BORDER = ("_device", "_opener", "_testing")

# Appended to a module of the I/O path: what must be noticed.
PLANTED = """

cdef void planted() noexcept nogil:
    with gil:
        print("a Python call")
"""

def annotate(folder: Path) -> None:
    """Annotate the modules of a copy of the sources, with the directives of setup.py."""
    environment = os.environ | {"UBLK_UBI_ANNOTATE": "1"}
    environment.pop("UBLK_UBI_TEST", None)
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "--name"], cwd=folder,
                          env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def yellow(html: Path) -> list[str]:
    """The lines of a module that call into Python; the first one holds its initialisation."""
    lines = html.read_text().splitlines()
    found = [re.search(r'class="cython line score-(\d+)".*?>\+?(\d+)<', line) for line in lines]
    scores = {int(match[2]): int(match[1]) for match in found if match}
    source = html.with_suffix(".pyx").read_text().splitlines()
    assert len(scores) == len(source), f"{html}: not every line has a score"
    assert scores[1] > 0, f"{html}: the initialisation has no score"
    return [f"{html.stem}.pyx:{number}: {source[number - 1]}"
            for number, score in scores.items() if score and number > 1]


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, annotated; one module has a planted Python call and a name to tell."""
    folder = tmp_path_factory.mktemp("annotate")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    copy = folder / "cython" / "ublk_ubi"
    copy.mkdir(parents=True)
    for name in (*IO_PATH, "planted"):
        source = "_format" if name == "planted" else name
        shutil.copy(SOURCES / f"{source}.pyx", copy / f"{name}.pyx")
    for path in (*SOURCES.glob("*.pxd"), *SOURCES.glob("*.h")):
        shutil.copy(path, copy)
    shutil.copy(SOURCES / "_format.pxd", copy / "planted.pxd")
    with (copy / "planted.pyx").open("a") as file:
        file.write(PLANTED)
    annotate(folder)
    return copy


@pytest.mark.parametrize("name", IO_PATH)
def test_no_yellow_line_in_the_io_path(annotated: Path, name: str) -> None:
    assert yellow(annotated / f"{name}.html") == []


def test_a_planted_python_call_is_seen(annotated: Path) -> None:
    found = yellow(annotated / "planted.html")
    assert any("with gil" in line or "print" in line for line in found), found
    assert len(found) <= PLANTED.count("\n"), "more than what was planted"


def test_every_module_is_in_the_io_path_or_at_its_border() -> None:
    there = {path.stem for path in SOURCES.glob("*.pyx")}
    assert set(IO_PATH) <= there
    assert there <= {*IO_PATH, *BORDER}
