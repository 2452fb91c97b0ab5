"""System calls that Python has no function for, by ctypes; each raises OSError.

Helper processes import this: it imports as little as it can.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_SLAVE = 32, 4096, 8192, 16384, 1 << 19
MNT_DETACH = 2

PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
PR_SET_IO_FLUSHER = 57

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4

SECCOMP_SET_MODE_FILTER = 1

# By machine: numbers that glibc has no function for.
_NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "capset": 91, "seccomp": 277},
}
_CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words a set

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_char_p))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def machine() -> str:
    """Return the machine's name, as in `uname -m`."""
    return os.uname().machine


def _syscall(name: str, *arguments: object) -> int:
    numbers = _NUMBERS.get(machine())
    if numbers is None:
        raise OSError(38, f"{name}: its number is not known on {machine()}")
    _libc.syscall.restype = ctypes.c_long
    return _checked(_libc.syscall(ctypes.c_long(numbers[name]), *arguments), name)


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Move the calling thread, the only one, into a namespace."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def mount(
    source: str | None, target: str, kind: str | None = None, flags: int = 0,
    options: str | None = None,
) -> None:
    """Mount something, or change how it is mounted."""
    result = _libc.mount(
        _text(source), _text(target), _text(kind), ctypes.c_ulong(flags), _text(options),
    )
    _checked(result, f"mount on {target}")


def detach(target: str) -> None:
    """Unmount with all that is below, when the last user has gone."""
    _checked(_libc.umount2(_text(target), ctypes.c_int(MNT_DETACH)), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root of all processes of this namespace that have the present one."""
    _syscall("pivot_root", _text(new), _text(old))


def prctl(option: int, a: int = 0, b: int = 0) -> int:
    """Change what the kernel does for this thread."""
    zero = ctypes.c_ulong(0)
    words = (ctypes.c_ulong(a), ctypes.c_ulong(b), zero, zero)
    return _checked(_libc.prctl(ctypes.c_int(option), *words), f"prctl {option}")


def mlockall(flags: int) -> None:
    """Lock what is mapped, and what will be, in memory."""
    _checked(_libc.mlockall(ctypes.c_int(flags)), "mlockall")


def mlock(address: int, length: int) -> None:
    """Read in and lock a range of memory."""
    _checked(_libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)), "mlock")


def set_capabilities(kept: int) -> None:
    """Give the calling thread these effective and permitted capabilities, none inheritable."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _syscall("capset", header, data)


def set_filter(program: bytes, flags: int) -> int:
    """Install a seccomp filter: packed struct sock_filter; see seccomp(2)."""
    packed = _Filter(len(program) // 8, program)
    return _syscall(
        "seccomp", ctypes.c_uint(SECCOMP_SET_MODE_FILTER), ctypes.c_uint(flags),
        ctypes.byref(packed),
    )
