"""What the guest shows and what COMMAND is given: the plan that init.c carries out.

The guest's root is the machine's own, read-only. Over the folders in COVERED lies fresh tmpfs; what
the caller needs beneath them (the checkout, the current directory, the Python in use) is shown
again, read-only, at its own path. The scratch folder has its own path too, and is writable.

A plan is a row of records, each one letter, a value and a NUL, done in order:

    N            no setuid programs        D DIR       make a folder
    T MODE,DIR   tmpfs on DIR              C DIR       COMMAND's current directory
    B PATH       the host's PATH again     E NAME=V    one variable of COMMAND's environment
    K TARGET     the next L points here    A WORD      one word of COMMAND
    L PATH       a symbolic link           I ROWS COLS COMMAND has a terminal, of this size
    S DIR        the host's DIR, writable  J           its stderr is that terminal, too
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import USAGE, LabError
from .kernel import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# tmpfs in the guest: (folder, mode). init.c puts it on /run and /dev/shm by itself.
TMPFS = (("/tmp", "1777"), ("/var/tmp", "1777"), ("/mnt", "755"))
MADE_BY_INIT = ("/run", "/dev")
RUN_FOLDERS = ("/run/lock",)

CHECKOUT = Path(__file__).resolve().parents[2]

# Variables that point at something of the host's that is not there in the guest.
HOST_ONLY = frozenset(
    b"TMPDIR TMP TEMP XDG_RUNTIME_DIR DBUS_SESSION_BUS_ADDRESS SSH_AUTH_SOCK NOTIFY_SOCKET "
    b"LISTEN_FDS LISTEN_PID LISTEN_FDNAMES TMUX STY DISPLAY WAYLAND_DISPLAY".split()
)


@dataclass(frozen=True)
class Terminal:
    """The caller's terminal."""

    rows: int
    columns: int
    has_stderr: bool


@dataclass
class Plan:
    """What the guest is to be."""

    command: list[str]
    cwd: str
    scratch: str
    disks: list[str] = field(default_factory=list)  # device nodes
    show: list[str] = field(default_factory=list)  # more paths to show again
    terminal: Terminal | None = None

    def encode(self) -> bytes:
        """Write the plan as init.c reads it."""
        return b"".join(letter + value + b"\0" for letter, value in self._records())

    def _records(self) -> Iterator[tuple[bytes, bytes]]:
        covers = _covers()
        if os.geteuid():
            yield b"N", b""
        for folder, mode in TMPFS:
            if os.path.isdir(folder) and not os.path.islink(folder):
                yield b"T", os.fsencode(f"{mode},{folder}")
        for folder in RUN_FOLDERS:
            yield b"D", os.fsencode(folder)
        yield from mount_records(self.again(), self.scratch, covers)
        yield b"C", os.fsencode(self.cwd)
        for name, value in self._environment().items():
            yield b"E", name + b"=" + value
        for word in self.command:
            yield b"A", os.fsencode(word)
        if self.terminal:
            yield b"I", b"%d %d" % (self.terminal.rows, self.terminal.columns)
            if self.terminal.has_stderr:
                yield b"J", b""

    def again(self) -> list[str]:
        """List the paths of the host's that COMMAND needs, wherever they lie."""
        again = [os.fspath(CHECKOUT), self.cwd, sys.prefix, sys.base_prefix]
        again += [os.fspath(cache_folder()), *self.show]  # a test's VM boots what is kept there
        if venv := os.environ.get("VIRTUAL_ENV"):
            again.append(venv)
        return again

    def _environment(self) -> dict[bytes, bytes]:
        return guest_environment(os.environb, self.scratch, self.disks)


def guest_environment(
    caller: Mapping[bytes, bytes], scratch: str, disks: Iterable[str]
) -> dict[bytes, bytes]:
    """Take the caller's environment, less what only the host has, plus what tells of the lab."""
    environment = {name: value for name, value in caller.items() if name not in HOST_ONLY}
    environment |= {
        b"LAB": b"1",
        b"LAB_SCRATCH": os.fsencode(scratch),
        b"LAB_DISKS": b" ".join(os.fsencode(disk) for disk in disks),
        b"DM_DISABLE_UDEV": b"1",  # no udev here: dmsetup would wait for it for ever
    }
    environment.setdefault(b"PATH", b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return environment


def shared_paths(plan: Plan) -> list[str]:
    """List what a guest with files of its own is to see of the host's; parents first.

    Its own programs and libraries are those of the host's release: /usr is not shared.
    """
    paths = {os.path.abspath(path) for path in plan.again()}
    paths |= {os.path.realpath(path) for path in paths}
    paths = {path for path in paths if os.path.exists(path) and path not in ("/", "/usr")}
    return sorted(p for p in paths if not any(_beneath(p, other) for other in paths - {p}))


def _covers() -> list[str]:
    """List the folders, links resolved, whose content is not the host's in the guest."""
    return [os.path.realpath(folder) for folder in (*MADE_BY_INIT, *(name for name, _ in TMPFS))]


def _beneath(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def mount_records(
    again: Iterable[str], scratch: str, covers: list[str]
) -> Iterator[tuple[bytes, bytes]]:
    """Show `again` beneath the covers, and the scratch folder wherever it is; parents first."""
    shown: set[str] = set()
    links: dict[str, str] = {}
    for path in again:
        final = _resolve(path, links)
        if any(_beneath(final, cover) for cover in covers) and os.path.exists(final):
            shown.add(final)
    outermost = [p for p in shown if not any(_beneath(p, other) for other in shown - {p})]
    mounts = [(path, b"B") for path in outermost if path != scratch] + [(scratch, b"S")]
    for path, letter in sorted(mounts):
        yield letter, os.fsencode(path)
    for link, target in links.items():
        hidden = any(_beneath(link, cover) for cover in covers)
        if hidden and not any(_beneath(link, path) for path in [*outermost, scratch]):
            yield b"K", os.fsencode(target)
            yield b"L", os.fsencode(link)


def _resolve(path: str, links: dict[str, str]) -> str:
    """Find the real path; note every symbolic link on the way, for a tmpfs may hide it."""
    done = "/"
    todo = [part for part in os.path.abspath(path).split("/") if part]
    for _ in range(1000):
        if not todo:
            return done
        part = todo.pop(0)
        if part == "..":
            done = os.path.dirname(done)
            continue
        step = os.path.join(done, part)
        if not os.path.islink(step):
            done = step
            continue
        target = os.readlink(step)
        links[step] = target
        done = "/" if target.startswith("/") else done
        todo = [name for name in target.split("/") if name not in ("", ".")] + todo
    raise LabError(f"too many symbolic links in {path}: name the real path", USAGE)
