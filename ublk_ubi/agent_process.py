"""The parent's side of `control_agent`: start one, give it commands, abandon it when it is late.

Nobody ever waits for an agent without a limit. One that is late gets SIGKILL, which ends it at
once or, when it hangs in the kernel, as soon as the kernel lets go; a thread of its own collects it
then, so that a long-lived daemon gathers no zombies. At exit nothing is joined.

An agent is a program that is run (`AgentProcess(command)`); a fork of this process, which costs a
tenth of that (`forked_agent`); or, where nothing can be run or forked any more, a fork of an agent
that was told to do that alone (`confine`, `fork`).
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from ublk_ubi import control_agent
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONTROL_PATH = "/dev/ublk-control"

# Not `-m`: runpy and site make the start a third longer (15 for 11 ms). The paths are arguments, as
# an isolated interpreter (-I -S: no environment, no site, nothing of the user's) finds no package.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from ublk_ubi.control_agent import main; main(sys.argv[2])"
)
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
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


class _Process:
    """An agent's process: a child, or what another agent has forked."""

    def __init__(self, pid: int, sock: socket.socket, *, child: bool) -> None:
        """Watch it; raises OSError when that cannot be."""
        self.pid = pid
        self.socket = sock
        self._child = child
        self._status = 0
        self._fd = os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end; None: not in time. Else its status, or 0: its parent's to know."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(None if timeout_s is None else timeout_s * 1000):
                return None
            if self._child:
                self._status = _collect(self.pid)
            os.close(self._fd)
            self._fd = -1
        return self._status


class AgentProcess:
    """One agent; used by one thread at a time."""

    def __init__(self, program: Sequence[str] | _Process) -> None:
        """Start it without waiting for it, or take over one that was forked.

        Raises UbiError when it cannot be started.
        """
        self._ready = False
        self._process = program if isinstance(program, _Process) else _start(program)
        self._socket = self._process.socket
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is there no more."""
        return self._process.wait(0) is not None

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
                return AgentProcess(_Process(pid, ours, child=False))
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

    def unschedule(self, device_id: int, deadline: float) -> int:
        """Have it take a disk's I/O scheduler away; returns 0 or -errno."""
        command = device_id.to_bytes(8, sys.byteorder) + bytes(24)
        return self.call(control_agent.UNSCHEDULE, command, b"", deadline)[0]

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
        status = self._process.wait(_CLOSE_WAIT_S)
        if status is None:
            return ""
        return f" (signal {-status})" if status < 0 else f" (exit status {status})"

    def abandon(self) -> None:
        """Give it up, whatever it does: returns at once, collects it when it has ended."""
        self._socket.close()
        self._process.kill()
        if not self.ended:
            name = f"reap-{self.pid}"
            threading.Thread(target=self._process.wait, name=name, daemon=True).start()

    def close(self) -> None:
        """End an idle agent; waits a moment for it, and abandons it after that."""
        self._socket.close()
        self._process.kill()
        if self._process.wait(_CLOSE_WAIT_S) is None:
            self.abandon()

    def descriptors(self) -> dict[int, str]:
        """Return what the agent has open, by number: a look into /proc, for tests and doctor."""
        folder = f"/proc/{self.pid}/fd"
        return {int(fd): os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}


def _start(command: Sequence[str]) -> _Process:
    """Run an agent. Raises UbiError."""
    import subprocess  # a daemon forks its agents

    def run(their_fd: int) -> int:
        # Standard error goes nowhere: an abandoned agent would hold a caller's pipe open for as
        # long as it hangs. Its own session: a Ctrl-C is for us. /: it pins no file system.
        process = subprocess.Popen(
            list(command),
            stdin=their_fd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
        process.returncode = 0  # its end is seen by _Process
        return process.pid

    return _begun(run, f"cannot start the ublk control helper {command[0]}")


def forked_agent(control_path: str = CONTROL_PATH) -> AgentProcess:
    """Fork an agent, which has nothing open of this process's. Raises UbiError.

    This process has one thread, so that nothing is amid a change in its copy.
    """
    def fork(their_fd: int) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                control_agent.become(their_fd, control_path)
            finally:
                os._exit(1)
        return pid

    return AgentProcess(_begun(fork, "cannot fork the ublk control helper"))


def _begun(begin: Callable[[int], int], failure: str) -> _Process:
    """Have a child begin, which is given its end of a socket. Raises UbiError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = 0
    try:
        pid = begin(theirs.fileno())
        return _Process(pid, ours, child=True)
    except OSError as error:
        ours.close()
        if pid:
            _collect(pid)  # it sees that nobody is there
        raise UbiError(f"{failure}: {error.strerror}") from None
    finally:
        theirs.close()


def _collect(pid: int) -> int:
    """Wait for a child; returns its status, 0 if nobody knows it any more."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0


def _remaining_s(deadline: float) -> float:
    """Seconds left; raises TimeoutError when none are. Never 0, which means non-blocking."""
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s
