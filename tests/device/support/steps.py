"""Processes of the product that end by themselves right before a step that the test has chosen.

A library that is preloaded into what is shipped (steps.c) counts what each role does that the world
notices: files, locks, messages, I/O of a daemon's main thread, commands of the control helper.
"""

from __future__ import annotations

import enum
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from support.shell import run

if TYPE_CHECKING:
    from support.undo import Undo

_SOURCE = Path(__file__).with_name("steps.c")
_ROLE, _COUNTDOWN, _DIED, _STEP = range(0, 16, 4)
_STEP_BYTES = 64
_MANY = 1 << 30


class Role(enum.IntEnum):
    """Whose steps, as steps.c numbers it."""

    COMMAND = 1
    DAEMON = 2                     # any of those that are there: an upgrade has two
    HELPER = 3                     # a daemon's or a command's, which runs ublk control commands


def build(folder: Path) -> Path:
    """Compile the library."""
    library = folder / "steps.so"
    run("cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, _SOURCE,
        "-ldl")
    return library


class Steps:
    """`environment` is for the commands whose processes shall be counted, and end."""

    def __init__(self, library: Path, folder: Path, undo: Undo) -> None:
        path = folder / "steps"
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        undo.callback(self._page.close)
        self.environment = {
            "LD_PRELOAD": str(library), "TEST_STEPS": str(path), "PYTHONDONTWRITEBYTECODE": "1",
        }

    def count(self, role: Role) -> None:
        """Count the role's steps from now on, for `counted`."""
        self.die_before(role, _MANY)

    def counted(self) -> int:
        """How many there were; no more are counted."""
        self._set(_ROLE, 0)
        return _MANY - self._get(_COUNTDOWN)

    def die_before(self, role: Role, number: int) -> None:
        """Let the process that is about to take that many'th step of the role's end before it."""
        self._set(_DIED, 0)
        self._set(_COUNTDOWN, number)
        self._set(_ROLE, role)

    def died(self) -> str:
        """The step that was not taken, "" when none has died; none will any more."""
        self._set(_ROLE, 0)
        if not self._get(_DIED):
            return ""
        return self._page[_STEP : _STEP + _STEP_BYTES].split(b"\0")[0].decode(errors="replace")

    def _get(self, at: int) -> int:
        value: int = struct.unpack_from("=i", self._page, at)[0]
        return value

    def _set(self, at: int, value: int) -> None:
        struct.pack_into("=i", self._page, at, value)
