"""Running commands and waiting for conditions, with words for what went wrong."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Without udev dmsetup would wait for it for ever; with it, the nodes are made by both.
ENVIRONMENT = {"DM_DISABLE_UDEV": "1"}


def run(*command: object, timeout_s: float = 60.0, stdin: str | None = None) -> str:
    """Run a command that must succeed; return what it printed, stripped."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=timeout_s, input=stdin,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def until(condition: Callable[[], T], what: str, timeout_s: float = 30.0) -> T:
    """Wait until a condition holds; return its (true) value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
    return value
