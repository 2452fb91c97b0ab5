"""Daemons that end by themselves right before an action that the test has chosen.

A library that is preloaded into what is shipped (mortal.c) sees every SQE before it is submitted
and every CQE before it is looked at. It counts them, in a page that the test shares and that
outlives the daemon: so the test knows what was under way at the very moment of a death, of one
that it has chosen as of one that came by SIGKILL from outside.
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

_SOURCE = Path(__file__).with_name("mortal.c")
_ARMED, _COUNTDOWN, _DIED, _WRITES, _STRIPES, _DONE = range(0, 24, 4)


class Action(enum.IntEnum):
    """What a daemon does, as mortal.c numbers it."""

    BASE_WRITE = 1                 # a guest's data to the base
    STRIPE_READ = 2                # of the image, to be hydrated
    STRIPE_WRITE = 3
    HEADER_WRITE = 4               # any metadata: header pages, slots
    SYNC = 5                       # fdatasync of the base
    TABLE_UPDATE = 6               # a stripe's row, when its data is on the base
    FETCH = 7
    COMMIT = 8
    DOORBELL = 9


def build(folder: Path) -> Path:
    """Compile the library."""
    library = folder / "mortal.so"
    run("cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", library, _SOURCE,
        "-ldl")
    return library


class Mortal:
    """What the daemons of one device do; `environment` is for the commands that start them."""

    def __init__(self, library: Path, folder: Path, undo: Undo) -> None:
        path = folder / "mortal"
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        undo.callback(self._page.close)
        self.environment = {"LD_PRELOAD": str(library), "TEST_MORTAL": str(path)}

    def die_before(self, action: Action, number: int = 1) -> None:
        """Let the daemon end right before that many'th such action from now on."""
        self._set(_COUNTDOWN, number)
        self._set(_ARMED, action)

    def spare(self) -> None:
        """Let it live."""
        self._set(_ARMED, 0)

    def bury(self) -> None:
        """Forget what a dead daemon had under way."""
        for at in (_ARMED, _DIED, _WRITES, _STRIPES):
            self._set(at, 0)

    @property
    def died_before(self) -> Action | None:
        """The action before which the daemon has ended by itself."""
        number = self._get(_DIED)
        return Action(number) if number else None

    @property
    def writes(self) -> int:
        """Guests' writes that a queue has taken and not committed."""
        return self._get(_WRITES)

    @property
    def stripes(self) -> int:
        """Stripes that are FETCHING: their data is read, or written."""
        return self._get(_STRIPES)

    def done(self, action: Action) -> int:
        """How many of these were done, by all daemons."""
        return self._get(_DONE + 4 * action)

    def _get(self, at: int) -> int:
        value: int = struct.unpack_from("=i", self._page, at)[0]
        return value

    def _set(self, at: int, value: int) -> None:
        struct.pack_into("=i", self._page, at, value)

