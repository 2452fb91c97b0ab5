"""Opening the image: what is refused and how, what is taken, and the fingerprint."""

from __future__ import annotations

import bz2
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import lzma
import os
import random
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from ublk_ubi import files, image
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.image import fingerprint, open_image

MIB = 1 << 20
RAW = random.Random(1).randbytes(256 << 10)


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


def snapshot(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.rglob("*")):
        st = path.lstat()
        content = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b""
        found[str(path)] = (st.st_ino, st.st_mode, st.st_mtime_ns, hashlib.sha256(content).digest())
    return found


def refused(path: str | Path, *says: str, code: Exit = Exit.FAILED, **options) -> str:
    """Open, be refused in one line that says `says` and the path; nothing is left behind."""
    before = open_fds()
    with pytest.raises(UbiError) as caught:
        open_image(str(path), **options)
    assert open_fds() == before
    message = caught.value.message
    assert caught.value.code == code, message
    assert len(message.splitlines()) == 1
    assert message.startswith("image ")
    for part in (str(path) if str(path).isprintable() else repr(str(path)), *says):
        assert part in message, message
    return message


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(RAW)
    return path


# what is taken ------------------------------------------------------------------------------


def test_a_raw_file_opens(raw: Path):
    os.utime(raw)
    with open_image(str(raw)) as found:
        st = raw.stat()
        assert (found.path, found.real_path, found.size) == (str(raw), str(raw), len(RAW))
        assert found.identity == (False, st.st_dev, st.st_ino)
        assert found.ctime_ns == st.st_ctime_ns
        assert not found.is_block
        flags = fcntl.fcntl(found.fd, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDONLY
        assert not flags & os.O_NONBLOCK, "io_uring would not wait for reads"
        assert flags & os.O_NOATIME
        assert fcntl.fcntl(found.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert bool(flags & os.O_DIRECT) == found.direct
        assert found.alignment == 1 or found.direct
        assert not os.get_inheritable(found.fd)
    assert found.fd == -1
    found.close()


def test_links_are_followed(raw: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to("disk.raw")
    with open_image(str(link)) as found:
        assert (found.path, found.real_path) == (str(link), str(raw))


def test_page_cache_means_no_o_direct(raw: Path):
    with open_image(str(raw), cache="page") as found:
        assert not fcntl.fcntl(found.fd, fcntl.F_GETFL) & os.O_DIRECT
        assert (found.direct, found.alignment, found.warnings) == (False, 1, [])


def test_direct_reads_work_at_the_alignment_given(raw: Path):
    import mmap

    with open_image(str(raw)) as found:
        if not found.direct:
            pytest.skip("the temporary folder has no O_DIRECT")
        page = mmap.mmap(-1, MIB)
        view = memoryview(page)
        step = found.alignment
        assert os.preadv(found.fd, [view[step : 2 * step]], 3 * step) == step
        assert view[step : 2 * step] == RAW[3 * step : 4 * step]
        view.release()


def test_images_are_shared(raw: Path):
    with open_image(str(raw)) as one, open_image(str(raw)) as two:
        assert one.identity == two.identity


def test_an_iso_and_a_fixed_vhd_are_raw_disks(tmp_path: Path):
    iso = tmp_path / "debian.iso"
    iso.write_bytes(bytes(0x8000) + b"\x01CD001\x01" + bytes(4096))
    vhd = tmp_path / "fixed.vhd"
    vhd.write_bytes(bytes(MIB) + b"conectix" + bytes(504))
    for path in (iso, vhd):
        open_image(str(path)).close()


def test_one_byte_is_an_image(tmp_path: Path):
    (tmp_path / "tiny").write_bytes(b"x")
    with open_image(str(tmp_path / "tiny")) as found:
        assert found.size == 1
        assert len(fingerprint(found.fd, 1)) == 32


# what is refused ----------------------------------------------------------------------------

FORMATS = {
    "disk.qcow2": (b"QFI\xfb\0\0\0\3", "qcow2", "qemu-img convert -O raw {a} {d}/disk.raw"),
    "disk.img": (b"QFI\xfb\0\0\0\3", "qcow2", "qemu-img convert -O raw {a} {d}/disk.raw"),
    "disk.raw": (b"QFI\xfb\0\0\0\3", "qcow2", "qemu-img convert -O raw {a} {d}/disk.raw.raw"),
    "disk.qed": (b"QED\0", "QED", "qemu-img convert"),
    "disk.vmdk": (b"KDMV\1\0\0\0", "VMDK", "qemu-img convert -O raw {a} {d}/disk.raw"),
    "esx.vmdk": (b"COWD", "VMDK", "qemu-img convert"),
    "text.vmdk": (b"# Disk DescriptorFile\nversion=1\n", "VMDK", "qemu-img convert"),
    "disk.vhdx": (b"vhdxfile", "VHDX", "qemu-img convert"),
    "disk.vhd": (b"conectix", "VHD", "qemu-img convert"),
    "disk.vdi": (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0")
                 + b"\x7f\x10\xda\xbe", "VDI", "qemu-img convert"),
    "old.hdd": (b"WithoutFreeSpace", "Parallels", "qemu-img convert"),
    "new.hdd": (b"WithouFreSpacExt", "Parallels", "qemu-img convert"),
    "disk.simg": (b"\x3a\xff\x26\xed", "Android sparse", "simg2img"),
    "d.img.gz": (gzip.compress(RAW), "gzip", "gzip -dc {a} > {d}/d.raw"),
    "d.raw.xz": (lzma.compress(RAW), "xz", "xz -dc {a} > {d}/d.raw"),
    "d.zst": (b"\x28\xb5\x2f\xfd\x04\x00", "zstd", "zstd -dc {a} > {d}/d.raw"),
    "d.bz2": (bz2.compress(RAW), "bzip2", "bzip2 -dc {a} > {d}/d.raw"),
    "d.lz4": (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc {a} > {d}/d.raw"),
    "old.lz4": (b"\x02\x21\x4c\x18", "lz4", "lz4 -dc"),
    "d.lz": (b"LZIP\x01\x0c", "lzip", "lzip -dc"),
    "d.zip": (b"PK\x03\x04", "zip", "unzip {a}"),
    "empty.zip": (b"PK\x05\x06", "zip", "unzip {a}"),
    "d.7z": (b"7z\xbc\xaf\x27\x1c", "7z", "7z x {a}"),
    "d.rar": (b"Rar!\x1a\x07\x01\0", "RAR", "unrar x {a}"),
    "d.tar": (bytes(257) + b"ustar\x0000", "tar", "tar -xf {a}"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_by_their_magic(name: str, tmp_path: Path):
    head, kind, command = FORMATS[name]
    path = tmp_path / name
    path.write_bytes(head.ljust(4096, b"\0"))
    before = snapshot(tmp_path)
    refused(path, kind, f"`{command.format(a=path, d=tmp_path)}", "-f raw")
    with open_image(str(path), image_format="raw") as found:
        assert found.size == path.stat().st_size
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhdx", "vpc", "vdi", "qed", "parallels"])
def test_what_qemu_img_writes_is_recognised(kind: str, tmp_path: Path):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    path = tmp_path / f"disk.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, "8M"], check=True)
    refused(path, "qemu-img convert -O raw", "-f raw")


def test_what_archivers_write_is_recognised(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("d.raw", RAW)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as archive:
            entry = tarfile.TarInfo("d.raw")
            entry.size = len(RAW)
            archive.addfile(entry, io.BytesIO(RAW))
    for path in tmp_path.iterdir():
        refused(path, "archive")


def test_the_command_is_quoted(tmp_path: Path):
    path = tmp_path / "my disk's.qcow2"
    path.write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    message = refused(path)
    command = message[message.index("`") + 1 : message.rindex("`")]
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], check=True,
                           stdout=subprocess.PIPE, text=True).stdout.splitlines()
    assert words[-2:] == [str(path), str(tmp_path / "my disk's.raw")]


def test_missing(tmp_path: Path):
    refused(tmp_path / "none", "does not exist", "check the path")
    assert list(tmp_path.iterdir()) == []


def test_a_dangling_link_names_its_target(tmp_path: Path):
    (tmp_path / "link").symlink_to("/nowhere/disk.raw")
    refused(tmp_path / "link", "is a link to /nowhere/disk.raw", "does not exist")


def test_links_in_a_circle(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a", "circle of symbolic links")


def test_a_file_taken_for_a_folder(raw: Path):
    refused(raw / "disk", "a part of its path is a file")


def test_a_name_too_long(tmp_path: Path):
    refused(tmp_path / ("x" * 300), "too long a name", "shorter")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_no_path_can_be(path: str):
    with pytest.raises(UbiError, match=r"^image .* is not a path: name a file") as caught:
        open_image(path)
    assert caught.value.code == Exit.USAGE


def test_a_hostile_name_stays_in_one_line(tmp_path: Path):
    refused(tmp_path / "a\nb\x1b[2J", "does not exist")
    (tmp_path / "c\nd").write_bytes(b"QFI\xfb")
    refused(tmp_path / "c\nd", "qcow2")


def test_empty(tmp_path: Path):
    (tmp_path / "disk").touch()
    refused(tmp_path / "disk", "is empty (0 bytes)", "give a raw disk image")


def test_a_folder(tmp_path: Path):
    refused(tmp_path, "is a folder", "name a regular file or block device")


def test_a_fifo_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(10)
    try:
        refused(tmp_path / "pipe", "is a FIFO")
    finally:
        signal.alarm(0)


def test_a_fifo_put_there_at_the_last_moment_does_not_hang(raw: Path, monkeypatch):
    st = os.stat(raw)
    raw.unlink()
    os.mkfifo(raw)
    monkeypatch.setattr(os, "stat", lambda *_args, **_options: st)
    signal.alarm(10)
    try:
        refused(raw, "is a FIFO")
    finally:
        signal.alarm(0)


def test_a_socket(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", "is a socket")


def test_a_character_device():
    refused("/dev/zero", "is a character device")


def test_unreadable(raw: Path, monkeypatch):
    if os.geteuid():
        pytest.skip("needs root to become another user")
    raw.chmod(0o600)
    raw.parent.chmod(0o755)
    monkeypatch.chdir(raw.parent)  # the folders above it are closed to others
    os.seteuid(65534)
    try:
        refused(raw.name, "may not be read by uid 65534", "run as root", "chmod")
    finally:
        os.seteuid(0)


def test_one_that_is_written_as_a_base(raw: Path):
    with open(raw, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        started = time.monotonic()
        refused(raw, f"process {os.getpid()} (", "name another image", code=Exit.BUSY)
        assert time.monotonic() - started < 5


def test_a_passing_lock_is_waited_for(raw: Path):
    with open(raw, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        started = time.monotonic()
        release = threading.Timer(0.3, fcntl.flock, (holder, fcntl.LOCK_UN))
        release.start()
        open_image(str(raw)).close()
        assert time.monotonic() - started >= 0.3
        release.join()


def test_a_read_error_names_the_image(raw: Path, monkeypatch):
    def fail(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    refused(raw, "cannot be read", "Input/output error", "dmesg")


# fsync and O_DIRECT -------------------------------------------------------------------------


def test_the_image_is_fsynced_before_its_change_time_is_taken(raw: Path, monkeypatch):
    synced = []

    def fsync(fd: int):
        synced.append(os.fstat(fd).st_ino)
        os.utime(raw)  # a writeback that was outstanding

    monkeypatch.setattr(os, "fsync", fsync)
    with open_image(str(raw)) as found:
        assert synced == [raw.stat().st_ino]
        assert found.changed() is None


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_fsync_refuses(raw: Path, monkeypatch, code: int):
    def fail(_fd: int):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    refused(raw, os.strerror(code), "make it again")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EROFS])
def test_nothing_to_fsync_is_no_failure(raw: Path, monkeypatch, code: int):
    def fail(_fd: int):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    open_image(str(raw)).close()


def test_no_o_direct_goes_on_with_a_warning(raw: Path, monkeypatch):
    real = fcntl.fcntl

    def without(fd: int, command: int, argument: int = 0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without)
    with open_image(str(raw)) as found:
        assert (found.direct, found.alignment) == (False, 1)
        (warning,) = found.warnings
        assert str(raw) in warning
        assert "no O_DIRECT" in warning


def test_a_filesystem_that_says_no_leaves_the_flag_off(raw: Path, monkeypatch):
    monkeypatch.setattr(files, "_stated_alignment", lambda _fd: 0)
    with open_image(str(raw)) as found:
        assert not found.direct
        assert not fcntl.fcntl(found.fd, fcntl.F_GETFL) & os.O_DIRECT
        assert len(found.warnings) == 1


def test_a_file_of_sysfs_has_neither_fsync_nor_o_direct():
    path = Path("/sys/kernel/btf/vmlinux")
    if not path.exists():
        pytest.skip("the kernel has no BTF")
    with open_image(str(path)) as found:
        assert not found.direct
        assert len(found.warnings) == 1


def test_a_mute_filesystem_is_probed(raw: Path, monkeypatch):
    with open_image(str(raw)) as found:
        stated = found.alignment
    monkeypatch.setattr(files, "_stated_alignment", lambda _fd: None)
    with open_image(str(raw)) as found:
        assert found.alignment == stated


@pytest.mark.parametrize("least", [512, 1024, 4096, 8192])
def test_the_probe_finds_the_smallest_length(raw: Path, monkeypatch, least: int):
    def preadv(_fd: int, buffers: list[memoryview], offset: int) -> int:
        assert offset == 0
        if len(buffers[0]) % least:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return len(buffers[0])

    monkeypatch.setattr(files, "_stated_alignment", lambda _fd: None)
    monkeypatch.setattr(fcntl, "fcntl", lambda *_args: 0)
    monkeypatch.setattr(os, "preadv", preadv)
    with open(raw, "rb") as file:
        assert files.enable_direct(file.fileno()) == (least if least <= 4096 else 0)


@pytest.mark.parametrize(("magic", "stays"), [
    (0xEF53, True), (0x58465342, True), (0x9123683E, False), (0x01021994, False), (None, False),
])
def test_where_direct_writes_stay_so(raw: Path, monkeypatch, magic: int | None, stays: bool):
    """Of whole blocks on ext4 and XFS; not on btrfs and tmpfs, nor where nobody can tell."""
    with open(raw, "rb") as file:
        told = subprocess.run(["stat", "-f", "-c", "%t", raw], capture_output=True, check=True)
        assert files._filesystem(file.fileno()) == int(told.stdout, 16)
        monkeypatch.setattr(files, "_filesystem", lambda _fd: magic)
        assert files.direct_alignment(file.fileno()) == (os.statvfs(raw).f_bsize if stays else 0)


def test_a_coarse_alignment_is_told(raw: Path, monkeypatch):
    monkeypatch.setattr(image, "enable_direct", lambda _fd: 4096)
    with open_image(str(raw)) as found:
        assert found.alignment == 4096
        assert any("4096 bytes only" in text and "--image-cache page" in text
                   for text in found.warnings)


# changes ------------------------------------------------------------------------------------


def test_changes_are_noticed(raw: Path, tmp_path: Path):
    def write():
        time.sleep(0.02)  # more than the grain of a filesystem's clock
        with open(raw, "r+b") as file:
            file.write(b"x")

    def replace():
        (tmp_path / "new").write_bytes(RAW)
        os.rename(tmp_path / "new", raw)

    def forge():
        st = raw.stat()
        write()
        os.utime(raw, ns=(st.st_atime_ns, st.st_mtime_ns))

    for change in (write, lambda: os.truncate(raw, 4096), forge, replace):
        raw.write_bytes(RAW)
        time.sleep(0.02)
        with open_image(str(raw)) as found:
            assert found.changed() is None
            raw.read_bytes()
            assert found.changed() is None
            change()
            assert found.changed() is not None

    with open_image(str(raw)) as found:
        os.truncate(raw, 4096)
        assert found.changed() == f"size {len(RAW)} → 4096 bytes"


def test_how_it_has_changed_can_be_read(raw: Path):
    with open_image(str(raw)) as found:
        found.ctime_ns = 1_700_000_000_000_000_005
        assert (found.changed() or "").startswith(
            "change time 2023-11-14 22:13:20.000000005 → 20",
        )
        raw.unlink()
        assert found.changed() == "it was removed"


# the fingerprint ----------------------------------------------------------------------------


def reference(data: bytes) -> bytes:
    """Compute the fingerprint from its description, sharing nothing with the product."""
    digest = hashlib.blake2b(digest_size=32, person=b"ublk-ubi image 1")
    digest.update(len(data).to_bytes(8, "little") + data[:MIB] + data[-MIB:])
    for i in range(1, 65):
        at = 4096 * ((len(data) // 4096) * i // 65)
        digest.update(data[at : at + 4096])
    return digest.digest()


KNOWN: dict[str, str] = {
    "one byte": "7917ff531d12c1c52296e9b906366ec90287ea2a5211c7c5f842ee0bea837b56",
    "three MiB": "411320cf967e7b2f39ef06ed15fcb0227a64488cab7f4aa99ea208370aee4a43",
    "a sparse TiB": "bf0bf59aeeb9b357fbecbaa34f5768e8894ef68828c9a900b9039b714126d61c",
}


def print_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return fingerprint(file.fileno(), path.stat().st_size)


@pytest.mark.parametrize(
    "size",
    [1, 511, 512, 4095, 4096, 4097, 65 * 4096, MIB - 1, MIB, MIB + 1, 2 * MIB + 7, 9 * MIB + 513],
)
def test_the_fingerprint_is_as_described(size: int, tmp_path: Path):
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    assert print_of(tmp_path / "f") == reference(data)


def test_known_answers(tmp_path: Path):
    """These values are on people's disks: they never change."""
    path = tmp_path / "f"
    path.write_bytes(b"x")
    assert print_of(path).hex() == KNOWN["one byte"]
    path.write_bytes(bytes(i * 7 % 251 for i in range(3 * MIB + 12345)))
    assert print_of(path).hex() == KNOWN["three MiB"]
    os.truncate(path, 0)
    os.truncate(path, 1 << 40)
    assert print_of(path).hex() == KNOWN["a sparse TiB"]


def test_what_the_fingerprint_notices(tmp_path: Path):
    size = 64 * MIB
    path = tmp_path / "f"
    path.touch()
    os.truncate(path, size)
    first = print_of(path)
    seen = {first}
    spots = [0, 1, MIB - 1, size - MIB, size - 1]
    for i in range(1, 65):
        at = 4096 * ((size // 4096) * i // 65)
        spots += [at, at + 4095]
    with open(path, "r+b") as file:
        for spot in spots:
            os.pwrite(file.fileno(), b"x", spot)
            changed = print_of(path)
            assert changed not in seen, spot
            seen.add(changed)
            os.pwrite(file.fileno(), b"\0", spot)
            assert print_of(path) == first
        os.pwrite(file.fileno(), b"x", MIB + 8192)  # what its docstring says that it cannot
        assert print_of(path) == first
    for other in (size - 1, size + 1, size + 4096):
        os.truncate(path, other)
        assert print_of(path) not in seen


def test_times_and_names_are_no_content(raw: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copyfile(raw, copy)
    os.utime(copy, (1, 1))
    assert print_of(copy) == print_of(raw)


def test_a_sparse_tebibyte_takes_no_time(tmp_path: Path):
    path = tmp_path / "big"
    path.touch()
    os.truncate(path, 1 << 40)
    with open_image(str(path)) as found:
        started = time.monotonic()
        fingerprint(found.fd, found.size)
        assert time.monotonic() - started < 10


def test_the_descriptors_flags_and_place_do_not_matter(raw: Path):
    with open_image(str(raw)) as direct, open_image(str(raw), cache="page") as paged:
        os.lseek(paged.fd, 1000, os.SEEK_SET)
        assert fingerprint(direct.fd, len(RAW)) == fingerprint(paged.fd, len(RAW))
        assert os.lseek(paged.fd, 0, os.SEEK_CUR) == 1000


def test_an_image_that_shrinks_under_us(raw: Path):
    with open(raw, "rb") as file, pytest.raises(UbiError) as caught:
        fingerprint(file.fileno(), len(RAW) + 1)
    assert str(raw) in caught.value.message
    assert f"ends at byte {len(RAW)}" in caught.value.message


def test_a_read_error_in_the_fingerprint(raw: Path, monkeypatch):
    def fail(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with open(raw, "rb") as file, pytest.raises(UbiError) as caught:
        fingerprint(file.fileno(), len(RAW))
    for part in (str(raw), "at byte 0", "Input/output error", "dmesg"):
        assert part in caught.value.message


def test_short_reads_are_continued(raw: Path, monkeypatch):
    whole = print_of(raw)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 1000), at))
    assert print_of(raw) == whole


def test_an_image_of_another_user_is_read_with_its_access_time(
    raw: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without CAP_FOWNER the kernel refuses O_NOATIME for it."""
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_NOATIME:
            raise PermissionError(errno.EPERM, "not permitted")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with open_image(str(raw)) as found:
        flags = real(found.fd, fcntl.F_GETFL)
    assert not flags & (os.O_NOATIME | os.O_NONBLOCK)
