"""The daemon's main thread, apart from any device."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ublk_ubi import daemon

if TYPE_CHECKING:
    import pytest


def test_a_log_without_room_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /run is no reason for a disk to go."""
    class Full:
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stderr", Full())
    daemon.log("a disk is served all the same")
