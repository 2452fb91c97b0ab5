"""A disk's life, by lot: what is done to it while its writers write.

Invariants
- No request of a writer's fails, whatever becomes of the daemon.
- A sector that is read holds what was written to it last, or the image's bytes.
- What is done is decided by the disk's own seed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING

from support.device import RUN_ROOT, CommandError, Device, Running
from support.images import Image, random_content, write_file
from support.load import Record, Writers
from support.shell import until
from support.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from soakkit.output import Tally

MIB = 1 << 20
SIZE = 24 * MIB
LARGEST = 48 * MIB
THREADS = 3
MOST_WRITES = 300                  # between two events
PATIENCE_S = 300.0                 # a machine that is busy
SECTOR = 512
TIMED_OUT = 6                      # exit code


class Disk:
    """One disk, and what must be on it."""

    def __init__(self, name: str, work: Path, tally: Tally, seed: int) -> None:
        self._tally = tally
        self._rng = random.Random(seed)
        self._folder = work / name
        self._folder.mkdir()
        self._image: Image = write_file(
            self._folder / "image", random_content(SIZE - 5 * SECTOR, seed, holes=0.2),
        )
        self._digest = hashlib.sha256(self._image.content).digest()
        self._undo = Undo()
        self._device = Device(name, {}, self._undo)
        self._record: Record
        self._writers: Writers | None = None
        self._counted = 0
        self._next_number = 1
        self._events = 0
        self._event = "its beginning"
        self._lots: dict[str, tuple[int, Callable[[], None]]] = {
            "kills": (6, self._kill),
            "kills amid recovery": (2, self._kill_twice),
            "ends by signal": (1, self._end_by_signal),
            "upgrades": (4, self._upgrade),
            "resizes": (2, self._resize),
            "changes of hydration": (4, self._change_hydration),
            "deletions": (3, self._delete_and_add),
            "new bases": (1, self._begin_anew),
        }

    @property
    def where(self) -> str:
        """Where in its life it is, for a message."""
        return f"{self._device.name}, event {self._events} ({self._event})"

    def live(self) -> None:
        """Live until the time is up, an event at least.

        Raises AssertionError, OSError: what does not hold.
        """
        self._begin()
        weights = [weight for weight, _ in self._lots.values()]
        while self._events == 0 or not self._tally.over:
            self._go_on(self._rng.randrange(MOST_WRITES))
            [name] = self._rng.choices(list(self._lots), weights)
            self._events += 1
            self._event = name
            self._lots[name][1]()
            self._tally.note(name)
        self._event = "its end"
        self._rest()
        self._delete()
        self._assert_sound()

    def take_away(self) -> None:
        """Leave nothing of it; never raises."""
        try:
            Running(["del", self._device.name, "--force", "--if-exists"]).outcome()
            if self._writers is not None:
                self._writers.join(stop=True)
            self._undo.close()
        except (AssertionError, OSError) as error:
            self._tally.problems.append(f"{self._device.name} cannot be taken away: {error}")

    # -- its load --

    def _load(self) -> None:
        self._counted = 0
        self._writers = Writers(
            self._device, self._record, threads=THREADS, seed=self._rng.randrange(1 << 30),
            first=self._next_number, flush_every=self._rng.choice((10, 40, 200)),
        )

    def _go_on(self, writes: int) -> None:
        """Let so many more writes complete."""
        assert self._writers is not None
        self._writers.wait_for(sum(self._writers.completed) + writes, PATIENCE_S)
        self._count()

    def _count(self) -> None:
        assert self._writers is not None
        failed = self._writers.failed
        assert not failed, f"a request failed: {failed[0]}"
        done = sum(self._writers.completed)
        self._tally.add(writes=done - self._counted)
        self._counted = done

    def _rest(self) -> None:
        """End the load; all that was written is there."""
        assert self._writers is not None
        self._writers.join(stop=True, timeout_s=PATIENCE_S)
        self._count()
        self._next_number = self._writers.next_number
        self._writers = None
        self._compare()

    def _compare(self) -> None:
        surprises = self._record.check(self._device)
        assert surprises == 0, f"{surprises} sectors hold what nobody has completed"
        self._tally.add(sectors=self._record.size // SECTOR)

    # -- its lots --

    def _begin(self) -> None:
        """Start on a new base, in some way or other."""
        stripe = self._rng.choice((64 << 10, 128 << 10, 256 << 10))
        self._device.options = {
            "image": self._image.path, "base": str(self._folder / "base"), "size": SIZE,
            "stripe_size": stripe, "recovery": True, "queues": self._rng.choice((1, 2)),
            "data_path": self._rng.choice(("auto", "copy")),
            "cache": self._rng.choice(("writeback", "writeback", "writethrough")),
            "copy_on_read": self._rng.random() < 0.8,
        }
        self._do(self._device.start)
        self._device.options |= {"size": None}
        self._record = Record(self._image.content, SIZE, stripe)
        self._device.hydrate(run=True, rate=MIB)
        self._load()

    def _do(self, command: Callable[[], object]) -> None:
        """Have a command done; once more when its time was over, as it may be on a busy machine."""
        try:
            command()
        except CommandError as error:
            if error.code != TIMED_OUT:
                raise
            self._tally.note("commands out of time")
            command()

    def _recover(self) -> None:
        """Bring it back as an operator does, or as a service manager."""
        self._do(self._device.recover if self._rng.random() < 0.5 else self._device.start)

    def _kill(self) -> None:
        self._device.kill()
        self._recover()

    def _kill_twice(self) -> None:
        self._device.kill()
        before = self._device.pid
        first = Running(["recover", self._device.name])
        pid = until(lambda: first.done or self._claimant(before), "a new daemon", PATIENCE_S)
        time.sleep(self._rng.random() / 4)
        if not first.done:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first.outcome()
        self._device.pid = int(self._read("pid"))
        if not self._device.is_dead():
            self._device.kill()
        self._recover()

    def _claimant(self, before: int) -> int:
        """Return the process that has the name now, 0 while that is the one of before."""
        pid = int(self._read("pid") or 0)
        return pid if pid != before else 0

    def _read(self, name: str) -> str:
        return (RUN_ROOT / self._device.name / name).read_text().strip()

    def _end_by_signal(self) -> None:
        os.kill(self._device.pid, signal.SIGTERM)
        until(self._device.is_dead, "the daemon's end", PATIENCE_S)
        self._recover()

    def _upgrade(self) -> None:
        self._do(lambda: self._tally.note_pause(self._device.upgrade()))

    def _resize(self) -> None:
        if self._record.size >= LARGEST:
            return
        size = self._record.size + self._rng.randint(1, 16) * self._record.stripe
        self._do(lambda: Running(["resize", self._device.name, str(size)]).checked())
        self._record.grow(size)

    def _change_hydration(self) -> None:
        rate = self._rng.choice((256 << 10, MIB, 4 * MIB))
        self._device.hydrate(run=self._rng.random() < 0.7, rate=rate)

    def _delete(self) -> None:
        self._do(self._device.stop)
        assert not os.path.lexists(self._device.path), "its link is left"
        assert not (RUN_ROOT / self._device.name).exists(), "its folder in /run is left"

    def _delete_and_add(self) -> None:
        self._rest()
        self._delete()
        self._assert_sound()
        self._do(self._device.start)
        self._compare()
        self._load()

    def _begin_anew(self) -> None:
        self._rest()
        self._delete()
        self._assert_sound()
        (self._folder / "base").unlink()
        self._begin()

    def _assert_sound(self) -> None:
        """See that the base is sound, and the image as it was."""
        Running(["check", str(self._folder / "base"), "--image", self._image.path]).checked()
        with open(self._image.path, "rb") as file:
            assert hashlib.file_digest(file, "sha256").digest() == self._digest, "the image changed"

