"""The command line of tools/lab."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from . import guest, kernel, machine, native
from .errors import BROKEN, USAGE, LabError
from .qemu import Qemu
from .relay import ending_signals
from .usermode import UserMode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from .system import System

SIZE = re.compile(r"(\d+)([KMGT]?)")
PRINTABLE = ("kernel", "headers", "config", "version", "machine")

EPILOG = """\
In the guest: the machine's files, read-only; tmpfs on /tmp, /run, /var/tmp, /mnt, /dev/shm; and
  LAB=1         this is the lab
  LAB_SCRATCH   a folder of the host's, at the same path there, writable
  LAB_DISKS     the --disk devices in order, as "/dev/ubda /dev/ubdb"
The first call builds the kernel (some minutes); --print kernel builds it and does nothing else.

With --debian the guest is a machine of its own in QEMU, made of Debian's packages as the first
such call finds them (root only; some minutes): the packaged kernel of Debian stable (6.12) or
the newest of its backports, systemd, udev. It forgets what is written to its root; LAB_DISKS are
/dev/vdb and on; this checkout, the Python in use and the current directory are to be seen.

examples:
  tools/lab -- uname -r
  tools/lab --disk 1G -- sh -c 'mkfs.ext4 -q $LAB_DISKS && mount $LAB_DISKS /mnt && df -h /mnt'
  tools/lab --scratch out -- sh -c 'dmesg >$LAB_SCRATCH/dmesg'
  tools/lab --timeout 60 --keep -- pytest -p no:cacheprovider tests/device
  tools/lab --debian stable -- systemctl list-units
  tools/lab --debian newest --no-systemd --icount --cpus 1 -- sh -c 'time true'
  tools/lab -- bash            (at a terminal; Ctrl-] three times pulls the plug)

exit status: COMMAND's own; 128+N when signal N ended it; 126, 127 when it cannot be run;
124 at the time limit; 125 when the guest died or could not be built; 2 for a wrong call.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line instead of argparse's several."""
        raise LabError(f"{message} (see tools/lab --help)", USAGE)


def parse_size(text: str) -> int:
    """Read "5G", "512M", "4096" as bytes; binary units only."""
    match = SIZE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"size {text!r}: give a number with K, M, G or T (binary), as 512M"
        )
    return int(match[1]) << (10 * " KMGT".index(match[2] or " "))


def _memory(text: str) -> int:
    size = parse_size(text)
    if size < guest.MEMORY_MIN:
        raise argparse.ArgumentTypeError(f"size {text!r}: at least {guest.MEMORY_MIN >> 20}M")
    return size


def _disk(text: str) -> int:
    size = parse_size(text)
    if size == 0 or size % 512 or size >= 1 << 50:
        raise argparse.ArgumentTypeError(
            f"size {text!r}: a multiple of 512 bytes, more than 0 and less than 1024T"
        )
    return size


def _cpus(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= guest.CPUS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1 to {guest.CPUS_MAX}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of seconds, more than 0")
    return seconds


def _scratch(text: str) -> str:
    path = os.path.realpath(text)
    if path == "/":
        raise argparse.ArgumentTypeError("'/' would make all files writable: name a folder")
    try:
        os.makedirs(os.path.dirname(path) if os.path.isdir(path) else path, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {error.strerror}; name a folder that can be made or is there"
        ) from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not writable: name another folder")
    return path


def _existing(text: str) -> str:
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not there: name a file or a folder")
    return os.path.abspath(text)


def _parser() -> _Parser:
    parser = _Parser(
        prog="tools/lab",
        usage="tools/lab [options] -- COMMAND...",
        description="Runs COMMAND as root under a real kernel with ublk, in user-mode Linux.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cpus", type=_cpus, default=2, metavar="N", help="virtual processors (default 2)")
    add("--mem", type=_memory, metavar="SIZE", help="memory (default 4G, less if less is free)")
    add("--disk", type=_disk, action="append", default=[], metavar="SIZE", help="add an empty disk")
    add("--scratch", metavar="DIR", help="use and keep DIR as LAB_SCRATCH")
    add("--show", type=_existing, action="append", default=[], metavar="PATH",
        help="show PATH, too, although it lies beneath /tmp or the like; read-only")  # fmt: skip
    add("--timeout", type=_seconds, default=600.0, metavar="SECONDS",
        help="end the guest after that time, exit status 124 (default 600)")  # fmt: skip
    add(
        "--keep",
        action="store_true",
        help="keep scratch folder, disks (as a power cut leaves them) and kernel messages",
    )
    add("--debian", choices=sorted(machine.SUITES), help="boot a Debian machine in QEMU")
    add("--no-systemd", action="store_true", help="with --debian: COMMAND and nothing else")
    add("--icount", action="store_true",
        help="with --debian: a clock that counts instructions; needs --cpus 1")  # fmt: skip
    add("--native", action="store_true", help="run COMMAND on this machine's own kernel instead")
    add("--print", choices=PRINTABLE, help="print a path (or version); build what is not there")
    return parser


def report(message: str) -> None:
    """Say one line of the lab's own, on stderr."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # A second signal is not to disturb the clearing up after the first.
    for other in ending_signals():
        signal.signal(other, signal.SIG_IGN)
    raise kernel.Stopped(number)


def main(arguments: Sequence[str]) -> int:
    """Return the exit status; a negative one means: end by that signal."""
    for number in ending_signals():
        signal.signal(number, _stop)
    try:
        return _main(list(arguments))
    except kernel.Stopped as stopped:
        return -stopped.signal
    except LabError as error:
        report(str(error))
        return error.status
    except OSError as error:  # no space, no permission
        report(f"{error.filename or 'a system call'}: {error.strerror}")
        return BROKEN


def _main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments[:at])
    command = arguments[at + 1 :]
    if unknown:
        parser.error(f"{unknown[0]!r} is no option; COMMAND comes after --")
    if options.print:
        return _print(options.print)
    if not command or not command[0]:
        parser.error("no COMMAND: give it after --, as in tools/lab -- uname -r")
    if len(options.disk) > guest.DISKS_MAX:
        parser.error(f"--disk {len(options.disk)} times: at most {guest.DISKS_MAX} disks")
    if options.native and options.disk:
        parser.error("--disk with --native: this machine gets no disks; use the guest")
    if os.environ.get("LAB") == "1":
        raise LabError("LAB=1: this is the lab already; run COMMAND itself", USAGE)
    if options.scratch is not None:
        try:
            options.scratch = _scratch(options.scratch)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --scratch: {error}")
    if (options.no_systemd or options.icount) and not options.debian:
        parser.error("--no-systemd and --icount are for a Debian machine: add --debian newest")
    if options.icount and options.cpus != 1:
        parser.error("--icount counts on one processor: add --cpus 1")
    if options.native:
        return native.run(command, options.timeout, options.scratch, options.keep, report)
    asked = guest.Machine(
        command=command,
        cpus=options.cpus,
        memory=options.mem,
        disks=options.disk,
        seconds=options.timeout,
        scratch=options.scratch,
        keep=options.keep,
        show=options.show,
    )
    return guest.run(asked, _system(options), report)


def _system(options: argparse.Namespace) -> System:
    if options.debian:
        made = machine.find_or_make(options.debian, report)
        return Qemu(made, systemd=not options.no_systemd, icount=options.icount)
    return UserMode(kernel.find_or_build(report), kernel.find_or_build_init(report))


def _print(what: str) -> int:
    if what == "machine":
        sys.stdout.write(f"{machine.find_or_make('stable', report).folder}\n")
        return 0
    built = kernel.find_or_build(report)
    values = {
        "kernel": built.program,
        "headers": built.headers,
        "config": built.config,
        "version": built.version,
    }
    print(values[what])
    return 0
