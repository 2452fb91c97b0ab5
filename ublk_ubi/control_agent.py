"""The helper process that runs ublk control commands, one after the other.

A control command can hang for ever, in the kernel and unkillable: STOP_DEV waits for a request
that the server holds, START_DEV for FETCHes that never come. So no command runs in a process that
anybody waits for: this one takes commands over a socket and is abandoned when it is late.

Standard input is one end of a SOCK_SEQPACKET pair; a packet is a message, in both directions.
The layout is a contract between two processes, the older of which may have outlived an upgrade
of the files: any change of it changes `PROTOCOL`.

    to the agent     REQUEST: operation code, struct ublksrv_ctrl_cmd; then the command's buffer
    from the agent   REPLY: kind, value; then what the kind says
                     READY    value: PROTOCOL; sent once, when /dev/ublk-control is open
                     RESULT   value: the command's result or -errno; then the buffer
                     FAILED   value: errno; then a line of text. The agent ends

The agent imports as little as it can: a command must not wait for Python's start.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct

from ublk_ubi import liburing

PROTOCOL = 1
REQUEST = struct.Struct("=I32s")
REPLY = struct.Struct("=Ii")
READY, RESULT, FAILED = 1, 2, 3

MAX_BUFFER = 60 << 10
MAX_PACKET = REQUEST.size + MAX_BUFFER
ADDR_OFFSET = 8
"""Where `addr` lies in struct ublksrv_ctrl_cmd: the agent alone knows the buffer's address."""

_STDIN = 0
_IGNORED_SIGNALS = (1, 2, 15, 30)  # SIGHUP, SIGINT, SIGTERM, SIGPWR
_SIG_IGN = 1


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


def main(control_path: str) -> None:
    """Serve commands on `control_path` (/dev/ublk-control) until the parent closes the socket."""
    ignore_signals()
    try:
        ring = liburing.CommandRing()
        control_fd = os.open(control_path, os.O_RDWR | os.O_CLOEXEC)
        send(READY, PROTOCOL)
        while packet := os.read(_STDIN, MAX_PACKET):
            send(RESULT, *execute(ring, control_fd, packet))
    except OSError as error:
        code = error.errno or errno.EIO
        send(FAILED, code, f"{control_path}: {os.strerror(code)}".encode())
    except Exception as error:
        send(FAILED, errno.EIO, str(error).encode())
    os._exit(0)
