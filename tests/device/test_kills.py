"""Killed again and again under fio: no request fails, all that was written is there.

A daemon dies at any time, or right before an action that the test has chosen, also amid recovery.
A kill counts only if, at that very moment, a guest's write was under way and a stripe was FETCHING
or not committed; others are repeated. fio writes one part of the disk and verifies it; another part
has writers with a record of every sector.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from support.fio import Fio
from support.load import Record, Writers
from support.mortal import Action
from support.ondisk import read_bits
from support.shell import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.device import Ubi
    from support.images import Image
    from support.mortal import Mortal
    from support.undo import Undo

pytestmark = [
    pytest.mark.cpus(2),
    pytest.mark.usefixtures("no_watch"),
    pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio"),
]

KILLS = -(-int(os.environ.get("UBLK_UBI_KILLS", "4")) // 4)     # that count, of each of four modes
UPGRADES = int(os.environ.get("UBLK_UBI_UPGRADES", "2"))         # in a row, of each mode
MORE_UPGRADES = 4                  # where none of these was quick: other guests' work may be why
PAUSE_S = 1.0                      # the longest that an upgrade may take from a guest

MIB = 1 << 20
STRIPE = 64 << 10
WINDOW = 4 * MIB                   # what a run of fio writes
WINDOWS = 6
OWN = 6 * MIB                      # behind them: of those who keep a record
SIZE = WINDOWS * WINDOW + OWN
DEPTH = 64
TABLE_HEADER = 4096
# Of which action a daemon dies, and before how many of them at most; None: at any time.
CHOICES: dict[Action | None, int] = {
    Action.STRIPE_WRITE: 12, Action.COMMIT: 200, Action.HEADER_WRITE: 3, None: 200,
    Action.TABLE_UPDATE: 12, Action.SYNC: 6, Action.BASE_WRITE: 60, Action.DOORBELL: 20,
    Action.STRIPE_READ: 12,
}
MODES = pytest.mark.parametrize(
    ("data_path", "queues"),
    [("zero-copy", 1), ("zero-copy", 2), ("copy", 1), ("copy", 2)],
    ids=["zero-copy-1q", "zero-copy-2q", "copy-1q", "copy-2q"],
)


class Loaded:
    """A disk that is being hydrated and written by fio and by writers with a record."""

    def __init__(
        self, ubi: Ubi, undo: Undo, mortal: Mortal, image: Image, base: str, folder: Path,
    ) -> None:
        self.image = image
        self.mortal = mortal
        self.device = ubi.new(image, base, size=SIZE, stripe_size=STRIPE, recovery=True)
        self.device.environment = mortal.environment
        self.longest_s = 0.0           # a request of fio's
        self._undo = undo
        self._folder = folder
        self._seed = 0
        self._queues = 1
        self._record = Record(image.content, SIZE, STRIPE, start=WINDOWS * WINDOW)
        self._writers: Writers
        self._runs: list[Fio] = []

    def start(self, seed: int, data_path: str, queues: int) -> None:
        self._seed, self._queues = seed, queues
        self.device.start(data_path=data_path, queues=queues, depth=DEPTH)
        self.device.hydrate(run=True, rate=MIB)
        self._writers = Writers(self.device, self._record, threads=2, seed=seed, first=1)
        self.keep_busy()

    def keep_busy(self) -> bool:
        """See to it that fio writes; False when it has written its whole part of the disk."""
        if self._runs and not self._runs[-1].done:
            return True
        self._finish_run()
        number = len(self._runs)
        if number == WINDOWS:
            return False
        self._runs.append(Fio(
            self.device, self._undo, self._folder, start=number * WINDOW,
            part=WINDOW // self._queues, jobs=self._queues, seed=self._seed + number,
        ))
        return True

    def _finish_run(self) -> None:
        if self._runs:
            result = self._runs[-1].result()
            self.longest_s = max(self.longest_s, result["write"]["clat_ns"]["max"] / 1e9)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Let it be busy until something holds; False when fio has no more to write before that."""
        until(lambda: condition() or not self.keep_busy(), "what has to come under load", 60.0)
        self.mortal.spare()
        return condition()

    def go_on(self, requests: int) -> bool:
        """Let so many more requests complete; False when fio has no more to write before that."""
        target = self.mortal.done(Action.COMMIT) + requests
        return self.until(lambda: self.mortal.done(Action.COMMIT) >= target)

    def upgrade(self) -> float:
        """Upgrade it; seconds that its users were not served.

        No longer than the command says, nor than the writers' longest request took.
        """
        self._writers.longest_s = [0.0, 0.0]
        before = self.device.pid
        pause_s = self.device.upgrade()
        assert self.device.pid != before
        self._writers.wait_for(sum(self._writers.completed) + 4)
        return min(pause_s, max(self._writers.longest_s))

    def uncommitted(self) -> int:
        """Stripes that the table has and the base's headers have not."""
        path = self.device.table()
        if path is None:
            return 0
        rows = path.read_bytes()[TABLE_HEADER:]
        committed = read_bits(self.device.options["base"], len(rows))
        return len({stripe for stripe, row in enumerate(rows) if row} - committed)

    def end(self) -> None:
        """No request has failed, and all that was written is there, also when it is added anew."""
        self._writers.join(stop=True)
        assert not self._writers.failed
        self._finish_run()
        self._check()
        self.device.reopen()
        self._check()
        self.image.assert_untouched()
        self.device.stop()

    def _check(self) -> None:
        assert self._record.check(self.device) == 0
        for run in self._runs:
            run.verify()


@pytest.fixture
def new_disk(
    ubi: Ubi, undo: Undo, mortal: Mortal, make_image: Callable[..., Image],
    make_base: Callable[..., str], tmp_path: Path,
) -> Callable[[], Loaded]:
    image = make_image(SIZE - 3 * STRIPE - 512)
    return lambda: Loaded(ubi, undo, mortal, image, make_base(SIZE), tmp_path)


class Killer:
    """Kills daemons, and keeps count of what was under way."""

    def __init__(self, mortal: Mortal, seed: int, first: int) -> None:
        choices = list(CHOICES)
        self._mortal = mortal
        self._rng = random.Random(seed)
        self._next = itertools.cycle(choices[first:] + choices[:first])
        self.counted: Counter[str] = Counter()
        self.repeated: Counter[str] = Counter()
        self.amid_recovery = 0

    @property
    def kills(self) -> int:
        return self.counted.total()

    def run(self, disk: Loaded, kills: int) -> None:
        """Kill and recover until so many kills have counted or the disk is full."""
        while self.kills < kills:
            action = next(self._next)
            if not self._kill(disk, action):
                return
            self._judge(disk, action.name if action else "any time")
            assert self.repeated.total() <= 4 * kills + 20, (self.counted, self.repeated)
            self._recover(disk)

    def _kill(self, disk: Loaded, action: Action | None) -> bool:
        number = self._rng.randint(1, CHOICES[action])
        if action is not None:
            self._mortal.die_before(action, number)
            return disk.until(disk.device.is_dead)
        if not disk.go_on(number):
            return False
        disk.device.kill()
        return True

    def _judge(self, disk: Loaded, name: str) -> None:
        """Look at what the dead daemon had under way."""
        writes, stripes = self._mortal.writes, self._mortal.stripes
        uncommitted = disk.uncommitted()
        counts = writes > 0 and (stripes > 0 or uncommitted > 0)
        (self.counted if counts else self.repeated)[name] += 1
        print(f"{'killed' if counts else '(killed'} before {name}: {writes} writes under way, "
              f"{stripes} stripes FETCHING, {uncommitted} not committed{'' if counts else ')'}")

    def _recover(self, disk: Loaded) -> None:
        """Recover; now and then, the first to try dies as well."""
        if self._rng.random() < 1 / 3:
            tags = disk.device.options["queues"] * DEPTH
            self._mortal.die_before(Action.FETCH, self._rng.randint(1, tags))
            with pytest.raises(AssertionError, match="was killed by SIGKILL"):
                disk.device.recover()
            self.amid_recovery += 1
        self._mortal.bury()
        disk.device.recover()


@MODES
@pytest.mark.limit(60 + 40 * KILLS)
def test_kills_under_fio(
    new_disk: Callable[[], Loaded], mortal: Mortal, seed: int, data_path: str, queues: int,
) -> None:
    first = 4 * (data_path == "copy") + 2 * (queues - 1)
    killer = Killer(mortal, seed, first)
    disks = 0
    while killer.kills < KILLS:
        disk = new_disk()
        disk.start(seed + disks, data_path, queues)
        killer.run(disk, KILLS)
        disk.end()
        disks += 1
    print(f"{killer.kills} kills on {disks} disks: {dict(killer.counted)}; repeated "
          f"{dict(killer.repeated)}; {killer.amid_recovery} more amid recovery")


@MODES
@pytest.mark.limit(60 + 40 * UPGRADES + 20 * MORE_UPGRADES)
def test_upgrades_under_fio(
    new_disk: Callable[[], Loaded], seed: int, data_path: str, queues: int,
) -> None:
    rng = random.Random(seed)
    pauses: list[float] = []
    disks = 0

    def enough() -> bool:
        return len(pauses) >= UPGRADES and (
            min(pauses) <= PAUSE_S or len(pauses) >= UPGRADES + MORE_UPGRADES)

    while not enough():
        disk = new_disk()
        disk.start(seed + disks, data_path, queues)
        disks += 1
        while not enough() and disk.go_on(rng.randint(1, 300)):
            pauses.append(disk.upgrade())
        disk.end()
        print(f"a request of fio's took {disk.longest_s:.3f} s at most")
    pauses.sort()
    print(f"{len(pauses)} upgrades on {disks} disks; requests waited {pauses[0]:.3f} to "
          f"{pauses[-1]:.3f} s")
    # The few of continuous integration share the processors with other guests.
    assert pauses[-1 if len(pauses) >= 20 else 0] <= PAUSE_S
