"""The host's side of safety: the guest's process lives where it cannot write the machine's files.

A read-only mount inside the guest would not do: the guest's root can remount it, or mount hostfs
anew. So the kernel's process itself runs in namespaces of its own, in which everything is mounted
read-only but a tmpfs of its own (its memory, its disks) and the scratch folder; `/proc` is that of
its own process namespace, so that no path leads through another process into the open. Only the
host's kernel could undo that, and nobody asks it to. The end of the namespace's first process is
the end of every process in it: nothing outlives the lab.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
SYS_MOUNT_SETATTR = 442  # the same on every architecture
MOUNT_ATTR_RDONLY = 1
PR_SET_PDEATHSIG = 1
ADDR_NO_RANDOMIZE = 0x0040000


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), os.fsencode(kind), flags, os.fsencode(data)
    )
    _check(result, f"mount on {target}")


def _set_read_only(path: str, read_only: bool, recursive: bool) -> None:
    bit = MOUNT_ATTR_RDONLY
    attr = _MountAttr(set=bit if read_only else 0, clear=0 if read_only else bit)
    result = _libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(AT_RECURSIVE if recursive else 0),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    _check(result, f"make {path} read-only (Linux 5.12 or later can)")


def separate() -> None:
    """Make the next child of this process the first process of a process namespace.

    Someone who is not root becomes so in a user namespace.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWPID if uid == 0 else CLONE_NEWPID | CLONE_NEWUSER
    try:
        _check(_libc.unshare(flags), "unshare")
        if uid:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        raise LabError(
            f"cannot make a process namespace for the guest: {error.strerror}; "
            "run it as root, in a container with CAP_SYS_ADMIN"
        ) from error


def die_with_parent() -> None:
    """Have this process killed when its parent goes, however it goes."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def enter(private: str, size: int, writable: Iterable[str]) -> None:
    """Move this process to where only `private` (a new tmpfs) and `writable` take writes.

    To be called in the first process of the process namespace.
    """
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    try:
        _mount("none", "/", "", MS_REC | MS_PRIVATE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise LabError("'/' is no mount point: bind-mount this chroot on itself first") from error
    _mount("lab", private, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=700")
    root = os.path.join(private, "root")
    os.mkdir(root)
    _mount("/", root, "", MS_BIND | MS_REC)
    _set_read_only(root, read_only=True, recursive=True)
    _set_read_only(root + private, read_only=False, recursive=False)
    for folder in writable:
        _mount(root + folder, root + folder, "", MS_BIND)
        _set_read_only(root + folder, read_only=False, recursive=False)
    try:
        _mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:  # not given inside some containers; then none at all
        _mount("none", root + "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _set_read_only(root + "/proc", read_only=True, recursive=False)
    os.chroot(root)
    os.chdir("/")
    # User-mode Linux wants this and would otherwise run itself anew through /proc.
    _libc.personality(ADDR_NO_RANDOMIZE)
