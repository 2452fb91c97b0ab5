"""Boots the guest, has it measure, and reads what it says."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import payload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .cases import Figure

ROOT = Path(__file__).resolve().parents[2]
CLOCK = "one processor, a nanosecond an instruction"
MEMORY = "2G"
LAB = ("--debian", "newest", "--no-systemd", "--icount", "--cpus", "1", "--mem", MEMORY)


class BenchError(Exception):
    """The bench cannot go on: one line that says why."""


@dataclass
class Measured:
    """What one boot gave, by the figures' names."""

    kernel: str = ""
    values: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ended: bool = False

    def take(self, told: dict[str, Any]) -> None:
        """Take in one line of the guest's."""
        self.kernel = told.get("kernel", self.kernel)
        self.ended = told.get("end", self.ended)
        name = told.get("figure", "")
        if "value" in told:
            self.values[name], self.units[name] = told["value"], told["unit"]
        for key, into in (("missing", self.missing), ("failed", self.failed)):
            if key in told:
                into[name] = told[key]


def measure(
    figures: Sequence[Figure], divisor: int, kublk: Path | None, seconds: float,
    heard: Callable[[dict[str, Any]], None],
) -> Measured:
    """Measure all figures in one boot; `heard` gets each line as it comes."""
    with tempfile.TemporaryDirectory(prefix="ublk-ubi-bench-", dir="/var/tmp") as scratch:
        archive = Path(scratch, "payload.tar")
        payload.pack(archive, kublk)
        pythons = [f"/usr/bin/{payload.VERSION}", os.path.realpath(sys.executable)]
        plan = {"figures": figures, "divisor": divisor, "payload": str(archive),
                "pythons": pythons}  # fmt: skip
        Path(scratch, "plan.json").write_text(json.dumps(plan))
        command = [
            sys.executable, "-B", str(ROOT / "tools/lab"), *LAB, "--scratch", scratch,
            "--timeout", f"{seconds:g}", "--", "env", f"PYTHONPATH={ROOT}/tools",
            "/usr/bin/python3", "-B", "-m", "benchkit.guest", f"{scratch}/plan.json",
        ]  # fmt: skip
        return _listen(command, heard)


def _listen(command: list[str], heard: Callable[[dict[str, Any]], None]) -> Measured:
    measured = Measured()
    environment = {key: value for key, value in os.environ.items() if key != "LAB"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True) as lab:  # fmt: skip
        try:
            for line in lab.stdout or ():
                with contextlib.suppress(json.JSONDecodeError):
                    told = json.loads(line)
                    measured.take(told)
                    heard(told)
            status = lab.wait()
        except BaseException:  # a signal: the guest is to be gone, too
            lab.terminate()
            lab.wait()
            raise
    if not measured.ended:
        raise BenchError(f"the guest ended before all was measured (tools/lab: exit {status})")
    return measured
