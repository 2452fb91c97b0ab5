"""A disk outlives its daemon: killed, ended or upgraded, its users see no error, lose no write.

Kills and upgrades in number, under fio, are the matter of test_kills.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.device import RUN_ROOT, Outcome
from support.guest import BLOCK, fails, flush, read, write
from support.load import Record, Writers
from support.mapper import delayed_writes
from support.mortal import Action
from support.ondisk import DATA_OFFSET, read_metadata
from support.processes import starting_pid
from support.served import ServedDisk, serve
from support.shell import run, until
from support.variant import Variant

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.launch import start_daemon
from ublk_ubi.links import resolve
from ublk_ubi.recovery import options_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.mortal import Mortal
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 8 * MIB
pytestmark = [pytest.mark.cpus(2), pytest.mark.usefixtures("no_watch")]


@pytest.fixture
def busy(ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str]) -> Busy:
    return Busy(ubi, make_image(SIZE - 3 * STRIPE - 512), make_base(SIZE))


class Busy:
    """A disk under load that is being hydrated, and what must be on it."""

    def __init__(self, ubi: Ubi, image: Image, base: str) -> None:
        self.ubi = ubi
        self.image = image
        self.device = ubi.new(image, base, stripe_size=STRIPE, size=SIZE, recovery=True)
        self.record = Record(image.content, SIZE, STRIPE)
        self.writers: Writers

    def start(self, seed: int, **options: object) -> None:
        self.device.start(**options)
        self.device.call("hydrate", {"run": True, "rate": 2 * MIB})
        self.writers = Writers(self.device, self.record, threads=4, seed=seed, first=1)

    def go_on(self, writes: int) -> None:
        """Let so many more writes complete."""
        self.writers.wait_for(sum(self.writers.completed) + writes)
        assert not self.writers.failed

    def end(self) -> None:
        """No request has failed, and all that was written is there, also when it is added anew."""
        self.writers.join(stop=True)
        assert not self.writers.failed
        assert self.record.check(self.device) == 0
        assert self.device.status()["generation"] == 1
        self.device.reopen()
        assert self.record.check(self.device) == 0
        self.image.assert_untouched()


def next_daemon(device: Device) -> int:
    """The process that claims a disk after the one that served it."""
    def other() -> int | None:
        pid = starting_pid(device.name)
        return pid if pid != device.pid else None

    return until(other, "a new daemon") or -1


def until_ended(pid: int) -> None:
    until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of process {pid}")


# -- killed -------------------------------------------------------------------------------------

def test_dying_amid_recovery_is_recoverable(busy: Busy, seed: int) -> None:
    """Killed between any two of its steps, a new daemon leaves the disk to the next."""
    rng = random.Random(seed)
    busy.start(seed)
    for _ in range(5):
        busy.go_on(20)
        busy.device.kill()
        recovering = Background(lambda: busy.ubi.command("recover", busy.device.name))
        pid = next_daemon(busy.device)
        recovering.wait(rng.random() / 4)
        os.kill(pid, signal.SIGKILL)
        recovering.result()
        until_ended(pid)
        busy.device.recover()
    busy.go_on(50)
    busy.end()


def test_what_died_is_shown_and_comes_back(busy: Busy, seed: int) -> None:
    busy.start(seed)
    busy.go_on(50)
    busy.device.kill()
    status = busy.ubi.command("status", busy.device.name)
    assert status.code == 3
    assert f"ublk-ubi recover {busy.device.name}" in status.stdout
    refused = busy.ubi.command("del", busy.device.name)
    assert (refused.code, busy.device.name in refused.stderr) == (5, True)
    busy.device.recover()
    again = busy.ubi.command("recover", busy.device.name)
    assert (again.code, "nothing to do" in again.stderr) == (5, True)
    busy.go_on(50)
    busy.end()


def test_add_takes_over_a_disk_in_use(busy: Busy, seed: int) -> None:
    """What a service manager does: the same `add` again."""
    busy.start(seed)
    busy.go_on(50)
    busy.device.kill()
    busy.device.start()
    busy.go_on(50)
    busy.end()


def test_a_forced_end_fails_what_waits(busy: Busy, seed: int) -> None:
    busy.start(seed)
    busy.go_on(20)
    busy.device.kill()
    busy.device.stop(force=True)
    busy.writers.join()
    assert busy.writers.failed
    busy.device.start()
    busy.record.check(busy.device)


def test_without_recovery_there_is_nothing_to_recover(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    device = ubi.add(make_image(SIZE), make_base(SIZE), recovery=False)
    device.kill()
    refused = ubi.command("recover", device.name)
    assert (refused.code, "--no-recovery" in refused.stderr) == (1, True)
    assert refused.stderr.count("\n") == 1


def test_who_comes_to_recover_a_disk_that_has_gone_leaves_nothing(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """A watch has seen its daemon die, and `del` is faster."""
    device = ubi.add(make_image(SIZE), make_base(SIZE), recovery=True)
    options = options_of(resolve(device.name))
    device.stop()
    with pytest.raises(UbiError, match=f"{device.name}: there is no disk to recover") as error:
        start_daemon(options, recover=True)
    assert error.value.code == Exit.NO_DEVICE
    assert not (RUN_ROOT / device.name).exists()


# -- the fence ----------------------------------------------------------------------------------

# What makes a new daemon wait for the base's lock, and for START_USER_RECOVERY.
NO_LOCK = [
    ("fence.py", "fcntl.flock(fd, kind | fcntl.LOCK_NB)", "pass"),
    ("base.py", "_OPEN_FLAGS | os.O_EXCL", "_OPEN_FLAGS"),
]
NO_UBLKC = [("session.py", "sync_fds[-1], self._ublkc, set(", "sync_fds[-1], -1, set(")]


class Held:
    """A disk whose daemon died with a write of its own to the base in flight."""

    def __init__(self, ubi: Ubi, undo: Undo, image: Image) -> None:
        self.ubi = ubi
        self.base: ServedDisk = serve(undo, DATA_OFFSET + SIZE)
        self.device: Device = ubi.new(
            image, self.base.path, stripe_size=STRIPE, recovery=True, data_path="copy",
        )

    def kill_while(self, what: str) -> Background[None] | None:
        """… of a "stripe" that was read, a "header" page, or a "guest", which waits as well."""
        self.device.start()
        write(self.device, 0, b"h" * BLOCK)
        flush(self.device)
        waiting: Background[None] | None = None
        if what == "header":
            self.base.hold(lambda request: request.is_metadata_write)
            write(self.device, 5 * STRIPE, b"c" * BLOCK)
            waiting = Background(lambda: flush(self.device))
        else:
            self.base.hold(lambda request: request.changes and request.offset >= DATA_OFFSET)
            if what == "stripe":
                read(self.device, 5 * STRIPE)
            else:
                waiting = Background(lambda: write(self.device, 0, b"o" * BLOCK))
        self.base.wait_for_held(1)
        self.device.kill()
        self.base.hold(None)
        assert waiting is None or not waiting.done
        return waiting

    def recover(self) -> Background[Outcome]:
        """Begin to recover it, and wait until the new daemon is at it."""
        recovering = Background(lambda: self.ubi.command("recover", self.device.name))
        until(lambda: starting_pid(self.device.name) or recovering.done, "a new daemon")
        return recovering

    def expect_recovered(self, recovering: Background[Outcome]) -> None:
        assert recovering.result().code == 0
        self.device.pid = int((RUN_ROOT / self.device.name / "pid").read_text())
        self.device.live = True
        assert read_metadata(self.base.path).extension.generation == 1


@pytest.fixture
def held(ubi: Ubi, undo: Undo, make_image: Callable[..., Image]) -> Held:
    return Held(ubi, undo, make_image(SIZE))


@pytest.mark.parametrize(
    ("what", "taken_out", "waits"),
    [
        ("stripe", NO_LOCK, True), ("stripe", NO_UBLKC, True),
        ("stripe", NO_LOCK + NO_UBLKC, False),
        ("header", NO_LOCK, True), ("header", NO_UBLKC, True),
        ("header", NO_LOCK + NO_UBLKC, False),
        # A queue's ring has ublkc in any case: its commands go there.
        ("guest", [], True), ("guest", NO_LOCK, True),
    ],
    ids=[
        "stripe-ublkc-alone", "stripe-lock-alone", "stripe-neither",
        "header-ublkc-alone", "header-lock-alone", "header-neither",
        "guest-both", "guest-ublkc-alone",
    ],
)
def test_recovery_waits_until_the_last_write_has_landed(
    held: Held, tmp_path: Path, what: str, taken_out: list[tuple[str, str, str]], waits: bool,
) -> None:
    """The lock on the base, and ublkc in the rings: each alone keeps a newcomer out."""
    variant = Variant(tmp_path)
    for file, text, by in taken_out:
        variant.replace(file, text, by)
    with variant.in_use():
        waiting = held.kill_while(what)
        recovering = held.recover()
        assert recovering.wait(1.0 if waits else 30.0) is not waits
        assert len(held.base.held) == 1
        held.base.release()
        held.expect_recovered(recovering)
    if waiting is not None:
        waiting.result()
    if what == "guest":
        assert read(held.device, 0) == b"o" * BLOCK


def test_recovery_waits_for_a_slow_disk(
    ubi: Ubi, mortal: Mortal, mapper: Mapper, make_image: Callable[..., Image],
    make_base: Callable[..., str],
) -> None:
    """Writes of a guest, of a stripe and of a header page are under way; they land by themselves.

    The new daemon ends before its first fdatasync, and so before any write of its own.
    """
    base = mapper.map(make_base(SIZE, on="ram"))
    device = ubi.new(make_image(SIZE), base.path, stripe_size=STRIPE, recovery=True)
    device.environment = mortal.environment
    device.start(data_path="copy", copy_on_read=True)
    write(device, 0, b"h" * BLOCK)
    flush(device)
    # A tick may commit a stripe before its page can be held up: then it is the next one's.
    for stripe in range(10, 60):
        write(device, stripe * STRIPE, b"c" * BLOCK)
        base.delay(write_ms=8000, flush_ms=0)
        flushing = Background(lambda: flush(device))
        until(
            lambda flushing=flushing: flushing.done or delayed_writes(base) == 1,
            "a header page is under way",
        )
        if not flushing.done:
            break
        base.linear()
    assert not flushing.done, "a tick was faster each time"
    writing = Background(lambda: write(device, 0, b"o" * BLOCK))
    read(device, 9 * STRIPE)
    until(lambda: delayed_writes(base) == 3, "all of the three are under way")
    device.kill()
    assert delayed_writes(base) == 3
    mortal.bury()
    mortal.die_before(Action.SYNC)
    assert ubi.command("recover", device.name, environment=mortal.environment).code == 1
    assert delayed_writes(base) == 0
    assert mortal.died_before is Action.SYNC
    base.linear()
    device.recover()
    flushing.result()
    writing.result()
    assert read(device, 0) == b"o" * BLOCK
    assert read(device, stripe * STRIPE) == b"c" * BLOCK


# -- ended and upgraded ------------------------------------------------------------------------

def test_a_daemon_that_is_told_to_end_leaves_a_disk_in_use(busy: Busy, seed: int) -> None:
    busy.start(seed)
    busy.go_on(50)
    os.kill(busy.device.pid, signal.SIGTERM)
    until(lambda: not busy.device.running, "the daemon's end")
    busy.device.live = False
    status = busy.ubi.command("status", busy.device.name)
    assert (status.code, "left" in status.stdout) == (3, True)
    busy.device.recover()
    busy.go_on(50)
    busy.end()


def test_a_takeover_that_is_ended_keeps_its_rings_until_its_queues_have_ended(
    busy: Busy, seed: int, tmp_path: Path,
) -> None:
    """Its disk has requests already, though it is not live yet.

    Linux 6.12 forgets one for ever that comes while its tags are taken back from a thread that goes
    on: then nobody ever takes the disk over. Newer kernels do not, so the order is what is seen.
    """
    variant = Variant(tmp_path)
    variant.replace(
        "session.py", "if taken_over:  # by now",
        f"if not os.kill(os.getpid(), {signal.SIGTERM.value}):  # by now",
    )
    variant.replace(
        "session.py", "            self.plane.release()\n",
        f"            os.kill(os.getpid(), {signal.SIGSTOP.value})\n"
        "            self.plane.release()\n",
    )
    busy.start(seed)
    busy.go_on(50)
    busy.device.kill()
    with variant.in_use():
        recovering = Background(lambda: busy.ubi.command("recover", busy.device.name))
        pid = next_daemon(busy.device)
        until(lambda: " T " in Path(f"/proc/{pid}/stat").read_text(), "it has ended its threads")
        assert len(os.listdir(f"/proc/{pid}/task")) == 1
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert files.count("anon_inode:[io_uring]") == 1
        os.kill(pid, signal.SIGCONT)
        outcome = recovering.result()
    assert (outcome.code, "ended by SIGTERM" in outcome.stderr) == (1, True)
    busy.device.recover()
    busy.go_on(50)
    busy.end()


def test_an_upgrade_keeps_hydration(busy: Busy, seed: int) -> None:
    """What it was told since it was added; the old daemon ends."""
    busy.start(seed)
    busy.go_on(50)
    before = busy.device.pid
    busy.device.upgrade()
    assert busy.device.pid != before
    until_ended(before)
    busy.go_on(50)
    assert busy.device.status()["hydration"]["state"] in ("running", "done")
    busy.end()


def test_an_owner_who_is_gone_keeps_no_disk_from_coming_back(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], undo: Undo,
    tmp_path: Path,
) -> None:
    """The node has an owner by number; whether there still is such a user is nobody's matter."""
    users = tmp_path / "passwd"
    users.write_text(Path("/etc/passwd").read_text() + "tenant:x:4321:8765::/:/bin/false\n")
    with contextlib.ExitStack() as there:
        run("mount", "--bind", users, "/etc/passwd")
        there.callback(run, "umount", "/etc/passwd")
        undo.enter_context(there)
        device = ubi.add(make_image(SIZE), make_base(SIZE), stripe_size=STRIPE, recovery=True,
                         owner="tenant")
        there.close()
    device.kill()
    device.recover()
    node = os.stat(device.node)
    assert (node.st_uid, node.st_gid) == (4321, 8765)


def test_what_hydration_is_told_while_the_next_daemon_loads_counts(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], tmp_path: Path,
) -> None:
    device = ubi.add(make_image(SIZE), make_base(SIZE), stripe_size=STRIPE, recovery=True,
                     hydrate=True, rate=STRIPE)
    variant = Variant(tmp_path)
    begin = "        left_at = time.monotonic()\n        try:\n"
    told = '        rpc.call(device.socket, "hydrate", {"run": False, "rate": 1048576})\n'
    variant.replace("recovery.py", begin, told + begin)
    with variant.in_use():
        device.upgrade()
    hydration = device.status()["hydration"]
    assert (hydration["rate"], hydration["state"]) == (MIB, "off")


def test_an_upgrade_that_fails_goes_back_to_the_old_daemon(
    busy: Busy, seed: int, tmp_path: Path,
) -> None:
    busy.start(seed)
    busy.go_on(50)
    variant = Variant(tmp_path)
    variant.replace("session.py", "        self._ublkc = self.device.open_char()\n",
                    '        raise UbiError("planted")\n')
    with variant.in_use():
        outcome = busy.ubi.command("upgrade", busy.device.name)
    assert (outcome.code, outcome.stderr.count("\n")) == (1, 1)
    assert "planted" in outcome.stderr
    assert "the old one goes on" in outcome.stderr
    assert busy.device.running
    busy.go_on(50)
    busy.end()


def test_an_upgrade_to_what_cannot_read_the_table_touches_nothing(
    busy: Busy, seed: int, tmp_path: Path,
) -> None:
    busy.start(seed)
    variant = Variant(tmp_path)
    variant.replace("table.py", "VERSION = 1\n", "VERSION = 2\n")
    with variant.in_use():
        outcome = busy.ubi.command("upgrade", busy.device.name)
    assert (outcome.code, "table of version 1" in outcome.stderr) == (1, True)
    busy.go_on(50)
    busy.end()


def test_an_image_that_has_changed_is_not_served_by_the_next_daemon(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """The fingerprint cannot notice it: what was copied before and what is there now do not go
    together."""
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, recovery=True,
                     copy_on_read=False)
    changed = 37 * STRIPE + 3 * BLOCK      # lies in none of the blocks that it looks at
    write(device, changed - 3 * BLOCK, b"h" * BLOCK)
    with open(image.path, "r+b") as file:
        file.seek(changed + STRIPE)
        file.write(b"x")
    state = RUN_ROOT / device.name / "state.json"
    until(lambda: "has changed" in state.read_text(), "it is noticed, and noted")
    for killed in (False, True):
        if killed:
            device.kill()
            device.recover()
        else:
            device.upgrade()
        status = ubi.command("status", device.name, "--json")
        assert status.code == 3
        assert image.path in status.json()["degraded"]
        assert fails(read, device, changed + STRIPE)
        assert read(device, changed) == image.content[changed : changed + BLOCK]
        device.call("hydrate", {"run": True})
        assert device.status()["hydration"]["state"] == "no-image"
    device.reopen()                        # on its user's own account
    assert device.status()["degraded"] is None
    assert read(device, changed + STRIPE)[:1] == b"x"


def test_a_disk_that_needs_no_image_comes_back_whatever_has_taken_its_place(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    """It was closed, and may be deleted: there may be a newer one under its name by then."""
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, recovery=True, hydrate=True)
    device.wait_until_independent()
    write(device, 0, b"w" * BLOCK)
    os.unlink(image.path)
    Path(image.path).write_bytes(bytes(2 * SIZE))
    device.kill()
    device.recover()
    assert device.status()["independent"]
    device.upgrade()
    assert device.status()["independent"]
    assert read(device, 0, SIZE) == b"w" * BLOCK + image.content[BLOCK:]
    device.stop()
    assert image.path in ubi.refused(image, device.options["base"], code=1)


# -- growing ------------------------------------------------------------------------------------

def test_a_disk_grows_under_load(busy: Busy, seed: int) -> None:
    busy.start(seed)
    busy.go_on(50)
    outcome = busy.ubi.command("resize", busy.device.name, 2 * SIZE)
    assert outcome.code == 0, outcome
    write(busy.device, 2 * SIZE - BLOCK, b"e" * BLOCK)
    assert read(busy.device, SIZE, SIZE - BLOCK) == bytes(SIZE - BLOCK)
    smaller = busy.ubi.command("resize", busy.device.name, SIZE)
    assert (smaller.code, "not shrink" in smaller.stderr) == (1, True)
    busy.device.kill()
    busy.device.recover()
    assert read(busy.device, 2 * SIZE - BLOCK) == b"e" * BLOCK
    busy.go_on(50)
    busy.device.options.pop("size")
    busy.end()
    assert read(busy.device, 2 * SIZE - BLOCK) == b"e" * BLOCK
