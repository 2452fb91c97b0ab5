"""The linters find nothing: ruff, mypy (strict) and cython-lint, as pyproject.toml sets them up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent

LINTERS = {
    "ruff": ["ruff", "check", "--quiet", "--output-format=concise", "."],
    "mypy": ["mypy", "--no-error-summary"],
    "cython-lint": ["cython-lint", "cython/ublk_ubi", "tests/sim/ubi_sim"],
}


@pytest.mark.parametrize("linter", LINTERS)
def test_lint(linter: str) -> None:
    # cython-lint runs pycodestyle by its name.
    environment = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    words = LINTERS[linter]
    done = subprocess.run([PROGRAMS / words[0], *words[1:]], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{linter} finds\n{done.stdout}{done.stderr}", pytrace=False)
