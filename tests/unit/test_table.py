"""The table files: what is found again, what is not taken for a table, locks, names, the latch."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ublk_ubi import table as table_module
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.table import (
    HEADER_BYTES,
    LATCH_OFFSET,
    FoundTable,
    Identity,
    TableHost,
    TableState,
    look,
)

CHECKOUT = Path(__file__).resolve().parents[2]
UUID = bytes(range(16))
STRIPES = 300
IDENTITY = Identity(
    uuid=UUID, fingerprint=bytes(range(32)), generation=(1 << 63) + 1, device=(1 << 64) - 1,
    inode=1 << 40, image_bytes=(1 << 41) + 1, stripe_bytes=1 << 20, image_stripes=STRIPES,
)
NONE = FoundTable(TableState.NONE)
LIVE = FoundTable(TableState.LIVE)
DAMAGED = FoundTable(TableState.DAMAGED)


@pytest.fixture
def host(tmp_path: Path) -> TableHost:
    return TableHost(str(tmp_path))


@pytest.fixture
def other(tmp_path: Path) -> TableHost:
    """Another daemon's."""
    return TableHost(str(tmp_path))


def name(host: TableHost, *, temporary: bool = False) -> str:
    return host._temporary(UUID) if temporary else host._path(UUID)


def left(host: TableHost, identity: Identity = IDENTITY, *, latch: int = 0) -> str:
    """Leave a table as a killed daemon does; return its path."""
    table = host.make_table(identity)
    host.publish_table()
    ctypes.c_uint32.from_address(table.latch_address).value = latch
    table.close()
    host.table = None
    return name(host)


# -- round trip -----------------------------------------------------------------------------------


def test_what_is_made_is_found(host: TableHost) -> None:
    left(host)
    assert host.find_table(UUID) == (FoundTable(TableState.FOUND, IDENTITY, 0), NONE)
    assert host.find_table(bytes(16)) == (NONE, NONE)


def test_a_new_table_has_rows_of_zeros_and_its_bytes_are_its_own(host: TableHost) -> None:
    table = host.make_table(IDENTITY)
    path = name(host, temporary=True)
    assert len(table.rows) == STRIPES
    assert bytes(table.rows) == bytes(STRIPES)
    table.rows[0] = table.rows[STRIPES - 1] = 1
    content = Path(path).read_bytes()
    assert len(content) == HEADER_BYTES + STRIPES
    assert content[HEADER_BYTES:] == b"\1" + bytes(STRIPES - 2) + b"\1"
    assert os.stat(path).st_mode & 0o777 == 0o600
    # All of it is there already: a row is never written to a hole of a full tmpfs.
    assert os.stat(path).st_blocks * 512 >= HEADER_BYTES + STRIPES


def test_rows_outlive_their_daemon(host: TableHost, other: TableHost) -> None:
    table = host.make_table(IDENTITY)
    host.publish_table()
    table.rows[7] = 1
    table.close()
    assert other.map_table(IDENTITY).rows[7] == 1
    assert other.table is not None
    assert other.table.identity == IDENTITY


def test_the_largest_table(host: TableHost) -> None:
    identity = IDENTITY._replace(image_stripes=2_097_152)
    left(host, identity)
    assert host.find_table(UUID)[0].identity == identity


# -- the latch ------------------------------------------------------------------------------------


def test_the_latch_is_in_the_file_and_is_found_again(host: TableHost) -> None:
    path = left(host, latch=errno.EIO)
    assert look(path) == FoundTable(TableState.FOUND, IDENTITY, errno.EIO)
    content = Path(path).read_bytes()
    assert content[LATCH_OFFSET : LATCH_OFFSET + 4] == errno.EIO.to_bytes(4, "little")


def test_the_latch_is_memory_that_processes_share(host: TableHost) -> None:
    table = host.make_table(IDENTITY)
    assert table.latch_address % 4 == 0
    with open(name(host, temporary=True), "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        ctypes.c_uint32.from_address(table.latch_address).value = 77
        assert shared[LATCH_OFFSET] == 77
        shared[LATCH_OFFSET] = 78
        assert ctypes.c_uint32.from_address(table.latch_address).value == 78


# -- what is not taken for a table ----------------------------------------------------------------


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize("change", [
    lambda content: b"",
    lambda content: content[:100],
    lambda content: content[:HEADER_BYTES],
    lambda content: content[:-1],
    lambda content: content + b"\0",
    lambda content: bytes(len(content)),
    lambda content: b"\xff" * len(content),
], ids=["empty", "short", "no rows", "a row less", "a row more", "zeros", "ones"])
def test_files_of_a_wrong_length_or_content_are_damaged(host: TableHost, change) -> None:
    path = Path(left(host))
    path.write_bytes(change(path.read_bytes()))
    assert look(str(path)) == DAMAGED
    assert path.exists()


def test_any_changed_byte_of_the_seal_is_damage(host: TableHost) -> None:
    path = Path(left(host))
    content = path.read_bytes()
    for at in range(table_module._SEALED_BYTES):
        path.write_bytes(flipped(content, at))
        assert look(str(path)) == DAMAGED, at
    path.write_bytes(content)
    assert look(str(path)).state is TableState.FOUND


def test_another_version_is_damage(host: TableHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed as it should be, by a program that we do not know."""
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "VERSION", table_module.VERSION + 1)
        path = left(host)
        assert look(path).state is TableState.FOUND
    assert look(path) == DAMAGED


def test_a_table_of_another_boot_is_none_and_goes(
    host: TableHost, monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = left(host)
    monkeypatch.setattr(table_module, "boot_id", lambda: b"another boot's..")
    assert look(path) == NONE
    assert not os.path.exists(path)


@pytest.mark.parametrize("put", [
    lambda path: os.symlink("/etc/passwd", path),
    lambda path: os.symlink("/nowhere", path),
    os.mkdir,
], ids=["link", "dangling link", "folder"])
def test_what_is_no_file_is_an_error(host: TableHost, put) -> None:
    put(name(host))
    with pytest.raises(OSError):
        host.find_table(UUID)


# -- locks ----------------------------------------------------------------------------------------


def test_a_table_in_use_is_live_under_both_names(host: TableHost, other: TableHost) -> None:
    table = host.make_table(IDENTITY)
    assert other.find_table(UUID) == (NONE, LIVE)
    host.publish_table()
    assert other.find_table(UUID) == (LIVE, NONE)
    with pytest.raises(UbiError, match="in use by a running device") as caught:
        other.map_table(IDENTITY)
    assert caught.value.code == Exit.BUSY
    table.close()
    assert other.find_table(UUID) == (FoundTable(TableState.FOUND, IDENTITY, 0), NONE)


def test_closing_a_table_frees_it_though_its_memory_stays(host: TableHost) -> None:
    table = host.make_table(IDENTITY)
    host.publish_table()
    table.close()
    assert look(name(host)).state is TableState.FOUND
    table.rows[0] = 1  # the data plane may still point there
    table.close()


def test_a_killed_daemons_lock_goes_with_it(host: TableHost, tmp_path: Path) -> None:
    code = """
import sys, time
from ublk_ubi.table import Identity, TableHost
host = TableHost(sys.argv[1])
identity = Identity(bytes(range(16)), bytes(32), 1, 1, 1, 65536, 65536, 1)
host.make_table(identity).rows[0] = 1
host.publish_table()
print("made", flush=True)
time.sleep(60)
"""
    daemon = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                              text=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "made\n"
    assert host.find_table(UUID) == (LIVE, NONE)
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    found, _ = host.find_table(UUID)
    assert found.state is TableState.FOUND
    assert found.identity is not None
    assert host.map_table(found.identity).rows[0] == 1


def test_looking_takes_nothing_away(host: TableHost) -> None:
    path = left(host)
    before = os.stat(path), Path(path).read_bytes()
    for _ in range(3):
        assert look(path).state is TableState.FOUND
    after = os.stat(path)
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before[0].st_ino, before[0].st_mtime_ns, before[0].st_ctime_ns)
    assert Path(path).read_bytes() == before[1]
    host.map_table(IDENTITY)


# -- names ----------------------------------------------------------------------------------------


def test_a_table_is_made_published_and_unlinked(host: TableHost, tmp_path: Path) -> None:
    assert host.path is None
    host.make_table(IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == [UUID.hex() + ".new"]
    assert host.path == str(tmp_path / UUID.hex())
    host.publish_table()
    assert [path.name for path in tmp_path.iterdir()] == [UUID.hex()]
    host.unlink_table()
    assert list(tmp_path.iterdir()) == []


def test_only_one_makes_a_table(host: TableHost, other: TableHost) -> None:
    host.make_table(IDENTITY)
    with pytest.raises(UbiError, match="another device is opening the base") as caught:
        other.make_table(IDENTITY)
    assert caught.value.code == Exit.BUSY
    assert other.table is None
    host.publish_table()
    assert other.find_table(UUID) == (LIVE, NONE)


def test_nothing_is_renamed_over_another_table(host: TableHost, other: TableHost) -> None:
    """A copy of the disk went live between our looking and our publishing."""
    path = left(other)
    inode = os.stat(path).st_ino
    table = host.make_table(IDENTITY._replace(generation=9))
    with pytest.raises(UbiError, match="its base is a copy") as caught:
        host.publish_table()
    assert caught.value.code == Exit.BUSY
    assert os.stat(path).st_ino == inode
    assert look(path).identity == IDENTITY
    table.close()


def test_a_publisher_that_died_between_the_names(host: TableHost, other: TableHost) -> None:
    """Both names are of one file: it is the table, and both go with it."""
    table = host.make_table(IDENTITY)
    os.link(name(host, temporary=True), name(host))
    table.close()
    assert other.find_table(UUID)[0].state is TableState.FOUND
    other.map_table(IDENTITY)
    other.unlink_table()
    assert other.find_table(UUID) == (NONE, NONE)


def test_dropping_removes_what_nobody_holds(host: TableHost, tmp_path: Path) -> None:
    host.drop_table(UUID)
    left(host)
    Path(name(host, temporary=True)).write_bytes(b"damaged")
    host.drop_table(UUID)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("published", [False, True])
def test_dropping_never_takes_a_table_that_is_used(
    host: TableHost, other: TableHost, published: bool,
) -> None:
    host.make_table(IDENTITY)
    if published:
        host.publish_table()
    with pytest.raises(UbiError, match="in use by another device") as caught:
        other.drop_table(UUID)
    assert caught.value.code == Exit.BUSY
    assert LIVE in other.find_table(UUID)


def test_a_table_that_was_mapped_and_is_not_trusted_is_dropped(host: TableHost) -> None:
    left(host)
    rows = host.map_table(IDENTITY).rows
    host.drop_table(UUID)
    assert host.find_table(UUID) == (NONE, NONE)
    assert len(rows) == STRIPES
    host.make_table(IDENTITY._replace(generation=5))
    host.publish_table()
    assert host.table is not None
    assert host.table.identity.generation == 5


def test_unlinking_leaves_anothers_table_alone(host: TableHost, other: TableHost) -> None:
    host.make_table(IDENTITY)
    host.publish_table()
    os.unlink(name(host))
    left(other)
    host.unlink_table()
    assert look(name(other)).state is TableState.FOUND


def test_a_new_table_that_is_taken_for_nobodys_is_not_used(
    host: TableHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another opener saw it before it was locked, and dropped it: his is at that name now."""
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        path = name(host, temporary=True)
        os.unlink(path)
        Path(path).write_bytes(b"his")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UbiError, match="another device is opening the base"):
        host.make_table(IDENTITY)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"his"]


def test_making_waits_for_somebody_who_only_looks(host: TableHost) -> None:
    code = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(0.2)
"""
    path = name(host, temporary=True)
    created = os.open

    def seen(path_opened: str, *rest: int) -> int:
        fd = created(path_opened, *rest)
        if path_opened == path:
            looking = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
            assert looking.stdout is not None
            looking.stdout.read(1)
            looking.stdout.close()
            watchers.append(looking)
        return fd

    watchers: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", seen)
        before = time.monotonic()
        host.make_table(IDENTITY)
        assert time.monotonic() - before > 0.05
    watchers[0].wait()


def test_what_cannot_be_made_leaves_nothing(
    host: TableHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UbiError, match=f"table {tmp_path}/.*: No space left.*df {tmp_path}`"):
        host.make_table(IDENTITY)
    assert list(tmp_path.iterdir()) == []
    assert host.table is None


def test_publishing_and_unlinking_need_a_table(host: TableHost) -> None:
    with pytest.raises(RuntimeError):
        host.publish_table()
    with pytest.raises(RuntimeError):
        host.unlink_table()
