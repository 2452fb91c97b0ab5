"""An io_uring for control commands, over the system's liburing.so.2 (2.3 or later) by ctypes.

Only symbols that 2.3 exports are called; the prep helpers are inline in C and not in the library,
so the SQE is filled by hand. `struct io_uring` kept its size and the fields used here through all
of 2.x (tests/unit/test_abi.py holds them against <liburing.h>).

The helper process that runs control commands imports this module: it stays free of enum and of
the project's other modules, which would double its start time.
"""

from __future__ import annotations

import ctypes
import errno
import os

LIBRARY = "liburing.so.2"
MIN_VERSION = (2, 3)

IORING_SETUP_SQE128 = 1 << 10
IORING_OP_URING_CMD = 46
CMD_SIZE = 80

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_s32 = ctypes.c_int32
_pu32 = ctypes.POINTER(ctypes.c_uint32)


class Sqe(ctypes.Structure):
    """A 128-byte submission entry as a URING_CMD fills it (struct io_uring_sqe, SQE128)."""

    _fields_ = (
        ("opcode", _u8),
        ("flags", _u8),
        ("ioprio", _u16),
        ("fd", _s32),
        ("cmd_op", _u32),
        ("pad1", _u32),
        ("addr", _u64),
        ("len", _u32),
        ("uring_cmd_flags", _u32),
        ("user_data", _u64),
        ("buf_index", _u16),
        ("personality", _u16),
        ("file_index", _u32),
        ("cmd", _u8 * CMD_SIZE),
    )


class Cqe(ctypes.Structure):
    """A 16-byte completion entry (struct io_uring_cqe)."""

    _fields_ = (("user_data", _u64), ("res", _s32), ("flags", _u32))


class SqOffsets(ctypes.Structure):
    """Struct io_sqring_offsets."""

    _fields_ = (
        ("head", _u32),
        ("tail", _u32),
        ("ring_mask", _u32),
        ("ring_entries", _u32),
        ("flags", _u32),
        ("dropped", _u32),
        ("array", _u32),
        ("resv1", _u32),
        ("user_addr", _u64),
    )


class CqOffsets(ctypes.Structure):
    """Struct io_cqring_offsets."""

    _fields_ = (
        ("head", _u32),
        ("tail", _u32),
        ("ring_mask", _u32),
        ("ring_entries", _u32),
        ("overflow", _u32),
        ("cqes", _u32),
        ("flags", _u32),
        ("resv1", _u32),
        ("user_addr", _u64),
    )


class RingParams(ctypes.Structure):
    """Struct io_uring_params."""

    _fields_ = (
        ("sq_entries", _u32),
        ("cq_entries", _u32),
        ("flags", _u32),
        ("sq_thread_cpu", _u32),
        ("sq_thread_idle", _u32),
        ("features", _u32),
        ("wq_fd", _u32),
        ("resv", _u32 * 3),
        ("sq_off", SqOffsets),
        ("cq_off", CqOffsets),
    )


class RingSq(ctypes.Structure):
    """Struct io_uring_sq; its last two words mean something in newer releases only: not used."""

    _fields_ = (
        ("khead", _pu32),
        ("ktail", _pu32),
        ("kring_mask", _pu32),
        ("kring_entries", _pu32),
        ("kflags", _pu32),
        ("kdropped", _pu32),
        ("array", _pu32),
        ("sqes", ctypes.POINTER(Sqe)),
        ("sqe_head", _u32),
        ("sqe_tail", _u32),
        ("ring_sz", ctypes.c_size_t),
        ("ring_ptr", ctypes.c_void_p),
        ("ring_mask", _u32),
        ("ring_entries", _u32),
        ("pad", _u32 * 2),
    )


class RingCq(ctypes.Structure):
    """Struct io_uring_cq."""

    _fields_ = (
        ("khead", _pu32),
        ("ktail", _pu32),
        ("kring_mask", _pu32),
        ("kring_entries", _pu32),
        ("kflags", _pu32),
        ("koverflow", _pu32),
        ("cqes", ctypes.POINTER(Cqe)),
        ("ring_sz", ctypes.c_size_t),
        ("ring_ptr", ctypes.c_void_p),
        ("ring_mask", _u32),
        ("ring_entries", _u32),
        ("pad", _u32 * 2),
    )


class Ring(ctypes.Structure):
    """Struct io_uring."""

    _fields_ = (
        ("sq", RingSq),
        ("cq", RingCq),
        ("flags", _u32),
        ("ring_fd", ctypes.c_int),
        ("features", _u32),
        ("enter_ring_fd", ctypes.c_int),
        ("int_flags", _u8),
        ("pad", _u8 * 3),
        ("pad2", _u32),
    )


def _failure(message: str) -> Exception:
    """Make the UbiError late: only a failing caller pays for the import."""
    from ublk_ubi.errors import UbiError

    return UbiError(message)


def load() -> ctypes.CDLL:
    """Open the library and declare what is called.

    Raises UbiError, naming the package, when it is missing or older than 2.3.
    """
    try:
        lib = ctypes.CDLL(LIBRARY)
    except OSError:
        message = f"{LIBRARY} is missing: install the package liburing2 (2.3 or later)"
        raise _failure(message) from None
    if not hasattr(lib, "io_uring_get_events"):
        message = f"{LIBRARY} is older than 2.3: install a newer package liburing2"
        raise _failure(message)
    ring = ctypes.POINTER(Ring)
    lib.io_uring_queue_init_params.argtypes = [_u32, ring, ctypes.POINTER(RingParams)]
    lib.io_uring_queue_exit.argtypes = [ring]
    lib.io_uring_queue_exit.restype = None
    lib.io_uring_get_sqe.argtypes = [ring]
    lib.io_uring_get_sqe.restype = ctypes.POINTER(Sqe)
    lib.io_uring_submit.argtypes = [ring]
    lib.io_uring_peek_batch_cqe.argtypes = [ring, ctypes.POINTER(ctypes.POINTER(Cqe)), _u32]
    lib.io_uring_peek_batch_cqe.restype = _u32
    return lib


def version(lib: ctypes.CDLL) -> tuple[int, int]:
    """Major and minor; 2.3 has no function that says so, and is what remains without one."""
    if hasattr(lib, "io_uring_major_version"):
        return int(lib.io_uring_major_version()), int(lib.io_uring_minor_version())
    return MIN_VERSION


def explain_setup_error(code: int) -> str:
    """Say in one line why io_uring_setup(2) failed with errno `code`, and what to do."""
    reasons = {
        errno.EPERM: "io_uring is forbidden here: set the sysctl kernel.io_uring_disabled to 0",
        errno.ENOSYS: "this kernel, or this container's seccomp profile, has no io_uring",
        errno.EINVAL: "this kernel's io_uring has no 128-byte entries: use Linux 5.19 or later",
        errno.ENOMEM: "io_uring found no memory to lock: raise the limit memlock (ulimit -l)",
        errno.EMFILE: "too many open files: raise the limit nofile (ulimit -n)",
    }
    reason = reasons.get(code, os.strerror(code))
    return f"cannot make an io_uring ({errno.errorcode.get(code, code)}): {reason}"


class CommandRing:
    """One ring of 128-byte entries that carries URING_CMDs, one at a time.

    `fileno()` becomes readable when the command has ended, so that a caller can wait for that
    and for other things in one poll(2).
    """

    def __init__(self, entries: int = 2) -> None:
        """Make the ring; raises UbiError with the reason in one line."""
        self._lib = load()
        self._ring = Ring()
        params = RingParams(flags=IORING_SETUP_SQE128)
        result = self._lib.io_uring_queue_init_params(entries, self._ring, params)
        if result < 0:
            raise _failure(explain_setup_error(-result))

    def fileno(self) -> int:
        """Return the ring's descriptor, readable while a completion waits."""
        return int(self._ring.ring_fd)

    def submit(self, fd: int, cmd_op: int, payload: bytes) -> None:
        """Start one command on `fd`; `payload` (at most 80 bytes) lies in the SQE itself.

        Raises OSError when the kernel does not take it.
        """
        if len(payload) > CMD_SIZE:
            raise ValueError(len(payload))
        entry = self._lib.io_uring_get_sqe(self._ring)
        if not entry:
            raise OSError(errno.EBUSY, "the control ring is full")
        ctypes.memset(entry, 0, ctypes.sizeof(Sqe))
        sqe = entry.contents
        sqe.opcode = IORING_OP_URING_CMD
        sqe.fd = fd
        sqe.cmd_op = cmd_op
        ctypes.memmove(ctypes.addressof(sqe) + Sqe.cmd.offset, payload, len(payload))
        result = self._lib.io_uring_submit(self._ring)
        if result != 1:
            raise OSError(-result if result < 0 else errno.EAGAIN, "io_uring_submit")

    def result(self) -> int | None:
        """Take the ended command's result (≥ 0, or -errno); None while it still runs."""
        cqe = ctypes.POINTER(Cqe)()
        if not self._lib.io_uring_peek_batch_cqe(self._ring, cqe, 1):
            return None
        result = int(cqe.contents.res)
        # What io_uring_cqe_seen() does in C. A plain store is enough: the entry has been read,
        # and with one command at a time the kernel has nothing to put in its place.
        self._ring.cq.khead[0] += 1
        return result

    def close(self) -> None:
        """Unmap and close the ring; waits for nothing."""
        self._lib.io_uring_queue_exit(self._ring)
