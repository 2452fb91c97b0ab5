"""The ublk control device, typed: what is done to a device as a whole.

Every command runs in a helper process (`control_agent`) with a time limit, and none is waited for
beyond it: a command can hang unkillably in the kernel (STOP_DEV on a request that the server
holds; START_DEV on FETCHes that never come; kernels that wedge). `Control` may be used by several
threads at once: each command has an agent to itself, and one that has ended a command serves the
next. Facts: drivers/block/ublk_drv.c, Documentation/block/ublk.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Self

from ublk_ubi import abi
from ublk_ubi.abi import Command, DevState, Feature
from ublk_ubi.agent_process import (
    CONTROL_PATH,
    AgentDiedError,
    AgentGoneError,
    AgentLateError,
    AgentProcess,
    default_command,
    forked_agent,
)
from ublk_ubi.device_params import AddParams, DeviceParams, DevInfo, DevNumbers, dev_numbers
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

DEFAULT_TIMEOUT_S = 10.0
UNSCHEDULE_TIMEOUT_S = 2.0
READY_TIMEOUT_S = 10.0             # of a helper, from its start to its first command
STOP_TIMEOUT_S = 30.0
MODPROBE_TIMEOUT_S = 20.0
NODE_WAIT_S = 1.0
"""devtmpfs makes /dev/ublk-control at once; udev, in a /dev of its own, a moment later."""

MAX_IDLE_AGENTS = 2
AFFINITY_BYTES = 2048
CAP_SYS_ADMIN = 21
MISC_SYSFS = "/sys/class/misc/ublk-control"


class ControlError(UbiError):
    """A control command failed: `errno` says how, `command` and `device_id` which."""

    def __init__(
        self, message: str, *, code: Exit, errno_: int, command: Command, device_id: int | None,
    ) -> None:
        super().__init__(message, code)
        self.errno = errno_
        self.command = command
        self.device_id = device_id


class ControlTimeout(ControlError):  # noqa: N818 - it is what its users catch it as
    """A command did not end in time; its helper process was abandoned and may still hang.

    What the command does it may do yet: after a late ADD_DEV look the id up and delete it.
    """


_EXITS = {errno.ENODEV: Exit.NO_DEVICE, errno.EBUSY: Exit.BUSY, errno.ETIMEDOUT: Exit.TIMED_OUT}
_HINTS = {
    (Command.ADD_DEV, errno.EEXIST): "the id is taken; give another one, or none",
    (Command.ADD_DEV, errno.EACCES): (
        "this kernel's limit of ublk devices is reached; raise it: "
        "echo 1024 > /sys/module/ublk_drv/parameters/ublks_max"
    ),
    (Command.GET_FEATURES, errno.EINVAL): "this kernel's ublk is too old; use Linux 6.5 or later",
    (Command.GET_FEATURES, errno.ENODEV): "this kernel's ublk is too old; use Linux 6.5 or later",
    (Command.SET_PARAMS, errno.EACCES): "the device is started already",
    (Command.SET_PARAMS, errno.EINVAL): "the driver refuses these parameters",
    (Command.START_DEV, errno.EEXIST): "the device is started already",
    (Command.TRY_STOP_DEV, errno.EBUSY): "the device is open",
    (Command.START_USER_RECOVERY, errno.EBUSY): "its last server has not ended altogether",
    (Command.START_USER_RECOVERY, errno.EINVAL): "it was not made recoverable",
    (Command.QUIESCE_DEV, errno.EBUSY): "every request is in its server's hands",
}


# Who holds a late command up, and what to do; see ControlTimeout.
_SERVER_HOLDS = "its server holds a request or the device; end the server (`del --force`)"
_KERNEL_HOLDS = "the kernel holds it up: see dmesg, and `ublk-ubi doctor` for kernels known for it"
_REQUESTS_WAIT = "a dead server's last requests have not ended, or " + _KERNEL_HOLDS
_LATE_HINTS = {
    Command.STOP_DEV: _SERVER_HOLDS,
    Command.TRY_STOP_DEV: _SERVER_HOLDS,
    Command.DEL_DEV: _SERVER_HOLDS,
    Command.QUIESCE_DEV: _SERVER_HOLDS,
    Command.GET_PARAMS: _REQUESTS_WAIT,
    Command.START_USER_RECOVERY: _REQUESTS_WAIT,
    Command.START_DEV: "its server has not fetched every tag, or " + _KERNEL_HOLDS,
    Command.END_USER_RECOVERY: "its server has not fetched every tag, or " + _KERNEL_HOLDS,
}

# What cannot be given again without a look at what became of it.
_ONCE = {Command.ADD_DEV, Command.START_DEV, Command.END_USER_RECOVERY}
_REMOVING = {Command.STOP_DEV, Command.TRY_STOP_DEV, Command.DEL_DEV, Command.DEL_DEV_ASYNC}


class Control:
    """Control commands on one /dev/ublk-control; a context manager. Times are seconds."""

    def __init__(
        self, control_path: str = CONTROL_PATH, agent_command: Sequence[str] | None = None, *,
        fork: bool = False,
    ) -> None:
        """Start the first agent, so that it is ready when a command comes; checks nothing.

        `agent_command` puts another program in the agent's place (tests). `fork`: it may be a fork
        of this process, if that has one thread. Make it after the process has become a daemon: an
        agent ends with the process that started it.
        """
        self._command = list(agent_command or default_command(control_path))
        self._lock = threading.Lock()
        fork = fork and threading.active_count() == 1
        first = forked_agent(control_path) if fork else AgentProcess(self._command)
        self._idle: list[AgentProcess] | None = [first]
        self._mother: AgentProcess | None = None

    @classmethod
    def open(
        cls, control_path: str = CONTROL_PATH, modprobe: Sequence[str] = ("modprobe", "ublk_drv"),
        *, fork: bool = False,
    ) -> Self:
        """Check that ublk can be had here, load its driver if need be, and return a Control.

        Raises UbiError, one line that says what to do: not root, no driver, no device node.
        """
        if not has_capability(CAP_SYS_ADMIN):
            raise UbiError("ublk devices are made by root (CAP_SYS_ADMIN): run it with sudo")
        if not os.path.exists(control_path):
            _load_driver(control_path, modprobe)
        return cls(control_path, fork=fork)

    def __enter__(self) -> Self:
        """Return itself; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the idle agents; one that runs a command for another thread ends after it."""
        with self._lock:
            agents, self._idle = self._idle or [], None
            if self._mother is not None:
                agents.append(self._mother)
        for agent in agents:
            agent.close()

    def spare(self) -> None:
        """Have an agent that forks all further ones: this process can run no program any more.

        Raises UbiError.
        """
        agent = self._take()
        try:
            mother = self._fork(agent)
        except BaseException:
            agent.abandon()
            raise
        with self._lock:
            self._mother = mother
        self._give_back(agent)

    def confine(self, *, join: bool) -> None:
        """Have all further agents be shut in, and be forked: no program is run any more.

        `join`: in the mount namespace of this process. Raises OSError, also when the kernel grants
        a part of it only.
        """
        namespace_fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) if join else -1
        first = self._take()
        with self._lock:
            others = [*(self._idle or []), *([self._mother] if self._mother is not None else [])]
        pair = [first, *others]  # not shut in, but there
        try:
            pair = self._confined(pair, namespace_fd)
        except (UbiError, AgentGoneError, TimeoutError) as error:
            raise OSError(errno.EIO, str(error) or "it does not answer") from None
        finally:
            if namespace_fd >= 0:
                os.close(namespace_fd)
            alive = [agent for agent in pair if not agent.ended] or [first]
            with self._lock:
                self._mother, self._idle = alive[0], alive[1:2]
            for other in (first, *others):
                if other not in alive[:2]:
                    other.close()

    def _confined(self, agents: list[AgentProcess], namespace_fd: int) -> list[AgentProcess]:
        """Have two agents that are shut in; one that is killed meanwhile is to cost nothing.

        Not `agents` themselves: the kernel may still have a worker thread of one that ran a
        command, and lets no process with two of them into a namespace.
        """
        attempts = 2 * agents
        while attempts:
            agent = attempts.pop(0)
            made: list[AgentProcess] = []
            try:
                made.append(self._fork(agent))
                made[0].confine(namespace_fd, time.monotonic() + DEFAULT_TIMEOUT_S)
                made.append(self._fork(made[0]))
            except BaseException as error:
                for process in made:
                    process.abandon()
                # Only its end is a reason for another try: no refusal, no signal to this process.
                if not attempts or not isinstance(error, UbiError | AgentGoneError):
                    raise
            else:
                return made
        raise AssertionError

    def openers(self, device: int) -> int:
        """Count the processes that have a block device (st_rdev) open. Raises UbiError."""
        return self._ask(lambda agent: agent.openers(device, time.monotonic() + DEFAULT_TIMEOUT_S))

    def unschedule(self, device_id: int) -> None:
        """Leave a new disk without an I/O scheduler. Raises UbiError; then it has one, or is late.

        The kernel gives a disk with one hardware queue mq-deadline (block/elevator.c,
        elevator_set_default). What is beneath image and base has a scheduler, or has none for a
        reason; a second one costs a seventh of all instructions of a random read of 4 KiB, and puts
        in order what is put in order again. Who wants one all the same sets it later.

        Not by this process: a switch of schedulers waits for requests, which this one may serve.
        """
        deadline = time.monotonic() + UNSCHEDULE_TIMEOUT_S
        result = self._ask(lambda agent: agent.unschedule(device_id, deadline))
        if result < 0:
            raise UbiError(f"it has the I/O scheduler that it was given: {os.strerror(-result)}")

    def _ask(self, question: Callable[[AgentProcess], int]) -> int:
        """Ask an agent what is no command of ublk's. Raises UbiError when it does not answer."""
        agent = self._take()
        try:
            answer = question(agent)
        except (AgentGoneError, TimeoutError):
            agent.abandon()
            raise UbiError("the ublk control helper has ended, or does not answer") from None
        except BaseException:
            agent.abandon()
            raise
        self._give_back(agent)
        return answer

    # ---- the driver -------------------------------------------------------------------------

    def get_features(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Feature:
        """Return what this driver can do (≥ 6.5); an older driver is an error that says so."""
        data = self._call(Command.GET_FEATURES, None, bytes(abi.FEATURES_LEN), timeout_s)
        return Feature(int.from_bytes(data, "little"))

    # ---- a device's life --------------------------------------------------------------------

    def add_dev(self, params: AddParams, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> DevInfo:
        """Make a device, not yet started: id, granted flags, granted queues.

        EEXIST: the id is taken. EINVAL: flags that exclude one another, depth over 4096.
        EACCES: the kernel's limit of devices.
        """
        device_id = abi.ANY_ID if params.id is None else params.id
        return DevInfo.unpack(self._call(Command.ADD_DEV, device_id, params.pack(), timeout_s))

    def set_params(
        self, device_id: int, params: DeviceParams, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Say what the disk is; before START_DEV only (EACCES)."""
        self._call(Command.SET_PARAMS, device_id, params.pack(), timeout_s)

    def start_dev(
        self, device_id: int, pid: int, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Make the disk appear; returns when it is usable.

        Waits until every tag has been FETCHed, so another thread must serve meanwhile. `pid`: the
        process that opened ublkc. EEXIST: started already. EINVAL: no parameters, or another
        process's ublkc.
        """
        self._call(Command.START_DEV, device_id, timeout_s=timeout_s, data=pid)

    def stop_dev(self, device_id: int, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Take the disk away, also from under its users; waits for requests that are served.

        Stopping a device that was never started is no error. After a ControlTimeout only the end
        of its server (SIGKILL) sets it free.
        """
        self._call(Command.STOP_DEV, device_id, timeout_s=timeout_s)

    def try_stop_dev(self, device_id: int, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Take the disk away unless it is open (EBUSY); needs SAFE_STOP_DEV. ENODEV: no disk."""
        self._call(Command.TRY_STOP_DEV, device_id, timeout_s=timeout_s)

    def del_dev(self, device_id: int, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Remove the device, stopping it first; returns when its id is free again.

        Waits for whoever has ublkc open, mapped or registered in a ring. ENODEV: there is none.
        """
        self._call(Command.DEL_DEV, device_id, timeout_s=timeout_s)

    def del_dev_async(self, device_id: int, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Remove the device without waiting for its last user; proves nothing about the fence."""
        self._call(Command.DEL_DEV_ASYNC, device_id, timeout_s=timeout_s)

    # ---- what a device is -------------------------------------------------------------------

    def get_dev_info(self, device_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> DevInfo:
        """Return state, server and granted flags. ENODEV: no such device."""
        size = ctypes.sizeof(abi.CtrlDevInfo)
        return DevInfo.unpack(
            self._call(Command.GET_DEV_INFO, device_id, bytes(size), timeout_s),
        )

    def find_dev(self, server_flags: int) -> int | None:
        """Return the id of the device that was made with these `server_flags`, if there is one."""
        for entry in os.listdir("/dev"):
            number = entry.removeprefix("ublkc")
            if number == entry or not number.isdigit():
                continue
            with contextlib.suppress(ControlError):
                if self.get_dev_info(int(number)).server_flags == server_flags:
                    return int(number)
        return None

    def get_params(self, device_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> DeviceParams:
        """Return the disk's parameters as the driver has them."""
        return DeviceParams.unpack(self._get_params(device_id, timeout_s))

    def get_dev_numbers(
        self, device_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> DevNumbers:
        """Return the device numbers of ublkcN and ublkbN."""
        return dev_numbers(self._get_params(device_id, timeout_s))

    def get_queue_affinity(
        self, device_id: int, queue: int, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> frozenset[int]:
        """Return the CPUs whose requests come to `queue`. EINVAL: no such queue."""
        data = self._call(
            Command.GET_QUEUE_AFFINITY, device_id, bytes(AFFINITY_BYTES), timeout_s, data=queue,
        )
        mask = int.from_bytes(data, "little")
        return frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)

    # ---- recovery, upgrade, resize ----------------------------------------------------------

    def start_user_recovery(
        self, device_id: int, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Take over a device whose server ended.

        EBUSY until its last write has landed, when that server had ublkc registered in its rings:
        this return, not the state QUIESCED, is the fence. EINVAL: not recoverable.
        """
        self._call(Command.START_USER_RECOVERY, device_id, timeout_s=timeout_s)

    def end_user_recovery(
        self, device_id: int, pid: int, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Go live under the new server `pid`; waits until every tag has been FETCHed."""
        self._call(Command.END_USER_RECOVERY, device_id, timeout_s=timeout_s, data=pid)

    def quiesce_dev(
        self, device_id: int, *, drain_ms: int = 5000, timeout_s: float = STOP_TIMEOUT_S,
    ) -> None:
        """Ask the server to leave, the disk staying; needs QUIESCE.

        The driver waits up to `drain_ms` for an idle tag in each queue (EBUSY). The server sees
        ABORT on idle tags only: with none idle it must know by itself that it is to go.
        """
        if drain_ms <= 0:
            raise ValueError(drain_ms)
        self._call(Command.QUIESCE_DEV, device_id, timeout_s=timeout_s, data=drain_ms)

    def update_size(
        self, device_id: int, sectors: int, *, timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Give the disk another size, in 512-byte sectors; needs UPDATE_SIZE. ENODEV: no disk.

        The state is looked at first: on a device without a disk kernels before 7.0 crash.
        """
        if self.get_dev_info(device_id, timeout_s=timeout_s).state is DevState.DEAD:
            raise _error(Command.UPDATE_SIZE, device_id, errno.ENODEV)
        self._call(Command.UPDATE_SIZE, device_id, timeout_s=timeout_s, data=sectors)

    # ---- how a command is run ---------------------------------------------------------------

    def _get_params(self, device_id: int, timeout_s: float) -> bytes:
        size = ctypes.sizeof(abi.Params)
        request = bytes(abi.Params(len=size))
        return self._call(Command.GET_PARAMS, device_id, request, timeout_s)

    def _call(
        self,
        command: Command,
        device_id: int | None,
        buffer: bytes = b"",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        data: int = 0,
    ) -> bytes:
        """Run one command to its end or the limit; gives the buffer as the kernel left it.

        An agent that is killed amid a command that can be given twice costs nothing.
        """
        header = abi.CtrlCmd(
            dev_id=abi.ANY_ID if device_id is None else device_id,
            queue_id=abi.NO_QUEUE,
            len=len(buffer),
        )
        header.data[0] = data
        lost = False
        while True:
            agent = self._take()
            try:
                # The limit is the kernel's, not that of a start on a busy host.
                agent.wait_ready(time.monotonic() + READY_TIMEOUT_S)
                deadline = time.monotonic() + timeout_s
                result, answer = agent.call(command, bytes(header), buffer, deadline)
            except AgentLateError as error:
                agent.abandon()
                raise UbiError(str(error), Exit.TIMED_OUT) from None
            except TimeoutError:
                agent.abandon()
                raise _timeout(command, device_id, timeout_s, agent.pid) from None
            except AgentGoneError:
                # It was killed while idle. The command never left: the next agent may have it.
                agent.abandon()
                continue
            except AgentDiedError:
                agent.abandon()
                if lost or command in _ONCE:
                    raise
                lost = True
                continue
            except BaseException:
                agent.abandon()
                raise
            self._give_back(agent)
            if lost and result == -errno.ENODEV and command in _REMOVING:
                return answer  # it had been done
            if result < 0:
                raise _error(command, device_id, -result)
            return answer

    def _take(self) -> AgentProcess:
        with self._lock:
            if self._idle is None:
                raise UbiError("the ublk control device was closed")
            if self._idle:
                return self._idle.pop()
            if self._mother is not None:
                return self._fork(self._mother)
        return AgentProcess(self._command)

    @staticmethod
    def _fork(mother: AgentProcess) -> AgentProcess:
        try:
            return mother.fork(time.monotonic() + DEFAULT_TIMEOUT_S)
        except (AgentGoneError, AgentDiedError, TimeoutError):
            raise UbiError(
                f"the ublk control helper (process {mother.pid}) has ended, or does not answer",
            ) from None

    def _give_back(self, agent: AgentProcess) -> None:
        with self._lock:
            if self._idle is not None and self._mother is not None and self._mother.ended:
                self._mother.abandon()
                self._mother = agent  # any can
                return
            if self._idle is not None and len(self._idle) < MAX_IDLE_AGENTS:
                self._idle.append(agent)
                return
        agent.close()


def effective_capabilities(status: str) -> int:
    """Return the bits of CapEff in the text of /proc/PID/status; none when it has no such line."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def has_capability(number: int) -> bool:
    """Whether this process has an effective capability (its number in linux/capability.h)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return bool(effective_capabilities(status.read()) >> number & 1)


def _load_driver(control_path: str, modprobe: Sequence[str]) -> None:
    """Load the driver once, and explain it when the control device is still missing."""
    import subprocess

    try:
        run = subprocess.run(
            list(modprobe), check=False, capture_output=True, timeout=MODPROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL, cwd="/",
        )
        said = run.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"{modprobe[0]} gave no reason"
    except subprocess.TimeoutExpired:
        reason = f"{' '.join(modprobe)} did not end within {MODPROBE_TIMEOUT_S:g} s"
    except OSError as error:
        reason = f"{modprobe[0]}: {error.strerror}"
    deadline = time.monotonic() + NODE_WAIT_S
    while not os.path.exists(control_path):
        if time.monotonic() > deadline:
            raise _missing_driver(control_path, reason)
        if not os.path.exists(MISC_SYSFS):
            raise _missing_driver(control_path, reason)
        time.sleep(0.01)


def _missing_driver(control_path: str, reason: str) -> UbiError:
    if os.path.exists(MISC_SYSFS):
        return UbiError(
            f"the ublk driver is loaded, but {control_path} is missing: in a container, "
            "pass that device in; else mount devtmpfs on /dev",
        )
    return UbiError(
        f"this kernel ({os.uname().release}) has no ublk driver: boot one with "
        f"CONFIG_BLK_DEV_UBLK, Linux 6.5 or later (Debian 12: from backports) ({reason})",
    )


def _subject(command: Command, device_id: int | None) -> str:
    if device_id is None or device_id == abi.ANY_ID:
        return command.name
    return f"{command.name} of ublk device {device_id}"


def _timeout(
    command: Command, device_id: int | None, timeout_s: float, pid: int,
) -> ControlTimeout:
    return ControlTimeout(
        f"{_subject(command, device_id)} did not end within {timeout_s:g} s, its helper "
        f"(process {pid}) was left behind: {_LATE_HINTS.get(command, _KERNEL_HOLDS)}",
        code=Exit.TIMED_OUT,
        errno_=errno.ETIMEDOUT,
        command=command,
        device_id=device_id,
    )


def _error(command: Command, device_id: int | None, code: int) -> ControlError:
    hint = _HINTS.get((command, code))
    if hint is None:
        hint = "there is no such device" if code == errno.ENODEV else os.strerror(code)
    return ControlError(
        f"{_subject(command, device_id)} failed: {hint} ({errno.errorcode.get(code, code)})",
        code=_EXITS.get(code, Exit.FAILED),
        errno_=code,
        command=command,
        device_id=device_id,
    )
