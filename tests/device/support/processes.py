"""Daemons that are not live yet: who they are, and what they have said so far."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from support.device import RUN_ROOT


def starting_pid(name: str) -> int | None:
    """The daemon that is bringing up the device `name`, once it has claimed the name."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((RUN_ROOT / name / "pid").read_text())
        if os.path.exists(f"/proc/{pid}"):
            return pid
    return None


def starting_log(name: str) -> str:
    """Its log, which has no name yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{starting_pid(name)}/fd/2").read_text(errors="replace")
    return ""
