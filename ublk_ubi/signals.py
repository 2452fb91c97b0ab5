"""The signals that end a daemon, kept off where they must not interrupt.

SIGPWR is sent when the whole host goes down: who uses the disk is about to end as well, and is
waited for.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPWR)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Have the signals that end a daemon come after what is done here, not amid it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
