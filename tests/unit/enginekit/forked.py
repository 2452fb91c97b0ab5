"""Runs what must end the process, in a child that may die of it."""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import signal
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SAID = re.compile(r"ublk-ubi: broken invariant: (.*) \(\w+:\d+\)\n")


def broken_invariant(step: Callable[[], object]) -> str | None:
    """Run `step` in a forked child: the invariant that aborted it, or None if it came through.

    Raises AssertionError when the child dies of anything else.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The children of tests have no use for the parent's other threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _die_of(step, writing)
    os.close(writing)
    with open(reading, errors="replace") as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return None
    found = _SAID.fullmatch(said)
    aborted = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT
    if found is None or not aborted:
        raise AssertionError(f"the child ended with status {status:#x} and said {said!r}")
    return found[1]


def _die_of(step: Callable[[], object], writing: int) -> None:
    """Be the child: never returns."""
    code = 1
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(writing, 2)
        step()
        code = 0
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)
