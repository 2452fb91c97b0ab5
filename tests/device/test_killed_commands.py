"""Killed at any step of add, del, recover, upgrade or resize: the next command clears up.

Who dies is the command, a daemon or a control helper. What must be: one line from whoever is left
to say it, no process that hangs, no device without a daemon to come, nothing left below
/run/ublk-ubi, no lost write; and no request of a disk in use fails.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import watch
from support.device import RUN_ROOT, Running
from support.direct import block_size
from support.guest import BLOCK, read
from support.load import Record, Writers
from support.shell import until
from support.steps import Role, Steps, build

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Outcome, Ubi
    from support.images import Image
    from support.undo import Undo

# Of a command and role; 0: every one. By default one of a command, in a role that the seed chooses.
POINTS = int(os.environ.get("UBLK_UBI_STEPS", "1"))
MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
SETTLE_S = 60.0
# Of helpers' steps: answers to ADD_DEV and, when one was forked that stands ready, START_DEV.
ADDED, STARTED = 7, 14
pytestmark = [
    pytest.mark.cpus(2), pytest.mark.usefixtures("no_watch"),
    pytest.mark.limit(200 if POINTS == 1 else 3000),
]


@pytest.fixture(scope="session")
def steps_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("steps"))


@pytest.fixture
def steps(steps_library: Path, tmp_path: Path, undo: Undo) -> Steps:
    return Steps(steps_library, tmp_path, undo)


class Scene:
    """A disk and what must be on it; `words` is the command that is killed."""

    words: tuple[object, ...] = ()

    def __init__(self, ubi: Ubi, steps: Steps, image: Image, base: str, seed: int) -> None:
        self.image = image
        self.base = base
        self.seed = seed
        self.device = ubi.new(image, base, size=SIZE, stripe_size=STRIPE, recovery=True)
        self.device.environment = steps.environment
        self.record = Record(image.content, SIZE, STRIPE)
        self.before = watch.inventory()
        self.writers: Writers | None = None
        self._number = 1

    # -- to be said by each command --

    def prepare(self) -> None:
        """Have everything so that the command can be run."""

    def run(self) -> Outcome:
        return self.command(*self.words)

    def clear_up(self) -> None:
        """What an operator does next, and what must be then."""

    # -- what they share --

    def command(self, word: object, *words: object) -> Outcome:
        said = [str(word), self.device.name, *map(str, words)]
        return Running(said, environment=self.device.environment).outcome()

    def state(self) -> str:
        outcome = self.command("status", "--json")
        if outcome.code == 4:
            return "none"
        status = outcome.json()
        if status["state"] == "live":
            self.device.pid, self.device.live = status["pid"], True
            self.device.node, self.device.path = status["device"], status["link"]
        return str(status["state"])

    def settled(self) -> str:
        """Its state, once no daemon is on the way up or down."""
        self.device.live = False
        return until(
            lambda: state if (state := self.state()) not in ("starting", "stopping") else "",
            "a state that lasts", SETTLE_S,
        )

    def load(self) -> None:
        """Have writers, if there are none."""
        if self.writers is None:
            self.writers = Writers(
                self.device, self.record, threads=2, seed=self.seed, first=self._number,
            )

    def go_on(self, writes: int = 10) -> None:
        """Let so many more writes complete."""
        if self.writers is not None:
            self.writers.wait_for(sum(self.writers.completed) + writes)
            assert not self.writers.failed

    def rest(self) -> None:
        """No writers any more; none of their requests has failed."""
        if self.writers is not None:
            self.writers.join(stop=True)
            assert not self.writers.failed
            self._number = self.writers.next_number
            self.writers = None

    def serve_again(self) -> None:
        """Have a daemon: the one that is there, or one that `recover` brings."""
        if self.settled() != "live":
            recovering = self.command("recover")
            # 5: the old daemon of an upgrade was faster.
            assert recovering.code in (0, 5), recovering
            until(lambda: self.state() == "live", "a live disk", SETTLE_S)
        self.load()
        self.go_on()

    def assert_nothing_left(self, *, but_table: bool = False) -> None:
        """`but_table`: what a dead daemon had not committed is known to its table until `add`."""
        tables = {str(path) for path in (RUN_ROOT / ".tables").iterdir()} if but_table else set()
        assert not watch.leaks(self.before, tables)

    def end(self) -> None:
        self.rest()
        if self.settled() == "live":
            assert self.record.check(self.device) == 0
            self.device.reopen()
        else:
            self.device.start()
        assert self.record.check(self.device) == 0
        self.device.stop()
        self.assert_nothing_left()


class Add(Scene):
    """On a new base and on one that has writes, in turn."""

    turn = 0

    def prepare(self) -> None:
        self.turn += 1
        if self.turn % 2:
            Path(self.base).unlink(missing_ok=True)
            self.record = Record(self.image.content, SIZE, STRIPE)

    def run(self) -> Outcome:
        return self.device.begin_start().outcome()

    def clear_up(self) -> None:
        state = self.settled()
        if state != "live" and self.turn % 4 >= 2:
            deleted = self.command("del", "--if-exists")
            assert deleted.code == 0, deleted
            self.assert_nothing_left(but_table=True)
        if state != "live":
            self.device.start()
        assert self.record.check(self.device) == 0
        self.load()
        self.go_on()
        self.rest()
        self.device.stop()
        self.assert_nothing_left()


class Del(Scene):
    """Of a disk that nobody uses, with writes that no flush has covered."""

    words = ("del",)

    def prepare(self) -> None:
        if self.settled() != "live":
            self.device.start()
        self.load()
        self.go_on()
        self.rest()

    def clear_up(self) -> None:
        self.settled()
        deleted = self.command("del", "--if-exists")
        assert deleted.code == 0, deleted
        self.device.live = False
        self.assert_nothing_left(but_table=True)
        self.device.start()
        assert self.record.check(self.device) == 0


class Recover(Scene):
    """Of a disk whose daemon died under load."""

    words = ("recover",)

    def prepare(self) -> None:
        if self.settled() != "live":
            self.device.start()
        self.load()
        self.go_on()
        self.device.kill()

    def clear_up(self) -> None:
        self.serve_again()


class Upgrade(Scene):
    """Of a disk under load; the old daemon goes on where the new one does not come up."""

    words = ("upgrade",)

    def prepare(self) -> None:
        if self.settled() != "live":
            self.device.start()
        self.load()
        self.go_on()

    def clear_up(self) -> None:
        self.serve_again()


class Resize(Upgrade):
    """Of a disk under load, and of its base, which is a file."""

    size = SIZE

    def prepare(self) -> None:
        super().prepare()
        self.size += STRIPE

    def run(self) -> Outcome:
        return self.command("resize", self.size)

    def clear_up(self) -> None:
        self.serve_again()
        resized = self.run()
        assert resized.code == 0, resized
        assert block_size(self.device.node) == self.size
        assert read(self.device, self.size - BLOCK) == bytes(BLOCK)
        # It is as large as it became when it is added again.
        self.device.options["size"] = None


def points(total: int, rng: random.Random) -> list[int]:
    every = range(1, total + 1)
    return list(every) if POINTS == 0 else sorted(rng.sample(every, min(POINTS, total)))


@pytest.mark.parametrize("kind", [Add, Del, Recover, Upgrade, Resize])
def test_killed_at_any_step(
    kind: type[Scene], ubi: Ubi, steps: Steps, make_image: Callable[..., Image],
    make_base: Callable[..., str], seed: int,
) -> None:
    rng = random.Random(seed)
    scene = kind(ubi, steps, make_image(SIZE - 3 * STRIPE - 512), make_base(SIZE), seed)
    for role in [rng.choice(list(Role))] if POINTS == 1 else Role:
        scene.prepare()
        steps.count(role)
        whole = scene.run()
        total = steps.counted()
        assert whole.code == 0, whole
        assert total > 0
        scene.clear_up()
        for number in points(total, rng):
            scene.prepare()
            steps.die_before(role, number)
            outcome = scene.run()
            step = steps.died()
            print(f"{role.name} before step {number} of {total}, {step!r}: exit {outcome.code}: "
                  f"{outcome.stderr.strip()}")
            assert len(outcome.stderr.splitlines()) <= 1, outcome.stderr
            assert "Traceback" not in outcome.stderr
            scene.clear_up()
            until(lambda: not watch.stuck_processes(), "no process in D state")
    scene.end()


@pytest.mark.parametrize("answer", [ADDED, STARTED], ids=["ADD_DEV", "START_DEV"])
def test_what_a_dead_helper_has_made_is_deleted(
    ubi: Ubi, steps: Steps, make_image: Callable[..., Image], make_base: Callable[..., str],
    seed: int, answer: int,
) -> None:
    """It ends before it can tell of the device that it has made, or started."""
    scene = Add(ubi, steps, make_image(SIZE), make_base(SIZE), seed)

    def died_before_it() -> bool:
        """Not when the helper that stands ready says so later than it does as a rule."""
        scene.turn = 0
        scene.prepare()
        steps.die_before(Role.HELPER, answer)
        outcome = scene.run()
        if (step := steps.died()).startswith("write") and outcome.code == 1:
            assert "helper ended in a command" in outcome.stderr
            return True
        print(f"exit {outcome.code}, and the step was {step!r}")
        scene.clear_up()
        return False

    until(died_before_it, "a helper that ends before its answer", SETTLE_S)
    assert not os.path.exists(scene.base)
    scene.assert_nothing_left()
