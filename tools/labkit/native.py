"""COMMAND on this machine's own kernel: no guest, nothing read-only. Only when asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from typing import TYPE_CHECKING

from .errors import TIMED_OUT, LabError
from .relay import ending_signals

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def run(
    command: list[str],
    seconds: float,
    scratch: str | None,
    keep: bool,
    report: Callable[[str], None],
) -> int:
    """Run COMMAND in a process group of its own, which the time limit and signals end."""
    folder = scratch or tempfile.mkdtemp(prefix="ublk-ubi-lab-")
    environment = {name: value for name, value in os.environ.items() if name != "LAB"}
    environment |= {"LAB_SCRATCH": folder, "LAB_DISKS": ""}
    try:
        process = subprocess.Popen(command, env=environment, process_group=0)
    except OSError as error:
        raise LabError(
            f"cannot run {command[0]}: {error.strerror}", 127 if error.errno == 2 else 126
        ) from error
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        os.killpg(process.pid, number)

    for number in ending_signals():
        signal.signal(number, end)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        report(f"ended after {seconds:g} s, the time limit (--timeout)")
        return TIMED_OUT
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if keep:
            report(f"kept: {folder}")
        elif scratch is None:
            shutil.rmtree(folder, ignore_errors=True)
    if received:
        return -received[0]
    return status if status >= 0 else 128 - status
