"""The one kind of error that a user sees, and the exit codes of every command."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit codes of `ublk-ubi`; the README documents them, scripts rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DEGRADED = 3
    NO_DEVICE = 4
    BUSY = 5
    TIMED_OUT = 6


class UbiError(Exception):
    """An expected failure: one line that names the thing, the value and the way out."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
