"""tools/soak, for some seconds: it comes to an end, and finds what does not hold."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.device import CHECKOUT
from support.direct import DirectFile
from support.ondisk import DATA_OFFSET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.stores import Stores

pytestmark = pytest.mark.cpus(2)

SECONDS = 15
BLOCK = 4096


@pytest.fixture
def folder(stores: Stores) -> Path:
    return stores.folder("ext4")


@pytest.fixture
def soak(folder: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Begin a soak of one disk."""
    if not os.path.exists("/dev/ublk-control"):
        pytest.skip("needs root and a kernel with ublk: run it in tools/lab")
    running: list[subprocess.Popen[str]] = []
    environment = os.environ | {
        "PYTHONPATH": f"{CHECKOUT}/tools:{CHECKOUT}/tests/device:{CHECKOUT}",
    }

    def begin() -> subprocess.Popen[str]:
        program = CHECKOUT / "tools/soakkit/soak.py"
        running.append(subprocess.Popen(
            [sys.executable, "-P", str(program), str(SECONDS), "1", "1", "1", str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def end(process: subprocess.Popen[str], code: int) -> dict[str, Any]:
    """Wait for its end; what it says."""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code, stdout + stderr
    assert stderr == ""
    result: dict[str, Any] = json.loads(stdout)
    return result


@pytest.mark.limit(240)
def test_it_ends_and_all_held(soak: Callable[[], subprocess.Popen[str]]) -> None:
    result = end(soak(), 0)
    assert result["problems"] == []
    assert result["mismatches"] == 0
    assert result["writes"] > 0
    assert result["sectors_compared"] > 0
    assert sum(result["events"].values()) > 0


@pytest.mark.limit(240)
def test_what_is_not_there_is_found(
    soak: Callable[[], subprocess.Popen[str]], folder: Path,
) -> None:
    """Somebody else writes to the base, again and again."""
    process = soak()
    while process.poll() is None:
        for base in folder.glob("soak*/base"):
            with contextlib.suppress(FileNotFoundError), DirectFile(str(base)) as file:
                if os.fstat(file.fd).st_size > DATA_OFFSET:
                    file.pwrite(b"junk" * (BLOCK // 4), DATA_OFFSET + BLOCK)
        time.sleep(0.05)
    result = end(process, 1)
    assert result["mismatches"] == 1
    [problem] = result["problems"]
    assert "sector" in problem
