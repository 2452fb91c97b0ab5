"""What a daemon's I/O threads tell is heard by whoever waits for it."""

from __future__ import annotations

import os
import select
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest

from ublk_ubi import daemon
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT_S = 10.0


class Turns:
    """The service manager's place: counts the turns of the daemon's loop."""

    def __init__(self) -> None:
        self.count = 0
        self.one_more = threading.Condition()

    def look(self, _line: object) -> None:
        with self.one_more:
            self.count += 1
            self.one_more.notify_all()

    def wait_s(self, limit_s: float | None) -> float | None:
        return limit_s

    def stopping(self, _line: str) -> None:
        pass

    def pass_by(self, wake: int, turns: int = 3) -> None:
        """Have the loop go round some times."""
        for _ in range(turns):
            with self.one_more:
                os.eventfd_write(wake, 1)
                assert self.one_more.wait_for(partial(self._has_made, self.count + 1), LIMIT_S)

    def _has_made(self, count: int) -> bool:
        return self.count >= count


class Session:
    """One whose stop goes on until a thread's notice has come."""

    def __init__(self, place: Path, turns: Turns) -> None:
        self.claim = self.plane = self.device = self.upkeep = self
        self.image_problem: str | None = None
        self.name = "vm1"
        self.recoverable = False
        self.notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.socket = str(place / "s")
        self.daemon: daemon.Daemon
        self.turns = turns
        self.heard: list[bool] = []
        self.refusals = 1

    def stop_disk(self, *, force: bool) -> None:
        assert not force
        os.eventfd_write(self.notify_fd, 1)
        self.turns.pass_by(self.daemon._wake)
        self.heard.append(bool(select.select([self.notify_fd], [], [], 0)[0]))
        if self.refusals:
            self.refusals -= 1
            os.eventfd_read(self.notify_fd)
            message = "in use"
            raise UbiError(message)

    def finish(self) -> None:
        pass

    def release_image(self) -> bool:
        self.heard.append(True)
        self.daemon._stop(force=False)
        return False

    def serves(self) -> bool:
        return True


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    handlers = {number: signal.getsignal(number) for number in daemon.ENDING}
    made = Session(tmp_path, turns := Turns())
    made.daemon = daemon.Daemon(cast("Any", made), cast("Any", turns))
    yield made
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.close(made.notify_fd)


def test_a_stop_hears_them_while_it_is_under_way(session: Session) -> None:
    """And what came while a stop was refused is looked at afterwards: here it asks for another."""
    session.daemon._stop(force=False)
    assert session.daemon.serve() == 0
    assert session.heard == [True, True, True]
