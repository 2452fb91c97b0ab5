"""Running the command, really or in this process, with daemons that are not real."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from ublk_ubi import cli, runtime

CHECKOUT = Path(__file__).resolve().parents[3]
FAKE = CHECKOUT / "tests/unit/fake_daemon.py"
REAL = [sys.executable, "-m", "ublk_ubi"]
WITH_FAKES = [
    sys.executable,
    "-c",
    f"""
import sys
from ublk_ubi import launch
from ublk_ubi.cli import main
launch.daemon_command = lambda: [sys.executable, {str(FAKE)!r}]
main()
""",
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: str, command: list[str] = REAL, **kwargs: Any) -> Result:
    """Run the real command."""
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, timeout=60,
        stdin=subprocess.DEVNULL, **kwargs,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def inline(*arguments: str) -> Result:
    """Run the command in this process, as `main` does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(arguments))
    return Result(code, out.getvalue(), err.getvalue())


def is_one_line(err: str) -> bool:
    return err.startswith("ublk-ubi: ") and err.count("\n") == 1 and err.endswith("\n")


def pid_of(name: str) -> int:
    pid = next(device.pid for device in runtime.all_devices() if device.name == name)
    assert pid
    return pid


def kill(name: str) -> None:
    """Kill a device's daemon; it has ended, for all to see."""
    os.kill(pid_of(name), signal.SIGKILL)
    while (device := runtime.find(name)) is not None and device.alive:
        time.sleep(0.01)


def on_terminal(command: list[str], says: str = "", **environment: str) -> tuple[str, int]:
    """Run on a pseudo-terminal; returns all that it shows and the exit code."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, close_fds=True,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(slave)
    shown = b""
    os.write(master, says.encode())
    while select.select([master], [], [], 20)[0]:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    return shown.decode(), process.wait(20)
