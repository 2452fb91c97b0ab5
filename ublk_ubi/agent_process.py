"""The parent's side of `control_agent`: start one, give it commands, abandon it when it is late.

Nobody ever waits for an agent without a limit. One that is late gets SIGKILL, which ends it at
once or, when it hangs in the kernel, as soon as the kernel lets go; a thread of its own collects it
then, so that a long-lived daemon gathers no zombies. At exit nothing is joined.

An agent is a program that is run (`AgentProcess(command)`), or, where there is none left to run,
forked by an agent that was told to do that alone (`confine`, `fork`).
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_ubi import control_agent
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTROL_PATH = "/dev/ublk-control"

# Not `-m`: runpy and site make the start a third longer (15 for 11 ms). The paths are arguments, as
# an isolated interpreter (-I -S: no environment, no site, nothing of the user's) finds no package.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from ublk_ubi.control_agent import main; main(sys.argv[2])"
)
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent)
_CLOSE_WAIT_S = 0.2


class AgentGoneError(Exception):
    """The agent had ended before the command was handed over: it is safe to start another."""


class AgentLateError(TimeoutError):
    """The agent was not ready in time: nothing was handed over to it."""


def default_command(control_path: str = CONTROL_PATH) -> list[str]:
    """Return the command line of an agent for `control_path`."""
    return [sys.executable, "-I", "-S", "-B", "-c", _BOOT, _PACKAGE_PARENT, control_path]


class AgentDiedError(UbiError):
    """The agent ended before it answered: what became of its command, nobody knows."""


class Forked:
    """A process that another one has forked, as far as Popen's ways are needed."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        """Watch it; raises OSError when that cannot be."""
        self.pid = pid
        self.socket = sock
        self._fd = os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def poll(self) -> int | None:
        """Return 0 once it has ended; how is its parent's to know."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, as Popen.wait."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("agent", timeout or 0)
            os.close(self._fd)
            self._fd = -1
        return 0


class AgentProcess:
    """One agent; used by one thread at a time."""

    def __init__(self, program: Sequence[str] | Forked) -> None:
        """Start it without waiting for it, or take over one that was forked.

        Raises UbiError when it cannot be started.
        """
        self._ready = False
        self._process: subprocess.Popen[bytes] | Forked
        if isinstance(program, Forked):
            self._socket, self._process = program.socket, program
        else:
            self._socket, self._process = _start(program)
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is there no more."""
        return self._process.poll() is not None

    def confine(self, namespace_fd: int, deadline: float) -> None:
        """Shut it in, in that mount namespace (-1: it stays where it is). Raises OSError."""
        result, _ = self.call(control_agent.CONFINE, bytes(32), b"", deadline, fd=namespace_fd)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def fork(self, deadline: float) -> AgentProcess:
        """Have it make another agent. Raises as `call` does."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid, _ = self.call(control_agent.FORK, bytes(32), b"", deadline, fd=theirs.fileno())
            if pid > 0:
                return AgentProcess(Forked(pid, ours))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.close()
        raise UbiError(f"the ublk control helper cannot fork: {os.strerror(-pid)}")

    def openers(self, device: int, deadline: float) -> int:
        """Have it count who has a block device (its number) open."""
        command = device.to_bytes(8, sys.byteorder) + bytes(24)
        return self.call(control_agent.OPENERS, command, b"", deadline)[0]

    def call(
        self, operation: int, command: bytes, buffer: bytes, deadline: float, *, fd: int = -1,
    ) -> tuple[int, bytes]:
        """Run one command: its result (≥ 0, or -errno) and its buffer as the kernel left it.

        `fd` goes along, if it is not -1. `deadline` is a value of time.monotonic(). After any
        exception the agent is of no further use and must be abandoned. Raises TimeoutError at the
        deadline; AgentGoneError when the command did not reach the agent; AgentDiedError when it
        ends; UbiError when the agent says that it cannot work.
        """
        if len(buffer) > control_agent.MAX_BUFFER:
            raise ValueError(len(buffer))
        self.wait_ready(deadline)
        self._socket.settimeout(_remaining_s(deadline))
        try:
            packet = control_agent.REQUEST.pack(operation, command) + buffer
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([packet], rights if fd >= 0 else [])
        except (BrokenPipeError, ConnectionResetError):
            raise AgentGoneError from None
        kind, result, data = self._receive(deadline)
        if kind != control_agent.RESULT or len(data) != len(buffer):
            raise UbiError("the ublk control helper gave an answer that cannot be read")
        return result, data

    def wait_ready(self, deadline: float) -> None:
        """Wait until it takes commands. Raises AgentLateError at the deadline, else as `call`."""
        if self._ready:
            return
        try:
            self._receive_ready(deadline)
        except TimeoutError:
            message = (f"the ublk control helper (process {self.pid}) is not ready yet: is this "
                       f"host too busy, or short of memory? Give the command again")
            raise AgentLateError(message) from None

    def _receive_ready(self, deadline: float) -> None:
        kind, value, _ = self._receive(deadline)
        if kind != control_agent.READY or value != control_agent.PROTOCOL:
            raise UbiError(
                f"the ublk control helper speaks protocol {value}, not {control_agent.PROTOCOL}: "
                "the program was upgraded under this process; restart it",
            )
        self._ready = True

    def _receive(self, deadline: float) -> tuple[int, int, bytes]:
        self._socket.settimeout(_remaining_s(deadline))
        try:
            packet = self._socket.recv(control_agent.MAX_PACKET)
        except ConnectionResetError:
            packet = b""
        if len(packet) < control_agent.REPLY.size:
            doing = "in a command" if self._ready else "before it was ready"
            message = f"the ublk control helper ended {doing}{self._exit_status()}"
            raise AgentDiedError(message)
        kind, value = control_agent.REPLY.unpack_from(packet)
        data = packet[control_agent.REPLY.size:]
        if kind == control_agent.FAILED:
            raise UbiError(data.decode(errors="replace"))
        return kind, value, data

    def _exit_status(self) -> str:
        try:
            status = self._process.wait(_CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            return ""
        return f" (signal {-status})" if status < 0 else f" (exit status {status})"

    def abandon(self) -> None:
        """Give it up, whatever it does: returns at once, collects it when it has ended."""
        self._socket.close()
        self._process.kill()
        if self._process.poll() is None:
            name = f"reap-{self.pid}"
            threading.Thread(target=self._process.wait, name=name, daemon=True).start()

    def close(self) -> None:
        """End an idle agent; waits a moment for it, and abandons it after that."""
        self._socket.close()
        self._process.kill()
        try:
            self._process.wait(_CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self.abandon()

    def descriptors(self) -> dict[int, str]:
        """Return what the agent has open, by number: a look into /proc, for tests and doctor."""
        folder = Path(f"/proc/{self.pid}/fd")
        return {int(entry.name): os.readlink(entry) for entry in folder.iterdir()}


def _start(command: Sequence[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Run an agent; return our end of its socket. Raises UbiError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Standard error goes nowhere: an abandoned agent would hold a caller's pipe open for as
        # long as it hangs. Its own session: a Ctrl-C is for us. /: it pins no file system.
        process = subprocess.Popen(
            list(command),
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        message = f"cannot start the ublk control helper {command[0]}: {error.strerror}"
        raise UbiError(message) from None
    finally:
        theirs.close()
    return ours, process


def _remaining_s(deadline: float) -> float:
    """Seconds left; raises TimeoutError when none are. Never 0, which means non-blocking."""
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
