"""The helper process that runs ublk control commands, one after the other.

A control command can hang for ever, in the kernel and unkillable: STOP_DEV waits for a request
that the server holds, START_DEV for FETCHes that never come. So no command runs in a process that
anybody waits for: this one takes commands over a socket and is abandoned when it is late.

Standard input is one end of a SOCK_SEQPACKET pair; a packet is a message, in both directions.
The layout is a contract between two processes, the older of which may have outlived an upgrade
of the files: any change of it changes `PROTOCOL`.

    to the agent     REQUEST: operation code, struct ublksrv_ctrl_cmd; then the command's buffer.
                     Or one of its own: CONFINE (a descriptor: the mount namespace to join, or
                     none), FORK (a descriptor: the new agent's end), OPENERS (a device number),
                     UNSCHEDULE (a ublk id)
    from the agent   REPLY: kind, value; then what the kind says
                     READY    value: PROTOCOL; sent once, when /dev/ublk-control is open
                     RESULT   value: the command's result or -errno; then the buffer
                     FAILED   value: errno; then a line of text. The agent ends

The agent imports as little as it can: a command must not wait for Python's start.

A daemon that is live has no program left that it could run: one of its agents is shut in with it
(CONFINE) and does nothing but fork others. It also looks who has a disk open (OPENERS), for which
the daemon itself has no right any more.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import gc
import os
import select
import struct
import sys
import time

from ublk_ubi import liburing

PROTOCOL = 3
REQUEST = struct.Struct("=I32s")
REPLY = struct.Struct("=Ii")
READY, RESULT, FAILED = 1, 2, 3
CONFINE, FORK, OPENERS, UNSCHEDULE = 1, 2, 3, 4  # no operation code of ublk's is so low

KEPT = ("CAP_SYS_ADMIN", "CAP_SYS_PTRACE")  # the control device; who has a disk open

MAX_BUFFER = 60 << 10
MAX_PACKET = REQUEST.size + MAX_BUFFER
ADDR_OFFSET = 8
"""Where `addr` lies in struct ublksrv_ctrl_cmd: the agent alone knows the buffer's address."""

_STDIN, _STDOUT, _STDERR = 0, 1, 2
_BLOCK = 6  # S_IFBLK, in the type's four bits
_IGNORED_SIGNALS = (1, 2, 15, 30)  # SIGHUP, SIGINT, SIGTERM, SIGPWR
_SIG_IGN = 1
_IDLE_TRIES, _IDLE_WAIT_S = 20, 0.01


def ignore_signals() -> None:
    """Outlive HUP, INT, TERM, PWR: whoever ends our parent means the parent, which still needs us.

    The parent's own end is seen on standard input. By libc, as `import signal` costs 2 ms (enum).
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    for number in _IGNORED_SIGNALS:
        libc.signal(number, _SIG_IGN)


def send(kind: int, value: int, payload: bytes = b"") -> None:
    """Send one packet; a parent that is gone is not an error, the next read sees it."""
    try:
        os.write(_STDIN, REPLY.pack(kind, value) + payload)
    except BrokenPipeError:
        os._exit(0)


def wait(ring: liburing.CommandRing) -> int:
    """Wait for the running command's result; end the process when the parent has gone.

    Ending is what breaks a START_DEV that nobody will ever answer: it would keep the device.
    """
    poll = select.poll()
    poll.register(ring.fileno(), select.POLLIN)
    poll.register(_STDIN, 0)
    while (result := ring.result()) is None:
        for fd, _event in poll.poll():
            if fd == _STDIN:
                os._exit(0)
    return result


def execute(ring: liburing.CommandRing, control_fd: int, packet: bytes) -> tuple[int, bytes]:
    """Run the command of one packet; gives its result and its buffer as the kernel left it."""
    operation, command = REQUEST.unpack_from(packet)
    length = len(packet) - REQUEST.size
    buffer = (ctypes.c_char * length).from_buffer_copy(packet, REQUEST.size)
    if length:
        address = struct.pack("=Q", ctypes.addressof(buffer))
        command = command[:ADDR_OFFSET] + address + command[ADDR_OFFSET + len(address):]
    ring.submit(control_fd, operation, command)
    return wait(ring), buffer.raw


def receive(sock: _socket.socket) -> tuple[bytes, int]:
    """Receive one packet, empty at the end, and the descriptor that came along, or -1."""
    packet, ancillary, _flags, _address = sock.recvmsg(
        MAX_PACKET, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC,
    )
    for level, kind, data in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            return packet, int.from_bytes(data[:4], sys.byteorder)
    return packet, -1


def confine(namespace_fd: int) -> int:
    """Give up what no command needs; returns 0 or -errno."""
    from ublk_ubi import capabilities, kernel_calls, seccomp

    try:
        if namespace_fd >= 0:
            kernel_calls.setns(namespace_fd, kernel_calls.CLONE_NEWNS)
        capabilities.reduce(KEPT)
        seccomp.install(helper=True)
    except OSError as error:
        return -(error.errno or errno.EIO)
    return 0


def fork(their_fd: int, ring: liburing.CommandRing) -> int:
    """Make another agent, which talks over `their_fd`. Returns its pid or -errno, to itself 0."""
    # One that has ended goes now and not before: until its parent has asked for another, a pid
    # that it was told is no other process's.
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or errno.EAGAIN)
    if pid == 0:
        ring.close()
        os.dup2(their_fd, _STDIN)
    os.close(their_fd)
    return pid


def openers(device: int) -> int:
    """Count the processes that have a block device open."""
    found = 0
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        folder = f"/proc/{pid}/fd"
        try:
            # Only its number tells: what is a device is no matter of the link's text.
            found += any(_is_device(f"{folder}/{fd}", device) for fd in os.listdir(folder))
        except OSError:
            continue  # it has ended
    return found


def _is_device(path: str, device: int) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_rdev == device and status.st_mode >> 12 == _BLOCK


def unschedule(device_id: int) -> int:
    """Take a disk's I/O scheduler away; returns 0 or -errno, -EBUSY: it has requests.

    The switch waits for requests, and others for the switch (block/elevator.c freezes the queue).
    """
    folder = f"/sys/block/ublkb{device_id}"
    try:
        fd = os.open(f"{folder}/queue/scheduler", os.O_RDWR | os.O_CLOEXEC)
        try:
            if b"[none]" in os.read(fd, 4096):
                return 0
            for _ in range(_IDLE_TRIES):
                with open(f"{folder}/inflight") as file:
                    if not any(map(int, file.read().split())):
                        os.write(fd, b"none")
                        return 0
                time.sleep(_IDLE_WAIT_S)
        finally:
            os.close(fd)
    except OSError as error:
        return -(error.errno or errno.EIO)
    return -errno.EBUSY


def serve(control_fd: int) -> None:
    """Serve requests until the parent closes the socket."""
    sock = _socket.socket(fileno=_STDIN)
    ring = liburing.CommandRing()
    send(READY, PROTOCOL)
    while True:
        packet, fd = receive(sock)
        if not packet:
            return
        operation, command = REQUEST.unpack_from(packet)
        if operation == CONFINE:
            send(RESULT, confine(fd))
            if fd >= 0:
                os.close(fd)
        elif operation == FORK:
            pid = fork(fd, ring)
            if pid == 0:
                ring = liburing.CommandRing()
                send(READY, PROTOCOL)
            else:
                send(RESULT, pid)
        elif operation == OPENERS:
            send(RESULT, openers(int.from_bytes(command[:8], sys.byteorder)))
        elif operation == UNSCHEDULE:
            send(RESULT, unschedule(int.from_bytes(command[:8], sys.byteorder)))
        else:
            send(RESULT, *execute(ring, control_fd, packet))


def become(their_fd: int, control_path: str) -> None:
    """Be an agent in a fork of another process, of which only memory is left; does not return."""
    ignore_signals()
    gc.freeze()  # what is the parent's stays shared, and closes no descriptor by its end
    os.setsid()
    os.chdir("/")
    os.dup2(their_fd, _STDIN)
    null_fd = os.open(os.devnull, os.O_RDWR)
    os.dup2(null_fd, _STDOUT)
    os.dup2(null_fd, _STDERR)
    # As far as there are any: the limit may be below that by now, and where Python knows no
    # close_range(2) it tries each number.
    os.closerange(_STDERR + 1, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    main(control_path)


def main(control_path: str) -> None:
    """Serve commands on `control_path` (/dev/ublk-control) until the parent closes the socket."""
    ignore_signals()
    try:
        serve(os.open(control_path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        code = error.errno or errno.EIO
        send(FAILED, code, f"{control_path}: {os.strerror(code)}".encode())
    except Exception as error:
        send(FAILED, errno.EIO, str(error).encode())
    os._exit(0)
