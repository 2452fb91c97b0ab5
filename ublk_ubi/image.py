"""The image: the read-only source, opened and checked before anything of it is served.

Invariants of an `Image`:
- `fd` is read-only, a regular file's or a block device's, and not empty.
- The file carries a shared flock: a base carries an exclusive one, so no base that is being
  written is taken for an image, and no image that is being served is taken for a base.
- `size` and `ctime_ns` were read after the fsync, so that writes of before it cannot pass for
  changes of later.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import time
from _blake2 import blake2b  # hashlib would load OpenSSL to look for a faster one
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import msgspec

from . import blockdev
from .errors import Exit, UbiError
from .files import (
    Identity,
    check_kind,
    check_path,
    enable_direct,
    identity_of,
    make_ready,
    open_failure,
    reopen,
    shown,
    size_of,
)
from .topology import Topology

if TYPE_CHECKING:
    from types import TracebackType

FINGERPRINT_SIZE = 32
_END_SIZE = 1 << 20
_SAMPLE_COUNT = 64
_SAMPLE_SIZE = 4096
_MAGIC_SIZE = 512
_LOCK_GRACE_S = 1.0
# what fsync says of files that it has nothing to do for
_NOTHING_TO_SYNC = (errno.EINVAL, errno.EROFS, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


class _Format(NamedTuple):
    """A format that is no raw disk: `magic` at `offset`; `command` turns {a} into raw {b}."""

    offset: int
    magic: bytes
    name: str
    command: str


_CONVERT = "qemu-img convert -O raw {a} {b}"
_FORMATS = (
    _Format(0, b"QFI\xfb", "a qcow2 image", _CONVERT),
    _Format(0, b"QED\0", "a QED image", _CONVERT),
    _Format(0, b"KDMV", "a VMDK image", _CONVERT),
    _Format(0, b"COWD", "a VMDK image", _CONVERT),
    _Format(0, b"# Disk DescriptorFile", "a VMDK description", _CONVERT),
    _Format(0, b"vhdxfile", "a VHDX image", _CONVERT),
    # a fixed VHD has it at its end only, and is a raw disk until there
    _Format(0, b"conectix", "a VHD image", _CONVERT),
    _Format(64, b"\x7f\x10\xda\xbe", "a VDI image", _CONVERT),
    _Format(0, b"WithoutFreeSpace", "a Parallels image", _CONVERT),
    _Format(0, b"WithouFreSpacExt", "a Parallels image", _CONVERT),
    _Format(0, b"\x3a\xff\x26\xed", "an Android sparse image", "simg2img {a} {b}"),
    _Format(0, b"\x1f\x8b\x08", "compressed with gzip", "gzip -dc {a} > {b}"),
    _Format(0, b"\xfd7zXZ\0", "compressed with xz", "xz -dc {a} > {b}"),
    _Format(0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc {a} > {b}"),
    _Format(4, b"1AY&SY", "compressed with bzip2", "bzip2 -dc {a} > {b}"),
    _Format(0, b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -dc {a} > {b}"),
    _Format(0, b"\x02\x21\x4c\x18", "compressed with lz4", "lz4 -dc {a} > {b}"),
    _Format(0, b"LZIP\x01", "compressed with lzip", "lzip -dc {a} > {b}"),
    _Format(0, b"PK\x03\x04", "a zip archive", "unzip {a}"),
    _Format(0, b"PK\x05\x06", "a zip archive", "unzip {a}"),
    _Format(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {a}"),
    _Format(0, b"Rar!\x1a\x07", "a RAR archive", "unrar x {a}"),
    _Format(257, b"ustar", "a tar archive", "tar -xf {a}"),
)
_SUFFIXES = (
    ".gz", ".xz", ".zst", ".bz2", ".lz4", ".lz", ".zip", ".7z", ".rar", ".tar",
    ".qcow2", ".qcow", ".qed", ".vmdk", ".vhdx", ".vhd", ".vdi", ".hdd", ".img", ".simg",
)


class Image(msgspec.Struct):
    """An open image. Sizes and alignments are bytes; `alignment` is 1 when I/O is buffered."""

    path: str
    real_path: str
    fd: int
    size: int
    direct: bool
    alignment: int
    identity: Identity
    ctime_ns: int
    is_block: bool
    warnings: list[str] = []

    def changed(self) -> str | None:
        """Return what has changed since the open, as "size 5 → 6"; None when nothing has.

        A file: its size, and its ctime, which every write, truncation, rename over it and removal
        moves. A block device shows its size alone. Raises OSError when the image is gone (a
        network filesystem's ESTALE, a pulled disk).
        """
        size = size_of(self.fd)
        if size != self.size:
            return f"size {self.size} → {size} bytes"
        st = os.fstat(self.fd)
        if self.is_block or st.st_ctime_ns == self.ctime_ns:
            return None
        if st.st_nlink == 0:
            return "it was removed"
        return f"change time {_utc(self.ctime_ns)} → {_utc(st.st_ctime_ns)} UTC"

    def close(self) -> None:
        """Let go of the image; no harm when done twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        """Return the image; `with` closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the image."""
        self.close()


def open_image(
    path: str,
    *,
    image_format: Literal["raw"] | None = None,
    cache: Literal["none", "page"] = "none",
    topology: Topology | None = None,
    reach: str | None = None,
) -> Image:
    """Open an image read-only, fsync it, and refuse what cannot be one.

    `image_format` "raw" takes the bytes as they are, whatever their magic says. `cache` "none"
    asks for O_DIRECT and goes on without, with a warning, where the filesystem has none; "page"
    reads through the page cache. `reach` is where it is opened, where `path`, by which it is
    spoken of, is out of reach. Raises UbiError; then nothing is open and nothing is changed.
    """
    check_path("image", path)
    topology = topology or Topology()
    try:
        # before the open, as opening a character device may do something
        check_kind("image", path, os.stat(reach or path).st_mode)
        fd = os.open(reach or path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise open_failure("image", path, error) from None
    try:
        return _checked(fd, path, image_format, cache, topology)
    except OSError as error:
        os.close(fd)
        raise UbiError(f"image {shown(path)} cannot be read: {error.strerror}; check its disk "
                       "(see `dmesg`)") from None
    except BaseException:
        os.close(fd)
        raise


def _checked(fd: int, path: str, image_format: str | None, cache: str, topology: Topology) -> Image:
    """Make an Image of an open descriptor; the caller closes it on any error."""
    what = f"image {shown(path)}"
    is_block = check_kind("image", path, os.fstat(fd).st_mode)
    make_ready(fd)
    _lock_shared(fd, what, topology)
    if size_of(fd) == 0:
        raise UbiError(f"{what} is empty (0 bytes): give a raw disk image")
    if is_block:
        _refuse_partial_block(fd, what)
    if image_format is None:
        _refuse_other_formats(fd, path, is_block=is_block)
    _sync(fd, what)

    warnings = []
    alignment = enable_direct(fd) if cache == "none" else 0
    if cache == "none" and not alignment:
        warnings.append(
            f"{what}: its filesystem has no O_DIRECT; it is read through the page cache",
        )
    if alignment > 512:
        warnings.append(
            f"{what} takes direct reads of {alignment} bytes only, and so gives the disk blocks of "
            "that size; --image-cache page allows 512",
        )
    st = os.fstat(fd)
    if is_block and (point := topology.mount_point(st.st_rdev, writable_only=True)):
        warnings.append(
            f"{what} is mounted on {point} for writing: what is written there damages the disk; "
            f"`mount -o remount,ro {point}`",
        )
    return Image(
        path=path,
        real_path=os.path.realpath(path),
        fd=fd,
        size=size_of(fd),
        direct=alignment > 0,
        alignment=alignment or 1,
        identity=identity_of(fd, st),
        ctime_ns=st.st_ctime_ns,
        is_block=is_block,
        warnings=warnings,
    )


def _refuse_partial_block(fd: int, what: str) -> None:
    """Refuse a disk that ends inside one of its blocks: the kernel reads whole ones only."""
    block = blockdev.logical_block_size(fd)
    if rest := size_of(fd) % block:
        raise UbiError(
            f"{what} has {size_of(fd)} bytes in blocks of {block}, so that nobody can read its "
            f"last {rest}: give it smaller blocks (`losetup --sector-size 512`), or whole ones",
        )


def _lock_shared(fd: int, what: str, topology: Topology) -> None:
    """Take the shared flock; go on without where the filesystem has no locks."""
    give_up = time.monotonic() + _LOCK_GRACE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            # partitioning tools lock a device for a moment
            if time.monotonic() < give_up:
                time.sleep(0.02)
                continue
            owners = ", ".join(topology.lockers(os.fstat(fd))) or "another program"
            raise UbiError(
                f"{what} is locked by {owners}, which writes it (as the base of a device?): end "
                "that first, or name another image",
                Exit.BUSY,
            ) from None
        except OSError:
            return
        else:
            return


def _refuse_other_formats(fd: int, path: str, *, is_block: bool) -> None:
    """Refuse disk image formats and archives by their magic, saying how to convert them."""
    head = os.pread(fd, _MAGIC_SIZE, 0)
    for known in _FORMATS:
        if head[known.offset :].startswith(known.magic):
            source = shlex.quote(path)
            target = shlex.quote(_raw_name(path, is_block=is_block))
            command = known.command.format(a=source, b=target)
            raise UbiError(
                f"image {shown(path)} is {known.name}, not a raw disk: convert it with "
                f"`{shown(command)}`, or insist with -f raw",
            )


def _raw_name(path: str, *, is_block: bool) -> str:
    """Return a name for the converted image: disk.raw for disk.qcow2 and for disk.img.xz."""
    stem = os.path.basename(path) if is_block else path
    while True:
        root, suffix = os.path.splitext(stem)
        if suffix.lower() not in _SUFFIXES:
            break
        stem = root
    return stem if stem.endswith(".raw") and stem != path else f"{stem}.raw"


def _sync(fd: int, what: str) -> None:
    """Fsync the image: its writer may not have, and a crash would take what we built on."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC:
            raise UbiError(
                f"{what} was not wholly written to its disk ({error.strerror}): make it again",
            ) from None


def fingerprint(fd: int, size: int) -> bytes:
    """Return 32 bytes that tell one image's content from another's, in milliseconds.

    BLAKE2b-256 (personalised "ublk-ubi image 1") over: the size, 8 bytes little-endian; the first
    MiB; the last MiB; 64 blocks of 4 KiB at 4096 × ⌊⌊size / 4096⌋ × i / 65⌋, i = 1 … 64. Parts
    that reach past the end are cut there. The value is recorded on the base: it never changes.

    It notices another image, a truncated one, another partition table, boot sector or first
    superblock. It cannot notice a change that lies between the sampled blocks, as an image that
    was mounted and written may have; nor times, names and places, which it does not look at. Only
    `Image.changed` notices such a change, and only while the image is open.

    Raises UbiError when the image ends before `size` or cannot be read.
    """
    assert size > 0
    blocks = size // _SAMPLE_SIZE
    parts = [(0, _END_SIZE), (max(0, size - _END_SIZE), _END_SIZE)]
    parts += [
        (_SAMPLE_SIZE * (blocks * i // (_SAMPLE_COUNT + 1)), _SAMPLE_SIZE)
        for i in range(1, _SAMPLE_COUNT + 1)
    ]
    digest = blake2b(digest_size=FINGERPRINT_SIZE, person=b"ublk-ubi image 1")
    digest.update(size.to_bytes(8, "little"))
    # a descriptor of its own, as O_DIRECT would want aligned buffers
    buffered = reopen(fd, os.O_RDONLY)
    try:
        os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, length in parts:  # all at once: a slow image is waited for once, not 66 times
            os.posix_fadvise(buffered, offset, length, os.POSIX_FADV_WILLNEED)
        for offset, length in parts:
            digest.update(_read_all(buffered, offset, min(length, size - offset)))
    finally:
        os.close(buffered)
    assert digest.digest_size == FINGERPRINT_SIZE
    return digest.digest()


def _read_all(fd: int, offset: int, length: int) -> bytes:
    """Read `length` bytes, or refuse."""
    found = b""
    while len(found) < length:
        try:
            piece = os.pread(fd, length - len(found), offset + len(found))
        except OSError as error:
            raise UbiError(
                f"image {shown(os.readlink(f'/proc/self/fd/{fd}'))} cannot be read at byte "
                f"{offset}: {error.strerror}; check its disk (see `dmesg`)",
            ) from None
        if not piece:
            raise UbiError(
                f"image {shown(os.readlink(f'/proc/self/fd/{fd}'))} ends at byte "
                f"{offset + len(found)} while it is being read: leave it alone, and try again",
            )
        found += piece
    return found


def _utc(time_ns: int) -> str:
    """Write a time to be read; the host's zone is in a file that a live daemon does not see."""
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{rest_ns:09}"
