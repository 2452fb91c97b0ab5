"""The soak itself, run where ublk is: some disks, each with a thread that decides its lot."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from support.device import RUN_ROOT

from soakkit.disk import Disk
from soakkit.output import Output, Tally

if TYPE_CHECKING:
    from types import FrameType

TURN_S = 0.5
INTERRUPTED = 130
PREFIX = f"soak{os.getpid()}"


@contextlib.contextmanager
def no_watch():  # noqa: ANN201 - a context manager
    """Take the place of `ublk-ubi watch`: what dies here is brought back by the soak's own lot."""
    RUN_ROOT.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(RUN_ROOT / ".watch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def live(disk: Disk, tally: Tally) -> None:
    """Let a disk live until the time is up; note the first thing that does not hold."""
    try:
        disk.live()
    except AssertionError as error:
        tally.add(mismatches=int("sector" in str(error)))
        tally.problems.append(f"{disk.where}: {error}")
    except Exception as error:
        tally.problems.append(f"{disk.where}: {type(error).__name__}: {error}")
    finally:
        disk.take_away()


def main() -> int:
    """Entry point: seconds, number of disks, seed, whether to print JSON, folder to work in."""
    seconds, count, seed, as_json, work = sys.argv[1:]
    tally = Tally(seed=int(seed), seconds=float(seconds))
    output = Output(tally, as_json=as_json == "1")

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        tally.interrupted = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    with no_watch():
        disks = [
            Disk(f"{PREFIX}-{number}", Path(work), tally, int(seed) * 1000 + number)
            for number in range(int(count))
        ]
        threads = [
            threading.Thread(target=live, args=(disk, tally), daemon=True) for disk in disks
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            output.tell()
            time.sleep(TURN_S)
    output.end()
    if tally.problems:
        return 1
    return INTERRUPTED if tally.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
