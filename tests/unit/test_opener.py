"""The opener, on real files: what it leaves of a base that it could not open after all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest
from unit.enginekit import ubiformat

from ublk_ubi._opener import Opener
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.table import TableHost, boot_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

METADATA = 8 << 20
SIZE = 1 << 20


class Host(TableHost):
    """The tables, and nothing of a device; `meanwhile` is called before the base is written."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def before_write(self, _opener: Opener) -> None:
        self.meanwhile()

    def zero_tail(self, opener: Opener) -> None:
        pass

    def created(self) -> None:
        pass


class Disk:
    """A base of one MiB, its opener, and where its tables are."""

    def __init__(self, path: Path, tables: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self.fd, METADATA + SIZE)
        self.host = Host(str(tables))
        self.opener = Opener(
            base_fd=self.fd, sync_fd=self.fd, base_bytes=METADATA + SIZE, image_bytes=SIZE,
            identity=(1, os.fstat(self.fd).st_ino), fingerprint=bytes(32), new_uuid=os.urandom(16),
            boot_id=boot_id(), stripe_bytes=0, default_stripe_bytes=64 << 10, block_bytes=512,
            device_bytes=SIZE, format=False, adopt=False, force=False, force_stale=False,
            no_image=False,
        )

    def open(self) -> None:
        self.opener.open(self.host)

    def end(self) -> None:
        self.opener.close(self.host)
        self.host.table.close()

    def let_go(self) -> None:
        os.close(self.fd)
        self.fd = -1

    @property
    def slot(self) -> ubiformat.Slot:
        """The slot that counts."""
        slots = [
            ubiformat.parse_slot(os.pread(self.fd, ubiformat.SLOT_BYTES, at))
            for at in ubiformat.SLOT_OFFSETS
        ]
        return max(slots, key=lambda slot: slot.sequence)

    @property
    def says_open(self) -> tuple[bool, bool]:
        """What the extension says, and what bdev_ubi would see."""
        return self.slot.is_open, ubiformat.parse_head(os.pread(self.fd, 4096, 0)).minor == 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """Make a base, or have the one that is there; each call is another opener."""
    made = []

    def make(name: str) -> Disk:
        made.append(Disk(tmp_path / name, tmp_path / "tables"))
        return made[-1]

    (tmp_path / "tables").mkdir()
    yield make
    for one in made:
        if one.fd >= 0:
            one.let_go()


def test_a_base_is_let_go_at_once(disk: Callable[[str], Disk], tmp_path: Path) -> None:
    """Its ring has the base, and with it the lock; the kernel takes rings down later, unasked."""
    def is_locked() -> bool:
        with (tmp_path / "base").open("rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def fail() -> None:
        raise UbiError("no device")

    for _ in range(10):
        failing = disk("base")
        fcntl.flock(failing.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        failing.host.meanwhile = fail
        with pytest.raises(UbiError, match="no device"):
            failing.open()
        assert is_locked()
        failing.let_go()
        assert not is_locked()


def test_a_copy_that_another_opener_overtakes_is_closed_again(
    disk: Callable[[str], Disk], tmp_path: Path,
) -> None:
    """It has looked for a table, and found none; by when its own is made, there is one."""
    new = disk("base")
    new.open()
    new.end()
    shutil.copy(tmp_path / "base", tmp_path / "copy")
    base, copy = disk("base"), disk("copy")
    copy.host.meanwhile = base.open
    with pytest.raises(UbiError, match="its base is a copy") as caught:
        copy.open()
    assert caught.value.code == Exit.BUSY
    assert copy.says_open == (False, False)
    assert base.says_open == (True, True)
    assert os.listdir(tmp_path / "tables") == [os.path.basename(base.host.path)]
    base.end()
    again = disk("copy")
    again.open()
    assert again.says_open == (True, True)
    again.end()
    assert os.listdir(tmp_path / "tables") == []


def test_a_size_is_recorded_while_the_base_is_open(disk: Callable[[str], Disk]) -> None:
    new = disk("base")
    new.open()
    assert new.opener.recorded_device_bytes == new.slot.device_bytes == SIZE
    new.opener.grow(new.host, 2 * SIZE)
    assert new.opener.recorded_device_bytes == new.slot.device_bytes == 2 * SIZE
    new.end()
    assert new.slot.device_bytes == 2 * SIZE
    before = new.slot
    with pytest.raises(OSError, match="shutdown"):
        new.opener.grow(new.host, 3 * SIZE)
    with pytest.raises(OSError, match="shutdown"):
        new.opener.close(new.host)
    assert new.slot == before


def test_who_has_let_go_of_a_base_writes_nothing_more(disk: Callable[[str], Disk]) -> None:
    """Its next daemon may have it by then."""
    new = disk("base")
    new.open()
    new.opener.let_go()
    before = new.slot
    with pytest.raises(OSError, match="shutdown"):
        new.opener.grow(new.host, 2 * SIZE)
    assert new.slot == before
    assert new.says_open == (True, True)
    new.host.table.close()


def test_a_growth_that_waits_holds_up_nobody_who_leaves(
    disk: Callable[[str], Disk], monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = disk("base")
    new.open()
    new.host.latch_table(new.opener.uuid, errno.EIO)
    began, answers = threading.Event(), threading.Event()
    monkeypatch.setattr(new.host, "latch_table", lambda *_: began.set() or answers.wait())
    failed: list[int | None] = []

    def grow() -> None:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
            new.opener.grow(new.host, 2 * SIZE)
        failed.append(caught.value.errno)

    growing = threading.Thread(target=grow)
    growing.start()
    began.wait()
    new.opener.let_go()
    assert growing.is_alive()
    answers.set()
    growing.join()
    assert failed == [errno.EIO]
    with pytest.raises(OSError, match="shutdown"):
        new.opener.grow(new.host, 2 * SIZE)
    new.host.table.close()


def test_a_failed_fdatasync_of_another_thread_is_a_growths_as_well(
    disk: Callable[[str], Disk],
) -> None:
    """It may have had the only report of what was lost."""
    new = disk("base")
    new.open()
    new.host.latch_table(new.opener.uuid, errno.ENOSPC)
    before = new.slot
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        new.opener.grow(new.host, 2 * SIZE)
    assert new.slot == before
    assert new.host.table.latched == errno.ENOSPC
    new.end()
