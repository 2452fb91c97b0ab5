"""Starts a device daemon and waits until it is live, has failed, or died.

The daemon gets its `Task` in a memory file, so that nothing waits for a reader, and says how it
went in one line of JSON on a pipe:

    {"ok":true,"name":…,"device":…,"link":…,"id":…,"pid":…,"size":…,"warnings":[…]}
    {"ok":false,"error":"…","exit":N}

No line and the end of the pipe: it died. Its output goes to a log that it keeps once it has a name.
Where systemd is in charge it gets a unit of its own, which nobody's end takes along.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import site
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ublk_ubi import runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.notify import VARIABLE as NOTIFY_SOCKET
from ublk_ubi.options import Task
from ublk_ubi.systemd import own_unit, scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_ubi.options import DeviceOptions

MAX_ANSWER = 64 << 10
LOADED = b'{"ready": true}\n'
STOP_WAIT_S = 10.0
_END_WAIT_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG_TAIL = 4096
_LOG_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8} "
_PATIENCE_MS = 500


class Ready(msgspec.Struct, kw_only=True):
    """What a daemon says once: that its device is live, or why not. `size` is bytes."""

    ok: bool
    error: str = ""
    exit: int = Exit.FAILED
    name: str = ""
    device: str = ""
    link: str = ""
    id: int = -1
    pid: int = 0
    size: int = 0
    warnings: list[str] = []


def daemon_command() -> list[str]:
    """Give the command line of the daemon, to which its task's descriptor is added."""
    # -P: the daemon runs in /, and nothing that lies there is to be imported.
    return [sys.executable, "-P", "-m", "ublk_ubi.daemon"]


def start_daemon(
    options: DeviceOptions,
    notice: Callable[[str], None] | None = None,
    *,
    recover: bool = False,
    before_go: Callable[[], None] | None = None,
    interrupt_fd: int | None = None,
) -> Ready:
    """Start a daemon for `options` and wait for its device.

    `recover`: it takes over the disk that another left. `before_go` is called when the daemon has
    loaded all that it needs and waits to begin; what it raises ends the daemon.

    `notice` hears what the daemon logs when the wait gets long: what it waits for. Raises
    UbiError: the daemon's own reason, or how it died. On SIGINT, SIGTERM or SIGHUP the daemon is
    ended, and UbiError says so. Threads other than the main one get no signals: they give
    `interrupt_fd`, which does the same once it is readable.
    """
    log_fd = runtime.open_log()
    try:
        ready_fd, their_ready_fd = os.pipe()
        their_go_fd, go_fd = os.pipe() if before_go is not None else (-1, -1)
        try:
            with _interruptions(interrupt_fd) as interrupts:
                task = Task(options, their_ready_fd, recover, None if go_fd < 0 else their_go_fd)
                process = _spawn(task, log_fd)
                told = _Told(log_fd, notice)
                line = _wait_for_line(ready_fd, interrupts, process, told)
                if before_go is not None and line == LOADED:
                    _begin(process, go_fd, before_go)
                    line = _wait_for_line(ready_fd, interrupts, process, told)
        finally:
            os.close(ready_fd)
            if go_fd >= 0:
                os.close(go_fd)
        return _judge(line, process, log_fd)
    finally:
        runtime.discard_log(log_fd)


def _begin(
    process: subprocess.Popen[bytes], go_fd: int, before_go: Callable[[], None],
) -> None:
    """Let a daemon begin that has loaded all; end it if the time has not come."""
    try:
        before_go()
    except BaseException:
        _stop(process)
        raise
    os.write(go_fd, b"1")


def _spawn(task: Task, log_fd: int) -> subprocess.Popen[bytes]:
    """Start the process; the task's descriptors are its from then on, and closed here."""
    theirs = [task.ready_fd] if task.go_fd is None else [task.ready_fd, task.go_fd]
    task_fd = os.memfd_create("task")
    options = task.options
    try:
        os.write(task_fd, msgspec.json.encode(task))
        os.lseek(task_fd, 0, os.SEEK_SET)
        return subprocess.Popen(
            [*scope(options.name or "disk", options), *daemon_command(), str(task_fd)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            cwd="/",
            env=environment(),
            pass_fds=(task_fd, *theirs),
            start_new_session=True,
        )
    except OSError as error:
        raise UbiError(f"cannot start the daemon {sys.executable}: {error.strerror}") from None
    finally:
        for fd in (task_fd, *theirs):
            os.close(fd)


def environment() -> dict[str, str]:
    """Let a process that we start find this very package, also when it runs from a checkout."""
    environment = dict(os.environ)
    if own_unit() is None:
        environment.pop(NOTIFY_SOCKET, None)  # of whoever we were started by, who waits for others
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if parent not in (*site.getsitepackages(), site.getusersitepackages()):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{parent}:{known}" if known else parent
    return environment


class _Told:
    """Passes a log's new lines on, without their time."""

    def __init__(self, log_fd: int, notice: Callable[[str], None] | None) -> None:
        self._fd = log_fd
        self._notice = notice
        self._position = 0

    def pass_on(self) -> None:
        """Tell whole lines that were not told yet."""
        text = os.pread(self._fd, _LOG_TAIL, self._position) if self._notice else b""
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            self._position += len(line)
            if self._notice and line.strip():
                self._notice(re.sub(_LOG_TIME, "", line.decode(errors="replace").strip()))


class _Interrupts(NamedTuple):
    """Where an interruption shows: a pipe of ours with signals' numbers, or a caller's own."""

    fd: int
    signals: bool


def _wait_for_line(
    ready_fd: int, interrupts: _Interrupts, process: subprocess.Popen[bytes], told: _Told,
) -> bytes:
    """Read to the first line's end or the pipe's; an interruption ends daemon and wait."""
    line = b""
    poll = select.poll()
    poll.register(ready_fd, select.POLLIN)
    poll.register(interrupts.fd, select.POLLIN)
    while b"\n" not in line and len(line) < MAX_ANSWER:
        ready = {fd for fd, _ in poll.poll(_PATIENCE_MS)}
        if not ready:
            told.pass_on()
            continue
        if interrupts.fd in ready:
            by = ""
            if interrupts.signals:
                by = f" by {signal.Signals(os.read(interrupts.fd, 1)[0]).name}"
            _stop(process)
            raise UbiError(f"interrupted{by}: the daemon was ended, no device was added")
        piece = os.read(ready_fd, MAX_ANSWER)
        if not piece:
            break
        line += piece
    return line


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the daemon cleanly. Raises UbiError when it does not end in time."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        message = (
            f"interrupted, but the daemon (process {process.pid}) has not ended "
            f"{STOP_WAIT_S:g} s after SIGTERM: see `ublk-ubi list`"
        )
        let_go(process)
        raise UbiError(message, Exit.TIMED_OUT) from None


def _judge(line: bytes, process: subprocess.Popen[bytes], log_fd: int) -> Ready:
    """Make a result or an error of what the daemon said."""
    if not line.endswith(b"\n"):
        raise UbiError(f"the daemon {_how_it_ended(process)}{_last_words(log_fd)}")
    try:
        ready = msgspec.json.decode(line, type=Ready)
    except (msgspec.MsgspecError, UnicodeError) as error:
        _stop(process)
        raise UbiError(f"the daemon's answer makes no sense: {error}") from None
    if ready.ok:
        let_go(process)
        return ready
    # It still takes back what it has made: nothing of it is left when we return.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_WAIT_S)
    let_go(process)
    known = ready.exit in {int(code) for code in Exit}
    raise UbiError(ready.error, Exit(ready.exit) if known else Exit.FAILED)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(_END_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        let_go(process)
        return "closed its end without a word, and was killed"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name} before its device was live"
    return f"ended with status {status} before its device was live"


def _last_words(log_fd: int) -> str:
    """Quote the last line of its log, if there is one."""
    end = os.fstat(log_fd).st_size
    tail = os.pread(log_fd, _LOG_TAIL, max(0, end - _LOG_TAIL))
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:400]}" if lines else ""


_let_go_of: set[int] = set()


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Stop minding a process that outlives us; otherwise its object complains when it goes."""
    if process.returncode is None:
        process.returncode = 0
        _let_go_of.add(process.pid)


def reap() -> None:
    """Bury processes let go of that have ended: for a parent that lives on; others need not."""
    for pid in list(_let_go_of):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            ended = True
        if ended:
            _let_go_of.discard(pid)


@contextlib.contextmanager
def _interruptions(interrupt_fd: int | None) -> Iterator[_Interrupts]:
    """Give what interrupts a wait; signals become bytes, so that they interrupt nothing else."""
    if interrupt_fd is not None:
        yield _Interrupts(interrupt_fd, signals=False)
        return
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    minded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in minded}
    try:
        yield _Interrupts(read_fd, signals=True)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(read_fd)
        os.close(write_fd)
