"""Runs the ring's conformance test against planted bugs: `judge FOLDER NUMBER…`.

A child for each; prints one line for each, JSON: number, pytest's status, what it had to say.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import hypothesis  # noqa: F401 - to have it before the children are made
import pytest

ROOT = Path(__file__).resolve().parents[3]
ARGUMENTS = ["-x", "-q", "-s", "--no-header", "-p", "no:cacheprovider",
             "-p", "no:faulthandler", "--durations=0", "--tb=line", "--assert=plain",
             "-W", "ignore::pytest.PytestAssertRewriteWarning",
             f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"),
             *map(str, (Path(__file__).parents[1] / name for name in ("test_ring.py",
                                                                      "test_ring_base.py")))]
LIMIT_S = 120


def judge(number: int) -> tuple[int, str]:
    """Run the test in a child: its status, negative for a signal, and its words."""
    # Some run at a time: in the folder of all of them they sweep old ones from under one another.
    with (tempfile.TemporaryFile("w+", errors="replace") as output,
          tempfile.TemporaryDirectory() as folder):
        pid = os.fork()
        if pid == 0:
            be_judged(number, output.fileno(), os.path.join(folder, "pytest"))
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()[-2000:]


def be_judged(number: int, output: int, folder: str) -> None:
    """Be the child: never returns."""
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(LIMIT_S)
        os.environ.pop("CI", None)  # there pytest's last words are longer than what is kept
        from ublk_ubi import _ring

        _ring.plant(number)
        code = int(pytest.main([*ARGUMENTS, f"--basetemp={folder}"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.chdir(ROOT)
    for text in sys.argv[2:]:
        print(json.dumps([int(text), *judge(int(text))]), flush=True)
