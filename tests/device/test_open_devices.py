"""Opening image and base where they are block devices, or lie on some: loop, partition, dm, mounts.

Needs root and loop devices; what needs device-mapper is skipped where the kernel has none. Every
device that is made here is of this run alone and is taken away again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.shell import until

from ublk_ubi import blockdev
from ublk_ubi.base import Base, open_base
from ublk_ubi.bounds import required_block_size
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.image import Image, fingerprint, open_image
from ublk_ubi.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
IMAGE_SIZE = 4 * MIB
BASE_SIZE = 16 * MIB

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True,
                          text=True, env=os.environ | {"DM_DISABLE_UDEV": "1"})
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def file_of(path: Path, size: int, *, seed: int | None = None) -> Path:
    path.touch()
    os.truncate(path, size)
    if seed is not None:
        with open(path, "r+b") as file:
            for at in range(0, size, MIB):
                os.pwrite(file.fileno(), random.Random(seed + at).randbytes(4096), at)
    return path


def make_filesystem(device: str, *options: object) -> None:
    """Make one that leaves nothing to write to when it is mounted read-only."""
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device, *options)


@pytest.fixture
def undo() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def loop(undo: contextlib.ExitStack) -> Callable[..., str]:
    """Give a function that attaches a loop device to a file or device."""

    def attach(path: object, *options: object) -> str:
        device = run("losetup", "--find", "--show", *options, path)
        undo.callback(detach, device)
        return device

    return attach


def detach(device: str) -> None:
    run("losetup", "--detach", device)
    # it is done when the last to have it open has gone
    for _ in range(250):
        if not Path("/sys/block", os.path.basename(device), "loop", "backing_file").exists():
            return
        time.sleep(0.02)
    pytest.fail(f"{device} does not let go")


@pytest.fixture
def mounted(undo: contextlib.ExitStack, tmp_path: Path) -> Callable[..., Path]:
    def mount(source: object, *options: object) -> Path:
        point = tmp_path / f"mnt{len(list(tmp_path.iterdir()))}"
        point.mkdir()
        run("mount", *options, source, point)
        undo.callback(run, "umount", point)
        return point

    return mount


@pytest.fixture
def mapped(undo: contextlib.ExitStack) -> Callable[..., str]:
    if not os.path.exists("/dev/mapper/control") or shutil.which("dmsetup") is None:
        pytest.skip("needs device-mapper and dmsetup")
    count = iter(range(1000))

    def create(table: str) -> str:
        name = f"ubitest-{os.getpid()}-{next(count)}"
        run("dmsetup", "create", name, "--table", table)
        undo.callback(run, "dmsetup", "remove", "--retry", name)
        return f"/dev/mapper/{name}"

    return create


@pytest.fixture
def partition(undo: contextlib.ExitStack) -> Callable[..., str]:
    if shutil.which("addpart") is None:
        pytest.skip("needs addpart")

    def add(disk: str, number: int, start: int, size: int) -> str:
        run("addpart", disk, number, start // 512, size // 512)
        undo.callback(run, "delpart", disk, number)
        device = f"{disk}p{number}"
        for _ in range(250):
            if os.path.exists(device):
                return device
            time.sleep(0.02)
        pytest.fail(f"{device} did not appear")

    return add


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    with open_image(str(file_of(tmp_path / "image.raw", IMAGE_SIZE, seed=1))) as found:
        yield found


def open_fds() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: link for fd, link in found.items() if not link.startswith("/proc/")}


@pytest.fixture(autouse=True)
def _leaks_nothing():
    before = open_fds()
    yield
    assert open_fds() == before


def opened(path: str | Path, image: Image, **options) -> Base:
    defaults = {"size": None, "create_data_size": IMAGE_SIZE, "fence_timeout_s": 5.0}
    return open_base(str(path), image=image, **(defaults | options))


def content(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refused(path: str | Path, image: Image, *says: str, code: Exit = Exit.FAILED, **options) -> str:
    """Be refused in one line; nothing stays open, locked or claimed, nothing is written."""
    readable = os.path.isfile(path) or os.path.realpath(path) in all_loops()
    before, fds = content(path) if readable else None, open_fds()
    with pytest.raises(UbiError) as caught:
        opened(path, image, **options)
    message = caught.value.message
    assert open_fds() == fds
    assert caught.value.code == code, message
    assert len(message.splitlines()) == 1
    for part in (f"base {path}", *says):
        assert part in message, message
    if readable:
        assert content(path) == before
    return message


def all_loops() -> list[str]:
    return [f"/dev/{path.name}" for path in Path("/sys/block").glob("loop*")]


# the image ----------------------------------------------------------------------------------


def test_an_image_that_is_a_block_device(tmp_path: Path, loop):
    path = file_of(tmp_path / "i", IMAGE_SIZE, seed=3)
    device = loop(path, "--read-only")
    with open_image(device) as found, open_image(str(path)) as plain:
        assert found.is_block
        assert found.size == IMAGE_SIZE, "stat says 0"
        assert found.identity.is_block
        assert found.identity.device == os.stat(device).st_rdev
        assert (found.direct, found.alignment, found.warnings) == (True, 512, [])
        assert not fcntl.fcntl(found.fd, fcntl.F_GETFL) & os.O_NONBLOCK
        assert fingerprint(found.fd, found.size) == fingerprint(plain.fd, plain.size)
        assert found.changed() is None
        os.utime(device)
        assert found.changed() is None
        os.truncate(path, IMAGE_SIZE - MIB)
        run("losetup", "--set-capacity", device)
        assert found.changed() == f"size {IMAGE_SIZE} → {IMAGE_SIZE - MIB} bytes"


def test_a_disk_of_large_sectors(tmp_path: Path, loop):
    device = loop(file_of(tmp_path / "i", IMAGE_SIZE, seed=3), "--sector-size", 4096)
    other = loop(file_of(tmp_path / "b", BASE_SIZE), "--sector-size", 4096)
    with open_image(device) as large, open_image(device, cache="page") as paged:
        assert (large.alignment, paged.alignment) == (4096, 1)
        assert "--image-cache page" in large.warnings[0]
        with opened(tmp_path / "new", large) as small_base, opened(other, large) as large_base:
            assert large_base.alignment == 4096
            assert required_block_size(large, small_base) == 4096
            assert required_block_size(paged, small_base) == 512
            assert required_block_size(paged, large_base) == 4096
            small_base.discard_if_created()


def test_a_device_with_nothing_in_it(loop, tmp_path: Path):
    device = loop(file_of(tmp_path / "x", MIB))
    detach(device)
    try:
        with pytest.raises(UbiError, match=rf"^image {device} (is empty|has no device behind it)"):
            open_image(device)
    finally:
        run("losetup", device, tmp_path / "x")


def test_a_qcow2_on_a_device(tmp_path: Path, loop):
    path = file_of(tmp_path / "q", MIB)
    path.write_bytes(b"QFI\xfb".ljust(MIB, b"\0"))
    device = loop(path)
    with pytest.raises(UbiError) as caught:
        open_image(device)
    name = os.path.basename(device)
    assert f"`qemu-img convert -O raw {device} {name}.raw`" in caught.value.message
    open_image(device, image_format="raw").close()


def test_an_image_that_is_mounted_for_writing(tmp_path: Path, loop, mounted):
    device = loop(file_of(tmp_path / "i", 16 * MIB))
    make_filesystem(device)
    point = mounted(device)
    with open_image(device) as found:
        assert any(f"mounted on {point}" in warning for warning in found.warnings)
    run("mount", "-o", "remount,ro", point)
    with open_image(device) as found:
        assert found.warnings == []


def test_a_filesystem_without_o_direct(image: Image):
    """The lab's own root is one (hostfs)."""
    path = str(Path(__file__).resolve())
    with open(path, "rb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pass
        else:
            pytest.skip("the checkout's filesystem has O_DIRECT")
    with open_image(path) as found:
        assert not found.direct
        assert "no O_DIRECT" in found.warnings[0]
        assert os.pread(found.fd, 3, 0) == b'"""'
        assert len(fingerprint(found.fd, found.size)) == 32
    assert image.size == IMAGE_SIZE


# the base -----------------------------------------------------------------------------------


def test_a_base_that_is_a_block_device(tmp_path: Path, image: Image, loop):
    path = file_of(tmp_path / "b", BASE_SIZE, seed=4)
    before = content(path)
    device = loop(path)
    with opened(device, image, size=BASE_SIZE - 8 * MIB) as base:
        assert base.is_block
        assert (base.size, base.data_size) == (BASE_SIZE, BASE_SIZE - 8 * MIB)
        assert (base.direct, base.alignment, base.created) == (True, 512, False)
        assert base.identity == (True, os.stat(device).st_rdev, blockdev.disk_sequence(base.fd))
        assert not fcntl.fcntl(base.fd, fcntl.F_GETFL) & os.O_NONBLOCK
        with pytest.raises(OSError, match="busy"):
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))
        other = os.open(device, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(other)
        base.keep()
        base.discard_if_created()
    assert os.path.exists(device)
    os.close(os.open(device, os.O_RDWR | os.O_EXCL))
    assert content(path) == before


def test_descriptions_for_sync(tmp_path: Path, image: Image, loop):
    device = loop(file_of(tmp_path / "b", BASE_SIZE))
    with opened(device, image) as base:
        fds = base.reopen_for_sync(3)
        view = memoryview(mmap.mmap(-1, 4096))
        view[:4] = b"data"
        assert os.pwrite(base.fd, view, 4096) == 4096
        for fd in fds:
            os.fdatasync(fd)
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(os.open(device, os.O_RDWR | os.O_EXCL))


def test_the_next_device_of_a_name_is_another(tmp_path: Path, image: Image, loop):
    path = file_of(tmp_path / "b", BASE_SIZE)
    device = loop(path)
    with opened(device, image) as base:
        first = base.identity
    detach(device)
    run("losetup", device, path)
    with opened(device, image) as base:
        assert base.identity.device == first.device
        assert base.identity.number != first.number


def test_too_small_and_another_size(tmp_path: Path, image: Image, loop):
    device = loop(file_of(tmp_path / "b", 8 * MIB))
    refused(device, image, "too small", str(12 * MIB), "name a larger device")
    device = loop(file_of(tmp_path / "c", BASE_SIZE))
    refused(device, image, "--size asks for", "leave --size out", size=BASE_SIZE)


def test_a_read_only_device(tmp_path: Path, image: Image, loop):
    device = loop(file_of(tmp_path / "b", BASE_SIZE), "--read-only")
    refused(device, image, "read-only block device", f"blockdev --setrw {device}")
    device = loop(file_of(tmp_path / "c", BASE_SIZE))
    run("blockdev", "--setro", device)
    refused(device, image, "read-only block device")
    run("blockdev", "--setrw", device)
    opened(device, image).close()


def test_a_read_only_filesystem(tmp_path: Path, image: Image, mounted):
    point = mounted("none", "-t", "tmpfs")
    base = file_of(point / "b", BASE_SIZE)
    run("mount", "-o", "remount,ro", point)
    refused(base, image, "read-only filesystem", "remount it read-write")
    refused(point / "new", image, "cannot be made", "read-only", "remount it read-write")
    assert [path.name for path in point.iterdir()] == ["b"]


def test_no_space_to_make_it(image: Image, mounted):
    point = mounted("none", "-t", "tmpfs", "-o", "nr_inodes=1")
    refused(point / "new", image, "cannot be made", "no space is left", "another place")
    assert list(point.iterdir()) == []


def test_more_than_the_filesystem_can_hold(tmp_path: Path, image: Image, loop, mounted):
    device = loop(file_of(tmp_path / "fs", 16 * MIB))
    run("mkfs.ext4", "-q", "-b", "1024", device)
    point = mounted(device)
    refused(point / "new", image, "cannot be made", "more than a file may have", size=1 << 50)
    assert [path.name for path in point.iterdir()] == ["lost+found"]


# image and base share storage ---------------------------------------------------------------


def test_a_device_by_other_names(tmp_path: Path, loop):
    device = loop(file_of(tmp_path / "d", BASE_SIZE, seed=5))
    link, node = tmp_path / "link", tmp_path / "node"
    link.symlink_to(device)
    number = os.stat(device).st_rdev
    with contextlib.suppress(PermissionError):
        os.mknod(node, 0o600 | 0o060000, number)
    with open_image(device) as image:
        for path in (device, link, node):
            if os.path.exists(path):
                refused(path, image, "is the image", device, "name another base")


def test_a_loop_device_and_its_file(tmp_path: Path, loop):
    path = file_of(tmp_path / "d", BASE_SIZE, seed=5)
    device = loop(path)
    renamed = tmp_path / "renamed"
    os.link(path, renamed)
    path.unlink()  # sysfs goes on with the old name, "(deleted)"
    file_of(path, 2 * BASE_SIZE)
    with open_image(str(renamed)) as image:
        refused(device, image, "lies on the image", str(renamed))
    with open_image(device) as image:
        refused(renamed, image, "what the image", device, "lies on")
        upper = loop(device)
        refused(upper, image, "lies on the image", device)
        opened(path, image).close()
    with open_image(upper) as image:
        refused(renamed, image, "what the image", upper)
        refused(device, image, "what the image", upper)


def test_two_loop_devices_on_one_file(tmp_path: Path, loop):
    path = file_of(tmp_path / "d", 2 * BASE_SIZE, seed=5)
    whole = loop(path)
    head = loop(path, "--sizelimit", IMAGE_SIZE)
    tail = loop(path, "--offset", IMAGE_SIZE)
    with open_image(head) as image:
        refused(whole, image, "share storage on one file")
        opened(tail, image).close()


def test_a_partition_and_its_disk(tmp_path: Path, loop, partition):
    disk = loop(file_of(tmp_path / "d", 3 * BASE_SIZE, seed=5))
    one = partition(disk, 1, MIB, IMAGE_SIZE)
    two = partition(disk, 2, MIB + IMAGE_SIZE, BASE_SIZE)
    with open_image(one) as image:
        refused(disk, image, "what the image", one, "lies on")
        refused(tmp_path / "d", image, "what the image", one)
        with opened(two, image) as base:
            assert base.size == BASE_SIZE
    with open_image(disk) as image:
        for part in (one, two):
            refused(part, image, "lies on the image", disk)


def test_device_mapper_and_its_disk(tmp_path: Path, loop, mapped):
    disk = loop(file_of(tmp_path / "d", 2 * BASE_SIZE, seed=5))
    sectors = IMAGE_SIZE // 512
    one = mapped(f"0 {sectors} linear {disk} 0")
    two = mapped(f"0 {BASE_SIZE // 512} linear {disk} {sectors}")
    upper = mapped(f"0 {sectors} linear {one} 0")
    with open_image(one) as image:
        refused(disk, image, "what the image", one)
        refused(upper, image, "lies on the image", one)
        with opened(two, image) as base:
            assert base.size == BASE_SIZE
    with open_image(upper) as image:
        for below in (one, disk, tmp_path / "d"):
            refused(below, image, "what the image", upper)
    with open_image(disk) as image:
        for above in (one, two, upper):
            refused(above, image, "lies on the image", disk)


def test_a_base_on_a_filesystem_that_is_the_image(tmp_path: Path, loop, mounted):
    device = loop(file_of(tmp_path / "fs", 64 * MIB))
    make_filesystem(device)
    point = mounted(device)
    base = file_of(point / "b", 40 * MIB)
    with open_image(device) as image:
        refused(base, image, "lies on the image", device)
        refused(
            point / "not there yet", image, "lies on the image", device, create_data_size=64 * MIB,
        )
    assert not (point / "not there yet").exists()


def test_an_image_on_a_filesystem_that_is_the_base(tmp_path: Path, loop, mounted):
    device = loop(file_of(tmp_path / "fs", 64 * MIB))
    make_filesystem(device)
    point = mounted(device)
    path = file_of(point / "i", IMAGE_SIZE, seed=6)
    run("mount", "-o", "remount,ro", point)
    with open_image(str(path)) as image:
        for base in (device, tmp_path / "fs"):
            refused(base, image, "what the image", str(point / "i"))


# in use -------------------------------------------------------------------------------------


def test_a_mounted_device(tmp_path: Path, image: Image, loop, mounted):
    path = file_of(tmp_path / "fs", 64 * MIB)
    device = loop(path)
    make_filesystem(device)
    point = mounted(device, "-o", "ro")
    started = time.monotonic()
    refused(device, image, f"{device} is mounted on {point}", f"`umount {point}`", code=Exit.BUSY,
            fence_timeout_s=30)
    # the file under the loop device as well
    refused(path, image, f"{device} is mounted on {point}", code=Exit.BUSY, fence_timeout_s=30)
    assert time.monotonic() - started < 15


def test_a_file_under_a_loop_device(tmp_path: Path, image: Image, loop):
    path = file_of(tmp_path / "b", BASE_SIZE)
    device = loop(path)
    refused(path, image, f"loop device {device} is attached", f"`losetup -d {device}`",
            code=Exit.BUSY)


def test_a_device_under_a_loop_device(tmp_path: Path, image: Image, loop):
    lower = loop(file_of(tmp_path / "b", BASE_SIZE))
    upper = loop(lower)
    refused(lower, image, f"loop device {upper} is attached", code=Exit.BUSY)


def test_a_disk_whose_partition_is_mounted(tmp_path: Path, image: Image, loop, partition, mounted):
    path = file_of(tmp_path / "d", 80 * MIB)
    disk = loop(path)
    one, two = partition(disk, 1, MIB, 32 * MIB), partition(disk, 2, 40 * MIB, 32 * MIB)
    make_filesystem(one)
    point = mounted(one, "-o", "ro")
    for base in (disk, one):
        refused(base, image, f"{one} is mounted on {point}", code=Exit.BUSY)
    opened(two, image).close()


def test_a_partition_of_a_disk_that_is_mounted_whole(
    tmp_path: Path, image: Image, loop, partition, mounted,
):
    disk = loop(file_of(tmp_path / "d", 80 * MIB))
    make_filesystem(disk, "64M")
    one = partition(disk, 1, MIB, 32 * MIB)
    point = mounted(disk, "-o", "ro")
    refused(one, image, f"{disk} is mounted on {point}", code=Exit.BUSY)


def test_a_member_of_device_mapper(tmp_path: Path, image: Image, loop, mapped, partition):
    disk = loop(file_of(tmp_path / "d", 3 * BASE_SIZE))
    one = partition(disk, 1, MIB, BASE_SIZE)
    upper = mapped(f"0 {BASE_SIZE // 512} linear {one} 0")
    for base in (one, disk):
        refused(base, image, f"{one} is part of {upper}", f"`dmsetup remove {upper}`",
                code=Exit.BUSY)
    with opened(upper, image) as base:
        assert base.size == BASE_SIZE
        assert base.identity.is_block


def test_a_mount_in_another_namespace(tmp_path: Path, image: Image, loop):
    device = loop(file_of(tmp_path / "fs", 64 * MIB))
    make_filesystem(device)
    script = f"mount -o ro {device} {tmp_path} && echo mounted && read line"
    with child("unshare", "--mount", "sh", "-c", script) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mounted\n"
        refused(device, image, "in exclusive use by another program or mount namespace", "lsblk",
                code=Exit.BUSY, fence_timeout_s=1.5)
    opened(device, image).close()


@contextlib.contextmanager
def child(*command: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


HOLDER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)
if sys.argv[2] == "lock":
    fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder_of(device: str, how: str) -> Iterator[subprocess.Popen]:
    with child(sys.executable, "-c", HOLDER, device, how) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_another_programs_exclusive_use(tmp_path: Path, image: Image, loop):
    device = loop(file_of(tmp_path / "b", BASE_SIZE))
    with holder_of(device, "claim") as process:
        started = time.monotonic()
        refused(device, image, f"in exclusive use by process {process.pid} (", f"fuser -v {device}",
                code=Exit.BUSY, fence_timeout_s=30)
        assert time.monotonic() - started < 10, "no daemon has it: there is nothing to wait for"


# the fence ----------------------------------------------------------------------------------


def test_the_fence_of_a_device(tmp_path: Path, image: Image, loop):
    device = loop(file_of(tmp_path / "b", BASE_SIZE))
    notices: list[str] = []
    with holder_of(device, "lock") as process:
        asked = []

        def live(identity):
            asked.append(identity)
            return "ubi5"

        refused(device, image, "device ubi5", code=Exit.BUSY, holder=live)
        assert asked[0].is_block
        assert asked[0].device == os.stat(device).st_rdev
        refused(device, image, f"held by process {process.pid} (", "after 3 s",
                code=Exit.TIMED_OUT, fence_timeout_s=3, notice=notices.append)
        assert len(notices) == 1
        process.kill()
        with opened(device, image) as base:
            assert base.size == BASE_SIZE
    # a third that comes to the one who waited for it
    with opened(device, image), pytest.raises(UbiError) as caught:
        opened(device, image, fence_timeout_s=0.1)
    assert caught.value.code == Exit.TIMED_OUT


def test_a_daemon_that_holds_a_partition_beside_a_mounted_one(
    tmp_path: Path, image: Image, loop, partition, mounted,
):
    """The neighbour's mount is no reason to refuse: the daemon's writes are waited for."""
    disk = loop(file_of(tmp_path / "d", 80 * MIB))
    one, two = partition(disk, 1, MIB, 32 * MIB), partition(disk, 2, 40 * MIB, 32 * MIB)
    make_filesystem(one)
    mounted(one, "-o", "ro")
    with holder_of(two, "lock"):
        refused(two, image, code=Exit.TIMED_OUT, fence_timeout_s=0.3)


WRITE = """
import mmap
page = mmap.mmap(-1, 4096)
page[:6] = b'landed'
fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
print('writing', flush=True)
os.pwrite(fd, page, 8192)
"""


def test_a_slow_disk_is_waited_for(tmp_path: Path, image: Image, loop, mapped):
    """A killed process's write is on its way: who opens the base next reads what it wrote."""
    disk = loop(file_of(tmp_path / "b", BASE_SIZE))
    slow = mapped(f"0 {BASE_SIZE // 512} delay {disk} 0 0 {disk} 0 6000")
    script = HOLDER.replace("sys.stdin.read()", WRITE)
    notices: list[str] = []
    with child(sys.executable, "-c", script, slow, "lock") as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "held\n"
        assert writer.stdout.readline() == "writing\n"
        # dm-delay tells how many reads, writes and flushes it holds
        until(lambda: run("dmsetup", "status", slow).split()[-2] == "1", "its write is on its way")
        writer.kill()
        with (
            opened(slow, image, fence_timeout_s=20, notice=notices.append),
            open(slow, "rb") as file,
        ):
            assert os.pread(file.fileno(), 6, 8192) == b"landed"
    assert len(notices) == 1


# small questions ----------------------------------------------------------------------------


def test_what_the_kernel_says_of_a_disk(tmp_path: Path, loop, partition):
    disk = loop(file_of(tmp_path / "d", BASE_SIZE, seed=7))
    part = partition(disk, 1, MIB, 2 * MIB)
    topology = Topology()
    number, part_number = os.stat(disk).st_rdev, os.stat(part).st_rdev
    assert topology.disk_of(part_number) == topology.disk_of(number) == number
    assert topology.name(number) == disk
    assert topology.name(part_number) == part
    assert not topology.is_host_managed(number)
    (found,) = [entry for entry in topology.loops() if entry.device == number]
    assert found.backing.inode == (tmp_path / "d").stat().st_ino
    fd = os.open(disk, os.O_RDWR)
    try:
        assert blockdev.size(fd) == BASE_SIZE
        assert blockdev.logical_block_size(fd) == 512
        assert blockdev.physical_block_size(fd) >= 512
        assert not blockdev.is_read_only(fd)
        blockdev.zero_out(fd, MIB, 8192)
        os.fsync(fd)
        assert os.pread(fd, 8192, MIB) == bytes(8192)
        assert os.pread(fd, 4096, 2 * MIB) != bytes(4096)
    finally:
        os.close(fd)
