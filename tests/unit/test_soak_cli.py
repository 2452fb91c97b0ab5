"""The command line of tools/soak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAIN = Path(__file__).resolve().parents[2] / "tools/soakkit/main.py"


def soak(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", str(MAIN), *words], capture_output=True, text=True, check=False,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--minutes"),
        (["--minutes", "0"], "'0': give minutes"),
        (["--minutes", "soon"], "'soon': give minutes"),
        (["--minutes", "1", "--disks", "99"], "'99': give a number from 1 to 16"),
        (["--minutes", "1", "--seed", "-1"], "--seed"),
        (["--minutes", "1", "--loudly"], "--loudly"),
    ],
)
def test_a_wrong_call_is_one_line(words: list[str], says: str) -> None:
    done = soak(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("soak: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_help_has_examples() -> None:
    done = soak("--help")
    assert done.returncode == 0
    assert "tools/soak --minutes 20" in done.stdout
    assert "exit status:" in done.stdout
