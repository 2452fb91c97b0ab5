"""Opening and making the base: every refusal, the fence, and that nothing is left behind.

Block devices are in tests/device.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import resource
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import base as base_module
from ublk_ubi import fence
from ublk_ubi.base import Base, open_base
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.image import Image, open_image
from ublk_ubi.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
IMAGE_SIZE = 3 * MIB + 512
DATA_SIZE = 4 * MIB


def open_fds() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: link for fd, link in found.items() if not link.startswith("/proc/")}


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return all that a refusal must not change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        st = path.lstat()
        content = path.read_bytes() if path.is_file() and st.st_size < 64 * MIB else b""
        found[str(path)] = (st.st_ino, st.st_mode, st.st_nlink, st.st_size, st.st_blocks,
                            st.st_mtime_ns, st.st_ctime_ns, hashlib.sha256(content).digest())
    return found


def is_free(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a lock through a description of its own, as another process would."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, kind)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(autouse=True)
def _leaks_nothing():
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Give the folder that a test works in, apart from the image's."""
    folder = tmp_path / "bases"
    folder.mkdir()
    return folder


@pytest.fixture
def image(tmp_path: Path, _leaks_nothing: None) -> Iterator[Image]:
    path = tmp_path / "image.raw"
    path.write_bytes(random.Random(1).randbytes(IMAGE_SIZE))
    with open_image(str(path)) as found:
        yield found


@pytest.fixture
def old(place: Path) -> Path:
    """Give a base that was there, with something in it."""
    path = place / "old.base"
    path.touch()
    os.truncate(path, 8 * MIB + DATA_SIZE)
    with open(path, "r+b") as file:
        for i in range(0, 8 * MIB + DATA_SIZE, MIB):
            os.pwrite(file.fileno(), random.Random(i).randbytes(4096), i)
        os.fsync(file.fileno())  # its blocks are all it will have
    return path


def opened(path: str | Path, image: Image, **options) -> Base:
    defaults = {"size": None, "create_data_size": DATA_SIZE, "fence_timeout_s": 5.0}
    return open_base(str(path), image=image, **(defaults | options))


def refused(path: str | Path, image: Image, *says: str, code: Exit = Exit.FAILED, **options) -> str:
    """Be refused in one line; nothing is left open, locked, made or changed."""
    folder = Path(image.path).parent
    before, fds = snapshot(folder), open_fds()
    with pytest.raises(UbiError) as caught:
        opened(path, image, **options)
    message = caught.value.message
    assert open_fds() == fds
    assert snapshot(folder) == before
    assert caught.value.code == code, message
    assert len(message.splitlines()) == 1
    for part in (str(path) if str(path).isprintable() else repr(str(path)), *says):
        assert part in message, message
    return message


# making -------------------------------------------------------------------------------------


def test_a_missing_base_is_made(place: Path, image: Image):
    path = place / "new.base"
    with opened(path, image) as base:
        st = path.stat()
        assert (base.path, base.real_path, base.created) == (str(path), str(path), True)
        assert base.size == st.st_size == 8 * MIB + DATA_SIZE
        assert base.data_size == DATA_SIZE
        assert st.st_blocks == 0, "it is sparse"
        assert st.st_mode & 0o777 == 0o600
        assert base.identity == (False, st.st_dev, st.st_ino)
        assert not base.is_block
        assert not is_free(path)
        assert base.folder_fd is not None
        assert os.path.samestat(os.fstat(base.folder_fd), place.stat())
        flags = fcntl.fcntl(base.fd, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDWR
        assert not flags & os.O_NONBLOCK, "io_uring would not wait for writes"
        assert flags & os.O_NOATIME
        assert bool(flags & os.O_DIRECT) == base.direct
        for fd in (base.fd, base.folder_fd):
            assert not os.get_inheritable(fd)
        assert os.pread(base.fd, 0, 0) == b""
        base.keep()
    assert is_free(path)
    assert (base.fd, base.folder_fd) == (-1, None)
    base.close()


def test_the_size_asked_for_wins(place: Path, image: Image):
    with opened(place / "a", image, size=TIB) as base:
        assert base.data_size == TIB
        assert (place / "a").stat().st_blocks == 0


def test_it_is_made_in_the_folder_behind_a_link(place: Path, image: Image):
    (place / "real").mkdir()
    (place / "link").symlink_to("real")
    with opened(place / "link" / "b", image) as base:
        assert base.real_path == str(place / "real" / "b")
        base.discard_if_created()
    assert list((place / "real").iterdir()) == []


def test_a_relative_path(place: Path, image: Image, monkeypatch):
    monkeypatch.chdir(place)
    with opened("b", image) as base:
        assert base.real_path == str(place / "b")
        monkeypatch.chdir("/")
        base.discard_if_created()
    assert list(place.iterdir()) == []


def test_discard_removes_what_was_made(place: Path, image: Image):
    base = opened(place / "b", image)
    base.reopen_for_sync(2)
    base.discard_if_created()
    base.discard_if_created()
    assert list(place.iterdir()) == []


def test_discard_after_keep_only_closes(place: Path, image: Image):
    base = opened(place / "b", image)
    base.keep()
    base.keep()
    base.discard_if_created()
    assert is_free(place / "b")


def test_a_synced_folder_is_not_kept_yet(place: Path, image: Image, monkeypatch):
    base, synced = opened(place / "b", image), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced.append)
        base.sync_folder()
    assert synced == [base.folder_fd]
    base.discard_if_created()
    assert list(place.iterdir()) == []
    base.sync_folder()


def test_discard_spares_a_base_that_was_there(old: Path, image: Image):
    before = snapshot(old.parent)
    base = opened(old, image)
    assert not base.created
    base.keep()
    base.discard_if_created()
    assert snapshot(old.parent) == before


def test_discard_spares_what_has_taken_the_name(place: Path, image: Image):
    base = opened(place / "b", image)
    (place / "other").write_text("mine")
    os.rename(place / "other", place / "b")
    base.discard_if_created()
    assert (place / "b").read_text() == "mine"


def test_keep_reports_a_folder_that_does_not_sync(place: Path, image: Image, monkeypatch):
    def fail(_fd: int):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    base = opened(place / "b", image)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UbiError, match=r"folder was not written to disk \(Input/output error"):
            base.keep()
    base.discard_if_created()
    assert list(place.iterdir()) == []


def test_the_folder_is_missing(place: Path, image: Image):
    refused(place / "no" / "b", image, "cannot be made", str(place / "no"), "make the folder first")


def test_the_folder_is_a_file(old: Path, image: Image):
    refused(old / "b", image, "a part of its path is a file")


def test_a_name_of_a_folder_that_is_missing(place: Path, image: Image):
    refused(f"{place}/no/", image, "names a folder", f"{place}/no.base")


def test_a_device_that_is_missing_is_not_made_a_file(place: Path, image: Image):
    (place / "mapper").mkdir()
    topology = Topology(dev=str(place))
    for path in (place / "sdq", place / "mapper" / "x"):
        refused(path, image, "does not exist", "holds devices", "lsblk", topology=topology)


def test_a_dangling_link_is_not_followed(place: Path, image: Image):
    (place / "b").symlink_to(place / "nowhere")
    refused(place / "b", image, f"is a link to {place / 'nowhere'}", "does not exist")


def test_too_large_for_the_filesystem(place: Path, image: Image, monkeypatch):
    def fail(_fd: int, _size: int):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", fail)
    before = sorted(place.iterdir())
    refused_making(place / "b", image, "more than a file may have", "smaller --size", size=TIB)
    assert sorted(place.iterdir()) == before


def refused_making(path: Path, image: Image, *says: str, **options) -> None:
    """Be refused after the file was made: the folder's times move, its content does not."""
    fds, listing = open_fds(), sorted(path.parent.iterdir())
    with pytest.raises(UbiError) as caught:
        opened(path, image, **options)
    assert open_fds() == fds
    assert sorted(path.parent.iterdir()) == listing
    for part in (str(path), "cannot be made", *says):
        assert part in caught.value.message, caught.value.message


def test_a_limit_on_file_sizes(place: Path, image: Image):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        refused_making(place / "b", image, "more than a file may have")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "no space is left"), (errno.EDQUOT, "quota"), (errno.EROFS, "remount"),
     (errno.EPERM, "lsattr -d"), (errno.EIO, "Input/output error")],
)
def test_making_fails(place: Path, image: Image, monkeypatch, code: int, says: str):
    real = os.open

    def fail(path, flags: int, *rest, **options) -> int:
        if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", fail)
    refused(place / "b", image, "cannot be made", says)


@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_a_new_file_gets_its_name_when_it_is_whole(
    place: Path, image: Image, monkeypatch, has_tmpfile: bool,
):
    """Who is killed while it is made leaves nothing that the next one would refuse."""
    real_open, real_truncate = os.open, os.ftruncate
    there: list[bool] = []

    def without(path, flags: int, *rest, **options) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *rest, **options)

    def truncate(fd: int, length: int) -> None:
        there.append((place / "b").exists())
        real_truncate(fd, length)

    monkeypatch.setattr(os, "ftruncate", truncate)
    if not has_tmpfile:
        monkeypatch.setattr(os, "open", without)
    with opened(place / "b", image) as base:
        assert there == [not has_tmpfile]
        assert os.path.samestat(os.stat(place / "b"), os.fstat(base.fd))
        base.keep()


def test_someone_makes_it_first(place: Path, image: Image, monkeypatch):
    (place / "b").write_bytes(b"other")
    real = os.stat

    def gone(path, **options):
        if str(path) == str(place / "b") and options.get("follow_symlinks", True):
            raise FileNotFoundError(errno.ENOENT, "gone")
        return real(path, **options)

    monkeypatch.setattr(os, "stat", gone)
    monkeypatch.setattr(os.path, "lexists", lambda _path: False)
    with pytest.raises(UbiError, match="appeared meanwhile; try again") as caught:
        opened(place / "b", image)
    assert caught.value.code == Exit.BUSY
    assert (place / "b").read_bytes() == b"other"


def test_an_immutable_folder(place: Path, image: Image):
    with attribute(place, "i"):
        refused(place / "b", image, "cannot be made", "lsattr -d")


# sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -512, 1, 511, 513, 5_000_000_001])
def test_a_size_that_no_disk_has(place: Path, image: Image, size: int):
    with pytest.raises(UbiError) as caught:
        opened(place / "b", image, size=size)
    assert caught.value.code == Exit.USAGE
    assert f"--size {size} " in caught.value.message
    assert "multiple of 512" in caught.value.message
    assert list(place.iterdir()) == []


def test_a_new_base_too_small(place: Path, image: Image):
    needed = 8 * MIB + 49 * 64 * KIB  # 3 MiB and a sector
    refused(place / "b", image, "too small", image.path, str(needed),
            f"leave --size out, or give {DATA_SIZE} at least", size=3 * MIB)


def test_an_old_base_too_small(place: Path, image: Image):
    path = place / "b"
    needed = 8 * MIB + 49 * 64 * KIB  # 3 MiB and a sector
    path.touch()
    for size in (0, 8 * MIB, needed - 1):
        os.truncate(path, size)
        refused(path, image, "too small", str(needed), image.path, f"remove {path}")
    os.truncate(path, needed)
    opened(path, image).close()


def test_another_size_than_asked_for(old: Path, image: Image):
    refused(old, image, f"{DATA_SIZE} bytes (4 MiB)", f"--size asks for {5 * MIB} bytes (5 MiB)",
            "leave --size out", size=5 * MIB)
    with opened(old, image, size=DATA_SIZE) as base:
        assert base.data_size == DATA_SIZE


def test_a_size_that_large_blocks_do_not_make_up(
    place: Path, old: Path, image: Image, monkeypatch,
):
    monkeypatch.setattr(base_module, "enable_direct", lambda _fd: 4096)
    with pytest.raises(UbiError, match=f"use --size {DATA_SIZE}$"):
        opened(place / "b", image, size=DATA_SIZE + 512)
    assert list(place.iterdir()) == [old]
    os.truncate(old, 8 * MIB + DATA_SIZE + 512)
    refused(old, image, "blocks of 4096 bytes", f"use --size {DATA_SIZE}", code=Exit.USAGE,
            size=DATA_SIZE + 512)
    opened(old, image).close()


def test_a_base_that_is_no_whole_number_of_sectors(old: Path, image: Image):
    os.truncate(old, 8 * MIB + DATA_SIZE + 511)
    with opened(old, image, size=DATA_SIZE) as base:
        assert (base.size, base.data_size) == (8 * MIB + DATA_SIZE + 511, DATA_SIZE)


# opening ------------------------------------------------------------------------------------


def test_an_old_base_opens_and_stays_as_it_is(old: Path, image: Image):
    before = snapshot(old.parent)
    with opened(old, image) as base:
        assert (base.size, base.data_size) == (8 * MIB + DATA_SIZE, DATA_SIZE)
        assert (base.created, base.folder_fd, base.warnings) == (False, None, [])
        assert not is_free(old)
    assert is_free(old)
    assert snapshot(old.parent) == before


def test_direct_writes_work_at_the_alignment_given(old: Path, image: Image):
    import mmap

    with opened(old, image) as base:
        if not base.direct:
            pytest.skip("the temporary folder has no O_DIRECT")
        view = memoryview(mmap.mmap(-1, 64 * KIB))
        step = base.alignment
        view[step : 2 * step] = b"x" * step
        assert os.pwrite(base.fd, view[step : 2 * step], 5 * step) == step
        assert old.read_bytes()[5 * step : 6 * step] == b"x" * step


def test_no_o_direct_goes_on_with_a_warning(place: Path, image: Image, monkeypatch):
    monkeypatch.setattr(base_module, "enable_direct", lambda _fd: 0)
    with opened(place / "b", image) as base:
        assert (base.direct, base.alignment) == (False, 1)
        (warning,) = base.warnings
        assert str(place / "b") in warning
        assert "no O_DIRECT" in warning


def test_descriptions_for_sync_are_independent(old: Path, image: Image):
    with opened(old, image) as base:
        one, two = base.reopen_for_sync(2)
        fcntl.fcntl(one, fcntl.F_SETFL, os.O_APPEND)  # a property of a description
        for fd in (base.fd, two):
            assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        with pytest.raises(BlockingIOError):
            fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
        for fd in (one, two):
            assert os.path.samestat(os.fstat(fd), old.stat())
            assert not os.get_inheritable(fd)
            os.fdatasync(fd)
        assert base.reopen_for_sync(0) == []
    assert is_free(old)


def test_descriptions_for_sync_when_the_path_is_gone(old: Path, image: Image):
    with opened(old, image) as base:
        (old.parent / "other").write_bytes(b"y")
        os.rename(old.parent / "other", old)
        (fd,) = base.reopen_for_sync(1)
        assert os.path.samestat(os.fstat(fd), os.fstat(base.fd))


def test_too_few_descriptors_leak_none(old: Path, image: Image):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(old, image) as base:
        before = open_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 20, limits[1]))
        try:
            with pytest.raises(UbiError, match="Too many open files"):
                base.reopen_for_sync(100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert open_fds() == before


# what it is not -----------------------------------------------------------------------------


def test_a_folder(place: Path, image: Image):
    refused(place, image, "is a folder", "name a regular file or block device")


def test_a_fifo_a_socket_and_a_character_device(place: Path, image: Image):
    os.mkfifo(place / "pipe")
    refused(place / "pipe", image, "is a FIFO")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "s"))
        refused(place / "s", image, "is a socket")
    refused("/dev/null", image, "is a character device")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_no_path_can_be(image: Image, path: str):
    with pytest.raises(UbiError, match=r"^base .* is not a path") as caught:
        opened(path, image)
    assert caught.value.code == Exit.USAGE


def test_odd_paths(place: Path, image: Image):
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    refused(place / "a", image, "circle of symbolic links")
    refused(place / ("x" * 300), image, "too long a name")
    refused(place / "no\nfolder" / "x", image, "cannot be made")


def test_no_permission(place: Path, image: Image, monkeypatch):
    if os.geteuid():
        pytest.skip("needs root to become another user")
    (place / "b").write_bytes(bytes(16))
    (place / "b").chmod(0o444)
    place.chmod(0o755)
    monkeypatch.chdir(place)  # the folders above it are closed to others
    os.seteuid(65534)
    try:
        with pytest.raises(UbiError) as caught:
            opened("b", image)
        assert "base b may not be read and written by uid 65534: run" in caught.value.message
        with pytest.raises(UbiError) as caught:
            opened("new", image)
        assert "cannot be made: uid 65534 may not write in its folder" in caught.value.message
    finally:
        os.seteuid(0)
    assert list(place.iterdir()) == [place / "b"]
    assert (place / "b").read_bytes() == bytes(16)


@contextlib.contextmanager
def attribute(path: Path, letter: str) -> Iterator[None]:
    if shutil.which("chattr") is None or subprocess.run(
        ["chattr", f"+{letter}", path], check=False, capture_output=True,
    ).returncode:
        pytest.skip("the temporary folder has no file attributes, or we may not set them")
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{letter}", path], check=True)


@pytest.mark.parametrize(("letter", "word"), [("i", "immutable"), ("a", "append-only")])
def test_marked_files(old: Path, image: Image, letter: str, word: str):
    with attribute(old, letter):
        refused(old, image, f"is marked {word}", f"chattr -{letter} {old}")


def test_a_running_program(place: Path, image: Image):
    path = place / "prog"
    shutil.copy(os.path.realpath(shutil.which("sleep") or "/bin/sleep"), path)
    program = subprocess.Popen([path, "60"], stdout=subprocess.DEVNULL)
    try:
        while not os.path.samefile(f"/proc/{program.pid}/exe", path):
            time.sleep(0.01)
        with contextlib.suppress(OSError):  # Linux 6.11 was without ETXTBSY for such files
            os.close(os.open(path, os.O_RDWR))
            pytest.skip("the kernel lets running programs be written")
        refused(path, image, "run as a program", code=Exit.BUSY)
    finally:
        program.kill()
        program.wait()


# image and base -----------------------------------------------------------------------------


def test_the_image_itself(place: Path, image: Image):
    hard, soft, folder = place / "hard", place / "soft", place / "folder"
    os.link(image.path, hard)
    soft.symlink_to(image.path)
    folder.symlink_to(Path(image.path).parent)
    paths = (image.path, hard, soft, folder / "image.raw",
             f"{place}/../{os.path.basename(image.path)}")
    for path in paths:
        refused(path, image, "is the image", image.path, "would destroy the image",
                "name another base")


def test_the_image_of_another_device(old: Path, image: Image):
    with open_image(str(old)):
        started = time.monotonic()
        refused(old, image, "is being read by process", "name another base", code=Exit.BUSY)
        assert time.monotonic() - started < 5, "there is nothing to wait for"


def test_a_base_is_no_image(old: Path, image: Image):
    with opened(old, image), pytest.raises(UbiError, match="is locked by process") as caught:
        open_image(str(old))
    assert caught.value.code == Exit.BUSY


def test_a_swap_file(old: Path, image: Image, tmp_path: Path):
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{old} file 4 0 -2\n")
    topology = Topology(proc=str(proc))
    refused(old, image, "used as swap", "swapoff", code=Exit.BUSY, topology=topology)


# the fence ----------------------------------------------------------------------------------


def test_a_live_device_has_it(old: Path, image: Image):
    asked, notices = [], []

    def holder(identity):
        asked.append(identity)
        return "ubi7"

    with locked(old):
        started = time.monotonic()
        refused(old, image, "device ubi7", "ublk-ubi del ubi7", code=Exit.BUSY, holder=holder,
                notice=notices.append)
        assert time.monotonic() - started < 5
    assert asked == [(False, old.stat().st_dev, old.stat().st_ino)]
    assert notices == []


def test_nobody_is_asked_about_a_free_base(old: Path, image: Image):
    opened(old, image, holder=lambda _identity: pytest.fail("asked")).close()


def test_a_device_that_goes_live_while_we_wait(old: Path, image: Image):
    answers = iter([None, None, "ubi3"])
    with locked(old):
        refused(old, image, "ubi3", code=Exit.BUSY, holder=lambda _identity: next(answers))


def test_it_is_held_too_long(old: Path, image: Image, monkeypatch):
    monkeypatch.setattr(fence, "_NOTICE_AFTER_S", 0.0)
    notices: list[str] = []
    with locked(old):
        started = time.monotonic()
        refused(old, image, f"process {os.getpid()} (", "after 0.6 s", "try again",
                code=Exit.TIMED_OUT, fence_timeout_s=0.6, notice=notices.append)
        assert 0.6 <= time.monotonic() - started < 5
    (notice,) = notices
    assert str(old) in notice
    assert "writes of a previous daemon" in notice
    assert is_free(old)


def test_no_waiting_at_all(old: Path, image: Image):
    with locked(old):
        started = time.monotonic()
        refused(old, image, code=Exit.TIMED_OUT, fence_timeout_s=0)
        assert time.monotonic() - started < 5
    opened(old, image, fence_timeout_s=0).close()


def test_it_waits_for_the_last_reference(old: Path, image: Image):
    """A killed daemon's ring keeps the description when its descriptor is long gone."""
    fd = os.open(old, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    ring = os.dup(fd)
    os.close(fd)
    notices: list[str] = []

    def land(notice: str):
        notices.append(notice)
        os.pwrite(ring, b"landed", 0)
        os.close(ring)

    with opened(old, image, fence_timeout_s=60.0, notice=land) as base:
        assert len(notices) == 1
        with open(old, "rb") as file:
            assert file.read(6) == b"landed"
        assert not is_free(old)
        assert base.size == 8 * MIB + DATA_SIZE
    assert len(notices) == 1


def test_a_short_wait_is_not_spoken_of(old: Path, image: Image, monkeypatch):
    monkeypatch.setattr(fence, "_NOTICE_AFTER_S", 60.0)
    fd = os.open(old, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.05, os.close, [fd])
    timer.start()
    opened(old, image, fence_timeout_s=60.0, notice=pytest.fail).close()
    timer.join()


def test_the_size_is_read_when_the_lock_is_held(old: Path, image: Image):
    fd = os.open(old, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def grow():
        os.ftruncate(fd, 8 * MIB + 2 * DATA_SIZE)
        os.close(fd)

    timer = threading.Timer(0.1, grow)
    timer.start()
    with opened(old, image, size=2 * DATA_SIZE) as base:
        assert base.data_size == 2 * DATA_SIZE
    timer.join()


@pytest.mark.parametrize("replaced", [False, True])
def test_it_goes_away_while_we_wait(old: Path, image: Image, replaced: bool):
    fd = os.open(old, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def leave(_identity: object):  # who is asked for the holder when the wait begins
        old.unlink()
        if replaced:
            old.write_bytes(b"other")
        os.close(fd)

    fds = set(open_fds()) - {str(fd)}
    with pytest.raises(UbiError, match=r"removed or replaced .*try again") as caught:
        opened(old, image, holder=leave)
    assert caught.value.code == Exit.BUSY
    assert set(open_fds()) == fds
    assert old.exists() == replaced


def test_the_lock_comes_free_between_two_looks(old: Path, image: Image, monkeypatch):
    """What looks like a shared lock of others then is nobody's."""
    real, tried_shared = fcntl.flock, []

    def flock(fd: int, kind: int):
        if kind & fcntl.LOCK_SH:
            tried_shared.append(fd)
        elif kind & fcntl.LOCK_EX and not tried_shared:
            raise BlockingIOError
        return real(fd, kind)

    monkeypatch.setattr(fence, "GRACE_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        base = opened(old, image)
    assert tried_shared
    assert not is_free(old)
    base.close()


def test_two_make_one_base_at_once(place: Path, image: Image):
    """One makes and has it, the others wait for it in vain or find it in use."""
    path, answers, start = place / "b", [], threading.Barrier(8)

    def make():
        start.wait()
        try:
            answers.append(opened(path, image, fence_timeout_s=0.5))
        except UbiError as error:
            answers.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (base,) = [answer for answer in answers if isinstance(answer, Base)]
    assert base.size == path.stat().st_size == 8 * MIB + DATA_SIZE
    for answer in answers:
        if answer is not base:
            assert answer.code in (Exit.TIMED_OUT, Exit.BUSY, Exit.FAILED), answer
    base.close()


def test_a_filesystem_without_locks(old: Path, image: Image, monkeypatch):
    def fail(_fd: int, _kind: int):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    refused(old, image, "cannot be locked", "flock(2)")


def test_a_holder_that_fails_leaves_nothing(old: Path, image: Image):
    def holder(_identity):
        raise RuntimeError

    with locked(old):
        before = open_fds()
        with pytest.raises(RuntimeError):
            opened(old, image, holder=holder)
        assert open_fds() == before
