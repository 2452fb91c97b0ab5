"""One guest: boots it, hands its lines to the relay, clears up behind it, says how it ended.

    WORK/scratch      the scratch folder, unless the caller names one
    WORK/console.log  the guest's kernel messages
    WORK/disks/       the disks, when they are kept or too big for memory
    WORK/guest/       a tmpfs that only the guest's process sees: its disks, its plan, and more

WORK is a fresh temporary folder of the host. Processes: this one, which is the relay; the first
process of a process namespace (`_first`), which builds the cage; its child, which is the guest:
a kernel in user mode, or QEMU (labkit/system.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import cage
from .errors import BROKEN, TIMED_OUT, USAGE, LabError
from .plan import Plan, Terminal
from .relay import End, Outcome, Ports, Relay, ending_signals
from .system import Lines, Spec

if TYPE_CHECKING:
    from .system import System

MIB = 1 << 20
DISKS_MAX = 16
CPUS_MAX = 8
MEMORY_MIN = 128 * MIB
CONSOLE_LINES = 12
CONSOLE_LINES_MAX = 40

# What a kernel says when it is ill. The console log has these lines only from the kernel.
COMPLAINT = re.compile(
    r"^\[ *\d+\.\d+\] .*?(BUG:|Oops|WARNING:|Kernel panic|INFO: task .* blocked)"
)
KNOWN_COMPLAINTS: tuple[str, ...] = ()

Report = Callable[[str], None]


@dataclass
class Machine:
    """What the caller asks for."""

    command: list[str]
    cpus: int = 2
    memory: int | None = None  # bytes; None: as much of 4 GiB as there is
    disks: list[int] = field(default_factory=list)  # bytes each
    seconds: float = 600
    scratch: str | None = None  # None: a temporary folder
    keep: bool = False
    show: list[str] = field(default_factory=list)


@dataclass
class _Work:
    """The folders of one run, on the host."""

    folder: str
    scratch: str
    disk_folder: str  # "" when the disks live in the guest's tmpfs

    @property
    def private(self) -> str:
        return os.path.join(self.folder, "guest")

    @property
    def console(self) -> str:
        return os.path.join(self.folder, "console.log")

    @property
    def dmesg(self) -> str:
        return os.path.join(self.scratch, "dmesg")


def run(machine: Machine, system: System, report: Report) -> int:
    """Run the command in a guest; return the exit status for the caller."""
    memory = _memory(machine.memory, report)
    in_memory = not machine.keep and memory + sum(machine.disks) <= _available() * 4 // 5
    with _work_folder(machine, in_memory, report) as work:
        terminal = _terminal() if system.has_terminal else None
        plan = Plan(
            command=machine.command,
            cwd=_current_folder(),
            scratch=work.scratch,
            disks=system.disk_nodes(len(machine.disks)),
            show=machine.show,
            terminal=terminal,
        )
        size = system.private_bytes + 64 * MIB + (sum(machine.disks) if in_memory else 0)
        size += memory if system.memory_is_private else 0
        boot = _Boot(machine, system, work, plan, memory, size)
        outcome = _boot_and_relay(boot, machine.seconds, terminal)
        return _conclude(outcome, machine, work, report)


def end_by_signal(number: int) -> NoReturn:
    """End this process as the signal would have."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


def _conclude(outcome: Outcome, machine: Machine, work: _Work, report: Report) -> int:
    log = Path(work.console).read_text(errors="replace").splitlines()
    kept = machine.keep or machine.scratch is not None
    complaints = [line for line in log if _is_complaint(line)]
    if kept and (complaints or machine.keep):
        shutil.copyfile(work.console, work.dmesg)
    if complaints:
        where = work.dmesg if kept else "--keep keeps them"
        report(f"the guest's kernel complained: {complaints[0]} (all kernel messages: {where})")
    if outcome.end is End.EXITED:
        return outcome.status
    if outcome.end is End.TIMED_OUT:
        report(f"ended after {machine.seconds:g} s, the time limit (--timeout)")
        return TIMED_OUT
    if outcome.end is End.SIGNALLED:
        return -outcome.signal
    if outcome.end is End.ESCAPED:
        report("ended: Ctrl-] three times")
        return 128 + signal.SIGINT
    if outcome.end is End.FAILED:
        raise LabError(f"the guest could not start: {outcome.reason}", BROKEN)
    tail = "".join(f"\n  | {line}" for line in _last_words(log))
    raise LabError(f"the guest ended before COMMAND did; its last console lines:{tail}", BROKEN)


def _last_words(log: list[str]) -> list[str]:
    """Take the lines from the last complaint on: it has the kernel's reason."""
    at = [number for number, line in enumerate(log) if _is_complaint(line)]
    start = at[-1] if at else len(log) - CONSOLE_LINES
    return log[max(start, 0) :][:CONSOLE_LINES_MAX]


def _is_complaint(line: str) -> bool:
    return bool(COMPLAINT.search(line)) and not any(known in line for known in KNOWN_COMPLAINTS)


# -- what there is -----------------------------------------------------------------------------


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise LabError("the current directory is gone: cd to one that exists", USAGE) from error


def _terminal() -> Terminal | None:
    """Look for the terminal that COMMAND gets; without one it has /dev/null and pipes."""
    if not (os.isatty(0) and os.isatty(1)) or os.tcgetpgrp(0) != os.getpgrp():
        return None
    size = os.get_terminal_size(0)
    return Terminal(size.lines, size.columns, has_stderr=os.isatty(2))


def _meminfo(key: str) -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _available() -> int:
    return _meminfo("MemAvailable")


def _memory(asked: int | None, report: Report) -> int:
    """Decide the guest's memory: a sparse file in memory, of which it takes what it touches."""
    if asked is not None:
        total = _meminfo("MemTotal")
        if asked > total:
            raise LabError(
                f"--mem {asked // MIB}M is more than this machine has: at most {total // MIB}M",
                USAGE,
            )
        return asked
    wanted, there = 4096 * MIB, _available()
    if there >= wanted:
        return wanted
    memory = max(there * 3 // 4 // MIB * MIB, 512 * MIB)
    report(f"the guest gets {memory // MIB}M of memory, as {there // MIB}M are free (--mem)")
    return memory


@contextlib.contextmanager
def _work_folder(machine: Machine, in_memory: bool, report: Report) -> Iterator[_Work]:
    base = tempfile.gettempdir()
    if not re.fullmatch(r"[A-Za-z0-9_./+-]*", base):
        base = "/tmp"  # a kernel's command line is no place for odd names
    folder = os.path.realpath(tempfile.mkdtemp(prefix="ublk-ubi-lab-", dir=base))
    try:
        os.mkdir(os.path.join(folder, "guest"))
        disk_folder = "" if in_memory else os.path.join(folder, "disks")
        if disk_folder:
            os.mkdir(disk_folder)
        scratch = machine.scratch or os.path.join(folder, "scratch")
        if machine.scratch is None:
            os.mkdir(scratch)
        work = _Work(folder, scratch, disk_folder)
        Path(work.console).touch()
        yield work
    finally:
        for number in ending_signals():
            signal.signal(number, signal.SIG_IGN)  # we are ending, and leave nothing half removed
        if machine.keep:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(folder, "guest"))
            report(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


# -- booting -----------------------------------------------------------------------------------


@dataclass
class _Boot:
    """All that the guest's first process on the host needs to know."""

    machine: Machine
    system: System
    work: _Work
    plan: Plan
    memory: int
    private_size: int


@dataclass
class _Pipes:
    """Pipes between the relay and the guest: (read end, write end) each."""

    out: tuple[int, int]
    err: tuple[int, int]
    control_up: tuple[int, int]
    control_down: tuple[int, int]
    screen: tuple[int, int]
    keys: tuple[int, int]

    @classmethod
    def make(cls) -> _Pipes:
        return cls(*(os.pipe() for _ in range(6)))

    def host_ends(self) -> Ports:
        return Ports(
            self.out[0],
            self.err[0],
            self.control_up[0],
            self.control_down[1],
            self.keys[1],
            self.screen[0],
        )

    def guest_ends(self) -> list[int]:
        up = (self.out, self.err, self.control_up, self.screen)
        return [pair[1] for pair in up] + [pair[0] for pair in (self.control_down, self.keys)]


def _boot_and_relay(boot: _Boot, seconds: float, terminal: Terminal | None) -> Outcome:
    lines = _Pipes.make()
    cage.separate()
    first = os.fork()
    if first == 0:
        _first(boot, lines)
    try:
        for fd in lines.guest_ends():
            os.close(fd)
        kill = functools.partial(os.kill, first, signal.SIGKILL)
        return Relay(lines.host_ends(), kill, 0 if terminal else None).run(seconds)
    finally:
        # The namespace's first process takes all others with it, and is gone only after them.
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)


def _first(boot: _Boot, lines: _Pipes) -> NoReturn:
    """Be the first process of the namespace; never return into the caller's code."""
    try:
        cage.die_with_parent()
        for number in ending_signals():
            signal.signal(number, signal.SIG_IGN)  # the relay decides
        console = os.open(boot.work.console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        writable = [boot.work.scratch, *filter(None, [boot.work.disk_folder])]
        cage.enter(boot.work.private, boot.private_size, writable)
        disks = _make_private_files(boot)
        guest = os.fork()
        if guest == 0:
            _become_guest(boot, lines, console, disks)
        while os.wait()[0] != guest:
            pass
    except BaseException as error:
        os.write(lines.control_up[1], f"fail {error}\n".encode())
    os._exit(0)


def _make_private_files(boot: _Boot) -> list[str]:
    private = boot.work.private
    boot.system.write_files(private, boot.plan)
    disks = []
    for number, size in enumerate(boot.machine.disks):
        path = os.path.join(boot.work.disk_folder or private, f"disk{number}")
        with open(path, "xb") as disk:
            disk.truncate(size)
        disks.append(path)
    return disks


def _become_guest(boot: _Boot, lines: _Pipes, console: int, disks: list[str]) -> NoReturn:
    null = os.open("/dev/null", os.O_RDWR)
    for fd, source in ((0, null), (1, console), (2, console)):
        os.dup2(source, fd)
    # Low descriptors in a row; everything else goes.
    base = 100
    ends = [console, *lines.guest_ends()]
    for number, fd in enumerate(ends):
        os.dup2(fd, base + number)
    os.closerange(3, base)
    os.closerange(base + len(ends), 4096)
    for number in range(signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    private = boot.work.private
    spec = Spec(boot.memory, boot.machine.cpus, disks, private, Lines.from_base(base))
    program, arguments = boot.system.command(spec)
    environment = {"PATH": "/usr/bin:/bin", "HOME": private, "TMPDIR": private}
    os.execve(program, arguments, environment)
